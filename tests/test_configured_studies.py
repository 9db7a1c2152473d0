"""Every study of config.yaml: the plan is right, and its networks take a real step."""

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from ensdistill.downloads import SOURCES
from ensdistill.learning import learning
from ensdistill.recipes import Recipe
from ensdistill.students import build_student, count_parameters
from ensdistill.studies import PAPERS_METHODS, read_configuration
from ensdistill.training import fit
from tests.project import FIGURES, REPOSITORY, Project

STUDIES = read_configuration(yaml.safe_load(Path(REPOSITORY, "config.yaml").read_text())).studies
SHAPES = {  # channels, side, classes, parameters of a teacher
    "digits": (1, 8, 10, 19_074),
    "cifar10_small": (3, 32, 10, 75_290),
    "digits_bench": (1, 8, 10, 19_074),
    "cifar10_bench": (3, 32, 10, 464_154),
    "cifar100_wrn28x4_bench": (3, 32, 100, 5_872_180),
    "cifar10_resnet32": (3, 32, 10, 464_154),
    "cifar100_wrn28x10": (3, 32, 100, 36_536_884),
    "tinyimagenet_wrn28x10": (3, 64, 200, 36_600_984),
}


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    project = Project.new(tmp_path_factory.mktemp("configured"))
    project.configure(yaml.safe_load((REPOSITORY / "config.yaml").read_text()))
    return project


@pytest.mark.parametrize("name", STUDIES)
def test_a_clean_checkout_plans_the_right_jobs(project, name):
    study = STUDIES[name]
    project.change("run", value=[name])
    jobs = {job.replace(f" {name}", "") for job in project.planned()}
    networks = {f"teacher {seed}" for seed in range(study.pool)}
    networks |= {
        f"student {method} {seed}"
        for method in study.methods
        for seed in range(study.student_seeds)
    }
    assert {job for job in jobs if job.startswith(("teacher", "student"))} == networks
    assert sum(job.startswith("logits") for job in jobs) == len(networks)
    assert jobs >= {"images", "shifted", "table", "claims"}
    assert jobs >= {"perturbed", "swept", "transferred", "distances"}
    assert {job for job in jobs if job.startswith("figure_")} == {f"figure_{x}" for x in FIGURES}
    downloads = {job.split()[1] for job in jobs if job.startswith("download ")}
    sections = [study.images, *study.out_of_distribution]
    sources = {section.source for section in sections} & SOURCES.keys()
    archives = {archive for source in sources for archive in SOURCES[source].archives}
    if name in ("cifar10_bench", "cifar10_resnet32"):  # whose test images people were asked about
        archives.add("cifar10h-probs.npy")
    assert downloads == archives


@pytest.mark.parametrize("name", STUDIES)
def test_a_step_on_synthetic_images_of_the_right_shape(name):
    study, (channels, side, classes, parameters) = STUDIES[name], SHAPES[name]
    rng = np.random.default_rng(0)
    images = torch.from_numpy(rng.integers(0, 256, (2, channels, side, side), dtype=np.uint8))
    split = images, torch.from_numpy(rng.integers(0, classes, 2))

    def train(method, teachers):
        recipe, parts = study.recipe(method) if method else study.teacher, study.parts(method)
        changes = {"epochs": 1, "batch_size": 2, "warmup_epochs": 1}
        recipe = Recipe(**{**recipe.model_dump(), **changes})
        settings = {**study.augmentation.model_dump(), "precision": study.precision}
        torch.manual_seed(0)
        architecture = {**parts["architecture"], "num_classes": classes, "in_channels": channels}
        student = build_student(
            **parts["student"], architecture=architecture, members=parts["members"]
        )
        before = [parameter.clone() for parameter in student.parameters()]
        how = learning(teachers, parts["objective"], parts["perturbation"])
        student, (row,) = fit(student, how, split, split, recipe, seed=0, **settings)
        assert np.isfinite(list(row.values())).all()
        assert all(
            not torch.equal(old, new) for old, new in zip(before, student.parameters(), strict=True)
        )
        return student

    teacher = train(None, []).network
    assert count_parameters(teacher) == parameters
    teacher.eval().requires_grad_(False)
    ours = PAPERS_METHODS["kd_conf_ods"]
    method = next(
        name
        for name, it in study.methods.items()
        if (it.student, it.objective, it.perturbation)
        == (ours.student, ours.objective, ours.perturbation)
    )
    student = train(method, [teacher] * study.members)
    # Each layer gets r, s and a bias per member, where only the last one had a bias, of K numbers.
    shapes = [
        module.weight.shape[:2]
        for module in teacher.modules()
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear)
    ]
    factors = study.members * sum(inputs + 2 * outputs for outputs, inputs in shapes)
    assert count_parameters(student) == parameters + factors - classes
