"""Networks from elsewhere, as config.yaml may say it: teachers that exist, and what is judged.

A *teacher* of the pool can have an architecture of its own, and weights that were trained
elsewhere. What is *judged* is another's method: its weights, or its logits alone, get a row beside
the students. The Snakefile reads this module in every process, so it does not import PyTorch; what
the weights become is in adoption.py, and what logits become in given_logits.py.
"""

import re
from collections.abc import Mapping
from typing import Annotated, Any, Self

from pydantic import BeforeValidator, Field, model_validator

from ensdistill.architectures import NamedArchitecture
from ensdistill.methods import Label
from ensdistill.sections import Number, Positive, Section

OF_ENSEMBLES = r"DE-\d+|teachers?"
"""Labels that no method can have."""

AS_THEY_ARE: dict[str, str | None] = {}
NONE_JUDGED: dict[str, "Judged"] = {}

Classes = Annotated[list[str], Field(min_length=2)]


class Elsewhere(Section):
    """How the weights of a network that was trained elsewhere are to be read."""

    architecture: NamedArchitecture | None = None
    """Its architecture; the study's unless told."""
    prefixes: dict[str, str | None] = AS_THEY_ARE
    """How keys of the file begin, and how they begin here: {"backbone.": ""}; null leaves such
    keys out. A beginning that all keys share, such as `module.`, is recognised by itself."""
    classes: Classes | None = None
    """Names of the classes in the order of the network's outputs; the study's order unless told, or
    unless the file has `classes` or `class_to_idx`. Of more classes than the study's just those
    count."""
    mean: list[Number] | None = None
    """Mean of the pixels in [0, 1] that the network expects to be subtracted, per channel; that of
    the study's training images unless told."""
    std: list[Positive] | None = None
    """Standard deviation by which they are to be divided."""

    @model_validator(mode="after")
    def _normalises_by_both(self) -> Self:
        if (self.mean is None) != (self.std is None):
            raise ValueError("'mean' and 'std' need each other")
        if self.mean is not None and self.std is not None and len(self.mean) != len(self.std):
            raise ValueError("'mean' and 'std' have a number per channel each")
        if self.classes and len({*self.classes}) < len(self.classes):
            raise ValueError("'classes' has a name twice")
        return self

    def _check_use(self, of_weights: str, keys: set[str]) -> None:
        """Keys that are about a file of weights need one."""
        if given := sorted(self.model_fields_set & keys):
            raise ValueError(f"{given[0]!r} is about {of_weights}, and there is none")


class Teacher(Elsewhere):
    """A teacher of the pool."""

    weights: str | None = None
    """A file of weights: of this package, a state dict in safetensors, or one by torch.save, alone
    or under `state_dict`, `model` or `model_state_dict`. The teacher is trained here unless told;
    relative to where snakemake runs."""

    @model_validator(mode="after")
    def _has_weights_to_be_read(self) -> Self:
        if self.weights is None:
            self._check_use("'weights'", {"prefixes", "classes", "mean", "std"})
        return self

    def source(self, place: int) -> str | None:
        """The file of the teacher at a place of the pool, this one's."""
        return self.weights


def _as_teacher(value: Any) -> Any:
    """A path alone stands for the teacher with those weights."""
    return {"weights": value} if isinstance(value, str) else value


Teachers = Annotated[
    list[Annotated[Teacher, BeforeValidator(_as_teacher, json_schema_input_type=str | Teacher)]],
    Field(min_length=2),
]


def _as_files(value: Any) -> Any:
    """One path stands for a list of just that one."""
    return [value] if isinstance(value, str) else value


Files = Annotated[
    list[str],
    Field(min_length=1),
    BeforeValidator(_as_files, json_schema_input_type=str | list[str]),
]


class Judged(Elsewhere):
    """A method of others, trained anywhere, that gets a row beside the students."""

    label: Label
    """The system's name in tables and figures."""
    weights: Files | None = None
    """Files of weights, one per seed: of this package with any kind of student, or a state dict of
    one network as of a teacher."""
    logits: Files | None = None
    """Instead, HDF5 files of its logits on the study's validation and test images, one per seed."""
    shifted: Files | None = None
    """For `logits`: the same on the images of shifted.h5, in the same order of seeds."""

    @model_validator(mode="after")
    def _is_weights_or_logits(self) -> Self:
        if (self.weights is None) == (self.logits is None):
            raise ValueError("one of 'weights' and 'logits' is needed, not both")
        if self.weights is None:
            self._check_use("'weights'", {"architecture", "prefixes", "mean", "std"})
        if self.shifted is not None and len(self.shifted) != len(self.logits or ()):
            raise ValueError("'shifted' needs a file for each of 'logits'")
        return self

    @property
    def files(self) -> list[str]:
        """One per seed."""
        return self.weights or self.logits or []

    def source(self, seed: int) -> str:
        """The file of a seed."""
        return self.files[seed]

    @property
    def folder(self) -> str:
        """Beside `teachers` and `students`, where what is made of its files lies."""
        return "judged" if self.weights else "given"

    @property
    def has(self) -> frozenset[str]:
        """Which files there are of it, as rules write those of students."""
        of_logits = {"logits/{}.h5", *(["logits/shifted/{}.h5"] if self.has_shifted else [])}
        return frozenset({"{}/weights.safetensors", *of_logits} if self.weights else of_logits)

    @property
    def has_shifted(self) -> bool:
        """Whether its logits on shifted images are known."""
        return self.weights is not None or self.shifted is not None


def pool_of(given: Mapping[str, Any], teachers: list[Teacher] | None) -> dict[str, int]:
    """`members` and `pool` as the list of teachers has them; none if there is no list.

    Args:
        given: those of the two that the configuration sets.

    Raises:
        ValueError: it sets another `pool`.
    """
    if teachers is None:
        return {}
    count = len(teachers)
    if given.get("pool", count) != count:
        raise ValueError(f"'pool' is {given['pool']}, and 'teachers' lists {count}")
    return {"members": count, "pool": count, **given}


def check_judged(judge: Mapping[str, Judged], methods: Mapping[str, str]) -> None:
    """Refuse names and labels that are taken.

    Args:
        judge: by name.
        methods: labels of the study's methods, by name.

    Raises:
        ValueError: two have one name or one label.
    """
    taken = [*methods.values()]
    for name, judged in judge.items():
        if name in methods:
            raise ValueError(f"{name!r} is a name in 'methods' and in 'judge'")
        if judged.label in taken or re.fullmatch(OF_ENSEMBLES, judged.label):
            raise ValueError(f"the label {judged.label!r} of judge.{name} is already taken")
        taken.append(judged.label)
