"""Every system on corrupted copies of test images."""

from collections.abc import Sequence
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ensdistill.drawing import (
    INK,
    SHADES,
    WIDTH,
    add_legend,
    add_note,
    are_many,
    count_of,
    panels_by_system,
    plain_numbers,
    replicates_of,
    styled,
    styles_of,
)
from ensdistill.metrics import METRICS, judge
from ensdistill.predictions import splits_of
from ensdistill.systems import Students, read_systems

TITLE = "Corrupted images"
READS = {
    "ensemble": "logits/shifted/{ensemble}.h5",
    "students": "logits/shifted/{students}.h5",
}
SETTINGS = ["n_bins"]
CHOSEN = {"METRICS": ["acc", "nll", "ece", "bs", "entropy", "diversity"]}


def table(ensemble: Sequence[str], students: Students, n_bins: int) -> pd.DataFrame:
    """Metrics of every system on corrupted copies of test images.

    Args:
        ensemble, students: files of rule `shifted_logits`.
        n_bins: of the calibration error.

    Returns:
        One row per system, replicate and corrupted set: system, replicate, kind, severity (0: the
        same images as they are), the metrics of `CHOSEN`, n (images).
    """
    rows, metrics = [], {key: METRICS[key] for key in CHOSEN["METRICS"]}
    for split in splits_of(ensemble[0]):
        group, *rest = split.split("/")
        if group != "corrupted":
            continue
        corrupted = {"kind": rest[0], "severity": int(rest[1])}
        for system, replicates in read_systems(ensemble, students, split, single=True):
            for replicate, (prediction, labels) in enumerate(replicates):
                (found,) = judge(metrics, [prediction], labels, n_bins)
                known = {"system": system, "replicate": replicate, **corrupted}
                rows.append({**known, **found, "n": len(labels)})
    return pd.DataFrame(rows)


@styled
def draw(frame: pd.DataFrame) -> Figure:
    """Accuracy (%), NLL (nats) and ECE over kinds of corruption, by severity and system.

    After Ovadia et al. 2019. Boxes are of the kinds' means over replicates.
    """
    panels = CHOSEN["METRICS"][:3]
    styles = styles_of(frame["system"].unique())
    if are_many(styles):
        return _draw_rows(frame)
    for style in styles.values():
        if style["ls"] != "-":  # boxes have no line style to tell a colour's second method by
            style["mfc"] = "white"
    means = frame.groupby(["system", "severity", "kind"])[panels].mean()
    width = 0.84 / len(styles)
    figure = Figure(figsize=(WIDTH, 5.2 + 0.12 * (len(styles) // 4)), layout="constrained")
    axes = figure.subplots(3, 1, sharex=True)
    for axis, key in zip(axes, panels, strict=True):
        for place, (name, style) in enumerate(styles.items()):
            shift = width * (place - (len(styles) - 1) / 2)
            own: Any = means.loc[name, key]
            groups = dict(list(own.groupby("severity")))
            axis.plot(shift, groups.pop(0), **style | {"ls": ""}, ms=4)
            line = {"color": style["color"], "lw": 0.6}
            median = {"color": style["color"] if style["mfc"] == "white" else "white"}
            axis.boxplot(
                groups.values(),
                positions=[severity + shift for severity in groups],
                widths=0.8 * width,
                whis=(0, 100),
                patch_artist=True,
                manage_ticks=False,
                showcaps=False,
                boxprops={"edgecolor": style["color"], "facecolor": style["mfc"], "lw": 0.6},
                whiskerprops=line,
                medianprops=median,
            )
        axis.set(title=METRICS[key].axis, xlim=(-0.5, 5.5))
    axes[1].set_yscale("log")
    plain_numbers(axes[1].yaxis)
    axes[-1].set_xlabel("Severity of the corruption (0: the same images as they are)")
    add_legend(
        figure, [Line2D([], [], **style, ms=4, lw=0.9, label=x) for x, style in styles.items()]
    )
    _add_note(figure, frame, "Median, quartiles and range")
    return figure


def _draw_rows(frame: pd.DataFrame) -> Figure:
    """The same of many systems: a row for each, and of the kinds their mean alone."""
    panels, systems = CHOSEN["METRICS"][:3], frame["system"].unique()
    kinds = frame.groupby(["system", "severity", "kind"])[panels].mean()
    means = kinds.groupby(["severity", "system"]).mean()
    figure, axes = panels_by_system(systems, [METRICS[key].axis for key in panels], 0.2)
    index: Any = means.index
    shades = {severity: SHADES(severity / 5) for severity in index.levels[0]}
    dot: Any = {"ls": "", "marker": "o", "ms": 4, "mec": INK, "mew": 0.3}
    for axis, key in zip(axes, panels, strict=True):
        for severity, shade in shades.items():
            own: Any = means.loc[severity, key]
            axis.plot(own[systems], range(len(systems)), color=shade, **dot)
    axes[1].set_xscale("log")
    plain_numbers(axes[1].xaxis)
    labels = {x: f"severity {x}" if x else "the same images as they are" for x in shades}
    add_legend(figure, [Line2D([], [], color=shades[x], label=labels[x], **dot) for x in shades])
    _add_note(figure, frame, "Mean")
    return figure


def _add_note(figure: Figure, frame: pd.DataFrame, shown: str) -> None:
    kinds = frame["kind"][frame["severity"] > 0].nunique()
    images = count_of(frame["n"], "image")
    add_note(
        figure,
        f"{shown} over n = {kinds} kinds ({images} each) of the mean over "
        f"n = {replicates_of(frame)}.",
    )
