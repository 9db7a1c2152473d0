"""The figures, each a function of its own name from its input files; `save` writes them.

Deep ensembles and teachers are black. A student method has the same colour and marker in every
figure of a study, by its place among the study's methods.
"""

import json
import os
import re
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ensdistill.metrics import pairwise_kl
from ensdistill.provenance import atomic, open_hdf5

WIDTH = 6.8
"""Two columns of a paper, in inches; at this size no text is smaller than 7 points."""

INK, GREY, PALE = "#222222", "#666666", "#d0d0d0"

TICKS = {"labelsize": 7, "major.size": 2.5, "major.width": 0.6}
STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",  # comes with matplotlib, so every machine draws the same
    "font.size": 7,
    "text.color": INK,
    "text.parse_math": False,  # labels are the user's, and may hold a $
    "axes.titlesize": 7.5,
    "axes.titlelocation": "left",
    "axes.titlepad": 4,
    "axes.labelsize": 7,
    "axes.labelpad": 2,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    **{f"{x}tick.{key}": value for x in "xy" for key, value in TICKS.items()},
    "legend.fontsize": 7,
    "legend.frameon": False,
    "lines.linewidth": 1.0,
    "figure.constrained_layout.w_pad": 0.05,
    "figure.constrained_layout.h_pad": 0.05,
    "pdf.fonttype": 42,
}
styled = matplotlib.rc_context(STYLE)

# Okabe and Ito's palette without black, the ensembles', and yellow, which is too light for lines.
COLOURS = ["#56B4E9", "#CC79A7", "#009E73", "#E69F00", "#0072B2", "#D55E00"]
MARKERS = "svD^PX<pd>h"
SHARES = LogNorm(1e-3, 1, clip=True)
"""Shade by share of images; fixed, so that figures compare."""
SHADES = ListedColormap(matplotlib.colormaps["Blues"](np.linspace(0.1, 1, 256)))
NAMES = {"clean": "clean", "gaussian": "Gaussian", "ods": "ODS", "conf_ods": "ConfODS"}
TEACHERS = "teachers"
"""What the networks with the system `teacher` are called."""
EXAMPLES = 4
"""Rows in the sheet of examples."""


@styled
def save(figure: Figure, paths: Iterable[str | os.PathLike[str]]) -> None:
    """Write a figure to PNG or PDF, by each path's ending; equal figures give equal bytes."""
    undated = {".png": {"Software": None}, ".pdf": {"CreationDate": None}}
    for path in paths:
        with atomic(path) as temporary:
            figure.savefig(temporary, dpi=300, metadata=undated[temporary.suffix])


@styled
def diversity_teachers(files: list[str]) -> Figure:
    """Teachers' mean pairwise KL (nats) against confidence, on train, perturbed train and test.

    Nam et al. 2021, Fig. 3a.
    """
    table = _read(files[0])
    parts = table["name"].str.partition("_")
    table["name"] = parts[0].str.capitalize() + ", " + parts[2].map(lambda x: NAMES.get(x, x))
    return _diversity(table)


@styled
def diversity_students(files: list[str]) -> Figure:
    """Members' mean pairwise KL (nats) against confidence on test, for teachers and students.

    Images are pooled over student seeds. Nam et al. 2021, Fig. 3b.
    """
    return _diversity(_read(files[0]))


