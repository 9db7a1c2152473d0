"""What a card measures: a student on the study's test images, beside those that taught it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ensdistill.bootstrap import Interval, Weights, image_weights, interval, mean_of
from ensdistill.calibration import apply_temperature, optimal_temperature
from ensdistill.conformal import WANTED
from ensdistill.deployment import Deployment, conformal_sets
from ensdistill.metrics import brier, nll
from ensdistill.predictions import (
    Labels,
    Prediction,
    join,
    read_attributes,
    read_prediction,
)
from ensdistill.resampled import calibration_error

if TYPE_CHECKING:
    import pandas as pd

BINS = 15
"""Of calibration errors."""

Intervals = dict[str, Interval]
"""By the keys of `metrics.METRICS`."""


@dataclass(frozen=True)
class Measured:
    """A system on the test images."""

    name: str
    temperature: float
    """T*, from the validation images."""
    metrics: Intervals


@dataclass(frozen=True)
class Coverage:
    """The student's conformal sets on the test images."""

    wanted: float
    """Share of the labels that the sets should hold."""
    inside: Interval
    """Share that they hold, in percent."""
    size: Interval
    """Classes of a set."""


def measured(
    logits: Path, deployment: Deployment, teachers: Mapping[str, Path]
) -> tuple[list[Measured], Coverage]:
    """The student, and the first of its teachers and all of them together, if these are given.

    Args:
        logits: of the student.
        deployment: its temperature, and scores of validation images.
        teachers: logits of those that taught it, by name.

    Raises:
        DamagedFile: a file is damaged.
    """
    prediction, labels = read_prediction(logits, "test")
    weights = image_weights(len(labels))
    temperature = deployment.temperature or 1.0
    probs = prediction.probs()
    found = [Measured("This student", temperature, _metrics(probs, labels, temperature, weights))]
    systems: dict[str, list[Path]] = {}
    if teachers:
        systems = {next(iter(teachers)): [*teachers.values()][:1]}
        systems[f"Ensemble of {len(teachers)}"] = [*teachers.values()]
    for name, paths in systems.items():
        validation, known = _joined(paths, "val")
        fitted = optimal_temperature(validation.probs(), known)
        probabilities = _joined(paths, "test")[0].probs()
        found.append(Measured(name, fitted, _metrics(probabilities, labels, fitted, weights)))
    return found, _coverage(probs, labels, deployment, weights)


def _joined(paths: list[Path], split: str) -> tuple[Prediction, Labels]:
    read = [read_prediction(path, split) for path in paths]
    return join([prediction for prediction, _ in read]), read[0][1]


def _metrics(
    probs: NDArray[np.float64], labels: Labels, temperature: float, weights: Weights
) -> Intervals:
    scaled = apply_temperature(probs, temperature)
    estimates = {"acc": mean_of(100.0 * (probs.argmax(1) == labels), weights)}
    for ending, these in (("", probs), ("_ts", scaled)):
        estimates[f"nll{ending}"] = mean_of(nll(these, labels, "none"), weights)
        estimates[f"bs{ending}"] = mean_of(brier(these, labels, "none"), weights)
        estimates[f"ece{ending}"] = calibration_error(these, labels, BINS, weights)
    return {key: interval(estimate) for key, estimate in estimates.items()}


def _coverage(
    probs: NDArray[np.float64], labels: Labels, deployment: Deployment, weights: Weights
) -> Coverage:
    """Of the sets that `ensdistill predict --coverage` gives."""
    scaled = apply_temperature(probs, deployment.temperature or 1.0)
    sets = conformal_sets(scaled, deployment.threshold(WANTED))
    inside, sizes = 100.0 * sets[np.arange(len(labels)), labels], sets.sum(1)
    return Coverage(WANTED, *(interval(mean_of(it, weights)) for it in (inside, sizes)))


def teachers_of(folder: Path, header: Mapping[str, Any]) -> dict[str, Path] | None:
    """Logits of the networks that taught a student, by name; None if some are not there.

    They are known by the digests of their weights, which the student's header has.
    """
    wanted = header.get("teachers") or []
    paths = sorted((folder / "logits/teachers").glob("*.h5"), key=lambda it: int(it.stem))
    known = {read_attributes(path).get("weights"): path for path in paths}
    if not all(digest in known for digest in wanted):
        return None
    return {f"Teacher {known[digest].stem}": known[digest] for digest in wanted}


def row_of(scores: "pd.DataFrame | None", score: float) -> "pd.Series | None":
    """The one row of the study's scores that is this student's: the one with its NLL, exactly.

    Headers know the method's name, tables its label. None if no row has it, as where the tables
    are of other weights, or several have.
    """
    if scores is None:
        return None
    same = scores[np.isclose(scores["nll"], score, rtol=1e-9, atol=0)]
    return same.iloc[0] if len(same) == 1 else None
