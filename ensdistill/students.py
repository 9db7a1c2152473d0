"""Students: images (B, C, H, W) in [0, 1] → member logits (M, B, K); and a step of their training.

That is the only contract between a student and the rest of the package. What a student does with
its rows and members inside is its own affair. A teacher is a `single` student that learnt from
labels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ensdistill.flow_matching import FlowNetwork
from ensdistill.gaussian_logits import LatentFactorNetwork
from ensdistill.networks import build_network

ROWS = 500
"""Rows of 32×32 pixels that `predict` gives a network at once."""


class Student(nn.Module):
    """What every student has in common.

    Attributes:
        network: the module that holds all weights; its state is what a weights file stores.
        members: M.
        spec: the arguments of `build_student` that build it again.
    """

    network: nn.Module
    members: int
    spec: dict[str, Any]

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W), floating point in [0, 1] → logits of every member (M, B, K).

        With images (M, B, C, H, W) each member sees its own. Logits are at least float32, also
        under bfloat16 autocast.

        Raises:
            TypeError: the images are integers.
        """
        if not x.is_floating_point():
            raise TypeError(
                f"images must be floating point in [0, 1], not {x.dtype}: convert them, as in "
                "x.float() / 255"
            )
        logits = self.member_logits(x)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def member_logits(self, x: Tensor) -> Tensor:
        """Images as of `forward` → logits (M, B, K), in the precision of the network."""
        raise NotImplementedError

    def of_each(self, x: Tensor) -> Tensor:
        """Images of each member (M, B, C, H, W): its own, or the same for all."""
        return x if x.ndim == 5 else x.expand(self.members, *x.shape)

    def set_progress(self, progress: float) -> None:
        """Told before each epoch which share of the training is done, 0 … 1."""

    def parameter_groups(self, learning_rate: float, weight_decay: float) -> list[dict[str, Any]]:
        """Groups of parameters for the optimiser, each with `lr` and `weight_decay`."""
        parameters = list(self.parameters())
        return [{"params": parameters, "lr": learning_rate, "weight_decay": weight_decay}]

    def predictor(self) -> "Student":
        """What is validated, stored, judged and exported: this student, unless it is merged."""
        return self


class Single(Student):
    """One ordinary network: M = 1."""

    def __init__(self, architecture: Mapping[str, Any], members: int = 1):
        super().__init__()
        self.network = build_network(**architecture)
        self.members = 1

    def member_logits(self, x: Tensor) -> Tensor:
        return self.network(x[0] if x.ndim == 5 else x)[None]


class BatchEnsemble(Student):
    """M members that share one set of weights and differ by rank-one factors [Wen et al. 2020].

    Rows jB … (j+1)B−1 of the network belong to member j.
    """

    def __init__(self, architecture: Mapping[str, Any], members: int):
        super().__init__()
        self.network = build_network(**architecture, ensemble_size=members)
        self.members = members

    def member_logits(self, x: Tensor) -> Tensor:
        x = self.of_each(x)
        return self.network(x.flatten(0, 1)).unflatten(0, x.shape[:2])

    def parameter_groups(self, learning_rate: float, weight_decay: float) -> list[dict[str, Any]]:
        """The factors r and s learn at half the rate and without weight decay."""
        factors, others = [], []
        for name, parameter in self.named_parameters():
            (factors if name.rsplit(".", 1)[-1] in ("r", "s") else others).append(parameter)
        return [
            {"params": others, "lr": learning_rate, "weight_decay": weight_decay},
            {"params": factors, "lr": learning_rate / 2, "weight_decay": 0.0},
        ]


class GaussianLogits(Student):
    """Samples of a Gaussian over logits: mean_s softmax(μ + L Z_s φ) [Park et al. 2025, DLF].

    Z_s are drawn once and for all images, so that a sample is a function of the image, and a loaded
    student predicts the same. See `ensdistill.gaussian_logits`.

    Attributes:
        members: S.
        latents: Z_i of the M teachers in the first phase of the training, (M, K, q).
    """

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


