"""Image sources: what each gives before a study splits it."""

import hashlib
import io
import json
import lzma
import os
import re
import stat
import tarfile
import tempfile
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from ensdistill import InputError
from ensdistill.downloads import verify

Split = tuple[NDArray[np.uint8], NDArray[np.int64]]
"""Images (N, C, H, W) and labels (N,)."""

PACKED = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".zip")
"""Endings of archives that a folder of your own images may hold."""
GREY_MODES = {"1", "L", "LA", "La"}
Image.init()
FORMATS = [name for name in Image.ID if name != "EPS"]
"""What Pillow reads by itself; to read PostScript it would run Ghostscript, that is, a program."""
LARGEST = 2**28
"""Bytes of a file that is read as an image; as many has the largest that Pillow takes for one."""
LONGEST = 2**20
"""Bytes of a header of a tar archive."""
MEMORY = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
PER_PIXEL = 10
"""Bytes that a pixel of a folder takes at most: in Pillow's pictures, and in two arrays."""


@dataclass(frozen=True)
class Dataset:
    """What a source gives: all its images, before a validation split is made."""

    train: Split
    test: Split
    classes: list[str]
    sha256: str
    """Of the files that were read, in whatever archives they came; of official archives, theirs."""
    official_validation: bool = False
    """Whether the last training images are the customary validation split."""


