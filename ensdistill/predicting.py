"""Tables of what a finished student says of images of one's own: a row for each, in order.

They are written batch by batch: memory does not grow with the number of images. One that cannot be
read is a row with its error.
"""

import csv
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from ensdistill import InputError
from ensdistill.asking import BATCH, Picture, answered, image_files
from ensdistill.deployment import Answers, Deployment, Predictor, conformal_sets
from ensdistill.files import atomic
from ensdistill.folders import TREATMENTS

ROW_GROUP = 4096
"""Rows of a Parquet file that are written at once."""


# --- rows ------------------------------------------------------------------------------------


def columns(known: Deployment, coverage: float | None) -> list[str]:
    """What is told of an image, in order."""
    members = ["member_classes", "member_probabilities"] if known.members > 1 else []
    sets = ["conformal_set", "set_size"] if coverage is not None else []
    said = ["class", "probability", "entropy", "mutual_information"]
    return ["path", *said, *members, *sets, "error"]


def rows(
    pictures: Sequence[Picture],
    answers: Answers | None,
    classes: Sequence[str],
    limit: float | None = None,
) -> Iterator[dict[str, Any]]:
    """What is told of pictures; a value that is not there is None or missing.

    Args:
        answers: of those that are not broken.
        classes: names.
        limit: the probability that classes of a conformal set have; None for no sets.
    """
    place = 0
    for picture in pictures:
        # Names of files may have bytes that are no text.
        row: dict[str, Any] = {"path": os.fsencode(picture.place).decode(errors="backslashreplace")}
        if picture.image is None or answers is None:
            yield {**row, "error": picture.error}
            continue
        probabilities, members = answers.probabilities[place], answers.member_probabilities[place]
        best, between = int(probabilities.argmax()), answers.mutual_information
        row |= {
            "class": classes[best],
            "probability": float(probabilities[best]),
            "entropy": float(answers.entropy[place]),
            "mutual_information": None if between is None else float(between[place]),
            "member_classes": [classes[it] for it in members.argmax(1)],
            "member_probabilities": members[:, best].tolist(),
        }
        if limit is not None:
            inside = conformal_sets(probabilities[None], limit)[0]
            ranked = [classes[it] for it in np.argsort(-probabilities) if inside[it]]
            row |= {"conformal_set": ranked, "set_size": len(ranked)}
        yield row
        place += 1


# --- files -----------------------------------------------------------------------------------

Write = Callable[[Iterable[dict[str, Any]]], None]


@contextmanager
def _csv(path: Path, columns: Sequence[str]) -> Iterator[Write]:
    """Lists are JSON in their cell: names of classes may have any sign in them."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)

        def cell(value: Any) -> Any:
            return json.dumps(value, ensure_ascii=False) if isinstance(value, list) else value

        yield lambda rows: writer.writerows(
            [cell(row.get(column)) for column in columns] for row in rows
        )


@contextmanager
def _json_lines(path: Path, columns: Sequence[str]) -> Iterator[Write]:
    with path.open("w", encoding="utf-8") as file:

        def line(row: dict[str, Any]) -> str:
            whole = {column: row.get(column) for column in columns}
            return json.dumps(whole, ensure_ascii=False) + "\n"

        yield lambda rows: file.writelines(map(line, rows))


@contextmanager
def _parquet(path: Path, columns: Sequence[str]) -> Iterator[Write]:
    import pyarrow
    from pyarrow import parquet

    text, number = pyarrow.string(), pyarrow.float64()
    kinds = {
        **dict.fromkeys(("probability", "entropy", "mutual_information"), number),
        **dict.fromkeys(("member_classes", "conformal_set"), pyarrow.list_(text)),
        "member_probabilities": pyarrow.list_(number),
        "set_size": pyarrow.int64(),
    }
    schema = pyarrow.schema([(column, kinds.get(column, text)) for column in columns])
    waiting: list[dict[str, Any]] = []
    with parquet.ParquetWriter(path, schema) as file:

        def write(rows: Iterable[dict[str, Any]], least: int = ROW_GROUP) -> None:
            waiting.extend(rows)
            if len(waiting) >= least:
                file.write_table(pyarrow.Table.from_pylist(waiting, schema))
                waiting.clear()

        yield write
        write([], least=1)


WRITERS: dict[str, Callable[[Path, Sequence[str]], AbstractContextManager[Write]]] = {
    ".csv": _csv,
    ".jsonl": _json_lines,
    ".parquet": _parquet,
}
"""By the ending of the file."""


def check_output(
    output: str | os.PathLike[str], endings: Iterable[str], inputs: Iterable[str | os.PathLike[str]]
) -> None:
    """Refuse, before any work, a file that cannot be written or would replace an input.

    Args:
        endings: that it may have, such as those of `WRITERS`.

    Raises:
        InputError: it is so.
    """
    output, known = Path(output), list(endings)
    if output.suffix.lower() not in known:
        raise InputError(f"{output}: the ending must be one of {', '.join(known)}")
    if output.suffix.lower() == ".parquet":
        try:
            import pyarrow  # noqa: F401
        except ImportError:
            raise InputError(
                f"{output}: needs PyArrow: pip install 'ensdistill[parquet]'"
            ) from None
    if not output.parent.is_dir():
        raise InputError(f"{output.parent}: no such folder")
    if output.is_dir():
        raise InputError(f"{output}: is a folder")
    if output.exists() and any(Path(it).exists() and output.samefile(it) for it in inputs):
        raise InputError(f"{output}: is an input, and would be replaced")


def write_predictions(
    predictor: Predictor,
    paths: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    *,
    coverage: float | None = None,
    batch_size: int = BATCH,
    tell: Callable[[int], Any] = lambda images: None,
) -> dict[str, Any]:
    """Write what a student says of images: one row for each that is found, in order.

    Args:
        paths: of `image_files`.
        output: a table that `check_output` found right, whole or not there at all.
        coverage: of conformal sets, in 0 … 1; no sets unless told.
        batch_size: images that the student is asked about at once.
        tell: is told how many more are done.

    Returns:
        how many `images` there are, how many `broken`, how many `resized` by the rule of
        `as_trained`, and what was `skipped`, by the keys of `folders.TREATMENTS`.

    Raises:
        InputError: a path does not exist, no image is found, no coverage can be promised, or as
            of `answered`.
    """
    known, counts, skipped = predictor.deployment, Counter[str](), Counter[str]()
    limit = None
    if coverage is not None:
        if not 0 < coverage < 1:
            raise InputError(f"the coverage must be between 0 and 1, and is {coverage}")
        limit = known.threshold(coverage)
    found = image_files(paths, skipped)
    first = next(found, None)
    if first is None:
        where = ", ".join(map(str, paths))
        raise InputError(f"{where}: no image was found{said_of(skipped)}")
    found = chain([first], found)
    writer, heads = WRITERS[Path(output).suffix.lower()], columns(known, coverage)
    with atomic(output) as temporary, writer(temporary, heads) as write:
        for pictures, answers in answered(predictor, found, batch_size):
            write(rows(pictures, answers, known.classes, limit))
            for picture in pictures:
                counts.update(broken=picture.image is None, resized=picture.resized, images=1)
            tell(len(pictures))
    names = ("images", "broken", "resized")
    return {**{name: int(counts[name]) for name in names}, "skipped": dict(skipped)}


def said_of(skipped: Counter[str] | dict[str, int]) -> str:
    """How many files were skipped, and why."""
    said = [f"{what} ({skipped[kind]:,})" for kind, what in TREATMENTS.items() if kind in skipped]
    return f"; skipped: {', '.join(said)}" if said else ""
