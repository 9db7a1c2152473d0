"""What `import ensdistill` offers: distil, convert, save, load and predict without a workflow.

Images are uint8 (N, C, H, W), of NumPy or PyTorch; labels integers (N,). PyTorch is imported by the
functions that need it: an exported file predicts without.
"""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import ValidationError

from ensdistill import InputError
from ensdistill.asking import as_trained, content_of
from ensdistill.config_errors import sentence
from ensdistill.deployment import (
    Answers,
    Deployment,
    Predictor,
    StudentWeights,
    TorchStudent,
    joined,
    open_student,
)

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ensdistill.batch_ensemble import Init
    from ensdistill.numerics import Precision
    from ensdistill.studies import Study

PathLike = str | os.PathLike[str]
Part = str | Mapping[str, Any]
"""A part of a method as config.yaml has it: its name alone, or with its options."""

AT_ONCE = 256
"""Images that `predict` has in memory at once."""


def load(path: PathLike, device: str = "cpu", network: "nn.Module | None" = None) -> Predictor:
    """A student that can be asked, from a file of weights or an exported one.

    Args:
        path: the file. What a student's classes are, its temperature and its calibration scores are
            known of files that `save` or an export wrote, and of weights in a study's folder.
        device: where it computes, such as `cuda`.
        network: for a student of a module of your own: such a module, with any weights.

    Returns:
        It is asked by `predict`, or called with uint8 images (B, C, H, W); `deployment` says what
        is known of it.

    Raises:
        InputError: there is no such file, or it holds no student.

    Example:
        >>> import tempfile, ensdistill
        >>> from ensdistill.digests import attributes
        >>> from ensdistill.students import build_student
        >>> from ensdistill.weights import save_student
        >>> path = Path(tempfile.mkdtemp(), "weights.safetensors")
        >>> resnet = {"name": "resnet8", "width": 2, "num_classes": 3, "in_channels": 1}
        >>> save_student(path, build_student("batch_ensemble", resnet, members=4), attributes())
        >>> student = ensdistill.load(path)
        >>> student.deployment.classes, student.deployment.members
        (['0', '1', '2'], 4)
    """
    return open_student(path, device) if network is None else StudentWeights(path, device, network)


def predict(
    student: Predictor, images: "NDArray[np.uint8] | Tensor | PathLike | Sequence[PathLike]"
) -> Answers:
    """What a student says of images, or of pictures in files.

    Args:
        student: as `load` or `distil` returns it.
        images: uint8 (N, C, H, W), N ≥ 1, as large as those that it was trained on; or a path of a
            picture, or a list of paths, which are brought to that size as `ensdistill predict`
            brings them.

    Returns:
        `probabilities` (N, K), `member_probabilities` (N, M, K), `entropy` (N,) in nats and
        `mutual_information` (N,) in nats, None for one network; temperature applied.

    Raises:
        InputError: there is none, they are not uint8 (N, C, H, W) with the student's channels and
            size, or a picture cannot be read.

    Example:
        >>> import numpy, torch, ensdistill
        >>> from ensdistill.deployment import Deployment, TorchStudent
        >>> from ensdistill.students import build_student
        >>> resnet = {"name": "resnet8", "width": 2, "num_classes": 3, "in_channels": 1}
        >>> network = build_student("batch_ensemble", resnet, members=4)
        >>> student = TorchStudent(network, Deployment(["a", "b", "c"], channels=1), made={})
        >>> answers = ensdistill.predict(student, numpy.zeros((2, 1, 8, 8), numpy.uint8))
        >>> answers.probabilities.sum(1).round(6).tolist(), answers.member_probabilities.shape
        ([1.0, 1.0], (2, 4, 3))
    """
    given: Any = [images] if isinstance(images, str | os.PathLike) else images
    are_paths = isinstance(given, list | tuple)
    given = given if are_paths else np.asarray(given)
    if not len(given):
        raise InputError("there are no images")
    parts = []
    for start in range(0, len(given), AT_ONCE):
        part = given[start : start + AT_ONCE]
        pixels = _read(part, student.deployment) if are_paths else part
        parts.append(student(_checked(pixels, student.deployment)))
    return joined(parts)


