"""Images on the device: all at once where they fit, else read in the background."""

import logging
import math
import multiprocessing
import os
import resource
import signal
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ensdistill import InputError
from ensdistill.distributed import place
from ensdistill.jobs import end_with_parent
from ensdistill.stored_images import StoredImages

logger = logging.getLogger(__name__)

SHARE = 1 / 4
"""Of the free memory that the pixels of a split may take: augmentation needs them twice, and other
jobs begin at the same time."""

READ = 2**21
"""Bytes of pixels that a process reads at a time."""


def load_images(
    stored: StoredImages, device: torch.device, level: int = logging.DEBUG
) -> tuple[Tensor | StoredImages, Tensor]:
    """Images for a device, and their labels int64 (N,) on it.

    Args:
        level: at which the log says that they stay in memory.

    Returns:
        uint8 (N, C, H, W) on the device; or, where they are more than `SHARE` of the memory, the
        same that were given, to be read in the background, as the log then says. Of the memory of
        several processes that train together each has an equal part.

    Raises:
        InputError: they cannot be read.
    """
    labels = torch.from_numpy(stored.labels).to(device)
    share = SHARE / place().count
    most = share * free_memory(device)
    facts = stored.split, stored.nbytes / 2**20, share, most / share / 2**20
    if stored.nbytes > most:
        logger.info(
            "%s: %.0f MiB of pixels are read in the background, by as many processes as the job "
            "has threads: more than %g of the %.0f MiB that are free",
            *facts,
        )
        return stored, labels
    sentence = "%s: %.0f MiB of pixels stay in memory: at most %g of the %.0f MiB that are free"
    logger.log(level, sentence, *facts)
    return torch.from_numpy(stored.read(np.arange(len(stored)))).to(device), labels


def free_memory(device: torch.device) -> int:
    """Bytes that are free: the least of what the device, the machine and the limits leave."""
    found = [_of_machine(), *_of_cgroups(), *_of_limits()]
    if device.type == "cuda":
        found.append(torch.cuda.mem_get_info(device)[0])
    return max(0, min(found))


def _of_machine() -> int:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        known = dict(line.split(":") for line in lines)
        return int(known["MemAvailable"].split()[0]) << 10
    except (OSError, KeyError):  # no Linux
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _of_cgroups() -> Iterator[int]:
    """Limits of this process's control groups and of those that they are in, versions 1 and 2."""
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, place = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        root = Path("/sys/fs/cgroup", controllers)
        name = "memory.limit_in_bytes" if controllers else "memory.max"
        for folder in (own := root / place.lstrip("/"), *own.parents):
            try:
                yield int((folder / name).read_text(encoding="ascii"))
            except (OSError, ValueError):  # the root has none; "max"
                continue


def _of_limits() -> Iterator[int]:
    """What `ulimit -d` and `ulimit -v` leave."""
    for limit, name in ((resource.RLIMIT_DATA, "VmData"), (resource.RLIMIT_AS, "VmSize")):
        most = resource.getrlimit(limit)[0]
        if most == resource.RLIM_INFINITY:
            continue
        try:
            lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
            used = next(line.split()[1] for line in lines if line.startswith(name))
            yield most - (int(used) << 10)
        except (OSError, StopIteration):
            yield most


def in_batches(
    images: Tensor | StoredImages, batch_size: int, device: torch.device
) -> Iterator[Tensor]:
    """All images uint8 in their order, `batch_size` at a time, on a device."""
    if isinstance(images, Tensor):
        yield from images.split(batch_size)
        return
    step = images_per_read(images)
    ends = [*range(0, len(images), step), len(images)]
    parts = read_ahead(images, [np.arange(*pair) for pair in pairwise(ends)], batch_size)
    rest = torch.empty((0, *images.shape[1:]), dtype=torch.uint8)
    for part in parts:
        known = torch.cat([rest, part])
        full = len(known) // batch_size * batch_size
        if full:
            yield from known[:full].to(device).split(batch_size)
        rest = known[full:]
    if len(rest):
        yield rest.to(device)


