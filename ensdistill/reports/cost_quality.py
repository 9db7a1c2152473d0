"""Every system's quality against what a prediction costs: the figure that the bench is for."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray

from ensdistill.drawing import (
    ENSEMBLE,
    INK,
    PALE,
    WIDTH,
    add_note,
    count_of,
    family_of,
    plain_numbers,
    styled,
    styles_of,
)
from ensdistill.metrics import METRICS

TITLE = "Quality against cost"
DRAWN_FROM = ["tables/results.csv", "metrics/corruptions.csv"]
CHOSEN = {"METRICS": ["nll", "dee"]}

COLUMNS = {
    "ms_128": "ms per image (batch 128)",
    "macs": "Multiply–adds per image",
    "parameters": "Parameters",
}
ALL_NAMED = 20
"""Students up to which each has its name; of more, the best of each family and those on a front."""

FRONT = "#F5D76E"
LINE_HEIGHT, LABELS_WIDTH = 0.118, 1.72
"""Of the names beside a row of panels, in inches."""


def pareto_front(costs: ArrayLike, losses: ArrayLike) -> NDArray[np.bool_]:
    """Which systems no other one beats: as good at less cost, or better at the same.

    Args:
        costs, losses: (systems,); less is better. NaN is on no front.
    """
    costs, losses = np.asarray(costs, float), np.asarray(losses, float)
    no_worse = (costs <= costs[:, None]) & (losses <= losses[:, None])
    better = (costs < costs[:, None]) | (losses < losses[:, None])
    return ~(no_worse & better).any(1) & ~np.isnan(costs + losses)


@styled
def draw(frame: pd.DataFrame, shifted: pd.DataFrame) -> Figure:
    """NLL, DEE and NLL on corrupted images against time, multiply–adds and parameters.

    Means over replicates. The deep ensembles are a line, the Pareto front of each panel another.

    Args:
        frame: tables/results.csv.
        shifted: metrics/corruptions.csv; of it the mean over all corrupted copies.
    """
    corrupted = shifted[shifted["severity"] > 0].groupby("system")["nll"].mean()
    known = frame[[*COLUMNS]].notna().all(axis=1)
    systems = frame[known].set_index("system").assign(shift=corrupted)
    rows = {
        "nll": (METRICS["nll"].axis, METRICS["nll"].better),
        "dee": (METRICS["dee"].axis, METRICS["dee"].better),
        "shift": (f"Corrupted: {METRICS['nll'].axis}", METRICS["nll"].better),
    }
    students = [name for name in systems.index if not ENSEMBLE.fullmatch(name)]
    many = len(students) > ALL_NAMED
    named = {
        key: _named(systems.loc[students], systems, key, better) if many else students
        for key, (_, better) in rows.items()
    }
    height = max(1.6, LINE_HEIGHT * (1 + max(map(len, named.values()))))
    figure = Figure(figsize=(WIDTH, total := 3 * (height + 0.12) + 0.85))
    grid = figure.add_gridspec(
        3,
        4,
        left=0.5 / WIDTH,
        right=0.995,
        bottom=0.65 / total,
        top=1 - 0.2 / total,
        wspace=0.06,
        hspace=0.12 / height,
        width_ratios=[*[(WIDTH - LABELS_WIDTH - 0.5) / 3] * 3, LABELS_WIDTH],
    )
    styles = styles_of(systems.index)
    for place, (key, (title, better)) in enumerate(rows.items()):
        axes = [figure.add_subplot(grid[place, column]) for column in range(4)]
        for axis, cost in zip(axes, COLUMNS, strict=False):
            _draw_panel(axis, systems[cost], systems[key], better, styles, named[key])
            axis.tick_params(labelleft=cost == "ms_128", labelbottom=key == "shift")
            if key == "nll":
                axis.set_title(COLUMNS[cost], fontsize=7)
        axes[0].set_ylabel(title)
        _share_heights(axes[:3], logarithmic=key != "dee")
        _name(axes[3], axes[0], systems.loc[named[key], key], styles, height)
    _add_note(figure, frame[known], shifted, many, frame["system"][~known])
    return figure


def _named(students: pd.DataFrame, systems: pd.DataFrame, key: str, better: int) -> list[str]:
    """The best student of each family, and those on a front of the row."""
    chosen = {*(-better * students[key].dropna()).groupby(family_of).idxmin()}
    for cost in COLUMNS:
        chosen.update(systems.index[pareto_front(systems[cost], -better * systems[key])])
    return [name for name in students.index if name in chosen]


def _draw_panel(
    axis: Axes,
    costs: pd.Series,
    values: pd.Series,
    better: int,
    styles: dict[str, dict[str, Any]],
    named: Sequence[str],
) -> None:
    axis.set_xscale("log")
    on_front = pareto_front(costs, -better * values)
    corners = pd.DataFrame({"x": costs, "y": values})[on_front].sort_values(["x", "y"])
    far = 2 * costs.max()
    x, y = [*corners["x"], far], [*corners["y"], corners["y"].iloc[-1]]
    axis.plot(x, y, color=FRONT, lw=3, drawstyle="steps-post", solid_capstyle="butt", zorder=1)
    for name in costs.index[~costs.index.str.fullmatch(ENSEMBLE)]:
        style = styles[name] | {"ls": "", "clip_on": False, "zorder": 3}
        small = {"marker": "o", "mec": "none", "ms": 2.8, "alpha": 0.4, "zorder": 2}
        axis.plot(costs[name], values[name], **style | ({"ms": 4.2} if name in named else small))
    ensembles = costs.index.str.fullmatch(ENSEMBLE) & values.notna()
    axis.plot(costs[ensembles], values[ensembles], color=INK, lw=1, zorder=2.5)
    for name in costs.index[ensembles]:
        at = costs[name], values[name]
        axis.plot(*at, **styles[name] | {"ls": ""}, ms=3.5, zorder=4)
        text = name if name == "DE-1" else name.removeprefix("DE-")
        axis.annotate(text, at, (2.5, 2.5), textcoords="offset points", fontsize=6.5, zorder=5)
    axis.set_xlim(costs.min() / 1.4, costs.max() * 1.4)
    plain_numbers(axis.xaxis)
    if costs.max() > 10 * costs.min():  # a number per decade can be one in all
        axis.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 3)))
    if costs.name != "ms_128":
        axis.xaxis.set_major_formatter(ticker.EngFormatter(sep=""))
    axis.grid(color=PALE, lw=0.3)
    axis.set_axisbelow(True)


def _share_heights(axes: Sequence[Axes], logarithmic: bool) -> None:
    """One scale for a row of panels, with room for dots at its ends."""
    for axis in axes:
        axis.set_yscale("log" if logarithmic else "linear")
    low, high = axes[0].get_ylim()
    for axis in axes:
        axis.set_ylim(low, high)
        if logarithmic:
            plain_numbers(axis.yaxis)
        else:
            axis.yaxis.set_major_locator(ticker.MaxNLocator(6, integer=True))


def _name(
    beside: Axes, panel: Axes, values: pd.Series, styles: dict[str, dict[str, Any]], height: float
) -> None:
    """Names at the heights of their dots, spread so that they do not overlap."""
    beside.set(xlim=(0, LABELS_WIDTH), ylim=(0, 1))
    beside.axis("off")
    values = values.dropna()
    places = (panel.transScale + panel.transLimits).transform([(1, it) for it in values])[:, 1]
    spread = spread_out(places, LINE_HEIGHT / height)
    for name, place, at in zip(values.index, places, spread, strict=True):
        style = styles[name]
        beside.plot([0, 0.03, 0.2], [place, place, at], color=style["color"], lw=0.4, alpha=0.7)
        beside.plot(0.27, at, **style | {"ls": ""}, ms=4.2, clip_on=False)
        text = name if len(name) <= 26 else f"{name[:25]}…"
        beside.text(0.36, at, text, va="center_baseline", fontsize=6.5)


def spread_out(places: ArrayLike, gap: float) -> NDArray[np.float64]:
    """The places in [0, 1] nearest to the given ones that are at least a gap apart, in their order.

    Nearest by the sum of squares. Gaps that are too many to fit run over 0.
    """
    from scipy.optimize import isotonic_regression

    places = np.asarray(places, dtype=float)
    order = np.argsort(places, kind="stable")
    steps = gap * np.arange(len(places))
    free = isotonic_regression(places[order] - steps).x
    spread = np.empty_like(places)
    spread[order] = np.clip(free, min(0, 1 - steps[-1]), 1 - steps[-1]) + steps
    return spread


def _add_note(
    figure: Figure,
    frame: pd.DataFrame,
    shifted: pd.DataFrame,
    chosen: bool,
    without: Sequence[str] | pd.Series,
) -> None:
    students = frame[~frame["system"].str.fullmatch(ENSEMBLE)]
    seeds = f"n = {count_of(students['n'], 'seed')} (students)" if len(students) else "subsets"
    copies = shifted[shifted["severity"] > 0].groupby(["kind", "severity"]).ngroups
    names = "Named: the best of each family, and all on a front. " if chosen else ""
    left_out = (
        f" Not here, as their costs are unknown: {', '.join(without)}." if len(without) else ""
    )
    add_note(
        figure,
        f"Black: deep ensembles by size. Yellow: the Pareto front. {names}"
        f"Means over {seeds}, and in the lowest row over {copies} corrupted sets of test images."
        f"{left_out}",
    )