def convert(
    module: "nn.Module", members: int, init: "Init" = "normal", *, std: float = 0.5
) -> "nn.Module":
    """A BatchEnsemble of M members made of any torch module, which stays as it is.

    Every convolution and linear layer gets factors and a bias for each member and keeps its weight
    [Wen et al. 2020]; see `ensdistill.convert.to_batch_ensemble`.

    Args:
        module: rows (B, …) → rows; the first dimension is that of the rows everywhere inside.
        members: M.
        init: how the factors r and s begin: `normal` N(1, std²), random `signs`, or `ones`.
        std: standard deviation of normal factors.

    Returns:
        A module (M·B, …) → (M·B, …), whose rows jB … (j+1)B−1 belong to member j.

    Raises:
        ValueError: a layer cannot be converted; the sentence names it.

    Example:
        >>> import torch, ensdistill
        >>> network = torch.nn.Linear(3, 2)
        >>> ensemble = ensdistill.convert(network, 4, init="ones")
        >>> x = torch.rand(5, 3)
        >>> torch.allclose(ensemble(x.repeat(4, 1)), network(x).repeat(4, 1))
        True
    """
    from ensdistill.convert import to_batch_ensemble

    return to_batch_ensemble(module, members, init, std=std)


def distil(
    teachers: "Sequence[nn.Module]",
    architecture: "Part | nn.Module",
    images: "ArrayLike | Tensor",
    labels: "ArrayLike | Tensor",
    *,
    validation: "tuple[ArrayLike | Tensor, ArrayLike | Tensor]",
    student: Part = "batch_ensemble",
    objective: Part | None = None,
    perturbation: Part = "none",
    recipe: Part | None = None,
    augmentation: Mapping[str, Any] | None = None,
    precision: "Precision" = "fp32",
    classes: Sequence[str] | None = None,
    seed: int = 0,
    device: str = "cpu",
    progress: bool = True,
) -> "TorchStudent":
    """Train one student by an ensemble of teachers, as the workflow does.

    Parts and their options are those of config.yaml, with its defaults; config.schema.json
    describes each.

    Args:
        teachers: M ≥ 2 modules, images (B, C, H, W) in [0, 1] → logits (B, K); copies of them are
            asked, in eval mode.
        architecture: the student's network: a name such as `resnet8` or `timm:resnet18`, a mapping
            with options, or a module of your own, images in [0, 1] → logits. Training begins with
            that module's weights, and it stays as it is.
        images, labels: to be trained on, uint8 (N, C, H, W) and integers (N,) in 0 … K−1.
        validation: images and labels; of all validated epochs the best is kept, and temperature and
            calibration scores come from them.
        student: its kind, such as `batch_ensemble`, `single`, `hydra` or `latent_batch_ensemble`;
            `flow_matching`, which starts from another student, needs the workflow.
        objective: what it minimises; the usual one of its kind unless told.
        perturbation: where the teachers are asked, such as `conf_ods` or
            `{"name": "conf_ods", "eta": "1/255"}`; `held_out` needs the workflow.
        recipe: what of the optimiser and its schedule differs from the defaults (300 epochs), such
            as `{"epochs": 75, "learning_rate": 0.1}`; or `published`, for that of the method.
        augmentation: crops and mirroring unless told; for none
            `{"crop_padding": 0, "flip": False}`.
        precision: `fp32`, `tf32` or `bf16`.
        classes: names of the K classes; their numbers unless told.
        seed: of initialisation, data order, augmentation and perturbations.
        device: where it is trained, such as `cuda`.
        progress: whether a bar shows the epochs.

    Returns:
        The trained student for `predict` and `save`; the module itself is `student`, and `history`
        has one row per epoch, as of `training.fit`.

    Raises:
        InputError: a part or an option does not exist or goes with no other, images, labels and
            teachers do not fit together, or the loss is not finite.

    Example:
        >>> import torch, ensdistill
        >>> _ = torch.manual_seed(0)
        >>> teachers = [torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3))] * 2
        >>> images = torch.randint(256, (20, 1, 8, 8), dtype=torch.uint8)
        >>> labels = torch.arange(20) % 3
        >>> student = ensdistill.distil(
        ...     teachers,
        ...     {"name": "resnet8", "width": 2},
        ...     images,
        ...     labels,
        ...     validation=(images, labels),
        ...     perturbation="conf_ods",
        ...     recipe={"epochs": 2, "warmup_epochs": 1, "batch_size": 10},
        ...     progress=False,
        ... )
        >>> ensdistill.predict(student, images).member_probabilities.shape
        (20, 2, 3)
    """
    from ensdistill.distilling import distilled

    method: dict[str, Any] = {
        "student": student,
        "perturbation": perturbation,
        "recipe": recipe or {},
    }
    if objective is not None:
        method["objective"] = objective
    given: dict[str, Any] = {"precision": precision, "augmentation": augmentation or {}}
    network = None if isinstance(architecture, str | Mapping) else architecture
    if network is None:
        given["architecture"] = architecture
    return distilled(
        teachers,
        _study(len(teachers), method, given),
        (images, labels),
        validation,
        network=network,
        classes=classes,
        seed=seed,
        device=device,
        progress=progress,
    )


