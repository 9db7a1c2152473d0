"""Files that are whole or not there at all: text, tables, HDF5.

Nothing here changes a number, so this module is no part of any stage's code digest.
"""

import glob
import io
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h5py
from numpy.typing import ArrayLike

from ensdistill import DamagedFile, InputError

if TYPE_CHECKING:
    import pandas


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
