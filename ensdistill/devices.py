"""The processor a job computes on."""

import atexit
import ctypes
import logging
import os
import random
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from ensdistill import InputError
from ensdistill.locks import try_lock

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h

UUIDS = ("GPU-", "MIG-")
"""How names of cards begin that are the same everywhere."""

_held: list[int] = []


def prepare(threads: int, resources: Mapping[str, Any]) -> "torch.device":
    """A free GPU if there are any, else the CPU with as many threads as Snakemake granted.

    Args:
        threads: for PyTorch on the CPU.
        resources: of the job; `jobs_per_gpu` (1 unless given) says how many jobs share a card.
    """
    lease_cards(1, resources.get("jobs_per_gpu", 1))  # before CUDA starts
    return set_up(threads)


def set_up(threads: int) -> "torch.device":
    """The GPU that this process sees, else the CPU with so many threads."""
    _keep_freed_memory()
    import torch

    from ensdistill.numerics import set_float32

    torch.set_num_threads(threads)
    set_float32("fp32")
    if not torch.cuda.is_available():
        logger.info("computing on the CPU, threads: %d", threads)
        return torch.device("cpu")
    device = torch.device("cuda")
    card = os.environ.get("CUDA_VISIBLE_DEVICES")
    logger.info("computing on %s, card %s", torch.cuda.get_device_name(device), card)
    atexit.register(_log_peak_memory, device)
    return device


def _keep_freed_memory() -> None:
    """Let glibc keep what tensors free, which the next training step needs again.

    Given back to the system, every page comes again by a page fault: a tenth of a small network's
    step.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
    if mallopt:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def lease_cards(count: int, jobs_per_gpu: int = 1) -> list[str]:
    """Make some cards this process's only ones, and keep others from them until it ends.

    Snakemake counts GPUs but does not assign them. The lease is a file lock, which the kernel
    releases however the process dies; it holds for all users with the same temporary folder. Must
    run before CUDA starts.

    Args:
        count: how many; they are taken all at once or not at all, so that no two processes wait
            for each other's.
        jobs_per_gpu: processes that may hold one card at a time.

    Returns:
        The cards' indices or UUIDs; none where there is nothing to choose.

    Raises:
        InputError: there are not so many, or the temporary folder has no locks.
    """
    cards = visible_cards()
    if not cards:
        return []
    if len(cards) < count:
        raise InputError(
            f"gpus_per_job is {count}, and this job sees {len(cards)} GPUs: {', '.join(cards)}"
        )
    waiting = False
    while True:
        if len(held := _take_some(cards, count, jobs_per_gpu)) == count:
            os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(held)
            return held
        if not waiting:
            wanted = "a GPU" if count == 1 else f"{count} GPUs"
            sentence = f"waiting for {wanted}: other jobs hold {', '.join(cards)}"
            logger.info(sentence)
            print(sentence, file=sys.stderr)
            waiting = True
        time.sleep(random.uniform(0.5, 1.5))  # or two that need the same would collide each time


def _take_some(cards: Mapping[str, str], count: int, jobs_per_gpu: int) -> list[str]:
    """Lease so many cards; where there are fewer that are free, none is kept."""
    before = len(_held)
    held: list[str] = []
    # Every card's first place before any card's second.
    for place in range(jobs_per_gpu):
        for card, name in cards.items():
            wanted = len(held) < count and card not in held
            if wanted and _take(_lease(name, len(cards), place)):
                held.append(card)
    if len(held) < count:
        while len(_held) > before:
            os.close(_held.pop())
    return held


def _lease(name: str, count: int, place: int) -> Path:
    """The file that is locked by who holds a place on a card, one of `count` that are visible.

    SLURM may count cards within its job, and may give one card to several jobs. So a card that
    has only an index, or that is the only one, is shared out among the processes of a job alone.

    Python's own choice of a temporary folder is another one while the first is full, and two
    processes would each find the card free.
    """
    folder = os.environ.get("TMPDIR", "/tmp")
    job = os.environ.get("SLURM_JOB_ID")
    if job and (count == 1 or not name.startswith(UUIDS)):
        name = f"job {job}, {name}"
    file = f"ensdistill-{quote(name, safe='')}.{place}.lock"
    return Path(folder if os.path.isdir(folder) else "/tmp", file)


def _take(path: Path) -> bool:
    """Lock a file until this process ends; False if another process has locked it.

    Any user may have made it, so it is only locked, never written, and no link is followed.
    """
    careful = os.O_NOFOLLOW | os.O_NONBLOCK
    mask = os.umask(0o133)  # others may read it from the first moment
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | careful)
    except FileExistsError:
        mine = os.access(path, os.W_OK)  # what only NFS asks for
        file = os.open(path, (os.O_RDWR if mine else os.O_RDONLY) | careful)
    finally:
        os.umask(mask)
    locked = try_lock(file)
    if locked:
        _held.append(file)
        return True
    os.close(file)
    if locked is None:
        raise InputError(
            f"{path.parent}: files cannot be locked there, which is how jobs share out the GPUs; "
            "set TMPDIR to a folder on this machine's own disk"
        )
    return False


def visible_cards() -> dict[str, str]:
    """The GPUs that this process may use: index or UUID, and a name that is the same for both."""
    try:
        listing = subprocess.run(
            ["nvidia-smi", "--query-gpu=index,uuid", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        listing = ""
    known = dict(line.split(", ") for line in listing.splitlines())
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return {uuid: uuid for uuid in _assigned(known)}
    cards: dict[str, str] = {}
    for card in filter(None, map(str.strip, chosen.split(","))):
        if not (card.isdigit() or card.startswith(UUIDS)):  # "-1", or SLURM's "NoDevFiles"
            break  # CUDA ignores this and what follows
        whole = [uuid for uuid in known.values() if uuid.startswith(card)]
        cards[card] = known.get(card, whole[0] if len(whole) == 1 else card)
    return cards


def _assigned(known: Mapping[str, str]) -> list[str]:
    """Of the machine's cards, UUID by index, those that SLURM has assigned; all without it.

    Where SLURM hides the others, its indices do not count the rest.
    """
    indices = os.environ.get("SLURM_STEP_GPUS") or os.environ.get("SLURM_JOB_GPUS") or ""
    assigned = [known[index] for index in indices.split(",") if index in known]
    return assigned if 0 < len(assigned) < len(known) else list(known.values())


def _log_peak_memory(device: "torch.device") -> None:
    import torch

    peak = torch.cuda.max_memory_reserved(device)
    logger.info("peak GPU memory: %d MiB", peak >> 20)
