"""The results table of the page: all metrics, and what a prediction costs."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import floor, log10
from typing import TYPE_CHECKING, Any

from ensdistill.markup import number
from ensdistill.metrics import METRICS
from ensdistill.tables import (
    ABSENT,
    are_students,
    cell_text,
    published_decimals,
    ranks,
    source_sentence,
)

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Column:
    """A column: how it is headed and explained."""

    title: str
    unit: str = ""
    better: int = 0
    meaning: str = ""
    extra: bool = False
    """Whether it is shown only where all metrics are asked for."""
    write: Callable[[float], str] = "{:,.0f}".format
    """Numbers as text, where the metric's decimals do not say it."""


@dataclass(frozen=True)
class Cell:
    """A number as text, and the number by which rows are sorted."""

    text: str
    spread: str | None = None
    """Its standard deviation, empty if it has none; None of what never has one."""
    value: float | None = None
    rank: int = 0
    """1 and 2 mark the best and second best student."""


@dataclass(frozen=True)
class System:
    """A row, and the published results that belong under it: a title, and texts by column."""

    name: str
    is_student: bool
    n: int
    cells: dict[str, Cell]
    published: dict[str, dict[str, str]]


@dataclass(frozen=True)
class Table:
    """Columns by their key in the CSV, and systems by name."""

    columns: dict[str, Column]
    systems: dict[str, System]
    source: str
    """Where published results stand, as a sentence; empty if there are none."""

    @property
    def spreads(self) -> list[int]:
        """Of every column the signs of its widest spread, so that means can stand in line."""
        rows = [system.cells for system in self.systems.values()]
        widest = {key: max(len(cells[key].spread or "") for cells in rows) for key in self.columns}
        return [width + 2 if width else 0 for width in widest.values()]


def short(value: float) -> str:
    """Three significant digits, in thousands, millions and so on.

    >>> short(0.01234), short(1234567), short(999.96), short(0.0)
    ('0.0123', '1.23 M', '1.00 k', '0')
    """
    if value == 0:
        return "0"
    digits = floor(log10(float(f"{abs(value):.2e}")))
    step = min(max(digits // 3, 0), 4)
    decimals = max(0, 2 - (digits - 3 * step))
    text = f"{value / 1000**step:.{decimals}f} {['', 'k', 'M', 'G', 'T'][step]}"
    return text.rstrip()


COSTS = {
    "parameters": Column("Parameters", meaning="numbers that are learned"),
    "passes": Column(
        "Passes",
        meaning="multiply–adds over those of one plain network of the same architecture",
        write="{:.3g}".format,
    ),
    "macs": Column("Mult–adds", meaning="multiply–adds, a prediction of an image", write=short),
    "ms_1": Column("Time", "ms, batch 1", meaning="a prediction of an image", write=short),
    "ms_128": Column("Time", "ms, batch 128", meaning="a prediction of an image", write=short),
}
"""What a system costs, by the column of the results table."""


def numbers_table(summary: "pd.DataFrame | None") -> Table | None:
    """The table of what `tables.summarize` gives, with those of `COSTS` that it has.

    Metrics that no system has are left out.
    """
    if summary is None:
        return None
    measured = {
        key: Column(it.title, it.unit, it.better, it.meaning, not it.in_table)
        for key, it in METRICS.items()
        if key in summary and summary[key].notna().any()
    }
    costs = {key: it for key, it in COSTS.items() if key in summary}
    rank = {key: ranks(summary, key) for key in measured}
    decimals = {key: published_decimals(summary, key) for key in measured}
    systems = {}
    index: Any
    for index, row in summary.iterrows():
        cells = {key: _cost(row[key], it) for key, it in costs.items()}
        cells |= {key: _measured(row, key, int(rank[key][index])) for key in measured}
        beside = (
            dict(_published(row, decimals)) if isinstance(row.get("published_source"), str) else {}
        )
        name = row["system"]
        is_student = bool(are_students(summary)[index])
        systems[name] = System(name, is_student, int(row["n"]), cells, beside)
    return Table(costs | measured, systems, source_sentence(summary))


def _measured(row: "pd.Series", key: str, rank: int) -> Cell:
    text, _, spread = cell_text(row, key).partition(" ± ")
    return Cell(text, spread, None if text == ABSENT else float(row[key]), rank)


def _cost(value: float, column: Column) -> Cell:
    return Cell(ABSENT) if value != value else Cell(column.write(value), value=float(value))


def _published(
    row: "pd.Series", decimals: Mapping[str, int]
) -> Iterator[tuple[str, dict[str, str]]]:
    for title, suffix, sign in (
        ("published", "published", ""),
        ("ours − published", "difference", "+"),
    ):
        values = {key: row.get(f"{key}_{suffix}", float("nan")) for key in decimals}
        yield title, {key: number(x, decimals[key], sign) for key, x in values.items() if x == x}
