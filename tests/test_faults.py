"""Faults of clusters and of their disks, made on purpose: `make test-faults`, as root on Debian."""

import os
import re
import subprocess

import pytest

from tests import lossy_disk
from tests.cluster import Cluster, why_not
from tests.lossy_disk import LossyDisk
from tests.project import Project
from tests.test_failures import small_disk, told
from tests.test_slurm import SECOND, TEACHER, both_train, finish, jobs_of, new_project, slow, start

pytestmark = pytest.mark.faults

NODES = ("one", "two")
CHAIN = "results/tiny/logits/students/kd/0.h5"
STATE = TEACHER.replace("weights.safetensors", "state.pt")
MADE = ["images.h5", *(f"teachers/{seed}/weights.safetensors" for seed in (0, 1))]
MADE += ["students/kd/0/weights.safetensors", "logits/students/kd/0.h5"]


@pytest.fixture
def cluster():
    pytest.importorskip("snakemake_executor_plugin_slurm")
    if reason := why_not():
        pytest.skip(reason)
    with Cluster(NODES) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """A project where nothing went wrong."""
    project = Project.new(tmp_path_factory.mktemp("local"))
    project.run(CHAIN)
    return project


def assert_as(local, project):
    for name in MADE:
        assert project.file(name).read_bytes() == local.file(name).read_bytes(), name


@pytest.mark.parametrize("options", [[], ["--slurm-no-requeue"]])
def test_what_a_dead_node_trained_goes_on_elsewhere_and_the_rest_is_not_disturbed(
    cluster, local, tmp_path, options
):
    project = new_project(tmp_path / "project", local)
    slow(project, epochs=600)
    run = start(cluster, project, *options, "--", TEACHER, SECOND)
    both_train(run, project)
    jobs = jobs_of(cluster, project)
    assert sorted(job["NodeList"] for job in jobs) == sorted(NODES)
    [hit] = [job for job in jobs if job["NodeList"] == "one"]
    cluster.kill_node("one")
    (project.folder / "slow").unlink()
    finish(run)
    assert {job["NodeList"] for job in jobs_of(cluster, project)[-1:]} == {"two"}
    for job in jobs:
        seed = job["Comment"][-1]
        log = project.file(f"logs/teachers/{seed}.log").read_text()
        again = re.search(r"going on from epoch (\d+)", log)
        assert int(again[1]) > 1 if job is hit else not again, log


def test_a_full_disk_is_named_by_the_job_and_the_next_run_goes_on(cluster, local, tmp_path):
    project = new_project(tmp_path / "project", local)
    project.edit("ensdistill/training.py", "SAVE_EVERY = 120", "SAVE_EVERY = 0")
    folder = project.file("teachers/0")
    folder.mkdir(parents=True)
    with small_disk(folder, "100k"):
        run = start(cluster, project, "--retries", "1", "--", TEACHER)
        run.communicate(timeout=1200)
        assert run.returncode != 0
        jobs = jobs_of(cluster, project)
        assert len(jobs) == 2, "tried again"
        for job in jobs:
            errors = re.findall(r"^teacher .*: error: (.*)$", job["log"], re.MULTILINE)
            assert errors == [f"no space is left on the disk that holds {STATE}"]
        assert {path.name for path in folder.iterdir()} == {"lost+found", "state.pt"}
        subprocess.run(["mount", "-o", "remount,size=10m", folder], check=True)
        finish(start(cluster, project, TEACHER))
        assert "going on from epoch" in project.log("teachers/0")
        assert project.file(MADE[1]).read_bytes() == local.file(MADE[1]).read_bytes()


def test_where_the_times_of_files_differ_by_hours_everything_is_made_once(local, tmp_path):
    project = Project.new(tmp_path)
    line = "    os.replace(finished, path)\n"
    ahead = "{'images.h5', '0'} & {path.name, path.parent.name}"
    shifted = f"3600 * (1 if {ahead} else -1)"
    project.edit(
        "ensdistill/files.py",
        line,
        f"{line}    os.utime(path, (time.time() + {shifted},) * 2)\n",
    )
    done = project.run(CHAIN)
    made = re.findall(r"^(?:local)?rule (\w+):", done.stdout + done.stderr, re.MULTILINE)
    assert sorted(made) == ["images", "logits", "shifted", "student", "teacher", "teacher"]
    assert_as(local, project)
    assert project.planned(CHAIN) == set()


def test_a_file_system_without_locks_does(local, tmp_path):
    if reason := lossy_disk.why_not():
        pytest.skip(reason)
    with LossyDisk(tmp_path, locks=False):
        project = Project.new(tmp_path / "project")
        project.run(CHAIN)
        assert_as(local, project)
        assert "a file system here has no locks (No locks available)" in project.log("teachers/0")
        cards = {"CUDA_VISIBLE_DEVICES": "0", "TMPDIR": str(tmp_path)}
        environment = {**os.environ, "PYTHONPATH": str(project.folder), **cards}
        done = project.snakemake("--forcerun", "teacher", "--", TEACHER, env=environment)
        told(done, f"{tmp_path}: files cannot be locked there, which is how jobs share out the")
