"""All metrics of every system: the numbers of the results table (see `ensdistill.tables`)."""

from collections.abc import Sequence

import pandas as pd

from ensdistill.calibration import optimal_temperature
from ensdistill.human import read_answers
from ensdistill.metrics import METRICS, Judged, dee_outside
from ensdistill.predictions import (
    Array,
    Labels,
    Prediction,
    join,
    read_attributes,
    read_prediction,
)
from ensdistill.systems import Students, subsets

READS = {
    "teachers": "logits/{pool}.h5",
    "students": "logits/{students}.h5",
    "human": "{human}",
}
SETTINGS = ["n_bins"]

Pair = tuple[Prediction, Labels]


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
    networks = [(read_prediction(path, "test"), read_prediction(path, "val")) for path in teachers]
    sizes = [_parameters(path) for path in teachers]
    classes = networks[0][0][0].logits.shape[2]
    answers = read_answers(human[0], networks[0][0][1], classes) if human else None
    for size in range(1, len(teachers) + 1):
        for subset in subsets(len(teachers), size):
            test, val = (
                (join([networks[i][split][0] for i in subset]), networks[0][split][1])
                for split in (0, 1)
            )
            known = {"system": f"DE-{size}", "replicate": "+".join(map(str, subset))}
            parameters = sum(sizes[i] for i in subset)
            rows.append({**known, "parameters": parameters, **measured(test, val, n_bins, answers)})
    for label, paths in students.items():
        for replicate, path in enumerate(paths):
            known = {"system": label, "replicate": str(replicate), "parameters": _parameters(path)}
            pairs = read_prediction(path, "test"), read_prediction(path, "val")
            rows.append({**known, **measured(*pairs, n_bins, answers)})
    return _with_equivalents(pd.DataFrame(rows).astype({"parameters": "Int64"}))


def measured(test: Pair, val: Pair, n_bins: int, human: Array | None = None) -> dict[str, float]:
    """Every metric that needs no other system.

    What is fitted is from the validation images: the temperature, and the thresholds of conformal
    sets.
    """
    validation = val[0].probs(), val[1]
    judged = Judged(*test, n_bins, optimal_temperature(*validation), validation, human)
    return {
        key: metric.function(judged) for key, metric in METRICS.items() if not metric.equivalent_of
    }


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
