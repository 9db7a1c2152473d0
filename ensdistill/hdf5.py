"""HDF5 files that are whole or not there at all, and hold all that they show.

Nothing here changes a number, so this module is no part of any stage's code digest.
"""

import fcntl
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from math import prod
from typing import Any

import h5py
import numpy as np
from numpy.typing import ArrayLike, NDArray

from ensdistill import InputError
from ensdistill.files import PatientFile, atomic, check_memory, raise_noted, reading
from ensdistill.locks import try_lock

PATIENCE = 10
"""Seconds to wait for another program that has a file open for writing."""
CHECKSUM = 4
"""Bytes of the checksum of a chunk."""
CHUNK = 2**17
"""Bytes of a chunk of a streamed array, unless one row has more."""
BLOCK = 1 << 26
"""Bytes of an array that is written block by block."""

_complete: set[tuple[int, ...]] = set()  # HDF5 files that hold all that they show


@dataclass
class Blocks:
    """An array that is not in memory as a whole.

    Args:
        parts: its rows, block after block; taken once.
        shape: of all of it; the first axis may come out shorter.
    """

    parts: Iterator[NDArray[Any]]
    shape: tuple[int, ...]


def in_blocks(parts: Iterable[ArrayLike], most: int) -> NDArray[Any] | Blocks:
    """An array of at most so many rows, of which `parts` has some at a time.

    Returns:
        The array where it has at most `BLOCK` bytes, else blocks of it, of about that size.
    """
    blocks = _joined(map(np.asarray, parts))
    first = next(blocks)
    if first.nbytes <= BLOCK:
        return first
    return Blocks(chain([first], blocks), (most, *first.shape[1:]))


def _joined(parts: Iterable[NDArray[Any]]) -> Iterator[NDArray[Any]]:
    waiting: list[NDArray[Any]] = []
    for part in parts:
        waiting.append(part)
        if sum(it.nbytes for it in waiting) > BLOCK:
            yield np.concatenate(waiting)
            waiting = []
    if waiting:
        yield np.concatenate(waiting)


