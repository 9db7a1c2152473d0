"""What networks cost to train and to ask: by real calls here, or counted for another device."""

import itertools
import statistics
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from ensdistill import analysis
from ensdistill.batches import TrainingBatches, training_batches
from ensdistill.learning import check_first_step, new_optimizer, train_step
from ensdistill.networks import fold_batch_norms
from ensdistill.numerics import Precision, choose_precision
from ensdistill.operations import Operations
from ensdistill.recipes import Recipe
from ensdistill.students import Step, Student, predict
from ensdistill.training import learning_of, new_student

Call = Callable[[], Any]

PROGRESS = (0.0, 0.25, 0.5, 0.75)
"""Shares of a training at which its steps are timed: some methods change on the way."""
LEAST, SPENT, LONG = 3, 0.2, 2.0
"""A call is timed so often at least, and for so many seconds; but once if it takes so long."""
FEW, MORE = 2, 4
"""Images of the calls whose operations and memory are counted; what more of them need is linear."""
MOST_PIXELS = 2**25
"""Bytes of the synthetic images of a training."""

Parts = Mapping[str, Any]


@dataclass(frozen=True)
class Training:
    """What a training takes on its device."""

    start: float
    """Seconds before the second step: the gradients are checked, and libraries make kernels."""
    step: float
    """Seconds of a step, the mean over a training."""
    memory: float
    """Most bytes of tensors at a time, but for images that wait."""


