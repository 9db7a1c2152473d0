"""What judging many systems on many images takes, as jobs do it: without PyTorch."""

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ensdistill.files import write_hdf5
from ensdistill.reports import out_of_distribution, reliability, scores, selective
from ensdistill.resampled import ResampledSystems

IMAGES, CLASSES, MEMBERS, POOL, SYSTEMS = 50_000, 100, 4, 5, 20
OTHERS = ("near", "far")


def write(folder: str) -> None:
    """Logits of teachers and of a student, whose files stand for those of all 20 systems."""
    rng = np.random.default_rng(0)
    counts = {"test": IMAGES, "val": 5000, **{f"out_of_distribution/{it}": 10_000 for it in OTHERS}}
    labels = {split: rng.integers(0, CLASSES, count) for split, count in counts.items()}
    truth = {it: rng.normal(0, 1.5, (len(y), 1, CLASSES)) for it, y in labels.items()}
    networks = {f"teacher{seed}": 1 for seed in range(POOL)} | {"student": MEMBERS}
    for name, members in networks.items():
        arrays: dict[str, Any] = {}
        for split, y in labels.items():
            logits = truth[split] + rng.normal(size=(len(y), members, CLASSES))
            if "/" not in split:
                logits[np.arange(len(y)), :, y] += 4
            arrays[f"{split}/logits"] = logits.astype(np.float32)
            arrays[f"{split}/labels"] = y
        write_hdf5(Path(folder, f"{name}.h5"), arrays, {"parameters": 100 * members})


def _files(folder: str, teachers: int) -> tuple[list[str], dict[str, list[str]]]:
    pool = [str(Path(folder, f"teacher{seed}.h5")) for seed in range(teachers)]
    return pool, {f"system {it}": [str(Path(folder, "student.h5"))] for it in range(SYSTEMS)}


def _scores(folder: str) -> Any:
    return scores.table(*_files(folder, POOL), n_bins=15)


def _reliability(folder: str) -> Any:
    return reliability.table(*_files(folder, MEMBERS), n_bins=15)


def _selective(folder: str) -> Any:
    return selective.table(*_files(folder, MEMBERS))


def _out_of_distribution(folder: str) -> Any:
    files = _files(folder, MEMBERS)
    return out_of_distribution.table(*files, *files, OTHERS)


def _resampled(folder: str) -> Any:
    return ResampledSystems(*_files(folder, POOL), MEMBERS, 15)


JUDGED: dict[str, Callable[[str], Any]] = {
    "scores": _scores,
    "reliability": _reliability,
    "selective": _selective,
    "out_of_distribution": _out_of_distribution,
    "claims": _resampled,
}
"""What is timed, by name: the tables, and the resampled systems that claims are about."""


def judged(name: str, folder: str) -> tuple[float, float]:
    """Seconds, and the most memory in MiB that this process, which does nothing else, had."""
    started = time.perf_counter()
    JUDGED[name](folder)
    seconds = time.perf_counter() - started
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return seconds, int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1024
