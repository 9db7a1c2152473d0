"""A BatchEnsemble of any network, made by replacing its layers; the weights are kept.

Convolutions and linear layers get a factor r_j and s_j and a bias for each member
[Wen et al. 2020, eq. 1]. What else has parameters is shared by all members: normalisations,
positions, class tokens, scales of layers.

A member is known by its place in the first dimension, so a layer must be given the rows there. And
a layer must be asked by its forward: a module that reads `self.proj.weight` past it cannot be
converted, and is refused by name. `check_members` compares a converted network with its members.
"""

import ast
import copy
import inspect
import sys
import textwrap
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cache, partial
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize

from ensdistill import InputError
from ensdistill.attention import Attention
from ensdistill.batch_ensemble import (
    BatchEnsembleConv2d,
    BatchEnsembleLayer,
    BatchEnsembleLinear,
    Init,
    Plain,
    init_factors,
)
from ensdistill.layers import Layers, WithoutRandomNumbers

KNOWN = (nn.Conv2d, nn.Linear)
"""Layers that become BatchEnsemble layers."""
EQUAL = {"timm.layers.linear.Linear"}
"""Classes with a forward of their own that compute what `torch.nn.Linear` does."""
IMPOSSIBLE = (nn.Bilinear, nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention)
"""Linear maps that have no such factors here."""
DESCRIBING = {"device", "dtype", "ndim", "shape"}
"""What a module may ask of another's weight: its numbers are not used."""
LinearMap = nn.Linear | _ConvNd
"""What gets factors."""
TOLERANCE = 1e-3
"""By how much members' logits may differ from those of the converted network, relatively."""


