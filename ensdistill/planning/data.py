"""How many images a study has, before they are there."""

import os
from dataclasses import dataclass
from math import prod
from typing import Any

from ensdistill import InputError
from ensdistill.studies import OutOfDistribution, Study

SOURCES = {
    "digits": (1797, 0, (1, 8, 8), 10),
    "cifar10": (50_000, 10_000, (3, 32, 32), 10),
    "cifar100": (50_000, 10_000, (3, 32, 32), 100),
    "svhn": (73_257, 26_032, (3, 32, 32), 10),
    "tinyimagenet": (100_000, 10_000, (3, 64, 64), 200),
}
"""Images for training and for testing, (C, H, W), classes."""

PHOTOGRAPHS = 2000
COPIES = 19 * 5 + 1
"""Sets of corrupted images: kinds × severities, and the images as they are."""


@dataclass(frozen=True)
class Data:
    """What a study's images come to."""

    shape: tuple[int, int, int]
    """(C, H, W), as networks see them."""
    classes: int
    train: int
    validation: int
    test: int
    shifted: int
    """Images in all sets of shifted.h5."""

    @property
    def description(self) -> dict[str, Any]:
        """As `read_description` returns."""
        channels = self.shape[0]
        names = [str(number) for number in range(self.classes)]
        return {
            "classes": names,
            "mean": [0.5] * channels,
            "std": [0.25] * channels,
            "shape": self.shape,
        }

    @property
    def pixels(self) -> int:
        """Bytes of an image."""
        return prod(self.shape)


def data_of(study: Study, images: str | os.PathLike[str], classes: int | None) -> Data:
    """What is known of a study's images: from images.h5, its source, or a look at own images.

    Args:
        images: where images.h5 is, or will be.
        classes: of own images that are not there.

    Raises:
        InputError: own images are not there, and the configuration does not say how many.
    """
    if os.path.exists(images):
        shape, count, splits = _made(images)
    elif study.images.source == "folder":
        shape, count, splits = _own(study, classes)
    else:
        shape, count, splits = _known(study)
    corrupted = min(study.corruptions.images or splits["test"], splits["test"])
    others = sum(_others(section) for section in study.out_of_distribution)
    return Data(
        shape,
        count,
        splits["train"],
        splits["validation"],
        splits["test"],
        COPIES * corrupted + others,
    )


def _made(path: str | os.PathLike[str]) -> tuple[tuple[int, int, int], int, dict[str, int]]:
    from ensdistill.hdf5 import open_hdf5
    from ensdistill.images import read_description

    known = read_description(path)
    with open_hdf5(path) as file:
        splits = {
            name: len(file[f"{split}/labels"])
            for name, split in (("train", "train"), ("validation", "val"), ("test", "test"))
        }
    return known["shape"], len(known["classes"]), splits


def _known(study: Study) -> tuple[tuple[int, int, int], int, dict[str, int]]:
    images = study.images
    there, tested, shape, classes = SOURCES[images.source]
    if not tested:  # of the digits a third, unless told
        tested = images.test or there // 3
        there -= tested
    left = there - images.validation - (images.held_out or 0)
    return shape, classes, _splits(images.train or left, images.validation, images.test or tested)


def _own(study: Study, classes: int | None) -> tuple[tuple[int, int, int], int, dict[str, int]]:
    images = study.images
    paths = [images.path] if isinstance(images.path, str) else [*(images.path or [])]
    aside = images.validation + (images.held_out or 0)
    if all(map(os.path.exists, paths)):
        from ensdistill.survey import survey

        found = survey(*paths, columns=images.columns.model_dump())
        there = sum(found.classes.values())
        test = images.test or found.test or there // 5
        left = there - (0 if found.validation else aside) - (0 if found.test else test)
        side = images.size or max(found.size or found.sides)
        shape = (3 if found.colour else 1, side, side)
        count, train = len(found.classes), images.train or left
    else:
        if classes is None or None in (images.size, images.train, images.test):
            raise InputError(
                f"{paths[0]} does not exist: to plan without these images, config.yaml must say "
                "their size, train, validation and test, and `--classes` the number of classes"
            )
        shape, count = (3, images.size or 0, images.size or 0), classes
        train, test = images.train or 0, images.test or 0
    return shape, count, _splits(train, images.validation, test)


def _splits(train: int, validation: int, test: int) -> dict[str, int]:
    return {"train": train, "validation": validation, "test": test}


def _others(section: OutOfDistribution) -> int:
    """Images of a set out of distribution."""
    most = {"photographs": PHOTOGRAPHS, **{name: it[1] for name, it in SOURCES.items()}}
    known = most.get(section.source) or SOURCES.get(section.source, (0,))[0] // 3
    if not known:
        return section.images or PHOTOGRAPHS
    return min(section.images or known, known)
