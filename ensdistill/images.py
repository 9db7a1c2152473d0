"""Image sources, and the one images.h5 in which every study begins.

images.h5 has `/train`, `/val` and `/test`, each with `images` uint8 (N, C, H, W) and `labels`
int64 (N,); its attributes hold classes, mean and std of the training pixels (per channel, in
[0, 1]), the source, and the SHA-256 of what was read.
"""

import hashlib
import io
import json
import logging
import lzma
import os
import stat
import tarfile
import tempfile
import time
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from http.client import HTTPException
from operator import itemgetter
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from ensdistill import InputError
from ensdistill.provenance import atomic, open_hdf5, write_hdf5

logger = logging.getLogger(__name__)

Split = tuple[NDArray[np.uint8], NDArray[np.int64]]

ARCHIVES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".zip")
GREY_MODES = {"1", "L", "LA", "La"}
ATTEMPTS = 3
"""How often a download is tried."""


@dataclass(frozen=True)
class Dataset:
    """What a source gives: all its images, before a validation split is made."""

    train: Split
    test: Split
    classes: list[str]
    sha256: str
    """Of the files that were read, in whatever archives they came."""
    official_validation: bool = False
    """Whether the last training images are the customary validation split."""


# --- sources ---------------------------------------------------------------------------------


def digits(*, seed: int, test: int | None, **_: Any) -> Dataset:
    """1,797 handwritten digits, 8×8 grey, that ship with scikit-learn [Alpaydin & Kaynak 1998].

    They have no test split of their own: a third, or `test` images, is a stratified choice.
    """
    from sklearn.datasets import load_digits

    data = load_digits()
    images = np.round(data.images * (255 / 16)).astype(np.uint8)[:, None]
    labels = data.target.astype(np.int64)
    held_out = _stratified(labels, test or len(labels) // 3, seed, "test")
    return Dataset(
        train=(images[~held_out], labels[~held_out]),
        test=(images[held_out], labels[held_out]),
        classes=[str(name) for name in data.target_names],
        sha256=hashlib.sha256(images.tobytes()).hexdigest(),
    )


def cifar(*, source: str, archive: str, **_: Any) -> Dataset:
    """CIFAR-10 or CIFAR-100, 60,000 colour images of 32×32 [Krizhevsky 2009], from its archive."""
    from torchvision.datasets.utils import check_integrity

    cls = _cifar_class(source)
    if not check_integrity(archive, cls.tgz_md5):
        raise InputError(
            f"{archive}: not the official {source} archive; delete it to fetch it anew"
        )
    with tempfile.TemporaryDirectory() as unpacked:
        Path(unpacked, cls.filename).symlink_to(Path(archive).resolve())
        splits = [cls(unpacked, train=train, download=True) for train in (True, False)]
    train, test = (
        (data.data.transpose(0, 3, 1, 2), np.array(data.targets, dtype=np.int64)) for data in splits
    )
    return Dataset(train, test, list(splits[0].classes), _file_sha256(archive), True)


def folder(*, path: str | Sequence[str], size: int | None, **_: Any) -> Dataset:
    """Your own images: train/<class>/<name> and test/<class>/<name>, in folders or archives.

    Any format that Pillow reads. If every image is grey there is one channel, else there are
    three. Archives are read, never unpacked. Images are ordered by class and file name.

    Args:
        path: a directory that holds train/ and test/, or tar/zip archives of them, or a
            directory of such archives.
        size: side to which images are resized and centre-cropped; None: all have one size.
    """
    roots = [Path(root) for root in ([path] if isinstance(path, str) else path)]
    # Each image with what orders it: its class, its file's name and checksum.
    pictures: dict[str, list[tuple[tuple[str, str, str], Image.Image]]] = {"train": [], "test": []}
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        for name, data in _files(roots):
            split, label, file = _parts(name)[-3:]
            key = (label, file, hashlib.sha256(data).hexdigest())
            pictures[split].append((key, _decode(name, data, size)))
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
        arrays = np.stack([np.asarray(picture.convert(mode)) for _, picture in found])
        arrays = arrays[:, None] if mode == "L" else arrays.transpose(0, 3, 1, 2)
        splits.append((arrays, np.array([classes.index(label) for label, *_ in listing[split]])))
    return Dataset(*splits, classes, hashlib.sha256(json.dumps(listing).encode()).hexdigest())


SOURCES: dict[str, Callable[..., Dataset]] = {
    "digits": digits,
    "cifar10": cifar,
    "cifar100": cifar,
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
            archives = sorted(p for p in root.iterdir() if p.name.lower().endswith(ARCHIVES))
            if (root / "train").is_dir() or not archives:
                # Unlike `**`, `*` also enters linked folders: train/ and its classes may be links.
                for file in sorted({*root.rglob("*/*"), *root.rglob("*/*/*")}):
                    if wanted(str(file)) and file.is_file():
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
                            yield f"{root}/{entry.filename}", archive.read(entry)
            else:
                with tarfile.open(root) as archive:
                    for member in archive:
                        if member.isfile() and wanted(member.name):
                            yield f"{root}/{member.name}", archive.extractfile(member).read()
                    _check_end(archive)
        except (
            tarfile.TarError,
            zipfile.BadZipFile,
            zlib.error,
            lzma.LZMAError,
            EOFError,
            OSError,
            RuntimeError,  # a zip archive with a password
        ) as error:
            reason = str(error).partition(":\n")[0]
            raise InputError(f"{root}: not a whole tar or zip archive ({reason})") from error


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
        with Image.open(io.BytesIO(data)) as opened:
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


# --- downloads -------------------------------------------------------------------------------


def _cifar_class(source: str) -> Any:
    from torchvision.datasets import CIFAR10, CIFAR100

    return {"cifar10": CIFAR10, "cifar100": CIFAR100}[source]


def download(source: str, path: str | os.PathLike[str]) -> None:
    """Fetch the official archive of `cifar10` or `cifar100`, with its checksum verified.

    Shows a progress bar on a terminal, tries three times, and leaves a whole file or none.

    Raises:
        InputError: the server cannot be reached, or what came is not the official archive.
    """
    from torchvision.datasets.utils import download_url

    cls = _cifar_class(source)
    with atomic(path) as temporary:
        for attempt in range(1, ATTEMPTS + 1):
            try:
                download_url(cls.url, str(temporary.parent), temporary.name, md5=cls.tgz_md5)
                return
            except (RuntimeError, OSError, HTTPException) as error:
                cause, reason = error, " ".join(str(error).split())
                logger.warning("attempt %d of %d failed: %s", attempt, ATTEMPTS, reason)
                if attempt < ATTEMPTS:
                    time.sleep(2**attempt)
        raise InputError(f"{cls.url}: could not be downloaded ({reason})") from cause


# --- images.h5 -------------------------------------------------------------------------------


def write_images(
    output: str | os.PathLike[str],
    *,
    source: str,
    train: int | None,
    validation: int,
    test: int | None,
    seed: int,
    attributes: dict[str, Any],
    **options: Any,
) -> None:
    """Read a source, split it and write images.h5.

    Args:
        output: the file to write, whole or not at all.
        source: a key of `SOURCES`; `options` are its other arguments.
        train, validation, test: images per split; None for all there are. Subsets are
            stratified choices by `seed`; validation images never serve for training.
        attributes: what else the file should say of itself.

    Raises:
        InputError: the source is unusable or too small.
    """
    data = SOURCES[source](source=source, seed=seed, test=test, **options)
    images, labels = data.train
    count, classes = len(labels), len(data.classes)
    if validation + (train or classes) > count:
        wanted = f"{validation} for validation and {train or classes} for training"
        raise InputError(f"source {source!r} has {count} training images, fewer than {wanted}")
    if data.official_validation:
        held_out = np.arange(count) >= count - validation
    else:
        held_out = _stratified(labels, validation, seed, "validation")
    splits = {"val": (images[held_out], labels[held_out])}
    images, labels = images[~held_out], labels[~held_out]
    splits["train"] = _subset(images, labels, train, seed, "train")
    splits["test"] = _subset(*data.test, test, seed, "test")
    train_images, train_labels = splits["train"]
    absent = set(range(classes)) - set(train_labels.tolist())
    if absent:
        name = data.classes[min(absent)]
        raise InputError(f"source {source!r}: no training image of class {name!r} is left")
    # From histograms: exact, and no float copy of all images.
    channels = train_images.transpose(1, 0, 2, 3)
    histograms = [np.bincount(channel.ravel(), minlength=256) for channel in channels]
    pixels, values = np.stack(histograms, axis=1), np.arange(256)[:, None] / 255
    mean = (pixels * values).sum(0) / pixels.sum(0)
    std = np.sqrt((pixels * (values - mean) ** 2).sum(0) / pixels.sum(0))
    arrays = {
        f"{split}/{name}": array
        for split, pair in splits.items()
        for name, array in zip(("images", "labels"), pair, strict=True)
    }
    write_hdf5(
        output,
        arrays,
        {
            **attributes,
            "source": source,
            "sha256": data.sha256,
            "classes": data.classes,
            "mean": mean.tolist(),
            "std": np.maximum(std, 1 / 255).tolist(),
        },
    )


def read_images(path: str | os.PathLike[str], split: str) -> Split:
    """Images uint8 (N, C, H, W) and labels int64 (N,) of one split of images.h5.

    Raises:
        InputError: the file is damaged or no images file.
    """
    with open_hdf5(path) as file:
        return file[f"{split}/images"][:], file[f"{split}/labels"][:]


def read_description(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The attributes of images.h5 that networks need: classes, mean, std, and shape (C, H, W)."""
    with open_hdf5(path) as file:
        known = {key: json.loads(file.attrs[key]) for key in ("classes", "mean", "std")}
        return {**known, "shape": file["train/images"].shape[1:]}


def _stratified(labels: NDArray[np.int64], count: int, seed: int, what: str) -> NDArray[np.bool_]:
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


def _subset(images, labels, count: int | None, seed: int, what: str) -> Split:
    if count is None or count == len(labels):
        return images, labels
    chosen = _stratified(labels, count, seed, what)
    return images[chosen], labels[chosen]


def _file_sha256(path: str | os.PathLike[str]) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
