"""What stands in tables of paths (CSV, Parquet), and in datasets that `datasets` saved to disk."""

import csv
import os
import stat
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ensdistill import InputError
from ensdistill.archives import LARGEST, TABLES
from ensdistill.image_tables import Table

FOLDER_OF_PARTS, FOLDER_OF_ROWS = "dataset_dict.json", "state.json"
"""Files in the folders that `datasets` saves."""


def kind_of(path: Path) -> str | None:
    """The key of `READERS` of what a path is; None for folders and archives of images."""
    if path.suffix.lower() in TABLES:
        return path.suffix.lower()
    found = (path / name for name in (FOLDER_OF_PARTS, FOLDER_OF_ROWS))
    return "saved" if any(it.is_file() for it in found) else None


def _text(value: Any) -> str:
    return "" if value is None or value != value else str(value)  # NaN is not itself


# --- tables of paths -------------------------------------------------------------------------


def read_csv(path: Path, columns: Mapping[str, str], labelled: bool) -> Table:
    """A table of comma-separated values in UTF-8."""
    return _table_of_paths(path, *_cells_of_csv(path, columns, ["path", *["label"] * labelled]))


def read_parquet(path: Path, columns: Mapping[str, str], labelled: bool) -> Table:
    """A table in Apache Parquet's format; values that are no texts are written as such."""
    return _table_of_paths(path, *_cells_of_parquet(path, columns, ["path", *["label"] * labelled]))


def listed_files(path: Path, columns: Mapping[str, str | None] | None) -> list[str]:
    """The files that a table of paths lists, there or not; none if it cannot be read."""
    named = {role: name for role, name in (columns or {}).items() if name is not None}
    try:
        found, _ = CELLS[path.suffix.lower()](path, named, ["path"])
    except InputError:
        return []
    return [os.path.normpath(path.parent / name) for name in found["path"]]


Cells = tuple[dict[str, list[str]], Callable[[int], str]]
"""The columns of a table by role, and what messages call a row."""


def _cells_of_csv(path: Path, columns: Mapping[str, str], needed: Sequence[str]) -> Cells:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.reader(file, strict=True)
            header = next(rows, [])
            lines = [(rows.line_num, row) for row in rows if row]
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: not a table in CSV ({error})") from error
    for line, row in lines:
        if len(row) != len(header):
            raise InputError(f"{path}, line {line}: has {len(row)} cells, not {len(header)}")
    chosen = _chosen(path, header, columns, needed)
    found = {role: [row[header.index(it)] for _, row in lines] for role, it in chosen.items()}
    return found, lambda row: f"{path}, line {lines[row][0]}"


def _cells_of_parquet(path: Path, columns: Mapping[str, str], needed: Sequence[str]) -> Cells:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise InputError(f"{path}: needs PyArrow: pip install 'ensdistill[parquet]'") from None
    try:
        with path.open("rb") as file:
            stored = parquet.ParquetFile(file)
            chosen = _chosen(path, stored.schema_arrow.names, columns, needed)
            table = stored.read(columns=[*dict.fromkeys(chosen.values())])
        found = {role: list(map(_text, table[it].to_pylist())) for role, it in chosen.items()}
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from error
    except (ArrowException, ValueError) as error:  # names of columns that are no text
        raise InputError(f"{path}: not a table in Parquet ({error})") from error
    return found, lambda row: f"{path}, row {row + 1}"


CELLS = {".csv": _cells_of_csv, ".parquet": _cells_of_parquet}
"""By the ending of a table."""


def _chosen(
    path: Path, header: Sequence[str], columns: Mapping[str, str], needed: Sequence[str]
) -> dict[str, str]:
    """The columns by their role: path, label, split and group."""
    names = {role: columns.get(role, role) for role in ("path", "label", "split", "group")}
    for role, name in names.items():
        if name not in header and (role in needed or role in columns):
            have = ", ".join(map(repr, header)) or "none"
            raise InputError(f"{path}: has no column {name!r}; it has {have}")
        if header.count(name) > 1:
            raise InputError(f"{path}: has two columns {name!r}")
    return {role: name for role, name in names.items() if name in header}


def _table_of_paths(
    path: Path, found: Mapping[str, list[str]], place: Callable[[int], str]
) -> Table:
    folder, missing = path.parent, list[int]()
    first: dict[str, int] = {}
    files = [os.path.normpath(folder / name) for name in found["path"]]
    for row, (name, file) in enumerate(zip(found["path"], files, strict=True)):
        if not name.strip():
            raise InputError(f"{place(row)}: the path is empty")
        if (before := first.setdefault(file, row)) != row:
            raise InputError(f"{place(row)}: {name!r} is in {place(before)} too")
        try:
            status = os.stat(file)
        except (OSError, ValueError):  # no path has a zero in it
            missing.append(row)
            continue
        if not stat.S_ISREG(status.st_mode) or status.st_size > LARGEST:
            raise InputError(
                f"{place(row)}: {name!r} is no file, or has more than {LARGEST:,} bytes"
            )
    if missing:
        others = f", as are {len(missing) - 1:,} others" if missing[1:] else ""
        name = found["path"][missing[0]]
        raise InputError(f"{place(missing[0])}: the file {name!r} is not there{others}")

    def content(row: int) -> bytes:
        try:
            return Path(files[row]).read_bytes()
        except OSError as error:
            raise InputError(f"{files[row]}: {error.strerror}") from error

    return Table(
        found.get("label"),
        found.get("split"),
        found.get("group"),
        names=found["path"],
        place=place,
        image=files.__getitem__,
        content=content,
    )


