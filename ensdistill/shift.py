"""Test images under shift, on which uncertainty should grow: shifted.h5.

shifted.h5 has `/corrupted/clean/0`, `/corrupted/<kind>/<severity>` for the 19 `KINDS` at severities
1 … 5, and `/out_of_distribution/<name>` for every set of other images, each with `images` uint8
(N, C, H, W) and `labels` int64 (N,); images out of distribution have the label −1.
"""

import hashlib
import os
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_sample_images

from ensdistill import InputError
from ensdistill.corruptions import KINDS, SEVERITIES, corrupt, corrupt_parts
from ensdistill.downloads import SOURCES, verify
from ensdistill.hdf5 import Streamed, open_hdf5, write_hdf5
from ensdistill.images import evaluation_images, read_source
from ensdistill.own_images import FileImages
from ensdistill.pictures import as_array
from ensdistill.sources import KEPT
from ensdistill.stored_images import StoredImages

PIECES = 2000
"""How many pieces of photographs there are."""


def write_shifted(
    output: str | os.PathLike[str],
    images: str | os.PathLike[str],
    *,
    corruptions: dict[str, Any],
    out_of_distribution: Sequence[Mapping[str, Any]],
    seed: int,
    official: Sequence[str] = (),
    archives: Sequence[str] = (),
    attributes: dict[str, Any],
) -> dict[str, str]:
    """Write shifted.h5: corrupted test images, and images of other things.

    Args:
        output: the file to write, whole or not at all.
        images: images.h5, whose test split is corrupted.
        corruptions: that section of a study.
        out_of_distribution: its sections, one for each set.
        seed: of choices, corruptions and pieces.
        official: the archive of the `official` corruptions.
        archives: those of the sources of images out of distribution.
        attributes: what else the file should say of itself.

    Returns:
        the SHA-256 of the images out of distribution that were read, by the set's name.

    Raises:
        InputError: a source is unusable, or the official corruptions are of other images.
    """
    with open_hdf5(images) as file:
        checksums: dict[str, Any] = {"images": str(file.attrs["sha256"])}
    test = evaluation_images(images, "test")
    labels, shape = test.labels, test.shape[1:]
    chosen = _choice(labels, corruptions["images"], seed)
    sets = {
        section["name"]: _others(section, shape=shape, seed=seed, archives=archives)
        for section in out_of_distribution
    }
    checksums["out_of_distribution"] = {name: sha256 for name, (_, sha256, _) in sets.items()}
    files = {name: read for name, (_, _, read) in sets.items() if read}
    if corruptions["source"] == "official":
        (archive,) = official
        checksums["corruptions"] = verify(archive)
        corrupted: Iterator[tuple[str, int, Any]] = _official(archive, labels, chosen)
    else:
        corrupted = _copies(test.choose(chosen), seed)

    def arrays() -> Iterator[tuple[str, NDArray[Any] | Streamed]]:
        yield from _named("corrupted/clean/0", _clean(test.choose(chosen)), labels[chosen])
        for kind, severity, copies in corrupted:
            yield from _named(f"corrupted/{kind}/{severity}", copies, labels[chosen])
        for name, (others, *_) in sets.items():
            unknown = np.full(others.shape[0], -1, dtype=np.int64)
            yield from _named(f"out_of_distribution/{name}", others, unknown)

    if files:
        attributes = {**attributes, "out_of_distribution_files": files}
    write_hdf5(output, arrays(), {**attributes, "kinds": KINDS, "sha256": checksums})
    return checksums["out_of_distribution"]


def _named(
    split: str, images: NDArray[np.uint8] | Streamed, labels: NDArray[np.int64]
) -> Iterator[tuple[str, NDArray[Any] | Streamed]]:
    yield f"{split}/images", images
    yield f"{split}/labels", labels


