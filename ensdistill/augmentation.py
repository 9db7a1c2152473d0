"""Random changes to training images, on their device."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

LARGE = 2**14
"""Pixels of images that a CPU copies faster one by one than by an index of all pixels."""


class Augmentation:
    """Crops, flips and policies, drawn anew for every image of an epoch.

    An image is padded with zeros and cropped at a random place, or a part of random area is resized
    [Szegedy et al. 2015]; then it is flipped, then changed by the policy. What a part and a policy
    draw depends on the image's own seed, so on no other image.

    Args:
        stored: height and width of the images that are changed.
        size: of what comes out; the same unless told. Larger images are cropped at a random place.
        crop_padding: pixels of zero padding on each side before the crop; 0 for none.
        flip: mirror each image with probability 1/2.
        random_resized_crop: least and largest share of the area that is resized to `size`
            (bilinear, antialiased, sides 3:4 … 4:3), instead of padding and crop; None for none.
        policy: an entry of `POLICIES` with its options, applied to each image; None for none.
    """

    def __init__(
        self,
        stored: Sequence[int],
        size: Sequence[int] | None = None,
        *,
        crop_padding: int,
        flip: bool,
        random_resized_crop: Sequence[float] | None = None,
        policy: Mapping[str, Any] | None = None,
    ):
        self.size = tuple(size or stored)
        self.padding, self.flip = crop_padding, flip
        # (C, H, W) → (C, H, W), with random numbers from the global generator.
        self.one_by_one: list[Callable[[Tensor], Tensor]] = []
        self.height, self.width = self.size
        if random_resized_crop is not None:
            self.padding = 0
            self.one_by_one.append(_resized_crop(self.size, random_resized_crop))
            self.height, self.width = stored
        self.shifts = [
            side + 2 * self.padding - shown + 1
            for side, shown in zip(stored, (self.height, self.width), strict=True)
        ]
        if policy is not None:
            options = dict(policy)
            self.one_by_one.append(POLICIES[options.pop("name")](**options))

    def pad(self, images: Tensor) -> Tensor:
        """Images uint8 (N, H, W, C) as `Changes` take them: padded, (N, H', W', C)."""
        # Channels last: choosing pixels crops, flips, and gives the layout of convolutions.
        return F.pad(images, [0, 0, *[self.padding] * 4]) if self.padding else images

    def draw(self, count: int, generator: torch.Generator) -> "Changes":
        """Those of so many images, all at once; `generator` is on the images' device."""
        on: dict[str, Any] = {"device": generator.device, "generator": generator}
        down, across = self.shifts
        if down == across:
            top, left = torch.randint(down, (2, count, 1), **on)
        else:
            top, left = (torch.randint(shifts, (count, 1), **on) for shifts in self.shifts)
        mirrored = torch.rand(count, 1, **on) < 0.5
        if not self.flip:
            mirrored.fill_(False)
        seeds = torch.randint(2**63 - 1, (count,), **on).tolist() if self.one_by_one else []
        return Changes(self, top, left, mirrored, seeds)


@dataclass(frozen=True)
class Changes:
    """What was drawn for the images of an epoch."""

    of: Augmentation
    top: Tensor
    """First row of the padded image that comes out, (N, 1)."""
    left: Tensor
    """First column, (N, 1)."""
    mirrored: Tensor
    """(N, 1)."""
    seeds: Sequence[int]
    """Of what is done to each image by itself; none where nothing is."""

    def __call__(self, padded: Tensor, index: Tensor, chosen: slice) -> Tensor:
        """Changed images float32 (B, C, H, W) in [0, 1], channels_last.

        Args:
            padded: by `Augmentation.pad`.
            index: which of these, (B,).
            chosen: whose draws they get.
        """
        large = self.of.height * self.of.width >= LARGE and padded.device.type == "cpu"
        choose = self._one_by_one if self.seeds or large else self._at_once
        return choose(padded, index, chosen).permute(0, 3, 1, 2).float().div_(255)

    def _at_once(self, padded: Tensor, index: Tensor, chosen: slice) -> Tensor:
        """Pixels uint8 (B, H, W, C)."""
        _, padded_height, padded_width, channels = padded.shape
        across = torch.arange(self.of.width, device=padded.device)
        rows = self.top[chosen] + torch.arange(self.of.height, device=padded.device)
        columns = self.left[chosen] + torch.where(self.mirrored[chosen], across.flip(0), across)
        lines = (index[:, None] * padded_height + rows) * padded_width
        places = lines[:, :, None] + columns[:, None, :]
        # One flat index: several times as fast as indexing along three axes.
        pixels = padded.view(-1, channels).index_select(0, places.flatten())
        return pixels.view(*places.shape, channels)

    def _one_by_one(self, padded: Tensor, index: Tensor, chosen: slice) -> Tensor:
        """The same, and of each image what is done to it by itself."""
        found = padded.new_empty((len(index), *self.of.size, padded.shape[-1]))
        draws = (it[chosen].flatten().tolist() for it in (self.top, self.left, self.mirrored))
        seeds = self.seeds[chosen] or [0] * len(index)
        with torch.random.fork_rng(devices=[]):
            for image, place, top, left, mirrored, seed in zip(
                found, index.tolist(), *draws, seeds, strict=True
            ):
                part = padded[place, top : top + self.of.height, left : left + self.of.width]
                part = part.flip(1) if mirrored else part
                image.copy_(self._changed(part.permute(2, 0, 1), seed).permute(1, 2, 0))
        return found

    def _changed(self, image: Tensor, seed: int) -> Tensor:
        if self.of.one_by_one:
            torch.default_generator.manual_seed(seed)
        for change in self.of.one_by_one:
            image = change(image)
        return image


def _resized_crop(size: Sequence[int], scale: Sequence[float]) -> Callable[[Tensor], Tensor]:
    from torchvision.transforms import v2

    return v2.RandomResizedCrop(size, scale=scale, antialias=True)


def _trivial_augment() -> Callable[[Tensor], Tensor]:
    from torchvision.transforms import v2

    return v2.TrivialAugmentWide()


def _rand_augment(operations: int, magnitude: int) -> Callable[[Tensor], Tensor]:
    from torchvision.transforms import v2

    return v2.RandAugment(operations, magnitude)


POLICIES: dict[str, Callable[..., Callable[[Tensor], Tensor]]] = {
    "trivial_augment": _trivial_augment,
    "rand_augment": _rand_augment,
}
"""By the names that config.yaml uses; their options are in recipes.py."""
