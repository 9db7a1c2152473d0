"""A study of networks from a file of one's own, from its images to its pages, and its reruns."""

import pandas as pd
import pytest

from ensdistill.weights import read_header
from tests.builders import MINE
from tests.project import TINY, Project

OWN = "file:models/mine.py:build"
METHODS = {
    "signs": {"label": "BE", "student": {"name": "batch_ensemble", "init": "signs"}},
    "latent": {"label": "LatentBE", "student": "latent_batch_ensemble", "perturbation": "conf_ods"},
    "hydra": {"label": "Hydra", "student": {"name": "hydra", "cut": "late"}},
    "other": {
        "label": "KD-single",
        "student": {"name": "single", "architecture": {"name": "resnet8", "width": 4}},
    },
}
STUDY = {
    **TINY,
    "architecture": {"name": OWN, "options": {"width": 5}},
    "pool": 2,
    "methods": METHODS,
}
OTHER = "results/other/teachers/0/weights.safetensors"


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """Run to its end, and of another study a teacher; tests change it in order."""
    project = Project.new(tmp_path_factory.mktemp("own") / "project")
    for folder in ("models", "sizes"):
        (project.folder / folder).mkdir()
    (project.folder / "models/mine.py").write_text(MINE)
    (project.folder / "sizes/__init__.py").write_text("WIDTH = 6\n")
    project.configure({"run": ["tiny"], "studies": {"tiny": STUDY, "other": TINY}})
    project.run("all", OTHER)
    return project


def test_networks_of_an_own_file_are_taught_judged_and_shown(project):
    results = pd.read_csv(project.file("tables/results.csv"))
    assert {"DE-1", "DE-2", *(it["label"] for it in METHODS.values())} <= {*results["system"]}
    numbers = results.set_index("system")[["nll", "parameters", "macs"]].dropna()
    assert {"DE-1", "BE", "LatentBE", "Hydra", "KD-single"} <= {*numbers.index}
    plain = 9 * 5 + 5 + 2 * 5 + (9 * 5 * 5 + 5) + 5 * 10 + 10
    factors = 2 * (1 + 5 + 5 + 5 + 5 + 10) + (5 + 5 + 10)
    heads = (9 * 5 * 5 + 5) + 5 * 10 + 10
    expected = {"DE-1": plain, "BE": plain + factors, "LatentBE": plain, "Hydra": plain + heads}
    assert {key: numbers["parameters"][key] for key in expected} == expected
    multiply_adds = 9 * 5 * 36 + 9 * 5 * 5 * 16 + 5 * 10
    more = 9 * 5 * 5 * 16 + 5 * 10
    expected = {"DE-1": multiply_adds, "BE": 2 * multiply_adds, "LatentBE": multiply_adds}
    expected["Hydra"] = multiply_adds + more
    assert {key: numbers["macs"][key] for key in expected} == expected
    for page in ("index.html", "claims.html", "findings.html"):
        assert project.file(page).exists()


def test_headers_say_of_which_file_networks_are(project):
    for network, kind in (("teachers/1", "single"), ("students/hydra/0", "hydra")):
        header = read_header(project.file(f"{network}/weights.safetensors"))
        assert header["architecture"] == {"name": OWN, "options": {"width": 5}}
        assert header["spec"]["name"] == kind
    header = read_header(project.file("students/latent/0/weights.safetensors"))
    assert header["spec"]["name"] == "single"
    assert header["spec"]["architecture"]["name"] == OWN
    assert read_header(project.file("students/signs/0/weights.safetensors"))["student"] == {
        "name": "batch_ensemble",
        "init": "signs",
    }


def test_a_changed_file_makes_its_networks_anew_and_no_others(project):
    assert project.planned() == set()
    project.edit("models/mine.py", ".relu().mean((2, 3))", ".sigmoid().mean((2, 3))")
    jobs = project.planned()
    assert {"teacher 0", "teacher 1", *(f"student {name} 0" for name in METHODS)} <= jobs
    assert {"logits students/signs/0", "costs", "table", "claims"} <= jobs
    assert not {"images", "shifted"} & jobs
    assert project.planned(OTHER) == set()


def test_a_missing_file_is_named_before_anything_runs(project):
    (project.folder / "models/mine.py").rename(project.folder / "models/yours.py")
    done = project.snakemake("--dry-run")
    assert done.returncode != 0
    output = done.stdout + done.stderr
    assert "config.yaml: the architecture file models/mine.py does not exist" in output


def test_a_file_of_weights_to_begin_with_is_an_input_of_its_networks(project):
    architecture = {"name": "timm:resnet18", "pretrained": "theirs.pth"}
    methods = {"kd": {"label": "KD", "student": {"name": "single", "architecture": "resnet8"}}}
    study = {**TINY, "architecture": architecture, "methods": methods}
    project.configure({"run": ["begun"], "studies": {"begun": study}})
    done = project.snakemake("--dry-run")
    assert done.returncode != 0
    assert "config.yaml: theirs.pth does not exist" in done.stdout + done.stderr
    (project.folder / "theirs.pth").touch()
    plan = project.run("--dry-run", "students").stdout
    taken = {
        block.split(":")[0]: "theirs.pth" in block.partition("input:")[2].partition("\n")[0]
        for block in plan.split("\nrule ")[1:]
    }
    expected = {"images": False, "teacher": True, "student": False}
    assert expected.items() <= taken.items()
