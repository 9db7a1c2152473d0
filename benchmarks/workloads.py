"""What is timed: the same networks, weights and images, ours and the plain implementation's."""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import plain
from ensdistill.architectures import parse_architecture
from ensdistill.batches import TrainingBatches
from ensdistill.learning import learning, train_step
from ensdistill.networks import fold_batch_norms
from ensdistill.objectives import member_cross_entropy
from ensdistill.students import Step, Student, build_student

MEMBERS = 4
RECIPE = {"learning_rate": 0.01, "momentum": 0.9, "weight_decay": 5e-4}
DISTILLATION = {"alpha": 0.9, "temperature": 4.0, "eta": 1 / 255}
CONF_ODS = {
    "objective": {"name": "one_to_one", "alpha": 0.9, "temperature": 4.0},
    "perturbation": {"name": "conf_ods", "eta": 1 / 255, "temperature": 4.0},
}
FROM_LABELS = {"objective": {"name": "labels"}, "perturbation": {"name": "none"}}

CPU_THREADS = len(os.sched_getaffinity(0))

Call = Callable[[], Any]


@dataclass(frozen=True)
class Shape:
    """What is trained on what."""

    architecture: str
    side: int
    channels: int = 3
    classes: int = 10
    images: int = 64
    """In a student's batch."""
    teacher_images: int = 256
    crop_padding: int = 4
    flip: bool = True
    rounds: int = 12
    threads: int = CPU_THREADS

    def __str__(self) -> str:
        return f"{self.of_rows(self.images)}, M = {MEMBERS}"

    def of_teacher(self) -> str:
        return self.of_rows(self.teacher_images)

    def of_rows(self, count: int) -> str:
        one = ", 1 thread" if self.threads < CPU_THREADS else ""
        return f"{self.architecture}, {count} images of {self.side}×{self.side}{one}"


def shapes(device: torch.device) -> dict[str, Shape]:
    """The networks of the paper, a quarter of the largest on a CPU; of the default study; calls."""
    part, alone = (1, CPU_THREADS) if device.type == "cuda" else (4, 1)
    return {
        "resnet32": Shape("resnet32", 32),
        "wrn28x10": Shape(
            "wrn28x10", 32, classes=100, images=64 // part, teacher_images=256 // part, rounds=2
        ),
        # Where weights count, not activations.
        "wrn28x10_4": Shape("wrn28x10", 32, classes=100, images=4, teacher_images=4, rounds=2),
        "digits": Shape(  # as its jobs compute it
            "resnet8",
            8,
            channels=1,
            teacher_images=64,
            crop_padding=1,
            flip=False,
            rounds=50,
            threads=alone,
        ),
        # Next to no arithmetic: what calling the operations costs. On a GPU, which computes while
        # the next ones are called, no step takes less.
        "calls": Shape("resnet32", 4, images=2, teacher_images=2, rounds=50, threads=alone),
    }


