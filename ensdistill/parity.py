"""What an exported file says beside the student that it was made of."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ensdistill import InputError, metrics
from ensdistill.deployment import (
    Answers,
    Predictor,
    StudentWeights,
    joined,
    open_student,
    study_folder,
)
from ensdistill.export import ENDINGS, Format, Precision, write_exported
from ensdistill.files import atomic
from ensdistill.images import evaluation_images

MOST_DIFFERENCE = 1e-5
"""Of a probability, between a float32 file and PyTorch."""

NEEDED: dict[Format, tuple[str, ...]] = {
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "torch": (),
}
"""Packages that are no dependencies of this one."""

COMPARED, CALIBRATION = 500, 500
"""Images, at most, of the test split by which a file is compared, and of the validation split by
which int8 is calibrated."""

BATCH = 100
"""Images that are asked at once."""


def export_student(
    student: str | Path,
    output: str | Path,
    to: Format,
    precision: Precision = "float32",
    uint8: bool = False,
) -> dict[str, Any]:
    """Export a student's or a teacher's weights, and compare what the file says with PyTorch.

    Args:
        student: weights.safetensors; images are those of the study in whose folder it lies.
        output: the file, whole or not there at all.
        to, precision, uint8: as of `export.write_exported`.

    Returns:
        file, bytes, format, precision, input; images, the number compared, and `images_of`, which
        these are; largest_difference of a probability, and largest_member_difference; of a study's
        images nll, accuracy (percent) and those of PyTorch, nll_torch and accuracy_torch, after
        temperature scaling.

    Raises:
        InputError: the weights cannot be read or exported, a package is missing, or the file
            says something else.
    """
    output = Path(output)
    if output.suffix.lower() != ENDINGS[to]:
        raise InputError(f"{output}: --to {to} makes a file whose name ends in {ENDINGS[to]}")
    missing = [it for it in NEEDED[to] if not find_spec(it)]
    if missing:
        raise InputError(
            f"--to {to} needs the package {missing[0]}: pip install 'ensdistill[onnx]'"
        )
    if precision == "int8" and to == "torch":
        raise InputError("--int8 is for --to onnx alone: PyTorch's files have no static int8 here")
    reference = StudentWeights(student)
    study = study_folder(student)
    calibration = None
    if precision == "int8":
        if study is None:
            raise InputError(
                f"{student}: --int8 needs validation images, and these weights lie in no study's "
                "folder"
            )
        calibration = _images(study, "val", CALIBRATION)[0]
    with atomic(output) as temporary, _quiet():
        known = reference.student, reference.deployment
        write_exported(temporary, *known, to, precision, uint8, calibration)
        exported = open_student(temporary)
        if study is None:
            images, labels = _random_images(exported), None
        else:
            images, labels = _images(study, "test", COMPARED)
        report: dict[str, Any] = {
            "file": str(output),
            "bytes": temporary.stat().st_size,
            "format": to,
            "precision": precision,
            "input": "uint8" if uint8 else "float32",
            "images": len(images),
            "images_of": "random" if study is None else "test",
            **compare(reference, exported, images, labels),
        }
        difference = float(report["largest_difference"])
        if precision == "float32" and not difference <= MOST_DIFFERENCE:
            raise InputError(
                f"{student}: the exported file differs from PyTorch by {difference:.1e} in a "
                f"probability, more than {MOST_DIFFERENCE}; nothing is written"
            )
    return report


def compare(
    reference: Predictor,
    exported: Predictor,
    images: NDArray[np.uint8],
    labels: NDArray[np.int64] | None = None,
) -> dict[str, float]:
    """Largest differences of probabilities, and NLL and accuracy of both where there are labels."""
    theirs, ours = (ask(it, images) for it in (reference, exported))
    found = {
        "largest_difference": _largest(ours.probabilities, theirs.probabilities),
        "largest_member_difference": _largest(
            ours.member_probabilities, theirs.member_probabilities
        ),
    }
    if labels is not None:
        for ending, answers in (("", ours), ("_torch", theirs)):
            found[f"nll{ending}"] = float(metrics.nll(answers.probabilities, labels))
            found[f"accuracy{ending}"] = metrics.accuracy(answers.probabilities, labels)
    return found


def ask(predictor: Predictor, images: NDArray[np.uint8], batch: int = BATCH) -> Answers:
    """Answers for any number of images."""
    parts = [predictor(images[at : at + batch]) for at in range(0, len(images), batch)]
    return joined(parts)


def _largest(ours: NDArray[np.float64], theirs: NDArray[np.float64]) -> float:
    return float(np.abs(ours - theirs).max())  # NaN where one is NaN


def _images(study: Path, split: str, most: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Some images of a split and their labels, the same in every call."""
    stored = evaluation_images(study / "images.h5", split)
    chosen = np.sort(np.random.default_rng(0).permutation(len(stored))[:most])
    return stored.read(chosen), stored.labels[chosen]


def _random_images(exported: Predictor) -> NDArray[np.uint8]:
    known = exported.deployment
    shape = (10, known.channels, *(known.size or (32, 32)))
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporters log of every operation."""
    loggers = [logging.getLogger(it) for it in ("onnxscript", "onnx_ir", "torch", "")]
    levels = [it.level for it in loggers]
    for it in loggers:
        it.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for it, level in zip(loggers, levels, strict=True):
            it.setLevel(level)
