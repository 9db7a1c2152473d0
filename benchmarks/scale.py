"""What judging many systems on many images takes, as jobs do it: without PyTorch."""

import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from ensdistill.files import write_hdf5
from ensdistill.findings import findings
from ensdistill.reports import (
    corruptions,
    diversity_students,
    diversity_teachers,
    out_of_distribution,
    reliability,
    saturation,
    scores,
    selective,
    sweep,
    transfer,
)
from ensdistill.resampled import ResampledSystems

IMAGES, MEMBERS, POOL = 50_000, 4, 5
OTHERS = ("near", "far")
SETS = {"clean": "clean", "ods": "ODS"}
ETAS = [0.01, 0.02, 0.04]


@dataclass(frozen=True)
class Scale:
    """A study's size; the files of one student stand for those of all."""

    classes: int
    students: int

    def __str__(self) -> str:
        return (
            f"{IMAGES:,} images, {self.classes:,} classes, {POOL} teachers, "
            f"{self.students} students of {MEMBERS} members"
        )


SCALES = {"judging_50k": Scale(100, 20), "judging_50k_1000": Scale(1000, 3)}
"""By how the names of rows begin."""


def write(folder: str, scale: Scale) -> None:
    """Logits of teachers and of a student on all sets of images, and those of analyses."""
    counts = {"test": IMAGES, "val": 5000, **{f"out_of_distribution/{it}": 10_000 for it in OTHERS}}
    counts |= {f"corrupted/fog/{severity}": 10_000 for severity in range(2)}
    networks = {f"teacher{seed}": 1 for seed in range(POOL)} | {"student": MEMBERS}
    for place, (name, members) in enumerate(networks.items()):
        arrays = _of_network(counts, members, scale.classes, place)
        write_hdf5(Path(folder, f"{name}.h5"), arrays, {"parameters": 100 * members})

    def noise(*shape: int) -> NDArray[np.float32]:
        shape = (*shape, scale.classes)
        return np.random.default_rng(shape).standard_normal(shape, np.float32)

    labels = np.zeros(10_000, int)
    arrays = {"labels": labels, **{f"{it}/logits": noise(10_000, MEMBERS) for it in SETS}}
    write_hdf5(Path(folder, "perturbed.h5"), arrays, {"titles": SETS, "eta": 0.02})
    arrays = {"ods/logits": noise(len(ETAS), 2000, MEMBERS)}
    known = {"titles": {"ods": "ODS"}, "etas": ETAS}
    write_hdf5(Path(folder, "swept.h5"), arrays, known)
    arrays = {"clean/logits": noise(2000, POOL), "ods/logits": noise(POOL, 2000, POOL)}
    write_hdf5(Path(folder, "transferred.h5"), arrays, {})


def _of_network(
    counts: dict[str, int], members: int, classes: int, place: int
) -> Iterator[tuple[str, NDArray]]:
    """Arrays by their names; all networks share the truth."""
    for split, count in counts.items():
        shared, own = np.random.default_rng(count), np.random.default_rng(place)
        labels = shared.integers(0, classes, count)
        logits = 1.5 * shared.standard_normal((count, 1, classes), np.float32)
        logits = logits + own.standard_normal((count, members, classes), np.float32)
        if "/" not in split:
            logits[np.arange(count), :, labels] += 4
        yield f"{split}/logits", logits
        yield f"{split}/labels", labels


class Files:
    """Of a study, as the functions below hand them on."""

    def __init__(self, folder: str, scale: Scale):
        self.pool = [str(Path(folder, f"teacher{seed}.h5")) for seed in range(POOL)]
        self.ensemble = self.pool[:MEMBERS]
        student = str(Path(folder, "student.h5"))
        self.students = {f"system {it}": [student] for it in range(scale.students)}
        self.perturbed, self.swept, self.transferred = (
            str(Path(folder, f"{name}.h5")) for name in ("perturbed", "swept", "transferred")
        )


def _findings(files: Files) -> Any:
    macs = {"DE-1": 1, **dict.fromkeys(files.students, 4)}
    return findings(
        teachers=files.pool,
        students=files.students,
        shifted_ensemble=files.ensemble,
        shifted_students=files.students,
        costs=pd.DataFrame({"system": macs.keys(), "macs": macs.values()}),
        families=[],
        members=MEMBERS,
    )


JUDGED: dict[str, Callable[[Files], Any]] = {
    "scores": lambda it: scores.table(it.pool, it.students, n_bins=15),
    "reliability": lambda it: reliability.table(it.ensemble, it.students, n_bins=15),
    "selective": lambda it: selective.table(it.ensemble, it.students),
    "out_of_distribution": lambda it: out_of_distribution.table(
        it.ensemble, it.students, it.ensemble, it.students, OTHERS
    ),
    "claims": lambda it: ResampledSystems(it.pool, it.students, MEMBERS, 15),
    "findings": _findings,
    "corruptions": lambda it: corruptions.table(it.ensemble, it.students, n_bins=15),
    "diversity_students": lambda it: diversity_students.table(it.ensemble, it.students, n_bins=15),
    "diversity_teachers": lambda it: diversity_teachers.table(it.perturbed, it.ensemble, 15),
    "saturation": lambda it: saturation.table(it.perturbed, it.ensemble),
    "sweep": lambda it: sweep.table(it.swept, it.perturbed, it.ensemble),
    "transfer": lambda it: transfer.table(it.transferred, MEMBERS),
}
"""What is timed, by name: the tables, and the resampled systems that claims are about."""


def judged(name: str, folder: str, scale: Scale) -> tuple[float, float]:
    """Seconds, and the most memory in MiB that this process, which does nothing else, had."""
    started = time.perf_counter()
    JUDGED[name](Files(folder, scale))
    seconds = time.perf_counter() - started
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return seconds, int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1024
