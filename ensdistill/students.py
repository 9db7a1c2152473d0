"""The kinds of students, and a step of their training.

Their contract is in student.py. A teacher is a `single` student that learnt from labels.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ensdistill import InputError
from ensdistill.batch_ensemble import BatchEnsembleLayer, Init, init_factors
from ensdistill.convert import BatchEnsembleMap, check_members
from ensdistill.flow_matching import FlowMatching
from ensdistill.gaussian_logits import GaussianLogits
from ensdistill.hydra import Hydra
from ensdistill.latent_batch_ensemble import latent_layers, merged_state
from ensdistill.layers import WithoutRandomNumbers
from ensdistill.loading import in_batches
from ensdistill.mimo import MIMO
from ensdistill.networks import build_network
from ensdistill.packed import Packed
from ensdistill.stored_images import StoredImages
from ensdistill.student import Student

logger = logging.getLogger(__name__)

ROWS = 500
"""Rows of 32×32 pixels that `predict` gives a network at once."""


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

    Args:
        init, std: of r and s, as of `init_factors`.
    """

    FACTORS = ("r", "s")

    def __init__(
        self,
        architecture: Mapping[str, Any],
        members: int,
        init: Init = "normal",
        std: float = 0.5,
    ):
        super().__init__()
        self.network = self.build(architecture, members)
        self.members = members
        if (init, std) != ("normal", 0.5):  # which the layers have drawn
            for parameter in self._others_and_factors()[1]:
                init_factors(parameter, init, std)

    @staticmethod
    def build(architecture: Mapping[str, Any], members: int) -> nn.Module:
        return build_network(**architecture, ensemble_size=members)

    def check(self, x: Tensor) -> None:
        super().check(x)
        check_members(self.network, self.members, x)

    def member_logits(self, x: Tensor) -> Tensor:
        x = self.of_each(x)
        return self.network(x.flatten(0, 1)).unflatten(0, x.shape[:2])

    def parameter_groups(self, learning_rate: float, weight_decay: float) -> list[dict[str, Any]]:
        """The factors r and s learn at half the rate and without weight decay."""
        others, factors = self._others_and_factors()
        return [
            {"params": others, "lr": learning_rate, "weight_decay": weight_decay},
            {"params": factors, "lr": learning_rate / 2, "weight_decay": 0.0},
        ]

    def _others_and_factors(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        factors = {  # a dictionary, for its order
            parameter: None
            for module in self.modules()
            if isinstance(module, BatchEnsembleLayer | BatchEnsembleMap)
            for name, parameter in module.named_parameters(recurse=False)
            if name in self.FACTORS
        }
        return [it for it in self.parameters() if it not in factors], [*factors]


class LatentBatchEnsemble(BatchEnsemble):
    """A BatchEnsemble in training that predicts as one ordinary network [Nam et al. 2022].

    Its layers are those of latent_batch_ensemble.py; the ordinary network has their mean factors,
    and the batch normalisations of training. Statistics of its own change little while members are
    alike: on digits (ResNet-8, M = 4, rates 0.025 and 0.05, 12 students) they moved its accuracy by
    at most 0.4 points and its NLL by at most 0.008. At the rate 0.1 a member's factor of the only
    input channel changed its sign in two of four students: members stayed at 98 % accuracy, the
    ordinary network fell to 18 %, and statistics of its own would have given 98 %.
    """

    FACTORS = ("dr", "ds")

    def __init__(self, architecture: Mapping[str, Any], members: int):
        super().__init__(architecture, members)

    @staticmethod
    def build(architecture: Mapping[str, Any], members: int) -> nn.Module:
        return build_network(**architecture, layers=latent_layers(members))

    def parameter_groups(self, learning_rate: float, weight_decay: float) -> list[dict[str, Any]]:
        """Deviations δ of r and s from 1: M times the rate η, and weight decay λ/M.

        With v ← μv + g + (λ/M)δ and δ ← δ − Mη·v, u = Mv follows u ← μu + Mg + λδ and δ ← δ − η·u:
        SGD on M times the gradient of a loss with (λ/M)·‖δ‖²/2, as the authors' code has it.
        """
        others, deviations = self._others_and_factors()
        lr, decay = learning_rate * self.members, weight_decay / self.members
        return [
            {"params": others, "lr": learning_rate, "weight_decay": weight_decay},
            {"params": deviations, "lr": lr, "weight_decay": decay},
        ]

    def adaptive_groups(self, learning_rate: float, weight_decay: float) -> list[dict[str, Any]]:
        """Deviations as all others, with the rate η and weight decay λ.

        That M times the gradient makes M times the step is not so with Adam: m/√v is the same for
        g and Mg. So steps of the rate η are those by M times the gradient already. Decay that is
        decoupled, δ ← δ − η·λ'·δ, shrinks δ by ηλ a step, as SGD's Mη·(λ/M) does, if λ' = λ.
        """
        return super(BatchEnsemble, self).parameter_groups(learning_rate, weight_decay)

    def predictor(self) -> Student:
        """The ordinary network as it is now: a new `Single`."""
        merged = unfilled("single", self.spec["architecture"], members=1)
        merged.network.load_state_dict(merged_state(self.network), assign=True)
        return merged.to(memory_format=torch.channels_last)


STUDENTS: dict[str, type[Student]] = {
    "single": Single,
    "batch_ensemble": BatchEnsemble,
    "latent_batch_ensemble": LatentBatchEnsemble,
    "hydra": Hydra,
    "mimo": MIMO,
    "packed": Packed,
    "gaussian_logits": GaussianLogits,
    "flow_matching": FlowMatching,
}
"""By the names that config.yaml uses; their options and traits are in options.py."""


def build_student(
    name: str, architecture: Mapping[str, Any], members: int, **options: Any
) -> Student:
    """A student with newly drawn weights.

    Args:
        name: a key of `STUDENTS`.
        architecture: arguments of `build_network` but `ensemble_size`.
        members: M.
        **options: of this kind of student.

    Example:
        >>> resnet = {"name": "resnet8", "width": 4, "num_classes": 10, "in_channels": 1}
        >>> student = build_student("batch_ensemble", resnet, members=4)
        >>> student(torch.rand(2, 1, 8, 8)).shape
        torch.Size([4, 2, 10])
    """
    student = STUDENTS[name](architecture, members, **options)
    # Whoever builds it again has its weights.
    known = {key: value for key, value in architecture.items() if key != "pretrained"}
    student.spec = {"name": name, "architecture": known, "members": members, **options}
    return student


def unfilled(name: str, architecture: Mapping[str, Any], members: int, **options: Any) -> Student:
    """As `build_student`, but its tensors have no storage; no random number is drawn."""
    with torch.device("meta"), WithoutRandomNumbers():
        return build_student(name, architecture, members, **options)


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
    held_out: Tensor | None = None
    """Images (·, C, H, W) in [0, 1] that no network is trained on, where there are some."""
    decider: Callable[["Choice", "Step"], Any] | None = None
    """Who decides instead, or takes note; see step_graphs.py."""

    def decide(self, choice: "Choice") -> Any:
        """What the host must know in a step, such as which teacher is asked: choice(step).

        It depends on `host`, `progress` and the number of teachers alone, so that it can be known
        before the step is computed.
        """
        return choice(self) if self.decider is None else self.decider(choice, self)


Choice = Callable[[Step], Any]
"""One decision of the host; what it returns can be hashed."""


def any_teacher(step: Step) -> int:
    """The number of a teacher, drawn uniformly: a choice of the host."""
    return int(torch.randint(len(step.teachers), (), generator=step.host))


def teacher_logits(teachers: Sequence[nn.Module], x: Tensor) -> Tensor:
    """Logits of every teacher on the same images, (B, C, H, W) → (M, B, K), without gradients.

    Args:
        teachers: networks that map (B, C, H, W) to (B, K).
        x: images in [0, 1]; with (M, B, C, H, W) each teacher sees its own.

    Example:
        >>> teachers = [nn.Sequential(nn.Flatten(), nn.Linear(4, 3)) for _ in range(2)]
        >>> teacher_logits(teachers, torch.rand(5, 1, 2, 2)).shape
        torch.Size([2, 5, 3])
    """
    with torch.no_grad():
        own = x if x.ndim == 5 else [x] * len(teachers)
        calls = [partial(nn.Module.__call__, *it) for it in zip(teachers, own, strict=True)]
        logits = torch.stack(_beside(calls) if _is_captured(x) else [call() for call in calls])
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _is_captured(x: Tensor) -> bool:
    """Whether what is computed with x becomes part of a CUDA graph."""
    # Without a driver PyTorch cannot tell, and nothing can be captured.
    return x.is_cuda and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _beside(calls: Sequence[Callable[[], Tensor]]) -> list[Tensor]:
    """Results of calls on streams of their own, which may run at the same time, and are joined."""
    now, found = torch.cuda.current_stream(), []
    streams = [torch.cuda.Stream() for _ in calls]
    for stream, call in zip(streams, calls, strict=True):
        stream.wait_stream(now)
        with torch.cuda.stream(stream):
            found.append(call())
    for stream in streams:
        now.wait_stream(stream)
    return found


def predict(student: Student, images: Tensor | StoredImages) -> NDArray[np.float32]:
    """Logits of a student in eval mode (N, M, K); arguments and errors as of `predictions`.

    Example:
        >>> resnet = {"name": "resnet8", "width": 4, "num_classes": 10, "in_channels": 1}
        >>> student = build_student("single", resnet, members=1)
        >>> predict(student, torch.zeros(3, 1, 8, 8, dtype=torch.uint8)).shape
        (3, 1, 10)
    """
    return torch.cat(list(predictions(student, images))).cpu().numpy()


@torch.inference_mode()
def predictions(student: Student, images: Tensor | StoredImages) -> Iterator[Tensor]:
    """Logits of a student in eval mode, batch by batch; its mode is restored afterwards.

    As many images are taken at once as make `ROWS` rows, fewer where they are larger than 32×32,
    and where a GPU has no memory for so many half of them, down to one.

    Args:
        student: on the device of the images, or where they are to be brought.
        images: uint8 (N, C, H, W).

    Yields:
        (B, M, K) float32 on that device; M = 1 for a single network.

    Raises:
        InputError: images cannot be read; or the GPU has no memory for one of them.
    """
    training, device = student.training, next(student.parameters()).device
    student.eval()
    pixels = max(images.shape[2] * images.shape[3], 32 * 32)
    batch_size = max(1, ROWS * 32 * 32 // (student.rows * pixels))
    for batch in in_batches(images, batch_size, device):
        while len(batch):
            try:
                logits = student(batch[:batch_size].float() / 255)
            except torch.OutOfMemoryError as error:
                if batch_size == 1:
                    size = "×".join(map(str, batch.shape[1:]))
                    raise InputError(
                        f"the GPU has no memory left for an image of {size}"
                    ) from error
                batch_size //= 2
                logger.info("the GPU's memory is full: now %d images at once", batch_size)
                continue
            yield logits.transpose(0, 1).float()
            batch = batch[batch_size:]
    student.train(training)


def count_parameters(module: nn.Module) -> int:
    """The number of parameters; running statistics of batch normalisation are none.

    >>> count_parameters(nn.Linear(3, 2))
    8
    """
    return sum(parameter.numel() for parameter in module.parameters())
