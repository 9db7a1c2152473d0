"""The bench as a user runs it: a grid of students and perturbations through the whole workflow."""

import h5py
import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import load_file
from scipy.special import digamma, softmax

from ensdistill.studies import read_configuration
from ensdistill.weights import read_header
from tests.project import FIGURES, TINY, Project

STRATEGIES = ["ods_each", "tdiv_sdiv", "mixup", "held_out"]
GRIDS = {
    "students": [
        {"student": "latent_batch_ensemble"},
        "hydra",
        "mimo",
        "packed",
        "gaussian_logits",
        {"name": "flow_matching", "backbone": "one"},
        {"student": "single", "objective": "dirichlet", "recipe": {"clip_norm": 1.0}},
        {"student": "single", "objective": "proxy_dirichlet"},
    ],
    "perturbations": ["none"],
}
METHODS = {
    "one": {"label": "KD-single", "student": "single"},
    **{it: {"label": f"KD+{it}", "perturbation": it} for it in STRATEGIES},
    "once": {"label": "KD, one pass", "perturbation": {"name": "ods_each", "single_pass": True}},
}
BENCH = {
    **TINY,
    "images": {**TINY["images"], "held_out": 40},
    "analyses": {**TINY["analyses"], "perturbed_images": 150},
    "corruptions": {"images": 10},
    "methods": METHODS,
    "grid": GRIDS,
}
CONFIG = {"run": ["tiny"], "studies": {"tiny": BENCH}}


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    project = Project.new(tmp_path_factory.mktemp("bench"))
    project.configure(CONFIG)
    project.run()
    return project


def test_every_method_has_its_row_and_every_figure_is_drawn(bench):
    table = pd.read_csv(bench.file("tables/results.csv")).set_index("system")
    study = read_configuration(CONFIG).studies["tiny"]
    labels = [method.label for method in study.methods.values()]
    assert list(table.index) == ["DE-1", "DE-2", "DE-3", *labels]
    assert {"LatentBE", "Hydra", "MIMO", "Packed", "DLF", "EDFM", "EnD²", "Proxy-EnD²"} < {*labels}
    # People were asked about CIFAR-10's test images alone.
    absent = [f"{key}{std}" for key in ("diversity", "human_kl") for std in ("", "_std")]
    scores = table.drop(columns=absent)
    assert np.isfinite(scores.loc["DE-1":].to_numpy()).all()
    # One network has no diversity, merged or not; a distribution over its predictions has.
    assert table.index[table.diversity.isna()].tolist() == ["DE-1", "KD-single", "LatentBE"]
    # Hydra's heads are still the same in so short a training's best epoch.
    assert (table.diversity.dropna().drop("Hydra") > 0).all()
    assert table.loc["LatentBE", "parameters"] == table.loc["DE-1", "parameters"]
    for figure in FIGURES:
        assert bench.file(f"figures/{figure}.png").stat().st_size > 5000
    assert bench.planned() == set()


def test_the_table_shows_a_dash_for_what_a_single_network_does_not_have(bench):
    rows = bench.file("tables/results.md").read_text().splitlines()
    head = [cell.strip() for cell in rows[0].strip("|").split("|")]
    cells = {}
    for row in filter(lambda row: row.startswith("|"), rows[2:]):
        system, *others = (cell.strip() for cell in row.strip("|").split("|"))
        cells[system] = dict(zip(head[1:], others, strict=True))["Diversity"]
    assert cells["LatentBE"] == cells["KD-single"] == "–"
    assert float(cells["Proxy-EnD²"].split()[0]) > 0


def test_every_system_has_its_costs(bench):
    costs = pd.read_csv(bench.file("metrics/costs.csv")).set_index("system")
    table = pd.read_csv(bench.file("tables/results.csv")).set_index("system")
    assert list(costs.index) == list(table.index)
    assert (costs["parameters"] == table["parameters"]).all()
    for name in ("passes", "macs", "ms_1", "ms_128"):
        np.testing.assert_allclose(table[name], costs[name])
    for label, method in (("LatentBE", "latent_batch_ensemble"), ("DLF", "gaussian_logits")):
        weights = load_file(bench.file(f"students/{method}_none/0/weights.safetensors"))
        assert costs.loc[label, "bytes"] == sum(it.nbytes for it in weights.values())
    assert costs.loc["EDFM", "training_macs"] > costs.loc["KD-single", "training_macs"]
    passes = costs["passes"]
    # ResNet-8 of width 4 on 8×8 pixels, K = 10: stem and stages; the last one and the linear layer
    # are a Hydra's head, of which there are two. A DLF has q = 8 loadings and S = 32 samples more.
    stages = [9 * 64 * 2 * 4 * 4, 9 * 16 * (4 * 8 + 8 * 8), 9 * 4 * (8 * 16 + 16 * 16)]
    head = stages[2] + 16 * 10
    plain = 9 * 64 * 4 + stages[0] + stages[1] + head
    known = {"LatentBE": plain, "EnD²": plain, "DE-2": 2 * plain, "KD+mixup": 2 * plain}
    known |= {"Hydra": plain + head, "DLF": plain + 8 * 16 + 8 * 32 * 10}
    assert passes[[*known]].to_dict() == pytest.approx({it: n / plain for it, n in known.items()})


