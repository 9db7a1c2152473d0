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
    are_many,
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
SETTINGS = ["sets"]


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
    "energy": Uncertainty(lambda it: it.energy(), "s", "energy"),
    "max_logit": Uncertainty(lambda it: it.max_logit(), "v", "− largest logit"),
}


def table(
    ensemble: Sequence[str],
    students: Students,
    shifted_ensemble: Sequence[str],
    shifted_students: Students,
    sets: Sequence[str],
) -> pd.DataFrame:
    """How well uncertainty tells out-of-distribution images from test images.

    Args:
        ensemble, students: logits files.
        shifted_ensemble, shifted_students: their files of rule `shifted_logits`.
        sets: names of the sets of out-of-distribution images.

    Returns:
        One row per system, replicate, score and set of `UNCERTAINTIES` that the system has: system,
        replicate, score, set, the metrics of `DETECTION`, n_in, n_out (images). Mutual information
        needs members or a distribution over predictions, which most single networks lack. Students
        without logits on shifted images are left out.
    """
    rows, students = [], {label: students[label] for label in shifted_students}
    inside = read_systems(ensemble, students, "test", single=True)
    outside = [
        read_systems(shifted_ensemble, shifted_students, f"out_of_distribution/{name}", single=True)
        for name in sets
    ]
    for (system, replicates), *others in zip(inside, *outside, strict=True):
        together = zip(replicates, *(other for _, other in others), strict=True)
        for replicate, ((own, labels), *found) in enumerate(together):
            known = {"system": system, "replicate": replicate}
            of_own, of_others = _scores(own), [_scores(other) for other, _ in found]
            for score in UNCERTAINTIES:
                if of_own[score] is None:
                    continue
                for name, theirs, (_, unknown) in zip(sets, of_others, found, strict=True):
                    pair = of_own[score], theirs[score]
                    measured = {key: it.function(*pair) for key, it in DETECTION.items()}
                    images = {"n_in": len(labels), "n_out": len(unknown)}
                    rows.append({**known, "score": score, "set": name, **measured, **images})
    return pd.DataFrame(rows)


def _scores(prediction: Prediction) -> dict[str, Array | None]:
    """All uncertainties, (N,) each; None for what the prediction does not have."""
    found = prediction.per_image(lambda it: [score.of(it) for score in UNCERTAINTIES.values()])
    return dict(zip(UNCERTAINTIES, found, strict=True))


@styled
def draw(frame: pd.DataFrame) -> Figure:
    """How well uncertainty tells images of other things from test images, by system and score.

    The other images are the positives [Hendrycks et al. 2019]. Of one set all metrics of
    `DETECTION`, of several AUROC.
    """
    styles, sets = styles_of(frame["system"].unique()), frame["set"].unique()
    many = are_many(styles)
    if len(sets) == 1:
        panels = [(frame, key, metric.axis) for key, metric in DETECTION.items()]
    else:
        panels = [
            (frame[frame["set"] == name], "auroc", f"{DETECTION['auroc'].title}, {name}")
            for name in sets
        ]
    figure, axes = panels_by_system(styles, [title for *_, title in panels], 0.42)
    shifts = np.linspace(-0.34, 0.34, len(UNCERTAINTIES))
    for axis, (part, key, _) in zip(axes, panels, strict=True):
        groups = part.groupby(["system", "score"])[key]
        means, spreads = groups.mean(), groups.std()
        for row, (name, style) in enumerate(styles.items()):
            for shift, (score, uncertainty) in zip(shifts, UNCERTAINTIES.items(), strict=True):
                if (name, score) in means.index:
                    spread = spreads[name, score]
                    dot = style | {"ls": "", "marker": uncertainty.marker, "elinewidth": 0.8}
                    dot |= {"ms": 2.4 if many else 3.6, "mew": 0.6}
                    error = None if np.isnan(spread) else spread
                    axis.errorbar(means[name, score], row + shift, xerr=error, **dot)
    dot = {"ls": "", "color": GREY, "ms": 4}
    add_legend(
        figure,
        [Line2D([], [], marker=it.marker, label=it.label, **dot) for it in UNCERTAINTIES.values()],
    )
    add_note(
        figure,
        f"Mean ± standard deviation over n = {replicates_of(frame)}; "
        f"{frame['n_in'].iloc[0]:,} test images, {_others(frame)}",
    )
    return figure


def _others(frame: pd.DataFrame) -> str:
    """How many other images there are, and what guessing would give."""
    inside, outside = frame["n_in"].iloc[0], frame.groupby("set", sort=False)["n_out"].first()
    if len(outside) > 1:
        counts = ", ".join(f"{count:,} of {name}" for name, count in outside.items())
        return f"others: {counts}. AUROC: higher is better, by chance 0.50."
    (count,) = outside
    share = count / (inside + count)
    return f"{count:,} others. By chance: AUROC 0.50, AUPR {share:.2f}, FPR95 0.95."
