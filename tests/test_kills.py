"""A campaign of kill -9 at random moments over a whole study: nothing of it may show in the end.

Takes minutes: `python -m pytest -m kills -s` runs it, and prints a line that sums it up.
"""

import os
import random
import re
import signal
import subprocess
import sys

import pandas as pd
import psutil
import pytest

from tests.project import Project

KILLS = 30
EPOCHS = 150


def start(project):
    return psutil.Popen(
        [sys.executable, "-m", "snakemake", "--cores", "2"],
        cwd=project.folder,
        env={**os.environ, "PYTHONPATH": str(project.folder)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def kill_something(run, rng):
    """Everything at once, as a power failure does, or one process; what was hit."""
    if rng.random() < 0.5:
        os.killpg(run.pid, signal.SIGKILL)
        return "everything"
    victim = rng.choice([run, *run.children(recursive=True)])
    victim.kill()
    return "snakemake" if victim == run else "a job"


class Trainings:
    """What the logs tell of trainings that were killed and went on."""

    def __init__(self):
        self.epochs, self.began, self.resumed, self.lost = {}, {}, 0, 0

    def read(self, project):
        for log in project.file("logs").glob("*/**/*.log"):
            text = log.read_text()
            epochs = [int(epoch) for epoch in re.findall(r"INFO epoch (\d+) .*\n", text)]
            first = re.search(r"going on from epoch (\d+)", text)
            if not epochs and not first:
                continue
            began = text[:23]
            if log in self.began and self.began[log] != began:
                again = int(first[1]) if first else 1
                self.resumed += first is not None
                self.lost = max(self.lost, self.epochs[log] + 1 - again)
            self.began[log] = began
            self.epochs[log] = epochs[-1] if epochs else int(first[1]) - 1


def results(project):
    """Every result by its path: its bytes, or a table of training times without these."""
    timed = ("history.csv", "learning_curves.csv")
    return {
        str(path.relative_to(project.file(""))): (
            pd.read_csv(path).drop(columns="seconds").to_csv().encode()
            if path.name in timed
            else path.read_bytes()
        )
        for path in project.file("").rglob("*")
        if path.is_file() and not {"logs", "benchmarks"} & set(path.parts)
    }


def survive(project, rng, hits, trainings):
    """Start a study again and again, with kills until there are enough, to its end."""
    status = None
    while status != 0:
        run = start(project)
        status = None
        while status is None:
            enough = len(hits) >= KILLS
            try:
                status = run.wait(None if enough else rng.uniform(1, 12))
            except psutil.TimeoutExpired:
                trainings.read(project)
                hits.append(kill_something(run, rng))
        trainings.read(project)
        if any((project.folder / ".snakemake" / "locks").glob("*")):
            project.run("--unlock")


@pytest.mark.kills
def test_kills_at_random_moments_leave_no_trace(tmp_path):
    rng = random.Random(0)
    template = Project.new(tmp_path / "template")
    template.edit("ensdistill/training.py", "SAVE_EVERY = 120", "SAVE_EVERY = 0")
    for role in ("teacher", "student"):
        template.change("studies", "tiny", role, "epochs", value=EPOCHS)
    undisturbed = template.copy(tmp_path / "undisturbed")
    undisturbed.run()
    expected = results(undisturbed)
    hits, trainings, compared, differences = [], Trainings(), 0, set()
    while len(hits) < KILLS:
        project = template.copy(tmp_path / f"after {len(hits)} kills")
        survive(project, rng, hits, trainings)
        survived = results(project)
        compared += len(survived)
        differences |= {
            name
            for name in expected.keys() | survived.keys()
            if expected.get(name) != survived.get(name)
        }
    kinds = ", ".join(f"{hits.count(what)} of {what}" for what in sorted(set(hits)))
    print(
        f"\nkills {len(hits)} ({kinds}), resumed jobs {trainings.resumed}, epochs repeated at most "
        f"{trainings.lost}, files compared {compared}, differences {len(differences)}"
    )
    assert differences == set()
    assert trainings.resumed > 0
    assert trainings.lost <= 1
