"""Images in blocks: what is computed from logits keeps values per image, never all of the logits.

Of small studies a block is all images, so nothing is read or computed twice there.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

WHOLE = 2**21
"""Logits up to which a system's images are one block: 16 MiB in float64."""
BLOCK = 2**20
"""Logits of one system in a block, of larger ones."""


class Blocked(Protocol):
    """Images that can be asked for block by block."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, M, K) of all logits."""
        ...

    @property
    def together(self) -> int:
        """Images that stand together in a file, and are best read so."""
        ...


@dataclass(frozen=True)
class Total:
    """A result of a block that is added to that of the next one."""

    value: NDArray


def blocks(systems: Sequence[Blocked]) -> Iterator[slice]:
    """Parts of the images that several systems have in common, in their order."""
    images = systems[0].shape[0]
    values = max(it.shape[1] * it.shape[2] for it in systems)
    if images * values <= WHOLE:
        yield slice(0, images)
        return
    size, together = max(1, BLOCK // values), max(it.together for it in systems)
    step = max(together, size // together * together)
    for start in range(0, images, step):
        end = min(start + step, images)
        yield from (slice(at, min(at + size, end)) for at in range(start, end, size))


def collect(systems: Sequence[Blocked], function: Callable[[slice], Any]) -> Any:
    """What a function finds in every block: a value per image, `Total`s, None, or nested lists.

    Returns:
        The same of all images: arrays joined along their first axis, totals added.
    """
    found = None
    for images in blocks(systems):
        found = _added(found, function(images))
    return _joined(found)


class _Parts(list):
    """Arrays of one kind, a block each."""


def _added(found: Any, more: Any) -> Any:
    if isinstance(more, list | tuple):
        return [_added(*pair) for pair in zip(found or [None] * len(more), more, strict=True)]
    if isinstance(more, Total):
        return Total(found.value + more.value) if found else more
    if more is not None:
        found = found or _Parts()
        found.append(more)
    return found


def _joined(found: Any) -> Any:
    if isinstance(found, _Parts):
        return found[0] if len(found) == 1 else np.concatenate(found)
    if isinstance(found, list):
        return [_joined(it) for it in found]
    return found.value if isinstance(found, Total) else found