def _diversity(table: pd.DataFrame) -> Figure:
    """A panel per name: bars of KL by bin, shaded by share of images; and everyone's mean KL."""
    groups = dict(list(table.groupby("name", sort=False)))
    means = {name: group["mean_kl"].iloc[0] for name, group in groups.items()}
    images = {name: group["count"].sum() for name, group in groups.items()}
    subtitles = [f"KL {_short(means[name])}, n = {images[name]:,}" for name in groups]
    cols = _columns(len(groups), 3)
    figure, panels = _panels(groups, subtitles, cols, 1.6, beside=1)
    top = table["kl"].max() or 1.0
    for axis, (name, group) in zip(panels, groups.items(), strict=True):
        group = group[group["count"] > 0]
        colour = SHADES(SHARES(group["count"] / images[name]))
        box = {"x": group["low"], "width": group["high"] - group["low"], "align": "edge"}
        axis.bar(height=group["kl"], color=colour, edgecolor=INK, linewidth=0.4, **box)
        # A foot of fixed height: the bin with most images may have next to no diversity.
        axis.bar(height=0.06 * top, bottom=-0.09 * top, color=colour, **box)
        axis.set(xlim=(0, 1), ylim=(-0.1 * top, 1.05 * top), xticks=(0, 0.5, 1))
        axis.yaxis.set_major_locator(ticker.MaxNLocator(5, steps=[1, 2, 5, 10]))
    _label(panels, cols, "Ensemble confidence", "Pairwise KL (nats)")
    summary = figure.add_subplot(panels[0].get_gridspec()[:, -1], title="Overall mean")
    summary.barh(range(len(groups)), means.values(), height=0.5, color=GREY)
    for row, mean in enumerate(means.values()):
        summary.text(mean, row, f" {_short(mean)}", va="center")
    summary.set(xlim=(0, 1.35 * (max(means.values()) or 1)), xlabel="Pairwise KL (nats)")
    summary.set_yticks(range(len(groups)), [textwrap.fill(name, 18) for name in groups])
    summary.tick_params(axis="y", length=0)
    summary.invert_yaxis()
    summary.xaxis.set_major_locator(ticker.MaxNLocator(3, steps=[1, 2, 5, 10]))
    percent = ticker.FuncFormatter(lambda share, _: f"{100 * share:g} %")
    shade = {"location": "bottom", "aspect": 50, "shrink": 0.8, "extend": "min", "format": percent}
    bar = figure.colorbar(ScalarMappable(SHARES, SHADES), ax=panels, **shade)
    bar.set_label("Share of images in the bin (shade of bar and foot)")
    bar.minorticks_off()
    replicates = table["n"].max()
    pooled = f" Students: pooled over {replicates} seeds." if replicates > 1 else ""
    _note(figure, f"KL: mean pairwise KL (nats) of all n images.{pooled}")
    return figure


