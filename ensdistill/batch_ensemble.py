"""BatchEnsemble layers: M members that share one weight and differ by rank-one factors.

Wen, Tran and Ba, "BatchEnsemble: An Alternative Approach to Efficient Ensemble and Lifelong
Learning" (ICLR 2020, arXiv 2002.06715), equations 1-5. Member j of a layer has the weight

    W_j = W ∘ (s_j r_jᵀ)          (broadcast over a convolution's kernel)

and its own bias. A layer takes M·B rows, of which rows jB … (j+1)B−1 belong to member j.
"""

import math
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ensdistill.layers import Layers

SCALED = {"cpu": 2**19, "cuda": 2**23}
"""Up to so many numbers in its input a layer scales activations, beyond it makes M weights.

Scaling goes over every activation several times, M weights cost M calls. On a CPU this is where
they measured alike; on a GPU it is an estimate, by launches of 5 µs and memory of 3 TB/s.
"""


def _as_autocast(x: Tensor, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Tensors in the type in which autocast, if it is on where x is, computes."""
    if not torch.is_autocast_enabled(x.device.type):
        return tensors
    dtype = torch.get_autocast_dtype(x.device.type)
    return tuple(None if it is None else it.to(dtype) for it in tensors)


def subsample(x: Tensor, stride: int) -> Tensor:
    """Every `stride`-th row and column of x (B, C, H, W), in the channels_last memory format.

    A 1×1 convolution with that stride is one with stride 1 of the result. oneDNN has computed wrong
    weight gradients for the former (AVX2, channels_last, fewer than 8 input channels).
    """
    # Sliced in the order of memory, so that the gradient is channels_last too.
    return x.permute(0, 2, 3, 1)[:, ::stride, ::stride].permute(0, 3, 1, 2)


class BatchEnsembleLayer(nn.Module):
    """The parameters that both layers share: weight, r (M, in), s (M, out), bias (M, out)."""

    def __init__(self, weight_shape: tuple[int, ...], ensemble_size: int, bias: bool):
        super().__init__()
        if ensemble_size < 1:
            raise ValueError(f"ensemble_size must be at least 1, not {ensemble_size}")
        out_features, in_features = weight_shape[:2]
        self.ensemble_size = ensemble_size
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
        nn.init.normal_(self.r, 1.0, 0.5)
        nn.init.normal_(self.s, 1.0, 0.5)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] % self.ensemble_size:
            raise ValueError(
                f"{x.shape[0]} rows cannot be shared out evenly among {self.ensemble_size} members"
            )
        few = x.numel() <= SCALED.get(x.device.type, 0)
        return self._scaled(x) if few else self._explicit(x)

    def _explicit(self, x: Tensor) -> Tensor:
        """Equation 1: every member's rows through its own weight W_j = W ∘ (s_j r_jᵀ)."""
        factors = self.s[:, :, None] * self.r[:, None, :]
        factors = factors.reshape(*factors.shape, *[1] * (self.weight.ndim - 2))
        weights, biases = _as_autocast(x, self.weight * factors, self._biases())
        if biases is None:
            biases = [None] * self.ensemble_size
        rows = x.chunk(self.ensemble_size)
        return torch.cat([self._map(*it) for it in zip(rows, weights, biases, strict=True)])

    def _biases(self) -> Tensor | None:
        """Of each member (M, out), if it has any."""
        return self.bias

    def _scaled(self, x: Tensor) -> Tensor:
        """Equation 5: all rows through W, scaled by r_j before and by s_j behind."""

        def of_rows(factors: Tensor) -> Tensor:
            return factors.view(self.ensemble_size, 1, -1, *[1] * (x.ndim - 2))

        def by_member(x: Tensor) -> Tensor:
            return x.unflatten(0, (self.ensemble_size, x.shape[0] // self.ensemble_size))

        x, r, s, bias = _as_autocast(x, x, self.r, self.s, self._biases())
        out = by_member(self._map((by_member(x) * of_rows(r)).flatten(0, 1), self.weight, None))
        out = out * of_rows(s) if bias is None else torch.addcmul(of_rows(bias), out, of_rows(s))
        return out.flatten(0, 1)

    def _map(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The convolution or linear map itself."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        shape = ", ".join(map(str, self.weight.shape))
        return f"weight=({shape}), ensemble_size={self.ensemble_size}, bias={self.bias is not None}"


class BatchEnsembleConv2d(BatchEnsembleLayer):
    """A 2-D convolution with M members, W_j = W ∘ (s_j r_jᵀ) [Wen et al. 2020, eq. 1].

    Args:
        in_channels, out_channels, kernel_size, stride, padding: as `torch.nn.Conv2d`.
        ensemble_size: M.
        bias: whether each member has a bias of its own.

    Shape:
        input (M·B, in, H, W), member-major → output (M·B, out, H', W').

    Raises:
        ValueError: the number of rows is not a multiple of M.

    Example:
        >>> layer = BatchEnsembleConv2d(3, 8, kernel_size=3, ensemble_size=4, padding=1)
        >>> layer(torch.zeros(4 * 2, 3, 5, 5)).shape
        torch.Size([8, 8, 5, 5])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        ensemble_size: int,
        stride: int = 1,
        padding: int = 0,
        bias: bool = True,
    ):
        shape = (out_channels, in_channels, kernel_size, kernel_size)
        super().__init__(shape, ensemble_size, bias)
        self.stride, self.padding = stride, padding
        self.subsamples = kernel_size == 1 and stride > 1 and padding == 0

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(subsample(x, self.stride) if self.subsamples else x)

    def _map(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv2d(x, weight, bias, 1 if self.subsamples else self.stride, self.padding)


class BatchEnsembleLinear(BatchEnsembleLayer):
    """A linear layer with M members, W_j = W ∘ (s_j r_jᵀ) [Wen et al. 2020, eq. 1].

    Args:
        in_features, out_features: as `torch.nn.Linear`.
        ensemble_size: M.
        bias: whether each member has a bias of its own.

    Shape:
        input (M·B, in), member-major → output (M·B, out).

    Raises:
        ValueError: the number of rows is not a multiple of M.

    Example:
        >>> layer = BatchEnsembleLinear(16, 10, ensemble_size=4)
        >>> layer(torch.zeros(4 * 2, 16)).shape
        torch.Size([8, 10])
    """

    def __init__(self, in_features: int, out_features: int, ensemble_size: int, bias: bool = True):
        super().__init__((out_features, in_features), ensemble_size, bias)

    def _map(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)


def batch_ensemble_layers(ensemble_size: int) -> Layers:
    """Of a BatchEnsemble of M members, each with its own biases."""
    return Layers(
        partial(BatchEnsembleConv2d, ensemble_size=ensemble_size),
        partial(BatchEnsembleLinear, ensemble_size=ensemble_size),
    )
