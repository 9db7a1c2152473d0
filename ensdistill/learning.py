"""How a student learns in one step, and at which rate."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from ensdistill.batches import TrainingBatches
from ensdistill.metrics import ensemble_probs
from ensdistill.numerics import Precision, autocast, check_gradients
from ensdistill.objectives import OBJECTIVES, Parts
from ensdistill.perturbations import PERTURBATIONS
from ensdistill.recipes import Recipe
from ensdistill.students import Step, Student

SMALLEST_FACTOR = 0.01
"""Of the learning rate: at the first epoch, and at the end of `warmup_linear`."""

Schedule = Literal["warmup_linear", "cosine"]


@dataclass(frozen=True)
class Learning:
    """How a student learns: from whom, what, and where the teachers are asked."""

    teachers: Sequence[nn.Module]
    """As `Step.teachers`."""
    objective: Callable[[Step, Tensor], Parts]
    """An entry of `OBJECTIVES` with its options."""
    perturbation: Callable[[Step], Tensor]
    """An entry of `PERTURBATIONS` with its options."""
    probs: Callable[[ArrayLike], ArrayLike] = ensemble_probs
    """Of the student's logits (N, M, K), by which it is validated; (N, K)."""
    single_pass: bool = False
    """Whether labels teach at the perturbed images too."""
    held_out: TrainingBatches | None = None
    """Images that no network is trained on, for `Step.held_out`."""

    def completed(self, step: Step) -> Step:
        """A step with the held-out images that it needs; they are drawn unless it has them."""
        if self.held_out is None or step.held_out is not None:
            return step
        return replace(step, held_out=self.held_out.any_batch(step.generator)[0])

    def parts(self, step: Step) -> Parts:
        """The loss of a step, and its parts."""
        step = self.completed(step)
        x_distill = self.perturbation(step)
        if self.single_pass:
            step = replace(step, x=x_distill)
        return self.objective(step, x_distill)


def learning(
    teachers: Sequence[nn.Module],
    objective: Mapping[str, Any],
    perturbation: Mapping[str, Any],
    **how: Any,
) -> Learning:
    """A method's objective and perturbation, each given by its name and its options.

    `how` are other fields of a `Learning`.
    """
    entries: list[Any] = []
    registries: tuple[Mapping[str, Callable[..., Any]], ...] = (OBJECTIVES, PERTURBATIONS)
    for registry, chosen in zip(registries, (objective, perturbation), strict=True):
        options = dict(chosen)
        entries.append(partial(registry[options.pop("name")], **options))
    return Learning(teachers, *entries, **how)


def train_step(
    step: Step,
    learning: Learning,
    optimizer: torch.optim.Optimizer,
    precision: Precision,
    clip_norm: float | None = None,
) -> Parts:
    """One update of a student in training mode.

    Args:
        step: the student, its images and their labels.
        learning: from whom, what, and where the teachers are asked.
        precision: float32, or bfloat16 autocast of both passes.
        optimizer: of the student's parameters.
        clip_norm: largest norm of all gradients together; None for any.

    Returns:
        What the history keeps, still on the device: the loss and its parts, and the accuracy [%].
    """
    assert step.student is not None
    with autocast(step.x.device, precision):
        parts = learning.parts(step)
    optimizer.zero_grad()
    parts["loss"].backward()
    if clip_norm is not None:
        nn.utils.clip_grad_norm_(step.student.parameters(), clip_norm)
    optimizer.step()
    return {name: value.detach() for name, value in parts.items()}


class RunningSums:
    """Sums over steps of what `train_step` returned, in float64, where it was computed.

    So a step needs the memory of one before it alone, and no GPU is waited for until they are read.
    Float32 numbers are added up exactly while none of them is 2²⁹ times as small as the sum; then
    their mean does not depend on the order.
    """

    def __init__(self) -> None:
        self.names: list[str] = []
        self.sums = self.finite = torch.empty(0)

    def add(self, parts: Parts) -> None:
        """Add those of a step, which has the same ones as the steps before it."""
        values = torch.stack([*parts.values()]).double()
        if not self.names:
            self.names = [*parts]
            self.sums, self.finite = torch.zeros_like(values), torch.zeros_like(values)
        self.sums += values
        # A sum stays infinite or NaN once it is.
        self.finite += self.sums.isfinite()

    def clear(self) -> None:
        """Begin anew, in the same memory."""
        self.sums.zero_()
        self.finite.zero_()

    def read(self) -> dict[str, tuple[float, int]]:
        """Each sum, and in how many steps from the first it was finite."""
        found = torch.stack([self.sums, self.finite], 1).tolist()
        return {key: (total, int(n)) for key, (total, n) in zip(self.names, found, strict=True)}

    def state_dict(self) -> dict[str, Any]:
        return {"names": self.names, "sums": self.sums, "finite": self.finite}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.names, self.sums, self.finite = (state[key] for key in ("names", "sums", "finite"))

    def to(self, device: torch.device) -> None:
        """Bring them to a device."""
        self.sums, self.finite = self.sums.to(device), self.finite.to(device)


