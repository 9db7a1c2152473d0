"""Reading folders and archives entry by entry, without ever unpacking anything.

Nothing that an archive announces is believed: sizes are checked before memory is taken for them.
"""

import errno
import lzma
import os
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, Literal, Self
from unicodedata import normalize

from ensdistill import InputError

SPLITS = {"train", "test"}
PACKED = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".zip")
"""Endings of archives that are read."""
TABLES = (".csv", ".parquet")
"""Endings of tables of paths that are read."""
UNPACKED_BY_THE_PIECE = {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}
"""Compressions of which zipfile unpacks no more than the size that a member states."""
OTHER_PACKERS = {zipfile.ZIP_BZIP2: "bzip2", zipfile.ZIP_LZMA: "lzma"}
LARGEST = 2**28
"""Bytes of a file that is read as an image; as many has the largest that Pillow takes for one."""
LONGEST = 2**20
"""Bytes of a header of a tar archive."""


@dataclass(frozen=True)
class Entry:
    """Something in a folder or archive."""

    root: Path
    """The folder or archive."""
    place: str
    """Its whole name, for messages."""
    parts: tuple[str, ...]
    """Its path below the folder or in the archive, as `path_parts` gives it."""
    kind: Literal["file", "folder", "link", "special"]
    """`link`: one that leads nowhere, or any in an archive, where links are not followed;
    `special`: a device, a pipe, or a link to a folder that it is in."""
    size: int = 0
    """Bytes."""
    modified: int = 0
    """Nanoseconds since 1970, in folders."""
    open: Callable[[], Any] | None = None
    """Opens it to read bytes, for files."""

    def read(self, most: int | None = None) -> bytes:
        """Its first bytes, at most so many, or all.

        Raises:
            InputError: it cannot be read, or it is too large to be an image.
        """
        if most is None and self.size > LARGEST:
            raise InputError(
                f"{self.place}: has {self.size:,} bytes; images have at most {LARGEST:,}"
            )
        assert self.open, "only files are read"
        with _refusing(self.place if self.root.is_dir() else self.root), self.open() as file:
            return file.read(self.size if most is None else most)


def entries(root: Path) -> Iterator[Entry]:
    """All that is in a folder or an archive, in order of names in a folder.

    Archives are read from front to back: in a compressed tar every step back starts anew. An entry
    of an archive can be read until the next one is asked for.

    Raises:
        InputError: there is no such folder or archive, or it cannot be read to its end.
    """
    if not root.exists():
        raise InputError(f"{root}: no such folder or archive")
    with _refusing(root):
        if root.is_dir():
            status, name = root.stat(), root.absolute().name
            named = name in SPLITS and not any((root / split).is_dir() for split in SPLITS)
            around = frozenset([(status.st_dev, status.st_ino)])
            yield from _in_folder(root, str(root), f"{name}/" if named else "", around)
        elif zipfile.is_zipfile(root):
            yield from _in_zip(root)
        else:
            yield from _in_tar(root)


@contextmanager
def _refusing(place: str | Path) -> Iterator[None]:
    """Tell what cannot be read in one sentence."""
    try:
        yield
    except (
        tarfile.TarError,
        zipfile.BadZipFile,
        zlib.error,
        lzma.LZMAError,
        EOFError,
        OSError,
        RuntimeError,  # a zip archive with a password
        ValueError,  # of a tar header that is no number
        OverflowError,
    ) as error:
        if isinstance(error, OSError) and error.strerror and error.filename:
            raise InputError(f"{error.filename}: {error.strerror}") from error
        reason = str(error).partition(":\n")[0]
        raise InputError(f"{place}: not a whole tar or zip archive ({reason})") from error


def path_parts(name: str) -> tuple[str, ...]:
    r"""The parts of a path, as unpacking would give them: without `/` in front, `.` and `..`.

    Some programs for Windows separate them by `\`, so where a split's name appears only then, they
    are separated there. Letters with accents, which macOS writes as two signs, become one sign.

    >>> path_parts("./data/train/a/0.png"), path_parts("own\\train\\a\\0.png")
    (('data', 'train', 'a', '0.png'), ('own', 'train', 'a', '0.png'))
    """
    parts = name.split("/")
    if "\\" in name and not SPLITS & set(parts):
        parts = name.replace("\\", "/").split("/")
    return tuple(normalize("NFC", part) for part in parts if part not in ("", ".", ".."))


def is_hidden(name: str) -> bool:
    """Whether a file or folder is one that programs put beside the user's: .DS_Store, __MACOSX."""
    return name.startswith(".") or name in ("__MACOSX", "@eaDir")


