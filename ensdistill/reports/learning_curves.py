"""Training and validation by epoch, of all networks."""

from collections.abc import Sequence

import pandas as pd
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ensdistill.drawing import (
    INK,
    TEACHERS,
    WIDTH,
    add_legend,
    add_note,
    are_many,
    by_system,
    count_of,
    family_of,
    plain_numbers,
    styled,
    styles_of,
)
from ensdistill.files import read_csv
from ensdistill.systems import Students

TITLE = "Learning curves"
READS = {"teachers": "{pool}/history.csv", "students": "{students}/history.csv"}

PANELS = {
    "loss": "Training loss (nats)",
    "cross_entropy": "Training cross-entropy (nats)",
    "accuracy": "Training accuracy (%)",
    "learning_rate": "Learning rate",
    "val_nll": "Validation NLL (nats)",
    "val_accuracy": "Validation accuracy (%)",
}


def table(teachers: Sequence[str], students: Students) -> pd.DataFrame:
    """The histories of all networks in one table: system, replicate, and a history's columns.

    Args:
        teachers: histories of the pool, the system `teacher`.
        students: histories by label, one per seed.
    """
    tables = []
    for label, group in {"teacher": teachers, **students}.items():
        for replicate, path in enumerate(group):
            table = read_csv(path).assign(system=label, replicate=replicate)
            tables += [table] if len(table) else []  # none of what was trained elsewhere
    joined = pd.concat(tables, ignore_index=True)
    who = ["system", "replicate"]
    return joined[who + [column for column in joined if column not in who]]


@styled
def draw(frame: pd.DataFrame) -> Figure:
    """Training and validation by epoch: losses (nats), accuracies (%), and the learning rate.

    Mean (line) and range (band) over a system's networks; only validated epochs are joined. Of many
    systems no bands, and one colour for a family.
    """
    columns = [*dict.fromkeys([*frame, *PANELS])]  # a panel without values is empty
    runs = frame.reindex(columns=columns).replace({"system": {"teacher": TEACHERS}})
    systems = by_system(runs, "system")
    styles = {name: {"color": x["color"], "ls": x["ls"]} for name, x in styles_of(systems).items()}
    many, last = are_many(systems), runs["epoch"].max()
    named = {family_of(name) if many else name: styles[name] for name in systems}
    height = (5 if many else 3.5) + 0.12 * (len(named) // 4)
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.subplots(2, 3)
    for axis, (key, title) in zip(axes.flat, PANELS.items(), strict=True):
        first = runs["epoch"][runs[key].notna()].min()
        # Where only late epochs are validated, they get the whole width.
        left = first - 0.5 if first > last / 2 else 0
        axis.set(title=title, xlim=(left, last + 0.02 * (last - left)))
        axis.xaxis.set_major_locator(ticker.MaxNLocator(4, integer=True, steps=[1, 2, 5, 10]))
        if key == "learning_rate":
            _draw_schedules(axis, systems)
            continue
        late = []
        for name, run in systems.items():
            # A method without a label term has no cross-entropy or accuracy in training.
            values = run.pivot_table(index="epoch", columns="replicate", values=key)
            low, high, colour = values.min(axis=1), values.max(axis=1), styles[name]["color"]
            late += [*low[low.index > last / 4], *high[high.index > last / 4]]
            if not many:
                axis.fill_between(values.index, low, high, color=colour, alpha=0.15, lw=0)
            marker = "." if len(values) < 3 else ""
            line = styles[name] | {"marker": marker, "lw": 0.6 if many else None}
            axis.plot(values.index, values.mean(axis=1), **line)
        if not late:
            continue
        if "accuracy" in key:  # the first epochs would flatten all that follows
            margin = 0.05 * (max(late) - min(late)) or 1
            axis.set_ylim(min(late) - margin, max(late) + margin)
        elif (runs[key] < 0).any():  # a likelihood of logits has densities above 1
            axis.set_yscale("symlog", linthresh=1)
            axis.yaxis.set_major_formatter("{x:g}")
        else:
            axis.set_yscale("log")
            plain_numbers(axis.yaxis)
    for axis in axes[-1]:
        axis.set_xlabel("Epoch")
    add_legend(figure, [Line2D([], [], lw=1.5, label=name, **named[name]) for name in named])
    counts = {name: run["replicate"].nunique() for name, run in systems.items()}
    teachers = [count_of([counts.pop(TEACHERS)], "teacher")] if TEACHERS in counts else []
    students = [count_of(counts.values(), "student") + " per method"] if counts else []
    shown = "Mean" if many else "Mean (line) and range (band)"
    note = "" if teachers else " The teachers were trained elsewhere."
    note += " A colour for all whose name begins alike, up to a + or a comma." if many else ""
    add_note(figure, f"{shown} of n = {' and '.join(teachers + students)}.{note}")
    return figure


def _draw_schedules(axis: Axes, systems: dict[str, pd.DataFrame]) -> None:
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
