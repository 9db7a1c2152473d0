"""What exported files say, cost and weigh beside PyTorch, student by student.

    python -m benchmarks.parity results/digits/students/*/0/weights.safetensors > parity.md

One row for PyTorch, and one each for ONNX in float32, float16 and int8. Times are of a predictor's
call, from uint8 images to answers, on one thread; the least of n rounds in which all take turns,
which other work on the machine disturbs least.
"""

import argparse
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray

from ensdistill.deployment import Predictor, open_student
from ensdistill.numerics import processor_name
from ensdistill.parity import export_student
from ensdistill.weights import read_header

PRECISIONS = ("float32", "float16", "int8")
BATCHES = {1: 20, 128: 5}
"""Images at once, and calls that are timed together."""

HEAD = (
    "student", "computed by", "largest difference", "NLL", "change", "ms, batch 1", "ms, batch 128",
    "MB",
)  # fmt: skip


def milliseconds(predictors: list[Predictor], rounds: int) -> NDArray[np.float64]:
    """For an image, in batches of each size: (predictors, sizes)."""
    known = predictors[0].deployment
    taken = np.empty((rounds, len(predictors), len(BATCHES)))
    for turn in range(rounds):
        for number, predictor in enumerate(predictors):
            for place, (batch, calls) in enumerate(BATCHES.items()):
                shape = (batch, known.channels, *known.size)
                images = np.random.default_rng(turn).integers(0, 256, shape, dtype=np.uint8)
                predictor(images)
                begin = time.perf_counter()
                for _ in range(calls):
                    predictor(images)
                taken[turn, number, place] = (time.perf_counter() - begin) / calls / batch
    return 1000 * taken.min(0)


def rows(path: Path, rounds: int) -> Iterator[str]:
    """Of one student's weights."""
    header = read_header(path)
    name = f"`{header.get('method', 'teacher')}`"
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, f"{precision}.onnx") for precision in PRECISIONS]
        reports = [
            export_student(path, file, "onnx", precision)
            for file, precision in zip(files, PRECISIONS, strict=True)
        ]
        taken = milliseconds([open_student(it) for it in (path, *files)], rounds)
    nll = reports[0]["nll_torch"]
    size = path.stat().st_size / 1e6
    own = f"{nll:.4f} | | {taken[0, 0]:.3g} | {taken[0, 1]:.3g} | {size:.3f} |"
    yield f"| {name} | PyTorch | | {own}"
    for report, (one, many) in zip(reports, taken[1:], strict=True):
        cells = (
            "ONNX Runtime" + {"float16": ", half", "int8": ", int8"}.get(report["precision"], ""),
            f"{report['largest_difference']:.0e}",
            f"{report['nll']:.4f}",
            f"{report['nll'] - nll:+.4f}",
            *(f"{one:.3g}", f"{many:.3g}", f"{report['bytes'] / 1e6:.3f}"),
        )
        yield f"| {name} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("weights", nargs="+", type=Path, help="of students in a study's folder")
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(1)
    print(
        f"{processor_name()}, 1 thread; PyTorch {torch.__version__}, ONNX Runtime "
        f"{onnxruntime.__version__}; least of {given.rounds} rounds.\n\n| {' | '.join(HEAD)} |"
    )
    print("|:--|:--|" + "--:|" * (len(HEAD) - 2), flush=True)
    for path in given.weights:
        for row in rows(path, given.rounds):
            print(row, flush=True)


if __name__ == "__main__":
    main()
