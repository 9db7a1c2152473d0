"""What made a file, and files that are whole or not there at all.

Nothing here changes a number, so this module is no part of any stage's code digest.
"""

import ast
import glob
import hashlib
import io
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib.metadata import version
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h5py
from numpy.typing import ArrayLike

from ensdistill import DamagedFile, InputError, __version__

if TYPE_CHECKING:
    import pandas

PACKAGE = Path(__file__).parent
UNCOUNTED = {"ensdistill", "ensdistill.provenance", "ensdistill.jobs", "ensdistill.state"}
"""Modules that say what ran, how it failed and goes on, but do not change what is computed."""


@contextmanager
def atomic(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path`; renamed to it on success, removed on failure.

    The temporary name keeps the ending, by which many writers choose their format. What is renamed
    is on the disk: a power failure leaves the old file or the new one.

    Raises:
        OSError: the disk is full, whatever the writer made of that.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{path.name}-"
    for left in path.parent.glob(f"{glob.escape(prefix)}????????{glob.escape(path.suffix)}"):
        left.unlink(missing_ok=True)  # by a process that was killed
    handle, name = tempfile.mkstemp(prefix=prefix, suffix=path.suffix, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        os.chmod(temporary, 0o666 & ~_umask())
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except InputError:
        raise
    except Exception as error:
        _check_space(path, error)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def _check_space(path: Path, error: Exception) -> None:
    """Libraries report a full disk or quota in many ways: ask the disk itself."""
    try:
        with tempfile.TemporaryFile(dir=path.parent) as file:
            file.write(bytes(1 << 20))
    except OSError as full:
        raise OSError(full.errno, full.strerror, str(path)) from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a whole text file, or nothing."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_csv(path: str | os.PathLike[str], frame: "pandas.DataFrame") -> None:
    """Write a whole table at full precision, or nothing."""
    with atomic(path) as temporary:
        frame.to_csv(temporary, index=False)


def read_csv(path: str | os.PathLike[str], **options: Any) -> "pandas.DataFrame":
    """Read a table; `options` are those of pandas.

    Raises:
        DamagedFile: it is none.
    """
    import pandas

    try:
        return pandas.read_csv(path, **options)
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise DamagedFile(path, f"damaged, or no table ({reason})") from error


def attributes(**known: Any) -> dict[str, Any]:
    """What a result file says of itself: `known`, their digest, and the versions that made it."""
    canonical = json.dumps(known, sort_keys=True, default=str)
    return {
        **known,
        "digest": hashlib.sha256(canonical.encode()).hexdigest(),
        "ensdistill": __version__,
        "torch": version("torch"),
    }


def write_hdf5(
    path: str | os.PathLike[str],
    arrays: Mapping[str, ArrayLike] | Iterable[tuple[str, ArrayLike]],
    attributes: Mapping[str, Any],
) -> None:
    """Write arrays by name ("test/logits"), chunked, compressed and checksummed, with attributes.

    Nested attributes are stored as JSON. Pairs are taken one by one: not all need be in memory.
    """
    with atomic(path) as temporary, _PatientFile(temporary, "w+") as disk:
        with h5py.File(disk, "w") as file:
            for key, value in attributes.items():
                plain = isinstance(value, str | int | float)
                file.attrs[key] = value if plain else json.dumps(value, default=str)
            for name, array in arrays.items() if isinstance(arrays, Mapping) else arrays:
                file.create_dataset(
                    name, data=array, chunks=True, compression="gzip", shuffle=True, fletcher32=True
                )
                disk.check(path)
        disk.check(path)


class _PatientFile(io.FileIO):
    """A file that tells of a failed write when asked: HDF5 crashes if a write fails."""

    failure: OSError | None = None

    def write(self, data: Any) -> int:
        rest = memoryview(data)
        while rest and not self.failure:
            try:
                rest = rest[super().write(rest) :]
            except OSError as error:
                self.failure = error
        return len(data)

    def check(self, path: str | os.PathLike[str]) -> None:
        if self.failure:
            raise OSError(self.failure.errno, self.failure.strerror, str(path))


@contextmanager
def open_hdf5(path: str | os.PathLike[str]) -> Iterator[h5py.File]:
    """Open an HDF5 file for reading.

    Raises:
        InputError: the file is missing.
        DamagedFile: it is damaged, shows what is not stored in it, or lacks what is read inside
            the block.
    """
    if not os.path.exists(path):
        raise InputError(f"{path}: no such file")
    try:
        known = os.stat(path)
        with h5py.File(path) as file:
            _check_stored(path, known.st_ino, known.st_size, known.st_mtime_ns)
            yield file
    except PermissionError:
        raise
    except (OSError, KeyError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).strip("'\"").split())
        raise DamagedFile(path, f"damaged or not what it should be ({reason})") from error


@cache  # of many splits each is read by itself
def _check_stored(path: str | os.PathLike[str], *_: int) -> None:
    """Refuse links, the data of other files, and values that would be made up on reading."""

    def fault(name: str) -> str | None:
        if not isinstance(file.get(name, getlink=True), h5py.HardLink):
            return f"the link {name!r} leads elsewhere"
        dataset = file[name]
        if not isinstance(dataset, h5py.Dataset):
            return None
        if dataset.external or dataset.is_virtual:
            return f"the data of {name!r} are in another file"
        if dataset.chunks:
            pairs = zip(dataset.shape, dataset.chunks, strict=True)
            whole = dataset.id.get_num_chunks() == prod(-(-side // part) for side, part in pairs)
        else:
            whole = dataset.id.get_storage_size() == dataset.nbytes
        sound = whole and not dataset.dtype.hasobject
        return None if sound else f"of {name!r} {dataset.shape} not all is stored"

    with h5py.File(path) as file:
        names: list[str] = []
        file.visit_links(names.append)  # what fails within a visit is no OSError
        if found := next(filter(None, map(fault, names)), None):
            raise ValueError(found)


def code_digest(script: str | os.PathLike[str], function: str | None = None) -> str:
    """A digest of a script and the library code it can reach, blind to comments and docstrings.

    Followed are the names that a definition mentions, from the script's imports through this
    package, so that a changed formula reruns just the stages that use it.

    Args:
        script: a Python file that imports from `ensdistill`.
        function: the one that the script takes by name from a module.
    """
    root = _Module(Path(script))
    reached: dict[tuple[str, str], str] = {("", ""): ast.dump(root.tree)}
    modules: dict[str, _Module] = {}

    def module(name: str) -> _Module:
        if name not in modules:
            modules[name] = _Module(PACKAGE.joinpath(*name.split(".")[1:]).with_suffix(".py"))
        return modules[name]

    def follow(owner: _Module, nodes: list[ast.AST]) -> None:
        for name in _names(nodes) & owner.imports.keys():
            source, symbol = owner.imports[name]
            if source in UNCOUNTED:
                continue
            if symbol is not None:
                reach(source, symbol)
                continue
            # A whole module: what is named after a dot, or all of it if it stands alone.
            known = module(source).definitions.keys()
            parts = [part for node in nodes for part in ast.walk(node)]
            alone = sum(isinstance(part, ast.Name) and part.id == name for part in parts)
            dotted = [
                part.attr
                for part in parts
                if isinstance(part, ast.Attribute)
                and isinstance(part.value, ast.Name)
                and part.value.id == name
            ]
            whole = {function} if function and owner is root else known
            for used in whole if alone > len(dotted) else known & set(dotted):
                reach(source, used)

    def reach(name: str, symbol: str) -> None:
        if (name, symbol) in reached:
            return
        owner = module(name)
        if symbol in owner.imports and symbol not in owner.definitions:
            follow(owner, [ast.Name(symbol)])
            return
        nodes = owner.definitions[symbol]
        reached[name, symbol] = "\n".join(map(ast.dump, nodes))
        follow(owner, nodes)
        for used in _names(nodes) & owner.definitions.keys():
            reach(name, used)

    follow(root, root.tree.body)
    text = "\n".join(f"{key}{reached[key]}" for key in sorted(reached))
    return hashlib.sha256(text.encode()).hexdigest()


class _Module:
    """The parsed top level of a file: its definitions and its imports from this package."""

    def __init__(self, path: Path):
        self.tree = _parse(path.read_text(encoding="utf-8"))
        self.definitions: dict[str, list[ast.AST]] = {}
        self.imports: dict[str, tuple[str, str | None]] = {}
        for node in self.tree.body:
            for name in _defined_names(node):
                self.definitions.setdefault(name, []).append(node)
        for node in ast.walk(self.tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ensdistill"):
                for alias in node.names:
                    whole = PACKAGE.joinpath(f"{alias.name}.py").exists()
                    submodule = node.module == "ensdistill" and whole
                    source = f"ensdistill.{alias.name}" if submodule else node.module
                    self.imports[alias.asname or alias.name] = (
                        source,
                        None if submodule else alias.name,
                    )


def _names(nodes: list[ast.AST]) -> set[str]:
    """Every name that code mentions, alone or after a dot."""
    parts = [part for node in nodes for part in ast.walk(node)]
    return {
        part.id if isinstance(part, ast.Name) else part.attr
        for part in parts
        if isinstance(part, ast.Name | ast.Attribute)
    }


def _defined_names(node: ast.stmt) -> list[str]:
    """The names whose meaning a top-level statement decides."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [node.name]
    if isinstance(node, ast.Import | ast.ImportFrom):
        return []
    if isinstance(node, ast.Assign):
        targets = node.targets
    elif isinstance(node, ast.AnnAssign | ast.AugAssign):
        targets = [node.target]
    else:  # a loop, a condition, a call such as a registration: all that it names
        targets = [node]
    return [part.id for t in targets for part in ast.walk(t) if isinstance(part, ast.Name)]


@cache  # once, not for each script anew
def _parse(text: str) -> ast.Module:
    """Code without strings that stand alone: docstrings of modules, functions, constants."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [
                part
                for part in body
                if not (
                    isinstance(part, ast.Expr)
                    and isinstance(part.value, ast.Constant)
                    and isinstance(part.value.value, str)
                )
            ]
    return tree
