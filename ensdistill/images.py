"""The one images.h5 in which every study begins.

images.h5 has `/train`, `/val` and `/test`, and `/held_out` where the study holds images out, each
with `labels` int64 (N,) and either `images` uint8 (N, C, H, W), or the images' files: `files`
uint8, all their bytes one after the other, and `offsets` int64 (N + 1,), between which each lies;
the attributes of `files` are the arguments of `pictures.pixels`, which decodes them. Files are
stored where the pixels would be too many.

Own images are stored as networks see them in evaluation, except for /train and /held_out of a
study with `images.resize`: those are the larger squares from which that centre was cut.

The attributes of images.h5 hold classes, mean and std of the training pixels (per channel, in
[0, 1]), the source, the SHA-256 of what was read; for own data how many files were read and how
many skipped, by why, how test images were chosen if the data do not say (`split`), and where images
were resized how that is done for an evaluation (`evaluation`).
"""

import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ensdistill import DamagedFile, InputError, sources
from ensdistill.downloads import SOURCES
from ensdistill.hdf5 import Streamed, open_hdf5, write_hdf5
from ensdistill.own_images import FileImages
from ensdistill.pictures import centre, is_side
from ensdistill.sources import Dataset, Split
from ensdistill.splits import choose, stratified
from ensdistill.stored_images import StoredImages

logger = logging.getLogger(__name__)

MOST_PIXELS = 2**35
"""Bytes of pixels, of all splits, up to which pixels are stored; else the images' files are."""
SHARE_OF_DISK = 0.5
"""Of what is free: pixels that would take more are not stored."""


def read_source(source: str, **options: Any) -> Dataset:
    """All images of a source of `downloads.SOURCES`; `options` are its reader's."""
    return getattr(sources, SOURCES[source].reader)(source=source, **options)


def write_images(
    output: str | os.PathLike[str],
    *,
    source: str,
    train: int | None,
    validation: int,
    test: int | None,
    seed: int,
    held_out: int | None = None,
    attributes: dict[str, Any],
    **options: Any,
) -> str:
    """Read a source, split it and write images.h5.

    Args:
        output: the file to write, whole or not at all.
        source: a key of `downloads.SOURCES`; `options` are its reader's other arguments.
        train, validation, test: images per split; None for all there are. Subsets are
            stratified choices by `seed`; validation images never serve for training.
        held_out: images that serve for neither, nor for testing; none unless told.
        attributes: what else the file should say of itself.

    Returns:
        the SHA-256 of what was read.

    Raises:
        InputError: the source is unusable or too small.
    """
    data = read_source(source, seed=seed, test=test, **options)
    splits = _split(data, source, train, validation, test, seed, held_out or 0)
    crop = data.evaluation["crop"] if data.evaluation else None
    crops = {"val": crop, "test": crop, "held_out": None, "train": None}
    encoded = _are_encoded(output, data, splits, crops)
    counts = np.zeros((256, data.train[0].shape[1]), np.int64)
    arrays: dict[str, Any] = {}
    for split, (images, places, labels) in splits.items():
        add = partial(_count_values, counts) if split == "train" else None
        arrays |= _stored(split, images, places, crops[split], encoded, add)
        arrays[f"{split}/labels"] = labels
    streamed = isinstance(data.train[0], FileImages)
    if not streamed:
        _count_values(counts, arrays["train/images"])
    write_hdf5(
        output,
        arrays,
        {
            **attributes,
            "source": source,
            "sha256": data.sha256,
            **({"files": data.files} if data.files else {}),
            **({"split": data.chosen} if data.chosen else {}),
            **({"evaluation": data.evaluation} if data.evaluation else {}),
            "classes": data.classes,
            **({} if streamed else _mean_and_std(counts)),
        },
        last=lambda: _mean_and_std(counts) if streamed else {},
    )
    return data.sha256


Chosen = tuple[NDArray[np.uint8] | FileImages, NDArray[np.int64], NDArray[np.int64]]
"""All images that a split is chosen from, the places of its own among them, their labels."""


