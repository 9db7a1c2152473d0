"""Leases of pretend cards: the file locks are real, the GPUs are not."""

import os
import signal
import subprocess
import sys

import pytest

from ensdistill.devices import visible_cards

HOLD = """
import sys
from ensdistill.devices import lease_card
print(lease_card(), flush=True)
sys.stdin.read()
"""


@pytest.fixture
def start(tmp_path):
    """Start a process that leases a card, prints which, and holds it until told to end."""
    started = []

    def begin(cards="4,GPU-a1b2", **extra):
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": cards, "TMPDIR": str(tmp_path)}
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD],
            env={**environment, **extra},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield begin
    for process in started:
        process.kill()
        process.communicate()


def test_two_holders_get_two_cards_and_a_killed_one_frees_its_own(start):
    first, second = start(), start()
    held = {process.stdout.readline().strip(): process for process in (first, second)}
    assert set(held) == {"4", "GPU-a1b2"}
    third = start()
    held["GPU-a1b2"].send_signal(signal.SIGKILL)
    assert third.stdout.readline().strip() == "GPU-a1b2"


def test_one_card_none_or_a_scheduler_leave_nothing_to_lease(start):
    for process in (start("0"), start(""), start("0,1", SLURM_JOB_ID="7")):
        assert process.stdout.readline().strip() == "None"


def test_without_nvidia_smi_there_are_no_cards(monkeypatch, tmp_path):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert visible_cards() == []