def _in_folder(root: Path, folder: str, below: str, around: frozenset) -> Iterator[Entry]:
    """Entries of a folder; hidden folders are named, but not entered.

    Args:
        below: the folder's path below the root, with `/` at its end.
        around: device and inode of the folder and of those that it is in.
    """
    with os.scandir(folder) as found:
        items = sorted(found, key=lambda item: item.name)
    for item in items:
        place, parts = item.path, path_parts(below + item.name)
        try:
            status = item.stat()
        except OSError as error:
            if not item.is_symlink() or error.errno not in (errno.ENOENT, errno.ELOOP):
                raise
            yield Entry(root, place, parts, "link")
            continue
        inode = status.st_dev, status.st_ino
        if stat.S_ISREG(status.st_mode):
            opened = partial(open, place, "rb")
            yield Entry(root, place, parts, "file", status.st_size, status.st_mtime_ns, opened)
        elif not stat.S_ISDIR(status.st_mode) or inode in around:
            yield Entry(root, place, parts, "special")
        else:
            yield Entry(root, place, parts, "folder")
            if not is_hidden(item.name):
                yield from _in_folder(root, place, f"{below}{item.name}/", around | {inode})


def _in_zip(root: Path) -> Iterator[Entry]:
    with zipfile.ZipFile(root) as archive:
        members = archive.infolist()
        # Of two archives in one file zipfile sees the last one only.
        with root.open("rb") as file:
            begins = file.read(4) == b"PK\x03\x04"
        if begins and members and min(member.header_offset for member in members) > 0:
            raise zipfile.BadZipFile("something is in front of it: two archives in one file?")

        def opened(member: zipfile.ZipInfo) -> IO[bytes]:
            if (kind := member.compress_type) not in UNPACKED_BY_THE_PIECE:
                method = OTHER_PACKERS.get(kind, f"by method {kind}")
                raise zipfile.BadZipFile(f"{member.filename} is not deflated, but {method}")
            return archive.open(member)

        for member in members:
            place, parts = f"{root}/{member.filename}", path_parts(member.filename)
            if stat.S_ISLNK(member.external_attr >> 16):
                yield Entry(root, place, parts, "link")
            elif member.filename.endswith(("/", "\\")):
                yield Entry(root, place, parts, "folder")
            else:
                reader = partial(opened, member)
                yield Entry(root, place, parts, "file", member.file_size, open=reader)


def _in_tar(root: Path) -> Iterator[Entry]:
    with _Tar.open(root, tarinfo=_Member) as archive:
        while True:
            while member := archive.next():
                archive.members, archive.pax_headers = [], {}  # tarfile would keep them all
                if archive.offset <= member.offset:
                    raise tarfile.ReadError("a member ends before it begins")
                place, parts = f"{root}/{member.name}", path_parts(member.name)
                if member.isfile():
                    reader = partial(archive.extractfile, member)
                    yield Entry(root, place, parts, "file", member.size, open=reader)
                elif member.isdir():
                    yield Entry(root, place, parts, "folder")
                else:
                    link = member.islnk() or member.issym()
                    yield Entry(root, place, parts, "link" if link else "special")
            if not _goes_on(archive):
                return


class _Tar(tarfile.TarFile):
    members: list[tarfile.TarInfo]
    """An attribute that its types lack."""


class _Member(tarfile.TarInfo):
    """A tar header, refused where tarfile would read all that it announces, however much."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        made = super().frombuf(buf, encoding, errors)
        if made.size < 0 or (made.size > LONGEST and not made.isfile()):
            raise tarfile.ReadError(
                f"a header of {made.size:,} bytes; at most {LONGEST:,} are read"
            )
        if made.type == tarfile.GNUTYPE_SPARSE:
            made._proc_gnusparse_10()
        return made

    def _proc_gnusparse_10(self, *_: Any) -> None:
        raise tarfile.ReadError("it holds a sparse file")


def _goes_on(archive: tarfile.TarFile) -> bool:
    """Whether another tar follows the end of this one, as `cat 1.tar 2.tar` makes it.

    If so, the archive is placed at its first header. The file is read to its end, so that the
    checksum of what was compressed is verified.

    Raises:
        tarfile.ReadError: the tar stops between two members, which tarfile takes for its end.
    """
    stream, empty = archive.fileobj, bytes(tarfile.BLOCKSIZE)
    stream.seek(archive.offset)
    if stream.read(tarfile.BLOCKSIZE) != empty:
        raise tarfile.ReadError("its end is missing")
    offset = archive.offset + tarfile.BLOCKSIZE
    while block := stream.read(tarfile.BLOCKSIZE):
        if block != empty[: len(block)]:
            archive.offset = offset
            return True
        offset += len(block)
    return False
