"""BatchEnsemble layers: M members that share one weight and differ by rank-one factors.

Wen, Tran and Ba, "BatchEnsemble: An Alternative Approach to Efficient Ensemble and Lifelong
Learning" (ICLR 2020, arXiv 2002.06715), equations 1-5. Member j of a layer has the weight

    W_j = W ∘ (s_j r_jᵀ)          (broadcast over a convolution's kernel)

and its own bias. A layer takes M·B rows, of which rows jB … (j+1)B−1 belong to member j.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ensdistill.layers import WithoutRandomNumbers, autocast_dtype

Init = Literal["normal", "signs", "ones"]
"""How the factors r and s begin: N(1, σ²), random signs, or all 1."""

SCALED = {"cpu": 2**19, "cuda": 2**23}
"""Up to so many numbers in its input a layer scales activations, whatever its weight.

Beyond it, see `scales_activations`. On a CPU this is where both forms measured alike for small
weights; on a GPU it is an estimate, by launches of 5 µs and memory of 3 TB/s.
"""

PER_WEIGHT = 2
"""Numbers in the input that cost as much to scale as one number of the M weights costs to make."""


def scales_activations(numbers: int, weights: int, device: str) -> bool:
    """Whether a layer scales activations (equation 5) or makes M weights (equation 1).

    Scaling goes over all activations several times, making weights over all of the M weights, and
    it costs M calls. The choice depends on sizes alone, never on a measurement of the moment, so a
    training that is resumed or repeated computes the same bits. Both forms wait for memory, so the
    instruction set does not change where they cost the same; `python -m benchmarks form` measures
    it.

    Args:
        numbers: in the input of the layer, of all members.
        weights: numbers in the weights of all members, M·|W|.
        device: the type of the device.

    >>> scales_activations(64 * 4 * 16 * 32 * 32, 4 * 16 * 16 * 9, "cpu")  # many activations
    False
    >>> scales_activations(4 * 4 * 640 * 8 * 8, 4 * 640 * 640 * 9, "cpu")  # 15 million weights
    True
    """
    return numbers <= SCALED.get(device, 0) + PER_WEIGHT * weights


def _as_autocast(x: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors in the type in which autocast, if it is on where x is, computes."""
    if (dtype := autocast_dtype(x)) is None:
        return tensors
    return tuple(it.to(dtype) for it in tensors)


def subsample(x: Tensor, stride: int) -> Tensor:
    """Every `stride`-th row and column of x (B, C, H, W), in the channels_last memory format.

    A 1×1 convolution with that stride is one with stride 1 of the result. oneDNN has computed wrong
    weight gradients for the former (AVX2, channels_last, fewer than 8 input channels).

    >>> subsample(torch.arange(9).view(1, 1, 3, 3), 2).flatten().tolist()
    [0, 2, 6, 8]
    """
    # Sliced in the order of memory, so that the gradient is channels_last too.
    return x.permute(0, 2, 3, 1)[:, ::stride, ::stride].permute(0, 3, 1, 2)


@torch.no_grad()
def init_factors(factors: Tensor, init: Init = "normal", std: float = 0.5) -> None:
    """Fill r or s.

    Args:
        factors: (M, in) or (M, out).
        init: `normal`: N(1, std²); `signs`: 1 or −1 with probability ½ each; `ones`: 1. With ones
            all members are the network that they are made of.
        std: σ of `normal`; 0.5 in Nam et al. (2021), for networks that are trained from scratch.

    Raises:
        ValueError: there is no such init.

    >>> factors = torch.empty(2, 50)
    >>> init_factors(factors, "signs")
    >>> factors.unique().tolist()
    [-1.0, 1.0]
    """
    if init == "normal":
        nn.init.normal_(factors, 1.0, std)
    elif init == "signs":
        factors.copy_(2.0 * (torch.rand_like(factors) < 0.5) - 1)
    elif init == "ones":
        nn.init.ones_(factors)
    else:
        raise ValueError(f"factors begin by 'normal', 'signs' or 'ones', not {init!r}")


Plain = nn.Conv2d | nn.Linear
"""An ordinary layer."""