def check_first_step(
    student: Student,
    learning: Learning,
    train: tuple[Tensor, Tensor],
    batch_size: int,
    precision: Precision,
) -> None:
    """Refuse to train on wrong gradients; see `check_gradients`. It changes nothing."""
    images, y = (part[:batch_size] for part in train)
    x = (images.float() / 255).contiguous(memory_format=torch.channels_last)

    def loss(model: Any, x: Tensor, y: Tensor) -> Tensor:
        generators = torch.Generator(x.device).manual_seed(0), torch.Generator().manual_seed(0)
        step = Step(model, learning.teachers, x, y, 0.0, *generators)
        return learning.parts(step)["loss"]

    check_gradients(student, x, y, loss, precision)


def new_optimizer(student: Student, recipe: Recipe) -> torch.optim.Optimizer:
    """The optimiser of a recipe, with a student's `parameter_groups`."""
    return OPTIMIZERS[recipe.optimizer](parameter_groups(student, recipe), recipe)


def parameter_groups(student: Student, recipe: Recipe) -> list[dict[str, Any]]:
    """A student's groups of parameters with their peak rates and weight decays.

    With AdamW parameters that are vectors (of normalisations, biases, and biases of each member)
    are not decayed, as is usual where it is used: decoupled decay would pull them to 0 whatever
    their gradients. Each group is followed by one of its vectors, if it has some.
    """
    if recipe.optimizer == "sgd":
        return student.parameter_groups(recipe.learning_rate, recipe.weight_decay)
    vectors = {
        parameter
        for name, parameter in student.named_parameters()
        if parameter.ndim <= 1 or name.rsplit(".", 1)[-1] == "bias"
    }
    groups = []
    for group in student.adaptive_groups(recipe.learning_rate, recipe.weight_decay):
        plain, others = (
            [p for p in group["params"] if (p in vectors) == it] for it in (False, True)
        )
        groups += [{**group, "params": plain}, {**group, "params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def _sgd(groups: list[dict[str, Any]], recipe: Recipe) -> torch.optim.Optimizer:
    momentum, nesterov = recipe.momentum, recipe.nesterov
    return torch.optim.SGD(groups, momentum=momentum, nesterov=nesterov, fused=True)


def _adamw(groups: list[dict[str, Any]], recipe: Recipe) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, betas=(recipe.momentum, 0.999), fused=True)


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {"sgd": _sgd, "adamw": _adamw}
"""By the names that config.yaml uses."""


def learning_rate_factor(
    epoch: int, epochs: int, schedule: Schedule = "warmup_linear", warmup_epochs: int = 5
) -> float:
    """The learning rate of an epoch as a share of its peak.

    Both schedules grow linearly from 0.01 at epoch 1 to 1 at `warmup_epochs`. Then
    `warmup_linear` stays at 1 until epochs/2, falls linearly to 0.01 at 0.9·epochs and stays
    there [the authors' recipe, with 300 epochs]; `cosine` follows half a cosine that would reach
    0 at epoch epochs + 1 [Loshchilov & Hutter 2017].

    Args:
        epoch: 1 … epochs.
        epochs: length of the training.
    """
    if epoch < warmup_epochs:
        return SMALLEST_FACTOR + (1 - SMALLEST_FACTOR) * (epoch - 1) / (warmup_epochs - 1)
    if schedule == "cosine":
        return (1 + math.cos(math.pi * (epoch - warmup_epochs) / (epochs - warmup_epochs + 1))) / 2
    falling = (epoch - epochs / 2) / (0.9 * epochs - epochs / 2)
    return 1 - (1 - SMALLEST_FACTOR) * min(max(falling, 0.0), 1.0)