@styled
def de_curve(files: list[str]) -> Figure:
    """Accuracy (%), NLL (nats) and ECE of deep ensembles by size, and of every student.

    Mean ± standard deviation over subsets of the pool (band) and over seeds (error bars). Where a
    student's line meets the NLL curve is its Deep Ensemble Equivalent [Ashukha et al. 2020].
    """
    table = _read(files[0])
    table["m"] = table["system"].str.extract(r"^DE-(\d+)$", expand=False).astype(float)
    curve, students = table[table["m"].notna()].sort_values("m"), table[table["m"].isna()]
    looks, largest = _looks(students["system"]), int(curve["m"].max())
    # Students get slots of their own right of the curve, so that error bars do not overlap.
    edge, share = largest + 0.08 * largest, min(0.05 * max(len(students), 5), 0.4)
    zone = share / (1 - share) * (edge - 1)
    slots = edge + zone * (np.arange(len(students)) + 0.5) / max(len(students), 1)
    sizes = list(range(1, largest + 1, 1 if largest < 7 else 3))
    figure = Figure(figsize=(WIDTH, 2.4 + 0.12 * (len(students) // 4)), layout="constrained")
    titles = {"acc": "Accuracy (%), higher is better", "nll": "NLL (nats), lower is better"}
    titles["ece"] = "ECE, lower is better"
    for axis, (key, title) in zip(figure.subplots(1, 3), titles.items(), strict=True):
        mean, spread, left = curve[key], curve[f"{key}_std"], 1 - 0.06 * largest
        axis.fill_between(curve["m"], mean - spread, mean + spread, color=PALE, lw=0)
        axis.plot(curve["m"], mean, color=INK, marker="o", ms=3.5, lw=1.3, zorder=4)
        for slot, (_, row) in zip(slots, students.iterrows(), strict=True):
            look = looks[row["system"]]
            axis.plot([left, slot], [row[key]] * 2, color=look["color"], ls=look["ls"], lw=0.9)
            error = row[f"{key}_std"] if row["n"] > 1 else None
            axis.errorbar(slot, row[key], error, **look | {"ls": ""}, ms=4, elinewidth=0.9)
        axis.axvline(edge, color=PALE, lw=0.6, zorder=0)
        axis.set(xlim=(left, edge + zone), title=title, xlabel="Ensemble size m")
        axis.set_xticks([*sizes, edge + zone / 2], [*map(str, sizes), "students"])
        axis.yaxis.set_major_locator(ticker.MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    ensemble = Line2D([], [], color=INK, marker="o", ms=3.5, lw=1.3, label="Deep ensemble (DE-m)")
    methods = [Line2D([], [], **looks[name], ms=4, lw=0.9, label=name) for name in looks]
    _legend(figure, [ensemble, *methods])
    seeds = f"Students: n = {_count(students['n'], 'seed')}. " if len(students) else ""
    subsets = f"{', '.join(map(str, curve['n']))} subsets of {largest} networks"
    _note(figure, f"Mean ± standard deviation. {seeds}DE-m: n = {subsets}.")
    return figure


@styled
def reliability(files: list[str]) -> Figure:
    """Accuracy against mean confidence (both shares) by confidence bin on test, by system.

    Stems are the gaps to perfect calibration, the diagonal. Counts are pooled over student seeds.
    """
    table = _read(files[0])
    groups = dict(list(table.groupby("name", sort=False)))
    looks, cols = _looks(groups), _columns(len(groups), 4)
    firsts = [group.iloc[0] for group in groups.values()]
    subtitles = [f"ECE {first['ece']:.3f}, n = {first['n']}" for first in firsts]
    figure, axes = _panels(groups, subtitles, cols, 1.7, layout="compressed")
    for axis, (name, group) in zip(axes, groups.items(), strict=True):
        share, look = group["count"] / group["count"].sum(), {"color": looks[name]["color"]}
        group, share = group[share > 0], share[share > 0]
        stem, dot = {"lw": 0.8, "clip_on": False}, {"edgecolor": "white", "lw": 0.4}
        axis.plot([0, 1], [0, 1], color=PALE, lw=0.8, zorder=0)
        axis.vlines(group["confidence"], group["confidence"], group["accuracy"], **look, **stem)
        dot |= {"s": _diameter(share) ** 2, "clip_on": False, "zorder": 3}
        axis.scatter(group["confidence"], group["accuracy"], **look, **dot)
        axis.set(xlim=(0, 1), ylim=(0, 1), xticks=(0, 0.5, 1), yticks=(0, 0.5, 1), aspect="equal")
    _label(axes, cols, "Mean confidence", "Accuracy")
    shares = {"≤ 0.1 %": 1e-3, "1 %": 1e-2, "10 %": 1e-1, "100 % of images in the bin": 1}
    dot = {"ls": "", "marker": "o", "color": GREY, "mec": "white", "mew": 0.4}
    _legend(
        figure, [Line2D([], [], ms=_diameter(share), label=x, **dot) for x, share in shares.items()]
    )
    images = [group["count"].sum() // group["n"].iloc[0] for group in groups.values()]
    pooled = f"{_count(images, 'test image')}, pooled over n seeds; empty bins are left out."
    _note(figure, f"{pooled} Above the diagonal: underconfident; below: overconfident.")
    return figure


@styled
def learning_curves(files: list[str]) -> Figure:
    """Training and validation by epoch: losses (nats), accuracies (%), and the learning rate.

    Mean (line) and range (band) over a system's networks; only validated epochs are joined.
    """
    runs = pd.concat([_read(path) for path in files]).replace({"system": {"teacher": TEACHERS}})
    systems = dict(list(runs.groupby("system", sort=False)))
    looks = {name: {"color": x["color"], "ls": x["ls"]} for name, x in _looks(systems).items()}
    panels = {
        "loss": "Training loss (nats)",
        "cross_entropy": "Training cross-entropy (nats)",
        "accuracy": "Training accuracy (%)",
        "learning_rate": "Learning rate",
        "val_nll": "Validation NLL (nats)",
        "val_accuracy": "Validation accuracy (%)",
    }
    last = runs["epoch"].max()
    figure = Figure(figsize=(WIDTH, 3.5 + 0.12 * (len(systems) // 4)), layout="constrained")
    axes = figure.subplots(2, 3)
    for axis, (key, title) in zip(axes.flat, panels.items(), strict=True):
        first = runs["epoch"][runs[key].notna()].min()
        # Where only late epochs are validated, they get the whole width.
        left = first - 0.5 if first > last / 2 else 0
        axis.set(title=title, xlim=(left, last + 0.02 * (last - left)))
        axis.xaxis.set_major_locator(ticker.MaxNLocator(4, integer=True, steps=[1, 2, 5, 10]))
        if key == "learning_rate":
            _schedules(axis, systems)
            continue
        late = []
        for name, run in systems.items():
            values = run.pivot_table(index="epoch", columns="replicate", values=key)
            low, high, colour = values.min(axis=1), values.max(axis=1), looks[name]["color"]
            late += [*low[low.index > last / 4], *high[high.index > last / 4]]
            axis.fill_between(values.index, low, high, color=colour, alpha=0.15, lw=0)
            marker = "." if len(values) < 3 else ""
            axis.plot(values.index, values.mean(axis=1), marker=marker, **looks[name])
        if "accuracy" in key:  # the first epochs would flatten all that follows
            margin = 0.05 * (max(late) - min(late)) or 1
            axis.set_ylim(min(late) - margin, max(late) + margin)
        else:
            axis.set_yscale("log")
            bottom, top = axis.get_ylim()
            decades = ticker.LogLocator(subs=(1,) if top > 50 * bottom else (1, 2, 5))
            axis.yaxis.set_major_locator(decades if top > 4 * bottom else ticker.MaxNLocator(4))
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_locator(ticker.NullLocator())
    for axis in axes[-1]:
        axis.set_xlabel("Epoch")
    _legend(figure, [Line2D([], [], lw=1.5, label=name, **looks[name]) for name in systems])
    counts = {name: run["replicate"].nunique() for name, run in systems.items()}
    teachers = [_count([counts.pop(TEACHERS)], "teacher")] if TEACHERS in counts else []
    students = [_count(counts.values(), "student") + " per method"] if counts else []
    _note(figure, f"Mean (line) and range (band) of n = {' and '.join(teachers + students)}.")
    return figure


def _schedules(axis: Axes, systems: dict[str, pd.DataFrame]) -> None:
    """Learning rates; systems that share a schedule share a line."""
    sharing: dict[tuple[float, ...], list[str]] = {}
    for name, run in systems.items():
        rates = tuple(run.groupby("epoch")["learning_rate"].first())
        sharing.setdefault(rates, []).append(name)
    for (rates, names), style in zip(sharing.items(), ["-", "--", ":", "-."] * 9, strict=False):
        label = ", ".join(names) if len(names) < 3 else f"{len(names)} methods"
        marker = "." if len(rates) < 3 else ""
        axis.plot(range(1, len(rates) + 1), rates, marker=marker, color=INK, ls=style, label=label)
    axis.set_ylim(bottom=0)
    if len(sharing) > 1:
        axis.legend(handlelength=1.8)
    else:
        axis.set_title("Learning rate (all)")


@styled
def examples(files: list[str]) -> Figure:
    """Training images, clean and perturbed (pixel range [0, 1]), and the differences, magnified.

    Under each image stands the teachers' mean pairwise KL on it (nats).
    """
    with open_hdf5(files[0]) as file:
        names, eta = json.loads(file.attrs["sets"]), float(file.attrs["eta"])
        images = {name: file[f"{name}/examples"][:EXAMPLES] for name in names}
        kl = {name: pairwise_kl(file[f"{name}/logits"][:EXAMPLES], "none") for name in names}
    clean, *perturbed = names
    changes = {name: images[name] - images[clean] for name in perturbed}
    largest = np.quantile(np.abs(list(changes.values())), 0.99)
    factor = float(f"{0.5 / largest if largest > 0 else 1:.0e}")
    rows, channels, height, width = images[clean].shape
    cell = min(WIDTH / (1 + 2 * len(perturbed)), 1.2) * height / width
    figure = Figure(
        figsize=(WIDTH, rows * (cell + 0.15) + (0.8 if channels == 1 else 0.4)), layout="compressed"
    )
    axes = figure.subplots(rows, 1 + 2 * len(perturbed), squeeze=False)
    frame = {"cmap": "gray", "vmin": 0, "vmax": 1, "interpolation": "nearest"}
    signed = frame | {"cmap": "RdBu_r", "vmin": -0.5 / factor, "vmax": 0.5 / factor}
    for (row, column), axis in np.ndenumerate(axes):
        name = names[(column + 1) // 2]
        title = NAMES.get(name, name)
        if column and column % 2 == 0:
            title = f"difference × {factor:g}"
            change = changes[name][row]
            shown = change if channels == 1 else np.clip(0.5 + factor * change, 0, 1)
            picture = axis.imshow(shown.transpose(1, 2, 0), **signed)
        else:
            axis.imshow(images[name][row].transpose(1, 2, 0), **frame)
            axis.set_xlabel(f"KL {_short(kl[name][row])}", color=GREY)
        axis.set(xticks=(), yticks=())
        axis.spines[:].set(visible=True, color=PALE)
        if row == 0:
            axis.set_title(title, loc="center")
    note = f"η = {eta * 255:.3g}/255. KL: between the teachers, mean pairwise, in nats."
    if channels == 1:
        place = {"location": "bottom", "aspect": 50, "shrink": 0.5, "extend": "both"}
        figure.colorbar(picture, ax=axes, label="Difference (pixel range 0 to 1)", **place)
    else:
        note += f" Differences are shown as 0.5 + {factor:g} × difference: grey is no change."
    _note(figure, note)
    return figure


def _read(path: str) -> pd.DataFrame:
    """A table; what a system is called is text, even if it is 1 or NA."""
    text = {"name": str, "system": str}
    return pd.read_csv(path, dtype=text, keep_default_na=False, na_values=[""])


def _looks(systems: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Colour, marker and line style by system; those of the methods go by their order."""
    looks: dict[str, dict[str, Any]] = {}
    place = 0
    for name in systems:
        looks[name] = {"color": INK, "marker": "o", "ls": "-"}
        if name != TEACHERS and not re.fullmatch(r"DE-\d+", name):
            cycle, index = divmod(place, len(COLOURS))
            style = {"color": COLOURS[index], "marker": MARKERS[place % len(MARKERS)]}
            looks[name] = style | {"ls": ["-", "--", ":"][cycle % 3]}
            place += 1
    return looks


def _columns(panels: int, most: int) -> int:
    """Columns of a grid that has as few rows as can be, evenly filled."""
    return -(-panels // -(-panels // most))


def _panels(
    titles: Iterable[str],
    subtitles: Iterable[str],
    cols: int,
    height: float,
    beside: int = 0,
    layout: str = "constrained",
) -> tuple[Figure, list[Axes]]:
    """A figure with a grid of panels, rows `height` inches high, and empty columns beside it."""
    panels = list(zip(titles, subtitles, strict=True))
    rows = -(-len(panels) // cols)
    figure, axes = Figure(figsize=(WIDTH, rows * height + 0.8), layout=layout), []
    grid = figure.add_gridspec(rows, cols + beside)
    for place, (title, subtitle) in enumerate(panels):
        axis = figure.add_subplot(grid[divmod(place, cols)])
        axis.set_title(textwrap.fill(title, 19), pad=15)
        axis.annotate(subtitle, (0, 1), (0, 6), "axes fraction", "offset points", color=GREY)
        axes.append(axis)
    return figure, axes


def _label(axes: Sequence[Axes], cols: int, xlabel: str, ylabel: str) -> None:
    """Label the outer axes of a grid whose panels share scales."""
    for place, axis in enumerate(axes):
        left, bottom = place % cols == 0, place + cols >= len(axes)
        axis.tick_params(labelleft=left, labelbottom=bottom)
        axis.set(xlabel=xlabel if bottom else "", ylabel=ylabel if left else "")


def _diameter(share: Any) -> Any:
    """Of a dot, in points: 8 for all images, 2 less per power of ten down to a thousandth."""
    return 8 + 2 * np.log10(np.clip(share, 1e-3, 1))


def _short(value: float) -> str:
    """Two significant digits."""
    if value < 1e-4:
        return "<0.0001" if value > 0 else "0"
    return f"{value:.{max(0, 1 - int(np.floor(np.log10(value))))}f}"


def _count(counts: Iterable[int], noun: str) -> str:
    """As "3 seeds", or "2–3 seeds" where counts differ."""
    low, high = min(counts), max(counts)
    span = f"{low:,}" if low == high else f"{low:,}–{high:,}"
    return f"{span} {noun}" if high == 1 else f"{span} {noun}s"


def _legend(figure: Figure, handles: Sequence[Line2D]) -> None:
    """Above the panels, in as many columns as there is room for (in characters), at most 4."""
    for cols in range(min(len(handles), 4), 0, -1):
        columns = np.array_split([len(str(handle.get_label())) for handle in handles], cols)
        if sum(lengths.max() + 7 for lengths in columns) < 115:
            break
    figure.legend(handles=handles, loc="outside upper center", ncols=cols)


def _note(figure: Figure, text: str) -> None:
    figure.supxlabel(text, x=0.01, ha="left", color=GREY, fontsize=7)