def images_per_read(images: StoredImages) -> int:
    """How many images a process should read at a time: whole blocks."""
    of_image = max(1, math.prod(images.shape[1:]))
    return images.block * max(1, READ // (of_image * images.block))


def read_ahead(
    images: StoredImages,
    reads: Sequence[NDArray[np.int64]],
    ahead: int,
    channels_last: bool = False,
) -> Iterator[Tensor]:
    """Read images in the background, in processes that end with this one.

    There are `readers()` of them. Nothing but the time depends on their number.

    Args:
        reads: which images are read at a time.
        ahead: images that should be at hand before they are needed.
        channels_last: whether what comes is (n, H, W, C).

    Yields:
        of each read the pixels uint8 (n, C, H, W), on the CPU.

    Raises:
        InputError: the file is damaged.
    """
    if not reads:
        return
    workers = min(readers(), len(reads))
    of_read = max(1, len(reads[0]))
    loader = DataLoader(
        _Reads(images, channels_last),
        batch_size=None,
        sampler=reads,
        num_workers=workers,
        multiprocessing_context="fork",  # the main module of a job is a script of Snakemake's
        worker_init_fn=_become_reader,
        prefetch_factor=max(2, math.ceil(2 * ahead / of_read / workers)),
        generator=torch.Generator(),  # or it would draw from the global one
    )
    others = multiprocessing.active_children()
    incoming = iter(loader)
    own = [it for it in multiprocessing.active_children() if it not in others]
    try:
        for found in _from_living(incoming):
            if isinstance(found, Exception):
                raise found
            yield found
    finally:
        del incoming  # asks them to end, and waits for some seconds
        for reader in own:  # SIGTERM, which it sends then, is nothing to them
            reader.kill()
            reader.join()


def _from_living(incoming: Iterator[Any]) -> Iterator[Any]:
    """What readers hand over; RuntimeError, as of a DataLoader, where one of them was killed."""
    try:
        yield from incoming
    except (EOFError, ConnectionError, FileNotFoundError) as error:
        # It was killed while it handed something over.
        raise RuntimeError("DataLoader worker was killed") from error


def readers() -> int:
    """How many processes read for this one: as many as Snakemake granted it threads."""
    return torch.get_num_threads()


class _Reads(Dataset):
    """Reads as a DataLoader's processes do them."""

    def __init__(self, images: StoredImages, channels_last: bool):
        self.images, self.channels_last = images, channels_last

    def __getitem__(self, places: NDArray[np.int64]) -> Tensor | Exception:
        try:
            pixels = torch.from_numpy(self.images.read(places, not self.channels_last))
            return pixels.permute(0, 2, 3, 1).contiguous() if self.channels_last else pixels
        # Raised here it would come with a traceback in its sentence.
        except (InputError, MemoryError, OSError) as error:
            return error


def _become_reader(number: int) -> None:
    """End with the process that is read for; what it makes of signals is its own affair."""
    for ending in (signal.SIGTERM, signal.SIGINT):
        signal.signal(ending, signal.SIG_IGN)
    end_with_parent()


def mixed(
    images: StoredImages,
    windows: Iterable[Sequence[NDArray[np.int64]]],
    order: NDArray[np.int64],
    batch_size: int,
    first: int = 0,
) -> Iterator[Tensor]:
    """Batches of images in an order, read some blocks at a time and ahead of what is needed.

    Args:
        windows: reads; all of a window are done before the first of its images is used.
        order: places of all images that are wanted, window by window.
        batch_size: images of a batch; an incomplete one is left out.
        first: how many of the first batches are left out.

    Yields:
        pixels uint8 (batch_size, H, W, C) on the CPU.
    """
    windows = list(windows)
    ends = np.cumsum([sum(map(len, window)) for window in windows])
    widest = int(np.diff(ends, prepend=0).max())
    skipped = int(np.searchsorted(ends, first * batch_size, side="right"))
    reads = [read for window in windows[skipped:] for read in window]
    incoming = zip(reads, read_ahead(images, reads, batch_size, True), strict=True)
    ranks = np.empty(order.max() + 1, order.dtype)
    ranks[order] = np.arange(len(order))
    # Of rank n in row n modulo their number: of the windows of a batch, and of the next one.
    _, channels, height, width = images.shape
    rows = 2 * widest + batch_size
    room = torch.empty((rows, height, width, channels), dtype=torch.uint8)
    known = int(ends[skipped - 1]) if skipped else 0
    for end in range((first + 1) * batch_size, len(order) + 1, batch_size):
        window = int(np.searchsorted(ends, end))
        next_end = ends[min(window + 1, len(ends) - 1)]
        while known < max(ends[window], min(end + widest, next_end)):
            places, pixels = next(incoming)
            room.index_copy_(0, torch.from_numpy(ranks[places] % rows), pixels)
            known += len(places)
        yield room.index_select(0, torch.arange(end - batch_size, end) % rows)
