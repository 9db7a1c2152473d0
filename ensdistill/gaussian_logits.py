"""A Gaussian over an ensemble's logits: the deep latent factor model, DLF [Park et al. 2025].

Teacher i's centred logits for a batch, F_i (B, K), are one draw of a Gaussian process:

    F_i = μ + Φ Z_iᵀ Lᵀ + noise,   Z_i ~ N(0, I) (K, q),   noise ~ N(0, σ²),

with μ (B, K) and Φ (B, q) from a network, and parameters L (K, K), lower triangular, and σ² > 0.
With the rows of F_i and of Z_iᵀ one after another that is f_i = μ + A z_i + noise, A = Φ ⊗ L
(BK, qK). A is never built: the eigenpairs of ΦᵀΦ and LᵀL give those of AᵀA. Model and letters are
those of Park et al. (2025, arXiv 2510.19290); the formulas were derived anew from them.

Each batch has latents of its own: a posterior of Z_i from all training images would be narrower.
The gradient of the M-step's loss, right after the E-step, is that of the batch's
−log N(f_i; μ, AAᵀ + σ²I).
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ensdistill.distributed import averaged, summed
from ensdistill.networks import build_network
from ensdistill.student import Student


class LatentFactorNetwork(nn.Module):
    """μ and Φ of one network with K + q outputs, beside L and σ².

    Attributes:
        log_variance: ln σ², a scalar.
        noise: Z_s of the S samples that make a prediction, (S, K, q), drawn once.
    """

    noise: Tensor

    def __init__(self, architecture: Mapping[str, Any], rank: int, samples: int):
        super().__init__()
        num_classes = architecture["num_classes"]
        self.body = build_network(**{**architecture, "num_classes": num_classes + rank})
        # Small, or Z would explain what μ has not learnt yet.
        self.factor = nn.Parameter(0.1 * torch.eye(num_classes))
        self.log_variance = nn.Parameter(torch.zeros(()))
        self.register_buffer("noise", torch.empty(samples, num_classes, rank).normal_())

    @property
    def lower(self) -> Tensor:
        """L (K, K)."""
        return self.factor.tril()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, C, H, W) → μ (B, K) and Φ (B, q)."""
        outputs = self.body(x)
        num_classes = len(self.factor)
        return outputs[:, :num_classes], outputs[:, num_classes:]

    def sample(self, mean: Tensor, loadings: Tensor) -> Tensor:
        """Logits μ + L Z_s φ of every sample, (S, B, K).

        Args:
            mean, loadings: μ (B, K) and Φ (B, q), or (S, B, K) and (S, B, q) of each sample.
        """
        # Not by @, whose rounding depends on whether gradients are asked for.
        directions = torch.einsum("kl,slq->sqk", self.lower, self.noise)
        return mean + loadings.expand(len(directions), -1, -1).bmm(directions)


class Posterior(NamedTuple):
    """Z_i given a batch: N(m_i, S), S = (U ⊗ V) diag(shrinkage) (U ⊗ V)ᵀ."""

    mean: Tensor
    """m_i as Z_i, (M, K, q)."""
    of_loadings: Tensor
    """U (q, q): eigenvectors of ΦᵀΦ."""
    of_factor: Tensor
    """V (K, K): eigenvectors of LᵀL."""
    shrinkage: Tensor
    """(q, K), in (0, 1]."""


@torch.no_grad()
def posterior(residual: Tensor, loadings: Tensor, lower: Tensor, variance: Tensor) -> Posterior:
    """The E-step: S = (I + AᵀA/σ²)⁻¹, m_i = S Aᵀ(f_i − μ)/σ².

    By O(q³ + K³) operations, in float64: AᵀA/σ² can be large, and differences of its eigenvalues
    to 1 matter. On a GPU the eigenvalues are waited for.

    Args:
        residual: F_i − μ (M, B, K).
        loadings: Φ (B, q).
        lower: L (K, K).
        variance: σ², a scalar.

    Returns:
        In the precision of `residual`.
    """
    inputs = (residual, loadings, lower, variance)
    exact, loadings, lower, variance = (it.double() for it in inputs)
    a, u = torch.linalg.eigh(summed(loadings.mT @ loadings))
    b, v = torch.linalg.eigh(lower.mT @ lower)
    scale = variance + a.clamp(min=0)[:, None] * b.clamp(min=0)
    rotated = u.mT @ (summed(loadings.mT @ exact) @ lower) @ v / scale
    found = (u @ rotated @ v.mT).mT, u, v, variance / scale
    return Posterior(*(it.to(residual.dtype) for it in found))


