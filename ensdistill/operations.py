"""Multiply–adds: of a prediction, and of a training.

Counted are those of convolutions and matrix products, in the numbers that are computed; elementwise
operations, averages and decompositions of matrices are not.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from ensdistill.batches import TrainingBatches
from ensdistill.layers import WithoutRandomNumbers
from ensdistill.learning import learning
from ensdistill.networks import build_network
from ensdistill.students import Step, Student

aten = torch.ops.aten

AS = {
    aten._scaled_dot_product_flash_attention_for_cpu: aten._scaled_dot_product_flash_attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        aten._scaled_dot_product_flash_attention_backward
    ),
}
"""Operations that PyTorch's formulas leave out, and what they cost as much as."""


class Operations(TorchDispatchMode):
    """Counts the multiply–adds of what is computed under it, of gradients too.

    PyTorch's own counter fails where gradients are taken within, and takes a grouped convolution's
    gradient of the weights for one without groups.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = function(*args, **(kwargs or {}))
        self.count += macs_of(function, args, kwargs or {}, out)
        return out


def macs_of(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> int:
    """Multiply–adds of one of PyTorch's operations, by what it got and returned."""
    kind = function._overloadpacket
    if kind is aten.convolution_backward:
        gradient, weight, asked = args[0], args[2], args[-1]
        # Each costs what the convolution itself does.
        return int((asked[0] + asked[1]) * gradient.numel() * weight[0].numel())
    formula = flop_registry.get(AS.get(kind, kind))
    return formula(*args, **kwargs, out_val=out) // 2 if formula else 0


@torch.no_grad()
def prediction_macs(form: nn.Module, x: Tensor) -> int:
    """Multiply–adds for an image: what the second of two adds to those of the first.

    What is computed once for a batch, such as the times' features of a flow, is left out.

    Args:
        form: (B, C, H, W) → anything.
        x: two images (2, C, H, W).
    """
    one, both = (_counted(partial(form, x[:size])) for size in (1, 2))
    return both - one


def pixel_macs(architecture: Mapping[str, Any], side: int) -> float:
    """Multiply–adds of a network's forward pass, divided by the pixels of the image.

    They are counted without numbers, on tensors that have no storage.

    Args:
        architecture: of `studies.Study.parts`; for colour images.
        side: of the image.
    """
    kept = {key: value for key, value in architecture.items() if key != "pretrained"}
    with torch.device("meta"), WithoutRandomNumbers():
        network = build_network(**kept, num_classes=10).eval()
        return prediction_macs(network, torch.empty(2, 3, side, side)) / side**2


def training_macs(
    student: Student,
    teachers: Sequence[nn.Module],
    parts: Mapping[str, Any],
    *,
    images: int,
    shape: Sequence[int],
    epochs: int,
    batch_size: int,
) -> int:
    """Multiply–adds of a whole training: of the student's passes, their gradients and the teachers.

    A step is counted with few images, as training computes it: its multiply–adds are a constant
    plus so many for each image. Where the first and the last of some epochs cost the same, those
    between them do. Images' augmentation, the optimiser's arithmetic and validation do not count.

    Args:
        student: newly built; it is changed.
        teachers: as `Step.teachers`.
        parts: of `studies.Study.parts`.
        images: that train.
        shape: of an image, (C, H, W).
        epochs, batch_size: of the recipe.
    """
    size = min(batch_size, images)

    @cache
    def of_step(epoch: int) -> int:
        progress = (epoch - 1) / epochs
        few, more = (
            _counted(_step(student, teachers, parts, shape, progress, count)) for count in (2, 4)
        )
        each = (more - few) // 2
        return few + (size - 2) * each

    def of_steps(first: int, last: int) -> int:
        """One step of each of these epochs."""
        if of_step(first) == of_step(last):
            return (last - first + 1) * of_step(first)
        middle = (first + last) // 2
        return of_steps(first, middle) + of_steps(middle + 1, last)

    return images // size * of_steps(1, epochs)


def _step(
    student: Student,
    teachers: Sequence[nn.Module],
    parts: Mapping[str, Any],
    shape: Sequence[int],
    progress: float,
    count: int,
) -> Callable[[], None]:
    """A step of training with so many images, but for the optimiser's."""
    device = next(student.parameters()).device
    generators = torch.Generator(device).manual_seed(0), torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (count, *shape), dtype=torch.uint8, device=device)
    batches = TrainingBatches(
        pixels, torch.zeros(count, dtype=torch.long, device=device), count, 0, flip=False
    )
    how = learning(
        teachers,
        parts["objective"],
        parts["perturbation"],
        single_pass=parts.get("single_pass", False),
        held_out=batches if "held_out" in parts else None,
    )
    student.train().set_progress(progress)
    x, y = next(batches.epoch(generators[0]))

    def step() -> None:
        how.parts(Step(student, teachers, x, y, progress, *generators))["loss"].backward()

    return step


def _counted(call: Callable[[], Any]) -> int:
    with Operations() as operations:
        call()
    return operations.count
