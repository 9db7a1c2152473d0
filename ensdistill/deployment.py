"""A student with all that predictions on images of one's own need.

Weights know their network, not what its classes are called, how pictures become the images that it
was trained on, which temperature calibrates it, or which sets of classes hold the label of nine
images in ten. A study knows these things; a `Deployment` takes them along, and an exported file
carries it. This module imports no PyTorch: exported files predict without.
"""

import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from ensdistill import DamagedFile, InputError, metrics
from ensdistill.calibration import apply_temperature, optimal_temperature
from ensdistill.conformal import calibration_half, label_scores, lac_scores, threshold
from ensdistill.headers import read_header
from ensdistill.pictures import is_side
from ensdistill.predictions import Mixture, Prediction, kind_of, read_prediction

if TYPE_CHECKING:
    from torch import nn

    from ensdistill.student import Student

logger = logging.getLogger(__name__)

Array = NDArray[np.float64]

MOST_SCORES = 1000
"""Calibration scores that are taken along; of more a random choice, which is as valid."""


@dataclass(frozen=True)
class Deployment:
    """What must be known of a student beside its weights.

    Example:
        >>> known = Deployment(["cat", "dog"], channels=3, size=(8, 8), scores=[0.1] * 9 + [0.4])
        >>> known.mode, known.threshold(0.8), Deployment.from_json(known.to_json()) == known
        ('RGB', 0.9, True)
    """

    classes: list[str]
    """Names of the K classes, in the order of its outputs."""
    channels: int
    """C: 1 for grey images, 3 for colour."""
    size: tuple[int, int] | None = None
    """(H, W) of its images; None if that is not known, where pictures are taken as they are."""
    resize: int | None = None
    """Side of the centre square that pictures are resized to; None if they must have `size`."""
    crop: int | None = None
    """Side of the centre that is cut from that square; None for all of it."""
    members: int = 1
    """M: members of which it gives logits; samples, of a student that predicts by these."""
    prediction: Mapping[str, Any] = field(default_factory=lambda: {"prediction": "mixture"})
    """What its logits mean: the attributes of a file of predictions."""
    temperature: float | None = None
    """T*, from the study's validation images; None if it is not known."""
    scores: list[float] = field(default_factory=list)
    """Sorted scores 1 − p of labels, of validation images, p after temperature scaling; empty if
    they are not known."""
    origin: Mapping[str, Any] = field(default_factory=dict)
    """What made it: study, method, replicate, digest of the weights' header, versions."""

    def to_json(self) -> str:
        """As an exported file has it."""
        return json.dumps(asdict(self), ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """From what `to_json` gave."""
        return cls.of(json.loads(text))

    @classmethod
    def of(cls, known: Mapping[str, Any]) -> Self:
        """From the same, parsed.

        Raises:
            KeyError, TypeError, ValueError: it is not what `to_json` gives.
        """
        size = known["size"]
        made = cls(**{**known, "size": size and tuple(size)})
        if wrong := [key for key, sound in made._sound().items() if not sound]:
            raise ValueError(f"its {wrong[0]} cannot be {str(getattr(made, wrong[0]))[:50]!r}")
        kind_of(made.prediction)
        return made

    def _sound(self) -> dict[str, bool]:
        """Of each field whether it has a value that it can have."""
        sides = [it for it in (self.resize, self.crop) if it is not None]
        numbers = [*self.scores, self.temperature or 1.0] if isinstance(self.scores, list) else [""]
        return {
            "classes": _is_list_of(self.classes, str) and bool(self.classes),
            "channels": is_side(self.channels),
            "size": self.size is None or (len(self.size) == 2 and all(map(is_side, self.size))),
            "resize": all(map(is_side, sides)) and sides == sorted(sides, reverse=True),
            "members": isinstance(self.members, int) and self.members > 0,
            "prediction": isinstance(self.prediction, Mapping) and "prediction" in self.prediction,
            "scores": _is_list_of(numbers, int | float) and bool(np.isfinite(numbers).all()),
            "temperature": self.temperature is None or self.temperature > 0,
            "origin": isinstance(self.origin, Mapping),
        }

    def in_header(self) -> dict[str, Any]:
        """As a weights file's header has it, which says by itself what made them."""
        return {key: value for key, value in asdict(self).items() if key != "origin"}

    @property
    def mode(self) -> str:
        """Of pictures, as Pillow calls it: L or RGB."""
        return "L" if self.channels == 1 else "RGB"

    def threshold(self, coverage: float) -> float:
        """The probability that a class of a conformal set has at least.

        Sets of all classes with at least this probability hold the label of at least the share
        `coverage` of images that are drawn as the study's validation images were
        [Sadinle et al. 2019]; also with the most probable class added to each, so that none is
        empty. T* has been fitted to the same images, a single number.

        Raises:
            InputError: nothing is known of validation images.
        """
        if not self.scores:
            raise InputError(
                "nothing is known of validation images, so no coverage can be promised"
            )
        return 1 - float(threshold(np.array(self.scores), coverage))


def _is_list_of(values: Any, kind: Any) -> bool:
    return isinstance(values, list) and all(isinstance(it, kind) for it in values)


class Answers(NamedTuple):
    """What a student says of B images: after temperature scaling, in nats."""

    probabilities: Array
    """(B, K), softmax(log p̄ / T) of its mean prediction p̄."""
    member_probabilities: Array
    """(B, M, K), the same of every member; of a Dirichlet its mean."""
    entropy: Array
    """(B,), of `probabilities`."""
    mutual_information: Array | None
    """(B,): what members disagree about, the entropy of the mean of `member_probabilities` minus
    the mean of their entropies; of a Dirichlet that of its own, which knows no temperature. None
    for one network with a softmax."""


class Predictor(Protocol):
    """A student that can be asked."""

    deployment: Deployment

    def __call__(self, images: NDArray[np.uint8]) -> Answers:
        """What it says of images uint8 (B, C, H, W)."""
        ...


def answers(prediction: Prediction, temperature: float) -> Answers:
    """What stored logits (B, M, K) say.

    >>> said = answers(Mixture(np.log([[[0.9, 0.1], [0.5, 0.5]]])), temperature=1.0)
    >>> said.probabilities.round(4).tolist(), said.entropy.round(4).tolist()
    ([[0.7, 0.3]], [0.6109])
    >>> said.mutual_information.round(4).tolist()
    [0.1017]
    """
    probabilities = apply_temperature(prediction.probs(), temperature)
    entropy = metrics.entropy(probabilities, "none")
    if isinstance(prediction, Mixture):
        scaled = Mixture(prediction.logits / temperature)
        found = scaled.mutual_information()
        return Answers(probabilities, scaled.member_probs(), entropy, found)
    members = prediction.member_probs()
    flat = apply_temperature(members.reshape(-1, members.shape[-1]), temperature)
    found = prediction.mutual_information()
    return Answers(probabilities, flat.reshape(members.shape), entropy, found)


def conformal_sets(probabilities: Array, limit: float) -> NDArray[np.bool_]:
    """Which classes are in the sets of `Deployment.threshold`, (B, K): those with at least that
    probability, and the most probable one.

    >>> conformal_sets(np.array([[0.5, 0.3, 0.2], [0.4, 0.3, 0.3]]), 0.45).tolist()
    [[True, False, False], [True, False, False]]
    """
    inside = probabilities >= limit
    inside[np.arange(len(inside)), probabilities.argmax(1)] = True
    return inside


def joined(parts: Sequence[Answers]) -> Answers:
    """The answers of several batches as one.

    >>> said = answers(Mixture(np.zeros((2, 1, 3))), temperature=1.0)
    >>> joined([said, said]).entropy.shape
    (4,)
    """
    columns: Any = zip(*parts, strict=True)
    each: Any = [None if it[0] is None else np.concatenate(it) for it in columns]
    return Answers(*each)


class TorchStudent:
    """A student in memory, computed by PyTorch where its weights are.

    Args:
        student: trained.
        deployment: what is known of it.
        made: what made its weights, as their file's header says it.
        history: of its training, as of `training.fit`; none of a student that was loaded.
    """

    def __init__(
        self,
        student: "Student",
        deployment: Deployment,
        made: Mapping[str, Any],
        history: Sequence[Mapping[str, float]] = (),
    ):
        self.student, self.deployment = student, deployment
        self.made, self.history = made, history

    def __call__(self, images: NDArray[np.uint8]) -> Answers:
        import torch

        from ensdistill.students import predict

        device = next(self.student.parameters()).device
        logits = predict(self.student, torch.from_numpy(images).to(device))
        prediction = kind_of(self.deployment.prediction)(logits)
        return answers(prediction, self.deployment.temperature or 1.0)


class StudentWeights(TorchStudent):
    """A student of a weights file.

    Args:
        path: weights, where a study has them, or elsewhere; there classes have numbers, and no
            temperature is known, unless the file says so itself.
        device: where it computes.
        network: what it is made of, if that was a module in memory.

    Raises:
        InputError: as of `weights.load_student`.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        device: str = "cpu",
        network: "nn.Module | None" = None,
    ):
        from ensdistill.weights import load_student

        student, header = load_student(path, device, network), read_header(path)
        made = {key: value for key, value in header.items() if key not in ("spec", "deployment")}
        super().__init__(student, deployment_of(path, header), made)


def open_student(path: str | os.PathLike[str], device: str = "cpu") -> Predictor:
    """A student that can be asked, from a weights file or, by its ending, an exported one.

    `.onnx` is computed without PyTorch, on the CPU; a `.pt2` file must be trusted.

    Raises:
        InputError: there is no such file, or it holds no student.
    """
    from ensdistill.exported import OnnxStudent, TorchExported

    ending = Path(path).suffix.lower()
    if ending == ".onnx":
        return OnnxStudent(path)
    return TorchExported(path, device) if ending == ".pt2" else StudentWeights(path, device)


def deployment_of(
    path: str | os.PathLike[str], header: Mapping[str, Any] | None = None
) -> Deployment:
    """What is known of a student by its weights, and by the study in whose folder they lie.

    Weights that `ensdistill.save` or a card wrote say all of it themselves, in their header.

    Args:
        path: the weights.
        header: theirs, if it has been read already.

    Raises:
        InputError: as of `read_header`, or a file of the study is damaged.
    """
    from ensdistill.images import read_description

    header = read_header(path) if header is None else header
    kept = ("study", "method", "replicate", "digest", "ensdistill", "torch")
    origin = {key: header[key] for key in kept if key in header}
    if "deployment" in header:
        try:
            deployed = Deployment.of({**header["deployment"], "origin": origin})
            network = header["spec"]["architecture"]
            shape = network["num_classes"], network["in_channels"]
            if (len(deployed.classes), deployed.channels) != shape:
                raise ValueError("its classes or channels are not those of its network")
            return deployed
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path}: its header is not of this version ({error})") from error
    keys = {"prediction", "concentration_offset"} & header.keys()
    prediction = {"prediction": "mixture"} | {key: header[key] for key in sorted(keys)}
    try:
        spec, digest = header["spec"], header["digest"]
        known: dict[str, Any] = {
            "classes": [str(it) for it in range(spec["architecture"]["num_classes"])],
            "channels": spec["architecture"]["in_channels"],
            "members": spec.get("samples", spec["members"]),  # samples, of students with some
            "prediction": prediction,
            "origin": origin,
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise DamagedFile(path, f"not weights of this package ({error})") from error
    folder = study_folder(path)
    if folder is None:
        logger.warning(
            "%s: lies in no study's folder: its classes have numbers, no temperature is known, and "
            "pictures are taken as they are",
            path,
        )
        return Deployment(**known)
    images = read_description(folder / "images.h5")
    known |= {"classes": images["classes"], "size": tuple(images["shape"][1:])}
    evaluation = images.get("evaluation")
    if evaluation:
        known |= {"resize": evaluation["resize"], "crop": evaluation["crop"]}
    logits = folder / "logits" / Path(path).absolute().parent.relative_to(folder)
    calibration = _calibration(logits.with_suffix(".h5"), digest)
    return Deployment(**known, **calibration)


def study_folder(path: str | os.PathLike[str]) -> Path | None:
    """The folder of the study that weights lie in: `<study>/teachers/0/weights.safetensors` or
    `<study>/students/kd/0/weights.safetensors`; None if they lie elsewhere.

    >>> study_folder("elsewhere/weights.safetensors") is None
    True
    """
    for folder in Path(path).absolute().parents[2:4]:
        if (folder / "images.h5").exists():
            return folder
    return None


def _calibration(path: Path, digest: str) -> dict[str, Any]:
    """Temperature and scores, by the logits of validation images, if they are of these weights."""
    from ensdistill.predictions import read_attributes

    if not path.exists() or read_attributes(path).get("weights") != digest:
        logger.warning("%s: no logits of these weights: no temperature is known", path)
        return {}
    return calibrated(*read_prediction(path, "val"))


def calibrated(prediction: Prediction, labels: NDArray[np.int64]) -> dict[str, Any]:
    """`temperature` and `scores` of a `Deployment`, by what a student says of validation images."""
    probs = prediction.probs()
    temperature = optimal_temperature(probs, labels)
    half = calibration_half(len(labels))
    scores = label_scores(lac_scores, apply_temperature(probs[half], temperature), labels[half])
    if len(scores) > MOST_SCORES:
        scores = np.random.default_rng(0).choice(scores, MOST_SCORES, replace=False)
    return {"temperature": temperature, "scores": np.sort(scores).tolist()}