class Meter:
    """Finds out what calls take, on the images of one study.

    Args:
        images: as `read_description` returns.
        device: where calls are timed.
        speed: additions and multiplications per second that another device reaches; nothing is
            timed then, operations are counted. None to time calls here.
    """

    def __init__(self, images: Mapping[str, Any], device: torch.device, speed: float | None):
        self.images, self.device, self.speed = images, device, speed
        torch.manual_seed(0)

    def training(
        self,
        parts: Parts,
        recipe: Mapping[str, Any],
        augmentation: Mapping[str, Any],
        precision: Precision,
        *,
        teachers: Sequence[Parts],
        backbone: Parts | None,
        count: int,
        side: int | None,
    ) -> Training:
        """Of a student or a teacher, on random images of random classes.

        Args:
            parts, recipe, augmentation, precision: as `training.train_student` takes them.
            teachers: the parts of those that are asked.
            backbone: of the student that it starts from.
            count: images that train.
            side: of training images that are larger than the others.
        """
        how, precision = Recipe(**recipe), choose_precision(precision, self.device)[0]
        student, asked = self.student(parts), self.teachers(teachers)
        if backbone:
            student.start_from(self.student(backbone))
        optimizer = new_optimizer(student, how)
        for group in optimizer.param_groups:
            group["lr"] = 0.0  # random labels must not drive the weights away
        size = min(how.batch_size, count)
        generators = torch.Generator(self.device).manual_seed(0), torch.Generator().manual_seed(0)

        def steps(progress: float, images: int) -> Call:
            batches = self._batches(images, count, augmentation, side)
            learning = learning_of(asked, parts, batches if "held_out" in parts else None)
            feed = _endless(batches, generators[0])
            student.train().set_progress(progress)

            def step() -> None:
                at = Step(student, asked, *next(feed), progress, *generators)
                train_step(at, learning, optimizer, precision, how.clip_norm)

            return step

        first, each = 0.0, []
        for progress in PROGRESS:
            each.append(self.seconds(partial(steps, progress), size))
        if self.speed is None:
            images, labels = self.pixels(size), self._labels(size)
            learning = learning_of(asked, parts)
            if "held_out" not in parts:
                first = self._once(
                    lambda: check_first_step(
                        student, learning, (images, labels), how.batch_size, precision
                    )
                )
        kept = [*student.state_dict().values(), *_tensors(optimizer.state)]
        kept += [it for network in asked for it in network.state_dict().values()]
        memory = _bytes(kept) + self.memory(partial(steps, 0.0), size, kept)
        return Training(first, statistics.mean(each), memory)

    def prediction(self, parts: Parts, count: int) -> float:
        """Seconds for each of `count` images that a student predicts."""
        student = self.student(parts).predictor()
        return self.each(lambda images: lambda: predict(student, self.pixels(images)), count)

    def student(self, parts: Parts) -> Student:
        """With new weights, and as on the device."""
        architecture = {k: v for k, v in parts["architecture"].items() if k != "pretrained"}
        return new_student({**parts, "architecture": architecture}, self.images).to(self.device)

    def teachers(self, parts: Sequence[Parts]) -> list[nn.Module]:
        """As training asks them."""
        students = [self.student(it).eval().requires_grad_(False) for it in parts]
        return [fold_batch_norms(it.network) for it in students]

    def jacobians(self, parts: Parts, teachers: int, count: int) -> float:
        """Seconds that the Jacobians of a network at `count` images take, chunk by chunk."""
        student = self.student(parts).eval().requires_grad_(False)
        mean, classes = student.members not in (1, teachers), len(self.images["classes"])
        elements = analysis.JACOBIAN_ELEMENTS
        of_class = teachers * self.pixels(1).numel()
        chunk = min(classes, max(1, elements // of_class))
        size = min(count, max(1, elements // (classes * of_class)))
        times = -(-count // size) * (classes / chunk)
        x = self.pixels(max(size, MORE)).float() / 255
        some = slice(0, chunk)

        def call(images: int) -> Call:
            return lambda: analysis.logit_jacobians(student, x[:images], mean=mean, classes=some)

        if self.speed is not None and size < FEW:  # one image at a time
            return times * self._counted(call(1)) * 2 / self.speed
        return times * self.seconds(call, size)

    def each(self, call: Callable[[int], Call], most: int) -> float:
        """Seconds for each image of a call of many, `most` at once."""
        few = min(MORE, most)
        seconds = self.seconds(call, few)
        if self.speed is None and few < most:
            few = int(min(most, 256, max(few, few * SPENT / seconds)))
            seconds = self.seconds(call, few)
        return seconds / few

    def seconds(self, call: Callable[[int], Call], count: int) -> float:
        """Of `call(count)()`, a call with so many images."""
        if self.speed is None:
            return self._timed(call(count))
        few, more = (self._counted(call(images)) for images in (FEW, MORE))
        macs = few + (count - FEW) * (more - few) / (MORE - FEW)
        return 2 * macs / self.speed

    def memory(self, call: Callable[[int], Call], count: int, kept: Sequence[Tensor] = ()) -> float:
        """Most bytes of tensors at a time that `call(count)()` makes."""
        few, more = (_peak(call(images), kept) for images in (FEW, MORE))
        return few + (count - FEW) * (more - few) / (MORE - FEW)

    def pixels(self, count: int, side: int | None = None) -> Tensor:
        """Random images uint8 (N, C, H, W)."""
        channels, height, width = self.images["shape"]
        shape = (count, channels, side or height, side or width)
        return torch.randint(256, shape, dtype=torch.uint8, device=self.device)

    def _labels(self, count: int) -> Tensor:
        return torch.randint(len(self.images["classes"]), (count,), device=self.device)

    def _batches(
        self, size: int, count: int, augmentation: Mapping[str, Any], side: int | None
    ) -> TrainingBatches:
        count = max(size, min(count, MOST_PIXELS // self.pixels(1, side).numel()))
        pair = self.pixels(count, side), self._labels(count)
        return training_batches(*pair, size, size=self.images["shape"][1:], **augmentation)

    def _timed(self, call: Call) -> float:
        """The median of several calls after the first."""
        if (first := self._once(call)) > LONG:
            return min(first, self._once(call))
        found: list[float] = []
        while len(found) < LEAST or sum(found) < SPENT:
            found.append(self._once(call))
        return statistics.median(found)

    def _once(self, call: Call) -> float:
        """Seconds; on one thread of a CPU those that it computed, whatever else runs there."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        elif torch.get_num_threads() == 1:
            before = time.process_time()
            call()
            return time.process_time() - before
        before = time.perf_counter()
        call()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - before

    def _counted(self, call: Call) -> int:
        with _Operations() as operations:
            call()
        return operations.count


class _Operations(Operations):
    """Counts under `torch.inference_mode` too, where operations come whole."""

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function._overloadpacket not in flop_registry:
            with self:
                out = function.decompose(*args, **(kwargs or {}))
            if out is not NotImplemented:
                return out
        return super().__torch_dispatch__(function, types, args, kwargs)


def _endless(batches: TrainingBatches, generator: torch.Generator) -> Iterator[tuple[Any, Any]]:
    return itertools.chain.from_iterable(batches.epoch(generator) for _ in itertools.repeat(None))


def _tensors(tree: Any) -> list[Tensor]:
    return [it for it in tree_leaves(dict(tree)) if isinstance(it, Tensor)]


def state_bytes(module: nn.Module) -> int:
    """Of parameters and buffers."""
    return _bytes([*module.state_dict().values()])


def _bytes(tensors: Sequence[Tensor]) -> int:
    storages = [it.untyped_storage() for it in tensors]
    return sum({it._cdata: it.nbytes() for it in storages}.values())


def _peak(call: Call, kept: Sequence[Tensor]) -> int:
    """The most bytes of tensors that there were at a time during a call, but for those kept."""
    call()
    with _Living(kept) as living:
        call()
    return living.peak


class _Living(TorchDispatchMode):
    """Counts the bytes of all tensors that are made under it, until they are gone."""

    def __init__(self, kept: Sequence[Tensor]):
        super().__init__()
        self.known = {it.untyped_storage()._cdata for it in kept}
        self.now = self.peak = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.known.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size
