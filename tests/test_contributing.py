"""The examples of CONTRIBUTING.md: applied to a copy, planned, and run."""

import re

import pandas as pd
import pytest
import yaml

from tests.project import RECIPE, REPOSITORY, Project

MINE = {
    "images": {"source": "stripes", "train": 100, "validation": 50, "test": 50},
    "architecture": {"name": "convnet2", "width": 4},
    "augmentation": {"crop_padding": 0, "flip": False},
    "teacher": RECIPE,
    "student": RECIPE,
    "members": 2,
    "pool": 2,
    "student_seeds": 1,
    "methods": {"kd_uniform": {"label": "KD+uniform", "perturbation": "uniform"}},
}


def examples() -> dict[str, str]:
    """The diffs by the title above them."""
    text = (REPOSITORY / "CONTRIBUTING.md").read_text()
    sections = re.split(r"^## ", text, flags=re.M)[1:]
    found = {
        section.partition("\n")[0]: re.findall(r"```diff\n(.*?)```", section, re.S)
        for section in sections
    }
    return {title: diffs[0] for title, diffs in found.items() if diffs}


def apply(project: Project, diff: str) -> set[str]:
    """Make the changes of a diff without line numbers; the files that it touches.

    Of each part between @@ marks the first line that stays, or goes, finds the place.
    """
    touched = set()
    for file in re.split(r"^--- .*\n\+\+\+ b/", diff, flags=re.M)[1:]:
        name, _, parts = file.partition("\n")
        touched.add(name)
        for part in re.split(r"^@@\n", parts, flags=re.M)[1:]:
            lines = part.splitlines()
            old = "\n".join(line[1:] for line in lines if line[:1] != "+")
            new = "\n".join(line[1:] for line in lines if line[:1] != "-")
            project.edit(name, old, new)
    return touched


@pytest.fixture(scope="module")
def extended(finished, tmp_path_factory):
    """A finished study with every example, and what a dry run would make after each."""
    project = finished.copy(tmp_path_factory.mktemp("contributing") / "extended")
    planned = {}
    for title, diff in examples().items():
        touched = apply(project, diff)
        planned[title] = touched, project.planned()
    return project, planned


def test_each_example_touches_few_files_and_plans_no_network_that_exists(extended):
    _, planned = extended
    files = {
        title: {f.removeprefix("ensdistill/") for f in touched}
        for title, (touched, _) in planned.items()
    }
    assert files == {
        "A perturbation": {"options.py", "perturbations.py", "config.yaml"},
        "An architecture": {"architectures.py", "networks.py"},
        "A data set": {"downloads.py", "sources.py"},
        "A metric": {"metrics.py"},
    }
    costly = ("images", "shifted", "teacher", "student", "logits")
    for title, (_, plan) in planned.items():
        found = {job for job in plan if job.startswith(costly)}
        assert found == {"student kd_uniform 0", "logits students/kd_uniform/0"}, title


def test_the_examples_run(extended):
    project, _ = extended
    config = yaml.safe_load((project.folder / "config.yaml").read_text())
    config["studies"]["mine"] = MINE
    project.configure(config)
    project.run("results/mine/logits/students/kd_uniform/0.h5", "results/tiny/tables/results.csv")
    table = pd.read_csv(project.file("tables/results.csv"), keep_default_na=False)
    assert "KD+uniform" in set(table["system"])
    top2 = table["top2"].astype(float)
    assert (top2 >= table["acc"].astype(float)).all()
    assert top2.max() <= 100
