"""Training batches from images that live on the device as uint8: no workers, no decoding."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F


class TrainingBatches:
    """Shuffled, randomly cropped and flipped batches.

    Args:
        images: uint8 (N, C, H, W); they stay on their device, and batches come from it.
        labels: int64 (N,).
        batch_size: images per batch. An incomplete last batch is left out (its images come in
            another epoch), unless it is the only one.
        crop_padding: pixels of zero padding before a random crop of H×W; 0 for none.
        flip: mirror each image with probability 1/2.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        batch_size: int,
        crop_padding: int,
        flip: bool,
    ):
        # Channels last: choosing pixels crops, flips, and gives the layout of convolutions.
        self.padded = F.pad(images, [crop_padding] * 4).permute(0, 2, 3, 1).contiguous()
        self.height, self.width = images.shape[-2:]
        self.labels = labels
        self.batch_size = min(batch_size, len(images))
        self.shifts = 2 * crop_padding + 1
        self.flip = flip

    def __len__(self) -> int:
        return len(self.labels) // self.batch_size

    def epoch(self, generator: torch.Generator, first: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of an epoch. Everything random is drawn at once, before the first batch.

        Args:
            generator: on the device of the images; the only source of randomness.
            first: how many of the first batches are left out.

        Yields:
            x float32 (B, C, H, W) in [0, 1], channels_last, and y int64 (B,).
        """
        count, on = len(self.labels), {"device": self.labels.device, "generator": generator}
        order = torch.randperm(count, **on)
        top, left = torch.randint(self.shifts, (2, count, 1), **on)
        mirrored = torch.rand(count, 1, **on) < 0.5
        across = torch.arange(self.width, device=self.labels.device)
        rows = top + torch.arange(self.height, device=self.labels.device)
        columns = left + (torch.where(mirrored, across.flip(0), across) if self.flip else across)
        _, padded_height, padded_width, channels = self.padded.shape

        def batch(start: int) -> tuple[Tensor, Tensor]:
            chosen = slice(start, start + self.batch_size)
            index = order[chosen]
            lines = (index[:, None] * padded_height + rows[chosen]) * padded_width
            places = lines[:, :, None] + columns[chosen][:, None, :]
            # One flat index: several times as fast as indexing along three axes.
            pixels = self.padded.view(-1, channels).index_select(0, places.flatten())
            x = pixels.view(*places.shape, channels).permute(0, 3, 1, 2)
            return x.float().div_(255), self.labels[index]

        size = self.batch_size
        return map(batch, range(first * size, len(self) * size, size))
