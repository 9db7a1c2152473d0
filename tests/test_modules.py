"""The workflow in workflows of others: from the installed package, from a path, twice, prefixed."""

import json
import re
import subprocess
from copy import deepcopy

import h5py
import pytest
import yaml

from ensdistill.weights import read_header
from tests.project import REPOSITORY, TINY
from tests.test_init import write_images

ONE, TWO = "here/one", "two ü"
TWICE = """\
from ensdistill.workflow import snakefile
from yaml import safe_load


module first:
    snakefile:
        {snakefile}
    config:
        safe_load(open("first.yaml"))
    prefix:
        "{one}"


module second:
    snakefile:
        {snakefile}
    config:
        safe_load(open("second.yaml"))
    prefix:
        "{two}"


use rule * from first as first_*


use rule * from second as second_*


rule both:
    default_target: True
    input:
        rules.first_all.input,
        rules.second_all.input,


onstart:
    first.onstart()
    second.onstart()


onsuccess:
    first.onsuccess()
    second.onsuccess()
"""


@pytest.fixture
def twice(tmp_path):
    """Two studies of one name, with other members and other images."""
    write_images(tmp_path / "own", {"a": 30, "b": 30}, (8, 8))
    first, second = deepcopy(TINY), deepcopy(TINY)
    second["images"] = {"source": "folder", "path": "own", "validation": 10, "test": 10}
    second |= {"members": 3, "corruptions": {"images": 5}}
    first["pool"], first["teacher"] = 2, {**TINY["teacher"], "epochs": 1}
    second["teacher"] = {**TINY["teacher"], "epochs": 1, "batch_size": 16}
    for name, study in {"first": first, "second": second}.items():
        config = {"run": ["tiny"], "studies": {"tiny": study}}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "Snakefile").write_text(
        TWICE.format(snakefile="snakefile()", one=ONE, two=TWO), encoding="utf-8"
    )
    return tmp_path


def planned(told):
    """How often each rule would run, by a dry run's table."""
    return {rule: int(count) for rule, count in re.findall(r"^(\w+) +(\d+)$", told, re.M)}


@pytest.mark.parametrize("place", ["snakefile()", str(REPOSITORY / "workflow/Snakefile")])
def test_both_studies_are_planned_whole(package, twice, place):
    if place != "snakefile()":
        text = (twice / "Snakefile").read_text().replace("snakefile()", repr(place))
        (twice / "Snakefile").write_text(text)
    counts = planned(package.snakemake("--dry-run", cwd=twice))
    assert counts["both"] == 1
    for name in ("first", "second"):
        assert counts[f"{name}_teacher"] == {"first": 2, "second": 3}[name]
        assert counts[f"{name}_student"] == 4
        assert counts[f"{name}_page"] == 1
    assert {rule.partition("_")[0] for rule in counts} == {"first", "second", "both", "total"}


def test_each_study_is_made_below_its_prefix_by_its_configuration(package, twice):
    trained = "results/tiny/teachers/0/weights.safetensors"
    judged = "results/tiny/metrics/directions.csv"
    report = "results/tiny/so_far.html"
    targets = [f"{prefix}/{file}" for prefix in (ONE, TWO) for file in (trained, report)]
    package.snakemake(*targets, f"{ONE}/{judged}", cwd=twice)
    for prefix, classes in ((ONE, 10), (TWO, 2)):
        with h5py.File(twice / prefix / "results/tiny/images.h5") as file:
            assert len(json.loads(file.attrs["classes"])) == classes
        assert read_header(twice / prefix / trained)["method"] == "teacher"
        assert (twice / prefix / "results/tiny/logs/teachers/0.log").exists()
        assert (twice / prefix / "results/tiny/benchmarks/teachers/0.tsv").exists()
    assert "3 networks" in (twice / TWO / report).read_text()
    assert not (twice / "results").exists()
    assert not list(twice.rglob("state.pt"))
    assert twice / f".snakemake/own_data/{TWO.replace('ü', '%C3%BC')}%2Fresults%2Ftiny-images.json"
    again = package.snakemake(*targets, f"{ONE}/{judged}", cwd=twice)
    assert "Nothing to be done" in again


