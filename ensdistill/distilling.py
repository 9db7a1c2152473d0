"""A student that is trained from arrays and modules in memory, as workflows train theirs."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from ensdistill import InputError
from ensdistill.deployment import Deployment, TorchStudent, calibrated
from ensdistill.digests import attributes
from ensdistill.images import pixel_statistics
from ensdistill.libraries import LibraryNetwork
from ensdistill.networks import ResidualNetwork, fold_batch_norms
from ensdistill.numerics import choose_precision, set_float32
from ensdistill.predictions import PREDICTIONS
from ensdistill.student import Student
from ensdistill.students import predict, teacher_logits
from ensdistill.studies import Study
from ensdistill.training import check_and_fit, learning_of, new_student

Given = tuple[ArrayLike | Tensor, ArrayLike | Tensor]


def distilled(
    teachers: Sequence[nn.Module],
    study: Study,
    train: Given,
    validation: Given,
    *,
    network: nn.Module | None,
    classes: Sequence[str] | None,
    seed: int,
    device: str,
    progress: bool,
) -> TorchStudent:
    """What `api.distil` returns; of a study with one method, `student`.

    Args:
        network: what the student is made of, instead of the study's architecture.

    Raises:
        InputError: as of `api.distil`.
    """
    where, parts, recipe = torch.device(device), study.parts("student"), study.recipe("student")
    if "held_out" in parts:
        raise InputError("distil: perturbation 'held_out' needs the held-out images of a study")
    if network is not None:
        if not study.methods["student"].student.any_architecture:
            raise InputError(f"distil: {parts['student']['name']!r} needs an architecture by name")
        parts["architecture"] = {"name": f"module:{type(network).__name__}", "module": network}
    pair, held = _checked(train, "images", where), _checked(validation, "validation", where)
    if held[0].shape[1:] != pair[0].shape[1:]:
        shapes = (tuple(it.shape[1:]) for it in (held[0], pair[0]))
        raise InputError("validation: images are {}, those to be trained on {}".format(*shapes))
    asked = [_asked(it, where) for it in teachers]
    names = _classes(asked, pair[0][:2], [pair[1], held[1]], classes)
    precision, reason = choose_precision(study.precision, where)
    learnt = {**study.augmentation.model_dump(), "seed": seed, "precision": precision}
    shape = tuple(pair[0].shape[1:])
    images = {"classes": names, "shape": shape, **pixel_statistics(pair[0].cpu().numpy())}
    with torch.random.fork_rng():
        set_float32(precision)
        torch.manual_seed(seed)
        student, history = check_and_fit(
            new_student(parts, images).to(where),
            learning_of(asked, parts),
            (pair[0][: recipe.batch_size], pair[1][: recipe.batch_size]),
            pair,
            held,
            recipe,
            progress=progress,
            cuda_graphs=study.cuda_graphs,
            **learnt,
        )
    made = {**parts, **learnt, "recipe": recipe.model_dump(), "device": where.type}
    made["architecture"] = {k: v for k, v in parts["architecture"].items() if k != "module"}
    student.eval().requires_grad_(False)
    return TorchStudent(
        student,
        _deployment(student, parts, names, held),
        attributes(**made, precision_reason=reason),
        history,
    )


def _checked(given: Given, what: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """Images uint8 (N, C, H, W) and labels int64 (N,) on a device.

    Raises:
        InputError: they are others, or fewer than two.
    """
    images, labels = map(torch.as_tensor, given)
    if images.dtype != torch.uint8 or images.ndim != 4 or len(images) < 2:
        shape = tuple(images.shape)
        raise InputError(
            f"{what}: images must be uint8 (N, C, H, W), N ≥ 2, not {images.dtype} {shape}"
        )
    whole = not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)
    if labels.shape != images.shape[:1] or not whole or int(labels.min()) < 0:
        raise InputError(
            f"{what}: labels must be integers ({len(images)},) from 0, not {labels.dtype} "
            f"{tuple(labels.shape)}"
        )
    return images.to(device), labels.long().to(device)


def _asked(teacher: nn.Module, device: torch.device) -> nn.Module:
    """A copy of a teacher as it is asked: frozen, in eval mode, images → logits (B, K)."""
    if isinstance(teacher, Student) and teacher.spec["name"] == "single":
        teacher = teacher.network
    copied = copy.deepcopy(teacher).to(device).eval().requires_grad_(False)
    own = isinstance(copied, ResidualNetwork | LibraryNetwork)
    return fold_batch_norms(copied) if own else copied


def _classes(
    teachers: Sequence[nn.Module],
    images: Tensor,
    labels: Sequence[Tensor],
    names: Sequence[str] | None,
) -> list[str]:
    """Names of the classes of which all teachers have logits.

    Raises:
        InputError: a teacher cannot take the images, or teachers, labels and names are of different
            classes.
    """
    counts = []
    for place, teacher in enumerate(teachers):
        try:
            shape = tuple(teacher_logits([teacher], images.float() / 255).shape[1:])
        except (RuntimeError, TypeError, ValueError, AttributeError) as error:
            reason = str(error).partition("\n")[0]
            raise InputError(f"teacher {place} cannot take the images ({reason})") from error
        if len(shape) != 2 or shape[0] != len(images):
            raise InputError(f"teacher {place}: its logits have the shape {shape}, not (B, K)")
        counts.append(shape[1])
    if len({*counts}) > 1:
        raise InputError(f"teachers have logits of {', '.join(map(str, counts))} classes")
    (count, *_) = counts
    if (most := max(int(it.max()) for it in labels)) >= count:
        raise InputError(f"a label is {most}, and teachers have logits of {count} classes")
    if names is not None and len(names) != count:
        raise InputError(f"classes: {len(names)} names, and teachers have logits of {count}")
    return [str(number) for number in range(count)] if names is None else [*names]


def _deployment(
    student: Student, parts: Mapping[str, Any], classes: list[str], held: tuple[Tensor, Tensor]
) -> Deployment:
    """What is known of a student, by its validation images too."""
    keys = {"prediction", "concentration_offset"} & parts.keys()
    known = {key: parts[key] for key in sorted(keys)}
    prediction = PREDICTIONS[known["prediction"]].stored(predict(student, held[0]), known)
    return Deployment(
        classes,
        held[0].shape[1],
        (held[0].shape[2], held[0].shape[3]),
        members=student.members,
        prediction=known,
        **calibrated(prediction, held[1].cpu().numpy()),
    )
