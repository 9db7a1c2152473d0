"""The one images.h5 in which every study begins.

images.h5 has `/train`, `/val` and `/test`, each with `images` uint8 (N, C, H, W) and `labels`
int64 (N,), and `/held_out` where the study holds images out. Its attributes hold classes, mean and
std of the training pixels (per channel, in [0, 1]), the source, the SHA-256 of what was read, and
for own data how many files were read and how many skipped, by why.
"""

import json
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ensdistill import InputError, sources
from ensdistill.downloads import SOURCES
from ensdistill.files import open_hdf5, write_hdf5
from ensdistill.sources import Dataset, Split, stratified
from ensdistill.stored_images import StoredImages


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
            **({"files": data.files} if data.files else {}),
            "classes": data.classes,
            **_mean_and_std(splits["train"][0]),
        },
    )
    return data.sha256


def _split(
    data: Dataset,
    source: str,
    train: int | None,
    validation: int,
    test: int | None,
    seed: int,
    held_out: int,
) -> dict[str, Split]:
    """Images and labels by split; arguments and errors as of `write_images`."""
    images, labels = data.train
    count, classes = len(labels), len(data.classes)
    if validation + held_out + (train or classes) > count:
        aside = f"{validation} for validation{f', {held_out} held out' if held_out else ''}"
        wanted = f"{aside} and {train or classes} for training"
        raise InputError(f"source {source!r} has {count} training images, fewer than {wanted}")
    if data.official_validation:
        chosen = np.arange(count) >= count - validation
    else:
        chosen = stratified(labels, validation, seed, "validation", data.classes)
    splits = {"val": (images[chosen], labels[chosen])}
    images, labels = images[~chosen], labels[~chosen]
    if held_out:
        chosen = stratified(labels, held_out, seed, "held_out", data.classes)
        splits["held_out"] = images[chosen], labels[chosen]
        images, labels = images[~chosen], labels[~chosen]
    splits["train"] = _subset(images, labels, train, seed, "train", data.classes)
    splits["test"] = _subset(*data.test, test, seed, "test", data.classes)
    absent = set(range(classes)) - set(splits["train"][1].tolist())
    if absent:
        name = data.classes[min(absent)]
        raise InputError(f"source {source!r}: no training image of class {name!r} is left")
    return splits


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
    return StoredImages(path, split, StoredImages(path, "val").shape[2:] if known else None)


def read_description(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What networks need of images.h5: classes, mean, std, and shape (C, H, W), as they see it."""
    with open_hdf5(path) as file:
        known = {key: json.loads(file.attrs[key]) for key in ("classes", "mean", "std")}
    return {**known, "shape": StoredImages(path, "val").shape[1:]}


def _subset(
    images, labels, count: int | None, seed: int, what: str, classes: Sequence[str]
) -> Split:
    if count is None or count == len(labels):
        return images, labels
    chosen = stratified(labels, count, seed, what, classes, rest=False)
    return images[chosen], labels[chosen]


def _mean_and_std(images: NDArray[np.uint8]) -> dict[str, list[float]]:
    """Of each channel, in [0, 1]; the standard deviation is at least a step of 1/255."""
    pixels, values = _histograms(images), np.arange(256)[:, None] / 255
    mean = (pixels * values).sum(0) / pixels.sum(0)
    std = np.sqrt((pixels * (values - mean) ** 2).sum(0) / pixels.sum(0))
    return {"mean": mean.tolist(), "std": np.maximum(std, 1 / 255).tolist()}


def _histograms(images: NDArray[np.uint8]) -> NDArray[np.int64]:
    """How often a channel has a value (256, C): exact statistics without a float copy of images."""
    counts = np.zeros((256, images.shape[1]), dtype=np.int64)
    for start in range(0, len(images), 1000):  # bincount makes an int64 copy
        for channel in range(images.shape[1]):
            values = images[start : start + 1000, channel].ravel()
            counts[:, channel] += np.bincount(values, minlength=256)
    return counts
