"""How cost grows: judging many systems on many images, as jobs do it, without PyTorch; and

    python -m benchmarks.scale      # or make bench-scale: some ten minutes

time and memory of a training step against members, classes, width and the side of the images, and
of judging against images and classes. docs/scale.csv holds what was measured, docs/scale.png shows
it with fitted exponents, and the table of these is printed.
"""

import multiprocessing
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from numpy.typing import NDArray

from ensdistill import drawing
from ensdistill.findings import findings
from ensdistill.hdf5 import write_hdf5
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

MEMBERS = 4
OTHERS = ("near", "far")
SETS = {"clean": "clean", "gaussian": "Gaussian", "ods": "ODS", "conf_ods": "ConfODS"}
ETAS = [0.01, 0.02, 0.04]


@dataclass(frozen=True)
class Scale:
    """A study's size; the files of one student stand for those of all."""

    classes: int
    students: int
    images: int = 50_000
    """On test; a tenth on validation, a fifth in every other set."""
    teachers: int = 5

    def __str__(self) -> str:
        return (
            f"{self.images:,} images, {self.classes:,} classes, {self.teachers} teachers, "
            f"{self.students} students of {MEMBERS} members"
        )


SCALES = {"judging_50k": Scale(100, 20), "judging_50k_1000": Scale(1000, 3)}
"""By how the names of rows begin."""


