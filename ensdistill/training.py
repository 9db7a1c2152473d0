"""The training loop of teachers and students."""

import copy
import logging
import math
import os
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch
from torch import Tensor, nn
from tqdm import tqdm

from ensdistill import InputError
from ensdistill.batches import TrainingBatches
from ensdistill.digests import attributes
from ensdistill.files import write_csv
from ensdistill.images import read_description, read_images
from ensdistill.jobs import Interrupted, deferred_interrupts
from ensdistill.metrics import accuracy, ensemble_probs, nll
from ensdistill.networks import fold_batch_norms
from ensdistill.objectives import OBJECTIVES, Parts
from ensdistill.perturbations import PERTURBATIONS
from ensdistill.state import TrainingState
from ensdistill.students import Step, Student, build_student, count_parameters, predict
from ensdistill.weights import load_student, read_header, save_student

logger = logging.getLogger(__name__)

SMALLEST_FACTOR = 0.01
"""Of the learning rate: at the first epoch, and at the end of `warmup_linear`."""

SAVE_EVERY = 120
"""Seconds after which the state is saved within an epoch: the most that a kill can cost."""

Schedule = Literal["warmup_linear", "cosine"]
Precision = Literal["fp32", "bf16"]


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


@dataclass(frozen=True)
class Learning:
    """How a student learns: from whom, what, and where the teachers are asked."""

    teachers: Sequence[nn.Module]
    """As `Step.teachers`."""
    objective: Callable[[Step, Tensor], Parts]
    """An entry of `OBJECTIVES` with its options."""
    perturbation: Callable[[Step], Tensor]
    """An entry of `PERTURBATIONS` with its options."""


def learning(
    teachers: Sequence[nn.Module],
    objective: Mapping[str, Any],
    perturbation: Mapping[str, Any],
) -> Learning:
    """A method's objective and perturbation, each given by its name and its options."""
    entries = []
    for registry, chosen in ((OBJECTIVES, objective), (PERTURBATIONS, perturbation)):
        options = dict(chosen)
        entries.append(partial(registry[options.pop("name")], **options))
    return Learning(teachers, *entries)


def train_step(
    step: Step, learning: Learning, optimizer: torch.optim.Optimizer, precision: Precision
) -> Parts:
    """One update of a student in training mode.

    Args:
        step: the student, its images and their labels.
        learning, precision: as in `fit`.
        optimizer: of the student's parameters.

    Returns:
        What the history keeps, still on the device: the loss and its parts, and the accuracy [%].
    """
    with torch.autocast(step.x.device.type, torch.bfloat16, enabled=precision == "bf16"):
        parts = learning.objective(step, learning.perturbation(step))
    optimizer.zero_grad()
    parts["loss"].backward()
    optimizer.step()
    return {name: value.detach() for name, value in parts.items()}


def is_validated(epoch: int, epochs: int, validate_every: int) -> bool:
    """Every so many epochs, and in each of the last tenth."""
    return epoch % validate_every == 0 or epoch > 0.9 * epochs


