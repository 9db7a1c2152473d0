"""All metrics of every system: the numbers of the results table (see `ensdistill.tables`)."""

from collections.abc import Sequence
from typing import Any, cast

import pandas as pd

from ensdistill.human import read_answers
from ensdistill.judging import fitted
from ensdistill.metrics import METRICS, dee_outside, judge
from ensdistill.predictions import (
    Array,
    Labels,
    Prediction,
    join,
    read_attributes,
    read_prediction,
)
from ensdistill.systems import MOST_SUBSETS, Students, subsets

READS = {
    "teachers": "logits/{pool}.h5",
    "students": "logits/{students}.h5",
    "human": "{human}",
}
SETTINGS = ["n_bins"]

SPLITS = "test", "val"

Systems = tuple[Sequence[Prediction], Labels]
"""Predictions of the same images, and their labels."""


def table(
    teachers: Sequence[str], students: Students, human: Sequence[str] = (), *, n_bins: int
) -> pd.DataFrame:
    """All metrics of every system and replicate.

    Args:
        teachers, students: logits files.
        human: the archive of what people answered of the test images, if they were asked.
        n_bins: of the calibration errors.

    Returns:
        One row per replicate: system, replicate, parameters (where they are known), every metric of
        `METRICS`, and for each equivalent, such as dee, `dee_outside` (see `metrics.dee_outside`).
    """
    rows = []
    pool = {split: [read_prediction(path, split) for path in teachers] for split in SPLITS}
    sizes, (first, labels) = [_parameters(path) for path in teachers], pool["test"][0]
    answers = read_answers(human[0], labels, first.shape[2]) if human else None
    ensembles = [it for size in range(len(teachers)) for it in subsets(len(teachers), size + 1)]
    for start in range(0, len(ensembles), MOST_SUBSETS):  # those that look at the images together
        some = ensembles[start : start + MOST_SUBSETS]
        test, validation = (
            ([join([networks[i][0] for i in subset]) for subset in some], networks[0][1])
            for networks in pool.values()
        )
        for subset, found in zip(some, measured(test, validation, n_bins, answers), strict=True):
            known: dict[str, Any] = {
                "system": f"DE-{len(subset)}",
                "replicate": "+".join(map(str, subset)),
            }
            rows.append({**known, "parameters": sum(cast(int, sizes[i]) for i in subset), **found})
    for label, paths in students.items():
        for replicate, path in enumerate(paths):
            known = {"system": label, "replicate": str(replicate), "parameters": _parameters(path)}
            pairs = (read_prediction(path, split) for split in SPLITS)
            test, validation = (([prediction], labels) for prediction, labels in pairs)
            (found,) = measured(test, validation, n_bins, answers)
            rows.append({**known, **found})
    return _with_equivalents(pd.DataFrame(rows).astype({"parameters": "Int64"}))


def measured(
    test: Systems, val: Systems, n_bins: int, human: Array | None = None
) -> list[dict[str, float]]:
    """Every metric that needs no other system, of several systems.

    What is fitted is from the validation images: the temperature, and the thresholds of conformal
    sets.
    """
    alone = {key: metric for key, metric in METRICS.items() if not metric.equivalent_of}
    return judge(alone, *test, n_bins, fitted(*val), human)


def _with_equivalents(frame: pd.DataFrame) -> pd.DataFrame:
    is_ensemble = frame["system"].str.fullmatch(r"DE-\d+")
    for key, metric in METRICS.items():
        if not metric.equivalent_of:
            continue
        scores = frame[metric.equivalent_of]
        means = scores[is_ensemble].groupby(frame["system"], sort=False).mean()
        # An ensemble size's place on the curve is that of its mean score.
        placed, curve = frame["system"].map(means).fillna(scores), means.tolist()
        frame[key] = [metric.function(score, curve) for score in placed]
        frame[f"{key}_outside"] = [dee_outside(score, curve) for score in placed]
    return frame


def _parameters(path: str) -> int | None:
    """Of a network; None where logits alone are known."""
    return read_attributes(path).get("parameters")
