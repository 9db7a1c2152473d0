"""A flow from noise to an ensemble's logits: EDFM [Park et al. 2025, ICML].

h₀ ~ N(0, σ₀²I) is carried to centred logits h₁ of a random teacher by dh/dt = v(h, features(x), t),
t = 0 … 1. v is a small network that learns the velocities h₁ − h₀ of straight lines [Lipman et al.
2023]; the features are what the linear head of a trained, frozen network would see. Written from
the paper and the authors' code (Park-Jong-Geon/EDFM), whose constants stand here.

It is meant for ensembles without end, such as samples of a posterior over weights. Of M networks
the best v makes a mixture of M points, and what lies between them is rounding by a v that is not
the best: expect little more than its backbone has.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ensdistill.graphs import replace
from ensdistill.networks import build_network
from ensdistill.student import Student

NOISE, DATA = 4.0, 1.0
"""σ₀, and σ₁: the standard deviation of logits that the preconditioning assumes."""

BLOCKS = 4
"""Blocks of the velocity network."""

TIME_FEATURES, TIME_SCALE = 32, 1000.0
"""See `time_features`."""

BASE, CUT = 3.0, 0.999
"""See `random_times`."""

STEPS = 7
"""Steps that carry h₀ to h₁: 13 calls of v."""

Velocity = Callable[[Tensor, Tensor], Tensor]
"""v: h (…, K) and t, which is a scalar or (…) → dh/dt (…, K)."""


class AdaptiveBlock(nn.Module):
    """x + g·GELU(W((1 + s)·LayerNorm(x) + b)), with b, s, g = SiLU of a linear map of the time.

    That map is 0 at the start. The first block, which changes the width, is without x + g·.
    """

    def __init__(self, in_features: int, width: int, first: bool):
        super().__init__()
        self.modulation = nn.Linear(TIME_FEATURES, (2 if first else 3) * in_features)
        self.linear = _linear(in_features, width)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        shift, scale, *gate = F.silu(self.modulation(time)).split(x.shape[-1], -1)
        out = F.gelu(self.linear(F.layer_norm(x, x.shape[-1:]) * (1 + scale) + shift))
        return x + gate[0] * out if gate else out


class VelocityNetwork(nn.Module):
    """v(h, features, t): blocks of adaptive layer normalisation, preconditioned.

    v = c_skip·h + c_out·F(c_in·h, features, t) with the standard deviations σ₁ = `DATA` and σ₀:
    c_in = 1/√(t²σ₁² + (1−t)²σ₀²), c_skip = (tσ₁² − (1−t)σ₀²)·c_in², c_out = σ₁σ₀·c_in. For
    h₁ ~ N(0, σ₁²I) c_skip·h is the best v, and what F has to learn has variance 1 [Karras et al.
    2022].

    Args:
        features: their number.
        num_classes: K.
        width: of the blocks.
    """

    def __init__(self, features: int, num_classes: int, width: int):
        super().__init__()
        sizes = [num_classes + features] + [width] * (BLOCKS - 1)
        self.blocks = nn.ModuleList(
            AdaptiveBlock(size, width, first=index == 0) for index, size in enumerate(sizes)
        )
        self.out = _linear(width, num_classes)

    def forward(self, h: Tensor, features: Tensor, t: Tensor) -> Tensor:
        """h (…, K), features (…, F), t (…) in [0, 1) → (…, K); shapes are broadcast."""
        t = t[..., None]
        c_in = (t**2 * DATA**2 + (1 - t) ** 2 * NOISE**2).rsqrt()
        c_skip = (t * DATA**2 - (1 - t) * NOISE**2) * c_in**2
        shape = torch.broadcast_shapes(h.shape[:-1], features.shape[:-1])
        x = torch.cat([it.expand(*shape, -1) for it in (c_in * h, features)], -1)
        time = time_features(t)
        for block in self.blocks:
            x = block(x, time)
        return c_skip * h + DATA * NOISE * c_in * self.out(x)


def _linear(in_features: int, out_features: int) -> nn.Linear:
    layer = nn.Linear(in_features, out_features)
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def time_features(t: Tensor) -> Tensor:
    """Cosines and sines of ln(1000(1 − t))/4 times 10⁻⁴ … 1 for times (…, 1) → (…, 32)."""
    half = TIME_FEATURES // 2
    powers = torch.arange(half, dtype=t.dtype, device=t.device) / half
    angles = (TIME_SCALE * (1 - t)).log() / 4 * 10000**-powers
    return torch.cat([angles.cos(), angles.sin()], -1)


def random_times(count: int, generator: torch.Generator) -> Tensor:
    """t = ln(1 + (3^0.999 − 1)·u)/ln 3, u ~ U(0, 1): density ∝ 3^t on [0, 0.999]; (count,)."""
    u = torch.rand(count, generator=generator, device=generator.device)
    return (1 + (BASE**CUT - 1) * u).log() / math.log(BASE)


def step_times() -> list[float]:
    """t_i = (1 − 2⁻ⁱ)/(1 − 2⁻⁷), i = 0 … 7: each step is half as long as the one before."""
    return [(1 - 0.5**i) / (1 - 0.5**STEPS) for i in range(STEPS + 1)]


def integrate(velocity: Velocity, h: Tensor, times: Sequence[float]) -> Tensor:
    """h at the first time → h at the last, by Heun's steps and one of Euler's at the end.

    So v is not asked at the last time, where its preconditioning has no noise left.

    Args:
        velocity: v.
        h: (…, K).
        times: increasing.
    """
    last = len(times) - 2
    for index, (now, then) in enumerate(pairwise(times)):
        slope = velocity(h, h.new_full((), now))  # new_tensor would copy, and a GPU wait
        if index < last:
            ahead = h + (then - now) * slope
            slope = (slope + velocity(ahead, h.new_full((), then))) / 2
        h = h + (then - now) * slope
    return h


class FlowNetwork(nn.Module):
    """A frozen backbone without its head, and a velocity network.

    The backbone is in eval mode always, and its weights get no gradients; images may. Under
    bfloat16 autocast the velocity network computes in float32.

    Args:
        architecture: of the backbone; its last layer is linear.
        width: of the velocity network.
        samples: S.

    Attributes:
        noise: h₀ of the S samples that make a prediction, (S, K), drawn once.
    """

    noise: Tensor

    def __init__(self, architecture: Mapping[str, Any], width: int, samples: int):
        super().__init__()
        num_classes = architecture["num_classes"]
        self.backbone = build_network(**architecture)
        self.last: str = cast(Any, self.backbone).last
        features = cast(nn.Linear, self.backbone.get_submodule(self.last)).in_features
        replace(self.backbone, self.last, nn.Identity())
        self.backbone.requires_grad_(False).eval()
        self.velocity = VelocityNetwork(features, num_classes, width)
        self.register_buffer("noise", torch.empty(samples, num_classes).normal_().mul_(NOISE))

    def train(self, mode: bool = True) -> "FlowNetwork":
        super().train(mode)
        self.backbone.eval()
        return self

    def features(self, x: Tensor) -> Tensor:
        """What the backbone's head would see: images (B, C, H, W) → (B, F)."""
        return self.backbone(x)

    def sample(self, features: Tensor) -> Tensor:
        """Logits of every sample (S, B, K).

        Args:
            features: (B, F), or (S, B, F) of each sample.
        """
        noise = self.noise[:, None].expand(-1, features.shape[-2], -1)
        with torch.autocast(features.device.type, enabled=False):
            return integrate(lambda h, t: self.velocity(h, features, t), noise, times=step_times())


