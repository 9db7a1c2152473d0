"""What students minimise: (step, x_distill) → loss and its parts.

An objective looks at a `Step` alone. Its options, such as α and τ, are keyword arguments.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from ensdistill.students import Step, teacher_logits

Parts = dict[str, Tensor]
"""Scalars: `loss`, and what the training history keeps beside it (detached)."""


def member_cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """mean over members and images of −log softmax(Ŝ_j(x))_y; logits (M, B, K), labels y (B,)."""
    return F.cross_entropy(logits.flatten(0, 1), y.repeat(logits.shape[0]))


def distillation_loss(logits: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """τ² · mean over members and images of KL(targets_j ‖ softmax(Ŝ_j/τ)) [Hinton et al. 2015].

    Args:
        logits: of the student, Ŝ (M, B, K).
        targets: the teachers' probabilities at the same temperature, (M, B, K).
        temperature: τ.
    """
    log_probs = F.log_softmax(logits / temperature, -1).flatten(0, 1)
    divergence = F.kl_div(log_probs, targets.flatten(0, 1), reduction="batchmean")
    return temperature**2 * divergence


def labels(step: Step, x_distill: Tensor) -> Parts:
    """Cross-entropy with the labels: teachers, and BatchEnsemble from scratch [Wen et al. 2020]."""
    logits = step.student(step.x)
    loss = member_cross_entropy(logits, step.y)
    return {"loss": loss, "cross_entropy": loss.detach(), "accuracy": _accuracy(logits, step.y)}


def one_to_one(step: Step, x_distill: Tensor, *, alpha: float, temperature: float) -> Parts:
    """Teacher j teaches member j [Mariet et al. 2020; Nam et al. 2021]; see `distillation`."""
    return distillation(step, x_distill, lambda probs: probs, alpha, temperature)


def ensemble_mean(step: Step, x_distill: Tensor, *, alpha: float, temperature: float) -> Parts:
    """The teachers' mean probabilities teach every member [Hinton et al. 2015]."""

    def mean(probs: Tensor) -> Tensor:
        return probs.mean(0).expand(step.student.members, -1, -1)

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
        x_distill: x̃ (B, C, H, W); x itself where the teachers are asked at the images as they are.
        targets: makes the members' targets (M, B, K) of the teachers' probabilities (M, B, K).
        alpha: α in [0, 1].
        temperature: τ > 0.
    """
    logits = step.student(step.x)
    logits_distill = logits if x_distill is step.x else step.student(x_distill)
    probs = (teacher_logits(step.teachers, x_distill) / temperature).softmax(-1)
    from_labels = member_cross_entropy(logits, step.y)
    from_teachers = distillation_loss(logits_distill, targets(probs), temperature)
    return {
        "loss": (1 - alpha) * from_labels + alpha * from_teachers,
        "cross_entropy": from_labels.detach(),
        "distillation": from_teachers.detach(),
        "accuracy": _accuracy(logits, step.y),
    }


@torch.no_grad()
def _accuracy(logits: Tensor, y: Tensor) -> Tensor:
    """Accuracy [%] of the mean of the members' probabilities; logits (M, B, K)."""
    return 100 * (logits.softmax(-1).mean(0).argmax(-1) == y).float().mean()


OBJECTIVES: dict[str, Callable[..., Parts]] = {
    "labels": labels,
    "one_to_one": one_to_one,
    "ensemble_mean": ensemble_mean,
}
"""By the names that config.yaml uses; their options and traits are in methods.py."""
