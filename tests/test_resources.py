"""What jobs ask of a cluster's scheduler, by dry runs."""

import re

import pytest
import torch
import yaml
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from ensdistill.learning import learning
from ensdistill.networks import build_network
from ensdistill.students import Step, build_student
from ensdistill.studies import read_configuration
from tests.project import REPOSITORY, Project

CONFIG = yaml.safe_load((REPOSITORY / "config.yaml").read_text())
STUDY = read_configuration(CONFIG).studies["cifar10_resnet32"]
IMAGES = 60_000
TEACHERS = [f"teachers/{seed}/weights.safetensors" for seed in range(4)]


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A project whose images.h5 and teachers are there, in size."""
    project = Project.new(tmp_path_factory.mktemp("resources"))
    project.configure({**CONFIG, "run": ["cifar10_resnet32"]})
    for study in ("cifar10_resnet32", "cifar100_wrn28x10"):
        for name in ("images.h5", *TEACHERS):
            path = project.folder / "results" / study / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as file:
                file.truncate(IMAGES * 3 * 32 * 32 if name == "images.h5" else 2**20)
    return project


def asked(project, study, *arguments):
    """Memory [MB] and minutes that a dry run says for the networks of a study, by folder."""
    plan = project.run("--dry-run", "--forceall", f"results/{study}/claims.md", *arguments).stdout
    jobs = {}
    for block in re.split(r"^rule ", plan, flags=re.MULTILINE):
        if found := re.search(rf"output: results/{study}/(\S+)/weights.safetensors", block):
            numbers = [re.search(rf"{name}=(\d+)", block)[1] for name in ("mem_mb", "runtime")]
            jobs[found[1]] = tuple(map(int, numbers))
    return jobs


@pytest.fixture(scope="module")
def jobs(project):
    return asked(project, "cifar10_resnet32")


class Operations(TorchDispatchMode):
    """Counts additions and multiplications as PyTorch does (whose own counter fails in ODS)."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if counter := flop_registry.get(function._overloadpacket):
            self.count += counter(*args, **(kwargs or {}), out_val=out)
        return out


def operations(parts, teachers):
    """Of a training step, per image."""
    architecture = {**parts["architecture"], "num_classes": 10}
    student = build_student(**parts["student"], architecture=architecture, members=parts["members"])
    x, y = torch.rand(4, 3, 32, 32), torch.arange(4)
    step = Step(student, teachers, x, y, 0.0, torch.Generator(), torch.Generator())
    how = learning(teachers, parts["objective"], parts["perturbation"])
    with Operations() as operations:
        how.objective(step, how.perturbation(step))["loss"].backward()
    return operations.count / len(x)


def test_time_for_training_follows_the_operations_that_pytorch_counts(jobs):
    teachers = [build_network("resnet32", 10).eval().requires_grad_(False) for _ in range(4)]
    steps = {"teachers/0": STUDY.parts()}
    for method in ("be", "kd_single", "kd", "kd_gaussian", "kd_conf_ods"):
        steps[f"students/{method}/0"] = STUDY.parts(method)
    for network, parts in steps.items():
        _, minutes = jobs[network]
        counted = operations(parts, teachers) * IMAGES * 300 / 4e12 / 60
        assert minutes == pytest.approx(20 + counted, rel=0.15), network


def test_memory_for_training_grows_with_its_files(jobs):
    assert jobs["teachers/0"][0] == pytest.approx(4000 + 4 * 176, abs=1)
    assert jobs["students/kd/0"][0] == pytest.approx(4000 + 4 * (176 + 4), abs=1)


def test_no_job_asks_for_more_time_than_the_partition_gives(project):
    study = "cifar100_wrn28x10"
    assert asked(project, study)["teachers/0"][1] > 1440
    bounded = asked(project, study, "--workflow-profile", "profiles/slurm")
    assert len(bounded) == 5 + 6 * 3
    assert all(minutes <= 1440 for _, minutes in bounded.values())


def test_a_training_by_several_asks_for_as_many_cards_processors_and_as_much_more_memory(project):
    config = {**CONFIG, "studies": {**CONFIG["studies"]}}
    study = {**CONFIG["studies"]["cifar10_resnet32"], "gpus_per_job": 4}
    config["studies"]["cifar10_resnet32"] = study
    several = project.copy(project.folder.parent / "several")
    several.configure({**config, "run": ["cifar10_resnet32"]})
    target = "results/cifar10_resnet32/students/kd/0/weights.safetensors"
    gres = ["--profile", "profiles/slurm", "--workflow-profile", "profiles/slurm-gres"]
    for profile, cards in ([], "gpu=4"), (gres, "gres=gpu:4"):
        plan = ["--dry-run", "--forceall", target, *profile]
        planned = several.snakemake(*plan, cores=("--cores", "99"))
        assert planned.returncode == 0, planned.stderr
        jobs = [
            it
            for it in re.split(r"^rule ", planned.stdout, flags=re.M)
            if re.match("teacher|student", it)
        ]
        assert len(jobs) == 4 + 1
        for job in jobs:
            assert re.search(rf"resources: .*\b{cards}(,|$)", job, re.M), job
            assert re.search(r"^ *threads: 4$", job, re.M)
            if job.startswith("student"):
                memory = int(re.search(r"mem_mb=(\d+)", job)[1])
                assert memory == pytest.approx(4 * (4000 + 4 * (176 + 4)), abs=4)


def test_the_slurm_profile_says_all_that_the_default_one_says():
    default, slurm = (
        yaml.safe_load((REPOSITORY / "profiles" / name / "profile.yaml").read_text())
        for name in ("default", "slurm")
    )
    assert default.items() <= slurm.items()
