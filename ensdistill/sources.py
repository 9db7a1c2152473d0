"""Image sources: what each gives before a study splits it. `downloads.SOURCES` lists them."""

import hashlib
import io
import os
import re
import tempfile
import warnings
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from ensdistill import InputError
from ensdistill.downloads import verify
from ensdistill.folders import ImageFolder

Split = tuple[NDArray[np.uint8], NDArray[np.int64]]
"""Images (N, C, H, W) and labels (N,)."""

BITS_PER_SAMPLE, PHOTOMETRIC = 258, 262
"""Tags of TIFF."""
POINTERS = (b"version https://git-lfs", b"/annex/objects/")
"""How files of Git LFS and git-annex begin that stand for others."""
GREY_MODES = {"1", "L", "LA", "La"}
Image.init()
FORMATS = [name for name in Image.ID if name != "EPS"]
"""What Pillow reads by itself; to read PostScript it would run Ghostscript, that is, a program."""
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
    files: dict[str, int] = field(default_factory=dict)
    """Of own data: how many files were read, and how many were skipped, by why."""


def digits(*, seed: int, test: int | None, **_: Any) -> Dataset:
    """1,797 handwritten digits, 8×8 grey, that ship with scikit-learn [Alpaydin & Kaynak 1998].

    They have no test split of their own: a third, or `test` images, is a stratified choice.
    """
    from sklearn.datasets import load_digits

    data = load_digits()
    images = np.round(data.images * (255 / 16)).astype(np.uint8)[:, None]
    labels = data.target.astype(np.int64)
    classes = [str(name) for name in data.target_names]
    held_out = stratified(labels, test or len(labels) // 3, seed, "test", classes)
    return Dataset(
        train=(images[~held_out], labels[~held_out]),
        test=(images[held_out], labels[held_out]),
        classes=classes,
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


def folder(
    *, path: str | Sequence[str], size: int | None, labelled: bool = True, **_: Any
) -> Dataset:
    """Your own images: train/<class>/<name> and test/<class>/<name>, in folders or archives.

    Any format that Pillow reads by itself. If every image is grey there is one channel, else there
    are three. Archives are read, never unpacked. Images are ordered by class and file name. What
    is read, skipped or refused: `ensdistill.folders`.

    Args:
        path: a directory that holds train/ and test/, or tar/zip archives of them, or a
            directory of such archives.
        size: side to which images are resized and centre-cropped; None: all have one size.
        labelled: whether to read training images and classes too, not only test images.
    """
    found = ImageFolder(path, labelled=labelled)
    pictures: dict[tuple[str, str, str], Image.Image] = {}
    pixels, most = 0, MEMORY // PER_PIXEL
    for name, key, data in found.read():
        pictures[key] = picture = _decode(name, data, size)
        pixels += picture.width * picture.height
        if pixels > most:
            raise InputError(
                f"{name}: with this image there are more than {most:,} pixels, too many for the "
                "memory of this machine: set a smaller images.size"
            )
    listing = found.listing()
    labels = {split: [label for label, *_ in images] for split, images in listing.items()}
    classes = sorted(set(labels["train" if labelled else "test"]))
    if labelled:
        _check_classes(found.where, set(classes), set(labels["test"]))
    sizes = {picture.size for picture in pictures.values()}
    if len(sizes) > 1:
        some = ", ".join(f"{w}×{h}" for w, h in sorted(sizes)[:3])
        raise InputError(f"{found.where}: images differ in size ({some} …): set images.size")
    grey = all(picture.mode in GREY_MODES for picture in pictures.values())
    empty = np.empty((0, 1 if grey else 3, *sizes.pop()[::-1]), dtype=np.uint8)
    splits = []
    for split, images in listing.items():
        chosen = (pictures[split, label, sha256] for label, _, sha256 in images)
        pixels = as_array(chosen, "L" if grey else "RGB") if images else empty
        splits.append((pixels, np.array([classes.index(label) for label in labels[split]], int)))
    return Dataset(*splits, classes, found.sha256(), files=dict(+found.counts))


def _check_classes(where: str, trained: set[str], tested: set[str]) -> None:
    for missing, there, absent in (
        (trained - tested, "train", "test"),
        (tested - trained, "test", "train"),
    ):
        if missing:
            raise InputError(f"{where}: class {min(missing)!r} is in {there}/ but not in {absent}/")


def _decode(name: str, data: bytes, size: int | None) -> Image.Image:
    """One image as L, LA or RGB, upright, of the size wanted."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=FORMATS) as opened:
                format, tags = opened.format, getattr(opened, "tag_v2", {})
                picture = ImageOps.exif_transpose(opened)
                picture.load()
    except UnidentifiedImageError as error:
        pointer = data.startswith(POINTERS)
        why = "only a pointer to a file that was not fetched" if pointer else "empty"
        why = f" (it is {why})" if pointer or not data else ""
        raise InputError(f"{name}: not an image of a known format{why}") from error
    except MemoryError:
        raise
    except Exception as error:  # Pillow's readers of damaged files raise nearly anything
        raise InputError(f"{name}: not a readable image ({error})") from error
    # Pillow gives 16-bit PGM, of whatever maximum, as 32-bit pixels 0 … 65,535.
    if picture.mode.startswith("I;16") or (picture.mode == "I" and format == "PPM"):
        most = 4095 if tags.get(BITS_PER_SAMPLE) == (12,) else 65535
        values = np.asarray(picture).astype(np.int64) * 255 // most
        white = tags.get(PHOTOMETRIC) == 0  # TIFF's WhiteIsZero, which Pillow leaves as it is
        picture = Image.fromarray((255 - values if white else values).astype(np.uint8))
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


def stratified(
    labels: NDArray[np.int64],
    count: int,
    seed: int,
    what: str,
    classes: Sequence[str],
    *,
    rest: bool = True,
) -> NDArray[np.bool_]:
    """A mask of `count` images, chosen by seed, with the classes' shares kept.

    Every class is among them.

    Args:
        what: what the images are for, in messages.
        classes: names of the classes.
        rest: whether the other images are used too, so that every class must be among those.
    """
    from sklearn.model_selection import train_test_split

    sizes = np.bincount(labels, minlength=len(classes))
    total, least, parts = len(labels), int(sizes.argmin()), 1 + rest
    there = (
        f"there {'is' if sizes[least] == 1 else 'are'} only {sizes[least]} of {classes[least]!r}"
    )
    if count >= total:
        raise InputError(f"{count} {what} images are wanted, but there are only {total}")
    if sizes[least] < parts:
        raise InputError(
            f"{count} {what} images cannot be chosen from {total} with every class "
            f"{'in both parts' if rest else 'among them'}: {there}"
        )
    if min(count, total - count if rest else count) < len(classes):
        raise InputError(
            f"{count} {what} images cannot be chosen from {total} images of {len(classes)} "
            f"classes with every class {'in both parts' if rest else 'among them'}"
        )
    mask = np.zeros(total, dtype=bool)
    if sizes[least] > 1 and total - count >= len(classes):
        _, chosen = train_test_split(
            np.arange(total), test_size=count, random_state=seed, stratify=labels
        )
        mask[chosen] = True
        return mask
    rng = np.random.default_rng(seed)
    for label, number in enumerate(_shares(sizes, count)):
        mask[rng.permutation(np.flatnonzero(labels == label))[:number]] = True
    return mask


def _shares(sizes: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """How many of each class make `count`: proportional to sizes, at least one."""
    exact = sizes * count / sizes.sum()
    shares = np.maximum(exact.astype(int), 1)
    while (lack := count - shares.sum()) != 0:
        # The class that is furthest from its exact share takes one more, or gives one.
        gaps = (exact - shares) * np.sign(lack)
        gaps[(shares == sizes) if lack > 0 else (shares == 1)] = -np.inf
        shares[gaps.argmax()] += np.sign(lack)
    return shares
