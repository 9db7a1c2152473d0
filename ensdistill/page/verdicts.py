"""Findings and claims at a glance: per question, how many verdicts there are of each kind."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ensdistill import DamagedFile
from ensdistill.claims_page import VERDICTS, with_interval

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Kind:
    """A table with verdicts, and how it is shown."""

    title: str
    file: str
    by: str
    """The column whose values are the groups."""
    signs: dict[str, str]
    """What a verdict may be: for, against, undecided; each with a sign that needs no colour."""
    cells: dict[str, Callable[[Mapping[str, Any]], str]]
    """Heads of columns, and what stands under them."""
    reads: tuple[str, ...]

    @property
    def columns(self) -> tuple[str, ...]:
        """All that the table must have."""
        return (self.by, "verdict", *self.reads)


@dataclass(frozen=True)
class Group:
    """A question or a claim, and its rows: cells, and the verdict."""

    title: str
    rows: list[tuple[list[str], str]]
    counts: dict[str, int]
    """Of its rows, by verdict, in the order of the kind's signs."""


def _interval(row: Mapping[str, Any]) -> str:
    return with_interval(row["estimate"], row["low"], row["high"])


def _p(row: Mapping[str, Any]) -> str:
    if np.isnan(row["p"]):
        return "–"
    return "<0.001" if row["p"] < 0.001 else f"{row['p']:.3f}"


def _count(key: str) -> Callable[[Mapping[str, Any]], str]:
    return lambda row: f"{int(row[key]):,}" if row[key] else "–"


ESTIMATE = "Estimate (95 % interval)"
MEASURED = ("quantity", "estimate", "low", "high", "n", "seeds")
NUMBERS = {"Images": _count("n"), "Seeds": _count("seeds")}

FINDINGS = Kind(
    "Findings of the bench",
    "findings.csv",
    "question",
    {"yes": "✓", "no": "✗", "undecided": "?"},
    {
        "Quantity": lambda row: row["quantity"],
        "Student": lambda row: row["system"] if isinstance(row["system"], str) else "–",
        ESTIMATE: _interval,
        "p (Holm)": _p,
        **NUMBERS,
    },
    (*MEASURED, "system", "p"),
)
CLAIMS = Kind(
    "Claims of Nam et al. (2021)",
    "claims.csv",
    "claim",
    VERDICTS,
    {
        "Quantity": lambda row: row["quantity"],
        "Claimed": lambda row: row["claimed"],
        ESTIMATE: _interval,
        **NUMBERS,
    },
    (*MEASURED, "claimed"),
)


def verdict_groups(folder: Path, kind: Kind, frame: "pd.DataFrame | None") -> list[Group]:
    """The groups of a table in its order; none if there is no table.

    Raises:
        DamagedFile: a verdict is unknown.
    """
    if frame is None:
        return []
    for verdict in frame["verdict"]:
        if verdict not in kind.signs:
            raise DamagedFile(folder / kind.file, f"unknown verdict {verdict!r}")
    return [
        Group(
            str(title),
            [
                ([text(row) for text in kind.cells.values()], row["verdict"])
                for _, row in rows.iterrows()
            ],
            {verdict: int((rows["verdict"] == verdict).sum()) for verdict in kind.signs},
        )
        for title, rows in frame.groupby(kind.by, sort=False)
    ]
