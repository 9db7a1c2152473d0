"""Several processes that train one network together, each on a device of its own.

Each has all weights and computes an equal part of every batch. PyTorch's DistributedDataParallel
averages their gradients [Li et al. 2020, VLDB]. What depends on a whole batch is made as one
process makes it: random numbers are drawn for all of it, batch statistics are those of all its
rows. So they compute what one process would, but for rounding. Each draws for its part alone only
what comes from PyTorch's global generator: dropout, and the order of images in MIMO.

A process that has joined no others is alone, and everything here then leaves it as it is.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import TorchFunctionMode

from ensdistill import InputError

T = TypeVar("T")

PATIENCE = timedelta(hours=1)
"""How long processes wait for each other, as for the first one's validation. Where one has ended,
those that wait are ended by what started them."""


@dataclass(frozen=True)
class Place:
    """Which of how many processes this is."""

    rank: int = 0
    count: int = 1


_places = [Place()]


def place() -> Place:
    """Of this process; alone unless it has joined others."""
    return _places[-1]


def join(device: torch.device) -> None:
    """Meet the other processes that torchrun has started.

    Args:
        device: what this one computes on.
    """
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    distributed.init_process_group(backend, timeout=PATIENCE)
    _places.append(Place(distributed.get_rank(), distributed.get_world_size()))


def leave() -> None:
    """Be alone again."""
    distributed.destroy_process_group()
    _places.pop()


@contextmanager
def alone() -> Iterator[None]:
    """Compute something as if there were no others."""
    _places.append(Place())
    try:
        yield
    finally:
        _places.pop()


def own(batch: slice) -> slice:
    """This process's part of the places of a batch.

    Raises:
        InputError: the batch has no equal parts.
    """
    rank, count, size = place().rank, place().count, batch.stop - batch.start
    if size % count:
        raise InputError(
            f"{size} images of a batch cannot be shared out equally among {count} devices: set "
            f"batch_size to a multiple of gpus_per_job ({count})"
        )
    size //= count
    return slice(batch.start + rank * size, batch.start + (rank + 1) * size)


def part_of(count: int) -> slice:
    """This process's part of so many rows; errors as of `own`."""
    return own(slice(0, count))


def drawn(like: Tensor, fill: Callable[[Tensor], Tensor]) -> Tensor:
    """Random numbers for the images of this process: its part of what one process would draw.

    Args:
        like: of the shape, layout and type wanted; one row for each image.
        fill: draws a tensor in place.
    """
    if place().count == 1:
        return fill(torch.empty_like(like))
    rows = len(like) * place().count
    whole = fill(like.new_empty_strided((rows, *like.shape[1:]), like.stride()))
    return whole[part_of(rows)]


def gathered(part: Tensor) -> Tensor:
    """The whole of which every process has such a part, in the order of the processes."""
    if place().count == 1:
        return part
    parts = [torch.empty_like(part) for _ in range(place().count)]
    distributed.all_gather(parts, part)
    return torch.cat(parts)


def summed(part: Tensor) -> Tensor:
    """The sum over the processes, without gradients."""
    if place().count == 1:
        return part
    total = part.detach().clone()
    distributed.all_reduce(total)
    return total


def averaged(part: Tensor) -> Tensor:
    """The mean over the processes, without gradients."""
    return part if place().count == 1 else summed(part) / place().count


def averaged_parts(parts: dict[str, Tensor]) -> dict[str, Tensor]:
    """The loss of a step and its parts, which are scalars: means over the processes."""
    if place().count == 1:
        return parts
    means = averaged(torch.stack([part.double() for part in parts.values()]))
    return {name: mean.to(part) for (name, part), mean in zip(parts.items(), means, strict=True)}


def agreed(number: int) -> int:
    """The largest of what the processes say; all of them wait for it, on the host."""
    if place().count == 1:
        return number
    largest = torch.tensor(number)
    distributed.all_reduce(largest, distributed.ReduceOp.MAX)
    return int(largest)