def _split(
    data: Dataset,
    source: str,
    train: int | None,
    validation: int,
    test: int | None,
    seed: int,
    held_out: int,
) -> dict[str, Chosen]:
    """What each split holds, by labels and groups alone; arguments, errors as of `write_images`."""
    images, labels = data.train
    count, classes, given = len(labels), len(data.classes), data.validation is not None
    needed = {"for validation": 0 if given else validation, "held out": held_out}
    if sum(needed.values()) + (train or classes) > count:
        aside = ", ".join(f"{number} {what}" for what, number in needed.items() if number)
        more = f"{aside}{aside and ' and '}{train or classes} for training"
        raise InputError(f"source {source!r} has {count} training images, fewer than {more}")
    left = np.arange(count)
    splits: dict[str, Chosen] = {}

    def take(what: str, name: str, wanted: int) -> None:
        nonlocal left
        groups = None if data.groups is None else data.groups[left]
        chosen = choose(labels[left], groups, wanted, seed, name, data.classes)
        splits[what] = images, left[chosen], labels[left[chosen]]
        left = left[~chosen]

    if data.validation is not None:
        pictures, known = data.validation
        wanted = min(validation, len(known))
        splits["val"] = _subset(pictures, known, wanted, seed, "validation", data.classes)
    elif data.official_validation:
        first = count - validation
        splits["val"], left = (images, left[first:], labels[first:]), left[:first]
    else:
        take("val", "validation", validation)
    if held_out:
        take("held_out", "held_out", held_out)
    chosen = _subset(images, labels[left], train, seed, "train", data.classes)
    splits["train"] = images, left[chosen[1]], chosen[2]
    tested = None if data.chosen else test  # of whole groups there are only about so many
    splits["test"] = _subset(*data.test, tested, seed, "test", data.classes)
    absent = set(range(classes)) - set(splits["train"][2].tolist())
    if absent:
        name = data.classes[min(absent)]
        raise InputError(f"source {source!r}: no training image of class {name!r} is left")
    return splits


def _are_encoded(
    output: str | os.PathLike[str],
    data: Dataset,
    splits: Mapping[str, Chosen],
    crops: Mapping[str, int | None],
) -> bool:
    """Whether files are stored instead of pixels, by the size of all pixels; said in the log."""
    if not isinstance(data.train[0], FileImages):
        return False
    channels, height, width = data.train[0].shape[1:]
    total = sum(
        len(places) * channels * ((crops[split] or 0) ** 2 or height * width)
        for split, (_, places, _) in splits.items()
    )
    folder = Path(output).absolute().parent
    while not folder.exists():
        folder = folder.parent
    most = min(MOST_PIXELS, int(SHARE_OF_DISK * shutil.disk_usage(folder).free))
    logger.info(
        "%s: holds %s: all pixels are %.1f GB, of which %.1f GB would be stored",
        *(output, "files, not pixels" if total > most else "pixels", total / 1e9, most / 1e9),
    )
    return total > most


def _stored(
    split: str,
    images: NDArray[np.uint8] | FileImages,
    places: NDArray[np.int64],
    crop: int | None,
    encoded: bool,
    add: Callable[[NDArray[np.uint8]], None] | None,
) -> dict[str, NDArray[Any] | Streamed]:
    """The datasets of a split's images.

    Args:
        crop: side of the centres that are stored.
        encoded: whether files are, which are decoded nevertheless: none may be damaged.
        add: counts pixels.
    """
    if not isinstance(images, FileImages):
        return {f"{split}/images": centre(images[places], crop)}

    def decoded() -> Iterator[tuple[int, NDArray[np.uint8]]]:
        for number, image in images.read(places, crop):
            if add:
                add(image[None])
            yield number, image

    def files() -> Iterator[tuple[slice, NDArray[np.uint8]]]:
        for number, place, content in images.files(places):
            image = images.pixels(place, content, crop)
            if add:
                add(image[None])
            yield slice(*offsets[number : number + 2]), np.frombuffer(content, np.uint8)

    if not encoded:
        sides = (crop, crop) if crop else images.shape[2:]
        return {f"{split}/images": Streamed((len(places), images.shape[1], *sides), decoded)}
    offsets = np.cumsum([0, *images.lengths(places)])
    known = {"resize": images.resize, "crop": crop, "mode": images.mode}
    known = {key: value for key, value in known.items() if value is not None}
    return {
        f"{split}/files": Streamed((int(offsets[-1]),), files, known),
        f"{split}/offsets": offsets,
    }


