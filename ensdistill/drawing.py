"""What the figures share: style, colours, grids of panels, legends, notes.

Deep ensembles and teachers are black. A student method has the same colour and marker in every
figure of a study, by its place among the study's methods; a perturbation has those of the paper's
method that uses it. Of more than `MANY` methods each has a row of its own instead of an entry in a
legend, and a colour is that of a family.
"""

import os
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal

import matplotlib
import numpy as np
import pandas as pd
from matplotlib import ticker
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ensdistill.files import atomic

WIDTH = 6.8
"""Two columns of a paper, in inches; at this size no text is smaller than 7 points."""

INK, GREY, PALE = "#222222", "#666666", "#d0d0d0"

TICKS = {"labelsize": 7, "major.size": 2.5, "major.width": 0.6}
STYLE: dict[Any, Any] = {
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
SHADES = ListedColormap(matplotlib.colormaps["Blues"](np.linspace(0.1, 1, 256)))
SPLITS = {"train": INK, "test": "#999999"}
PERTURBED = {
    name: {"color": COLOURS[place], "marker": MARKERS[place]}
    for place, name in enumerate(("gaussian", "ods", "conf_ods"), 3)
}
ENSEMBLE = re.compile(r"DE-\d+")
TEACHERS = "teachers"
"""What the networks with the system `teacher` are called."""
MANY = 12
"""Methods up to which colours, markers and line styles tell them apart."""


@styled
def save(figure: Figure, paths: Iterable[str | os.PathLike[str]]) -> None:
    """Write a figure to PNG or PDF, by each path's ending; equal figures give equal bytes."""
    undated = {".png": {"Software": None}, ".pdf": {"CreationDate": None}}
    for path in paths:
        with atomic(path) as temporary:
            figure.savefig(temporary, dpi=300, metadata=undated[temporary.suffix])


def by_system(frame: pd.DataFrame, column: str) -> dict[str, pd.DataFrame]:
    """The rows of each system, or whatever else a column names, in their order."""
    return {str(name): group for name, group in frame.groupby(column, sort=False)}


def is_method(system: str) -> bool:
    """Whether a system is one of students."""
    return system != TEACHERS and not ENSEMBLE.fullmatch(system)


def are_many(systems: Iterable[str]) -> bool:
    """Whether there are more than `MANY` methods among the systems."""
    return sum(map(is_method, set(systems))) > MANY


def family_of(system: str) -> str:
    """A label up to its first + or comma, where the perturbation begins in labels of a grid."""
    return re.split("[+,]", system, maxsplit=1)[0]


def styles_of(systems: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Colour, marker and line style by system; those of the methods go by their order.

    Of many methods, colour and line style are those of the family, markers those of the rest.
    """
    names = list(dict.fromkeys(systems))
    many, styles = are_many(names), dict[str, dict[str, Any]]()
    families, rests = dict[str, int](), dict[str, int]()
    for name in names:
        styles[name] = {"color": INK, "mfc": "white" if name == "DE-1" else INK}
        styles[name] |= {"marker": "o", "ls": "-"}
        if is_method(name):
            family = family_of(name) if many else name
            rest = name.removeprefix(family) if many else name
            cycle, index = divmod(families.setdefault(family, len(families)), len(COLOURS))
            marker = MARKERS[rests.setdefault(rest, len(rests)) % len(MARKERS)]
            style = {"color": COLOURS[index], "marker": marker, "mfc": COLOURS[index]}
            styles[name] = style | {"ls": ["-", "--", ":"][cycle % 3]}
            if many and cycle:
                styles[name]["mfc"] = "white"
    return styles


def styles_of_perturbations(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Colour and marker by perturbation: the paper's first, with colours of their own."""
    others = [name for name in dict.fromkeys(names) if name not in PERTURBED]
    styles = {name: style for name, style in PERTURBED.items() if name in set(names)}
    for place, name in enumerate(others):
        cycle, free = divmod(place, len(COLOURS) - len(PERTURBED))
        styles[name] = {"color": COLOURS[free], "marker": MARKERS[place % len(MARKERS)]}
        if cycle:
            styles[name]["ls"] = ["--", ":"][(cycle - 1) % 2]
    return styles


def columns_for(panels: int, most: int) -> int:
    """Columns of a grid that has as few rows as can be, evenly filled."""
    return -(-panels // -(-panels // most))


def grid_of_panels(
    titles: Iterable[str],
    subtitles: Iterable[str],
    cols: int,
    height: float,
    beside: int = 0,
    layout: Literal["constrained", "compressed"] = "constrained",
) -> tuple[Figure, list[Axes]]:
    """A figure with a grid of panels, rows `height` inches high, and empty columns beside it."""
    panels = list(zip(titles, subtitles, strict=True))
    rows = -(-len(panels) // cols)
    figure, axes = Figure(figsize=(WIDTH, rows * height + 0.8), layout=layout), []
    grid = figure.add_gridspec(rows, cols + beside)
    for place, (title, subtitle) in enumerate(panels):
        axis = figure.add_subplot(grid[divmod(place, cols)])
        axis.set_title(wrapped(title, 19), pad=15)
        axis.annotate(subtitle, (0, 1), (0, 6), "axes fraction", "offset points", color=GREY)
        axes.append(axis)
    return figure, axes


def panels_by_system(
    systems: Iterable[str],
    titles: Iterable[str],
    height: float,
    width_ratios: Sequence[float] | None = None,
) -> tuple[Figure, Sequence[Axes]]:
    """A figure with panels side by side that share a row per system, `height` inches or more.

    Rows of many systems are lower, with lines between families and scales at both ends.
    """
    systems, titles = list(systems), list(titles)
    many = are_many(systems)
    names = [wrapped(name, 34 if many else 20) for name in systems]
    height = min(height, 0.2) if many else height
    height = max(height, *(0.13 * (name.count("\n") + 1) + 0.05 for name in names))
    figure = Figure(figsize=(WIDTH, 0.9 + height * len(names)), layout="constrained")
    axes = figure.subplots(1, len(titles), sharey=True, width_ratios=width_ratios)
    for axis, title in zip(axes, titles, strict=True):
        if many:
            axis.tick_params(axis="x", top=True, labeltop=True)
            for row, pair in enumerate(pairwise(map(family_of, systems))):
                if len(set(pair)) > 1:
                    axis.axhline(row + 0.5, color=GREY, lw=0.5, zorder=1.6)
        axis.set_yticks(range(len(names)), names)
        axis.set_yticks(np.arange(1, len(names)) - 0.5, minor=True)
        axis.tick_params(axis="y", which="both", length=0)
        axis.grid(axis="y", which="minor", color=PALE, lw=0.4)
        axis.set(title=title, ylim=(len(names) - 0.5, -0.5))
        axis.xaxis.set_major_locator(ticker.MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
    return figure, axes


def rows_of_bins(
    groups: Mapping[str, pd.DataFrame],
    titles: tuple[str, str],
    place: str,
    value: str,
    overall: str,
    **colours: Any,
) -> Figure:
    """A row per system of dots, one per bin of confidence that has images: coloured by a value, and
    as large as its share of images; and beside them the system's overall value.

    Args:
        groups: by system, one row per bin: count, and the columns named below.
        titles: of the two panels.
        place: the column of confidences, `value` of colours, `overall` of what is beside.
        colours: norm and cmap.
    """
    figure, (bins, mean) = panels_by_system(groups, titles, 0.2, width_ratios=(3, 1))
    for row, group in enumerate(groups.values()):
        share = group["count"] / group["count"].sum()
        group, share = group[share > 0], share[share > 0]
        edge: Any = {"edgecolor": GREY, "lw": 0.3, "clip_on": False, "zorder": 3}
        size = dot_diameter(share) ** 2
        dots = bins.scatter(group[place], [row] * len(group), size, group[value], **edge, **colours)
        mean.plot(group[overall].iloc[0], row, "o", color=INK, ms=4)
    bins.set(xlim=(0, 1), xlabel="Confidence")
    mean.set_xlim(left=0)
    bar: Any = {"location": "bottom", "aspect": 50, "shrink": 0.8, "pad": 0.01}
    figure.colorbar(dots, ax=bins, label=titles[0], **bar)
    add_legend(figure, legend_of_shares())
    return figure


def legend_of_shares() -> list[Line2D]:
    """What sizes of dots mean."""
    shares = {"≤ 0.1 %": 1e-3, "1 %": 1e-2, "10 %": 1e-1, "100 % of images in the bin": 1}
    dot: Any = {"ls": "", "marker": "o", "color": GREY, "mec": "white", "mew": 0.4}
    return [Line2D([], [], ms=dot_diameter(share), label=x, **dot) for x, share in shares.items()]


def dot_diameter(share: Any) -> Any:
    """Of a dot, in points: 8 for all images, 2 less per power of ten down to a thousandth."""
    return 8 + 2 * np.log10(np.clip(share, 1e-3, 1))


def label_outer(axes: Sequence[Axes], cols: int, xlabel: str, ylabel: str) -> None:
    """Label the outer axes of a grid whose panels share scales."""
    for place, axis in enumerate(axes):
        left, bottom = place % cols == 0, place + cols >= len(axes)
        axis.tick_params(labelleft=left, labelbottom=bottom)
        axis.set(xlabel=xlabel if bottom else "", ylabel=ylabel if left else "")


def wrapped(name: str, width: int) -> str:
    """A name in lines of so many characters, cut after the fourth."""
    return "\n".join(textwrap.wrap(name, width, max_lines=4, placeholder="…"))


def two_digits(value: float) -> str:
    """Two significant digits."""
    if value < 1e-4:
        return "<0.0001" if value > 0 else "0"
    return f"{value:.{max(0, 1 - int(np.floor(np.log10(value))))}f}"


def count_of(counts: Iterable[int], noun: str) -> str:
    """As "3 seeds", or "2–3 seeds" where counts differ."""
    low, high = min(counts), max(counts)
    span = f"{low:,}" if low == high else f"{low:,}–{high:,}"
    return f"{span} {noun}" if high == 1 else f"{span} {noun}s"


def replicates_of(table: pd.DataFrame) -> str:
    """As "5 (DE-1), 1 (DE-4), 3 seeds (students)"."""
    counts = dict(table.groupby("system", sort=False)["replicate"].nunique())
    ensembles = [f"{counts.pop(name)} ({name})" for name in [*counts] if ENSEMBLE.fullmatch(name)]
    students = [f"{count_of(counts.values(), 'seed')} (students)"] if counts else []
    return ", ".join(ensembles + students)


def add_legend(figure: Figure, handles: Sequence[Artist]) -> None:
    """Above the panels, in as many columns as there is room for (in characters), at most 4."""
    for cols in range(min(len(handles), 4), 0, -1):
        columns = np.array_split([len(str(handle.get_label())) for handle in handles], cols)
        if sum(lengths.max() + 7 for lengths in columns) < 115:
            break
    names = [str(handle.get_label()) for handle in handles]
    names = [name if len(name) <= 100 else f"{name[:99]}…" for name in names]
    figure.legend(handles=handles, labels=names, loc="outside upper center", ncols=cols)


def plain_numbers(scale: Axis) -> None:
    """Plain numbers at round places of a logarithmic axis that has all its data."""
    low, high = scale.get_view_interval()
    decades = ticker.LogLocator(subs=(1,) if high > 50 * low else (1, 2, 5))
    scale.set_major_locator(decades if high > 4 * low else ticker.MaxNLocator(4))
    scale.set_major_formatter("{x:g}")
    scale.set_minor_locator(ticker.NullLocator())


def add_note(figure: Figure, text: str) -> None:
    figure.supxlabel(textwrap.fill(text, 128), x=0.01, ha="left", color=GREY, fontsize=7)
