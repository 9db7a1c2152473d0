"""The figures, each a function of its own name from its input files; `save` writes them.

Deep ensembles and teachers are black. A student method has the same colour and marker in every
figure of a study, by its place among the study's methods; a perturbation has those of the paper's
method that uses it.
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
from matplotlib.axis import Axis
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ensdistill.files import atomic, open_hdf5, read_csv
from ensdistill.metrics import pairwise_kl

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
SPLITS = {"train": INK, "test": "#999999"}
NAMES = {"clean": "clean", "gaussian": "Gaussian", "ods": "ODS", "conf_ods": "ConfODS"}
PERTURBED = {
    name: {"color": COLOURS[place], "marker": MARKERS[place]}
    for place, name in enumerate(("gaussian", "ods", "conf_ods"), 3)
}
SCORES = {
    "max_probability": ("o", "1 − confidence"),
    "entropy": ("D", "entropy"),
    "mutual_information": ("^", "mutual information of members"),
}
ENSEMBLE = re.compile(r"DE-\d+")
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
            _plain(axis.yaxis)
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


@styled
def saturation(files: list[str]) -> Figure:
    """How near to one-hot the teachers are (all in %): images by doubt, accuracy by confidence.

    On train, where their accuracy is nearly 100 %, they say little but the label.
    """
    table = _read(files[0])
    figure = Figure(figsize=(WIDTH, 2.8), layout="constrained")
    doubts, calibration = figure.subplots(1, 2, width_ratios=(1.6, 1))
    dot: dict[str, Any] = {"marker": "o", "ms": 5, "mec": "white", "mew": 0.4}
    for (split, _), teacher in table.groupby(["split", "teacher"], sort=False):
        look, first = {"color": SPLITS[split]}, teacher.iloc[0]
        doubts.plot(100 * teacher["doubt"], 100 * teacher["share"], lw=0.8, **look)
        place = 100 * first["confidence"], first["accuracy"]
        calibration.plot(*place, clip_on=False, **dot, **look)
    doubts.set(xscale="log", xlim=(1e-4, 100), ylim=(0, 100), xlabel="Doubt: 1 − confidence (%)")
    doubts.set_title("Images with at most this doubt (%)")
    _plain(doubts.xaxis)
    low = min(100 * table["confidence"].min(), table["accuracy"].min(), 99)
    ends = (low - 0.08 * (100 - low), 100)
    calibration.plot(ends, ends, color=PALE, lw=0.8, zorder=0)
    calibration.set(xlim=ends, ylim=ends, title="Accuracy (%)", xlabel="Mean confidence (%)")
    calibration.set_box_aspect(1)
    for scale in (calibration.xaxis, calibration.yaxis):
        scale.set_major_locator(ticker.MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
    _legend(figure, [Line2D([], [], color=SPLITS[x], label=x, **dot) for x in SPLITS])
    counts = table.groupby("split", sort=False)["n"].first()
    images = " and ".join(f"{n:,} {split}" for split, n in counts.items())
    _note(
        figure,
        f"A line and a dot per teacher (n = {table['teacher'].nunique()}); {images} images. "
        "Diagonal: calibrated; below: overconfident.",
    )
    return figure


@styled
def sweep(files: list[str]) -> Figure:
    """Teachers' mean pairwise KL (nats) on training images by the size η of their perturbation.

    With 95 % bootstrap intervals over images (bands), beside that on clean images.
    """
    table = _read(files[0])
    study = table.iloc[0]
    figure = Figure(figsize=(WIDTH, 3), layout="constrained")
    axis = figure.subplots()
    axis.set(xscale="log", yscale="log", ylabel="Pairwise KL of the teachers (nats)")
    axis.set_xlabel("Size η of the perturbation (1/255 of the pixel range)")
    for name, look in PERTURBED.items():
        curve = table[table["perturbation"] == name]
        eta = 255 * curve["eta"]
        axis.fill_between(eta, curve["low"], curve["high"], color=look["color"], alpha=0.2, lw=0)
        axis.plot(eta, curve["kl"], ms=4, label=NAMES[name], **look)
    lower, upper = sorted(SPLITS, key=lambda split: study[f"{split}_kl"])
    for split, side in ((lower, "top"), (upper, "bottom")):  # apart, however near they are
        kl = study[f"{split}_kl"]
        axis.axhline(kl, color=SPLITS[split], ls="--", lw=0.8, zorder=1)
        text, right = f"{split}, clean: {_short(kl)}", ("axes fraction", "data")
        axis.annotate(text, (1, kl), (3, 0), right, "offset points", va=side)
    if study["study_eta"] > 0:
        eta, top = 255 * study["study_eta"], ("data", "axes fraction")
        axis.axvline(eta, color=INK, ls=":", lw=0.8, zorder=1)
        text = f"the study: η = {eta:.3g}/255"
        axis.annotate(text, (eta, 1), (0, 3), top, "offset points", ha="center")
    _plain(axis.yaxis)
    sizes = 255 * table["eta"].unique()
    axis.set_xticks(sizes, [f"{eta:.4g}" for eta in sizes])
    axis.set_xticks([], minor=True)
    _legend(figure, axis.get_legend_handles_labels()[0])
    images = _count(table["n"], "training image")
    bands = f"Bands: 95 % bootstrap intervals of the mean over n = {images}."
    _note(figure, f"{bands} Dashed: means over all of train and test.")
    return figure


@styled
def transfer(files: list[str]) -> Figure:
    """What ODS made from one teacher does to the others' KL (nats); and cosines of directions.

    Sources in the ensemble are left out of it; external ones never were in it. Nam et al. 2021,
    Fig. 6.
    """
    table, cosines = map(_read, files)
    histograms = dict(list(cosines.groupby("name", sort=False)))
    figure = Figure(figsize=(WIDTH, max(3.4, 1 + 0.2 * len(table))), layout="constrained")
    axes = figure.subplot_mosaic([["sources", name] for name in histograms], width_ratios=(1.3, 1))
    axis, inside = axes["sources"], table["where"] == "inside"
    marks = {
        "clean": (table["clean"], {"marker": "|", "mew": 1.2}),
        "ODS of a teacher of the ensemble": (table["ods"].where(inside), {"marker": "o"}),
        "same, whole ensemble": (table["own"], {"marker": "x", "ms": 3.5}),
        "ODS of an external teacher": (table["ods"].mask(inside), {"marker": "o", "mfc": "white"}),
    }
    axis.hlines(table.index, table["clean"], table["ods"], color=PALE, lw=0.8)
    axis.hlines(table.index, table["ods_low"], table["ods_high"], color=INK, lw=0.8)
    for label, (kl, mark) in marks.items():
        if (kl > 0).any():
            axis.plot(kl, table.index, label=label, **{"color": INK, "ls": "", "ms": 5} | mark)
    axis.set(xscale="log", xlabel="Pairwise KL of the ensemble's other teachers (nats)")
    axis.set_yticks(table.index, [f"teacher {source}" for source in table["source"]])
    axis.tick_params(axis="y", length=0)
    axis.set_ylim(len(table) - 0.5, -0.5)
    _plain(axis.xaxis)
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
    _legend(figure, axes["sources"].get_legend_handles_labels()[0])
    counts = ", ".join(f"{bins['n'].iloc[0]:,}" for bins in histograms.values())
    images = _count(table["n"], "training image")
    _note(
        figure,
        f"Dots: mean and 95 % bootstrap interval over n = {images}. "
        f"Cosines: n = {counts} (pairs × images).",
    )
    return figure


@styled
def jacobians(files: list[str]) -> Figure:
    """How far the students' logit Jacobians are from their teachers', and in which direction.

    Distilling at perturbed inputs should make them agree. Nam et al. 2021, section 3.2.
    """
    table = _read(files[0])
    systems = dict(list(table.groupby("system", sort=False)))
    looks = _looks(systems)
    titles = {"error": "Relative error, lower is better", "cosine": "Cosine, higher is better"}
    figure, axes = _rows(systems, titles.values(), 0.3)
    for axis, key in zip(axes, titles, strict=True):
        for row, (name, runs) in enumerate(systems.items()):
            look, several = looks[name], len(runs) > 1
            places = row + several * np.linspace(0.06, 0.34, len(runs))
            small = {"color": look["color"], "lw": 0.8}
            axis.hlines(places, runs[f"{key}_low"], runs[f"{key}_high"], **small)
            axis.plot(runs[key], places, **small | {"ls": ""}, marker=".", ms=4)
            axis.plot(runs[key].mean(), row - 0.17 * several, **look | {"ls": ""}, ms=5)
    images = _count(table["n"], "test image")
    _note(
        figure,
        f"Large: mean over n = {_replicates(table)}. Small: each, "
        f"with its 95 % bootstrap interval over n = {images}.",
    )
    return figure


@styled
def corruptions(files: list[str]) -> Figure:
    """Accuracy (%), NLL (nats) and ECE over kinds of corruption, by severity and system.

    After Ovadia et al. 2019. Boxes are of the kinds' means over replicates.
    """
    table = _read(files[0])
    titles = {"acc": "Accuracy (%), higher is better", "nll": "NLL (nats), lower is better"}
    titles["ece"] = "ECE, lower is better"
    looks = _looks(table["system"].unique())
    for look in looks.values():
        if look["ls"] != "-":  # boxes have no line style to tell a colour's second method by
            look["mfc"] = "white"
    means = table.groupby(["system", "severity", "kind"])[list(titles)].mean()
    width = 0.84 / len(looks)
    figure = Figure(figsize=(WIDTH, 5.2 + 0.12 * (len(looks) // 4)), layout="constrained")
    axes = figure.subplots(3, 1, sharex=True)
    for axis, (key, title) in zip(axes, titles.items(), strict=True):
        for place, (name, look) in enumerate(looks.items()):
            shift = width * (place - (len(looks) - 1) / 2)
            groups = dict(list(means.loc[name, key].groupby("severity")))
            axis.plot(shift, groups.pop(0), **look | {"ls": ""}, ms=4)
            line = {"color": look["color"], "lw": 0.6}
            median = {"color": look["color"] if look["mfc"] == "white" else "white"}
            axis.boxplot(
                groups.values(),
                positions=[severity + shift for severity in groups],
                widths=0.8 * width,
                whis=(0, 100),
                patch_artist=True,
                manage_ticks=False,
                showcaps=False,
                boxprops={"edgecolor": look["color"], "facecolor": look["mfc"], "lw": 0.6},
                whiskerprops=line,
                medianprops=median,
            )
        axis.set(title=title, xlim=(-0.5, 5.5))
    axes[1].set_yscale("log")
    _plain(axes[1].yaxis)
    axes[-1].set_xlabel("Severity of the corruption (0: the same images as they are)")
    _legend(figure, [Line2D([], [], **look, ms=4, lw=0.9, label=x) for x, look in looks.items()])
    kinds = table["kind"][table["severity"] > 0].nunique()
    images = _count(table["n"], "image")
    _note(
        figure,
        f"Median, quartiles and range over n = {kinds} kinds ({images} each) of the mean over "
        f"n = {_replicates(table)}.",
    )
    return figure


@styled
def out_of_distribution(files: list[str]) -> Figure:
    """How well uncertainty tells images of other things from test images, by system and score.

    The other images are the positives [Hendrycks et al. 2019].
    """
    table = _read(files[0])
    titles = {"auroc": "AUROC, higher is better", "aupr": "AUPR, higher is better"}
    titles["fpr95"] = "FPR95, lower is better"
    looks = _looks(table["system"].unique())
    figure, axes = _rows(looks, titles.values(), 0.34)
    for axis, key in zip(axes, titles, strict=True):
        for row, (name, look) in enumerate(looks.items()):
            for shift, (score, (marker, _)) in zip((-0.26, 0, 0.26), SCORES.items(), strict=True):
                values = table[key][(table["system"] == name) & (table["score"] == score)]
                if len(values):
                    error = values.std() if len(values) > 1 else None
                    dot = look | {"ls": "", "marker": marker, "ms": 4, "elinewidth": 0.9}
                    axis.errorbar(values.mean(), row + shift, xerr=error, **dot)
    dot = {"ls": "", "color": GREY, "ms": 4}
    _legend(figure, [Line2D([], [], marker=x, label=label, **dot) for x, label in SCORES.values()])
    inside, outside = table["n_in"].iloc[0], table["n_out"].iloc[0]
    _note(
        figure,
        f"Mean ± standard deviation over n = {_replicates(table)}; {inside:,} test images, "
        f"{outside:,} others. By chance: AUROC 0.50, AUPR {outside / (inside + outside):.2f}, "
        "FPR95 0.95.",
    )
    return figure


def _read(path: str) -> pd.DataFrame:
    """A table; what a system is called is text, even if it is 1 or NA."""
    text = {"name": str, "system": str}
    return read_csv(path, dtype=text, keep_default_na=False, na_values=[""])


def _looks(systems: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Colour, marker and line style by system; those of the methods go by their order."""
    looks: dict[str, dict[str, Any]] = {}
    place = 0
    for name in systems:
        looks[name] = {"color": INK, "mfc": "white" if name == "DE-1" else INK}
        looks[name] |= {"marker": "o", "ls": "-"}
        if name != TEACHERS and not ENSEMBLE.fullmatch(name):
            cycle, index = divmod(place, len(COLOURS))
            style = {"color": COLOURS[index], "marker": MARKERS[place % len(MARKERS)]}
            looks[name] = style | {"mfc": COLOURS[index], "ls": ["-", "--", ":"][cycle % 3]}
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


