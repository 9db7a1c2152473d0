"""What networks cost to train and to ask: by real calls here, or counted for another device."""

import itertools
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar, cast
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily

from ensdistill import analysis
from ensdistill.batches import TrainingBatches, training_batches
from ensdistill.learning import check_first_step, new_optimizer, train_step
from ensdistill.networks import fold_batch_norms
from ensdistill.numerics import Precision, choose_precision
from ensdistill.planning.counting import (
    AllOperations,
    peak,
    tensors_of,
    total_bytes,
    without_numbers,
    zeros_of,
)
from ensdistill.recipes import Recipe
from ensdistill.students import Step, Student, predictions
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
Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True)
class Training:
    """What a training takes on its device."""

    start: float
    """Seconds before the second step: the gradients are checked, and libraries make kernels."""
    step: float
    """Seconds of a step, the mean over a training."""
    memory: float
    """Most bytes of tensors at a time, but for images that wait."""


NEIGHBOUR = """
import os, sys, torch
layer, x = torch.nn.Conv2d(16, 16, 3, padding=1), torch.rand(64, 16, 16, 16)
while os.getppid() == int(sys.argv[1]):  # also if that is killed
    layer(x).sum().backward()
"""


@contextmanager
def neighbours(count: int) -> Iterator[None]:
    """In which so many processes train, with as many threads as this one.

    Where a study runs, other jobs do: they share memory, caches and, by two threads, a core.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, "-c", NEIGHBOUR, str(os.getpid())]
    processes = [subprocess.Popen(command, env=environment) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


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
        if speed is not None:
            self.device = torch.device("cpu")
        torch.manual_seed(0)

    @contextmanager
    def arithmetic(self) -> Iterator[None]:
        """In which all calls belong: where operations are counted, tensors have no numbers."""
        if self.speed is not None:
            arrays = patch.object(FakeTensor, "numpy", zeros_of, create=True)
            with FakeTensorMode(allow_non_fake_inputs=True), arrays:
                yield
        else:
            yield

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
        processes: int = 1,
    ) -> Training:
        """Of a student or a teacher, on random images of random classes.

        Args:
            parts, recipe, augmentation, precision: as `training.train_student` takes them.
            teachers: the parts of those that are asked.
            backbone: of the student that it starts from.
            count: images that train.
            side: of training images that are larger than the others.
            processes: of which each takes its part of every batch; what they tell each other is
                not counted.
        """
        how = Recipe(**recipe)
        if self.speed is None:
            precision = choose_precision(precision, self.device)[0]
        else:  # changes of images are no products, and some look at numbers
            augmentation, side = {"crop_padding": 0, "flip": False}, None
        student, asked = self.student(parts), self.teachers(teachers)
        if backbone:
            student.start_from(self.student(backbone))
        optimizer = new_optimizer(student, how)
        for group in optimizer.param_groups:
            group["lr"] = 0.0  # random labels must not drive the weights away
        size = max(1, min(how.batch_size, count) // processes)
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

        first, each = 0.0, [self.seconds(partial(steps, at), size) for at in PROGRESS[::3]]
        if self.speed is None or each[0] != each[1]:
            each += [self.seconds(partial(steps, at), size) for at in PROGRESS[1:3]]
        if self.speed is None:
            images, labels = self.pixels(size), self._labels(size)
            learning = learning_of(asked, parts)
            if "held_out" not in parts:
                first = self._once(
                    lambda: check_first_step(
                        student, learning, (images, labels), how.batch_size, precision
                    )
                )
        kept = [*student.state_dict().values(), *tensors_of(optimizer.state)]
        kept += [it for network in asked for it in network.state_dict().values()]
        memory = total_bytes(kept) + self.memory(partial(steps, 0.0), size, kept)
        return Training(first, statistics.mean(each), memory)

    def prediction(self, parts: Parts, count: int) -> float:
        """Seconds for each of `count` images that a student predicts."""
        student = self.student(parts).predictor()
        return self.each(lambda n: lambda: [*predictions(student, self.pixels(n))], count)

    def student(self, parts: Parts) -> Student:
        """With new weights, and as on the device."""
        architecture = {k: v for k, v in parts["architecture"].items() if k != "pretrained"}
        with unset_fake_temporarily():
            made = new_student({**parts, "architecture": architecture}, self.images)
        return self._placed(made)

    def teachers(self, parts: Sequence[Parts]) -> list[nn.Module]:
        """As training asks them."""
        with unset_fake_temporarily():
            students = [self.student(it).eval().requires_grad_(False) for it in parts]
            folded = [fold_batch_norms(it.network) for it in students]
        return [*map(self._placed, folded)]

    def _placed(self, module: Module) -> Module:
        """On the device; or with tensors that have no numbers, while operations are counted."""
        if self.speed is None:
            return module.to(self.device)
        made: dict[int, Tensor] = {}
        for part in module.modules():
            for tensors in (part._parameters, part._buffers):
                for name, tensor in tensors.items():
                    if tensor is not None:
                        made.setdefault(id(tensor), without_numbers(tensor))
                        tensors[name] = cast(Any, made[id(tensor)])
        return module

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
        few, more = (peak(call(images), kept) for images in (FEW, MORE))
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
        with AllOperations() as operations:
            call()
        return operations.count


def _endless(batches: TrainingBatches, generator: torch.Generator) -> Iterator[tuple[Any, Any]]:
    return itertools.chain.from_iterable(batches.epoch(generator) for _ in itertools.repeat(None))