def write_networks(folder: str, scale: Scale) -> None:
    """Logits of teachers and of a student on all sets of images."""
    counts = {"test": scale.images, "val": scale.images // 10}
    others = [f"out_of_distribution/{it}" for it in OTHERS]
    others += [f"corrupted/fog/{severity}" for severity in range(2)]
    counts |= dict.fromkeys(others, scale.images // 5)
    networks = {f"teacher{seed}": 1 for seed in range(scale.teachers)} | {"student": MEMBERS}
    for place, (name, members) in enumerate(networks.items()):
        arrays = _of_network(counts, members, scale.classes, place)
        write_hdf5(Path(folder, f"{name}.h5"), arrays, {"parameters": 100 * members})


def write(folder: str, scale: Scale) -> None:
    """The same, and logits of analyses."""
    write_networks(folder, scale)

    def noise(*shape: int) -> NDArray[np.float32]:
        shape = (*shape, scale.classes)
        return np.random.default_rng(shape).standard_normal(shape, np.float32)

    labels = np.zeros(10_000, int)
    arrays = {"labels": labels, **{f"{it}/logits": noise(10_000, MEMBERS) for it in SETS}}
    write_hdf5(Path(folder, "perturbed.h5"), arrays, {"titles": SETS, "eta": 0.02})
    arrays = {"ods/logits": noise(len(ETAS), 2000, MEMBERS)}
    known = {"titles": {"ods": "ODS"}, "etas": ETAS}
    write_hdf5(Path(folder, "swept.h5"), arrays, known)
    pool = scale.teachers
    arrays = {"clean/logits": noise(2000, pool), "ods/logits": noise(pool, 2000, pool)}
    arrays |= {"cosines": np.zeros((2000, pool, pool)), "random_cosines": np.zeros((2000, pool))}
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
        self.pool = [str(Path(folder, f"teacher{seed}.h5")) for seed in range(scale.teachers)]
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
    return seconds, most_memory()


def most_memory() -> float:
    """Of this process so far, in MiB; unlike rusage's, not that of the process that started it."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1024


# --- how cost grows --------------------------------------------------------------------------

STEP = {"members": 4, "classes": 10, "width": 16, "side": 32}
"""The step from which one size at a time is changed: ConfODS, ResNet-8, 32 images, float32."""
STEPS = {
    "members": [2, 4, 8, 16],
    "classes": [10, 30, 100, 300, 1000],
    "width": [8, 16, 32],
    "side": [16, 32, 64],
}
SMALL = Scale(100, 1, 10_000, MEMBERS)
"""The study from which one size at a time is changed: a student of four members, its teachers."""
STUDIES = {
    "images": [1000, 3000, 10_000, 30_000, 50_000],
    "classes": [10, 30, 100, 300, 1000],
}
LARGEST = Scale(1000, 1, 50_000, MEMBERS)
PARTS = {"scores": "metrics", "claims": "claims", "findings": "findings"}
"""Of `JUDGED`, what grows with a study."""
LINEAR = {"width": 2, "side": 2}
"""The exponent at which work is linear in numbers and operations, where that is not 1."""
DOCS = Path(__file__).parents[1] / "docs"


def a_step(members: int, classes: int, width: int, side: int) -> Callable[[], Any]:
    """A step of ConfODS, images at hand."""
    import torch

    from benchmarks.workloads import CONF_ODS, sgd
    from ensdistill.learning import learning, train_step
    from ensdistill.networks import fold_batch_norms
    from ensdistill.students import Step, build_student

    architecture = {"name": "resnet8", "width": width, "num_classes": classes, "in_channels": 3}
    teachers = [build_student("single", architecture, 1).eval() for _ in range(members)]
    folded = [fold_batch_norms(it.requires_grad_(False).network) for it in teachers]
    student = build_student("batch_ensemble", architecture, members).train()
    how, optimizer = learning(folded, **CONF_ODS), sgd(student)
    x = torch.rand(32, 3, side, side).contiguous(memory_format=torch.channels_last)
    y, drawn = torch.randint(classes, (32,)), [torch.Generator() for _ in range(2)]
    return lambda: train_step(Step(student, folded, x, y, 0.0, *drawn), how, optimizer, "fp32")


def step_cost(rounds: int, **sizes: int) -> tuple[float, float]:
    """Least CPU seconds of a step, and the MiB that network and steps take."""
    before = most_memory()
    call, seconds = a_step(**sizes), []
    for _ in range(1 + rounds):  # the first one warms up
        started = time.process_time()
        call()
        seconds.append(time.process_time() - started)
    return min(seconds[1:]), most_memory() - before


def judging_cost(name: str, folder: str, scale: Scale) -> tuple[float, float]:
    """CPU seconds of a part of judging, and the MiB that it takes."""
    before, started = most_memory(), time.process_time()
    JUDGED[name](Files(folder, scale))
    return time.process_time() - started, most_memory() - before


def alone(function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    """In a process of its own, which has imported what this one has."""
    fork = multiprocessing.get_context("fork")
    with fork.Pool(1) as pool:
        return pool.apply(function, arguments, named)


def steps(rounds: int = 2) -> Iterator[dict[str, Any]]:
    """A row for each size of a step."""
    import torch

    import ensdistill.learning
    import ensdistill.students  # noqa: F401

    torch.set_num_threads(1)
    for against, values in STEPS.items():
        for value in values:
            seconds, mib = alone(step_cost, rounds, **{**STEP, against: value})
            known = {"what": "step", "against": against, "value": value, "n": rounds}
            yield known | {"cpu_seconds": seconds, "mib": mib}


def studies() -> Iterator[dict[str, Any]]:
    """A row for each part of judging, and each size of a study."""
    sizes = [(key, replace(SMALL, **{key: value})) for key, its in STUDIES.items() for value in its]
    for against, scale in [*sizes, ("largest", LARGEST)]:
        with tempfile.TemporaryDirectory() as folder:
            write_networks(folder, scale)
            for part, title in PARTS.items():
                seconds, mib = alone(judging_cost, part, folder, scale)
                value = getattr(scale, against, scale.images * scale.classes)
                known = {"what": title, "against": against, "value": value, "n": 1}
                yield known | {"cpu_seconds": seconds, "mib": mib}


def exponents(table: pd.DataFrame) -> pd.DataFrame:
    """Of cpu_seconds and mib against every size: fitted to all points, and of the last two.

    Least squares of logarithms; `linear` is the exponent at which nothing grows faster than the
    numbers that are computed.
    """
    rows = []
    for (what, against), points in table.groupby(["what", "against"], sort=False):
        if len(points) < 3:
            continue
        sizes = np.log(points["value"].to_numpy(float))
        row = {"what": what, "against": against, "linear": LINEAR.get(str(against), 1)}
        for column in ("cpu_seconds", "mib"):
            logs = np.log(points[column].to_numpy(float))
            row[column] = np.polyfit(sizes, logs, 1)[0]
            row[f"{column}_last"] = (logs[-1] - logs[-2]) / (sizes[-1] - sizes[-2])
        rows.append(row)
    return pd.DataFrame(rows)


@drawing.styled
def draw(table: pd.DataFrame) -> Figure:
    """Seconds and memory of a step and of judging, with the fitted exponents."""
    found = exponents(table).set_index(["what", "against"])
    figure = Figure(figsize=(drawing.WIDTH, 5), layout="constrained")
    grid = figure.subplots(2, 3)
    for column, (title, keep) in enumerate(PANELS.items()):
        groups = [it for it in table.groupby(["what", "against"], sort=False) if keep(*it[0])]
        for axis, measured in zip(grid[:, column], ("cpu_seconds", "mib"), strict=True):
            for place, (name, points) in enumerate(groups):
                label = f"{name[1] if column == 0 else name[0]}: {found[measured][name]:.2f}"
                x = points["value"] / (points["value"].min() if column == 0 else 1)
                style = {"color": drawing.COLOURS[3 * (place % 2) + place // 2]}
                axis.loglog(x, points[measured], marker=drawing.MARKERS[place], ms=4, **style)
                axis.lines[-1].set_label(label)
            axis.legend(title="exponent", ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0))
            axis.set_ylabel({"cpu_seconds": "CPU seconds", "mib": "MiB"}[measured])
            axis.set_xlabel(title)
            drawing.plain_numbers(axis.xaxis)
            drawing.plain_numbers(axis.yaxis)
    drawing.add_note(figure, NOTE)
    return figure


PANELS: dict[str, Callable[[str, str], bool]] = {
    "Times the smallest size": lambda what, against: what == "step",
    "Test images, of 100 classes": lambda what, against: what != "step" and against == "images",
    "Classes, of 10,000 test images": lambda what, against: what != "step" and against == "classes",
}
NOTE = (
    "Left: a step of ConfODS (ResNet-8 of width 16, 32 images of 32×32, 4 members, 10 classes, "
    "float32, one thread) as one size is changed. Middle and right: what is judged of a student of "
    "4 members and of the ensembles of its 4 teachers. Memory is what is added to the process."
)


def report(table: pd.DataFrame) -> str:
    """Exponents as a table in Markdown, and the largest study."""
    lines = ["| | against | time | of the last two | memory | of the last two | linear work |"]
    lines.append("|:--|:--|--:|--:|--:|--:|--:|")
    for row in exponents(table).itertuples():
        values = row.cpu_seconds, row.cpu_seconds_last, row.mib, row.mib_last
        numbers = " | ".join(f"{value:.2f}" for value in values)
        lines.append(f"| {row.what} | {row.against} | {numbers} | {row.linear} |")
    for row in table[table["against"] == "largest"].itertuples():
        lines.append(f"{row.what} of {LARGEST}: {row.cpu_seconds:.0f} s, {row.mib:.0f} MiB")
    return "\n".join(lines)


def main(rows: Sequence[dict[str, Any]] | None = None) -> None:
    import torch

    from benchmarks.rows import hardware
    from ensdistill.drawing import save
    from ensdistill.files import write_csv

    table = pd.DataFrame(rows or [*studies(), *steps()])
    table["hardware"] = hardware(torch.device("cpu"))
    write_csv(DOCS / "scale.csv", table)
    save(draw(table), [DOCS / "scale.png"])
    print(report(table))


if __name__ == "__main__":
    main()
