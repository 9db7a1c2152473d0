"""A campaign of kill -9 and power failures at random moments: nothing of it may show in the end.

Takes minutes: `python -m pytest -m kills -s` runs it, and prints lines that sum it up.
"""

import os
import random
import re
import signal
import sys
import time
from collections import Counter

import pandas as pd
import psutil
import pytest

from tests.lossy_disk import KINDS, LossyDisk, why_not
from tests.project import Project

KILLS = 50  # of each kind
EPOCHS = 150


def start(project, output):
    with output.open("wb") as file:
        return psutil.Popen(
            [sys.executable, "-m", "snakemake", "--cores", "2"],
            cwd=project.folder,
            env={**os.environ, "PYTHONPATH": str(project.folder)},
            stdout=file,
            stderr=file,
            start_new_session=True,
        )


def kill_something(run, rng):
    """Everything at once, or one process; what was hit."""
    if rng.random() < 0.5:
        os.killpg(run.pid, signal.SIGKILL)
        return "everything"
    victim = rng.choice([run, *run.children(recursive=True)])
    victim.kill()
    return "snakemake" if victim == run else "a job"


class PowerFailures:
    """Power failures of a disk, and how much of it each kind has cost."""

    def __init__(self, disk):
        self.disk, self.lost = disk, Counter()

    def __call__(self, run, rng):
        os.killpg(run.pid, signal.SIGKILL)
        run.wait()
        kind = rng.choice(KINDS)
        self.lost.update(self.disk.cut(kind, rng.randrange(2**32)))
        return f"power, lost: {kind}"


class Trainings:
    """What the logs tell of trainings that were killed and went on."""

    def __init__(self):
        self.epochs, self.began, self.resumed, self.lost = {}, {}, 0, 0

    def read(self, project):
        for log in project.file("logs").glob("*/**/*.log"):
            text = log.read_text(errors="replace")  # of a log a power failure leaves anything
            epochs = [int(epoch) for epoch in re.findall(r"INFO epoch (\d+) .*\n", text)]
            first = re.search(r"going on from epoch (\d+),", text)
            if not epochs and not first:
                continue
            began = text[:23]
            if log in self.began and self.began[log] != began:
                again = int(first[1]) if first else 1
                self.resumed += first is not None
                self.lost = max(self.lost, self.epochs[log] + 1 - again)
            last = epochs[-1] if epochs else int(first[1]) - 1
            torn = self.began.get(log) == began and last < self.epochs[log]
            self.began[log], self.epochs[log] = began, self.epochs[log] if torn else last


def results(project):
    """Every result by its path: its bytes, or what it says without how long trainings took."""
    return {
        str(path.relative_to(project.file(""))): untimed(path)
        for path in project.file("").rglob("*")
        if path.is_file() and not {"logs", "benchmarks"} & set(path.parts)
    }


def untimed(path):
    if path.name in ("history.csv", "learning_curves.csv"):
        return pd.read_csv(path).drop(columns="seconds").to_csv().encode()
    if path.name == "index.html":
        text, times = re.subn(r"<dd>\d+ trainings, .* CPU time</dd>", "<dd></dd>", path.read_text())
        assert times == 2, path  # of teachers and of students
        return text.encode()
    return path.read_bytes()


def survive(project, rng, kill, longest, hits, trainings, output):
    """Start a study again and again, with kills after `longest` seconds at most, to its end."""
    status, failed = None, 0
    while status != 0:
        before = len(hits)
        run = start(project, output)
        status = None
        while status is None:
            enough = len(hits) >= KILLS
            try:
                status = run.wait(None if enough else rng.uniform(longest / 10, longest))
            except psutil.TimeoutExpired:
                trainings.read(project)
                hits.append(kill(run, rng))
        trainings.read(project)
        failed = failed + 1 if status and len(hits) == before else 0
        assert failed < 3, output.read_text()[-4000:]
        if any((project.folder / ".snakemake" / "locks").glob("*")):
            project.run("--unlock")


def compare(expected, project, summary):
    """How many files there are on either side, and the names of those that differ."""
    survived = results(project)
    names = expected.keys() | survived.keys()
    differences = {name for name in names if expected.get(name) != survived.get(name)}
    summary.update(compared=len(names), differences=len(differences))
    return differences


def conclude(hits, trainings, summary, differences):
    kinds = ", ".join(f"{hits.count(what)} of {what}" for what in sorted(set(hits)))
    print(
        f"\nkills {len(hits)} ({kinds}), resumed jobs {trainings.resumed}, epochs repeated at most "
        f"{trainings.lost}, {', '.join(f'{what} {number}' for what, number in summary.items())}"
    )
    assert differences == set()
    assert trainings.resumed > 0
    assert trainings.lost <= 1


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    template = Project.new(tmp_path_factory.mktemp("template") / "project")
    template.edit("ensdistill/training.py", "SAVE_EVERY = 120", "SAVE_EVERY = 0")
    times = "    rounds = take_turns(calls, time_limit)\n"  # which no two studies have in common
    template.edit("ensdistill/costs.py", times, "    rounds = np.full((5, len(calls)), 0.001)\n")
    for role in ("teacher", "student"):
        template.change("studies", "tiny", role, "epochs", value=EPOCHS)
    return template


@pytest.fixture(scope="module")
def expected(template, tmp_path_factory):
    """The results of a study that nobody disturbed, and the seconds it took."""
    undisturbed = template.copy(tmp_path_factory.mktemp("undisturbed") / "project")
    began = time.monotonic()
    undisturbed.run()
    return results(undisturbed), time.monotonic() - began


@pytest.mark.kills
def test_kills_at_random_moments_leave_no_trace(tmp_path, template, expected):
    rng = random.Random(0)
    whole, seconds = expected
    hits, trainings, summary, differences = [], Trainings(), Counter(), set()
    while len(hits) < KILLS:
        project = template.copy(tmp_path / f"after {len(hits)} kills")
        survive(project, rng, kill_something, seconds / 10, hits, trainings, tmp_path / "output")
        differences |= compare(whole, project, summary)
    conclude(hits, trainings, summary, differences)


@pytest.mark.kills
def test_power_failures_that_cost_what_was_not_forced_to_the_disk_leave_no_trace(
    tmp_path, template, expected
):
    if reason := why_not():
        pytest.skip(reason)
    rng = random.Random(0)
    whole, seconds = expected
    hits, trainings, summary, differences = [], Trainings(), Counter(), set()
    while len(hits) < KILLS:
        folder = tmp_path / f"after {len(hits)} failures"
        folder.mkdir()
        with LossyDisk(folder) as disk:
            project = template.copy(folder / "project")
            disk.sync()
            failures = PowerFailures(disk)
            survive(project, rng, failures, seconds / 10, hits, trainings, tmp_path / "output")
            differences |= compare(whole, project, summary)
            summary.update(failures.lost)
    conclude(hits, trainings, summary, differences)
