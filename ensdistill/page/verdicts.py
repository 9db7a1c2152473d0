"""Findings and claims at a glance: per question, how many verdicts there are of each kind."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ensdistill import DamagedFile
from ensdistill.verdict_pages import Kind

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Group:
    """A question or a claim, and its rows: cells, and the verdict."""

    title: str
    rows: list[tuple[list[str], str]]
    counts: dict[str, int]
    """Of its rows, by verdict, in the order of the kind's signs."""


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
