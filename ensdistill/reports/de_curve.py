"""Deep ensembles by size, and the students beside them."""

import numpy as np
import pandas as pd
from matplotlib import ticker
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ensdistill.drawing import (
    ENSEMBLE,
    GREY,
    INK,
    PALE,
    WIDTH,
    add_legend,
    add_note,
    are_many,
    count_of,
    panels_by_system,
    styled,
    styles_of,
)
from ensdistill.metrics import METRICS

TITLE = "Deep ensembles by size, and students"
DRAWN_FROM = ["tables/results.csv"]
CHOSEN = {"METRICS": ["acc", "nll", "ece"]}


@styled
def draw(frame: pd.DataFrame) -> Figure:
    """Accuracy (%), NLL (nats) and ECE of deep ensembles by size, and of every student.

    Mean ± standard deviation over subsets of the pool (band) and over seeds (error bars). Where a
    student's line meets the NLL curve is its Deep Ensemble Equivalent [Ashukha et al. 2020].
    """
    if are_many(frame["system"]):
        return _draw_rows(frame)
    sizes = frame["system"].str.extract(r"^DE-(\d+)$", expand=False).astype(float)
    curve = frame.assign(m=sizes)[sizes.notna()].sort_values("m")
    students = frame[sizes.isna()]
    styles, largest = styles_of(students["system"]), int(curve["m"].max())
    # Students get slots of their own right of the curve, so that error bars do not overlap.
    edge, share = largest + 0.08 * largest, min(0.05 * max(len(students), 5), 0.4)
    zone = share / (1 - share) * (edge - 1)
    slots = edge + zone * (np.arange(len(students)) + 0.5) / max(len(students), 1)
    ticks = list(range(1, largest + 1, 1 if largest < 7 else 3))
    figure = Figure(figsize=(WIDTH, 2.4 + 0.12 * (len(students) // 4)), layout="constrained")
    for axis, key in zip(figure.subplots(1, 3), CHOSEN["METRICS"], strict=True):
        mean, spread, left = curve[key], curve[f"{key}_std"], 1 - 0.06 * largest
        axis.fill_between(curve["m"], mean - spread, mean + spread, color=PALE, lw=0)
        axis.plot(curve["m"], mean, color=INK, marker="o", ms=3.5, lw=1.3, zorder=4)
        for slot, (_, row) in zip(slots, students.iterrows(), strict=True):
            style = styles[row["system"]]
            axis.plot([left, slot], [row[key]] * 2, color=style["color"], ls=style["ls"], lw=0.9)
            error = row[f"{key}_std"] if row["n"] > 1 else None
            axis.errorbar(slot, row[key], error, **style | {"ls": ""}, ms=4, elinewidth=0.9)
        axis.axvline(edge, color=PALE, lw=0.6, zorder=0)
        axis.set(xlim=(left, edge + zone), title=METRICS[key].axis, xlabel="Ensemble size m")
        axis.set_xticks([*ticks, edge + zone / 2], [*map(str, ticks), "students"])
        axis.yaxis.set_major_locator(ticker.MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    ensemble = Line2D([], [], color=INK, marker="o", ms=3.5, lw=1.3, label="Deep ensemble (DE-m)")
    methods = [Line2D([], [], **styles[name], ms=4, lw=0.9, label=name) for name in styles]
    add_legend(figure, [ensemble, *methods])
    add_note(figure, _replicates(curve, students))
    return figure


def _draw_rows(frame: pd.DataFrame) -> Figure:
    """The same of many students: a row for each system, and a line down from each ensemble."""
    styles, metrics = styles_of(frame["system"]), CHOSEN["METRICS"]
    figure, axes = panels_by_system(styles, [METRICS[key].axis for key in metrics], 0.2)
    is_ensemble = frame["system"].str.fullmatch(ENSEMBLE)
    for axis, key in zip(axes, metrics, strict=True):
        for row, (_, system) in enumerate(frame.iterrows()):
            style = styles[system["system"]] | {"ls": ""}
            error = system[f"{key}_std"] if system["n"] > 1 else None
            axis.errorbar(system[key], row, xerr=error, **style, ms=4, elinewidth=0.9)
            if is_ensemble.iloc[row]:
                axis.vlines(system[key], row, len(frame), color=GREY, lw=0.5, zorder=0)
    add_note(figure, _replicates(frame[is_ensemble], frame[~is_ensemble]))
    return figure


def _replicates(curve: pd.DataFrame, students: pd.DataFrame) -> str:
    seeds = f"Students: n = {count_of(students['n'], 'seed')}. " if len(students) else ""
    subsets = f"{', '.join(map(str, curve['n']))} subsets of {len(curve)} networks"
    return f"Mean ± standard deviation. {seeds}DE-m: n = {subsets}."
