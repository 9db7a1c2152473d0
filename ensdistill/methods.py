"""What config.yaml may say of a method: the options and traits of its three axes.

A method is a student (what is trained), an objective (what it minimises) and a perturbation (at
which inputs the teachers are asked). config.yaml names each, alone or with its own options:
`perturbation: ods`, or `perturbation: {name: ods, eta: 4/255}`. What is computed under these names
is in students.py, objectives.py and perturbations.py. The Snakefile reads this module in every
process, so it does not import PyTorch.
"""

import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    create_model,
    field_validator,
    model_validator,
)

from ensdistill.sections import Count, Eta, Positive, Section, Share, as_section, one_of

# --- architectures ---------------------------------------------------------------------------


class Family(NamedTuple):
    """How the names of some architectures are written."""

    pattern: str
    """A regular expression; its groups are the sizes that the builder takes."""
    beside_blocks: int | None = None
    """Where depth is a size: it must be 6n and so many layers, n ≥ 1."""


ARCHITECTURES = {
    "resnet": Family(r"resnet-?(?P<depth>\d+)", beside_blocks=2),
    "wrn": Family(r"wrn-?(?P<depth>\d+)[x_-](?P<widen>\d+)", beside_blocks=4),
}
"""By family; the builders are in networks.ARCHITECTURES."""


def parse_architecture(name: str) -> tuple[str, dict[str, int]]:
    """Family and sizes of a name such as `resnet32` (depth) or `wrn28x10` (depth and widen).

    Raises:
        ValueError: there is no such family, or no such size.
    """
    for family, (pattern, beside) in ARCHITECTURES.items():
        if match := re.fullmatch(pattern, name):
            sizes = {key: int(value) for key, value in match.groupdict().items()}
            if beside is not None and (sizes["depth"] <= beside or (sizes["depth"] - beside) % 6):
                raise ValueError(
                    f"{name!r} does not exist: a {family} has 6n+{beside} layers, n ≥ 1"
                )
            if not all(sizes.values()):
                raise ValueError(f"{name!r} does not exist: its sizes must be at least 1")
            return family, sizes
    raise ValueError(f"unknown architecture {name!r}: try resnet32 or wrn28x10")


class Architecture(Section):
    """The layers of a network."""

    name: str = "resnet32"
    """`resnet{6n+2}`, such as resnet32, or `wrn{6n+4}x{k}`, such as wrn28x10."""
    width: Count = 16
    """Channels of the first stage (of a WRN: before the factor k)."""

    @field_validator("name")
    @classmethod
    def _exists(cls, name: str) -> str:
        parse_architecture(name)
        return name


NamedArchitecture = Annotated[
    Architecture, BeforeValidator(as_section, json_schema_input_type=str | Architecture)
]


# --- recipes ---------------------------------------------------------------------------------


class Recipe(Section):
    """How networks of one role are trained: stochastic gradient descent and its schedule."""

    epochs: Count = 300
    """Passes over the training split."""
    batch_size: Count = 64
    """Images per step; a BatchEnsemble of M members makes M rows of each."""
    learning_rate: Positive = 0.05
    """Peak learning rate; the BatchEnsemble factors r and s get half of it."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Momentum of SGD."""
    weight_decay: Annotated[float, Field(ge=0)] = 5e-4
    """Weight decay; none on the BatchEnsemble factors r and s."""
    schedule: Literal["warmup_linear", "cosine"] = "warmup_linear"
    """`warmup_linear`: 1 until half of the epochs, linearly to 0.01 at 90 %, then 0.01;
    `cosine`: half a cosine to 0. Both after the warm-up."""
    warmup_epochs: Count = 5
    """Epochs in which the learning rate grows linearly from 0.01 of its peak to its peak."""
    validate_every: Count = 30
    """Epochs between validations; the last tenth of the epochs is always validated, and the
    network with the best validation accuracy is kept."""

    @model_validator(mode="after")
    def _warms_up_in_time(self) -> Self:
        if self.warmup_epochs > self.epochs:
            raise ValueError("'warmup_epochs' is larger than 'epochs'")
        return self


RecipeChanges = create_model(
    "RecipeChanges",
    __base__=Section,
    __doc__="Settings of a recipe that differ; null for the study's.",
    **{
        name: (
            Annotated[(field.annotation, Field(), *field.metadata)] | None,
            Field(None, description=field.description),
        )
        for name, field in Recipe.model_fields.items()
    },
)


# --- students --------------------------------------------------------------------------------


class StudentOptions(Section):
    """Options that every student has."""

    has_members: ClassVar[bool]
    """Whether it has as many members as there are teachers, so that each can learn from one."""
    prediction: ClassVar[str] = "mixture"
    """What its stored logits mean: a key of `predictions.PREDICTIONS`."""

    architecture: NamedArchitecture | None = None
    """The architecture of this method's students; the study's unless told."""


class Single(StudentOptions):
    """One ordinary network."""

    has_members = False

    name: Literal["single"] = "single"
    """Chooses this student."""


class BatchEnsemble(StudentOptions):
    """M members that share one set of weights and differ by rank-one factors."""

    has_members = True

    name: Literal["batch_ensemble"] = "batch_ensemble"
    """Chooses this student."""


