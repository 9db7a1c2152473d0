"""The training loop of teachers and students."""

import copy
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from tqdm import tqdm

from ensdistill import InputError
from ensdistill.batches import TrainingBatches, training_batches
from ensdistill.digests import attributes
from ensdistill.distributed import (
    agreed,
    alone,
    averaged_parts,
    in_turn,
    is_first,
    join,
    parallel,
    part_of,
    place,
)
from ensdistill.files import write_csv
from ensdistill.images import read_description
from ensdistill.jobs import Interrupted, deferred_interrupts
from ensdistill.learning import (
    Learning,
    RunningSums,
    check_first_step,
    learning,
    learning_rate_factor,
    new_optimizer,
    parameter_groups,
    train_step,
)
from ensdistill.loading import load_images
from ensdistill.metrics import accuracy, nll
from ensdistill.networks import described, fold_batch_norms
from ensdistill.numerics import Precision, choose_precision, set_float32
from ensdistill.predictions import PROBS
from ensdistill.recipes import Recipe
from ensdistill.state import TrainingState
from ensdistill.step_graphs import by_graphs
from ensdistill.stored_images import StoredImages
from ensdistill.students import Step, Student, build_student, count_parameters, predict
from ensdistill.weights import load_student, read_header, save_student

logger = logging.getLogger(__name__)

Images = Tensor | StoredImages

SAVE_EVERY = 120
"""Seconds after which the state is saved within an epoch: the most that a kill can cost."""


def is_validated(epoch: int, epochs: int, validate_every: int) -> bool:
    """Every so many epochs, and in each of the last tenth."""
    return epoch % validate_every == 0 or epoch > 0.9 * epochs


