"""Files that are whole or not there at all: text, tables, HDF5.

Nothing here changes a number, so this module is no part of any stage's code digest.
"""

import errno
import fcntl
import glob
import io
import json
import os
import struct
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np
from numpy.typing import ArrayLike, NDArray

from ensdistill import DamagedFile, InputError
from ensdistill.locks import try_lock

if TYPE_CHECKING:
    import pandas

MEMORY_IS_FULL = (
    "can't allocate memory",  # PyTorch on a CPU
    "could not create a primitive",  # oneDNN
    "C error: out of memory",  # pandas
)
"""What libraries say of it without a MemoryError."""
PATIENCE = 10
"""Seconds to wait for another program that has a file open for writing."""
ENOUGH = 1 << 26
"""Bytes: if so many are left, it is not for want of memory that a file cannot be read."""
CHECKSUM = 4
"""Bytes of the checksum of a chunk."""
HEAP = b"GCOL\1"
"""How a heap of texts begins in HDF5."""
CHUNK = 2**17
"""Bytes of a chunk of a streamed array, unless one row has more."""
SETTLED = 1
"""Seconds in which a file that nobody writes does not change."""

BLOCK = 1 << 26
"""Bytes of an array that is written block by block."""

_complete: set[tuple[int, ...]] = set()  # HDF5 files that hold all that they show