@pytest.mark.parametrize(("method", "offset"), [("dirichlet", 0.0), ("proxy_dirichlet", 1.0)])
def test_scores_of_dirichlet_students_recomputed_from_their_logits_agree(bench, method, offset):
    path = bench.file(f"logits/students/single_{method}_none/0.h5")
    with h5py.File(path) as file:
        assert file.attrs["prediction"] == "dirichlet"
        assert float(file.attrs["concentration_offset"]) == offset
        z, y = file["test/logits"][:, 0].astype(float), file["test/labels"][:]
    alpha = np.exp(z) + offset
    total = alpha.sum(1)
    probs = alpha / total[:, None]
    label = {"dirichlet": "EnD²", "proxy_dirichlet": "Proxy-EnD²"}[method]
    row = pd.read_csv(bench.file("metrics/scores.csv")).set_index("system").loc[label]
    assert row["nll"] == pytest.approx(-np.log(probs[np.arange(len(y)), y]).mean(), rel=1e-9)
    assert row["diversity"] == pytest.approx((9 / total).mean(), rel=1e-9)
    information = -(probs * np.log(probs)).sum(1)
    information += (probs * (digamma(alpha + 1) - digamma(total + 1)[:, None])).sum(1)
    assert (information > -1e-9).all()


def test_teachers_are_asked_where_the_strategies_ask_them(bench):
    with h5py.File(bench.file("images.h5")) as images:
        held_out = images["held_out/images"][:]
    with h5py.File(bench.file("logits/perturbed.h5")) as file:
        assert {*STRATEGIES, "gaussian", "ods", "conf_ods", "clean"} == {
            name for name in file if isinstance(file[name], h5py.Group)
        }
        assert {file[f"{name}/logits"].shape for name in STRATEGIES} == {(150, 2, 10), (40, 2, 10)}
        clean, seen = file["clean/examples"][:], file["held_out/examples"][:]
        kl = {name: diversity(file[f"{name}/logits"][:]) for name in (*STRATEGIES, "clean")}
    assert all(any(np.allclose(image, it / 255) for it in held_out) for image in seen)
    assert not any(np.allclose(image, it) for image in seen for it in clean)
    means = pd.read_csv(bench.file("metrics/diversity_teachers.csv")).groupby("name")["mean_kl"]
    for name, value in kl.items():
        assert means.first()[f"train_{name}"] == pytest.approx(value, rel=1e-5)


def diversity(logits):
    """Mean pairwise KL of two teachers, both orders."""
    p, q = softmax(logits.astype(float), axis=2).transpose(1, 0, 2)
    return ((p - q) * np.log(p / q)).sum(1).mean() / 2


def test_a_flow_starts_from_the_student_of_the_same_seed_of_its_backbones_method(bench, tmp_path):
    backbone = read_header(bench.file("students/one/0/weights.safetensors"))
    flow = read_header(bench.file("students/flow_matching_none/0/weights.safetensors"))
    assert flow["starts_from"] == [backbone["digest"]]
    project = bench.copy(tmp_path / "changed")
    project.change("studies", "tiny", "methods", "one", "recipe", value={"epochs": 4})
    jobs = project.planned()
    trained = {job for job in jobs if job.startswith("student")}
    assert trained == {"student one 0", "student flow_matching_none 0"}


def test_one_more_strategy_in_a_grid_trains_its_own_students_alone(bench, tmp_path):
    project = bench.copy(tmp_path / "changed")
    grid = {**GRIDS, "perturbations": ["none", "mixup"]}
    project.change("studies", "tiny", "grid", value=grid)
    trained = {job for job in project.planned() if job.startswith(("student", "teacher"))}
    assert trained == {
        f"student {name}_mixup 0"
        for name in ("latent_batch_ensemble", "hydra", "gaussian_logits", "flow_matching")
    } | {"student single_dirichlet_mixup 0", "student single_proxy_dirichlet_mixup 0"}
