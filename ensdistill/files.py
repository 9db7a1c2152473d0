"""Files that are whole or not there at all, and what went wrong with others.

Nothing here changes a number, so this module is no part of any stage's code digest.
"""

import errno
import glob
import io
import os
import struct
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ensdistill import DamagedFile, InputError

if TYPE_CHECKING:
    import pandas

MEMORY_IS_FULL = (
    "can't allocate memory",  # PyTorch on a CPU
    "could not create a primitive",  # oneDNN
    "C error: out of memory",  # pandas
)
"""What libraries say of it without a MemoryError."""
ENOUGH = 1 << 26
"""Bytes: if so many are left, it is not for want of memory that a file cannot be read."""
HEAP = b"GCOL\1"
"""How a heap of texts begins in HDF5."""
SETTLED = 1
"""Seconds in which a file that nobody writes does not change."""


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
    # Else pandas before 3.1 reads the last digit as another one; later ones warn of the argument.
    old = tuple(map(int, pandas.__version__.split(".")[:2])) < (3, 1)
    exact: dict[str, Any] = {"float_precision": "round_trip"} if old else {}
    with reading(path, "a table", lambda error: isinstance(error, ValueError)) as file:
        content = io.BytesIO(file.read())
        return pandas.read_csv(
            content,
            dtype=text,
            keep_default_na=False,
            na_values=[""],
            **exact,
        )


class PatientFile(io.FileIO):
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
                self._note(error)
        return len(data)

    def readinto(self, buffer: Any) -> int:
        whole = rest = memoryview(buffer).cast("B")
        try:
            while rest and (count := super().readinto(rest)):
                rest = rest[count:]
            if whole[:5] == HEAP and not self._is_sound_heap(self.tell() - len(whole) + len(rest)):
                whole[:4] = bytes(4)  # so that HDF5 refuses it
        except BaseException as error:  # a signal's too: HDF5 would hide it
            self._note(error)
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
            self._note(error)
            raise

    def _note(self, error: BaseException) -> None:
        # The frames of a traceback hold what holds this file, in HDF5 where Python's collector does
        # not see it: HDF5 would close the file after Python's end, and crash.
        self.failure = self.failure or error.with_traceback(None)

    def check(self, path: str | os.PathLike[str]) -> None:
        """Raise what was noted of a write."""
        if isinstance(self.failure, OSError):
            raise OSError(self.failure.errno, self.failure.strerror, str(path))


@contextmanager
def reading(
    path: str | os.PathLike[str],
    what: str,
    about: Callable[[Exception], bool] = lambda error: True,
) -> Iterator[PatientFile]:
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
        file = PatientFile(path)
    except OSError as error:
        raise _unreadable(path, error) from None
    with file:
        try:
            yield file
        except Exception as error:
            raise_noted(path, file)
            if isinstance(error, InputError):
                raise
            check_memory(error)
            if not about(error):
                raise
            reason = " ".join(str(error).strip("'\"").split())
            raise DamagedFile(path, f"damaged, or not {what} ({reason})") from error
        raise_noted(path, file)


def check_memory(error: Exception) -> None:
    """Libraries report a full memory in many ways: ask for some."""
    if is_of_memory(error):
        raise MemoryError(str(error)) from error
    try:
        bytes(ENOUGH)
    except MemoryError:
        raise MemoryError(str(error)) from error


def raise_noted(path: str | os.PathLike[str], file: PatientFile) -> None:
    failure, file.failure = file.failure, None  # what is raised here has a traceback again
    if isinstance(failure, OSError):
        raise _unreadable(path, failure) from failure
    if failure:
        raise failure


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
