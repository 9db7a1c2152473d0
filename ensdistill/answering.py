"""What a student answers as one module, so that an exported file holds all of it.

The formulas are those of `deployment.answers`, in float32 and without overflow: what is said there
of probabilities is computed here from their logarithms.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ensdistill.calibration import SMALLEST_PROBABILITY, TINY

OUTPUTS = ("probabilities", "member_probabilities", "entropy", "mutual_information")
"""In the order in which `Answering` returns them."""

SHIFT = 6
"""ψ(x) = ψ(x + 6) − Σ_{i<6} 1/(x + i), and x + 6 ≥ 7 is large enough for the series."""

LARGE = 2.0
"""log a from which ψ(a + 1) − log a is computed by its series in 1/a."""


class Answering(nn.Module):
    """Images → what `deployment.Answers` has, as a tuple in the order of `OUTPUTS`.

    Args:
        form: images (B, C, H, W) float32 in [0, 1] → logits (M, B, K).
        prediction: what they mean, as `deployment.Deployment` has it.
        temperature: T.
        uint8: whether images are uint8, to be divided by 255.

    Shape:
        input (B, C, H, W) → (B, K), (B, M, K), (B,), (B,), float32. Of one network with a softmax
        the mutual information is 0.
    """

    def __init__(
        self, form: nn.Module, prediction: Mapping[str, Any], temperature: float, uint8: bool
    ):
        super().__init__()
        self.form, self.temperature, self.uint8 = form, temperature, uint8
        self.dirichlet = prediction["prediction"] == "dirichlet"
        self.offset = float(prediction.get("concentration_offset", 0.0))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        logits = self.form(images.float() / 255 if self.uint8 else images).float()
        if self.dirichlet:
            members, log_mean, information = self._dirichlet(logits)
        else:
            log_mean = _log_mean_exp(logits.log_softmax(-1), 0)
            members = (logits / self.temperature).softmax(-1)
            information = _disagreement(members)
        probabilities = self._scaled(log_mean)
        return probabilities, members.transpose(0, 1), _entropy(probabilities), information

    def _dirichlet(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See `predictions.Dirichlet`; its mutual information knows no temperature."""
        log_alpha = logits
        if self.offset:
            level = math.log(self.offset)  # log(e^z + e^level)
            log_alpha = logits.clamp(min=level) + (-(logits - level).abs()).exp().log1p()
        log_total = _log_mean_exp(log_alpha, -1, keepdim=True) + math.log(log_alpha.shape[-1])
        log_means = log_alpha.log_softmax(-1)
        means = log_means.exp()
        excess = _digamma_excess(log_alpha) - _digamma_excess(log_total)
        information = _disagreement(means) + (means * excess).sum(-1).mean(0)
        return self._scaled(log_means), _log_mean_exp(log_means, 0), information

    def _scaled(self, log_probs: Tensor) -> Tensor:
        """softmax(log p / T), with the smallest p of `calibration.apply_temperature`."""
        return (log_probs.clamp(min=math.log(TINY)) / self.temperature).softmax(-1)


def _log_mean_exp(x: Tensor, dim: int, keepdim: bool = False) -> Tensor:
    largest = x.amax(dim, keepdim=True)
    found = largest + (x - largest).exp().mean(dim, keepdim=True).log()
    return found if keepdim else found.squeeze(dim)


def _entropy(probs: Tensor) -> Tensor:
    """As of `metrics.entropy`, (…, K) → (…)."""
    return -(probs * probs.clamp(min=SMALLEST_PROBABILITY).log()).sum(-1)


def _disagreement(members: Tensor) -> Tensor:
    """Entropy of the members' mean minus the mean of their entropies, (M, B, K) → (B,)."""
    if len(members) == 1:
        return torch.zeros_like(members[0, :, 0])
    return (_entropy(members.mean(0)) - _entropy(members).mean(0)).clamp(min=0)


def _digamma_excess(log_a: Tensor) -> Tensor:
    """ψ(a + 1) − log a of a positive a, by log a; ONNX has no digamma.

    Small a: recurrence to a + 1 + `SHIFT`, and there ln x − 1/2x − 1/12x² + 1/120x⁴ − 1/252x⁶
    [Abramowitz & Stegun 1964, 6.3.6, 6.3.18], which is wrong by less than 1/240x⁸ ≤ 8e-10. Large a:
    1/2a − 1/12a² + 1/120a⁴ − 1/252a⁶, wrong by less than 5e-10. In float32 rounding is more.
    """
    x = log_a.clamp(max=LARGE).exp() + 1
    y = x + SHIFT
    small = y.log() - log_a - 1 / (2 * y) - _even_terms(1 / (y * y))
    for i in range(SHIFT):
        small = small - 1 / (x + i)
    inverse = (-log_a.clamp(min=LARGE)).exp()
    large = inverse / 2 - _even_terms(inverse * inverse)
    return torch.where(log_a < LARGE, small, large)


def _even_terms(z: Tensor) -> Tensor:
    """z/12 − z²/120 + z³/252, z = 1/x²."""
    return z * (1 / 12 - z * (1 / 120 - z / 252))
