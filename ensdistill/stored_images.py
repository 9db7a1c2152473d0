"""Images of images.h5 that are read in parts, so that memory grows with the part alone.

A split is stored as pixels (`images` uint8 (N, C, H, W)) or as the files that its images came in,
one after the other (`files` uint8 (bytes,) and `offsets` int64 (N + 1,)), of which
`ensdistill.pictures.pixels` makes the same pixels.
"""

import copy
import os
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, Self

import h5py
import numpy as np
from numpy.typing import ArrayLike, NDArray

from ensdistill import DamagedFile, pictures
from ensdistill.hdf5 import open_hdf5


class StoredImages:
    """Images of one split that stay in their file, which each read opens by itself.

    So one may be read by several processes at a time, before and after a fork.

    Args:
        path: images.h5, or shifted.h5.
        split: such as `train`.
        size: height and width of the centre that is read of larger images; all of them unless told.

    Attributes:
        labels: int64 (N,).
        shape: (N, C, H, W), as they are read.
        encoded: whether files are stored, not pixels.
        block: how many neighbouring images are read at the price of one.

    Raises:
        InputError: the file is damaged or no images file.
    """

    def __init__(self, path: str | os.PathLike[str], split: str, size: Sequence[int] | None = None):
        self.path, self.split = path, split
        self._places: NDArray[np.int64] | None = None
        with open_hdf5(path) as file:
            self.labels = file[f"{split}/labels"][:]
            self.encoded = "files" in file[split]
            if self.encoded:
                stored = file[f"{split}/files"]
                self._offsets = file[f"{split}/offsets"][:]
                self._settings = {"resize": None, "crop": None, **stored.attrs}
                self._check(_are_files(stored, self._offsets, self._settings, self.labels))
                self.block, shape = 1, self._decoded(stored, 0).shape
            else:
                stored = file[f"{split}/images"]
                self._check(_are_pixels(stored, self.labels))
                self.block, shape = (stored.chunks or (1,))[0], stored.shape[1:]
        height, width = size or shape[1:]
        self._check(height <= shape[1] and width <= shape[2])
        self._whole = shape
        top, left = (shape[1] - height) // 2, (shape[2] - width) // 2
        self._centre = slice(top, top + height), slice(left, left + width)
        self.shape = (len(self.labels), shape[0], height, width)

    def _check(self, sound: bool) -> None:
        if not sound:
            raise DamagedFile(self.path, f"what stands in {self.split!r} are no images with labels")

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of all pixels."""
        return int(np.prod(self.shape, dtype=np.int64))

    def choose(self, places: ArrayLike) -> Self:
        """Only these images, in this order."""
        chosen = copy.copy(self)
        chosen._places, chosen.labels = self._stored(places), self.labels[places]
        chosen.block, chosen.shape = 1, (len(chosen.labels), *self.shape[1:])
        return chosen

    def read(self, places: ArrayLike, contiguous: bool = True) -> NDArray[np.uint8]:
        """Images (n, C, H, W) at these places, in the order asked; errors as of `StoredImages`.

        Args:
            contiguous: whether they are in C order; else in the order that is had at least cost.
        """
        places = self._stored(places)
        with open_hdf5(self.path) as file:
            if self.encoded:
                pixels = self._decode(file[f"{self.split}/files"], places)
            else:
                pixels = self._select(file[f"{self.split}/images"], places)
        return np.ascontiguousarray(pixels) if contiguous else pixels

    def _decode(self, stored: h5py.Dataset, places: NDArray[np.int64]) -> NDArray[np.uint8]:
        _, channels, height, width = self.shape
        # Pictures are decoded with their channels last.
        pixels = np.empty((len(places), height, width, channels), np.uint8).transpose(0, 3, 1, 2)
        for row in np.argsort(places):
            image = self._decoded(stored, places[row])
            self._check(image.shape == self._whole)
            pixels[row] = image[:, *self._centre]
        return pixels

    def _select(self, stored: h5py.Dataset, places: NDArray[np.int64]) -> NDArray[np.uint8]:
        sorted_places, ranks = np.unique(places, return_inverse=True)
        pixels = np.empty((len(sorted_places), *self.shape[1:]), np.uint8)
        for span in self._spans(sorted_places, stored.chunks):
            chosen = sorted_places[span]
            source = slice(chosen[0], chosen[-1] + 1), slice(None), *self._centre
            if len(chosen) == chosen[-1] + 1 - chosen[0]:
                stored.read_direct(pixels, source, span)
            else:
                pixels[span] = stored[source][chosen - chosen[0]]
        return pixels if (np.diff(ranks) == 1).all() else pixels[ranks]

    def _stored(self, places: ArrayLike) -> NDArray[np.int64]:
        """Places in the file."""
        places = np.asarray(places, np.int64)
        return places if self._places is None else self._places[places]

    def _decoded(self, stored: h5py.Dataset, place: int) -> NDArray[np.uint8]:
        """One image (C, H, W) of which the file is stored."""
        start, end = self._offsets[place : place + 2]
        name = f"{self.path}: {self.split}, image {place}"
        return pictures.pixels(stored[start:end].tobytes(), **self._settings, name=name)

    @staticmethod
    def _spans(places: NDArray[np.int64], chunks: Sequence[int] | None) -> list[slice]:
        """Parts of sorted places that are read at once: neighbours, and images of one chunk."""
        of_chunk = places // (chunks[0] if chunks else 1)
        apart = (np.diff(places) > 1) & (np.diff(of_chunk) > 0)
        ends = [0, *(np.flatnonzero(apart) + 1).tolist(), len(places)]
        return [slice(*pair) for pair in pairwise(ends) if pair[0] < pair[1]]


def _are_pixels(images: h5py.Dataset, labels: NDArray[Any]) -> bool:
    """Whether arrays are uint8 (N, C, H, W) and integers (N,)."""
    alike = labels.ndim == 1 and images.shape[:1] == labels.shape
    return alike and labels.dtype.kind == "i" and images.dtype == np.uint8 and images.ndim == 4


def _are_files(
    files: h5py.Dataset, offsets: NDArray[Any], settings: Mapping[str, Any], labels: NDArray[Any]
) -> bool:
    """Whether arrays and attributes are those of N files, N > 0, and integers (N,)."""
    sides = [it for it in (settings["resize"], settings["crop"]) if it is not None]
    ends = (0, *files.shape) if files.ndim == 1 else ()
    return bool(
        labels.ndim == offsets.ndim == 1
        and len(offsets) == len(labels) + 1 > 1
        and labels.dtype.kind == offsets.dtype.kind == "i"
        and files.dtype == np.uint8
        and (offsets[0], offsets[-1]) == ends
        and (np.diff(offsets) > 0).all()
        and {*settings} == {"resize", "crop", "mode"}
        and settings["mode"] in ("L", "RGB")
        and all(map(pictures.is_side, sides))
        and sides == sorted(sides, reverse=True)
    )
