"""How good a finished student is on new labelled images: metrics with intervals.

All is computed from its answers, of which the probabilities of each member are kept. Of members
with a softmax these are the logits up to a constant, so that every metric is what logits give, to
rounding; of Dirichlet distributions only the mean is known, so that their diversity is left out.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple
from unicodedata import normalize

import numpy as np
from numpy.typing import NDArray

from ensdistill import InputError
from ensdistill.archives import entries
from ensdistill.asking import BATCH, Found, answered, image_files, treatment_in
from ensdistill.blocks import Total
from ensdistill.bootstrap import Estimate, Interval, Weights, image_weights, interval, mean_of
from ensdistill.calibration import TINY, apply_temperature, classwise_resampled, clipped_log
from ensdistill.calibration_check import WANTED, check
from ensdistill.deployment import Deployment, Predictor
from ensdistill.image_tables import SPELLINGS
from ensdistill.judging import Judged, Metric, mean, percent
from ensdistill.metrics import METRICS
from ensdistill.predictions import Mixture, Prediction
from ensdistill.table_readers import READERS, kind_of

Array = NDArray[np.float64]
Labels = NDArray[np.int64]

N_BINS = 15
"""Of calibration errors, as studies have it unless told."""
RESAMPLES = 500
"""Of images."""


class Answered(NamedTuple):
    """What a student said of labelled images, N of which could be read."""

    prediction: Prediction
    """Before temperature scaling."""
    labels: Labels
    """(N,)"""
    broken: dict[str, str]
    """Why the others could not be read, by their places."""
    resized: int
    """See `asking.as_trained`."""


# --- labelled images -------------------------------------------------------------------------


def labelled_files(path: Path, classes: Sequence[str], skipped: Counter[str]) -> Iterator[Found]:
    """Image files whose class is the last but one of their `parts`.

    In folders and archives that is the folder that an image is in, in tables what they say. Where
    there are test images, in `test/` or by a table's column of splits, only those count.

    Args:
        skipped: as of `asking.image_files`; images in no folder are `classless`.

    Raises:
        InputError: there are none, or one is of a class that the student does not know; before the
            first is read.
    """
    if not path.exists():
        raise InputError(f"{path}: no such folder")
    table = kind_of(path)
    found = _of_table(path, table, classes) if table else _of_folders(path, classes, skipped)
    first = next(found, None)
    if first is None:
        raise InputError(f"{path}: no image in a folder with the name of its class was found")
    return chain([first], found)


def _of_folders(root: Path, classes: Sequence[str], skipped: Counter[str]) -> Iterator[Found]:
    there = {entry.parts[:-1] for entry in entries(root) if treatment_in(entry) == "read"}
    tested = "test" not in classes and any("test" in folders for folders in there)
    chosen = {folders for folders in there if folders and (not tested or "test" in folders)}
    _check_classes(root, {folders[-1] for folders in chosen}, classes)
    for found in image_files([root], skipped):
        if not found.parts:
            found.read()  # says why it cannot be read to its end
        if found.parts[:-1] in chosen:
            yield found
        else:
            skipped["elsewhere" if found.parts[:-1] else "classless"] += 1


def _of_table(path: Path, kind: str, classes: Sequence[str]) -> Iterator[Found]:
    table = READERS[kind](path, {}, True)
    chosen: Sequence[int] = range(len(table.names))
    splits = [SPELLINGS.get(it.strip().lower()) for it in table.splits or []]
    if "test" in splits:
        chosen = [row for row in chosen if splits[row] == "test"]
    labels = [normalize("NFC", it) for it in table.labels or []]
    _check_classes(path, {labels[row] for row in chosen}, classes)
    for row in chosen:
        parts = (labels[row], table.names[row])
        yield Found(table.image(row), parts, partial(table.content, row))


def _check_classes(path: Path, there: set[str], classes: Sequence[str]) -> None:
    """Refuse classes that the student does not know."""
    if unknown := sorted(there - {normalize("NFC", name) for name in classes}):
        raise InputError(
            f"{path}: class {unknown[0]!r} is none of the student's: {', '.join(classes)}"
        )


def answers_to(
    predictor: Predictor,
    found: Iterator[Found],
    batch_size: int = BATCH,
    tell: Callable[[int], Any] = lambda images: None,
) -> Answered:
    """What a student says of labelled images; of each (M, K) numbers are kept.

    Args:
        found: of `labelled_files`.
        tell: is told how many more are done.

    Raises:
        InputError: none of them can be read, or as of `asking.answered`.
    """
    known = predictor.deployment
    index = {normalize("NFC", name): place for place, name in enumerate(known.classes)}
    logits, labels, broken, resized = [], [], {}, 0
    for pictures, answers in answered(predictor, found, batch_size):
        for picture in pictures:
            resized += picture.resized
            if picture.image is None:
                broken[picture.place] = str(picture.error)
            else:
                labels.append(index[picture.parts[-2]])
        if answers is not None:
            logs = clipped_log(answers.member_probabilities, TINY)
            logits.append((logs * (known.temperature or 1.0)).astype(np.float32))
        tell(len(pictures))
    if not logits:
        place, error = next(iter(broken.items()))
        raise InputError(f"{place}: {error}; no other image can be read either")
    return Answered(Mixture(np.concatenate(logits)), np.array(labels), broken, resized)


# --- metrics ---------------------------------------------------------------------------------


def measured(prediction: Prediction, labels: Labels, known: Deployment) -> dict[str, Interval]:
    """Every metric of `METRICS` that the probabilities alone give, with its interval.

    Left out are those of temperature scaling and of conformal sets, which are asked for by other
    probabilities, and what this student has not.
    """
    judged = Judged(prediction, labels, N_BINS)
    weights = image_weights(len(labels), resamples=RESAMPLES)
    found = {}
    for key, metric in METRICS.items():
        if metric.equivalent_of or key == "temperature" or key.endswith("_ts"):
            continue
        if key == "diversity" and known.prediction["prediction"] != "mixture":
            continue
        values = metric.function(judged)
        if values is None:
            continue
        estimate = _estimate(metric, values, judged, weights)
        if np.isfinite(estimate.measured).all():
            found[key] = interval(estimate)
    return found


def _estimate(metric: Metric, values: Any, judged: Judged, weights: Weights) -> Estimate:
    """Of all images, and of each resample."""
    if metric.whole in (mean, percent):
        scale = 100 if metric.whole is percent else 1
        return mean_of(scale * np.asarray(values, np.float64), weights)
    if any(isinstance(it, Total) for it in values):  # sums over images: the class-wise ECE's
        probs, labels = judged.probs, judged.labels
        resampled = classwise_resampled(probs, labels, weights.counts, judged.n_bins)
    else:  # of the confidence and whether it is right
        repeated = ([np.repeat(it, counts, axis=0) for it in values] for counts in weights.counts)
        resampled = np.array([_whole(metric, it) for it in repeated])
    return Estimate(np.array([_whole(metric, values)]), resampled[:, None])


def _whole(metric: Metric, values: Any) -> float:
    """The metric of what its function found of all images at once."""
    parts = tuple(it.value if isinstance(it, Total) else it for it in values)
    return metric.whole(parts, N_BINS)


def scaled(prediction: Prediction, temperature: float) -> Prediction:
    """The prediction of its p̄ after temperature scaling, which has no members."""
    return Mixture(clipped_log(apply_temperature(prediction.probs(), temperature), TINY)[:, None])


# --- what is told ----------------------------------------------------------------------------


def evaluate(answered: Answered, known: Deployment) -> dict[str, Any]:
    """Metrics before and after temperature scaling, and whether calibration holds.

    Returns:
        for JSON: `metrics`, and `scaled` where T* is known, of which each has `value`, `low` and
        `high`; `calibration`, the fields of `calibration_check.Check`; `absent`, the classes of
        which there is no image. What is not known is None.
    """
    prediction, labels = answered.prediction, answered.labels
    there = set(labels.tolist())
    found = {
        "images": len(labels) + len(answered.broken),
        "broken": answered.broken,
        "resized": answered.resized,
        "absent": [name for place, name in enumerate(known.classes) if place not in there],
        "temperature": known.temperature,
        "metrics": measured(prediction, labels, known),
        "scaled": None,
        "calibration": vars(check(prediction.probs(), labels, known)),
    }
    if known.temperature is not None:
        found["scaled"] = measured(scaled(prediction, known.temperature), labels, known)
    return _plain(found)


def _plain(value: Any) -> Any:
    """As JSON has it."""
    if isinstance(value, Interval):
        return _plain({"value": value.estimate, "low": value.low, "high": value.high})
    if isinstance(value, dict):
        return {key: _plain(it) for key, it in value.items()}
    return None if isinstance(value, float) and not np.isfinite(value) else value


def table(found: Mapping[str, Any]) -> list[list[str]]:
    """Rows of texts: metric, scaling, value, ends of its interval, unit; with a head."""
    rows = [["metric", "scaling", "value", "low", "high", "unit"]]
    for key, metric in METRICS.items():
        for scaling, values in (("none", found["metrics"]), ("T*", found["scaled"] or {})):
            if key in values:
                numbers = [repr(values[key][it]) for it in ("value", "low", "high")]
                rows.append([key, scaling, *numbers, metric.unit])
    return rows


def text(found: Mapping[str, Any]) -> str:
    """What a person reads."""
    temperature, said = found["temperature"], found["calibration"]
    heads = ["", "as they are"] + ([f"scaled by T* = {temperature:.3f}"] if temperature else [])
    lines = [heads]
    for key, metric in METRICS.items():
        if key in found["metrics"]:
            values = [found["metrics"], *([found["scaled"]] if temperature else [])]
            cells = [_cell(it.get(key), metric.decimals) for it in values]
            lines.append([metric.column, *cells])
    width = max(len(line[0]) for line in lines)
    columns = [[f"{line[0]:<{width}}", *(f"{it:>26}" for it in line[1:])] for line in lines]
    facts = [
        ("confidence − accuracy, points", _cell(said["gap"], 1, 100, "+")),
        (
            "ECE, points",
            f"{100 * said['ece']:.1f}; {100 * said['expected_ece']:.1f} if the probabilities were "
            f"right, as large in {said['p_ece']:.1%} of cases",
        ),
        ("T, fitted to these images", _cell(said["refitted"], 3)),
        ("NLL that this T would gain, nats", _cell(said["gain"], 4)),
    ]
    if said["coverage"]:
        chance = f"; so few in {said['p_coverage']:.1%} of cases"
        facts.append(
            (f"labels in sets for {WANTED:.0%}, %", _cell(said["coverage"], 1, 100) + chance)
        )
    width = max(len(name) for name, _ in facts)
    after = "after" if temperature else "without"
    return "\n".join(
        [
            *("".join(line).rstrip() for line in columns),
            "",
            f"Calibration, {after} temperature scaling:",
            *(f"  {name:<{width}}  {value}" for name, value in facts),
            "",
            f"{said['answer'][0].upper()}{said['answer'][1:]}.",
        ]
    )


def _cell(value: Mapping[str, Any] | None, decimals: int, factor: float = 1, sign: str = "") -> str:
    """A number with its interval."""
    if value is None:
        return ""
    shown = [
        "?" if it is None else f"{factor * it:{sign}.{decimals}f}"
        for it in (value["value"], value["low"], value["high"])
    ]
    return f"{shown[0]} [{shown[1]}, {shown[2]}]"
