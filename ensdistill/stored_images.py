"""Images of images.h5 that are read in parts, so that memory grows with the part alone.

A split is stored as pixels (`images` uint8 (N, C, H, W)) or as the files that its images came in,
one after the other (`files` uint8 (bytes,) and `offsets` int64 (N + 1,)), of which
`ensdistill.pictures.pixels` makes the same pixels.
"""

import copy
import os
from collections.abc import Sequence
from itertools import pairwise
from typing import Self

import h5py
import numpy as np
from numpy.typing import ArrayLike, NDArray

from ensdistill import pictures
from ensdistill.files import open_hdf5


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
                self.block, shape = 1, self._decoded(file[split], 0).shape
            else:
                stored = file[f"{split}/images"]
                self.block, shape = (stored.chunks or (1,))[0], stored.shape[1:]
        height, width = size or shape[1:]
        top, left = (shape[1] - height) // 2, (shape[2] - width) // 2
        self._centre = slice(top, top + height), slice(left, left + width)
        self.shape = (len(self.labels), shape[0], height, width)

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

    def read(self, places: ArrayLike) -> NDArray[np.uint8]:
        """Images (n, C, H, W) at these places, in the order asked; errors as of `StoredImages`."""
        sorted_places, ranks = np.unique(self._stored(places), return_inverse=True)
        pixels = np.empty((len(sorted_places), *self.shape[1:]), np.uint8)
        with open_hdf5(self.path) as file:
            if self.encoded:
                for image, place in zip(pixels, sorted_places, strict=True):
                    image[:] = self._decoded(file[self.split], place)[:, *self._centre]
            else:
                stored = file[f"{self.split}/images"]
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

    def _decoded(self, group: h5py.Group, place: int) -> NDArray[np.uint8]:
        """One image (C, H, W) of which the file is stored."""
        files, (start, end) = group["files"], group["offsets"][place : place + 2]
        settings = {"resize": None, "crop": None, **files.attrs}
        name = f"{self.path}: {self.split}, image {place}"
        return pictures.pixels(files[start:end].tobytes(), **settings, name=name)

    @staticmethod
    def _spans(places: NDArray[np.int64], chunks: Sequence[int] | None) -> list[slice]:
        """Parts of sorted places that are read at once: neighbours, and images of one chunk."""
        of_chunk = places // (chunks[0] if chunks else 1)
        apart = (np.diff(places) > 1) & (np.diff(of_chunk) > 0)
        ends = [0, *(np.flatnonzero(apart) + 1).tolist(), len(places)]
        return [slice(*pair) for pair in pairwise(ends) if pair[0] < pair[1]]