def _rows(
    systems: Iterable[str], titles: Iterable[str], height: float
) -> tuple[Figure, Sequence[Axes]]:
    """A figure with panels side by side that share a row per system, `height` inches or more."""
    names, titles = [textwrap.fill(name, 20) for name in systems], list(titles)
    height = max(height, *(0.13 * (name.count("\n") + 1) + 0.05 for name in names))
    figure = Figure(figsize=(WIDTH, 0.9 + height * len(names)), layout="constrained")
    axes = figure.subplots(1, len(titles), sharey=True)
    for axis, title in zip(axes, titles, strict=True):
        axis.set_yticks(range(len(names)), names)
        axis.set_yticks(np.arange(1, len(names)) - 0.5, minor=True)
        axis.tick_params(axis="y", which="both", length=0)
        axis.grid(axis="y", which="minor", color=PALE, lw=0.4)
        axis.set(title=title, ylim=(len(names) - 0.5, -0.5))
        axis.xaxis.set_major_locator(ticker.MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
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


def _replicates(table: pd.DataFrame) -> str:
    """As "5 (DE-1), 1 (DE-4), 3 seeds (students)"."""
    counts = dict(table.groupby("system", sort=False)["replicate"].nunique())
    ensembles = [f"{counts.pop(name)} ({name})" for name in [*counts] if ENSEMBLE.fullmatch(name)]
    students = [f"{_count(counts.values(), 'seed')} (students)"] if counts else []
    return ", ".join(ensembles + students)


def _legend(figure: Figure, handles: Sequence[Line2D]) -> None:
    """Above the panels, in as many columns as there is room for (in characters), at most 4."""
    for cols in range(min(len(handles), 4), 0, -1):
        columns = np.array_split([len(str(handle.get_label())) for handle in handles], cols)
        if sum(lengths.max() + 7 for lengths in columns) < 115:
            break
    figure.legend(handles=handles, loc="outside upper center", ncols=cols)


def _plain(scale: Axis) -> None:
    """Plain numbers at round places of a logarithmic axis that has all its data."""
    low, high = scale.get_view_interval()
    decades = ticker.LogLocator(subs=(1,) if high > 50 * low else (1, 2, 5))
    scale.set_major_locator(decades if high > 4 * low else ticker.MaxNLocator(4))
    scale.set_major_formatter("{x:g}")
    scale.set_minor_locator(ticker.NullLocator())


def _note(figure: Figure, text: str) -> None:
    figure.supxlabel(textwrap.fill(text, 128), x=0.01, ha="left", color=GREY, fontsize=7)