def test_a_users_own_files_are_not_below_the_prefix(package, twice):
    """Logits and weights from elsewhere lie where the configuration says."""
    config = yaml.safe_load((twice / "first.yaml").read_text())
    judge = {"mine": {"label": "mine", "logits": "mine.npz", "shifted": "shifted.npz"}}
    config["studies"]["tiny"]["judge"] = judge
    config["studies"]["tiny"]["teachers"] = ["0.safetensors", "1.safetensors"]
    (twice / "first.yaml").write_text(yaml.safe_dump(config))
    files = {"mine.npz", "shifted.npz", "0.safetensors"}
    for name in (*files, "1.safetensors"):
        (twice / name).write_bytes(b"")
    targets = [
        f"{ONE}/results/tiny/logits/given/mine/0.h5",
        f"{ONE}/results/tiny/logits/shifted/given/mine/0.h5",
        f"{ONE}/results/tiny/teachers/0/weights.safetensors",
    ]
    told = package.snakemake("--dry-run", *targets, cwd=twice)
    inputs = ", ".join(re.findall(r"^ +input: (.+)$", told, re.M)).split(", ")
    assert files | {f"{ONE}/results/tiny/images.h5"} <= {*inputs}


@pytest.fixture
def begun(package, tmp_path):
    """A study of `ensdistill init` in a folder with spaces and letters of any language."""
    place = tmp_path / "flowers ü 花"
    images = write_images(tmp_path / "my pictures", {"rose": 30, "tulip": 30}, (8, 8))
    package.run("ensdistill", "init", str(place), "--images", str(images), cwd=tmp_path)
    return place


def test_a_begun_study_makes_what_its_configuration_says(package, begun, tmp_path):
    counts = planned(package.snakemake("--dry-run", cwd=begun))
    assert (counts["all"], counts["teacher"], counts["student"]) == (1, 5, 6)
    before = {path: path.stat().st_mtime_ns for path in package.site.rglob("*")}
    target = "results/flowers_u/images.h5"
    told = package.snakemake(target, cwd=begun)
    assert "profiles/default" in told, "reruns are decided as in the repository"
    assert "No GPU found" in told or "nvidia" in told, "its handlers are called"
    with h5py.File(begun / target) as file:
        assert file["train/images"].shape[1:] == (3, 8, 8)
    assert before == {path: path.stat().st_mtime_ns for path in package.site.rglob("*")}
    elsewhere = tmp_path / "else where"
    snakefile = begun / "Snakefile"
    told = package.snakemake("-s", snakefile, "--directory", elsewhere, target, cwd=tmp_path)
    assert "profiles/default" in told
    assert (elsewhere / target).exists()


def test_what_is_wrong_in_a_begun_study_is_one_sentence(package, begun):
    config = begun / "config.yaml"
    config.write_text(config.read_text().replace("batch_size", "batchsize"))
    told = package.snakemake("--dry-run", cwd=begun, status=1)
    assert "study 'flowers_u': unknown key 'teacher.batchsize'; did you mean 'batch_size'?" in told
    assert "Traceback" not in told
    config.write_text(config.read_text() + "run: [other]\n")
    told = package.snakemake("--dry-run", cwd=begun, status=1)
    assert "the key 'run' is given twice" in told


def test_conda_is_refused_in_one_sentence_where_it_cannot_work(package, begun):
    script = package.site / "ensdistill/workflow/envs/ensdistill.post-deploy.sh"
    done = subprocess.run(["bash", script], cwd=begun, capture_output=True, text=True)
    assert done.returncode == 1
    assert "--sdm conda works in the repository" in done.stderr


def test_the_catalogs_files_are_those_of_the_root(package, tmp_path):
    usage = yaml.safe_load((REPOSITORY / ".snakemake-workflow-catalog.yml").read_text())["usage"]
    assert usage["software-stack-deployment"]["conda"] is False
    config = yaml.safe_load((REPOSITORY / "config/config.yaml").read_text())
    assert config == yaml.safe_load((REPOSITORY / "config.yaml").read_text())
    counts = planned(
        package.snakemake(
            "-s",
            REPOSITORY / "workflow/Snakefile",
            "--configfile",
            REPOSITORY / "config/config.yaml",
            "--dry-run",
            cwd=tmp_path,
        )
    )
    assert (counts["teacher"], counts["page"]) == (5, 1)