# --- datasets of Hugging Face ----------------------------------------------------------------


def read_saved(path: Path, columns: Mapping[str, str], labelled: bool) -> Table:
    """A Dataset or DatasetDict that was saved by `save_to_disk`.

    The images are in the column that `columns` calls `path`, or else in the only one of feature
    Image. Labels are a ClassLabel, whose names and their order are kept, or texts or numbers.
    """
    try:
        import datasets
    except ImportError:
        raise InputError(f"{path}: needs datasets: pip install 'ensdistill[huggingface]'") from None
    try:
        loaded = datasets.load_from_disk(str(path))
        parts = dict(loaded) if isinstance(loaded, dict) else {"": loaded}
        for part in parts.values():
            part.data.validate(full=True)  # or a wrong offset would end the process
    except Exception as error:  # whatever its readers of damaged files raise
        reason = " ".join(str(error).split())
        raise InputError(f"{path}: not a dataset saved by save_to_disk ({reason})") from error
    tables = [
        _part_of_saved(f"{path}{f', {name}' if name else ''}", part, columns, labelled)
        for name, part in parts.items()
    ]
    if len({tuple(table.classes or ()) for table in tables}) > 1:
        raise InputError(f"{path}: its splits have different names of classes")
    if len({(table.splits is None, table.groups is None) for table in tables}) > 1:
        raise InputError(f"{path}: its splits have different columns")
    where = [(table, row) for table in tables for row in range(len(table.names))]

    def joined(role: str) -> list[str] | None:
        columns = [getattr(table, role) for table in tables]
        return None if None in columns else [value for column in columns for value in column]

    return Table(
        joined("labels"),
        [name for name, part in parts.items() for _ in range(len(part))]
        if isinstance(loaded, dict)
        else joined("splits"),
        joined("groups"),
        names=joined("names") or [],
        place=lambda row: where[row][0].place(where[row][1]),
        image=lambda row: where[row][0].place(where[row][1]),
        content=lambda row: where[row][0].content(where[row][1]),
        classes=tables[0].classes if tables else None,
    )


def _part_of_saved(where: str, part: Any, columns: Mapping[str, str], labelled: bool) -> Table:
    import datasets

    images = [it for it, kind in part.features.items() if isinstance(kind, datasets.Image)]
    if "path" not in columns and len(images) != 1:
        have = f"the columns {', '.join(map(repr, images))}" if images else "no column"
        raise InputError(f"{where}: has {have} of images; say in 'images.columns.path' which it is")
    known = {"path": images[0] if images else "", **columns}
    chosen = _chosen(Path(where), part.column_names, known, ["path", *["label"] * labelled])
    if chosen["path"] not in images:
        raise InputError(f"{where}: the column {chosen['path']!r} holds no images")
    kind = part.features.get(chosen.get("label"))
    names = kind.names if isinstance(kind, datasets.ClassLabel) else None
    if isinstance(kind, datasets.Value) and kind.dtype.startswith("float"):
        raise InputError(f"{where}: the labels in {chosen['label']!r} are no whole numbers")
    plain = part.with_format(None)
    found = {
        role: [_text(value) for value in plain[it]] for role, it in chosen.items() if role != "path"
    }
    if names and labelled:
        known = {str(number): name for number, name in enumerate(names)}
        found["label"] = [known.get(label, "") for label in found["label"]]
    files = plain.select_columns([chosen["path"]]).cast_column(
        chosen["path"], datasets.Image(decode=False)
    )

    def content(row: int) -> bytes:
        image = files[row][chosen["path"]]
        if image and image["bytes"]:
            return image["bytes"]
        try:
            return Path(image["path"]).read_bytes()
        except (OSError, TypeError):
            raise InputError(f"{place(row)}: the image is missing") from None

    def place(row: int) -> str:
        return f"{where}, row {row + 1}"

    return Table(
        found.get("label"),
        found.get("split"),
        found.get("group"),
        names=[f"{row:012}" for row in range(len(plain))],
        place=place,
        image=place,
        content=content,
        classes=names,
    )


READERS: dict[str, Callable[[Path, Mapping[str, str], bool], Table]] = {
    ".csv": read_csv,
    ".parquet": read_parquet,
    "saved": read_saved,
}
"""By kind of table."""
