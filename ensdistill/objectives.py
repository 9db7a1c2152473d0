"""What students minimise: (step, x_distill) → loss and its parts.

An objective looks at a `Step` alone. Its options, such as α and τ, are keyword arguments.
"""

import math
from collections.abc import Callable
from typing import Literal, cast

import torch
from torch import Tensor
from torch.distributions import Dirichlet, kl_divergence
from torch.nn import functional as F

from ensdistill.distributed import drawn, part_of, place
from ensdistill.flow_matching import NOISE, FlowMatching, flow_matching_loss, random_times
from ensdistill.gaussian_logits import (
    GaussianLogits,
    discrepancy,
    expected_squares,
    known_squares,
    posterior,
    scaled_loss,
)
from ensdistill.student import Student
from ensdistill.students import Step, any_teacher, teacher_logits

Parts = dict[str, Tensor]
"""Scalars: `loss`, and what the training history keeps beside it (detached)."""


def member_cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """mean over members and images of −log softmax(Ŝ_j(x))_y; logits (M, B, K), labels y (B,).

    >>> member_cross_entropy(torch.zeros(3, 2, 2), torch.tensor([0, 1])).item()  # log 2
    0.6931471824645996
    """
    return F.cross_entropy(logits.flatten(0, 1), y.repeat(logits.shape[0]))