def fit(
    student: Student,
    learning: Learning,
    train: tuple[Tensor, Tensor],
    validation: tuple[Tensor, Tensor],
    *,
    seed: int,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    momentum: float,
    weight_decay: float,
    schedule: Schedule,
    warmup_epochs: int,
    validate_every: int,
    crop_padding: int,
    flip: bool,
    precision: Precision,
    state: TrainingState | None = None,
) -> list[dict[str, float]]:
    """Train a student in place with SGD; it ends with the weights of its best validation.

    Of epochs with equal validation accuracy the latest is kept: it has trained longest.

    With a state, training goes on from where that was saved, and ends, on a CPU, with the same
    bits as if it had never stopped. It is saved after every epoch, every `SAVE_EVERY` seconds, and
    after the step during which SIGTERM or SIGINT came.

    Args:
        student: to be trained, on the device of the images.
        learning: from whom, what, and where the teachers are asked.
        train, validation: images uint8 (N, C, H, W) and labels int64 (N,).
        seed: of data order, augmentation and perturbations.
        crop_padding, flip: see `TrainingBatches`.
        precision: float32, or bfloat16 autocast of both passes.
        epochs, batch_size, learning_rate, momentum, weight_decay, schedule, warmup_epochs,
            validate_every: see `studies.Recipe`.
        state: what to go on from, and where to save; None to begin anew and save nothing.

    Returns:
        One row per epoch: learning rate, mean loss and its parts, accuracy on the training
        batches [%], seconds, and where validated val_accuracy [%] and val_nll [nats].

    Raises:
        InputError: the loss is not finite; the message names step and learning rate.
        Interrupted: SIGTERM or SIGINT came.
    """
    images, labels = train
    device = images.device
    generator = torch.Generator(device).manual_seed(seed)
    batches = TrainingBatches(images, labels, batch_size, crop_padding, flip, generator)
    host = torch.Generator().manual_seed(seed)
    members = student.members
    logger.info(
        "%d images, %d steps per epoch; effective batch size: %d images × %d members = %d rows",
        len(images),
        len(batches),
        batches.batch_size,
        members,
        batches.batch_size * members,
    )
    optimizer = torch.optim.SGD(
        student.parameter_groups(learning_rate, weight_decay), momentum=momentum, fused=True
    )
    peaks = [group["lr"] for group in optimizer.param_groups]
    history: list[dict[str, float]] = []
    best: dict[str, Any] = {"accuracy": -1.0, "student": {}}
    first, begun = 1, {}
    if state and (saved := state.load()):
        student.load_state_dict(saved["student"])
        optimizer.load_state_dict(saved["optimizer"])
        generator.set_state(saved["generator"])
        torch.set_rng_state(saved["rng"][0])
        torch.cuda.set_rng_state_all(saved["rng"][1:])
        history, best, first, begun = (saved[key] for key in ("history", "best", "epoch", "begun"))
        done = len(begun["columns"]["loss"]) if begun else 0
        logger.info("going on from epoch %d, after %d of its steps", first, done)

    def save(epoch: int, **begun: Any) -> None:
        """Keep all that the rest of the training depends on."""
        if state:
            state.save(
                {
                    "student": student.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "generator": generator.get_state(),
                    "rng": [torch.get_rng_state(), *torch.cuda.get_rng_state_all()],
                    "history": history,
                    "best": best,
                    "epoch": epoch,
                    "begun": begun,
                }
            )

    with deferred_interrupts() as interrupted:
        # disable=None: a bar on a terminal, plain lines in a log.
        for epoch in tqdm(range(first, epochs + 1), unit="epoch", leave=False, disable=None):
            started = saved_at = time.perf_counter()
            factor = learning_rate_factor(epoch, epochs, schedule, warmup_epochs)
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = factor * peak
            student.train()
            columns = defaultdict(list)
            if begun:  # Left in its middle: draw its batches again, and go on after the last.
                for name, values in begun["columns"].items():
                    columns[name] = list(values.to(device))
                now, drawn_from = generator.get_state(), begun["drawn_from"]
                generator.set_state(drawn_from)
                remaining = batches.epoch(len(columns["loss"]))
                generator.set_state(now)
                started -= begun["seconds"]
                begun = {}
            else:
                drawn_from = generator.get_state()
                remaining = batches.epoch()
            for x, y in remaining:
                step = Step(student, learning.teachers, x, y, (epoch - 1) / epochs, generator, host)
                measured = train_step(step, learning, optimizer, precision)
                for name, value in measured.items():
                    columns[name].append(value)
                signal = interrupted()
                if signal or time.perf_counter() - saved_at > SAVE_EVERY:
                    save(
                        epoch,
                        drawn_from=drawn_from,
                        columns={name: torch.stack(values) for name, values in columns.items()},
                        seconds=time.perf_counter() - started,
                    )
                    saved_at = time.perf_counter()
                if signal:
                    goes_on = "; a rerun goes on from there" if state else ""
                    raise Interrupted(signal, f"in epoch {epoch}{goes_on}")
            # Looked at once per epoch, so that a GPU is never made to wait.
            stacked = {name: torch.stack(values).cpu() for name, values in columns.items()}
            finite = stacked["loss"].isfinite()
            if not finite.all():
                step = (epoch - 1) * len(batches) + int((~finite).nonzero()[0]) + 1
                raise InputError(
                    f"the loss is not finite at step {step} (epoch {epoch}) with learning rate "
                    f"{factor * peaks[0]:g}: try a smaller one"
                )
            row = {"epoch": epoch, "learning_rate": factor * peaks[0]}
            row |= {name: column.double().mean().item() for name, column in stacked.items()}
            if is_validated(epoch, epochs, validate_every):
                probs = ensemble_probs(predict(student, validation[0]))
                row["val_accuracy"] = accuracy(probs, validation[1].cpu())
                row["val_nll"] = nll(probs, validation[1].cpu())
                if row["val_accuracy"] >= best["accuracy"]:
                    best["accuracy"] = row["val_accuracy"]
                    best["student"] = copy.deepcopy(student.state_dict())
            row["seconds"] = time.perf_counter() - started
            history.append(row)
            save(epoch + 1)
            logger.info(" ".join(f"{name} {value:.5g}" for name, value in row.items()))
    student.load_state_dict(best["student"])
    return history


