"""The tables that the page reads, with the columns that it needs."""

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from ensdistill import DamagedFile
from ensdistill.files import read_csv

if TYPE_CHECKING:
    import pandas as pd


def read_columns(path: Path, columns: Collection[str]) -> "pd.DataFrame | None":
    """A table that has these columns, and rows; None if there is no such file.

    Raises:
        DamagedFile: it is damaged, lacks a column, or has no rows.
    """
    if not path.exists():
        return None
    frame = read_csv(path)
    for column in columns:
        if column not in frame:
            raise DamagedFile(path, f"lacks the column {column!r}")
    if frame.empty:
        raise DamagedFile(path, "has no rows")
    return frame