@dataclass(frozen=True)
class Streamed:
    """An array of bytes (uint8) that is written part by part, in any order; see `write_hdf5`.

    It is stored in chunks of whole rows, with checksums, but not compressed: photographs are noise.
    """

    shape: tuple[int, ...]
    parts: Callable[[], Iterator[tuple[int | slice, NDArray[np.uint8]]]]
    """Places along the first axis, and what belongs there; together all of the array."""
    attributes: Mapping[str, Any] = field(default_factory=dict)

    def write(self, file: h5py.File, name: str, check: Callable[[], None]) -> None:
        rows = max(1, CHUNK // max(1, prod(self.shape[1:])))
        chunks = (min(rows, self.shape[0]), *self.shape[1:])
        dataset = file.create_dataset(name, self.shape, "uint8", chunks=chunks, fletcher32=True)
        dataset.attrs.update(self.attributes)
        for place, part in self.parts():
            dataset[place] = part
            check()


Stored = ArrayLike | Blocks | Streamed


def write_hdf5(
    path: str | os.PathLike[str],
    arrays: Mapping[str, Stored] | Iterable[tuple[str, Stored]],
    attributes: Mapping[str, Any],
    last: Callable[[], Mapping[str, Any]] = dict,
) -> None:
    """Write arrays by name ("test/logits"), chunked and checksummed, with attributes.

    Integers are compressed. Floats are not: logits would be a seventh smaller, but take three times
    as long to read.
    Nested attributes are stored as JSON. Pairs are taken one by one, and streamed arrays by their
    parts: not all need be in memory. `last` gives attributes that are known only then.
    """
    with atomic(path) as temporary, PatientFile(temporary, "w+") as disk:
        with h5py.File(disk, "w") as file:
            _set_attributes(file, attributes)
            for name, array in arrays.items() if isinstance(arrays, Mapping) else arrays:
                if isinstance(array, Streamed):
                    array.write(file, name, partial(disk.check, path))
                elif isinstance(array, Blocks):
                    _write_blocks(file, name, array)
                else:
                    file.create_dataset(name, data=array, **_form(np.asarray(array).dtype))
                disk.check(path)
            _set_attributes(file, last())
        disk.check(path)


def _form(dtype: np.dtype) -> dict[str, Any]:
    """How arrays of a type are stored."""
    packed = {} if dtype.kind == "f" else {"compression": "gzip", "shuffle": True}
    return {"chunks": True, "fletcher32": True, **packed}


def _write_blocks(file: h5py.File, name: str, array: Blocks) -> None:
    start, written = 0, None
    for part in array.parts:
        if written is None:
            facts = {"shape": array.shape, "maxshape": array.shape, "dtype": part.dtype}
            written = file.create_dataset(name, **facts, **_form(part.dtype))
        written[start : start + len(part)] = part
        start += len(part)
    assert written is not None, "there is always a part"
    written.resize(start, 0)


def _set_attributes(file: h5py.File, attributes: Mapping[str, Any]) -> None:
    for key, value in attributes.items():
        plain = isinstance(value, str | int | float)
        file.attrs[key] = value if plain else json.dumps(value, default=str)


@contextmanager
def open_hdf5(path: str | os.PathLike[str]) -> Iterator[h5py.File]:
    """Open an HDF5 file for reading.

    Raises:
        InputError: the file is missing, the system cannot read it, or another program has it open
            for writing.
        MemoryError: the memory is full.
        DamagedFile: it is damaged, shows what is not stored in it, or lacks what is read inside
            the block.
    """
    with reading(path, "what it should be", partial(_is_damage, path)) as disk:
        _wait_for_writer(path, disk)
        known = os.fstat(disk.fileno())
        identity = known.st_dev, known.st_ino, known.st_size, known.st_mtime_ns
        with h5py.File(disk, "r") as file:
            if identity not in _complete:  # of many splits each is read by itself
                _check_stored(file)
                _complete.add(identity)
            yield file


def _wait_for_writer(path: str | os.PathLike[str], disk: PatientFile) -> None:
    """Keep others from writing in a file that is read, as HDF5 does with files that it opens.

    Raises:
        InputError: another program has it open for writing, and does not close it.
    """
    if os.environ.get("HDF5_USE_FILE_LOCKING", "").upper() in ("FALSE", "0"):  # HDF5's own switch
        return
    deadline = time.monotonic() + PATIENCE
    while try_lock(disk, fcntl.LOCK_SH) is False:
        if time.monotonic() > deadline:
            raise InputError(
                f"{path}: another program, perhaps a notebook, has it open for writing; "
                "close it there and run again"
            )
        time.sleep(0.1)


def _is_damage(path: str | os.PathLike[str], error: Exception) -> bool:
    """Whether an error while an HDF5 file was open is about what stands in it."""
    place = error.__traceback__
    while place and place.tb_next:
        place = place.tb_next
    raised_by = place.tb_frame.f_globals["__name__"].partition(".")[0] if place else ""
    if raised_by == "h5py" and not isinstance(error, KeyError) and _is_whole(path):
        if isinstance(error, OSError):  # not of the system, nor of another program, as noted
            raise MemoryError(str(error)) from error
        raise InputError(f"{path}: not what it should be ({error}); delete it to make it again")
    return raised_by in ("h5py", "json") or isinstance(error, _NotStoredError)


def _is_whole(path: str | os.PathLike[str]) -> bool:
    """Read all of an HDF5 file again, in small parts.

    HDF5 says "filter returned failure" of a wrong checksum, and of too little memory.
    """
    with PatientFile(path) as disk:
        try:
            with h5py.File(disk, "r") as file:
                names = ["/"]
                file.visit(names.append)
                for item in map(file.get, names):
                    dict(item.attrs)
                    if isinstance(item, h5py.Dataset):
                        for part in item.iter_chunks() if item.chunks else [()]:
                            item[part]
        except Exception as error:
            raise_noted(path, disk)
            check_memory(error)
            return False
    return True


class _NotStoredError(ValueError):
    """An HDF5 file shows what does not stand in it."""


def _check_stored(file: h5py.File) -> None:
    """Refuse links, the data of other files, and values that would be made up on reading.

    Raises:
        _NotStoredError: there are such.
    """

    def fault(name: str) -> str | None:
        if not isinstance(file.get(name, getlink=True), h5py.HardLink):
            return f"the link {name!r} leads elsewhere"
        dataset = file[name]
        if isinstance(dataset, h5py.Group):
            return None
        if not isinstance(dataset, h5py.Dataset):
            return f"{name!r} is a type without data"
        if dataset.external or dataset.is_virtual:
            return f"the data of {name!r} are in another file"
        if dataset.chunks:
            whole = _has_all_chunks(dataset, file.id.get_filesize())
        else:
            whole = dataset.id.get_storage_size() == dataset.nbytes
        sound = whole and not dataset.dtype.hasobject
        return None if sound else f"of {name!r} {dataset.shape} not all is stored"

    names: list[str] = []
    file.visit_links(names.append)  # what fails within a visit is no OSError
    if found := next(filter(None, map(fault, names)), None):
        raise _NotStoredError(found)


def _has_all_chunks(dataset: h5py.Dataset, end: int) -> bool:
    """Whether all chunks of an array lie in the file, none shorter than its checksum.

    HDF5 believes what is said of a chunk, and would read beyond the end of such a short one.

    Args:
        end: bytes of the file.
    """
    parts: list[Any] = []
    dataset.id.chunk_iter(parts.append)
    needed = prod(
        -(-side // part) for side, part in zip(dataset.shape, dataset.chunks, strict=True)
    )
    least = CHECKSUM if dataset.fletcher32 else 0
    inside = all(it.size > least and it.byte_offset + it.size <= end for it in parts)
    return inside and len({it.chunk_offset for it in parts}) == len(parts) == needed