def read_images(path: str | os.PathLike[str], split: str) -> Split:
    """Images uint8 (N, C, H, W) and labels int64 (N,) of one split of images.h5.

    Raises:
        InputError: the file is damaged or no images file.
    """
    stored = evaluation_images(path, split)
    return stored.read(np.arange(len(stored))), stored.labels


def evaluation_images(path: str | os.PathLike[str], split: str) -> StoredImages:
    """Images of one split as networks see them when they do not learn: of larger ones the centre.

    Raises:
        InputError: as of `read_images`.
    """
    with open_hdf5(path) as file:
        known = "val" in file
    if not known:
        return StoredImages(path, split)
    validation = StoredImages(path, "val")
    stored = StoredImages(path, split, validation.shape[2:])
    if stored.shape[1:] != validation.shape[1:]:
        raise DamagedFile(path, f"images of {split!r} and 'val' differ in their channels")
    return stored


def read_description(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What networks need of images.h5: classes, mean, std, and shape (C, H, W), as they see it.

    And `evaluation`, where images were resized: how that is done with images of one's own.

    Raises:
        InputError: as of `read_images`.
    """
    keys = ["classes", "mean", "std"]
    with open_hdf5(path) as file:
        keys += ["evaluation"] if "evaluation" in file.attrs else []
        known = {key: json.loads(file.attrs[key]) for key in keys}
    known["shape"] = StoredImages(path, "val").shape[1:]
    if not _is_description(known):
        raise DamagedFile(path, "its attributes do not describe its images")
    return known


def _is_description(known: Mapping[str, Any]) -> bool:
    """Whether it is what networks need of images of a shape."""
    channels, classes = known["shape"][0], known["classes"]
    resized = known.get("evaluation", {"resize": 1, "crop": 1})
    return (
        isinstance(classes, list)
        and all(isinstance(it, str) for it in classes)
        and all(_are_numbers(known[key], channels) for key in ("mean", "std"))
        and isinstance(resized, dict)
        and all(is_side(resized.get(key)) for key in ("resize", "crop"))
    )


def _are_numbers(values: Any, count: int) -> bool:
    kinds = isinstance(values, list) and all(isinstance(it, int | float) for it in values)
    return kinds and len(values) == count and all(map(math.isfinite, values))


def _subset(
    images: NDArray[np.uint8] | FileImages,
    labels: NDArray[np.int64],
    count: int | None,
    seed: int,
    what: str,
    classes: Sequence[str],
) -> Chosen:
    places = np.arange(len(labels))
    if count is not None and count != len(labels):
        places = np.flatnonzero(stratified(labels, count, seed, what, classes, rest=False))
    return images, places, labels[places]


def pixel_statistics(images: NDArray[np.uint8]) -> dict[str, list[float]]:
    """`mean` and `std` of each channel of images (N, C, H, W), in [0, 1], as images.h5 has them.

    >>> pixel_statistics(np.array([[[[0, 255]]]], np.uint8))
    {'mean': [0.5], 'std': [0.5]}
    """
    counts = np.zeros((256, images.shape[1]), np.int64)
    _count_values(counts, images)
    return _mean_and_std(counts)


def _mean_and_std(counts: NDArray[np.int64]) -> dict[str, list[float]]:
    """Of each channel, in [0, 1]; the standard deviation is at least a step of 1/255.

    Args:
        counts: how often a channel has a value (256, C): exact without a float copy of images.
    """
    values = np.arange(256)[:, None] / 255
    mean = (counts * values).sum(0) / counts.sum(0)
    std = np.sqrt((counts * (values - mean) ** 2).sum(0) / counts.sum(0))
    return {"mean": mean.tolist(), "std": np.maximum(std, 1 / 255).tolist()}


def _count_values(counts: NDArray[np.int64], images: NDArray[np.uint8]) -> None:
    """Add how often the channels of images (N, C, H, W) have each value to `counts` (256, C)."""
    for start in range(0, len(images), 1000):  # bincount makes an int64 copy
        for channel in range(images.shape[1]):
            values = images[start : start + 1000, channel].ravel()
            counts[:, channel] += np.bincount(values, minlength=256)
