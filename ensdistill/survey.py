"""A survey of images of one's own: how many of which classes, of which sizes."""

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median

from ensdistill import InputError
from ensdistill.own_images import own_images
from ensdistill.pictures import mode_of, size_of


@dataclass(frozen=True)
class Survey:
    """What images of one's own are."""

    classes: dict[str, int]
    """Training images of each class; of all that are not told apart."""
    validation: int | None
    """Images that are said to be for validation; None if none are."""
    test: int | None
    """Images that are said to be for testing; None if none are."""
    colour: bool
    """Whether any image has more than grey."""
    sides: tuple[int, int, int]
    """Pixels of the shorter side: least, median, most."""
    size: tuple[int, int] | None
    """(H, W) that all images have; None if they differ."""

    def __str__(self) -> str:
        """In a sentence."""
        counts = sorted(self.classes.values())
        each = f"{counts[0]:,}" if counts[0] == counts[-1] else f"{counts[0]:,} to {counts[-1]:,}"
        least, middle, most = self.sides
        pixels = f"{least:,} to {most:,} pixels on the shorter side, in the middle {middle:,}"
        if self.size:
            pixels = f"{self.size[1]}×{self.size[0]} pixels"
        said = f"{sum(counts):,} images of {len(counts)} classes, {each} in each"
        said += f", and {self.validation:,} for validation" if self.validation else ""
        said += f", and {self.test:,} for testing" if self.test else ""
        return f"{said}; {'colour' if self.colour else 'grey'}, {pixels}"


def survey(
    *images: str | os.PathLike[str], columns: Mapping[str, str | None] | None = None
) -> Survey:
    """Look at every image once.

    Args:
        images, columns: as of `own_images`, where images are its path.

    Raises:
        InputError: as of `own_images`; one cannot be read; or there are too few of a class.
    """
    from tqdm import tqdm

    paths = [*map(str, images)]
    found, where = own_images(paths, columns=columns), ", ".join(paths)
    sizes, modes = Counter[tuple[int, int]](), set()
    for place, _, content in tqdm(found.read(), "looking at images", unit="", disable=None):
        sizes[size_of(place, content)] += 1
        modes.add(mode_of(place, content))
    counts = Counter(label for split, label, _ in found.names if split == "train")
    splits = Counter(split for split, *_ in found.names)
    for label, number in counts.items():
        if number < 3:
            raise InputError(
                f"{where}: class {label!r} has {number} training image{'s' * (number > 1)}; "
                "to train, to validate and to test takes at least 3"
            )
    if len(counts) < 2:
        raise InputError(f"{where}: has images of one class; a study takes at least 2")
    sides = sorted(min(size) for size in sizes.elements())
    return Survey(
        classes=dict(sorted(counts.items())),
        validation=splits["val"] or None,
        test=splits["test"] or None,
        colour="RGB" in modes,
        sides=(sides[0], int(median(sides)), sides[-1]),
        size=next(iter(sizes)) if len(sizes) == 1 else None,
    )