def flow_matching_loss(velocity: Velocity, h0: Tensor, h1: Tensor, t: Tensor) -> Tensor:
    """mean over images of Σ_k (v(h_t, t) − (h₁ − h₀))², h_t = t·h₁ + (1−t)·h₀.

    Args:
        velocity: v at the images' features.
        h0, h1: noise and centred logits (B, K).
        t: (B,) in [0, 1).
    """
    h = t[:, None] * h1 + (1 - t[:, None]) * h0
    return (velocity(h, t) - (h1 - h0)).square().sum(-1).mean()


class FlowMatching(Student):
    """Samples of a flow over logits, given features of a frozen network [Park et al. 2025, EDFM].

    mean_s softmax(h₁ from the noise h₀_s), with noise drawn once and for all images.

    Attributes:
        members: S.
    """

    network: FlowNetwork
    rows = 1

    def __init__(
        self, architecture: Mapping[str, Any], members: int, width: int = 256, samples: int = 32
    ):
        super().__init__()
        self.network = FlowNetwork(architecture, width, samples)
        self.members = samples

    def start_from(self, backbone: Student) -> None:
        """Take the weights of the backbone from a trained `single` student, but for its head.

        Raises:
            RuntimeError: it has another architecture.
        """
        state = backbone.network.state_dict()
        last = f"{self.network.last}."
        body = {key: value for key, value in state.items() if not key.startswith(last)}
        self.network.backbone.load_state_dict(body)

    def member_logits(self, x: Tensor) -> Tensor:
        features = self.network.features(x.flatten(0, -4))
        return self.network.sample(features.unflatten(0, x.shape[:-3]))

    def parameter_groups(self, learning_rate: float, weight_decay: float) -> list[dict[str, Any]]:
        """The backbone is frozen."""
        parameters = list(self.network.velocity.parameters())
        return [{"params": parameters, "lr": learning_rate, "weight_decay": weight_decay}]