@contextmanager
def atomic(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path`; renamed to it on success, removed on failure.

    The temporary name keeps the ending, by which many writers choose their format. What is renamed
    is on the disk: a power failure leaves the old file or the new one, and the new one once this
    has returned. So Snakemake never notes of a file what a power failure then takes back.

    Raises:
        OSError: the disk is full, whatever the writer made of that, or it cannot be written;
            `filename` is `path`.
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
        replace(temporary, path)
    except InputError:
        raise
    except Exception as error:
        _check_space(path, error)
        if isinstance(error, OSError) and error.filename in (None, name):  # fsync names no file
            error.filename = str(path)
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


def replace(finished: Path, path: Path) -> None:
    """Rename a finished file to `path`, in the same folder, so that no power failure undoes it.

    Raises:
        OSError: the disk is full, or it cannot be written.
    """
    _force(finished)
    os.replace(finished, path)
    with suppress(OSError):  # not every file system can do this to a folder
        _force(path.parent)


def _force(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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


def read_csv(path: str | os.PathLike[str]) -> "pandas.DataFrame":
    """Read one of our tables: the only way, for labels are the user's. Errors as in `reading`.

    What a system is called is text, even if it is 1 or NA; only an empty cell is no value.
    """
    import pandas

    text = {"name": str, "system": str}
    with reading(path, "a table", lambda error: isinstance(error, ValueError)) as file:
        content = io.BytesIO(file.read())
        return pandas.read_csv(
            content,
            dtype=text,
            keep_default_na=False,
            na_values=[""],
            float_precision="round_trip",  # else pandas 2 reads the last digit as another one
        )


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
    with atomic(path) as temporary, _PatientFile(temporary, "w+") as disk:
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


class _PatientFile(io.FileIO):
    """A file that notes what the system answered when it could not be read or written.

    Libraries hide that: HDF5 crashes if a write fails, others call the file damaged.
    """

    failure: BaseException | None = None

    def write(self, data: Any) -> int:
        rest = memoryview(data)
        while rest and not self.failure:
            try:
                rest = rest[super().write(rest) :]
            except OSError as error:
                self.failure = error
        return len(data)

    def readinto(self, buffer: Any) -> int:
        whole = rest = memoryview(buffer).cast("B")
        try:
            while rest and (count := super().readinto(rest)):
                rest = rest[count:]
            if whole[:5] == HEAP and not self._is_sound_heap(self.tell() - len(whole) + len(rest)):
                whole[:4] = bytes(4)  # so that HDF5 refuses it
        except BaseException as error:  # a signal's too: HDF5 would hide it
            self.failure = self.failure or error
            rest = whole
        rest[:] = bytes(len(rest))
        return len(whole) - len(rest)

    def _is_sound_heap(self, start: int) -> bool:
        """Whether the sizes in a heap, where HDF5 keeps texts of attributes, add up.

        HDF5 believes them: it may take gigabytes, or go round for ever. A file with lengths of
        other than eight bytes, which hardly any program writes, is not looked at.
        """
        file = self.fileno()
        head = os.pread(file, 15, 0)
        if head[14 if head[8] < 2 else 10] != 8:
            return True
        left = int.from_bytes(os.pread(file, 8, start + 8), "little")
        if start + left > os.fstat(file).st_size:
            return False
        place, left = start + 16, left - 16
        while left >= 16:
            number, length = struct.unpack("<H6xQ", os.pread(file, 16, place))
            # Number 0 is what is free; its length counts its head.
            step = 16 + -(-length // 8) * 8 if number else max(16, length)
            place, left = place + step, left - step
        return left >= 0

    def read(self, size: int | None = -1) -> bytes:
        try:
            return super().read(size)
        except OSError as error:
            self.failure = self.failure or error
            raise

    def check(self, path: str | os.PathLike[str]) -> None:
        """Raise what was noted of a write."""
        if isinstance(self.failure, OSError):
            raise OSError(self.failure.errno, self.failure.strerror, str(path))


@contextmanager
def reading(
    path: str | os.PathLike[str],
    what: str,
    about: Callable[[Exception], bool] = lambda error: True,
) -> Iterator[_PatientFile]:
    """Open a file, and call it damaged only if it is its content that cannot be understood.

    All reading must go through the file that is yielded: then what the system could not do (too
    many open files, an error of the disk, no memory) is told from what stands in the file.

    Args:
        path: the file.
        what: it should be, for the sentence.
        about: whether an error inside the block is about the content; all are unless told.

    Raises:
        InputError: the file is missing, or the system cannot read it.
        MemoryError: the memory is full.
        DamagedFile: the content is damaged, or not what it should be.
    """
    try:
        file = _PatientFile(path)
    except OSError as error:
        raise _unreadable(path, error) from None
    with file:
        try:
            yield file
        except Exception as error:
            _raise_noted(path, file)
            if isinstance(error, InputError):
                raise
            _check_memory(error)
            if not about(error):
                raise
            reason = " ".join(str(error).strip("'\"").split())
            raise DamagedFile(path, f"damaged, or not {what} ({reason})") from error
        _raise_noted(path, file)


def _check_memory(error: Exception) -> None:
    """Libraries report a full memory in many ways: ask for some."""
    if is_of_memory(error):
        raise MemoryError(str(error)) from error
    try:
        bytes(ENOUGH)
    except MemoryError:
        raise MemoryError(str(error)) from error


def _raise_noted(path: str | os.PathLike[str], file: _PatientFile) -> None:
    if isinstance(file.failure, OSError):
        raise _unreadable(path, file.failure) from file.failure
    if file.failure:
        raise file.failure


def _unreadable(path: str | os.PathLike[str], error: OSError) -> Exception:
    """What to raise if the system cannot read a file."""
    if is_of_memory(error):
        return MemoryError(error.strerror)
    if error.errno == errno.ENOENT:
        return InputError(f"{path}: no such file")
    return InputError(explain(OSError(error.errno, error.strerror, str(path))))


def is_of_memory(error: BaseException) -> bool:
    """Whether an error says that the memory is full, in the words of one of the libraries."""
    full = isinstance(error, OSError) and error.errno == errno.ENOMEM
    return full or isinstance(error, MemoryError) or any(it in str(error) for it in MEMORY_IS_FULL)


def explain(error: OSError) -> str:
    """One sentence about a file that the system could not read or write; `filename` says which."""
    advice = ""
    if error.errno in (errno.EMFILE, errno.ENFILE):
        advice = "; raise the limit (ulimit -n) or run fewer jobs at a time"
    return f"{error.filename}: {error.strerror}{advice}"


def set_aside(path: str | os.PathLike[str]) -> bool:
    """Rename a damaged file to `<path>.damaged`, so that it is made anew.

    Returns:
        False if it was left alone, because it is being written just now.

    Raises:
        OSError: it cannot be renamed.
    """
    before = os.stat(path)
    time.sleep(SETTLED)
    after = os.stat(path)
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        return False
    os.replace(path, f"{path}.damaged")
    return True


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


def _wait_for_writer(path: str | os.PathLike[str], disk: _PatientFile) -> None:
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
    with _PatientFile(path) as disk:
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
            _raise_noted(path, disk)
            _check_memory(error)
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
