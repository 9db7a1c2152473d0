"""Whether ODS made from one teacher makes the others disagree."""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib import ticker
from matplotlib.figure import Figure

from ensdistill.bootstrap import image_weights
from ensdistill.drawing import (
    INK,
    PALE,
    WIDTH,
    add_legend,
    add_note,
    by_system,
    count_of,
    plain_numbers,
    styled,
)
from ensdistill.predictions import read_mixture, read_mixtures
from ensdistill.reports.sweep import divergence, mean_kl

TITLE = "ODS from one teacher, seen by others"
READS = {"transferred": "logits/transferred.h5"}
SETTINGS = ["members"]
DRAWN_FROM = ["metrics/transfer.csv", "metrics/directions.csv"]


def table(transferred: str, members: int) -> pd.DataFrame:
    """Diversity of the other teachers where ODS from one leads [Nam et al. 2021, Fig. 6].

    Args:
        transferred: the file that rule `transferred` makes.
        members: M; the first M networks of the pool are the ensemble.

    Returns:
        One row per source: source, where (`inside` or `outside` of the ensemble), mean pairwise
        KL in nats of the ensemble's members other than the source, on images as they are (clean)
        and at the source's ODS inputs (ods, ods_low, ods_high); own: the same with the source
        among them (NaN outside); n (images).
    """
    rows = []
    clean = read_mixture(transferred, "clean")
    weights = image_weights(clean.shape[0])
    for source, moved in enumerate(read_mixtures(transferred, "ods")):
        inside = source < members
        others = [member for member in range(members) if member != source]
        ods = mean_kl(divergence(moved, others), weights)
        rows.append(
            {
                "source": source,
                "where": "inside" if inside else "outside",
                "clean": divergence(clean, others).mean(),
                **{f"ods_{key}".replace("_kl", ""): ods[key] for key in ("kl", "low", "high")},
                "own": divergence(moved, slice(members)).mean() if inside else np.nan,
                "n": clean.shape[0],
            }
        )
    return pd.DataFrame(rows)


@styled
def draw(frame: pd.DataFrame, cosines: pd.DataFrame) -> Figure:
    """What ODS made from one teacher does to the others' KL (nats); and cosines of directions.

    Sources in the ensemble are left out of it; external ones never were in it. Nam et al. 2021,
    Fig. 6.
    """
    histograms = by_system(cosines, "name")
    figure = Figure(figsize=(WIDTH, max(3.4, 1 + 0.2 * len(frame))), layout="constrained")
    axes = figure.subplot_mosaic([["sources", name] for name in histograms], width_ratios=(1.3, 1))
    axis, inside = axes["sources"], frame["where"] == "inside"
    marks: dict[str, tuple[pd.Series, dict[str, Any]]] = {
        "clean": (frame["clean"], {"marker": "|", "mew": 1.2}),
        "ODS of a teacher of the ensemble": (frame["ods"].where(inside), {"marker": "o"}),
        "same, whole ensemble": (frame["own"], {"marker": "x", "ms": 3.5}),
        "ODS of an external teacher": (frame["ods"].mask(inside), {"marker": "o", "mfc": "white"}),
    }
    axis.hlines(frame.index, frame["clean"], frame["ods"], color=PALE, lw=0.8)
    axis.hlines(frame.index, frame["ods_low"], frame["ods_high"], color=INK, lw=0.8)
    for label, (kl, mark) in marks.items():
        if (kl > 0).any():
            style: dict[str, Any] = {"color": INK, "ls": "", "ms": 5}
            axis.plot(kl, frame.index, label=label, **style | mark)
    axis.set(xscale="log", xlabel="Pairwise KL of the ensemble's other teachers (nats)")
    axis.set_yticks(frame.index, [f"teacher {source}" for source in frame["source"]])
    axis.tick_params(axis="y", length=0)
    axis.set_ylim(len(frame) - 0.5, -0.5)
    plain_numbers(axis.xaxis)
    titles = {
        "inside": "Two teachers of the ensemble",
        "outside": "One of them and an external one",
        "random": "A teacher and a random direction",
    }
    for name, bins in histograms.items():
        density = bins["count"] / bins["count"].sum() / (bins["high"] - bins["low"])
        mean, axis = bins["mean"].iloc[0], axes[name]
        axis.stairs(density, [*bins["low"], bins["high"].iloc[-1]], fill=True, color=PALE)
        axis.axvline(mean, color=INK)
        axis.set(title=f"{titles[name]}: mean {mean:z.2f}", xlim=(-1, 1), ylabel="Density")
        axis.set_xticks((-1, -0.5, 0, 0.5, 1))
        axis.tick_params(labelbottom=False)
        axis.yaxis.set_major_locator(ticker.MaxNLocator(3, steps=[1, 2, 5, 10]))
    axis.tick_params(labelbottom=True)
    axis.set_xlabel("Cosine of two directions")
    add_legend(figure, axes["sources"].get_legend_handles_labels()[0])
    counts = ", ".join(f"{bins['n'].iloc[0]:,}" for bins in histograms.values())
    images = count_of(frame["n"], "training image")
    add_note(
        figure,
        f"Dots: mean and 95 % bootstrap interval over n = {images}. "
        f"Cosines: n = {counts} (pairs × images).",
    )
    return figure
