"""Image sources: what each gives before a study splits it. `downloads.SOURCES` lists them."""

import hashlib
import logging
import re
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ensdistill import InputError
from ensdistill.downloads import verify
from ensdistill.own_images import FileImages, Key, OwnImages, own_images
from ensdistill.pictures import as_array, decode, mode_of, squared
from ensdistill.splits import choose, stratified

logger = logging.getLogger(__name__)

Split = tuple[NDArray[np.uint8] | FileImages, NDArray[np.int64]]
"""Images (N, C, H, W) and labels (N,)."""

KEPT = 2**28
"""Bytes of own pictures that are decoded on the first reading and kept; if there are more, all
are decoded when they are asked for."""


@dataclass(frozen=True)
class Dataset:
    """What a source gives: all its images, before splits are made that it does not have."""

    train: Split
    test: Split
    classes: list[str]
    sha256: str
    """Of the files that were read, in whatever archives they came; of official archives, theirs."""
    official_validation: bool = False
    """Whether the last training images are the customary validation split."""
    files: dict[str, int] = field(default_factory=dict)
    """Of own data: how many files were read, and how many were skipped, by why."""
    validation: Split | None = None
    """Where the source itself says which images these are."""
    groups: NDArray[np.str_] | None = None
    """Of the training images (N,): those of one group stay together in all choices."""
    evaluation: dict[str, Any] | None = None
    """How own images are resized and cropped to what networks see in an evaluation; the images
    here are not cropped yet."""
    chosen: str = ""
    """How the test images were chosen, where the source does not say which they are."""


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
    train, test = splits
    return Dataset(train, test, [str(digit) for digit in range(10)], sha256)


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
        train, test = (_tiny_images(archive, sorted(found)) for found in listing.values())
    return Dataset(train, test, classes, sha256)


def _tiny_images(archive: zipfile.ZipFile, listing: list[tuple[int, int, str]]) -> Split:
    images = np.empty((len(listing), 3, 64, 64), dtype=np.uint8)
    for image, (_, _, name) in zip(images, listing, strict=True):
        place = f"{archive.filename}/{name}"
        picture = decode(place, archive.read(name)).convert("RGB")
        if picture.size != (64, 64):
            raise InputError(f"{place}: is {picture.width}×{picture.height}, not 64×64 pixels")
        image[:] = np.asarray(picture).transpose(2, 0, 1)
    return images, np.array([label for label, *_ in listing], dtype=np.int64)


def folder(
    *,
    path: str | Sequence[str],
    size: int | None,
    resize: int | None = None,
    columns: Mapping[str, str | None] | None = None,
    labelled: bool = True,
    seed: int = 0,
    test: int | None = None,
    **_: Any,
) -> Dataset:
    """Your own images: folders or archives of them, tables of paths, or saved datasets.

    Any format that Pillow reads by itself; what is done to the pixels is in `ensdistill.pictures`.
    If every image is grey there is one channel, else there are three. Archives are read, never
    unpacked. Images are ordered by class and name. What is read, skipped or refused:
    `ensdistill.folders`, `ensdistill.image_tables`.

    Without test images a fifth, or `test` images, is a stratified choice by `seed`.

    Args:
        path: as of `own_images`.
        size: side to which images are resized and centre-cropped; None: all have one size.
        resize: side of the squares that are given, of which a centre of `size` is to be cut;
            `size` unless told.
        columns: as of `own_images`.
        labelled: whether to read training images and classes too, not only test images.
    """
    found, side = own_images(path, labelled=labelled, columns=columns), resize or size
    kept, modes, shapes = _first_reading(found, side)
    if len(shapes) > 1:
        some = ", ".join(f"{w}×{h}" for w, h in sorted(shape[::-1] for shape in shapes)[:3])
        raise InputError(f"{found.where}: images differ in size ({some} …): set images.size")
    mode, (shape,) = "L" if modes == {"L"} else "RGB", shapes
    keys = {
        split: [(split, label, sha256) for label, _, sha256 in images]
        for split, images in found.listing().items()
    }
    classes = found.class_names() if labelled else sorted({label for _, label, _ in keys["test"]})
    chosen = _choose_test(found, keys, classes, test, seed) if labelled else ""

    def split(name: str) -> Split:
        labels = np.array([classes.index(label) for _, label, _ in keys[name]], int)
        if kept is None:
            return FileImages(found, keys[name], mode, side, shape), labels
        pictures = [kept[key] for key in keys[name]]
        empty = np.empty((0, 1 if mode == "L" else 3, *shape), dtype=np.uint8)
        return as_array(pictures, mode) if pictures else empty, labels

    return Dataset(
        split("train"),
        split("test"),
        classes,
        found.sha256(),
        files=dict(+found.counts),
        validation=split("val") if "val" in keys else None,
        groups=np.array([found.groups[it] for it in keys["train"]]) if found.groups else None,
        chosen=chosen,
        evaluation={"resize": side, "crop": size, "interpolation": "bicubic"} if size else None,
    )


def _first_reading(
    found: OwnImages, side: int | None
) -> tuple[dict[Key, Image.Image] | None, set[str], set[tuple[int, int]]]:
    """All pictures, if they are few, else None; their modes and their shapes (H, W)."""
    kept: dict[Key, Image.Image] | None = {}
    modes, shapes, taken = set(), {(side, side)} if side else set(), 0
    for place, key, content in found.read():
        if kept is None and side:
            modes.add(mode_of(place, content))
            continue
        picture = squared(decode(place, content), side)
        modes.add(picture.mode)
        shapes.add(picture.size[::-1])
        taken += 4 * picture.width * picture.height  # as Pillow keeps colours
        if kept is not None and taken <= KEPT:
            kept[key] = picture
        else:
            kept = None
    return kept, modes, shapes


def _choose_test(
    found: OwnImages,
    keys: dict[str, list[Key]],
    classes: Sequence[str],
    count: int | None,
    seed: int,
) -> str:
    """Take test images from the training images, if there are none, and say so.

    Raises:
        InputError: the classes of the splits differ, or there is no such choice.
    """
    known = {split: {label for _, label, _ in images} for split, images in keys.items()}
    for split in known:
        if split != "train" and (known[split] or split != "test"):
            _check_classes(found.where, split, known["train"], known[split])
    if keys["test"]:
        return ""
    labels = np.array([classes.index(label) for _, label, _ in keys["train"]])
    groups = np.array([found.groups[it] for it in keys["train"]]) if found.groups else None
    mask = choose(labels, groups, count or len(labels) // 5, seed, "test", classes)
    keys["test"] = [key for key, tested in zip(keys["train"], mask, strict=True) if tested]
    keys["train"] = [key for key, tested in zip(keys["train"], mask, strict=True) if not tested]
    whole = "" if groups is None else ", groups kept whole"
    said = f"{mask.sum()} of {len(mask)} images, stratified by class, seed {seed}{whole}"
    logger.info("%s: says not which images are for testing; chosen: %s", found.where, said)
    return said


def _check_classes(where: str, split: str, trained: set[str], there: set[str]) -> None:
    for missing, has, lacks in (
        (trained - there, "train", split),
        (there - trained, split, "train"),
    ):
        if missing:
            raise InputError(f"{where}: class {min(missing)!r} is in {has}/ but not in {lacks}/")