@contextmanager
def threads(count: int) -> Iterator[None]:
    """So many on the CPU, for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    yield
    torch.set_num_threads(before)


def sgd(student: Student) -> torch.optim.SGD:
    """The optimiser that `training.fit` makes."""
    groups = student.parameter_groups(RECIPE["learning_rate"], RECIPE["weight_decay"])
    return torch.optim.SGD(groups, momentum=RECIPE["momentum"], fused=True)


class Workload:
    """The same networks and images for ours and for the plain implementation."""

    def __init__(self, shape: Shape, device: torch.device):
        self.shape, self.device = shape, device
        rng = np.random.default_rng(0)
        size = (2000, shape.side, shape.side, shape.channels)
        self.pixels = rng.integers(0, 256, size, dtype=np.uint8)
        self.classes = rng.integers(0, shape.classes, len(self.pixels))
        self.generator = torch.Generator(device).manual_seed(0)
        self.host = torch.Generator().manual_seed(0)
        torch.manual_seed(0)

    def build(self, name: str, members: int = MEMBERS, **options: Any) -> Student:
        architecture = {
            "name": self.shape.architecture,
            "width": 16,
            "num_classes": self.shape.classes,
            "in_channels": self.shape.channels,
        }
        student = build_student(name, architecture, members, **options)
        return student.to(self.device)

    def twin(self, student: Student) -> nn.Module:
        """The plain implementation, with the same weights."""
        shape = self.shape
        sizes = parse_architecture(shape.architecture)[1]
        other = plain.Network(
            sizes["depth"], shape.classes, shape.channels, student.members, sizes.get("widen")
        )
        other.load_state_dict(student.network.state_dict())
        return other.to(self.device)

    @cached_property
    def networks(self) -> dict[str, Any]:
        """Students and networks of either implementation, teachers with fitting statistics."""
        teachers = [self.build("single") for _ in range(MEMBERS)]
        x, _ = next(self.batches(self.shape.teacher_images))
        for teacher in teachers:
            for norm in (m for m in teacher.modules() if isinstance(m, nn.BatchNorm2d)):
                norm.momentum = 1.0
            with torch.no_grad():
                teacher(x)
        student, single = self.build("batch_ensemble"), self.build("single")
        plain_teachers = [self.twin(teacher).eval() for teacher in teachers]
        return {
            "batch_ensemble": student,
            "single": single,
            "plain_student": self.twin(student),
            "plain_single": self.twin(single),
            "plain_teachers": plain_teachers,
            "teachers": [
                fold_batch_norms(it.eval().requires_grad_(False).network) for it in teachers
            ],
        }

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Ours, without end."""
        images = torch.from_numpy(self.pixels).permute(0, 3, 1, 2).to(self.device)
        labels = torch.from_numpy(self.classes).to(self.device)
        batches = TrainingBatches(images, labels, size, self.shape.crop_padding, self.shape.flip)
        while True:
            yield from batches.epoch(self.generator)

    def plain_batches(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        shape = self.shape
        for x, y in plain.batches(self.pixels, self.classes, size, shape.crop_padding, shape.flip):
            yield x.to(self.device), y.to(self.device)

    def at(self, student: Student, x: Tensor, y: Tensor) -> Step:
        """A step of training at these images."""
        teachers = self.networks["teachers"]
        return Step(student, teachers, x, y, 0.0, self.generator, self.host)

    def step(
        self,
        precision: str,
        *,
        teacher: bool = False,
        student: str = "batch_ensemble",
        objective: Mapping[str, Any] = FROM_LABELS["objective"],
        perturbation: Mapping[str, Any] = FROM_LABELS["perturbation"],
    ) -> Call:
        """A whole training step of ours: of a teacher, or of a student by a method."""
        trained = self.networks["single" if teacher else student].train()
        how = learning(self.networks["teachers"], objective, perturbation)
        optimizer = sgd(trained)
        batches = self.batches(self.shape.teacher_images if teacher else self.shape.images)

        def step() -> None:
            train_step(self.at(trained, *next(batches)), how, optimizer, precision)

        return step

    def step_of_method(self, parts: Mapping[str, Any]) -> Call:
        """A whole training step in float32 of any method, in the second half of its training.

        Args:
            parts: of `studies.Study.parts`.
        """
        student = self.build(**parts["student"], members=parts["members"])
        if "backbone" in parts:
            student.start_from(self.networks["single"])
        student.train().set_progress(0.5)
        optimizer, batches = sgd(student), self.batches(self.shape.images)
        how = learning(
            self.networks["teachers"],
            parts["objective"],
            parts["perturbation"],
            single_pass=parts.get("single_pass", False),
        )

        def step() -> None:
            others, _ = next(batches)
            at = self.at(student, *next(batches))
            train_step(replace(at, progress=0.5, held_out=others), how, optimizer, "fp32", 1.0)

        return step

    def plain_step(self, precision: str = "fp32", *, teacher: bool = False) -> Call:
        """A whole training step of the plain implementation; a student's is one by ConfODS."""
        network = self.networks["plain_single" if teacher else "plain_student"].train()
        teachers = self.networks["plain_teachers"]
        optimizer = torch.optim.SGD(network.parameters(), RECIPE["learning_rate"], momentum=0.9)
        batches = self.plain_batches(self.shape.teacher_images if teacher else self.shape.images)

        def step() -> None:
            x, y = next(batches)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=precision == "bf16"):
                if teacher:
                    logits = network(x)
                    loss = F.cross_entropy(logits, y)
                else:
                    source = int(torch.randint(len(teachers), ()))
                    w = torch.empty(len(x), self.shape.classes, device=x.device).uniform_(-1, 1)
                    loss, logits = plain.student_loss(
                        network, teachers, source, w, x, y, **DISTILLATION
                    )
            plain.train_step(loss, logits, y, optimizer)

        return step

    def both_passes(self, student: str, images: int, precision: str) -> Call:
        """Forward and backward through one of the students, images at hand."""
        module = self.networks[student].train()
        x, y = next(self.batches(images))

        def both() -> None:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=precision == "bf16"):
                loss = member_cross_entropy(module(x), y)
            loss.backward()
            module.zero_grad()

        return both
