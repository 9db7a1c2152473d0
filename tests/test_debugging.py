"""A job's script can be started outside Snakemake, in a debugger."""

import os
import subprocess
import sys

from tests.project import Project


def start(project, output):
    return subprocess.run(
        [sys.executable, "-m", "ensdistill.debugging", output],
        cwd=project.folder,
        env={**os.environ, "PYTHONPATH": str(project.folder)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_script_started_outside_snakemake_makes_the_same_file(changed):
    made = changed.file("metrics/reliability.csv")
    expected = made.read_bytes()
    made.unlink()
    done = start(changed, "results/tiny/metrics/reliability.csv")
    assert done.returncode == 0, done.stderr
    assert made.read_bytes() == expected


def test_what_no_script_makes_and_what_lacks_its_inputs_is_one_sentence(changed):
    unknown = start(changed, "results/tiny/nothing.csv")
    assert unknown.returncode == 1
    assert unknown.stderr == "results/tiny/nothing.csv: no rule with a script makes this file\n"
    changed.file("images.h5").unlink()
    early = start(changed, "results/tiny/logits/teachers/0.h5")
    assert early.returncode == 1
    assert early.stderr.startswith("results/tiny/images.h5: missing; make it first: snakemake")


def test_the_official_corruptions_reach_their_script_as_a_list_of_one_archive(tmp_path):
    project = Project.new(tmp_path / "official")
    study = {"images": {"source": "cifar10"}, "corruptions": {"source": "official"}}
    project.configure({"run": ["own"], "studies": {"own": study}})
    code = (
        "from ensdistill.debugging import snakemake_of\n"
        "print([*snakemake_of('results/own/shifted.h5')[1].input.official])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=project.folder,
        env={**os.environ, "PYTHONPATH": str(project.folder)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "['results/downloads/CIFAR-10-C.tar']\n"
