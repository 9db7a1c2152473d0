"""Leases of pretend cards: the file locks are real, the GPUs are not."""

import errno
import fcntl
import logging
import os
import select
import signal
import stat
import subprocess
import sys
import tempfile
from collections import Counter
from contextlib import ExitStack, suppress

import pytest
import torch

from ensdistill import InputError, devices
from ensdistill.devices import visible_cards
from tests.test_failures import small_disk

HOLD = """
import sys
from ensdistill.devices import lease_cards
print(*lease_cards(1, int(sys.argv[1])) or [None], flush=True)
sys.stdin.read()
"""


@pytest.fixture
def start(tmp_path):
    """Start a process that leases a card, prints which, and holds it until told to end."""
    started = []

    def begin(cards="4,GPU-a1b2", jobs_per_gpu=1, **extra):
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": cards, "TMPDIR": str(tmp_path)}
        environment.pop("SLURM_JOB_ID", None)
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(jobs_per_gpu)],
            env={**environment, **extra},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield begin
    for process in started:
        process.kill()
        process.communicate()


def card_of(process):
    return process.stdout.readline().strip()


@pytest.fixture
def two_cards(tmp_path):
    """A PATH on which nvidia-smi tells of two cards."""
    smi = tmp_path / "bin" / "nvidia-smi"
    smi.parent.mkdir()
    smi.write_text("#!/bin/sh\nprintf '0, GPU-aaaa-1\\n1, GPU-bbbb-2\\n'\n")
    smi.chmod(0o755)
    return f"{smi.parent}:{os.environ['PATH']}"


def test_two_holders_get_two_cards_and_a_killed_one_frees_its_own(start):
    first, second = start(), start()
    held = {card_of(process): process for process in (first, second)}
    assert set(held) == {"4", "GPU-a1b2"}
    third = start()
    assert third.stderr.readline() == "waiting for a GPU: other jobs hold 4, GPU-a1b2\n"
    held["GPU-a1b2"].send_signal(signal.SIGKILL)
    assert card_of(third) == "GPU-a1b2"


def test_jobs_share_a_card_only_when_every_card_has_one(start):
    cards = [card_of(start(jobs_per_gpu=2)) for _ in range(4)]
    assert cards == ["4", "GPU-a1b2", "4", "GPU-a1b2"]
    assert start(jobs_per_gpu=2).stderr.readline().startswith("waiting for a GPU")


def test_a_single_card_is_leased_too(start):
    assert card_of(start("0")) == "0"
    assert start("0").stderr.readline() == "waiting for a GPU: other jobs hold 0\n"


def test_without_cards_there_is_nothing_to_lease(start):
    none = ("", "-1", "-1,0", "NoDevFiles")
    assert [card_of(start(cards)) for cards in none] == ["None"] * 4


def test_jobs_of_snakemake_inside_an_allocation_of_several_cards_get_one_each(start):
    first, second = (start("0,1", SLURM_JOB_ID="7") for _ in range(2))
    assert {card_of(first), card_of(second)} == {"0", "1"}
    assert start("0,1", SLURM_JOB_ID="7").stderr.readline().startswith("waiting for a GPU")


def test_a_card_that_slurm_assigned_to_a_job_alone_is_free(start, two_cards):
    # The same index may be another card, and one card may be given to several jobs on purpose.
    for card, extra in (("0", {}), ("1", {"PATH": two_cards})):
        for job in ("7", "8"):
            assert card_of(start(card, SLURM_JOB_ID=job, **extra)) == card
        same = start(card, SLURM_JOB_ID="8", **extra)
        assert same.stderr.readline() == f"waiting for a GPU: other jobs hold {card}\n"


def test_where_slurm_assigns_no_cards_its_jobs_share_them_out(start, two_cards):
    inside = [start("0,1", PATH=two_cards, SLURM_JOB_ID=job) for job in ("7", "8")]
    assert {card_of(process) for process in inside} == {"0", "1"}


