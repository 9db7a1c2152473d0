"""How nearly one-hot the teachers are on train and on test."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import ticker
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from ensdistill.drawing import (
    PALE,
    SPLITS,
    WIDTH,
    add_legend,
    add_note,
    plain_numbers,
    styled,
)
from ensdistill.hdf5 import open_hdf5
from ensdistill.predictions import (
    Array,
    Labels,
    Mixture,
    Prediction,
    read_mixture,
    read_prediction,
)

TITLE = "Confidence of the teachers on train and test"
READS = {"perturbed": "logits/perturbed.h5", "ensemble": "logits/{ensemble}.h5"}

DOUBTS = np.logspace(-6, 0, 25)
"""Thresholds on 1 − confidence at which images are counted."""


def table(perturbed: str, ensemble: Sequence[str]) -> pd.DataFrame:
    """How nearly one-hot each teacher is on train and on test.

    Returns:
        One row per split, teacher and threshold `doubt`: share (of images whose largest
        probability is at least 1 − doubt), and the same in all of a split and teacher:
        confidence (its mean), accuracy [%], n (images).
    """
    with open_hdf5(perturbed) as file:
        labels = file["labels"][:]
    together = read_mixture(perturbed, "clean")
    train = together.per_image(
        lambda it, labels: [
            _values(Mixture(it.logits[:, [teacher]]), labels) for teacher in range(it.shape[1])
        ],
        labels,
    )
    test = [read_prediction(path, "test") for path in ensemble]
    test = [prediction.per_image(_values, labels) for prediction, labels in test]
    tables = []
    for split, teachers in {"train": train, "test": test}.items():
        for teacher, (doubt, confidence, correct) in enumerate(teachers):
            table = pd.DataFrame({"split": split, "teacher": teacher, "doubt": DOUBTS})
            table["share"] = (doubt[:, None] <= DOUBTS).mean(0)
            table["confidence"] = confidence.mean()
            table["accuracy"] = 100 * float(correct.mean())
            table["n"] = len(correct)
            tables.append(table)
    return pd.concat(tables, ignore_index=True)


def _values(prediction: Prediction, labels: Labels) -> tuple[Array, Array, NDArray[np.bool_]]:
    """Doubt, confidence, and whether the most probable class is right, (N,) each."""
    probs = prediction.probs()
    return prediction.doubt(), probs.max(1), probs.argmax(1) == labels


@styled
def draw(frame: pd.DataFrame) -> Figure:
    """How near to one-hot the teachers are (all in %): images by doubt, accuracy by confidence.

    On train, where their accuracy is nearly 100 %, they say little but the label.
    """
    figure = Figure(figsize=(WIDTH, 2.8), layout="constrained")
    doubts, calibration = figure.subplots(1, 2, width_ratios=(1.6, 1))
    dot: dict[str, Any] = {"marker": "o", "ms": 5, "mec": "white", "mew": 0.4}
    for (split, _), teacher in frame.groupby(["split", "teacher"], sort=False):
        style, first = {"color": SPLITS[str(split)]}, teacher.iloc[0]
        doubts.plot(100 * teacher["doubt"], 100 * teacher["share"], lw=0.8, **style)
        place = 100 * first["confidence"], first["accuracy"]
        calibration.plot(*place, clip_on=False, **dot, **style)
    doubts.set(xscale="log", xlim=(1e-4, 100), ylim=(0, 100), xlabel="Doubt: 1 − confidence (%)")
    doubts.set_title("Images with at most this doubt (%)")
    plain_numbers(doubts.xaxis)
    low = min(100 * frame["confidence"].min(), frame["accuracy"].min(), 99)
    ends = (low - 0.08 * (100 - low), 100)
    calibration.plot(ends, ends, color=PALE, lw=0.8, zorder=0)
    calibration.set(xlim=ends, ylim=ends, title="Accuracy (%)", xlabel="Mean confidence (%)")
    calibration.set_box_aspect(1)
    for scale in (calibration.xaxis, calibration.yaxis):
        scale.set_major_locator(ticker.MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
    add_legend(figure, [Line2D([], [], color=SPLITS[x], label=x, **dot) for x in SPLITS])
    counts = frame.groupby("split", sort=False)["n"].first()
    images = " and ".join(f"{n:,} {split}" for split, n in counts.items())
    add_note(
        figure,
        f"A line and a dot per teacher (n = {frame['teacher'].nunique()}); {images} images. "
        "Diagonal: calibrated; below: overconfident.",
    )
    return figure
