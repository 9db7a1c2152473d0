"""Detection of images of other things by uncertainty."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ensdistill.drawing import (
    GREY,
    add_legend,
    add_note,
    panels_by_system,
    replicates_of,
    styled,
    styles_of,
)
from ensdistill.metrics import DETECTION
from ensdistill.predictions import Array, Prediction
from ensdistill.systems import Students, read_systems

TITLE = "Out-of-distribution detection"
READS = {
    "ensemble": "logits/{ensemble}.h5",
    "students": "logits/{students}.h5",
    "shifted_ensemble": "logits/shifted/{ensemble}.h5",
    "shifted_students": "logits/shifted/{students}.h5",
}


class Uncertainty(NamedTuple):
    """A score (N,) that should be higher for images from outside the distribution."""

    of: Callable[[Prediction], Array | None]
    marker: str
    label: str


UNCERTAINTIES = {
    "max_probability": Uncertainty(lambda it: it.doubt(), "o", "1 − confidence"),
    "entropy": Uncertainty(lambda it: it.entropy(), "D", "entropy"),
    "mutual_information": Uncertainty(
        lambda it: it.mutual_information(), "^", "mutual information"
    ),
}


def table(
    ensemble: Sequence[str],
    students: Students,
    shifted_ensemble: Sequence[str],
    shifted_students: Students,
) -> pd.DataFrame:
    """How well uncertainty tells out-of-distribution images from test images.

    Args:
        ensemble, students: logits files.
        shifted_ensemble, shifted_students: their files of rule `shifted_logits`.

    Returns:
        One row per system, replicate and score of `UNCERTAINTIES` that the system has: system,
        replicate, score, the metrics of `DETECTION`, n_in, n_out (images). Mutual information
        needs members or a distribution over predictions, which most single networks lack.
    """
    rows = []
    inside = read_systems(ensemble, students, "test", single=True)
    outside = read_systems(shifted_ensemble, shifted_students, "out_of_distribution", single=True)
    for system, replicates in inside.items():
        pairs = zip(replicates, outside[system], strict=True)
        for replicate, ((own, labels), (other, others)) in enumerate(pairs):
            images = {"n_in": len(labels), "n_out": len(others)}
            for name, uncertainty in UNCERTAINTIES.items():
                scores = uncertainty.of(own), uncertainty.of(other)
                if scores[0] is None:
                    continue
                found = {key: metric.function(*scores) for key, metric in DETECTION.items()}
                known = {"system": system, "replicate": replicate, "score": name}
                rows.append({**known, **found, **images})
    return pd.DataFrame(rows)


@styled
def draw(frame: pd.DataFrame) -> Figure:
    """How well uncertainty tells images of other things from test images, by system and score.

    The other images are the positives [Hendrycks et al. 2019].
    """
    styles = styles_of(frame["system"].unique())
    titles = [metric.axis for metric in DETECTION.values()]
    figure, axes = panels_by_system(styles, titles, 0.34)
    for axis, key in zip(axes, DETECTION, strict=True):
        for row, (name, style) in enumerate(styles.items()):
            shifts = np.linspace(-0.26, 0.26, len(UNCERTAINTIES))
            for shift, (score, uncertainty) in zip(shifts, UNCERTAINTIES.items(), strict=True):
                values = frame[key][(frame["system"] == name) & (frame["score"] == score)]
                if len(values):
                    error = values.std() if len(values) > 1 else None
                    dot = style | {"ls": "", "marker": uncertainty.marker, "ms": 4}
                    dot["elinewidth"] = 0.9
                    axis.errorbar(values.mean(), row + shift, xerr=error, **dot)
    dot = {"ls": "", "color": GREY, "ms": 4}
    add_legend(
        figure,
        [Line2D([], [], marker=it.marker, label=it.label, **dot) for it in UNCERTAINTIES.values()],
    )
    inside, outside = frame["n_in"].iloc[0], frame["n_out"].iloc[0]
    add_note(
        figure,
        f"Mean ± standard deviation over n = {replicates_of(frame)}; {inside:,} test images, "
        f"{outside:,} others. By chance: AUROC 0.50, AUPR {outside / (inside + outside):.2f}, "
        "FPR95 0.95.",
    )
    return figure
