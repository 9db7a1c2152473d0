"""Diversity of the teachers by confidence, on train, perturbed train and test."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import ticker
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from ensdistill.calibration import confidence_bins
from ensdistill.drawing import (
    GREY,
    INK,
    SHADES,
    add_note,
    by_system,
    columns_for,
    grid_of_panels,
    label_outer,
    styled,
    two_digits,
    wrapped,
)
from ensdistill.hdf5 import open_hdf5
from ensdistill.predictions import Prediction, read_ensemble, read_mixture

TITLE = "Diversity of the teachers"
READS = {"perturbed": "logits/perturbed.h5", "ensemble": "logits/{ensemble}.h5"}
SETTINGS = ["n_bins"]

SHARES = LogNorm(1e-3, 1, clip=True)
"""Shade by share of images; fixed, so that figures compare."""


def table(perturbed: str, ensemble: Sequence[str], n_bins: int) -> pd.DataFrame:
    """`diversity_by_confidence` of the teachers: on train as it is and perturbed, and on test.

    Args:
        perturbed: the file that rule `perturbed` makes.
        ensemble: logits files of the teachers that teach.
        n_bins: of confidence.

    Returns:
        As `diversity_by_confidence`, and title, what the figure calls a name.
    """
    groups: list[tuple[str, str, Prediction]] = []
    with open_hdf5(perturbed) as file:
        titles = json.loads(file.attrs["titles"])
    for name, title in titles.items():
        groups.append((f"train_{name}", f"Train, {title}", read_mixture(perturbed, name)))
    groups.append(("test_clean", "Test, clean", read_ensemble(ensemble, "test")[0]))
    tables = [
        diversity_by_confidence(name, [group], n_bins).assign(title=title)
        for name, title, group in groups
    ]
    return pd.concat(tables, ignore_index=True)


def diversity_by_confidence(
    name: str, replicates: Sequence[Prediction], n_bins: int
) -> pd.DataFrame:
    """Diversity of members within bins of the ensemble's confidence [Nam et al. 2021, Fig. 3].

    Args:
        name: what the predictions are of.
        replicates: predictions that have a diversity; their images are pooled.
        n_bins: equal-width bins of max_k p̄_k.

    Returns:
        One row per bin: name, bin, low, high, count (images), kl (mean pairwise KL of the bin's
        images, in nats; 0 if it has none), and the same in every row mean_kl (of all images)
        and n (replicates).
    """
    found = [it.per_image(lambda it: (it.probs().max(1), it.diversity())) for it in replicates]
    confidence, divergence = (np.concatenate(part) for part in zip(*found, strict=True))
    bins = confidence_bins(confidence, n_bins)
    count = np.bincount(bins, minlength=n_bins)
    totals = np.bincount(bins, weights=divergence, minlength=n_bins)
    edges = np.arange(n_bins + 1) / n_bins
    columns = {"name": name, "bin": range(n_bins), "low": edges[:-1], "high": edges[1:]}
    columns |= {"count": count, "kl": totals / np.maximum(count, 1)}
    return pd.DataFrame(columns | {"mean_kl": divergence.mean(), "n": len(replicates)})


@styled
def draw(frame: pd.DataFrame) -> Figure:
    """Teachers' mean pairwise KL (nats) against confidence, on train, perturbed train and test.

    Nam et al. 2021, Fig. 3a.
    """
    return draw_bins(frame, "title")


def draw_bins(frame: pd.DataFrame, title: str) -> Figure:
    """A panel per name: bars of KL by bin, shaded by share of images; and everyone's mean KL.

    `title` is the column of what the panels are called.
    """
    groups = by_system(frame, "name")
    names = [group[title].iloc[0] for group in groups.values()]
    means = {name: group["mean_kl"].iloc[0] for name, group in groups.items()}
    images = {name: group["count"].sum() for name, group in groups.items()}
    subtitles = [f"KL {two_digits(means[name])}, n = {images[name]:,}" for name in groups]
    cols = columns_for(len(groups), 3)
    figure, panels = grid_of_panels(names, subtitles, cols, 1.6, beside=1)
    top = frame["kl"].max() or 1.0
    for axis, (name, group) in zip(panels, groups.items(), strict=True):
        group = group[group["count"] > 0]
        colour = SHADES(SHARES(group["count"] / images[name]))
        box: Any = {"x": group["low"], "width": group["high"] - group["low"], "align": "edge"}
        axis.bar(height=group["kl"], color=colour, edgecolor=INK, linewidth=0.4, **box)
        # A foot of fixed height: the bin with most images may have next to no diversity.
        axis.bar(height=0.06 * top, bottom=-0.09 * top, color=colour, **box)
        axis.set(xlim=(0, 1), ylim=(-0.1 * top, 1.05 * top), xticks=(0, 0.5, 1))
        axis.yaxis.set_major_locator(ticker.MaxNLocator(5, steps=[1, 2, 5, 10]))
    label_outer(panels, cols, "Ensemble confidence", "Pairwise KL (nats)")
    grid: Any = panels[0].get_gridspec()
    summary = figure.add_subplot(grid[:, -1], title="Overall mean")
    summary.barh(range(len(groups)), [*means.values()], height=0.5, color=GREY)
    for row, mean in enumerate(means.values()):
        summary.text(mean, row, f" {two_digits(mean)}", va="center")
    summary.set(xlim=(0, 1.35 * (max(means.values()) or 1)), xlabel="Pairwise KL (nats)")
    summary.set_yticks(range(len(groups)), [wrapped(name, 18) for name in names])
    summary.tick_params(axis="y", length=0)
    summary.invert_yaxis()
    summary.xaxis.set_major_locator(ticker.MaxNLocator(3, steps=[1, 2, 5, 10]))
    percent = ticker.FuncFormatter(lambda share, _: f"{100 * share:g} %")
    shade: Any = {"location": "bottom", "aspect": 50, "shrink": 0.8, "extend": "min"}
    bar = figure.colorbar(ScalarMappable(SHARES, SHADES), ax=panels, format=percent, **shade)
    bar.set_label("Share of images in the bin (shade of bar and foot)")
    bar.minorticks_off()
    replicates = frame["n"].max()
    pooled = f" Students: pooled over {replicates} seeds." if replicates > 1 else ""
    add_note(figure, f"KL: mean pairwise KL (nats) of all n images.{pooled}")
    return figure