@dataclass
class Run:
    """A training under way: all that the rest of it depends on.

    Random numbers are no part of it: those of a step depend on seed, epoch and step alone.
    """

    student: Student
    optimizer: torch.optim.Optimizer
    history: list[dict[str, float]] = field(default_factory=list)
    """One row for each finished epoch."""
    best_accuracy: float = -1.0
    """Of all validations, in percent."""
    best: dict[str, Tensor] = field(default_factory=dict)
    """The predictor's state at that validation."""
    epoch: int = 1
    """The epoch under way."""
    steps: int = 0
    """Steps of that epoch that are done."""
    measured: RunningSums = field(default_factory=RunningSums)
    """What `train_step` returned in these steps."""
    seconds: float = 0.0
    """What that epoch has taken."""

    PARTS = ("student", "optimizer", "measured")

    def state_dict(self) -> dict[str, Any]:
        """For a file; tensors may be on any device."""
        parts = {name: getattr(self, name).state_dict() for name in self.PARTS}
        plain = ("history", "best_accuracy", "best", "epoch", "steps", "seconds")
        return {**parts, **{name: getattr(self, name) for name in plain}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state; tensors are brought to the student's device."""
        for name, value in state.items():
            if name in self.PARTS:
                getattr(self, name).load_state_dict(value)
            else:
                setattr(self, name, value)
        self.measured.to(next(self.student.parameters()).device)
        logger.info("going on from epoch %d, after %d of its steps", self.epoch, self.steps)

    def set_learning_rate(self, recipe: Recipe) -> float:
        """Set the rate of the epoch under way; returned is that of the parameters at large."""
        factor = learning_rate_factor(
            self.epoch, recipe.epochs, recipe.schedule, recipe.warmup_epochs
        )
        groups = parameter_groups(self.student, recipe)
        for group, peak in zip(self.optimizer.param_groups, groups, strict=True):
            rate = factor * peak["lr"]
            if group["params"][0].is_cuda:
                rate = torch.tensor(rate).item()  # float32, as a graph has it
            if isinstance(group["lr"], Tensor):  # which a graph looks up
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
        return factor * recipe.learning_rate

    def finish_epoch(self, row: dict[str, float]) -> None:
        """Note what an epoch came to, and begin the next one."""
        self.history.append(row)
        self.epoch += 1
        self.measured.clear()
        self.steps, self.seconds = 0, 0.0


def seeds(seed: int, epoch: int, step: int, count: int) -> list[int]:
    """Independent seeds of one step (step 0: of the epoch's batches) [NumPy's SeedSequence]."""
    return [int(word) for word in np.random.SeedSequence([seed, epoch, step]).generate_state(count)]


def fit(
    student: Student,
    learning: Learning,
    train: tuple[Images, Tensor],
    validation: tuple[Images, Tensor],
    recipe: Recipe,
    *,
    seed: int,
    precision: Precision,
    state: TrainingState | None = None,
    progress: bool | None = None,
    cuda_graphs: bool = False,
    **augmentation: Any,
) -> tuple[Student, list[dict[str, float]]]:
    """Train a student in place.

    Of epochs with equal validation accuracy the latest is kept: it has trained longest. With a
    state, training goes on from where that was saved, and ends, on a CPU, with the same bits as if
    it had never stopped. It is saved every `SAVE_EVERY` seconds, after the step during which
    SIGTERM or SIGINT came, and at the end.

    Args:
        student: to be trained, on the device of the labels.
        learning, precision: see `train_step`.
        train, validation: images uint8 (N, C, H, W) as of `load_images` and labels int64 (N,).
            Training images may be larger than those of validation, which have the network's size.
        recipe: the optimiser's settings and their schedule.
        seed: of data order, augmentation and perturbations.
        state: what to go on from, and where to save; None to begin anew and save nothing.
        progress: whether a bar of epochs is shown; None where a terminal shows it.
        cuda_graphs: whether a GPU computes each step as one graph.
        **augmentation: see `Augmentation`.

    Returns:
        The student's predictor with the weights of its best validation; and one row per epoch:
        learning rate, mean loss and its parts, accuracy on the training batches [%], seconds;
        where validated val_accuracy [%], val_nll [nats].

    Raises:
        InputError: the loss is not finite; the message names step and learning rate.
        Interrupted: SIGTERM or SIGINT came.
    """
    size = validation[0].shape[2:]
    batches = training_batches(*train, recipe.batch_size, size=size, **augmentation)
    _log_sizes(student, train[0], batches)
    # All batches have one shape, so cuDNN may try which of its algorithms is the fastest.
    torch.backends.cudnn.benchmark = train[1].is_cuda
    held = validation[0], validation[1].cpu()
    run = Run(student, new_optimizer(student, recipe))
    if state and (saved := in_turn(state.load)):
        run.load_state_dict(saved)
    learning = replace(learning, objective=parallel(student, learning.objective))

    def take(step: Step) -> None:
        found = train_step(step, learning, run.optimizer, precision, recipe.clip_norm)
        run.measured.add(averaged_parts(found))

    device = train[1].device
    taken = by_graphs(take, run.optimizer, device) if cuda_graphs else take
    draws = torch.Generator(device), torch.Generator()
    hidden = None if progress is None and is_first() else not progress
    with deferred_interrupts() as interrupted:
        keep = _Keeper(state, run, lambda: agreed(interrupted()))
        # disable=None: a bar on a terminal, plain lines in a log.
        epochs = range(run.epoch, recipe.epochs + 1)
        for epoch in tqdm(epochs, "epoch", leave=False, disable=hidden):
            rate = run.set_learning_rate(recipe)
            _train_epoch(run, learning, batches, recipe, seed, draws, taken, keep)
            row = _summary(run, len(batches), rate)
            if is_first() and is_validated(epoch, recipe.epochs, recipe.validate_every):
                row |= _validate(run, held, learning)
            row["seconds"] = run.seconds
            logger.info(" ".join(f"{name} {value:.5g}" for name, value in row.items()))
            run.finish_epoch(row)
        keep.save()
    predictor = student.predictor()
    if is_first():
        predictor.load_state_dict(run.best)
    return predictor, run.history


def _log_sizes(student: Student, images: Images, batches: TrainingBatches) -> None:
    size, rows = batches.batch_size, student.rows
    logger.info(
        "%d images, %d steps per epoch; effective batch size: %d images × %d each = %d rows",
        *(len(images), len(batches), size, rows, size * rows),
    )


class _Keeper:
    """Saves a run now and then, and when a signal came."""

    def __init__(self, state: TrainingState | None, run: Run, interrupted: Callable[[], int]):
        self.state, self.run, self.interrupted = state, run, interrupted
        self.saved_at = time.perf_counter()

    def save(self) -> None:
        if self.state and is_first():
            self.state.save(self.run.state_dict())
        self.saved_at = time.perf_counter()

    def after_step(self) -> None:
        """Raises Interrupted if a signal came."""
        signal = self.interrupted()
        if signal or time.perf_counter() - self.saved_at > SAVE_EVERY:
            self.save()
        if signal:
            goes_on = "; a rerun goes on from there" if self.state else ""
            raise Interrupted(signal, f"in epoch {self.run.epoch}{goes_on}")


def _train_epoch(
    run: Run,
    learning: Learning,
    batches: TrainingBatches,
    recipe: Recipe,
    seed: int,
    draws: tuple[torch.Generator, torch.Generator],
    take: Callable[[Step], None],
    keep: _Keeper,
) -> None:
    """The steps of an epoch that are not done yet."""
    progress = (run.epoch - 1) / recipe.epochs
    started = time.perf_counter() - run.seconds
    run.student.train()
    run.student.set_progress(progress)
    generator, host = draws
    generator.manual_seed(*seeds(seed, run.epoch, 0, 1))
    for number, (x, y) in enumerate(batches.epoch(generator, run.steps), run.steps + 1):
        own = seeds(seed, run.epoch, number, 3 + place().rank)
        # The global generator is for dropout and the like.
        for draw, its_seed in zip((generator, host, torch), (*own[:2], own[-1]), strict=True):
            cast(Any, draw).manual_seed(its_seed)
        step = Step(run.student, learning.teachers, x, y, progress, generator, host)
        take(learning.completed(step))
        run.steps, run.seconds = number, time.perf_counter() - started
        keep.after_step()


def _summary(run: Run, steps: int, rate: float) -> dict[str, float]:
    """Means over the steps of an epoch; read once per epoch, so that a GPU need not wait.

    Raises:
        InputError: a loss was not finite.
    """
    measured = run.measured.read()
    if (finite := measured["loss"][1]) < steps:
        step = (run.epoch - 1) * steps + finite + 1
        raise InputError(
            f"the loss is not finite at step {step} (epoch {run.epoch}) with learning rate "
            f"{rate:g}: try a smaller one"
        )
    means = {name: total / steps for name, (total, _) in measured.items()}
    return {"epoch": run.epoch, "learning_rate": rate, **means}


def _validate(run: Run, validation: tuple[Images, Tensor], learning: Learning) -> dict[str, float]:
    """Accuracy [%] and NLL on validation, labels on the CPU; the best predictor so far is kept."""
    started = time.perf_counter()
    predictor, labels = run.student.predictor(), validation[1]
    probs = learning.probs(predict(predictor, validation[0]))
    found = {"val_accuracy": accuracy(probs, labels), "val_nll": nll(probs, labels)}
    if found["val_accuracy"] >= run.best_accuracy:
        run.best_accuracy = found["val_accuracy"]
        run.best = copy.deepcopy(predictor.state_dict())
    run.seconds += time.perf_counter() - started
    return found


def train_student(
    images: str | os.PathLike[str],
    weights: str | os.PathLike[str],
    history: str | os.PathLike[str],
    *,
    teachers: Sequence[str | os.PathLike[str]],
    backbone: Sequence[str | os.PathLike[str]] = (),
    device: torch.device,
    seed: int,
    parts: Mapping[str, Any],
    recipe: Mapping[str, Any],
    augmentation: Mapping[str, Any],
    precision: Precision,
    cuda_graphs: bool = False,
    origin: Mapping[str, Any],
    fingerprint: str,
    processes: int = 1,
) -> None:
    """Train a student, or a teacher, from images.h5; write its weights and its history.

    What was trained before an interruption is kept in state.pt beside the weights, and goes on if
    the fingerprint is the same. The caller removes that file once the weights are safe.

    Args:
        images, weights, history: paths; the history is a CSV with one row per epoch.
        teachers: weights files.
        backbone: weights file of the student that this one starts from, if it does.
        seed: of initialisation, data order, augmentation and perturbations.
        parts: what is trained how, as `studies.Study.parts` returns it.
        recipe, augmentation, precision, cuda_graphs: as in the configuration.
        origin: who is trained (study, method, …); written into the weights' header.
        fingerprint: of all that decides the outcome.
        processes: how many train it together, of which this is one; see distributed.py.

    Raises:
        InputError: another process trains the same student; or as `fit`.
    """
    if processes > 1:
        join(device)
    precision, reason = choose_precision(precision, device)
    set_float32(precision)
    logger.info("precision: %s", reason)
    torch.manual_seed(seed)
    description = read_description(images)
    student = new_student(parts, description).to(device)
    for path in backbone:
        student.start_from(load_student(path, device))
    networks = [fold_batch_norms(load_student(path, device).network) for path in teachers]
    settings = {**augmentation, "seed": seed, "precision": precision}
    stored = StoredImages(images, "train")
    train = load_images(stored, device, logging.INFO)
    if agreed(train[0] is stored):  # by one process, then by all: the order of images may differ
        train = stored, train[1]
    blocks = {"block": stored.block} if train[0] is stored and stored.block > 1 else {}
    made = attributes(
        **origin,
        **parts,
        **settings,
        recipe=recipe,
        teachers=[read_header(path)["digest"] for path in teachers],
        **({"starts_from": [read_header(path)["digest"] for path in backbone]} if backbone else {}),
        precision_reason=reason,
        device=device.type,
        **({"cuda_graphs": True} if cuda_graphs else {}),
        **blocks,
        **({"processes": processes} if processes > 1 else {}),
        **{key: description[key] for key in ("evaluation",) if key in description},
    )
    # Random numbers differ by device, rounding by version and precision too, and the order of
    # images by how they are read.
    here = {"device": device.type, "torch": torch.__version__, "precision": precision, **blocks}
    same = attributes(fingerprint=fingerprint, **here)
    state = TrainingState(Path(weights).parent / "state.pt", same["digest"])
    with state.exclusive() if is_first() else nullcontext():
        held_out = _held_out(images, device, recipe, augmentation) if "held_out" in parts else None
        taught = learning_of(networks, parts, held_out)
        validation = load_images(StoredImages(images, "val"), device)
        first = _first(stored, recipe["batch_size"], validation[0].shape[2:], device)
        splits = train, validation
        predictor, rows = check_and_fit(
            student,
            taught,
            first,
            *splits,
            Recipe(**recipe),
            state=state,
            cuda_graphs=cuda_graphs,
            **settings,
        )
        if is_first():
            write_csv(history, pd.DataFrame(rows))
            save_student(weights, predictor, made)


def check_and_fit(
    student: Student,
    learning: Learning,
    first: tuple[Tensor, Tensor],
    train: tuple[Images, Tensor],
    validation: tuple[Images, Tensor],
    recipe: Recipe,
    *,
    precision: Precision,
    **settings: Any,
) -> tuple[Student, list[dict[str, float]]]:
    """As `fit`, once a student gives what its kind promises and has right gradients.

    Args:
        first: images uint8 (B, C, H, W), B ≥ 2, of the size of validation, and labels, on the
            student's device.

    Raises:
        InputError: it does not; see `Student.check` and `check_first_step`.
    """
    part = part_of(min(recipe.batch_size, len(train[1])))
    with alone():
        student.check(first[0][:2].float() / 255)
        check_first_step(student, learning, first, part.stop - part.start, precision)
    return fit(student, learning, train, validation, recipe, precision=precision, **settings)


def _first(
    stored: StoredImages, count: int, size: Sequence[int], device: torch.device
) -> tuple[Tensor, Tensor]:
    """The first images uint8 and labels, not augmented: of larger ones the centre."""
    centre = StoredImages(stored.path, stored.split, size)
    places = np.arange(min(count, len(centre)))
    pair = centre.read(places), centre.labels[places]
    first, labels = (torch.from_numpy(it).to(device) for it in pair)
    return first, labels


def _held_out(
    images: str | os.PathLike[str],
    device: torch.device,
    recipe: Mapping[str, Any],
    augmentation: Mapping[str, Any],
) -> TrainingBatches:
    """Images on which no network is trained, augmented as training images are."""
    pair = load_images(StoredImages(images, "held_out"), device)
    size = StoredImages(images, "val").shape[2:]
    return training_batches(*pair, recipe["batch_size"], size=size, **augmentation)


def learning_of(
    teachers: Sequence[nn.Module],
    parts: Mapping[str, Any],
    held_out: TrainingBatches | None = None,
) -> Learning:
    """How a student of these parts, as `studies.Study.parts` returns them, learns."""
    return learning(
        teachers,
        parts["objective"],
        parts["perturbation"],
        probs=lambda logits: PROBS[parts["prediction"]](logits, parts),
        single_pass=parts.get("single_pass", False),
        held_out=held_out,
    )


def new_student(parts: Mapping[str, Any], images: Mapping[str, Any]) -> Student:
    """A student for the images that `read_description` describes."""
    architecture = described(parts["architecture"], images)
    try:
        student = build_student(
            **parts["student"], architecture=architecture, members=parts["members"]
        )
    except ValueError as error:  # such as groups that do not divide the channels
        raise InputError(f"{architecture['name']}: {error}") from error
    logger.info("%s, %d parameters", architecture["name"], count_parameters(student.network))
    return student