def distillation_loss(logits: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """τ² · mean over members and images of KL(targets_j ‖ softmax(Ŝ_j/τ)) [Hinton et al. 2015].

    Args:
        logits: of the student, Ŝ (M, B, K).
        targets: the teachers' probabilities at the same temperature, (M, B, K).
        temperature: τ.

    >>> targets = torch.tensor([[[1.0, 0.0]]])
    >>> distillation_loss(torch.zeros(1, 1, 2), targets, temperature=2.0).item()  # 2² · log 2
    2.7725887298583984
    """
    log_probs = F.log_softmax(logits / temperature, -1).flatten(0, 1)
    divergence = F.kl_div(log_probs, targets.flatten(0, 1), reduction="batchmean")
    return temperature**2 * divergence


def labels(step: Step, x_distill: Tensor) -> Parts:
    """Cross-entropy with the labels: teachers, and BatchEnsemble from scratch [Wen et al. 2020]."""
    student, y = _trained(step)
    logits = student(step.x)
    loss = member_cross_entropy(logits, y)
    return {"loss": loss, "cross_entropy": loss.detach(), "accuracy": _accuracy(logits, y)}


def _trained(step: Step) -> tuple[Student, Tensor]:
    """The student of a step of its training, and the labels."""
    assert step.student is not None
    assert step.y is not None
    return step.student, step.y


def one_to_one(step: Step, x_distill: Tensor, *, alpha: float, temperature: float) -> Parts:
    """Teacher j teaches member j [Mariet et al. 2020; Nam et al. 2021]; see `distillation`."""
    return distillation(step, x_distill, lambda probs: probs, alpha, temperature)


def ensemble_mean(step: Step, x_distill: Tensor, *, alpha: float, temperature: float) -> Parts:
    """The teachers' mean probabilities teach every member [Hinton et al. 2015]."""

    def mean(probs: Tensor) -> Tensor:
        return probs.mean(0).expand(_trained(step)[0].members, -1, -1)

    return distillation(step, x_distill, mean, alpha, temperature)


def distillation(
    step: Step,
    x_distill: Tensor,
    targets: Callable[[Tensor], Tensor],
    alpha: float,
    temperature: float,
) -> Parts:
    """(1−α)·CE(S(x), y) + α·τ²·KL(T(x̃) ‖ S(x̃)), means over members and images.

    Nam et al. 2021, §3. The cross-entropy is on the clean x; both sides of the KL see the same x̃.
    Where x̃ is not x the student makes two forward passes, so that batch statistics of clean and
    perturbed images are not mixed.

    Args:
        step: the step.
        x_distill: x̃ (B, C, H, W), or (M, B, C, H, W) where each teacher is asked, and teaches, at
            images of its own; x itself where the teachers are asked at the images as they are.
        targets: makes the members' targets (M, B, K) of the teachers' probabilities (M, B, K).
        alpha: α in [0, 1].
        temperature: τ > 0.
    """
    student, y = _trained(step)
    logits = student(step.x)
    logits_distill = logits if x_distill is step.x else student(x_distill)
    probs = (teacher_logits(step.teachers, x_distill) / temperature).softmax(-1)
    from_labels = member_cross_entropy(logits, y)
    from_teachers = distillation_loss(logits_distill, targets(probs), temperature)
    return {
        "loss": (1 - alpha) * from_labels + alpha * from_teachers,
        "cross_entropy": from_labels.detach(),
        "distillation": from_teachers.detach(),
        "accuracy": _accuracy(logits, y),
    }


@torch.no_grad()
def _accuracy(logits: Tensor, y: Tensor) -> Tensor:
    """Accuracy [%] of the mean of the members' probabilities; logits (M, B, K)."""
    return 100 * (logits.softmax(-1).mean(0).argmax(-1) == y).float().mean()


def _accuracy_at(step: Step, x_distill: Tensor, logits: Tensor) -> Tensor:
    """Accuracy [%] at x̃ where that is x; else NaN, as the labels are of x."""
    if x_distill is step.x:
        return _accuracy(logits, _trained(step)[1])
    return logits.new_full((), torch.nan)


SMOOTHING = 1e-3
"""Share of the uniform distribution in the teachers' probabilities of `dirichlet_loss`."""


def dirichlet_loss(logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """EnD²: −log likelihood of the teachers' probabilities under Dir(α), α = e^{z/τ}.

    L = τ² · mean_b [ Σ_k lnΓ(α_k) − lnΓ(α₀) − Σ_k (α_k − 1)·mean_m ln p̂_mk ], with the teachers'
    probabilities p_m = softmax(t_m/τ) smoothed, p̂ = (1 − 10⁻³)(p_m − 1/K) + 1/K [Malinin et al.
    2020, eq. 13, and their code]. In float64, as α spans many orders of magnitude.

    Args:
        logits: of the student, z (B, K).
        teacher_logits: t (M, B, K).
        temperature: τ.

    >>> flat = torch.zeros(1, 3)  # Dir(1, 1, 1) has the density Γ(3) = 2 everywhere
    >>> dirichlet_loss(flat, torch.rand(4, 1, 3), temperature=1.0).exp().item()
    0.5
    """
    concentration = (logits.double() / temperature).exp()
    probs = (teacher_logits.double() / temperature).softmax(-1)
    uniform = 1 / probs.shape[-1]
    log_probs = ((1 - SMOOTHING) * (probs - uniform) + uniform).log().mean(0)
    normalizer = concentration.lgamma().sum(-1) - concentration.sum(-1).lgamma()
    return temperature**2 * (normalizer - ((concentration - 1) * log_probs).sum(-1)).mean()


def proxy_dirichlet_loss(
    logits: Tensor,
    teacher_logits: Tensor,
    temperature: float,
    direction: Literal["reverse", "forward"] = "reverse",
) -> Tensor:
    """Proxy-EnD²: divergence between Dir(α), α = e^{z/τ} + 1, and a proxy for the teachers.

    The proxy is Dir(β), β = β₀·p̄ + 1, with the teachers' mean probabilities p̄ at τ and
    β₀ = (K − 1) / (2·mean_m KL(p̄ ‖ p_m)) [Ryabinin et al. 2021, §4]. In float64.

    - reverse: KL(Dir(α) ‖ Dir(β)) as their code scales it, up to a constant:
      mean_b { −Σ_k p̄_k [ψ(α_k) − ψ(α₀)] + KL(Dir(α) ‖ Dir(1)) / (β₀ + K) };
    - forward: mean_b KL(Dir(β) ‖ Dir(α)).

    Args:
        logits: of the student, z (B, K).
        teacher_logits: t (M, B, K).
        temperature: τ.
        direction: reverse, which is zero-forcing, or forward.

    >>> teachers = torch.tensor([[[2.0, 0.0]], [[0.0, 2.0]]])  # whose mean is ½, ½
    >>> near, far = torch.zeros(1, 2), torch.tensor([[3.0, 0.0]])
    >>> losses = [proxy_dirichlet_loss(z, teachers, 1.0, "forward") for z in (near, far)]
    >>> bool(losses[0] < losses[1])
    True
    """
    concentration = (logits.double() / temperature).exp() + 1
    log_probs = (teacher_logits.double() / temperature).log_softmax(-1)
    log_mean = log_probs.logsumexp(0) - math.log(len(log_probs))
    mean, classes = log_mean.exp(), log_mean.shape[-1]
    # mean_m KL(p̄ ‖ p_m); this and all that follows has one number per image.
    divergence = (mean * (log_mean - log_probs.mean(0))).sum(-1)
    precision = (classes - 1) / (2 * divergence + torch.finfo(torch.float32).eps)
    student = Dirichlet(concentration, validate_args=False)
    if direction == "forward":
        proxy = Dirichlet(mean * precision[:, None] + 1, validate_args=False)
        return kl_divergence(proxy, student).mean()
    total = concentration.sum(-1, keepdim=True)
    expected = -(mean * (concentration.digamma() - total.digamma())).sum(-1)
    flat = Dirichlet(torch.ones_like(concentration), validate_args=False)
    return (expected + kl_divergence(student, flat) / (precision + classes)).mean()


def dirichlet(step: Step, x_distill: Tensor, *, first_temperature: float) -> Parts:
    """`dirichlet_loss`; in the second half of the training τ falls linearly to 1."""
    share = step.decide(lambda it: min(2 * (1 - it.progress), 1))
    temperature = 1 + share * (first_temperature - 1)
    return _of_one(step, x_distill, lambda z, t: dirichlet_loss(z, t, temperature))


def proxy_dirichlet(
    step: Step, x_distill: Tensor, *, temperature: float, direction: Literal["reverse", "forward"]
) -> Parts:
    """`proxy_dirichlet_loss` at the inputs where the teachers are asked."""
    return _of_one(step, x_distill, lambda z, t: proxy_dirichlet_loss(z, t, temperature, direction))


def _of_one(step: Step, x_distill: Tensor, loss: Callable[[Tensor, Tensor], Tensor]) -> Parts:
    """A loss of one network's logits (B, K) and the teachers' (M, B, K), without autocast."""
    logits = _trained(step)[0](x_distill)
    value = loss(logits[0], teacher_logits(step.teachers, x_distill))
    return {"loss": value, "accuracy": _accuracy_at(step, x_distill, logits)}


FREE_PHASE = 0.1
"""Share of the training of `gaussian_likelihood` in which every teacher's latents are free."""


def gaussian_likelihood(step: Step, x_distill: Tensor) -> Parts:
    """−log likelihood of the teachers' centred logits at x̃ under `GaussianLogits`, by EM.

    An E-step, and one step of SGD on the M-step's loss per image and class, as `scaled_loss` has
    it; no labels [Park et al. 2025, arXiv 2510.19290]. In the first tenth of the training Z_i are
    parameters of the student, and MMD²(Z, N(0, I)) is added with weight 1. Neither that length nor
    the weight is published; weights from 0 to 100 made no difference on digits.
    """
    student = cast(GaussianLogits, step.student)
    network = student.network
    mean, loadings = network(x_distill)
    logits = teacher_logits(step.teachers, x_distill)
    with torch.autocast(x_distill.device.type, enabled=False):
        given = logits - logits.mean(-1, keepdim=True) - mean, loadings, network.lower
        variance = network.log_variance.exp()
        penalty: Tensor | float = 0.0
        if step.decide(lambda it: it.progress < FREE_PHASE):
            latents = student.latents
            squares, penalty = known_squares(*given, latents), discrepancy(latents)
        else:
            squares = expected_squares(*given, posterior(*given, variance))
        loss = scaled_loss(squares, variance, mean.numel()) + penalty
        with torch.no_grad():
            sampled = network.sample(mean, loadings)
    return {
        "loss": loss,
        "squared_error": squares.detach() / mean.numel(),
        "variance": variance.detach(),
        "accuracy": _accuracy_at(step, x_distill, sampled),
    }


def flow_matching(step: Step, x_distill: Tensor) -> Parts:
    """Squared error of the velocity from noise to the centred logits of a teacher, at x̃.

    L/(16K) with L of `flow_matching_loss`, for `FlowMatching` [Park et al. 2025, ICML]; no labels.
    Teacher (one for the batch), noise and times are drawn anew in each step. Per class and in units
    of the noise's variance one learning rate fits every K: the published 10⁻⁴ (K = 10) and 3·10⁻⁴
    (K = 100) for L are 0.016 and 0.48 here, the published weight decay 3·10⁻⁶ and 3·10⁻⁷.

    `accuracy` is that of the expected logits E[h₁ | x] = v(0, x, 0): one call of v, not 13 S.
    """
    network = cast(FlowMatching, step.student).network
    features = network.features(x_distill)
    teacher = step.teachers[step.decide(any_teacher)]
    (logits,) = teacher_logits([teacher], x_distill)
    with torch.autocast(x_distill.device.type, enabled=False):
        h1 = logits - logits.mean(-1, keepdim=True)
        h0 = NOISE * drawn(h1, lambda it: it.normal_(generator=step.generator))
        count = len(h1) * place().count
        times = random_times(count, step.generator)[part_of(count)].to(h1.dtype)
        error = flow_matching_loss(lambda h, t: network.velocity(h, features, t), h0, h1, times)
        with torch.no_grad():
            zeros = torch.zeros_like(h1)
            expected = network.velocity(zeros, features, zeros[:, 0])
    return {
        "loss": error / (NOISE**2 * h1.shape[1]),
        "velocity_error": error.detach(),
        "accuracy": _accuracy_at(step, x_distill, expected[None]),
    }


OBJECTIVES: dict[str, Callable[..., Parts]] = {
    "labels": labels,
    "one_to_one": one_to_one,
    "ensemble_mean": ensemble_mean,
    "dirichlet": dirichlet,
    "proxy_dirichlet": proxy_dirichlet,
    "gaussian_likelihood": gaussian_likelihood,
    "flow_matching": flow_matching,
}
"""By the names that config.yaml uses; their options and traits are in options.py."""
