"""The processor a job computes on."""

import logging
import os
import subprocess
import tempfile
import time
from pathlib import Path

import torch
from filelock import FileLock, Timeout

logger = logging.getLogger(__name__)

_held: list[FileLock] = []


def prepare(threads: int) -> torch.device:
    """A free GPU if there are any, else the CPU with as many threads as Snakemake granted."""
    torch.set_num_threads(threads)
    card = lease_card()
    if torch.cuda.is_available():
        device = torch.device("cuda")
        logger.info("computing on %s, card %s", torch.cuda.get_device_name(device), card or "0")
    else:
        device = torch.device("cpu")
        logger.info("computing on the CPU, threads: %d", threads)
    return device


def lease_card() -> str | None:
    """Make one card this process's only one, and keep others from it until the process ends.

    Snakemake counts GPUs but does not assign them. The lease is a file lock, which the kernel
    releases however the process dies. Must run before CUDA starts. Inside a SLURM job the
    scheduler has chosen already.

    Returns:
        The card's index or UUID; None where there is nothing to choose.
    """
    cards = visible_cards()
    if len(cards) < 2 or "SLURM_JOB_ID" in os.environ:
        return None
    folder = Path(tempfile.gettempdir(), f"ensdistill-gpus-{os.getuid()}")
    folder.mkdir(exist_ok=True)
    waiting = False
    while True:
        for card in cards:
            lock = FileLock(folder / f"{card}.lock")
            try:
                lock.acquire(timeout=0)
            except Timeout:
                continue
            os.environ["CUDA_VISIBLE_DEVICES"] = card
            _held.append(lock)
            return card
        if not waiting:
            logger.info("waiting for one of the cards %s to be free", ", ".join(cards))
            waiting = True
        time.sleep(1)


def visible_cards() -> list[str]:
    """Indices or UUIDs of the GPUs that this process may use."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [card.strip() for card in chosen.split(",") if card.strip()]
    try:
        listing = subprocess.run(
            ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return []
    return listing.split()