# --- objectives ------------------------------------------------------------------------------


class ObjectiveOptions(Section):
    """The traits of an objective."""

    needs_teachers: ClassVar[bool] = True
    """Whether teachers are asked."""
    needs_members: ClassVar[bool] = False
    """Whether it teaches member by member."""


class Labels(ObjectiveOptions):
    """Cross-entropy with the labels."""

    needs_teachers = False

    name: Literal["labels"] = "labels"
    """Chooses this objective."""


class DistillationOptions(ObjectiveOptions):
    """Options of a loss with teachers; what a method does not set is the study's."""

    alpha: Share | None = None
    """α: weight of the teachers against the labels."""
    temperature: Positive | None = None
    """τ: temperature of the softmax, in the loss and in the perturbation."""


class OneToOne(DistillationOptions):
    """Teacher j teaches member j."""

    needs_members = True

    name: Literal["one_to_one"] = "one_to_one"
    """Chooses this objective."""


class EnsembleMean(DistillationOptions):
    """The teachers' mean probabilities teach every member."""

    name: Literal["ensemble_mean"] = "ensemble_mean"
    """Chooses this objective."""


# --- perturbations ---------------------------------------------------------------------------


class PerturbationOptions(Section):
    """The traits of a perturbation."""

    passes: ClassVar[int] = 2
    """Forward passes of the student in a step: a second one where x_distill is not x."""
    teacher_gradients: ClassVar[int] = 0
    """Gradients of a teacher's output with respect to its input in a step."""


class NoPerturbation(PerturbationOptions):
    """The images as they are."""

    passes = 1

    name: Literal["none"] = "none"
    """Chooses this perturbation."""


class Gaussian(PerturbationOptions):
    """Gaussian noise of standard deviation η."""

    name: Literal["gaussian"] = "gaussian"
    """Chooses this perturbation."""
    eta: Eta | None = None
    """η: root-mean-square size of the step per pixel, in units of the pixel range [0, 1]; the
    study's unless told."""


class ODS(Gaussian):
    """A step of size η in a direction that diversifies one teacher's output."""

    teacher_gradients = 1

    name: Literal["ods"] = "ods"
    """Chooses this perturbation."""
    temperature: Positive | None = None
    """τ of the softmax that is diversified; that of the objective unless told."""


class ConfODS(ODS):
    """ODS times the teacher's confidence."""

    name: Literal["conf_ods"] = "conf_ods"
    """Chooses this perturbation."""


# --- methods ---------------------------------------------------------------------------------


AnyStudent = one_of(BatchEnsemble, Single)
AnyObjective = one_of(OneToOne, EnsembleMean, Labels)
AnyPerturbation = one_of(NoPerturbation, Gaussian, ODS, ConfODS)


def _one_line(label: str) -> str:
    if not label or label != label.strip() or not label.isprintable():
        raise ValueError(f"{label!r} is no name: write one line, without blanks at its ends")
    return label


class Method(Section):
    """One way to train a student: a row of the results table."""

    label: Annotated[str, AfterValidator(_one_line)]
    """The system's name in tables and figures: one line, without blanks at its ends."""
    student: AnyStudent = BatchEnsemble()
    """What is trained."""
    objective: AnyObjective = OneToOne()
    """What it minimises."""
    perturbation: AnyPerturbation = NoPerturbation()
    """At which inputs the teachers are asked."""
    recipe: RecipeChanges = RecipeChanges()
    """Where its training differs from the study's `student`."""
    paper: Literal["be", "kd_single", "kd", "kd_gaussian", "kd_ods", "kd_conf_ods"] | None = None
    """Which method of Nam et al. (2021) it is; the page of the paper's claims speaks of these."""

    @model_validator(mode="before")
    @classmethod
    def _is_not_of_an_earlier_version(cls, value: Any) -> Any:
        if isinstance(value, Mapping):
            for key, now in OLD_KEYS.items():
                if key in value:
                    raise ValueError(f"{key!r} is now {now}")
            if as_section(value.get("objective")) == {"name": "cross_entropy"}:
                raise ValueError("objective 'cross_entropy' is now 'labels'")
        return value

    @model_validator(mode="after")
    def _parts_go_together(self) -> Self:
        objective, perturbation = self.objective, self.perturbation
        if not objective.needs_teachers and perturbation.passes > 1:
            raise ValueError(
                f"objective {objective.name!r} asks no teachers, so perturbation "
                f"{perturbation.name!r} has no use"
            )
        if objective.needs_members and not self.student.has_members:
            raise ValueError(
                f"objective {objective.name!r} needs a student with members, such as "
                f"'batch_ensemble', not {self.student.name!r}"
            )
        return self


OLD_KEYS = {
    "network": "'student'",
    "alpha": "an option of the objective: {name: one_to_one, alpha: 0.9}",
    "temperature": "an option of the objective: {name: one_to_one, temperature: 4}",
    "eta": "an option of the perturbation: {name: ods, eta: 1/255}",
}
"""Keys of earlier versions, and where their values are written now."""