def expected_squares(
    residual: Tensor, loadings: Tensor, lower: Tensor, latents: Posterior
) -> Tensor:
    """mean_i ‖f_i − μ − A m_i‖² + tr(AᵀA S), the expectation of `known_squares` over Z_i.

    Args:
        residual, loadings, lower: as `posterior`.
        latents: its result, a constant.
    """
    left = (loadings @ latents.of_loadings).square().sum(0)
    right = (lower @ latents.of_factor).square().sum(0)
    trace = (left[:, None] * right * latents.shrinkage).sum()
    return known_squares(residual, loadings, lower, latents.mean) + trace


def known_squares(residual: Tensor, loadings: Tensor, lower: Tensor, latents: Tensor) -> Tensor:
    """mean_i ‖f_i − μ − A z_i‖² with Z_i (M, K, q); the other arguments as `posterior`."""
    return (residual - loadings @ latents.mT @ lower.mT).square().sum((1, 2)).mean()


def scaled_loss(squares: Tensor, variance: Tensor, size: int) -> Tensor:
    """What the M-step minimises, (1/2σ²)·squares + ½BK ln σ², scaled for SGD.

    The gradient is that of the formula times a positive number for each block of parameters, so
    that one learning rate fits all: σ²/BK for μ, Φ, L and Z, whose steps would grow as σ² falls;
    w/BK for ln σ², with w = σ²/(σ² + squares/BK), where a σ² far too small would become 10⁸ in a
    few steps. Park et al. scale nothing.

    Args:
        squares: of `expected_squares` or `known_squares`.
        variance: σ², a scalar.
        size: BK.

    Returns:
        ½·squares/BK + ½w·(squares/(BKσ²) + ln σ²), with w and the second squares constant.
    """
    squares = squares / size
    known, now = averaged(squares.detach()), variance.detach()
    weight = now / (now + known)
    return squares / 2 + weight * (known / variance + variance.log()) / 2


def discrepancy(latents: Tensor) -> Tensor:
    """MMD² between samples and N(0, I) with the kernel exp(−‖x − y‖²/2d) [Gretton et al. 2012].

    The expectations over N(0, I) are closed forms; between the samples it is the V-statistic, so
    the result is ≥ 0. d is the dimension: two draws of N(0, I) are about √(2d) apart.

    Args:
        latents: samples, their dimensions flattened: (M, …).
    """
    x = latents.flatten(1)
    size = x.shape[1]
    between = (x[:, None] - x).square().sum(-1).div(-2 * size).exp().mean()
    to_normal = (x.square().sum(-1) / (-2 * (size + 1))).exp().mean()
    # (h²/(h² + 1))^{d/2} and (h²/(h² + 2))^{d/2} with h² = d
    once, twice = (math.exp(-size / 2 * math.log1p(n / size)) for n in (1, 2))
    return between - 2 * once * to_normal + twice


class GaussianLogits(Student):
    """Samples of a Gaussian over logits: mean_s softmax(μ + L Z_s φ) [Park et al. 2025, DLF].

    Z_s are drawn once and for all images, so that a sample is a function of the image, and a loaded
    student predicts the same.

    Attributes:
        members: S.
        latents: Z_i of the M teachers in the first phase of the training, (M, K, q).
    """

    network: LatentFactorNetwork
    rows = 1

    def __init__(
        self, architecture: Mapping[str, Any], members: int, rank: int = 8, samples: int = 32
    ):
        super().__init__()
        self.network = LatentFactorNetwork(architecture, rank, samples)
        self.members = samples
        # On the CPU also where a file's student is built without storage: files have no latents.
        shape = members, architecture["num_classes"], rank
        self.latents = nn.Parameter(torch.zeros(shape, device="cpu").normal_())

    def member_logits(self, x: Tensor) -> Tensor:
        mean, loadings = self.network(x.flatten(0, -4))
        if x.ndim == 5:
            mean, loadings = (it.unflatten(0, x.shape[:2]) for it in (mean, loadings))
        return self.network.sample(mean, loadings)

    def parameter_groups(self, learning_rate: float, weight_decay: float) -> list[dict[str, Any]]:
        """Weight decay on the network's weights alone."""
        body = list(self.network.body.parameters())
        others = [self.network.factor, self.network.log_variance, self.latents]
        return [
            {"params": body, "lr": learning_rate, "weight_decay": weight_decay},
            {"params": others, "lr": learning_rate, "weight_decay": 0.0},
        ]
