"""What wheel and sdist hold, and that the command and the library work from there."""

import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib.metadata import packages_distributions

import pandas as pd
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from ensdistill.parity import export_student
from tests.deployed import CLASSES, deploy
from tests.project import PARTS, REPOSITORY
from tests.test_init import write_images
from tests.wheel import built, clean_environment, installed


def files_of(*places):
    """Files of the repository at some places, and below."""
    found = [
        it for place in places for it in [REPOSITORY / place, *(REPOSITORY / place).rglob("*")]
    ]
    names = {str(it.relative_to(REPOSITORY)) for it in found if it.is_file()}
    return {name for name in names if "__pycache__" not in name}


def test_wheel_and_sdist_hold_the_whole_workflow_and_the_library_runs_from_there(tmp_path):
    wheel, sdist = built(tmp_path / "dist")
    version = re.search(
        r'^__version__ = "(.+)"$', (REPOSITORY / "ensdistill/__init__.py").read_text(), re.M
    )[1]
    assert wheel.name == f"ensdistill-{version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        inside = {name for name in archive.namelist() if not name.endswith("/")}
    expected = {name: name for name in files_of("ensdistill")}
    parts = [*(part for part in PARTS if part != "ensdistill"), "config.yaml", "config.schema.json"]
    expected |= {name: f"ensdistill/workflow/{name}" for name in files_of(*parts)}
    assert {name for name in inside if ".dist-info/" not in name} == set(expected.values())
    with tarfile.open(sdist) as archive:
        root = f"ensdistill-{version}/"
        assert all(name.startswith(root) for name in archive.getnames())
        source = {name.removeprefix(root) for name in archive.getnames()}
    wanted = files_of(
        "ensdistill", "tests", "docs", *parts, "README.md", "LICENSE", "pyproject.toml"
    )
    assert wanted <= source
    site = installed(wheel, tmp_path / "site")
    for original, copy in expected.items():
        assert (site / copy).read_bytes() == (REPOSITORY / original).read_bytes()
    told = subprocess.run(
        [sys.executable, "-c", "import ensdistill.workflow as it; print(it.snakefile())"],
        cwd=tmp_path,
        env=clean_environment(site),
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert told.strip() == str(site / "ensdistill/workflow/Snakefile")


def test_the_command_of_the_installed_package_says_its_version(package, tmp_path):
    scripts = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"ensdistill": "ensdistill.cli:main"}
    assert re.fullmatch(
        r"ensdistill \d+\.\d+\.\d+\n", package.run("ensdistill", "--version", cwd=tmp_path).stdout
    )
    assert "init" in package.run("ensdistill", "--help", cwd=tmp_path).stdout


FULL_ONLY = {
    "docutils",
    "jinja2",
    "matplotlib",
    "pandas",
    "requests",
    "safetensors",
    "scikit-learn",
}
FULL_ONLY |= {"pyyaml", "scipy", "snakemake", "torch", "torchvision"}
"""What `ensdistill` needs and `ensdistill-predict` does not bring."""


def requirements(place):
    """Of a pyproject.toml, by name."""
    project = tomllib.loads((REPOSITORY / place / "pyproject.toml").read_text())["project"]
    return {it.name: it for it in map(Requirement, project["dependencies"])}


def test_the_small_distribution_is_the_same_package_with_fewer_dependencies(tmp_path):
    full, small = requirements("."), requirements("packaging/predict")
    small.pop("onnxruntime")
    assert small.items() <= full.items(), "at the same versions"
    assert full.keys() - small.keys() >= FULL_ONLY
    (wheel,) = built(tmp_path / "dist", "--wheel", project=REPOSITORY / "packaging/predict")
    site = installed(wheel, tmp_path / "site")
    source = files_of("ensdistill")
    assert {str(it.relative_to(site)) for it in site.glob("ensdistill/**/*.*")} == source
    modules = [
        name
        for name, of in packages_distributions().items()
        if not FULL_ONLY.isdisjoint(map(canonicalize_name, of))
    ]
    assert {"torch", "yaml", "sklearn"} <= {*modules}
    weights = deploy(tmp_path / "study")
    export_student(weights, tmp_path / "student.onnx", to="onnx")
    write_images(tmp_path / "pictures", {"a": 3}, (8, 8))
    refusing = f"""if True:
        import sys

        sys.modules.update(dict.fromkeys({modules}))  # an import of these fails
        from ensdistill.cli import main

        sys.argv = ["ensdistill", *{{arguments}}]
        main()
    """
    lacks = "is not installed: `pip install ensdistill` brings it"
    for arguments, status, told in (
        (["--help"], 0, "predict"),
        (["predict", "student.onnx", "pictures", "-o", "answers.csv"], 0, "images: 3"),
        (["init", "new"], 1, lacks),
        (["predict", str(weights), "pictures", "-o", "answers.csv"], 1, lacks),
    ):
        done = subprocess.run(
            [sys.executable, "-c", refusing.format(arguments=arguments)],
            cwd=tmp_path,
            env=clean_environment(site),
            capture_output=True,
            text=True,
        )
        assert done.returncode == status, done.stderr
        assert told in done.stdout + done.stderr
        assert "Traceback" not in done.stderr
    answers = pd.read_csv(tmp_path / "answers.csv")
    assert answers.error.isna().all()
    assert answers["class"].isin(CLASSES).all()
