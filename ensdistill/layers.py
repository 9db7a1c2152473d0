"""What an architecture is made of, so that one description makes networks of every kind."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

Layer = Callable[..., nn.Module]


class Layers(NamedTuple):
    """How the layers of a network are made."""

    conv: Layer
    """(in, out, kernel_size, stride=1, padding=0) → a convolution, before a normalisation."""
    linear: Layer
    """(in, out) → a linear layer with a bias."""
    packed: int = 1
    """Members whose channels stand side by side, each in its share of the channels: M, in → M·in.
    Without members that do, 1."""
    stem: Layer | None = None
    """As `conv`, for the convolution of the images; None where it is no other."""
    convert: Callable[[nn.Module], nn.Module] | None = None
    """Makes such a network of an ordinary one that is built already; None where none can."""


def plain_layers() -> Layers:
    """Of an ordinary network."""
    return Layers(partial(nn.Conv2d, bias=False), nn.Linear, convert=lambda network: network)


class Normalize(nn.Module):
    """(x − mean) / std per channel, so that everything outside a network is in pixel units."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """In which autocast computes where x is; None where it is off."""
    device = x.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):  # meta does not know autocast
        return None
    return torch.get_autocast_dtype(device)


def in_float32(module: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """module(x) without autocast where autocast is on; x is converted to float32 then."""
    if autocast_dtype(x) is None:
        return module(x)
    with torch.autocast(x.device.type, enabled=False):
        return module(x.float())


class WithoutRandomNumbers(TorchFunctionMode):
    """Leaves out initialisation, which tensors without storage would answer by a long import."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if function.__name__.endswith(("normal_", "uniform_")):  # of tensors and of torch.nn.init
            return args[0] if args else kwargs["tensor"]
        return function(*args, **kwargs)
