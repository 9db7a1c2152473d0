"""Your own images, however they come: what folders, archives, tables and saved datasets share.

They are read twice. `OwnImages.read` finds out which there are, what they are called and what is
wrong with them; `OwnImages.again` gives the contents of those that are wanted, once more. Between
the two no pixels need to be kept.
"""

import hashlib
import json
import logging
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ensdistill import InputError
from ensdistill.pictures import pixels

logger = logging.getLogger(__name__)

Key = tuple[str, str, str]
"""Of an image: its split, its class, the SHA-256 of its file."""

EQUAL = {
    "in_both_splits": "images that are in train and in test",
    "in_several_classes": "images that are in several classes",
}
"""What is counted of images that are read, and how it is said."""


class OwnImages:
    """Images of one's own, which `read` gives one by one.

    Args:
        where: what messages call them.
        labelled: whether they have classes and serve for training. Otherwise all that are read
            are test images, without a class.
    """

    names: dict[Key, str]
    """The name of every image that is read: what orders them within a class."""
    groups: dict[Key, str]
    """The group of every image that is read; none if there are no groups."""
    sizes: dict[Key, int]
    """Bytes of every image that is read."""
    counts: Counter[str]
    """Of files, by treatment; and `in_both_splits`, `in_several_classes` of images read."""

    def __init__(self, where: str, labelled: bool):
        self.where, self.labelled = where, labelled
        self.names, self.groups, self.sizes, self.counts = {}, {}, {}, Counter()
        self._places: dict[str, Key] = {}

    def read(self) -> Iterator[tuple[str, Key, bytes]]:
        """Read every image once: its place, its key and its file's content.

        Raises:
            InputError: something cannot be read, or something that should be there is not.
        """
        raise NotImplementedError

    def _contents(self, places: Mapping[str, Key]) -> Iterator[tuple[str, bytes]]:
        """The places that are wanted, with their contents, in the order in which they lie."""
        raise NotImplementedError

    def class_names(self) -> list[str]:
        """The classes of the training images, in the order of their labels."""
        return sorted({label for split, label, _ in self.names if split == "train"})

    def keep(self, place: str, key: Key, name: str, content: bytes, group: str | None) -> bool:
        """Note an image; False if it is the same as another of its class and split."""
        new = key not in self.names
        if new:
            self.sizes[key] = len(content)
            self._places[place] = key
        if new or name < self.names[key]:
            self.names[key] = name
            if group is not None:
                self.groups[key] = group
        return new

    def again(self, wanted: Mapping[Key, int]) -> Iterator[tuple[int, str, bytes]]:
        """The number that stands for an image in `wanted`, its place and its content.

        Raises:
            InputError: it is not there any more, or not as it was.
        """
        places = {place: key for place, key in self._places.items() if key in wanted}
        count = 0
        for place, content in self._contents(places):
            key = places[place]
            if hashlib.sha256(content).hexdigest() != key[-1]:
                raise InputError(f"{place}: changed while it was read")
            count += 1
            yield wanted[key], place, content
        if count < len(wanted):
            raise InputError(f"{self.where}: images vanished while they were read")

    def listing(self) -> dict[str, list[tuple[str, str, str]]]:
        """Class, name and checksum of the images that were read, in order, by split."""
        splits: dict[str, list[tuple[str, str, str]]] = {"train": [], "test": []}
        for (split, label, sha256), name in self.names.items():
            splits.setdefault(split, []).append((label, name, sha256))
        return {split: sorted(found) for split, found in splits.items()}

    def sha256(self) -> str:
        """A checksum of what was read: classes, names, groups and contents, however packed."""
        listing: Any = self.listing()
        if self.groups:
            listing = [listing, sorted((*key, group) for key, group in self.groups.items())]
        return hashlib.sha256(json.dumps(listing).encode()).hexdigest()

    def count_equal(self) -> None:
        """Count images that are in two splits, or in two classes."""
        holders = defaultdict(set)
        for split, label, sha256 in self.names:
            holders[sha256].add((split, label))
        for found in holders.values():
            splits, labels = (len(set(names)) for names in zip(*found, strict=True))
            self.counts["in_both_splits"] += splits > 1
            self.counts["in_several_classes"] += labels > 1

    def tell(self, skipped: str, doubtful: bool) -> None:
        """One sentence, a warning if the user may miss something."""
        said = f"{self.where}: images read: {self.counts['read']:,}{skipped}"
        for kind, what in EQUAL.items():
            if self.counts[kind]:
                said += f"; {what} ({self.counts[kind]:,})"
        doubtful = doubtful or any(self.counts[kind] for kind in EQUAL)
        logger.log(logging.WARNING if doubtful else logging.INFO, said)