@pytest.mark.parametrize(
    ("assigned", "cards"),
    [
        ({"SLURM_JOB_GPUS": "1"}, ["GPU-bbbb-2"]),
        ({"SLURM_JOB_GPUS": "0,1", "SLURM_STEP_GPUS": "0"}, ["GPU-aaaa-1"]),
        ({"SLURM_JOB_GPUS": "0,1"}, ["GPU-aaaa-1", "GPU-bbbb-2"]),
        ({"SLURM_JOB_GPUS": "4,7"}, ["GPU-aaaa-1", "GPU-bbbb-2"]),  # which are all that is seen
    ],
)
def test_what_slurm_assigned_is_visible(monkeypatch, two_cards, assigned, cards):
    monkeypatch.setenv("PATH", two_cards)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for name, indices in assigned.items():
        monkeypatch.setenv(name, indices)
    assert list(visible_cards()) == cards


def test_users_see_each_others_leases():
    if os.geteuid() != 0:
        pytest.skip("only root can be two users")
    with tempfile.TemporaryDirectory() as shared, ExitStack() as stack:
        os.chmod(shared, 0o1777)

        def hold(user):
            # What is imported may lie where only root may read.
            code = f"import ensdistill.devices, os; os.setuid({user}){HOLD}"
            process = subprocess.Popen(
                [sys.executable, "-c", code, "1"],
                env={**os.environ, "CUDA_VISIBLE_DEVICES": "0", "TMPDIR": shared},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                umask=0o077,
            )
            stack.enter_context(process)
            stack.callback(process.kill)
            return process

        first = hold(65534)
        assert card_of(first) == "0"
        waiting = hold(65533)
        assert waiting.stderr.readline() == "waiting for a GPU: other jobs hold 0\n"
        first.kill()
        assert card_of(waiting) == "0"


def test_a_lease_is_never_closed_to_other_users(monkeypatch, tmp_path):
    modes = []

    def watched(path, flags, *, real=os.open):
        file = real(path, flags)
        modes.append(stat.S_IMODE(os.fstat(file).st_mode))
        return file

    monkeypatch.setattr(os, "open", watched)
    monkeypatch.setattr(devices, "_held", [])
    mask = os.umask(0o077)
    try:
        assert devices._take(tmp_path / "lease")
        assert os.umask(0o077) == 0o077
    finally:
        os.umask(mask)
    assert modes == [0o644]
    os.close(devices._held[0])


