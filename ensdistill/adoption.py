"""Networks that were trained elsewhere become weights of this package, and are checked at once.

What is adopted is an ordinary weights file: all that follows cannot tell it from one that was
trained here, but by its header (`adopted`).
"""

import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from ensdistill import InputError
from ensdistill.class_order import class_order
from ensdistill.digests import attributes
from ensdistill.files import write_csv
from ensdistill.images import evaluation_images, read_description
from ensdistill.markup import counted
from ensdistill.metrics import accuracy, nll
from ensdistill.networks import described
from ensdistill.predictions import PROBS
from ensdistill.state_dicts import Stored, fitted, read_stored, renamed
from ensdistill.students import Student, build_student, count_parameters, predict, unfilled
from ensdistill.training import train_student
from ensdistill.weights import load_student, save_student

logger = logging.getLogger(__name__)

IMAGES_DECIDE = ("num_classes", "in_channels")
"""Of an architecture."""

HISTORY = ["epoch", "learning_rate", "loss", "cross_entropy", "accuracy"]
HISTORY += ["val_accuracy", "val_nll", "seconds"]
"""Columns of a history, of which an adopted network has no rows."""

CAUSES = (
    "The usual causes: the normalisation ('mean' and 'std'), the order of the classes "
    "('classes'), pixels expected from 0 to 255 (here they are from 0 to 1), BGR instead of RGB, "
    "or another image size"
)


def adopt(
    images: str | os.PathLike[str],
    weights: str | os.PathLike[str],
    history: str | os.PathLike[str] | None,
    *,
    source: str | os.PathLike[str],
    device: torch.device,
    parts: Mapping[str, Any],
    is_told: bool,
    teaches: bool,
    prefixes: Mapping[str, str | None],
    classes: Sequence[str] | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    origin: Mapping[str, Any],
) -> None:
    """Write weights that were trained elsewhere as weights of this package.

    Accuracy and NLL on the validation images are logged; an accuracy near chance is a warning.

    Args:
        images, weights: paths.
        history: path of a table without rows, if there is to be one.
        source: the file that holds the weights: see `state_dicts.read_stored`.
        parts: student, members, architecture and prediction, as of `studies.Study.parts`. A file
            of this package says itself what it holds.
        is_told: whether such a file must have that architecture.
        teaches: whether it must be one network whose logits are those of a softmax.
        prefixes, classes, mean, std: as `own_networks.Elsewhere` has them.
        origin: whose weights they become; written into the header.

    Raises:
        InputError: the file does not fit: one sentence that says what.
    """
    stored, description = read_stored(source), read_description(images)
    said = _said(stored, parts)
    spec = _spec(source, stored, parts, description, is_told=is_told, teaches=teaches)
    if mean is not None:
        _check_mean(source, spec["architecture"], mean)
        spec["architecture"] |= {"mean": mean, "std": std}
    try:
        student = build_student(**spec)
        tensors, changed = fitted(
            renamed(stored.tensors, prefixes), student.network, kept=mean is None
        )
        names = classes or stored.classes
        order = class_order(names, description["classes"])
        tensors = _ordered(tensors, spec, order, len(names or order))
        tensors = _checked(tensors, student, names)
    except ValueError as error:
        network = spec["architecture"]["name"]
        raise InputError(f"{source}: its weights fit no {network}: {error}") from None
    student.network.load_state_dict(tensors)
    logger.info("%s: %d parameters", source, count_parameters(student.network))
    if changed:
        logger.info("keys begin differently: %s", changed)
    known = {
        "path": os.fspath(source),
        "sha256": stored.sha256,
        "prefixes": {**prefixes, **changed},
        "outputs": order if order != [*range(len(order))] else None,
    }
    found = _validated(student.to(device).eval(), images, said, source)
    sized = {key: description[key] for key in ("evaluation",) if key in description}
    made = attributes(**{**said, **origin, **sized}, adopted=known, validation=found)
    if history is not None:
        write_csv(history, pd.DataFrame(columns=HISTORY))
    save_student(weights, student.cpu(), made)


def _check_mean(
    source: str | os.PathLike[str], architecture: Mapping[str, Any], mean: Sequence[float]
) -> None:
    """Refuse a mean that the network has no use for, or of other channels."""
    channels = architecture["in_channels"]
    if architecture["name"].startswith("file:"):
        raise InputError(
            f"{source}: a network of your own file normalises by itself, without 'mean'"
        )
    if len(mean) != channels:
        raise InputError(
            f"{source}: 'mean' has {counted(len(mean), 'number')}, and images have "
            f"{counted(channels, 'channel')}"
        )


def _said(stored: Stored, parts: Mapping[str, Any]) -> dict[str, Any]:
    """What the header says beside its origin: what the file's own did, if it is of this package."""
    if stored.header is None:
        return {**parts, "teachers": []}
    not_of_training = {"spec", "digest", "ensdistill", "torch", "adopted", "validation"}
    return {key: it for key, it in stored.header.items() if key not in not_of_training}