class BatchEnsembleLayer(nn.Module):
    """The parameters that both layers share: weight, r (M, in), s (M, out), bias (M, out).

    Args:
        weight_shape: (out, in/groups, …).
        groups: the inputs are divided into so many, each with outputs of its own.
    """

    channels_last = False
    """Whether the last dimension of the input has the features, instead of the second one."""

    r: Tensor
    s: Tensor

    def __init__(
        self, weight_shape: tuple[int, ...], ensemble_size: int, bias: bool, groups: int = 1
    ):
        super().__init__()
        if ensemble_size < 1:
            raise ValueError(f"ensemble_size must be at least 1, not {ensemble_size}")
        out_features, in_features = weight_shape[0], groups * weight_shape[1]
        self.ensemble_size, self.groups = ensemble_size, groups
        self.weight = nn.Parameter(torch.empty(weight_shape))
        self._make_factors(in_features, out_features, bias)
        self.reset_parameters()

    def _make_factors(self, in_features: int, out_features: int, bias: bool) -> None:
        self.r = nn.Parameter(torch.empty(self.ensemble_size, in_features))
        self.s = nn.Parameter(torch.empty(self.ensemble_size, out_features))
        self.bias = nn.Parameter(torch.empty(self.ensemble_size, out_features)) if bias else None

    def reset_parameters(self) -> None:
        """Weight as PyTorch's plain layers, bias 0, and r and s."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        self._reset_factors()
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def _reset_factors(self) -> None:
        """r and s ~ N(1, 0.5²)."""
        init_factors(self.r)
        init_factors(self.s)

    def take_over(self, plain: Plain, init: Init = "normal", std: float = 0.5) -> None:
        """Take weight and bias of an ordinary layer of the same shape, and new factors.

        Args:
            plain: a `Conv2d` or `Linear`; the weight is shared with it.
            init, std: as of `init_factors`.
        """
        members, (out_features, in_features) = self.ensemble_size, plain.weight.shape[:2]
        self.weight = cast(nn.Parameter, plain.weight)
        for name, size in (("r", self.groups * in_features), ("s", out_features)):
            factors = nn.Parameter(plain.weight.new_empty(members, size))
            init_factors(factors, init, std)
            setattr(self, name, factors)
        if plain.bias is not None:
            self.bias = nn.Parameter(plain.bias.detach().repeat(members, 1))

    @torch.no_grad()
    def member(self, j: int) -> Plain:
        """The ordinary layer W_j = W ∘ (s_j r_jᵀ) with the bias of member j."""
        with torch.device("meta"), WithoutRandomNumbers():
            plain = self._plain()
        weight = self.weight * outer(self.s[j], self.r[j], self.groups, self.weight.ndim)
        plain.weight = nn.Parameter(weight)
        biases = self._biases()
        plain.bias = None if biases is None else nn.Parameter(biases[j].clone())
        return plain.train(self.training)

    def _plain(self) -> Plain:
        """An ordinary layer of the same shape, with a bias."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] % self.ensemble_size:
            raise ValueError(
                f"{x.shape[0]} rows cannot be shared out evenly among {self.ensemble_size} members"
            )
        weights = self.ensemble_size * self.weight.numel()
        scales = scales_activations(x.numel(), weights, x.device.type)
        return self._scaled(x) if scales else self._explicit(x)

    def _explicit(self, x: Tensor) -> Tensor:
        """Equation 1: every member's rows through its own weight W_j = W ∘ (s_j r_jᵀ)."""
        (weights,), bias = _as_autocast(x, self.member_weights()), self._biases()
        biases: Iterable[Tensor | None] = [None] * self.ensemble_size
        if bias is not None:
            (biases,) = _as_autocast(x, bias)
        rows = x.chunk(self.ensemble_size)
        return torch.cat([self._map(*it) for it in zip(rows, weights, biases, strict=True)])

    def member_weights(self) -> Tensor:
        """W_j of every member, (M, out, in/groups, …)."""
        return self.weight * outer(self.s, self.r, self.groups, self.weight.ndim)

    def _biases(self) -> Tensor | None:
        """Of each member (M, out), if it has any."""
        return self.bias

    def _scaled(self, x: Tensor) -> Tensor:
        """Equation 5: all rows through W, scaled by r_j before and by s_j behind."""

        def of_rows(factors: Tensor) -> Tensor:
            ones = [1] * (x.ndim - 2)
            shape = (*ones, -1) if self.channels_last else (-1, *ones)
            return factors.view(self.ensemble_size, 1, *shape)

        def by_member(x: Tensor) -> Tensor:
            return x.unflatten(0, (self.ensemble_size, x.shape[0] // self.ensemble_size))

        bias = self._biases()
        x, r, s = _as_autocast(x, x, self.r, self.s)
        out = by_member(self._map((by_member(x) * of_rows(r)).flatten(0, 1), self.weight, None))
        if bias is None:
            return (out * of_rows(s)).flatten(0, 1)
        (bias,) = _as_autocast(x, bias)
        return torch.addcmul(of_rows(bias), out, of_rows(s)).flatten(0, 1)

    def _map(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The convolution or linear map itself."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        shape = ", ".join(map(str, self.weight.shape))
        return f"weight=({shape}), ensemble_size={self.ensemble_size}, bias={self.bias is not None}"


def outer(s: Tensor, r: Tensor, groups: int, ndim: int) -> Tensor:
    """s rᵀ of a weight with `ndim` dimensions: s (…, out), r (…, in) → (…, out, in/groups, 1, …).

    With groups an output meets the inputs of its own group only.

    >>> outer(torch.tensor([1.0, 2]), torch.tensor([3.0, 4]), groups=1, ndim=2).tolist()
    [[3.0, 4.0], [6.0, 8.0]]
    """
    s, r = s.unflatten(-1, (groups, -1)), r.unflatten(-1, (groups, -1))
    factors = (s[..., :, None] * r[..., None, :]).flatten(-3, -2)
    return factors.reshape(*factors.shape, *[1] * (ndim - 2))


class BatchEnsembleConv2d(BatchEnsembleLayer):
    """A 2-D convolution with M members, W_j = W ∘ (s_j r_jᵀ) [Wen et al. 2020, eq. 1].

    Args:
        in_channels, out_channels, kernel_size, stride, padding: as `torch.nn.Conv2d`.
        ensemble_size: M.
        bias: whether each member has a bias of its own.
        dilation, groups, padding_mode: as `torch.nn.Conv2d`.

    Shape:
        input (M·B, in, H, W), member-major → output (M·B, out, H', W').

    Raises:
        ValueError: the number of rows is not a multiple of M, or groups do not divide the channels.

    Example:
        >>> layer = BatchEnsembleConv2d(3, 8, kernel_size=3, ensemble_size=4, padding=1)
        >>> layer(torch.zeros(4 * 2, 3, 5, 5)).shape
        torch.Size([8, 8, 5, 5])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        ensemble_size: int,
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] | str = 0,
        bias: bool = True,
        *,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        padding_mode: str = "zeros",
    ):
        if in_channels % groups or out_channels % groups:
            raise ValueError(
                f"{groups} groups do not divide {in_channels} channels in and {out_channels} out"
            )
        pair: Callable[[Any], tuple[int, int]] = nn.modules.utils._pair
        kernel, self.stride, self.dilation = map(pair, (kernel_size, stride, dilation))
        shape = (out_channels, in_channels // groups, *kernel)
        super().__init__(shape, ensemble_size, bias, groups)
        self.padding_mode = padding_mode
        self.padding = padding if isinstance(padding, str) else pair(padding)
        # What padding other than with zeros puts around the images, as F.pad takes it.
        self.around = (
            [] if padding_mode == "zeros" else _around(self.padding, kernel, self.dilation)
        )
        pointwise = kernel == (1, 1) and self.padding in ((0, 0), "valid")
        self.subsamples = pointwise and self.stride[0] == self.stride[1] > 1

    def _plain(self) -> Plain:
        out_channels, in_channels, *kernel_size = self.weight.shape
        sizes: Any = (in_channels * self.groups, out_channels, tuple(kernel_size))
        how: Any = (self.stride, self.padding, self.dilation, self.groups, True, self.padding_mode)
        return nn.Conv2d(*sizes, *how)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(subsample(x, self.stride[0]) if self.subsamples else x)

    def _map(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.around:
            x = F.pad(x, self.around, mode=self.padding_mode)
        stride = 1 if self.subsamples else self.stride
        padding = 0 if self.around else self.padding
        return F.conv2d(x, weight, bias, stride, padding, self.dilation, self.groups)


def _around(
    padding: tuple[int, int] | str, kernel_size: tuple[int, int], dilation: tuple[int, int]
) -> list[int]:
    """Pixels left, right, above and below; `same` has the odd one behind, as `torch.nn.Conv2d`."""
    if padding == "valid":
        return [0] * 4
    sides = []
    for axis in (1, 0):
        if isinstance(padding, str):  # "same"
            total = dilation[axis] * (kernel_size[axis] - 1)
            sides += [total // 2, total - total // 2]
        else:
            sides += [padding[axis]] * 2
    return sides


class BatchEnsembleLinear(BatchEnsembleLayer):
    """A linear layer with M members, W_j = W ∘ (s_j r_jᵀ) [Wen et al. 2020, eq. 1].

    Args:
        in_features, out_features: as `torch.nn.Linear`.
        ensemble_size: M.
        bias: whether each member has a bias of its own.

    Shape:
        input (M·B, …, in), member-major → output (M·B, …, out).

    Raises:
        ValueError: the number of rows is not a multiple of M.

    Example:
        >>> layer = BatchEnsembleLinear(16, 10, ensemble_size=4)
        >>> layer(torch.zeros(4 * 2, 16)).shape
        torch.Size([8, 10])
    """

    channels_last = True

    def __init__(self, in_features: int, out_features: int, ensemble_size: int, bias: bool = True):
        super().__init__((out_features, in_features), ensemble_size, bias)

    def _plain(self) -> Plain:
        return nn.Linear(*self.weight.shape[::-1])

    def _map(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)