class FlowMatching(Student):
    """Samples of a flow over logits, given features of a frozen network [Park et al. 2025, EDFM].

    mean_s softmax(h₁ from the noise h₀_s), with noise drawn once and for all images. Meant for
    ensembles without end: expect less of M teachers; see `ensdistill.flow_matching`.

    Attributes:
        members: S.
    """

    def __init__(
        self, architecture: Mapping[str, Any], members: int, width: int = 256, samples: int = 32
    ):
        super().__init__()
        self.network = FlowNetwork(architecture, width, samples)
        self.members = samples

    def start_from(self, student: Student) -> None:
        """Take the weights of the backbone from a trained `single` student, but for its head.

        Raises:
            RuntimeError: it has another architecture.
        """
        state = student.network.state_dict()
        body = {key: value for key, value in state.items() if not key.startswith("head.")}
        self.network.backbone.load_state_dict(body)

    def member_logits(self, x: Tensor) -> Tensor:
        features = self.network.features(x.flatten(0, -4))
        return self.network.sample(features.unflatten(0, x.shape[:-3]))

    def parameter_groups(self, learning_rate: float, weight_decay: float) -> list[dict[str, Any]]:
        """The backbone is frozen."""
        parameters = list(self.network.velocity.parameters())
        return [{"params": parameters, "lr": learning_rate, "weight_decay": weight_decay}]


STUDENTS: dict[str, type[Student]] = {
    "single": Single,
    "batch_ensemble": BatchEnsemble,
    "gaussian_logits": GaussianLogits,
    "flow_matching": FlowMatching,
}
"""By the names that config.yaml uses; their options and traits are in methods.py."""


def build_student(
    name: str, architecture: Mapping[str, Any], members: int, **options: Any
) -> Student:
    """A student with newly drawn weights.

    Args:
        name: a key of `STUDENTS`.
        architecture: arguments of `build_network` but `ensemble_size`.
        members: M.
        **options: of this kind of student.
    """
    student = STUDENTS[name](architecture, members, **options)
    student.spec = {"name": name, "architecture": architecture, "members": members, **options}
    return student


@dataclass(frozen=True)
class Step:
    """All that an objective or a perturbation may look at."""

    student: Student | None
    """In training mode; None where only teachers are asked."""
    teachers: Sequence[nn.Module]
    """M frozen networks in eval mode, (B, C, H, W) → (B, K); none if the objective needs none."""
    x: Tensor
    """Images (B, C, H, W) in [0, 1]."""
    y: Tensor | None
    """Labels (B,); None where only teachers are asked."""
    progress: float
    """Share of the training that is done, 0 … 1."""
    generator: torch.Generator
    """Of random numbers on the device of x."""
    host: torch.Generator
    """Of random numbers on the CPU, for what the host must know: asking a GPU would stop it."""


def teacher_logits(teachers: Sequence[nn.Module], x: Tensor) -> Tensor:
    """Logits of every teacher on the same images, (B, C, H, W) → (M, B, K), without gradients.

    Args:
        teachers: networks that map (B, C, H, W) to (B, K).
        x: images in [0, 1].
    """
    with torch.no_grad():
        logits = torch.stack([teacher(x) for teacher in teachers])
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


@torch.inference_mode()
def predict(student: Student, images: Tensor) -> NDArray[np.float32]:
    """Logits of a student in eval mode; its mode is restored afterwards.

    As many images are taken at once as make `ROWS` rows, fewer where they are larger than 32×32.

    Args:
        student: on the device of the images.
        images: uint8 (N, C, H, W).

    Returns:
        (N, M, K) float32; M = 1 for a single network.
    """
    training = student.training
    student.eval()
    pixels = max(images[0, 0].numel(), 32 * 32)
    batch_size = max(1, ROWS * 32 * 32 // (student.members * pixels))
    logits = [student(batch.float() / 255).transpose(0, 1) for batch in images.split(batch_size)]
    student.train(training)
    return torch.cat(logits).float().cpu().numpy()


def count_parameters(module: nn.Module) -> int:
    """The number of parameters; running statistics of batch normalisation are none."""
    return sum(parameter.numel() for parameter in module.parameters())