def _spec(
    source: str | os.PathLike[str],
    stored: Stored,
    parts: Mapping[str, Any],
    description: Mapping[str, Any],
    *,
    is_told: bool,
    teaches: bool,
) -> dict[str, Any]:
    """Arguments of `build_student`; what a file of this package says of them counts."""
    # Whoever has the weights needs none to begin with, but those say how pixels were normalised.
    architecture = {**described(parts["architecture"], description)}
    architecture.pop("pretrained", None)
    if stored.header is None:
        return {**parts["student"], "members": parts["members"], "architecture": architecture}
    try:
        spec = load_student(source).spec
    except InputError as error:  # how to make it again does not concern the user's file
        raise InputError(str(error).partition("; delete it")[0]) from None
    if teaches and (spec["name"] != parts["student"]["name"] or _differs(stored.header, parts)):
        raise InputError(
            f"{source}: holds a {spec['name']}, and a teacher must be one network with the logits "
            "of a softmax"
        )
    of_file = dict(spec["architecture"])
    sizes = {key: architecture[key] for key in IMAGES_DECIDE}
    known = {key: of_file.pop(key) for key in (*IMAGES_DECIDE, "mean", "std")}
    if is_told and of_file != {key: it for key, it in architecture.items() if key not in known}:
        said = ", ".join(f"{key}: {it}" for key, it in of_file.items())
        raise InputError(f"{source}: its architecture is another: write {{{said}}}")
    return {**spec, "architecture": {**spec["architecture"], **sizes}}


def _differs(header: Mapping[str, Any], parts: Mapping[str, Any]) -> bool:
    """Whether the logits of a file of this package mean something else."""
    return header.get("prediction", parts["prediction"]) != parts["prediction"]


def _ordered(
    tensors: dict[str, Tensor], spec: Mapping[str, Any], order: Sequence[int], count: int
) -> dict[str, Tensor]:
    """Tensors of `count` outputs in another order, or just some of them; others as they are.

    Raises:
        ValueError: they have another number of outputs, or the order cannot be changed.
    """
    if [*order] == [*range(count)]:
        return tensors
    changed = {}
    for key, place in _of_outputs(spec).items():
        if tensors[key].shape[place] != count:
            found = tensors[key].shape[place]
            raise ValueError(f"it has {found} outputs, and {count} classes are named")
        changed[key] = tensors[key].index_select(place, torch.tensor(order))
    return {**tensors, **changed}


def _of_outputs(spec: Mapping[str, Any]) -> dict[str, int]:
    """Of each tensor that has a row per class the dimension of these rows.

    It is what a class more makes longer by one.

    Raises:
        ValueError: a class more changes a tensor in another way.
    """
    classes = spec["architecture"]["num_classes"]
    few, more = (
        unfilled(**{**spec, "architecture": {**spec["architecture"], "num_classes": count}})
        for count in (classes, classes + 1)
    )
    states = few.network.state_dict(), more.network.state_dict()
    found = {}
    for key, tensor in states[0].items():
        sides = zip(tensor.shape, states[1][key].shape, strict=True)
        longer = [place for place, pair in enumerate(sides) if pair[0] != pair[1]]
        if not longer:
            continue
        if len(longer) > 1 or states[1][key].shape[longer[0]] != tensor.shape[longer[0]] + 1:
            raise ValueError(f"the order of a {spec['name']}'s classes cannot be changed")
        found[key] = longer[0]
    return found


def _checked(
    tensors: dict[str, Tensor], student: Student, names: Sequence[str] | None
) -> dict[str, Tensor]:
    """The tensors, if they have the right shapes and are finite.

    Args:
        tensors: all of the student's network.
        student: newly built.
        names: of the outputs, if they are known.

    Raises:
        ValueError: they have not, or are not.
    """
    state = student.network.state_dict()
    wrong = [key for key, tensor in state.items() if tensors[key].shape != tensor.shape]
    if wrong:
        key, outputs = wrong[0], _of_outputs(student.spec)
        if not {*wrong} - outputs.keys():
            count, classes = tensors[key].shape[outputs[key]], state[key].shape[outputs[key]]
            hint = "" if names else ": name those of its outputs by 'classes'"
            raise ValueError(f"it has {count} outputs, and the study {classes} classes{hint}")
        shapes = " and not ".join(str(tuple(it[key].shape)) for it in (tensors, state))
        others = f" and {len(wrong) - 1} more are" if len(wrong) > 1 else " is"
        raise ValueError(f"{key!r}{others} of another shape, {shapes}")
    for key, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{key!r} is not finite")
    return tensors


def _validated(
    student: Student,
    images: str | os.PathLike[str],
    said: Mapping[str, Any],
    source: str | os.PathLike[str],
) -> dict[str, float]:
    """Accuracy [%] and NLL on the validation images; a warning if that is near chance."""
    stored = evaluation_images(images, "val")
    labels = stored.labels
    probs = PROBS[said["prediction"]](predict(student, stored), said)
    found = {"accuracy": accuracy(probs, labels), "nll": nll(probs, labels)}
    text = f"accuracy {found['accuracy']:.2f} %, NLL {found['nll']:.4f}"
    logger.info("%s: %s on %d validation images", source, text, len(labels))
    limit, chance = near_chance(labels)
    if found["accuracy"] < limit:
        how = f"near chance ({chance:.1f} %) on {len(labels)} validation images"
        logger.warning("%s: %s is %s. %s", source, text, how, CAUSES)
    return found


def near_chance(labels: NDArray[np.int64]) -> tuple[float, float]:
    """What accuracy is near chance, and chance: the share of the most frequent class; in percent.

    Near it is what is not three standard errors above it.
    """
    chance = np.bincount(labels).max() / len(labels)
    return 100 * (chance + 3 * math.sqrt(chance * (1 - chance) / len(labels))), 100 * chance


MAKERS: dict[str, Callable[..., None]] = {"trained": train_student, "adopted": adopt}
"""How weights come about."""
