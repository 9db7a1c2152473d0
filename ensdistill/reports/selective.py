"""Selective prediction: how many errors are left if the least sure predictions are rejected."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from ensdistill.drawing import (
    INK,
    SHADES,
    WIDTH,
    add_legend,
    add_note,
    are_many,
    count_of,
    panels_by_system,
    replicates_of,
    styled,
    styles_of,
)
from ensdistill.metrics import METRICS
from ensdistill.selective import aurc, risks
from ensdistill.systems import Students, read_systems

TITLE = "Selective prediction"
READS = {"ensemble": "logits/{ensemble}.h5", "students": "logits/{students}.h5"}
CHOSEN = {"METRICS": ["aurc"]}

PERCENT = range(1, 101)
"""Coverages of the curve."""
SHOWN = [50, 70, 80, 90, 95, 100]
"""Coverages of a row of dots, in percent."""


def table(ensemble: Sequence[str], students: Students) -> pd.DataFrame:
    """Risk–coverage curves of every system on test images.

    Args:
        ensemble, students: logits files.

    Returns:
        One row per system, replicate and coverage of 1 … 100 %: system, replicate, coverage and
        risk (both in percent), and the same in every row of a replicate aurc and n (images). The
        images kept are the coverage of all, rounded up.
    """
    tables = []
    for system, replicates in read_systems(ensemble, students, "test", single=True):
        for replicate, (prediction, labels) in enumerate(replicates):
            pair = prediction.surest(labels)
            curve = 100 * risks(*pair)
            kept = [-(-percent * len(labels) // 100) for percent in PERCENT]
            known = {"system": system, "replicate": replicate, "coverage": PERCENT}
            known |= {"risk": curve[np.array(kept) - 1]}
            known |= {"aurc": aurc(*pair), "n": len(labels)}
            tables.append(pd.DataFrame(known))
    return pd.concat(tables, ignore_index=True)


@styled
def draw(frame: pd.DataFrame) -> Figure:
    """Error rate (%) against coverage (%) by system, and the area under that curve.

    Means over replicates, of the area with their standard deviation [Geifman & El-Yaniv 2017].
    """
    styles = styles_of(frame["system"].unique())
    if are_many(styles):
        return _draw_rows(frame)
    means = frame.groupby(["system", "coverage"], sort=False)["risk"].mean()
    figure = Figure(figsize=(WIDTH, 3.3 + 0.12 * (len(styles) // 4)), layout="constrained")
    curves, areas = figure.subplots(1, 2, width_ratios=(2, 1))
    for place, (name, style) in enumerate(styles.items()):
        dots = {"ms": 3, "lw": 1.1, "markevery": (place % 10, 10)}
        curves.plot(means[name].index, means[name], **style, **dots)
    curves.set(title="Errors among the surest images (%)", xlabel="Coverage (%)")
    curves.set(xlim=(0, 100), ylim=(0, None))
    _draw_areas(areas, frame, styles)
    areas.set(title=METRICS["aurc"].axis, ylim=(len(styles) - 0.5, -0.5), yticks=[])
    add_legend(
        figure, [Line2D([], [], **style, ms=4, lw=0.9, label=x) for x, style in styles.items()]
    )
    _add_note(figure, frame)
    return figure


def _draw_rows(frame: pd.DataFrame) -> Figure:
    """The same of many systems: a row for each, with a dot at each of a few coverages."""
    styles = styles_of(frame["system"].unique())
    titles = ["Errors among the surest images (%)", METRICS["aurc"].axis]
    figure, (curves, areas) = panels_by_system(styles, titles, 0.2, width_ratios=(2, 1))
    means = frame.groupby(["coverage", "system"])["risk"].mean()
    dot: Any = {"ls": "", "marker": "o", "ms": 4, "mec": INK, "mew": 0.3}
    shades = {percent: SHADES(place / 5) for place, percent in enumerate(SHOWN)}
    for percent, shade in shades.items():
        curves.plot(means[percent][list(styles)], range(len(styles)), color=shade, **dot)
    curves.set_xlim(left=0)
    _draw_areas(areas, frame, styles)
    labels = [f"the surest {percent} %" for percent in SHOWN[:-1]] + ["all images"]
    pairs = zip(shades.values(), labels, strict=True)
    add_legend(figure, [Line2D([], [], color=shade, label=label, **dot) for shade, label in pairs])
    _add_note(figure, frame)
    return figure


def _draw_areas(axis: Axes, frame: pd.DataFrame, styles: Mapping[str, Any]) -> None:
    """A dot for each system, with the spread over its replicates."""
    found = frame.drop_duplicates(["system", "replicate"]).groupby("system")["aurc"]
    means, spreads = found.mean(), found.std()
    for row, (name, style) in enumerate(styles.items()):
        error = None if np.isnan(spreads[name]) else spreads[name]
        dot = style | {"ls": "", "ms": 4, "elinewidth": 0.9}
        axis.errorbar(means[name], row, xerr=error, **dot)
    axis.xaxis.set_major_locator(MaxNLocator(4))


def _add_note(figure: Figure, frame: pd.DataFrame) -> None:
    images = count_of(frame["n"], "test image")
    add_note(
        figure,
        f"{images}. Mean over n = {replicates_of(frame)}; area: mean ± standard deviation.",
    )
