"""Reliability diagrams: accuracy against confidence, by bins of confidence."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from ensdistill.calibration import ece
from ensdistill.calibration import reliability as binned
from ensdistill.drawing import (
    PALE,
    add_legend,
    add_note,
    are_many,
    by_system,
    columns_for,
    count_of,
    dot_diameter,
    grid_of_panels,
    label_outer,
    legend_of_shares,
    rows_of_bins,
    styled,
    styles_of,
)
from ensdistill.metrics import METRICS
from ensdistill.systems import Students, read_systems

TITLE = "Reliability diagrams"
READS = {"ensemble": "logits/{ensemble}.h5", "students": "logits/{students}.h5"}
SETTINGS = ["n_bins"]
CHOSEN = {"METRICS": ["ece"]}


def table(ensemble: Sequence[str], students: Students, n_bins: int) -> pd.DataFrame:
    """Reliability diagrams on test images, counts pooled over replicates.

    Args:
        ensemble, students: logits files.
        n_bins: equal-width confidence bins.

    Returns:
        One row per system and bin: name, bin, low, high, count, confidence, accuracy (shares),
        and the same in every row of a system ece (mean over replicates) and n (replicates).
    """
    tables = []
    for label, replicates in read_systems(ensemble, students, "test"):
        pairs = [it.surest(labels) for it, labels in replicates]
        probs, labels = (np.concatenate(part) for part in zip(*pairs, strict=True))
        count, confidence, correct = binned(probs, labels, n_bins)
        edges = np.arange(n_bins + 1) / n_bins
        bins: dict[str, Any] = {"name": label, "bin": range(n_bins)}
        bins |= {"low": edges[:-1], "high": edges[1:]}
        bins |= {"count": count, "confidence": confidence, "accuracy": correct}
        bins |= {"ece": np.mean([ece(*pair, n_bins) for pair in pairs]), "n": len(pairs)}
        tables.append(pd.DataFrame(bins))
    return pd.concat(tables, ignore_index=True)


@styled
def draw(frame: pd.DataFrame) -> Figure:
    """Accuracy against mean confidence (both shares) by confidence bin on test, by system.

    Stems are the gaps to perfect calibration, the diagonal. Counts are pooled over student seeds.
    """
    groups = by_system(frame, "name")
    if are_many(groups):
        return _draw_rows(groups)
    styles, cols = styles_of(groups), columns_for(len(groups), 4)
    firsts = [group.iloc[0] for group in groups.values()]
    subtitles = [f"ECE {first['ece']:.3f}, n = {first['n']}" for first in firsts]
    figure, axes = grid_of_panels(groups, subtitles, cols, 1.7, layout="compressed")
    for axis, (name, group) in zip(axes, groups.items(), strict=True):
        share = group["count"] / group["count"].sum()
        style: Any = {"color": styles[name]["color"]}
        group, share = group[share > 0], share[share > 0]
        stem: Any = {"lw": 0.8, "clip_on": False}
        dot: Any = {"edgecolor": "white", "lw": 0.4}
        axis.plot([0, 1], [0, 1], color=PALE, lw=0.8, zorder=0)
        axis.vlines(group["confidence"], group["confidence"], group["accuracy"], **style, **stem)
        dot |= {"s": dot_diameter(share) ** 2, "clip_on": False, "zorder": 3}
        axis.scatter(group["confidence"], group["accuracy"], **style, **dot)
        axis.set(xlim=(0, 1), ylim=(0, 1), xticks=(0, 0.5, 1), yticks=(0, 0.5, 1), aspect="equal")
    label_outer(axes, cols, "Mean confidence", "Accuracy")
    add_legend(figure, legend_of_shares())
    _add_note(figure, groups, "Above the diagonal: underconfident; below: overconfident.")
    return figure


def _draw_rows(groups: dict[str, pd.DataFrame]) -> Figure:
    """The same of many systems: a row for each, the gap as a colour."""
    gaps = {
        name: group.assign(gap=group["accuracy"] - group["confidence"])
        for name, group in groups.items()
    }
    titles = "Accuracy − mean confidence, by bin", METRICS["ece"].axis
    colours = {"norm": Normalize(-0.2, 0.2), "cmap": "RdBu"}
    figure = rows_of_bins(gaps, titles, "confidence", "gap", "ece", **colours)
    _add_note(figure, groups, "Red: overconfident; blue: underconfident.")
    return figure


def _add_note(figure: Figure, groups: dict[str, pd.DataFrame], explained: str) -> None:
    images = [group["count"].sum() // group["n"].iloc[0] for group in groups.values()]
    pooled = f"{count_of(images, 'test image')}, pooled over n seeds; empty bins are left out."
    add_note(figure, f"{pooled} {explained}")