def train_student(
    images: str | os.PathLike[str],
    weights: str | os.PathLike[str],
    history: str | os.PathLike[str],
    *,
    teachers: Sequence[str | os.PathLike[str]],
    device: torch.device,
    seed: int,
    parts: Mapping[str, Any],
    recipe: Mapping[str, Any],
    origin: Mapping[str, Any],
    fingerprint: str,
) -> None:
    """Train a student, or a teacher, from images.h5; write its weights and its history.

    What was trained before an interruption is kept in state.pt beside the weights, and goes on
    if everything that decides the outcome is still the same. The caller removes that file once
    the weights are safe.

    Args:
        images: path of images.h5.
        weights, history: paths to write; the history is a CSV with one row per epoch.
        teachers: weights files of the teachers.
        device: where it is trained.
        seed: of initialisation, data order, augmentation and perturbations.
        parts: what is trained how, as `studies.Study.parts` returns it.
        recipe: see `fit`.
        origin: who is trained (study, method, …); written into the weights' header.
        fingerprint: of all that decides the outcome.

    Raises:
        InputError: another process trains the same student; or as `fit`.
    """
    description = read_description(images)
    architecture = {
        **parts["architecture"],
        "num_classes": len(description["classes"]),
        "in_channels": description["shape"][0],
        "mean": description["mean"],
        "std": description["std"],
    }
    torch.manual_seed(seed)
    student = build_student(
        **parts["student"], architecture=architecture, members=parts["members"]
    ).to(device)
    logger.info("%s, %d parameters", architecture["name"], count_parameters(student))
    networks = [fold_batch_norms(load_student(path, device).network) for path in teachers]
    train, validation = (
        tuple(torch.from_numpy(array).to(device) for array in read_images(images, split))
        for split in ("train", "val")
    )
    made = attributes(
        **origin,
        **parts,
        teachers=[read_header(path)["digest"] for path in teachers],
        seed=seed,
        recipe=recipe,
        device=device.type,
        precision=recipe["precision"],
    )
    # Random numbers differ by device, rounding by version too.
    same = attributes(fingerprint=fingerprint, device=device.type, torch=torch.__version__)
    state = TrainingState(Path(weights).parent / "state.pt", same["digest"])
    with state.exclusive():
        rows = fit(
            student,
            learning(networks, parts["objective"], parts["perturbation"]),
            train,
            validation,
            seed=seed,
            state=state,
            **recipe,
        )
        write_csv(history, pd.DataFrame(rows))
        save_student(weights, student, made)