class BatchEnsembleMap(nn.Module):
    """Any other linear map f with M members: y = s_j ∘ f(x ∘ r_j) + b_j [Wen et al. 2020, eq. 5].

    For convolutions that do more than `torch.nn.Conv2d`, such as to standardise their weights or to
    find their padding when they see the images: W_j = W' ∘ (s_j r_jᵀ), W' being what they use.

    Args:
        inner: a convolution of any kind, or a linear layer; it loses its bias.
        ensemble_size: M.
        init, std: as of `init_factors`.

    Shape:
        input (M·B, …), member-major → output (M·B, …), as `inner`.
    """

    def __init__(
        self, inner: LinearMap, ensemble_size: int, init: Init = "normal", std: float = 0.5
    ):
        super().__init__()
        self.ensemble_size, self.channels_last = ensemble_size, isinstance(inner, nn.Linear)
        sizes = (
            ("in_features", "out_features")
            if self.channels_last
            else ("in_channels", "out_channels")
        )
        inputs, outputs = (getattr(inner, size) for size in sizes)
        weight, bias = inner.weight, inner.bias
        self.r, self.s = (
            nn.Parameter(weight.new_empty(ensemble_size, size)) for size in (inputs, outputs)
        )
        for factors in (self.r, self.s):
            init_factors(factors, init, std)
        self.bias = None if bias is None else nn.Parameter(bias.detach().repeat(ensemble_size, 1))
        inner.bias = None
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] % self.ensemble_size:
            raise ValueError(
                f"{x.shape[0]} rows cannot be shared out evenly among {self.ensemble_size} members"
            )
        out = self.inner(x * self._of_rows(self.r, x))
        out = out * self._of_rows(self.s, out)
        return out if self.bias is None else out + self._of_rows(self.bias, out)

    def _of_rows(self, factors: Tensor, x: Tensor) -> Tensor:
        ones = [1] * (x.ndim - 2)
        rows = factors.repeat_interleave(x.shape[0] // self.ensemble_size, 0)
        return rows.view(len(rows), *((*ones, -1) if self.channels_last else (-1, *ones)))


def to_batch_ensemble(
    module: nn.Module,
    ensemble_size: int,
    init: Init = "normal",
    *,
    std: float = 0.5,
    conv: type[BatchEnsembleConv2d] = BatchEnsembleConv2d,
    linear: type[BatchEnsembleLinear] = BatchEnsembleLinear,
) -> nn.Module:
    """A BatchEnsemble of M members made of any network; the network stays as it is.

    Every `Conv2d` and `Linear` becomes a BatchEnsemble layer with its weight, its bias for each
    member, and new factors; a subclass with a forward of its own, and other convolutions, a
    `BatchEnsembleMap`; `MultiheadAttention` an `Attention` of such layers. A layer that stands in
    several places stays one layer.

    Args:
        module: maps rows (B, …) to rows; the first dimension is that of the rows everywhere inside.
        ensemble_size: M.
        init, std: as of `init_factors`.
        conv, linear: the kinds of layers.

    Returns:
        A module (M·B, …) → (M·B, …), whose rows jB … (j+1)B−1 belong to member j.

    Raises:
        ValueError: a layer cannot be converted; the sentence names it.

    Example:
        >>> network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8))
        >>> ensemble = to_batch_ensemble(network, 4, init="signs")
        >>> ensemble(torch.zeros(4 * 2, 3, 9, 9)).shape
        torch.Size([8, 8, 5, 5])
        >>> torch.equal(ensemble[2].weight, network[2].weight)
        True
    """

    def converted(layer: Any) -> nn.Module:
        exact = computes_as_known(layer)
        if exact is None:
            if (conv, linear) != (BatchEnsembleConv2d, BatchEnsembleLinear):
                raise ValueError("its members cannot be merged into one such layer again")
            return BatchEnsembleMap(layer, ensemble_size, init, std).train(layer.training)
        with torch.device("meta"), WithoutRandomNumbers():
            made = _of_shape(layer, ensemble_size, conv if exact is nn.Conv2d else linear)
        made.take_over(layer, init, std)
        return made.train(layer.training)

    network = with_attention(module)
    if ensemble_size < 1:
        raise ValueError(f"ensemble_size must be at least 1, not {ensemble_size}")
    return _replaced(network, partial(_can_be_converted, _readers(network)), converted)


def batch_ensemble_layers(ensemble_size: int) -> Layers:
    """Of a BatchEnsemble of M members, each with its own biases."""
    return Layers(
        partial(BatchEnsembleConv2d, ensemble_size=ensemble_size),
        partial(BatchEnsembleLinear, ensemble_size=ensemble_size),
        convert=partial(to_batch_ensemble, ensemble_size=ensemble_size),
    )


def with_attention(module: nn.Module) -> nn.Module:
    """A copy whose `MultiheadAttention` modules are `Attention`, which computes the same.

    >>> layer = nn.TransformerEncoderLayer(8, 2, 8, batch_first=True)
    >>> type(with_attention(layer).self_attn).__name__
    'Attention'
    """
    network = _replaced(
        copy.deepcopy(module),
        lambda it: type(it).forward is nn.MultiheadAttention.forward,
        Attention,
    )
    for it in network.modules():
        if isinstance(it, nn.TransformerEncoder):
            it.use_nested_tensor = False  # for which it would take weights past forward
    return network


@torch.no_grad()
def member(network: nn.Module, j: int) -> nn.Module:
    """Member j of a BatchEnsemble as an ordinary network, by equation 1; nothing is shared.

    >>> ensemble = to_batch_ensemble(nn.Linear(3, 2), 4)
    >>> x = torch.rand(5, 3)
    >>> torch.allclose(member(ensemble, 3)(x), ensemble(x.repeat(4, 1))[15:], atol=1e-6)
    True
    """

    def ordinary(layer: Any) -> nn.Module:
        if isinstance(layer, BatchEnsembleMap):
            one = BatchEnsembleMap(copy.deepcopy(layer.inner), 1)
            one.r, one.s = (nn.Parameter(it[j : j + 1].clone()) for it in (layer.r, layer.s))
            if layer.bias is not None:
                one.bias = nn.Parameter(layer.bias[j : j + 1].clone())
            return one.train(layer.training)
        return layer.member(j)

    def is_layer(it: nn.Module) -> bool:
        return isinstance(it, BatchEnsembleLayer | BatchEnsembleMap)

    return _replaced(copy.deepcopy(network), is_layer, ordinary)


@torch.no_grad()
def check_members(network: nn.Module, members: int, x: Tensor) -> None:
    """Refuse a BatchEnsemble that does not compute what its members do, as ordinary networks.

    So it is with a network that puts something else than the rows in its first dimension. What
    holds one number throughout, as factors, gains and heads may at the start, would hide that: a
    copy is checked where it does not.

    Args:
        network: (M·B, C, H, W) → (M·B, K).
        members: M.
        x: images (B, C, H, W).

    Raises:
        InputError: it does not.

    Example:
        >>> network = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
        >>> check_members(to_batch_ensemble(network, 3), 3, torch.rand(2, 1, 2, 2))
    """
    network, generator = copy.deepcopy(network).eval(), torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        if parameter.min() == parameter.max():
            parameter.add_(0.5 * torch.rand(parameter.shape, generator=generator).to(parameter))
    try:
        together = network(x.repeat(members, 1, 1, 1)).chunk(members)
        for j, logits in enumerate(together):
            own = member(network, j)(x)
            if not (logits - own).norm() <= TOLERANCE * own.norm() + 1e-6:
                raise ValueError(f"member {j} has other logits than it has as an ordinary network")
    except (ValueError, RuntimeError, TypeError, AttributeError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(
            f"this architecture cannot be a BatchEnsemble ({reason}): it must have the rows in the "
            "first dimension everywhere, and use its layers by their forward alone"
        ) from error


def _replaced(
    network: nn.Module,
    chosen: Callable[[nn.Module], bool],
    make: Callable[[Any], nn.Module],
) -> nn.Module:
    """The network with every chosen module replaced, in place."""
    root = nn.ModuleDict({"network": network})
    made: dict[nn.Module, nn.Module] = {}
    for name, parent in [(name, it) for name, it in root.named_modules() if it._modules]:
        for key, child in parent._modules.items():
            try:
                if child in made or (child is not None and chosen(child)):
                    parent._modules[key] = made[child] = made.get(child) or make(child)
            except ValueError as error:
                place = ".".join([*name.split(".")[1:], key])
                kind = type(child).__name__
                raise ValueError(f"{place} ({kind}) cannot be converted: {error}") from None
    return root["network"]


def _can_be_converted(readers: Mapping[nn.Module, str], layer: nn.Module) -> bool:
    """Whether it is a linear map that gets factors.

    Args:
        readers: see `_readers`.

    Raises:
        ValueError: it is one that cannot have them.
    """
    if isinstance(layer, IMPOSSIBLE):
        raise ValueError("such a layer has no BatchEnsemble form here")
    if not isinstance(layer, (*KNOWN, _ConvNd)):
        return False
    if parametrize.is_parametrized(layer):
        raise ValueError("its weight is computed (parametrized), not stored")
    if layer in readers:
        raise ValueError(
            f"{readers[layer]} reads its weight or bias past its forward, so that factors would be "
            "passed over"
        )
    return True


def _readers(network: nn.Module) -> dict[nn.Module, str]:
    """Modules whose weight or bias others read past their forward, and the class of these."""
    found = {}
    for module in network.modules():
        for path in _read_past_forward(cast(Any, type(module))):
            with suppress(AttributeError):
                found[module.get_submodule(path)] = type(module).__name__
    return found


@cache
def _read_past_forward(kind: Any) -> frozenset[str]:
    """Modules inside whose weight or bias the class reads in its forward: `self.<path>.weight`.

    Or in methods that its forward calls, and they call.
    """
    if getattr(kind, "forward", None) is nn.TransformerEncoderLayer.forward:
        return frozenset()  # it asks its attention first, and `Attention` declines
    found, waiting, seen = set(), ["forward"], set()
    while waiting:
        name = waiting.pop()
        function = getattr(kind, name, None)
        if name in seen or not inspect.isfunction(function):
            continue
        seen.add(name)
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
        except (OSError, SyntaxError):  # without a file, as what a compiler made
            continue
        attributes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
        asked = [node.value for node in attributes if node.attr in DESCRIBING]
        for node in attributes:
            if node not in asked:
                start, *path, last = ast.unparse(node).split(".")
                if start == "self" and not path:
                    waiting.append(last)
                elif start == "self" and last in ("weight", "bias"):
                    found.add(".".join(path))
    return frozenset(found)


def computes_as_known(layer: nn.Module) -> type[nn.Module] | None:
    """Whether it computes exactly what `Conv2d` or `Linear` does; None if it does more.

    `layer.kind`, if there is one, is its class before it was told in which precision to compute.

    >>> computes_as_known(nn.Linear(2, 2)) is nn.Linear, computes_as_known(nn.Conv1d(1, 1, 1))
    (True, None)
    """
    kind = getattr(layer, "kind", type(layer))
    for known in KNOWN:
        if issubclass(kind, known):
            same = kind.forward is known.forward and getattr(
                kind, "_conv_forward", None
            ) is getattr(known, "_conv_forward", None)
            if same or f"{kind.__module__}.{kind.__name__}" in EQUAL:
                return known
    return None


def _of_shape(layer: Plain, ensemble_size: int, kind: Callable[..., Any]) -> BatchEnsembleLayer:
    bias = layer.bias is not None
    if isinstance(layer, nn.Linear):
        return kind(layer.in_features, layer.out_features, ensemble_size, bias)
    sizes = (layer.in_channels, layer.out_channels, layer.kernel_size)
    how = {"dilation": layer.dilation, "groups": layer.groups, "padding_mode": layer.padding_mode}
    return kind(*sizes, ensemble_size, layer.stride, layer.padding, bias, **how)


class _Callable(ModuleType):
    """This module, which can be called as well: `ensdistill.convert` is a function of the API."""

    def __call__(self, *given: Any, **options: Any) -> nn.Module:
        from ensdistill import api

        return api.convert(*given, **options)


sys.modules[__name__].__class__ = _Callable