class FileImages:
    """Images (N, C, H, W) that are decoded from their files whenever they are asked for.

    Args:
        found: where they are.
        keys: which they are, in order.
        mode: L for one channel, RGB for three.
        resize: side of the centre squares; None for whole pictures, which have one size.
        size: (H, W).
    """

    dtype = np.dtype(np.uint8)
    ndim = 4

    def __init__(
        self,
        found: OwnImages,
        keys: Sequence[Key],
        mode: str,
        resize: int | None,
        size: tuple[int, int],
    ):
        self.found, self.keys, self.mode, self.resize = found, keys, mode, resize
        self.shape = (len(keys), 1 if mode == "L" else 3, *size)

    def __len__(self) -> int:
        return len(self.keys)

    def files(self, chosen: Iterable[int]) -> Iterator[tuple[int, str, bytes]]:
        """Number among the chosen, place and content of their files, in the order of reading."""
        yield from self.found.again({self.keys[it]: n for n, it in enumerate(chosen)})

    def read(self, chosen: Iterable[int], crop: int | None = None) -> Iterator[tuple[int, Any]]:
        """Number among the chosen, and pixels (C, H, W), in the order of reading."""
        for number, place, content in self.files(chosen):
            yield number, self.pixels(place, content, crop)

    def pixels(self, place: str, content: bytes, crop: int | None = None) -> NDArray[np.uint8]:
        """Pixels (C, H, W) of one of the files.

        Raises:
            InputError: it is damaged.
        """
        return pixels(content, resize=self.resize, crop=crop, mode=self.mode, name=place)

    def lengths(self, chosen: Iterable[int]) -> list[int]:
        """Bytes of files."""
        return [self.found.sizes[self.keys[it]] for it in chosen]

    def __getitem__(self, chosen: Any) -> NDArray[np.uint8]:
        places = np.arange(len(self))[chosen]
        images = np.empty((places.size, *self.shape[1:]), np.uint8)
        for number, image in self.read(np.atleast_1d(places)):
            images[number] = image
        return images.reshape(*np.shape(places), *self.shape[1:])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return np.asarray(self[:], dtype)


def own_images(
    path: str | Sequence[str],
    *,
    labelled: bool = True,
    columns: Mapping[str, str | None] | None = None,
) -> OwnImages:
    """What a path is, by itself: a table, a saved dataset, or folders and archives.

    Args:
        path: a table of paths (.csv, .parquet), a folder that `datasets` saved to disk, or what
            `ImageFolder` reads.
        labelled: as of `OwnImages`.
        columns: what the columns of a table or a dataset are called; see `studies.Columns`.

    Raises:
        InputError: there are several tables, or columns are named of what has none.
    """
    from ensdistill.folders import ImageFolder
    from ensdistill.image_tables import ImageTable
    from ensdistill.table_readers import READERS, kind_of

    paths = [path] if isinstance(path, str) else list(path)
    kinds = [kind_of(Path(it)) for it in paths]
    named = {role: name for role, name in (columns or {}).items() if name is not None}
    if not any(kinds):
        if named:
            raise InputError(
                f"{paths[0]}: is no table and no saved dataset, so 'images.columns' means nothing"
            )
        return ImageFolder(path, labelled=labelled)
    if len(paths) > 1:
        alone = next(it for it, kind in zip(paths, kinds, strict=True) if kind)
        raise InputError(f"{alone}: must be the only path")
    table = READERS[str(kinds[0])](Path(paths[0]), named, labelled)
    return ImageTable(paths[0], table, labelled=labelled)