def digits(*, seed: int, test: int | None, **_: Any) -> Dataset:
    """1,797 handwritten digits, 8×8 grey, that ship with scikit-learn [Alpaydin & Kaynak 1998].

    They have no test split of their own: a third, or `test` images, is a stratified choice.
    """
    from sklearn.datasets import load_digits

    data = load_digits()
    images = np.round(data.images * (255 / 16)).astype(np.uint8)[:, None]
    labels = data.target.astype(np.int64)
    held_out = stratified(labels, test or len(labels) // 3, seed, "test")
    return Dataset(
        train=(images[~held_out], labels[~held_out]),
        test=(images[held_out], labels[held_out]),
        classes=[str(name) for name in data.target_names],
        sha256=hashlib.sha256(images.tobytes()).hexdigest(),
    )


def cifar(*, source: str, archives: Sequence[str], **_: Any) -> Dataset:
    """CIFAR-10 or CIFAR-100, 60,000 colour images of 32×32 [Krizhevsky 2009]."""
    from torchvision.datasets import CIFAR10, CIFAR100

    (archive,) = archives
    sha256 = verify(archive)
    cls = {"cifar10": CIFAR10, "cifar100": CIFAR100}[source]
    with tempfile.TemporaryDirectory() as unpacked:
        Path(unpacked, cls.filename).symlink_to(Path(archive).resolve())
        splits = [cls(unpacked, train=train, download=True) for train in (True, False)]
    train, test = (
        (data.data.transpose(0, 3, 1, 2), np.array(data.targets, dtype=np.int64)) for data in splits
    )
    return Dataset(train, test, list(splits[0].classes), sha256, True)


def svhn(*, archives: Sequence[str], **_: Any) -> Dataset:
    """SVHN, 99,289 house numbers cropped to one digit, in colour, 32×32 [Netzer et al. 2011].

    Without the easier `extra` images.
    """
    from torchvision.datasets import SVHN

    sha256 = " ".join(map(verify, archives))
    with tempfile.TemporaryDirectory() as links:
        splits = []
        for split, archive in zip(("train", "test"), archives, strict=True):
            Path(links, SVHN.split_list[split][1]).symlink_to(Path(archive).resolve())
            data = SVHN(links, split)
            splits.append((data.data, data.labels))
    return Dataset(*splits, [str(digit) for digit in range(10)], sha256)


def tinyimagenet(*, archives: Sequence[str], **_: Any) -> Dataset:
    """Tiny ImageNet, 110,000 colour images of 64×64 in 200 classes [Le & Yang 2015].

    The annotated validation images are the test split, since the test images have no labels.
    Read in place. Classes are WordNet ids in order; images are ordered by class, then number.
    """
    (path,) = archives
    sha256 = verify(path)
    with zipfile.ZipFile(path) as archive:

        def lines(name: str) -> list[str]:
            return archive.read(f"tiny-imagenet-200/{name}").decode().splitlines()

        classes = sorted(lines("wnids.txt"))
        index = {wnid: label for label, wnid in enumerate(classes)}
        annotated = dict(line.split("\t")[:2] for line in lines("val/val_annotations.txt"))
        # Each image's label, and its name with what orders numbers of several lengths.
        listing: dict[str, list[tuple[int, int, str]]] = {"train": [], "val": []}
        pattern = re.compile(r"tiny-imagenet-200/(train|val)/(?:(\w+)/)?images/(\w+\.JPEG)")
        for match in filter(None, map(pattern.fullmatch, archive.namelist())):
            name, (split, wnid, file) = match[0], match.groups()
            wnid = wnid or annotated.get(file)
            if wnid is None:
                raise InputError(f"{path}/{name}: has no line in val_annotations.txt")
            if wnid not in index:
                raise InputError(f"{path}/{name}: its class {wnid!r} is not in wnids.txt")
            listing[split].append((index[wnid], len(name), name))
        splits = [_tiny_images(archive, sorted(found)) for found in listing.values()]
    return Dataset(*splits, classes, sha256)


def _tiny_images(archive: zipfile.ZipFile, listing: list[tuple[int, int, str]]) -> Split:
    images = np.empty((len(listing), 3, 64, 64), dtype=np.uint8)
    for image, (_, _, name) in zip(images, listing, strict=True):
        place = f"{archive.filename}/{name}"
        picture = _decode(place, archive.read(name), None).convert("RGB")
        if picture.size != (64, 64):
            raise InputError(f"{place}: is {picture.width}×{picture.height}, not 64×64 pixels")
        image[:] = np.asarray(picture).transpose(2, 0, 1)
    return images, np.array([label for label, *_ in listing], dtype=np.int64)


def folder(*, path: str | Sequence[str], size: int | None, **_: Any) -> Dataset:
    """Your own images: train/<class>/<name> and test/<class>/<name>, in folders or archives.

    Any format that Pillow reads by itself. If every image is grey there is one channel, else there
    are three. Archives are read, never unpacked. Images are ordered by class and file name.

    Args:
        path: a directory that holds train/ and test/, or tar/zip archives of them, or a
            directory of such archives.
        size: side to which images are resized and centre-cropped; None: all have one size.
    """
    roots = [Path(root) for root in ([path] if isinstance(path, str) else path)]
    # Each image with what orders it: its class, its file's name and checksum.
    pictures: dict[str, list[tuple[tuple[str, str, str], Image.Image]]] = {"train": [], "test": []}
    pixels, most = 0, MEMORY // PER_PIXEL
    for name, data in _files(roots):
        split, label, file = _parts(name)[-3:]
        key = (label, file, hashlib.sha256(data).hexdigest())
        picture = _decode(name, data, size)
        pixels += picture.width * picture.height
        if pixels > most:
            raise InputError(
                f"{name}: with this image there are more than {most:,} pixels, too many for the "
                "memory of this machine: set a smaller images.size"
            )
        pictures[split].append((key, picture))
    for found in pictures.values():
        found.sort(key=itemgetter(0))
    listing = {split: [key for key, _ in found] for split, found in pictures.items()}
    classes = sorted({label for label, *_ in listing["train"]})
    where = ", ".join(map(str, roots))
    for split, found in pictures.items():
        if not found:
            raise InputError(f"{where}: holds no images in {split}/<class>/")
    tested = {label for label, *_ in listing["test"]}
    for missing, there, absent in (
        (set(classes) - tested, "train", "test"),
        (tested - set(classes), "test", "train"),
    ):
        if missing:
            raise InputError(f"{where}: class {min(missing)!r} is in {there}/ but not in {absent}/")
    every = pictures["train"] + pictures["test"]
    sizes = {picture.size for _, picture in every}
    if len(sizes) > 1:
        found = ", ".join(f"{w}×{h}" for w, h in sorted(sizes)[:3])
        raise InputError(f"{where}: images differ in size ({found} …): set images.size")
    mode = "L" if all(picture.mode in GREY_MODES for _, picture in every) else "RGB"
    splits = []
    for split, found in pictures.items():
        images = as_array((picture for _, picture in found), mode)
        splits.append((images, np.array([classes.index(label) for label, *_ in listing[split]])))
    return Dataset(*splits, classes, hashlib.sha256(json.dumps(listing).encode()).hexdigest())


SOURCES: dict[str, Callable[..., Dataset]] = {
    "digits": digits,
    "cifar10": cifar,
    "cifar100": cifar,
    "svhn": svhn,
    "tinyimagenet": tinyimagenet,
    "folder": folder,
}


def _files(roots: Sequence[Path]) -> Iterator[tuple[str, bytes]]:
    """Name and content of every image file below train/ and test/.

    Archives are read from front to back: in a compressed tar every step back starts anew.
    """
    endings = tuple(Image.registered_extensions())

    def wanted(name: str) -> bool:
        parts = _parts(name)
        in_split = len(parts) >= 3 and parts[-3] in ("train", "test")
        hidden = any(part.startswith(".") for part in parts[-2:])
        return in_split and not hidden and name.lower().endswith(endings)

    for root in roots:
        if not root.exists():
            raise InputError(f"{root}: no such folder or archive")
        if root.is_dir():
            archives = sorted(p for p in root.iterdir() if p.name.lower().endswith(PACKED))
            if (root / "train").is_dir() or not archives:
                # Unlike `**`, `*` also enters linked folders: train/ and its classes may be links.
                for file in sorted({*root.rglob("*/*"), *root.rglob("*/*/*")}):
                    if wanted(str(file)) and file.is_file():
                        _check_size(str(file), file.stat().st_size)
                        yield str(file), file.read_bytes()
            else:
                yield from _files(archives)
            continue
        try:
            if zipfile.is_zipfile(root):
                with zipfile.ZipFile(root) as archive:
                    for entry in archive.infolist():
                        link = stat.S_ISLNK(entry.external_attr >> 16)
                        if wanted(entry.filename) and not link:
                            name = f"{root}/{entry.filename}"
                            _check_size(name, entry.file_size)
                            with archive.open(entry) as file:
                                # In steps: zipfile unpacks the whole of what it reads at a time.
                                yield name, b"".join(iter(partial(file.read, 4096), b""))
            else:
                with tarfile.open(root, tarinfo=_Member) as archive:
                    while member := archive.next():
                        archive.members, archive.pax_headers = [], {}  # tarfile keeps them all
                        if archive.offset <= member.offset:
                            raise tarfile.ReadError("a member ends before it begins")
                        if member.isfile() and wanted(member.name):
                            name = f"{root}/{member.name}"
                            _check_size(name, member.size)
                            yield name, archive.extractfile(member).read()
                    _check_end(archive)
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
            reason = str(error).partition(":\n")[0]
            raise InputError(f"{root}: not a whole tar or zip archive ({reason})") from error


class _Member(tarfile.TarInfo):
    """A tar header, refused where tarfile would read all that it announces, however much."""

    def _proc_member(self, archive: tarfile.TarFile) -> tarfile.TarInfo:
        if self.size < 0 or (self.size > LONGEST and not self.isfile()):
            raise tarfile.ReadError(
                f"a header of {self.size:,} bytes; at most {LONGEST:,} are read"
            )
        if self.type == tarfile.GNUTYPE_SPARSE:
            self._proc_gnusparse_10()
        return super()._proc_member(archive)

    def _proc_gnusparse_10(self, *_: Any) -> None:
        raise tarfile.ReadError("it holds a sparse file")


def _check_size(name: str, size: int) -> None:
    if size > LARGEST:
        raise InputError(f"{name}: has {size:,} bytes; images have at most {LARGEST:,}")


def _check_end(archive: tarfile.TarFile) -> None:
    """Refuse a tar that stops between two members, which tarfile takes for its end."""
    stream = archive.fileobj
    stream.seek(archive.offset)
    if stream.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError("its end is missing")
    while stream.read(1 << 20):  # to the checksum of what was compressed
        pass


def _parts(name: str) -> tuple[str, ...]:
    return PurePosixPath(name.replace(os.sep, "/")).parts


def _decode(name: str, data: bytes, size: int | None) -> Image.Image:
    """One image as L, LA or RGB, upright, of the size wanted."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=FORMATS) as opened:
                picture = ImageOps.exif_transpose(opened)
                picture.load()
    except UnidentifiedImageError as error:
        raise InputError(f"{name}: not an image of a known format") from error
    except MemoryError:
        raise
    except Exception as error:  # Pillow's readers of damaged files raise nearly anything
        raise InputError(f"{name}: not a readable image ({error})") from error
    if picture.mode.startswith("I;16"):
        picture = Image.fromarray((np.asarray(picture) // 257).astype(np.uint8))
    elif picture.mode in ("I", "F"):
        raise InputError(f"{name}: has 32-bit pixels, whose range is unknown; save it as 8-bit")
    elif picture.mode not in GREY_MODES:
        picture = picture.convert("RGB")
    elif picture.mode != "L":
        picture = picture.convert("L")
    return ImageOps.fit(picture, (size, size), Image.Resampling.BICUBIC) if size else picture


def as_array(pictures: Iterable[Image.Image], mode: str) -> NDArray[np.uint8]:
    """Pictures of one size as (N, C, H, W), in mode L or RGB."""
    images = np.stack([np.asarray(picture.convert(mode)) for picture in pictures])
    return images[:, None] if mode == "L" else images.transpose(0, 3, 1, 2)


def stratified(labels: NDArray[np.int64], count: int, seed: int, what: str) -> NDArray[np.bool_]:
    """A mask of `count` images, chosen by seed, with the classes' shares kept."""
    from sklearn.model_selection import train_test_split

    classes = len(np.unique(labels))
    if count >= len(labels):
        raise InputError(f"{count} {what} images are wanted, but there are only {len(labels)}")
    try:
        _, chosen = train_test_split(
            np.arange(len(labels)), test_size=count, random_state=seed, stratify=labels
        )
    except ValueError as error:
        raise InputError(
            f"{count} {what} images cannot be chosen from {len(labels)} images of {classes} "
            "classes with every class in both parts"
        ) from error
    mask = np.zeros(len(labels), dtype=bool)
    mask[chosen] = True
    return mask