def _choice(labels: NDArray[np.int64], count: int | None, seed: int) -> NDArray[np.int64]:
    """Indices of `count` images by seed, the classes' shares kept; of all if there are no more.

    Systematic sampling of a random order within classes: unlike a stratified split it works for
    any count.
    """
    if count is None or count >= len(labels):
        return np.arange(len(labels))
    order = np.random.default_rng(seed).permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    return np.sort(order[np.arange(count) * len(labels) // count])


# --- corruptions -----------------------------------------------------------------------------


def _is_large(count: int, shape: Sequence[int]) -> bool:
    """Whether so many images are written part by part, never being all in memory."""
    return count * prod(shape) > KEPT


def _clean(chosen: StoredImages) -> NDArray[np.uint8] | Streamed:
    """The chosen test images."""
    places = np.arange(len(chosen))
    if not _is_large(len(chosen), chosen.shape[1:]):
        return chosen.read(places)
    parts = ((place, chosen.read([place])) for place in places.tolist())
    return Streamed(chosen.shape, lambda: parts)


def _copies(
    chosen: StoredImages, seed: int
) -> Iterator[tuple[str, int, NDArray[np.uint8] | Streamed]]:
    """Corrupted copies of the chosen test images, by kind and severity."""
    places, large = np.arange(len(chosen)), _is_large(len(chosen), chosen.shape[1:])
    images = None if large else chosen.read(places)

    def read(part: slice) -> NDArray[np.uint8]:
        return chosen.read(places[part])

    for kind in KINDS:
        for severity in SEVERITIES:
            if images is None:
                parts = partial(corrupt_parts, read, chosen.shape, kind, severity, seed)
                yield kind, severity, Streamed(chosen.shape, parts)
            else:
                yield kind, severity, corrupt(images, kind, severity, seed)


def _official(
    archive: str, labels: NDArray[np.int64], chosen: NDArray[np.int64]
) -> Iterator[tuple[str, int, NDArray[np.uint8]]]:
    """The chosen images of CIFAR-10-C or CIFAR-100-C, read kind by kind.

    Each kind holds the whole test split five times, by severity.
    """
    with open(archive, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:

        def load(name: str) -> NDArray[Any]:
            try:
                file.seek(tar.getmember(f"{Path(archive).stem}/{name}.npy").offset_data)
                return np.load(file, allow_pickle=False)
            except (KeyError, OSError, ValueError) as error:
                raise InputError(f"{archive}: {name}.npy is no array ({error})") from error

        if not np.array_equal(load("labels"), np.tile(labels, len(SEVERITIES))):
            raise InputError(f"{archive}: its labels are not those of the study's test images")
        for kind in KINDS:
            for severity, images in zip(
                SEVERITIES, np.split(load(kind), len(SEVERITIES)), strict=True
            ):
                yield kind, severity, images[chosen].transpose(0, 3, 1, 2)


# --- out of distribution ---------------------------------------------------------------------


def _others(
    section: Mapping[str, Any], *, shape: tuple[int, int, int], seed: int, archives: Sequence[str]
) -> tuple[NDArray[np.uint8] | Streamed, str, dict[str, int]]:
    """Images of `shape` (C, H, W) from another source, the SHA-256 of what was read.

    Of own data also how many files were read and skipped.
    """
    source, images = section["source"], section["images"]
    channels, height, width = shape
    mode = "L" if channels == 1 else "RGB"
    if source == "photographs":
        photographs = load_sample_images().images
        sha256, files = hashlib.sha256(b"".join(photographs)).hexdigest(), {}
        whole = [Image.fromarray(photograph).convert(mode) for photograph in photographs]
        pictures = _pieces(whole, width, height, min(images or PIECES, PIECES), seed)
    else:
        data = read_source(
            source,
            path=section["path"],
            size=max(height, width),
            test=None,
            seed=seed,
            archives=[path for path in archives if Path(path).name in SOURCES[source].archives],
            labelled=False,
        )
        pixels, labels = data.test
        sha256, files, chosen = data.sha256, data.files, _choice(labels, images, seed)

        def resized(image: NDArray[np.uint8]) -> Image.Image:
            picture = Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0))
            return picture.convert(mode).resize((width, height), Image.Resampling.BICUBIC)

        if isinstance(pixels, FileImages) and _is_large(len(chosen), shape):
            parts = (
                (number, as_array([resized(image)], mode)) for number, image in pixels.read(chosen)
            )
            return Streamed((len(chosen), *shape), lambda: parts), sha256, files
        pictures = map(resized, pixels[chosen])
    return as_array(pictures, mode), sha256, files


def _pieces(
    photographs: Sequence[Image.Image], width: int, height: int, count: int, seed: int
) -> Iterator[Image.Image]:
    """Pieces at random places, four times the size wanted where there is room, then reduced."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        photograph = photographs[int(rng.integers(len(photographs)))]
        scale = min(4, photograph.width / width, photograph.height / height)
        across, down = int(scale * width), int(scale * height)
        left = int(rng.integers(photograph.width - across + 1))
        top = int(rng.integers(photograph.height - down + 1))
        box = (left, top, left + across, top + down)
        yield photograph.resize((width, height), Image.Resampling.BOX, box)