def save(student: "TorchStudent", path: PathLike) -> None:
    """Write a student's weights, with all that `load` needs: classes, temperature, calibration.

    Args:
        student: as `distil` or `load` returns it.
        path: the file, safetensors; whole or not there at all. Of a module of your own it holds the
            weights alone, and `load` must be given such a module.

    Raises:
        InputError: the student is no module in memory, but an exported file.

    Example:
        >>> import tempfile, ensdistill
        >>> from ensdistill.deployment import Deployment, TorchStudent
        >>> from ensdistill.students import build_student
        >>> resnet = {"name": "resnet8", "width": 2, "num_classes": 2, "in_channels": 1}
        >>> network = build_student("batch_ensemble", resnet, members=4)
        >>> known = Deployment(["cat", "dog"], channels=1, temperature=1.5)
        >>> path = Path(tempfile.mkdtemp(), "pets.safetensors")
        >>> ensdistill.save(TorchStudent(network, known, made={}), path)
        >>> ensdistill.load(path).deployment.classes, ensdistill.load(path).deployment.temperature
        (['cat', 'dog'], 1.5)
    """
    from ensdistill.digests import attributes
    from ensdistill.weights import save_student

    if not isinstance(student, TorchStudent):
        raise InputError(f"{path}: only a student with weights can be saved, not an exported file")
    made = student.made if "digest" in student.made else attributes(**student.made)
    save_student(path, student.student, {**made, "deployment": student.deployment.in_header()})


def _study(members: int, method: Mapping[str, Any], others: Mapping[str, Any]) -> "Study":
    """A study with one method, for its checks and its defaults.

    Raises:
        InputError: something in it does not exist, or does not go with the rest.
    """
    from ensdistill.studies import Study

    if members < 2:
        raise InputError(f"an ensemble has at least two teachers, not {members}")
    methods = {"student": {"label": "student", **method}}
    try:
        return Study.model_validate(
            {"methods": methods, "members": members, "pool": members, **others}
        )
    except ValidationError as error:
        told = sentence(error, Study.model_json_schema(), "distil")
        raise InputError(re.sub(r"methods\.student(\.|: )", "", told)) from None


def _read(paths: Sequence[PathLike], known: Deployment) -> NDArray[np.uint8]:
    """Pictures (n, C, H, W) as the student wants them."""
    found: list[NDArray[np.uint8]] = []
    for path in paths:
        found.append(as_trained(content_of(Path(path)), known, os.fspath(path))[0])
        if found[-1].shape != found[0].shape:  # of a student whose size is not known
            sizes = ("×".join(map(str, it.shape[:0:-1])) for it in (found[-1], found[0]))
            raise InputError("{}: has {} pixels, the first {}".format(path, *sizes))
    return np.stack(found)


def _checked(images: NDArray[Any], known: Deployment) -> NDArray[np.uint8]:
    """Images as a student takes them."""
    fits = images.ndim == 4 and images.shape[1] == known.channels
    if images.dtype != np.uint8 or not fits or known.size not in (None, images.shape[2:]):
        sides = "H, W" if known.size is None else ", ".join(map(str, known.size))
        raise InputError(
            f"images must be uint8 (N, {known.channels}, {sides}), not {images.dtype} "
            f"{images.shape}"
        )
    return images
