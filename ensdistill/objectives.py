"""What students and teachers minimise.

Every objective maps (network, x, y, generator) to a dictionary with the scalar `loss`, its
parts (for the history) and the detached clean `logits` (M, B, K).
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ensdistill.networks import member_logits
from ensdistill.perturbations import perturb

Objective = Callable[[nn.Module, Tensor, Tensor, torch.Generator], dict[str, Tensor]]


def member_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """mean over members and images of −log softmax(Ŝ_j(x))_y; logits (M, B, K), labels (B,)."""
    return F.cross_entropy(logits.flatten(0, 1), labels.repeat(logits.shape[0]))


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


def cross_entropy(network: nn.Module, x: Tensor, y: Tensor, generator=None) -> dict[str, Tensor]:
    """Learning from labels alone: teachers, and BatchEnsemble from scratch [Wen et al. 2020]."""
    logits = member_logits(network, x)
    loss = member_cross_entropy(logits, y)
    return {"loss": loss, "cross_entropy": loss.detach(), "logits": logits.detach()}


def one_to_one_targets(probs: Tensor, members: int) -> Tensor:
    """Teacher j teaches member j [Mariet et al. 2020; Nam et al. 2021]."""
    return probs


def ensemble_mean_targets(probs: Tensor, members: int) -> Tensor:
    """The ensemble's mean probabilities teach every member [Hinton et al. 2015]."""
    return probs.mean(0).expand(members, -1, -1)


TARGETS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "one_to_one": one_to_one_targets,
    "ensemble_mean": ensemble_mean_targets,
}


def distillation(
    teachers: Sequence[nn.Module],
    *,
    objective: str,
    perturbation: str,
    alpha: float,
    temperature: float,
    eta: float = 0.0,
) -> Objective:
    """The loss (1−α)·CE(S(x), y) + α·τ²·KL(T(x̃) ‖ S(x̃)), averaged over members and images.

    Nam et al. 2021, §3. The cross-entropy is on the clean x; both sides of the KL see
    the same x̃. When x̃ ≠ x the student makes two forward passes, so that batch statistics of
    clean and perturbed images are not mixed.

    Args:
        teachers: frozen networks in eval mode, (B, C, H, W) → (B, K).
        objective: a key of `TARGETS`.
        perturbation: `none` or a key of `perturbations.PERTURBATIONS`.
        alpha: α in [0, 1].
        temperature: τ > 0, also that of the perturbation.
        eta: η, in units of the pixel range; unused without a perturbation.
    """

    def loss(student: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator):
        logits = member_logits(student, x)
        if perturbation == "none":
            x_met, logits_met = x, logits
        else:
            x_met = perturb(
                perturbation, teachers, x, eta=eta, temperature=temperature, generator=generator
            )
            logits_met = member_logits(student, x_met)
        with torch.no_grad():
            probs = torch.cat([member_logits(teacher, x_met) for teacher in teachers])
            targets = TARGETS[objective]((probs / temperature).softmax(-1), len(logits))
        from_labels = member_cross_entropy(logits, y)
        from_teachers = distillation_loss(logits_met, targets, temperature)
        return {
            "loss": (1 - alpha) * from_labels + alpha * from_teachers,
            "cross_entropy": from_labels.detach(),
            "distillation": from_teachers.detach(),
            "logits": logits.detach(),
        }

    return loss


def student_objective(teachers: Sequence[nn.Module], objective: str, **settings) -> Objective:
    """The objective of a method: `cross_entropy`, or `distillation` with the settings given."""
    if objective == "cross_entropy":
        return cross_entropy
    return distillation(teachers, objective=objective, **settings)
