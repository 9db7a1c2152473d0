"""The results: one file each, with the numbers (`table`), the figure (`draw`) and what they need.

A file of this folder is all that a result is, but for its caption report/<name>.rst. Rules are
made of what it says at its top, as plain literals, so that Snakemake need not import it:

- `READS`: which files `table` gets, by argument, in the study's folder. `{pool}`, `{ensemble}` and
  `{students}` stand for all teachers, those that teach, and all students; `{human}` for the archive
  of what people answered of the test images, if they were asked.
- `SETTINGS`: which settings of the study `table` gets; those that `settings_of` in rules/common.smk
  knows.
- `CHOSEN`: of registries that `table` and `draw` use by name, which entries; an entry more in them
  then leaves this result as it is.
- `DRAWN_FROM`: which files `draw` gets, tables as data frames; metrics/<name>.csv unless told.
- `TITLE`: of the figure, in the report.

The table that `draw` gets is called `frame`, not `table`: code digests follow names, and a changed
`table` alone does not draw a figure anew.
"""

import ast
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Result:
    """What a result's file says of itself."""

    name: str
    functions: frozenset[str]
    title: str
    reads: dict[str, str]
    settings: list[str]
    chosen: dict[str, tuple[str, ...]]
    drawn_from: list[str]

    @property
    def has_table(self) -> bool:
        """Whether it makes metrics/<name>.csv."""
        return "table" in self.functions

    @property
    def has_figure(self) -> bool:
        """Whether it makes figures/<name>.png and .pdf."""
        return "draw" in self.functions


def results(folder: Path = Path(__file__).parent) -> dict[str, Result]:
    """All results by name, in the order of the alphabet."""
    paths = [path for path in sorted(folder.glob("*.py")) if path.stem != "__init__"]
    return {path.stem: _read(path) for path in paths}


def _read(path: Path) -> Result:
    said: dict[str, Any] = {}
    functions = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef):
            functions.add(node.name)
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name = node.targets[0].id
            if name in ("TITLE", "READS", "SETTINGS", "CHOSEN", "DRAWN_FROM"):
                said[name] = ast.literal_eval(node.value)
    return Result(
        path.stem,
        frozenset(functions),
        said.get("TITLE", path.stem),
        said.get("READS", {}),
        said.get("SETTINGS", []),
        {registry: tuple(names) for registry, names in said.get("CHOSEN", {}).items()},
        said.get("DRAWN_FROM", [f"metrics/{path.stem}.csv"]),
    )
