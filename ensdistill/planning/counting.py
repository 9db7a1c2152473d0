"""What a call computes and the memory it takes, counted instead of timed."""

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch._guards import active_fake_mode
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from ensdistill.operations import Operations


class AllOperations(Operations):
    """Counts under `torch.inference_mode` too, where operations come whole.

    What is drawn for the host is 0 where tensors have no numbers.
    """

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is torch.ops.aten._local_scalar_dense.default and isinstance(
            args[0], FakeTensor
        ):
            return 0
        if function.namespace == "aten" and function._overloadpacket not in flop_registry:
            with self:
                out = function.decompose(*args, **(kwargs or {}))
            if out is not NotImplemented:
                return out
        return super().__torch_dispatch__(function, types, args, kwargs)


def zeros_of(tensor: Tensor) -> NDArray[np.float32]:
    """The array of a tensor that has no numbers."""
    return np.zeros(tensor.shape, np.float32)


def without_numbers(tensor: Tensor) -> Tensor:
    """A tensor of the mode that is on, of the same shape; outside of one, as it is."""
    if active_fake_mode() is None:
        return tensor
    empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(empty, tensor.requires_grad)
    return empty


def tensors_of(tree: Any) -> list[Tensor]:
    """All tensors of a tree of dictionaries and lists."""
    return [it for it in tree_leaves(dict(tree)) if isinstance(it, Tensor)]


def state_bytes(module: nn.Module) -> int:
    """Of parameters and buffers."""
    return total_bytes([*module.state_dict().values()])


def total_bytes(tensors: Sequence[Tensor]) -> int:
    """Of all tensors; what several share counts once."""
    storages = [it.untyped_storage() for it in tensors]
    return sum({it._cdata: it.nbytes() for it in storages}.values())


def peak(call: Callable[[], Any], kept: Sequence[Tensor]) -> int:
    """The most bytes of tensors that there were at a time during a call, but for those kept."""
    with AllOperations(), _Living(kept) as living:
        call()
    return living.peak


class _Living(TorchDispatchMode):
    """Counts the bytes of all tensors that are made under it, until they are gone."""

    def __init__(self, kept: Sequence[Tensor]):
        super().__init__()
        self.known = {it.untyped_storage()._cdata for it in kept}
        self.now = self.peak = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.known.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size
