"""Training batches, of images that stay on the device as uint8 or are read in the background."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ensdistill.augmentation import Augmentation
from ensdistill.distributed import own, part_of, place
from ensdistill.loading import images_per_read, mixed
from ensdistill.stored_images import StoredImages

WINDOW = 2**28
"""Bytes of pixels among which images are mixed that are stored in blocks."""


class TrainingBatches:
    """Shuffled, randomly changed batches.

    Args:
        images: uint8 (N, C, H, W); they stay on their device, and batches come from it.
        labels: int64 (N,).
        batch_size: images per batch. An incomplete last batch is left out (its images come in
            another epoch), unless it is the only one.
        crop_padding, flip, more: of the images' `Augmentation`.
    """

    def __init__(
        self,
        images: Tensor | StoredImages,
        labels: Tensor,
        batch_size: int,
        crop_padding: int,
        flip: bool,
        **more: Any,
    ):
        self.augmentation = Augmentation(
            images.shape[-2:], crop_padding=crop_padding, flip=flip, **more
        )
        self.labels = labels
        self.batch_size = min(batch_size, len(images))
        self._keep(images)

    def _keep(self, images: Any) -> None:
        self.padded = self.augmentation.pad(images.permute(0, 2, 3, 1)).contiguous()

    def __len__(self) -> int:
        return len(self.labels) // self.batch_size

    def epoch(self, generator: torch.Generator, first: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of an epoch. Everything random is drawn at once, before the first batch.

        Args:
            generator: on the device of the images; the only source of randomness.
            first: how many of the first batches are left out.

        Yields:
            x float32 (B, C, H, W) in [0, 1], channels_last, and y int64 (B,); of several processes
            each gets its part.
        """
        count = len(self.labels)
        order = torch.randperm(count, device=self.labels.device, generator=generator)
        changes = self.augmentation.draw(count, generator)

        def batch(start: int) -> tuple[Tensor, Tensor]:
            chosen = own(slice(start, start + self.batch_size))
            index = order[chosen]
            return changes(self.padded, index, chosen), self.labels[index]

        size = self.batch_size
        return map(batch, range(first * size, len(self) * size, size))

    def any_batch(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """One batch by itself, as the first of an epoch."""
        return next(self.epoch(generator))


class StreamedBatches(TrainingBatches):
    """The same of images that stay in their file: memory grows with the batch alone.

    Images that are stored one by one, or as files, come in the order of `TrainingBatches`. Else
    blocks of neighbours are read: an epoch goes through windows of `WINDOW` bytes, each with one
    block from each of as many equal parts of the file as fit, and mixes their images. A file may be
    sorted by class: every window has the classes' shares.

    Args:
        images: to be read.
        labels: int64 (N,), on the device of the batches.
    """

    def _keep(self, images: Any) -> None:
        self.stored: StoredImages = images

    def epoch(self, generator: torch.Generator, first: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        count, size, device = len(self.labels), self.batch_size, self.labels.device
        windows, order = self._plan(generator)
        changes = self.augmentation.draw(count, generator)
        labels = self.labels.cpu()[order]
        batches = [own(slice(end - size, end)) for end in range(size, count + 1, size)]
        parts = mixed(self.stored, *_of(batches, windows, order), first)
        for chosen, pixels in zip(batches[first:], parts, strict=True):
            yield self._changed(pixels, changes, chosen), labels[chosen].to(device)

    def any_batch(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Of images at random places, read when they are asked for."""
        device, size = self.labels.device, self.batch_size
        chosen = part_of(size)
        index = torch.randperm(len(self.labels), device=device, generator=generator)[chosen]
        changes = self.augmentation.draw(len(self.labels), generator)
        pixels = torch.from_numpy(self.stored.read(index.cpu().numpy())).permute(0, 2, 3, 1)
        return self._changed(pixels, changes, chosen), self.labels[index]

    def _changed(self, pixels: Tensor, changes: Any, chosen: slice) -> Tensor:
        device = self.labels.device
        padded = self.augmentation.pad(pixels.to(device))
        return changes(padded, torch.arange(len(pixels), device=device), chosen)

    def _plan(
        self, generator: torch.Generator
    ) -> tuple[list[list[NDArray[np.int64]]], NDArray[np.int64]]:
        """An epoch's reads, window by window, and the order of its images."""
        count, block = len(self.labels), self.stored.block
        on: dict[str, Any] = {"device": generator.device, "generator": generator}
        if block == 1:
            order = torch.randperm(count, **on).cpu().numpy()
            parts = _split(order, self.batch_size)
            return [_split(part, images_per_read(self.stored)) for part in parts], order
        blocks = _split(np.arange(count), block)
        at_once = max(1, WINDOW // (self.stored.nbytes // count * block))
        number = math.ceil(len(blocks) / at_once)
        strata = math.ceil(len(blocks) / number)
        ranks = torch.rand(strata, number, **on).argsort(1).cpu().numpy()
        chosen = (number * np.arange(strata)[:, None] + ranks).T
        windows = [[blocks[it] for it in own if it < len(blocks)] for own in chosen]
        joined = map(np.concatenate, windows)
        mixed_up = [it[torch.randperm(len(it), **on).cpu().numpy()] for it in joined]
        return windows, np.concatenate(mixed_up)


def _of(
    batches: Sequence[slice], windows: list[list[NDArray[np.int64]]], order: NDArray[np.int64]
) -> tuple[list[list[NDArray[np.int64]]], NDArray[np.int64], int]:
    """What `mixed` takes of an epoch, for these parts of its batches alone."""
    size = batches[0].stop - batches[0].start
    if place().count == 1:
        return windows, order, size
    chosen = np.concatenate([order[part] for part in batches])
    mine = np.zeros(len(order), bool)
    mine[chosen] = True
    fewer = ([part[mine[part]] for part in window] for window in windows)
    reads = [[part for part in window if len(part)] for window in fewer]
    return [window for window in reads if window], chosen, size


def _split(places: NDArray[np.int64], size: int) -> list[NDArray[np.int64]]:
    return np.split(places, range(size, len(places), size))


def training_batches(
    images: Tensor | StoredImages, labels: Tensor, batch_size: int, **augmentation: Any
) -> TrainingBatches:
    """Of images as `load_images` returns them."""
    kind: type[TrainingBatches] = TrainingBatches
    if isinstance(images, StoredImages):
        kind = StreamedBatches
    return kind(images, labels, batch_size, **augmentation)