def test_leases_stay_in_the_temporary_folder_while_it_is_full(start, tmp_path):
    with small_disk(tmp_path, "16k"):
        assert card_of(start("0")) == "0"
        with suppress(OSError), open(tmp_path / "full", "wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        waiting = start("0")
        speaks = select.select([waiting.stdout, waiting.stderr], [], [])[0]
        assert speaks == [waiting.stderr], "it has found the card free"
        assert waiting.stderr.readline() == "waiting for a GPU: other jobs hold 0\n"
        assert card_of(start("1")) == "1", "an empty file needs no room"


def test_without_its_temporary_folder_a_node_uses_the_machines(monkeypatch):
    monkeypatch.setenv("TMPDIR", "/of/the/login/node")
    assert str(devices._lease("0", 2, 0).parent) == "/tmp"


def test_a_link_in_a_leases_place_is_not_followed(start, tmp_path):
    lease = devices._lease("0", 1, 0).name
    (tmp_path / lease).symlink_to(tmp_path / "elsewhere")
    process = start("0")
    assert process.wait() != 0
    assert "Too many levels of symbolic links" in process.stderr.read()
    assert not (tmp_path / "elsewhere").exists()


def test_a_temporary_folder_without_locks_is_named(monkeypatch, tmp_path):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    with pytest.raises(InputError, match=f"^{tmp_path}: files cannot be locked there.* set TMPDIR"):
        devices.lease_cards(1)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0,1"


def test_an_index_and_a_uuid_of_one_card_are_one_card(start, two_cards):
    assert card_of(start("1", PATH=two_cards)) == "1"
    for same in ("GPU-bbbb-2", "GPU-bb", "1"):
        assert start(same, PATH=two_cards).stderr.readline().startswith("waiting for a GPU")
    assert card_of(start("GPU-bb,0", PATH=two_cards)) == "0"


def test_all_cards_of_the_machine_are_known_by_uuid_unless_some_were_chosen(monkeypatch, two_cards):
    monkeypatch.setenv("PATH", two_cards)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert list(visible_cards()) == ["GPU-aaaa-1", "GPU-bbbb-2"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1, -1, 0")
    assert visible_cards() == {"1": "GPU-bbbb-2"}


def test_without_nvidia_smi_there_are_no_cards(monkeypatch, tmp_path):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert visible_cards() == {}


EIGHT_JOBS = """
import shlex
import sys

sys.executable = shlex.quote(sys.executable)

rule all:
    input: expand("{job}", job=range(8))

rule hold:
    output: "{job}"
    resources: gpu=1
    script: "hold.py"
"""
# Holds its card until all four jobs of its wave hold one.
HOLD_IN_WAVES = """
import os
import time
from pathlib import Path
from ensdistill.devices import lease_cards

def tell(kind):
    with open("events", "a") as file:
        file.write(f"{kind} {card} {os.getpid()}\\n")

def takers():
    lines = Path("events").read_text().splitlines()
    return [line.split()[2] for line in lines if line.startswith("take")]

[card] = lease_cards(1, snakemake.resources.get("jobs_per_gpu", 1))
tell("take")
last_of_wave = takers().index(str(os.getpid())) // 4 * 4 + 4
while len(takers()) < last_of_wave:
    time.sleep(0.05)
tell("leave")
Path(snakemake.output[0]).touch()
"""


@pytest.mark.parametrize(
    ("cards", "options"),
    [
        ("0,1,2,3", []),
        ("0,1", ["--default-resources", "jobs_per_gpu=2"]),
    ],
)
def test_eight_jobs_of_a_workflow_on_four_places_run_four_at_a_time(tmp_path, cards, options):
    (tmp_path / "Snakefile").write_text(EIGHT_JOBS)
    (tmp_path / "hold.py").write_text(HOLD_IN_WAVES)
    done = subprocess.run(
        [sys.executable, "-m", "snakemake", "--cores", "8", "--resources", "gpu=4", *options],
        cwd=tmp_path,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": cards, "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    events = [line.split() for line in (tmp_path / "events").read_text().splitlines()]
    held, most, uses = Counter(), Counter(), Counter()
    together = 0
    for kind, card, _ in events:
        held[card] += 1 if kind == "take" else -1
        uses[card] += kind == "take"
        most[card] = max(most[card], held[card])
        together = max(together, held.total())
    names = cards.split(",")
    share = 4 // len(names)
    assert most == dict.fromkeys(names, share), "no card has more jobs than it may, all are used"
    assert uses == dict.fromkeys(names, 2 * share), "each place is used twice"
    assert together == 4


def test_the_peak_of_gpu_memory_is_logged(monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 3 << 30)
    with caplog.at_level(logging.INFO):
        devices._log_peak_memory(torch.device("cuda"))
    assert caplog.messages == ["peak GPU memory: 3072 MiB"]


FAULTS = """
import resource, sys, torch
from ensdistill.devices import prepare
if sys.argv[1] == "kept":
    prepare(1, {})
def allocate():
    for _ in range(20):
        torch.zeros(10_000_000)
allocate()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
allocate()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def test_memory_that_a_step_frees_is_there_for_the_next():
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    kept, given_back = (
        int(subprocess.check_output([sys.executable, "-c", FAULTS, how], env=environment))
        for how in ("kept", "given back")
    )
    pages = 20 * 40_000_000 // os.sysconf("SC_PAGESIZE")
    assert kept < pages / 100 < pages / 2 < given_back
