"""Your own images as a table says: paths and labels, or images saved by Hugging Face's `datasets`.

A table (.csv or .parquet) has a row for every image: its path, relative to the table's folder or
absolute, its label, and, if such columns are there, its split and its group. A dataset that
`datasets` saved to disk (a Dataset, or a DatasetDict, whose keys are splits) has images instead of
paths. What is one image in two rows is refused; of rows whose images have the same bytes in one
class and split the first by name is read, as in folders. Groups never part: what is done for that
when splits are chosen is in `ensdistill.splits`; where splits are given, a group in two of them is
refused.

The order of rows changes nothing.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from ensdistill import InputError
from ensdistill.own_images import Key, OwnImages

SPELLINGS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
"""What the splits may be called, in letters of any case."""


@dataclass(frozen=True)
class Table:
    """The rows of a table, column by column; columns that are not there are None."""

    labels: list[str] | None
    splits: list[str] | None
    groups: list[str] | None
    names: list[str]
    """What orders the images within a class."""
    place: Callable[[int], str]
    """What messages call a row."""
    image: Callable[[int], str]
    """What messages call a row's image; unique."""
    content: Callable[[int], bytes]
    """Reads a row's image."""
    classes: list[str] | None = None
    """The classes in the order of their labels, where the table says it."""


class ImageTable(OwnImages):
    """The images of a table or a saved dataset.

    Args:
        where: the table, or the dataset's folder.
        table: what stands there.
        labelled: as of `OwnImages`. Without labels the rows of the split `test` count, or all if
            there are none.
    """

    def __init__(self, where: str, table: Table, *, labelled: bool = True):
        super().__init__(where, labelled)
        self.table = table
        self._rows: dict[str, int] = {}

    def read(self) -> Iterator[tuple[str, Key, bytes]]:
        table, count = self.table, len(self.table.names)
        if not count:
            raise InputError(f"{self.where}: has no rows")
        splits = [self._split(row) for row in range(count)] if table.splits else ["train"] * count
        if not self.labelled and "test" not in splits:
            splits = ["test"] * count
        labels = [self._label(row) for row in range(count)] if self.labelled else [""] * count
        if table.groups and self.labelled:
            self._check_groups(splits)
        for row, (split, label) in enumerate(zip(splits, labels, strict=True)):
            if not self.labelled and split != "test":
                continue
            content, place = table.content(row), table.image(row)
            key = (split, label, hashlib.sha256(content).hexdigest())
            group = table.groups[row] if table.groups else None
            if self.keep(place, key, table.names[row], content, group):
                self._rows[place] = row
                self.counts["read"] += 1
                yield place, key, content
            else:
                self.counts["duplicates"] += 1
        if self.labelled and "train" not in splits:
            raise InputError(f"{self.where}: has no training images, only {', '.join({*splits})}")
        self.count_equal()
        same = self.counts["duplicates"]
        said = f"; skipped: the same as another of their class ({same:,})" if same else ""
        self.tell(said, bool(same))

    def _contents(self, places: Mapping[str, Key]) -> Iterator[tuple[str, bytes]]:
        for place, row in self._rows.items():
            if place in places:
                yield place, self.table.content(row)

    def class_names(self) -> list[str]:
        there, order = super().class_names(), self.table.classes
        if order:
            return [name for name in order if name in there]
        return sorted(there, key=int) if all(it.isdecimal() for it in there) else there

    def _split(self, row: int) -> str:
        said = (self.table.splits or [])[row]
        split = SPELLINGS.get(said.strip().lower())
        if split is None:
            what = f"the split {said!r} is unknown" if said.strip() else "the split is empty"
            raise InputError(f"{self.table.place(row)}: {what}; it is train, validation or test")
        return split

    def _label(self, row: int) -> str:
        label = (self.table.labels or [])[row]
        if not label.strip():
            raise InputError(f"{self.table.place(row)}: the label is empty")
        return label

    def _check_groups(self, splits: Sequence[str]) -> None:
        """Refuse a group that is in two splits, or an image without group."""
        first: dict[str, int] = {}
        for row, group in enumerate(self.table.groups or []):
            if not group.strip():
                raise InputError(f"{self.table.place(row)}: the group is empty")
            before = first.setdefault(group, row)
            if splits[before] != splits[row]:
                raise InputError(
                    f"{self.where}: group {group!r} is in {splits[before]} "
                    f"({self.table.image(before)}) and in {splits[row]} ({self.table.image(row)})"
                )
