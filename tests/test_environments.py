"""The pinned environments agree with each other and with what the library needs.

Neither conda nor apptainer is needed: a stand-in answers what Snakemake asks of them beforehand.
"""

import hashlib
import re
import tomllib

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from tests.project import REPOSITORY, Project

ENVS = REPOSITORY / "envs"
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
PINS = dict(line.split("==") for line in (REPOSITORY / "constraints.txt").read_text().splitlines())
STANDINS = {
    "conda": """case "$1" in
        info) echo '{"conda_prefix": "/nowhere", "platform": "linux-64"}';;
        config) echo '{"get": {"channel_priority": "strict"}}';;
        *) echo conda 25.1.0;;
    esac""",
    "apptainer": "echo apptainer version 1.3.6",
}


def test_every_dependency_is_pinned_at_a_version_that_the_library_takes():
    pins = {canonicalize_name(name): version for name, version in PINS.items()}
    extras = PROJECT["optional-dependencies"].values()
    needed = [*PROJECT["dependencies"], *(line for extra in extras for line in extra)]
    assert len(needed) > 20
    others = [line for line in needed if not line.startswith("ensdistill[")]
    for requirement in map(Requirement, others):
        assert pins[canonicalize_name(requirement.name)] in requirement.specifier, requirement


def test_changed_pins_make_a_new_conda_environment():
    """Snakemake knows an environment by the content of its two files under envs/."""
    digest = hashlib.sha256((REPOSITORY / "constraints.txt").read_bytes()).hexdigest()
    script = (ENVS / "ensdistill.post-deploy.sh").read_text()
    assert re.findall(r"\b[0-9a-f]{64}\b", script) == [digest]


def test_conda_installs_only_pinned_packages_and_a_python_that_the_library_takes():
    packages = dict(
        package.split("=")
        for package in yaml.safe_load((ENVS / "ensdistill.yaml").read_text())["dependencies"]
    )
    assert packages["python"] in SpecifierSet(PROJECT["requires-python"])
    assert all(re.fullmatch(r"[\d.]+", version) for version in packages.values())


def test_the_image_is_made_of_files_that_exist_with_the_same_pins():
    recipe = (ENVS / "Dockerfile").read_text()
    (base,) = re.findall(r"^FROM (\S+)$", recipe, re.MULTILINE)
    assert re.search(r"-\d{8}-", base), "a base image by its date"
    copied = " ".join(re.findall(r"^COPY (.+) \S+$", recipe, re.MULTILINE)).split()
    assert {"constraints.txt", "pyproject.toml", "ensdistill"} <= set(copied)
    assert all((REPOSITORY / name).exists() for name in copied)
    build = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["hatch"]["build"]
    assert build["targets"]["wheel"]["force-include"].keys() <= set(copied)
    assert set(PROJECT["license-files"]) | {PROJECT["readme"]} <= set(copied)
    assert "--constraint constraints.txt" in recipe


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("conda", "Conda environment envs/ensdistill.yaml will be created."),
        ("apptainer", "Building DAG of jobs..."),
    ],
)
def test_snakemake_finds_the_environment_of_every_rule(tmp_path, monkeypatch, method, expected):
    project = Project.new(tmp_path / "project")
    standin = tmp_path / "bin" / method
    standin.parent.mkdir()
    standin.write_text(f"#!/bin/sh\n{STANDINS[method]}\n")
    standin.chmod(0o755)
    monkeypatch.setenv("PATH", str(standin.parent), prepend=":")
    done = project.run("--dry-run", "--sdm", method)
    assert expected in done.stdout + done.stderr
    rules = "\n".join(path.read_text() for path in (project.folder / "rules").glob("*.smk"))
    scripts = re.findall(r"^ +script:", rules, re.MULTILINE)
    assert len(scripts) == len(re.findall(r'^ +conda:\n +"../envs/ensdistill.yaml"', rules, re.M))
    assert len(scripts) > 8
    assert (project.folder / "Snakefile").read_text().count('container: "envs/ensdistill.sif"') == 1