def in_turn(action: Callable[[], T]) -> T:
    """Let the first process do something before the others do it."""
    if place().rank:
        agreed(0)
    done = action()
    if not place().rank:
        agreed(0)
    return done


def is_first() -> bool:
    """Whether this process validates, and writes what all have made."""
    return place().rank == 0


def parallel(
    student: nn.Module, objective: Callable[[Any, Tensor], dict[str, Tensor]]
) -> Callable[[Any, Tensor], dict[str, Tensor]]:
    """An objective whose gradients and batch statistics are those of all processes' images.

    Args:
        student: whose gradients they are; the same in all processes.
        objective: of this process's part of a batch.
    """
    if place().count == 1:
        return objective
    # Some students have parameters that learn in some epochs only.
    return DistributedDataParallel(_Objective(student, objective), find_unused_parameters=True)


class _Objective(nn.Module):
    """As DistributedDataParallel takes it, which shall not see the student's buffers.

    It would broadcast them in each pass; but all processes compute the same ones.
    """

    def __init__(self, student: nn.Module, objective: Callable[[Any, Tensor], dict[str, Tensor]]):
        super().__init__()
        self.learnt = nn.ParameterList(student.parameters())
        self.objective = objective

    def forward(self, step: Any, x_distill: Tensor) -> dict[str, Tensor]:
        with _Synchronised():
            return self.objective(step, x_distill)


class _Synchronised(TorchFunctionMode):
    """Every batch normalisation inside, whosever module it is of, has the whole batch's statistics.

    PyTorch's SyncBatchNorm is for GPUs alone, and takes the place of modules, also of those that do
    more than normalise (timm's have their activation inside).
    """

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        return (batch_norm if function is F.batch_norm else function)(*args, **kwargs)


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """`torch.nn.functional.batch_norm` of the rows of all processes together.

    Mean and variance are those of all n rows and pixels of the processes, which have equally many;
    the running variance is updated with n/(n − 1) of it, as ever.
    """
    if not training:
        return F.batch_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)
    mean, var = _statistics(input)
    if running_mean is not None and running_var is not None:
        count = input.numel() // input.shape[1] * place().count
        with torch.no_grad():
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            running_var.lerp_(var.mul(count / (count - 1)).to(running_var.dtype), momentum)
    tracked = _ThroughStatistics.apply(input, mean, var, eps)
    return F.batch_norm(tracked, mean, var, weight, bias, False, 0.0, eps)


def _dims(x: Tensor) -> list[int]:
    """All but the channels."""
    return [0, *range(2, x.ndim)]


def _float(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


@torch.no_grad()
def _statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel, from those of the processes."""
    var, mean = torch.var_mean(_float(x), _dims(x), correction=0)
    means, variances = gathered(torch.stack([mean, var])[None]).unbind(1)
    mean = means.mean(0)
    return mean, (variances + (means - mean).square()).mean(0)


class _ThroughStatistics(torch.autograd.Function):
    """x as it is; its gradient g, taken with fixed statistics, becomes that through them too.

    g − mean(g) − x̂·mean(g·x̂), with x̂ the normalised x and means over the rows and pixels of all
    processes [Ioffe & Szegedy 2015]. The loss is the mean of the processes' losses, and each
    process's gradient is that of its own: so the mean over all is what their sum needs.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, mean: Tensor, var: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, mean, var)
        ctx.eps = eps
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        x, mean, var = ctx.saved_tensors
        shape = [1, -1, *[1] * (x.ndim - 2)]
        normed = (_float(x) - mean.view(shape)) * (var + ctx.eps).rsqrt().view(shape)
        g, dims = _float(gradient), _dims(x)
        sums = summed(torch.stack([g.sum(dims), (g * normed).sum(dims)]))
        of_g, of_product = sums / (x.numel() // x.shape[1] * place().count)
        through = g - of_g.view(shape) - normed * of_product.view(shape)
        return through.to(gradient.dtype), None, None, None
