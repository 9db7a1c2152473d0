"""The typed configuration: what config.yaml may say, with defaults, and its JSON schema.

`python -m ensdistill.studies` prints the schema that editors use (config.schema.json).
"""

import json
import re
from collections.abc import Mapping
from fractions import Fraction
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    WithJsonSchema,
    model_validator,
)

from ensdistill import InputError
from ensdistill.config_errors import sentence

Name = Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_]*$")]
Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]


SCORES = ("acc", "nll", "bs", "ece", "nll_ts", "bs_ts", "ece_ts")
"""Metrics of which there are published results."""


def parse_network_name(name: str) -> tuple[str, int, int]:
    """(family, depth, widening factor) of `resnet{6n+2}` or `wrn{6n+4}x{k}`; else ValueError."""
    if match := re.fullmatch(r"resnet-?(\d+)", name):
        family, depth, widen, rest = "resnet", int(match[1]), 1, 2
    elif match := re.fullmatch(r"wrn-?(\d+)[x_-](\d+)", name):
        family, depth, widen, rest = "wrn", int(match[1]), int(match[2]), 4
    else:
        raise ValueError(f"unknown network {name!r}: try resnet32 or wrn28x10")
    if depth <= rest or (depth - rest) % 6 or widen < 1:
        raise ValueError(f"{name!r} does not exist: a {family} has 6n+{rest} layers, n ≥ 1")
    return family, depth, widen


def _fraction(value: Any) -> Any:
    """Lets a step be written as pixels are counted: 1/255."""
    try:
        return float(Fraction(value)) if isinstance(value, str) else value
    except (ValueError, ArithmeticError):
        raise ValueError(f"{value!r} is neither a number nor a fraction such as 1/255") from None


Eta = Annotated[
    float,
    BeforeValidator(_fraction),
    Field(ge=0),
    WithJsonSchema({"anyOf": [{"type": "number", "minimum": 0}, {"type": "string"}]}),
]


class Section(BaseModel):
    """A part of the configuration: no unknown keys, no silent conversions."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )


class Images(Section):
    """Where images come from and how many each split has."""

    source: Literal["digits", "cifar10", "cifar100", "svhn", "tinyimagenet", "folder"] = "digits"
    """`digits` ships with scikit-learn, `folder` is your own data, the others are downloaded."""
    path: str | list[str] | None = None
    """For `folder`: a directory or tar/zip archives that hold train/<class>/… and
    test/<class>/…, or a directory of such archives; relative to where snakemake runs."""
    size: Count | None = None
    """For `folder`: side in pixels to which images are resized and centre-cropped. Without it
    all images must already have one size."""
    train: Count | None = None
    """Training images: a seeded stratified subset of this many; all that are left unless told."""
    validation: Count = 5000
    """Images taken from the training split for validation: the last ones of CIFAR (the official
    split), otherwise a seeded stratified choice."""
    test: Count | None = None
    """Test images: a seeded stratified subset of this many; all unless told."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of the stratified choices."""

    @model_validator(mode="after")
    def _path_goes_with_folder(self) -> Self:
        if (self.source == "folder") != (self.path is not None):
            raise ValueError("'path' and the source 'folder' need each other")
        return self


class Corruptions(Section):
    """Corrupted copies of test images: 19 kinds, 5 severities [Hendrycks & Dietterich 2019]."""

    source: Literal["copies", "official"] = "copies"
    """`copies`: made here from the study's test images, with ImageNet-C's severities;
    `official`: the archives CIFAR-10-C and CIFAR-100-C, for all test images of the sources cifar10
    and cifar100."""
    images: Count | None = 500
    """Images that are corrupted: a seeded stratified choice of the test split; null for all."""


class OutOfDistribution(Section):
    """Images of other things, which a network should be unsure about."""

    source: Literal[
        "photographs", "digits", "cifar10", "cifar100", "svhn", "tinyimagenet", "folder"
    ] = "photographs"
    """`photographs`: pieces of the two photographs that ship with scikit-learn; else the test
    split of a source. Brought to the size and channels of the study's images."""
    path: str | list[str] | None = None
    """For `folder`: as in `images`."""
    images: Count | None = 500
    """How many: a seeded stratified choice; null for all (of the photographs: 2,000 pieces)."""

    @model_validator(mode="after")
    def _path_goes_with_folder(self) -> Self:
        if (self.source == "folder") != (self.path is not None):
            raise ValueError("'path' and the source 'folder' need each other")
        return self


class Network(Section):
    """The architecture of teachers and students."""

    name: str = "resnet32"
    """`resnet{6n+2}`, such as resnet32, or `wrn{6n+4}x{k}`, such as wrn28x10."""
    width: Count = 16
    """Channels of the first stage (of a WRN: before the factor k)."""

    @model_validator(mode="after")
    def _exists(self) -> Self:
        parse_network_name(self.name)
        return self


class Augmentation(Section):
    """Random changes to training images, drawn anew every epoch."""

    crop_padding: Annotated[int, Field(ge=0)] = 4
    """Pixels of zero padding before a random crop back to the image's size."""
    flip: bool = True
    """Whether half of the images are mirrored left to right."""


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


class TeacherRecipe(Recipe):
    """A recipe with the teachers' defaults."""

    batch_size: Count = 256
    """Images per step."""
    learning_rate: Positive = 0.2
    """Peak learning rate."""


class Distillation(Section):
    """Settings of the distillation loss that every method uses unless it has its own."""

    alpha: Share = 0.9
    """α: weight of the teachers against the labels."""
    temperature: Positive = 4.0
    """τ: temperature of the softmax, in the loss and in the perturbations."""
    eta: Eta = 1 / 255
    """η: root-mean-square size of a perturbation, in units of the pixel range [0, 1]; a number
    or a fraction such as 1/255."""


class Analyses(Section):
    """How many images the costlier analyses look at; seeded choices."""

    train_images: Count = 1000
    """Training images of the sweep over η and of transferability; all if there are fewer."""
    jacobian_images: Count = 200
    """Test images whose Jacobians are compared; all if there are fewer."""


class Method(Section):
    """One way to train a student: a row of the results table."""

    label: str
    """The system's name in tables and figures."""
    objective: Literal["cross_entropy", "one_to_one", "ensemble_mean"] = "one_to_one"
    """`cross_entropy`: labels only; `one_to_one`: teacher j teaches member j;
    `ensemble_mean`: the teachers' mean probabilities teach every member."""
    perturbation: Literal["none", "gaussian", "ods", "conf_ods"] = "none"
    """At which inputs the student meets its teachers."""
    network: Literal["batch_ensemble", "single"] = "batch_ensemble"
    """A BatchEnsemble with as many members as there are teachers, or one ordinary network."""
    alpha: Share | None = None
    """α of this method alone."""
    temperature: Positive | None = None
    """τ of this method alone."""
    eta: Eta | None = None
    """η of this method alone."""

    @model_validator(mode="after")
    def _is_meaningful(self) -> Self:
        if self.objective == "cross_entropy" and self.perturbation != "none":
            raise ValueError("objective 'cross_entropy' uses no perturbation")
        if self.objective == "one_to_one" and self.network == "single":
            raise ValueError("objective 'one_to_one' needs network 'batch_ensemble'")
        return self


class Published(Section):
    """Results that others published for the same study, shown beside ours."""

    source: str
    """Where they stand."""
    scores: Annotated[dict[str, dict[Literal[*SCORES], float]], Field(min_length=1)]
    """By system (DE-m or a method's label) and metric."""


class Study(Section):
    """One data set, one architecture, one ensemble and the students that learn from it."""

    images: Images = Images()
    """The data."""
    corruptions: Corruptions = Corruptions()
    """Corrupted test images, to see how uncertainty grows with the shift."""
    out_of_distribution: OutOfDistribution = OutOfDistribution()
    """Images that belong to none of the classes, to see whether uncertainty tells them apart."""
    network: Network = Network()
    """The architecture."""
    members: Annotated[int, Field(ge=2)] = 4
    """M: teachers in the ensemble, and members of a BatchEnsemble student."""
    pool: Count = 5
    """Teachers trained; the first `members` of them teach, all make the deep-ensemble curve."""
    student_seeds: Count = 3
    """Students trained per method, from different seeds."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of training: float32, or bfloat16 autocast. Logits are always stored from
    float32."""
    augmentation: Augmentation = Augmentation()
    """Random changes to training images."""
    teacher: TeacherRecipe = TeacherRecipe()
    """How teachers are trained."""
    student: Recipe = Recipe()
    """How students are trained."""
    distillation: Distillation = Distillation()
    """The loss's settings, shared by the methods."""
    analyses: Analyses = Analyses()
    """The costlier analyses."""
    confidence_bins: Count = 15
    """Equal-width bins of calibration errors, reliability diagrams and diversity figures."""
    published: Published | None = None
    """Published results, for the tables."""
    methods: Annotated[dict[Name, Method], Field(min_length=1)] = {
        "be": Method(label="BE", objective="cross_entropy"),
        "kd_single": Method(label="KD-single", objective="ensemble_mean", network="single"),
        "kd": Method(label="KD"),
        "kd_gaussian": Method(label="KD+Gaussian", perturbation="gaussian"),
        "kd_ods": Method(label="KD+ODS", perturbation="ods"),
        "kd_conf_ods": Method(label="KD+ConfODS", perturbation="conf_ods"),
    }
    """The students, in the order of the table's rows; the paper's six unless told."""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.pool < self.members:
            raise ValueError(f"'pool' ({self.pool}) is smaller than 'members' ({self.members})")
        labels = [method.label for method in self.methods.values()]
        for label in labels:
            if labels.count(label) > 1 or re.fullmatch(r"DE-\d+|teachers?", label):
                raise ValueError(f"the label {label!r} in 'methods' is already taken")
        systems = [*labels, *(f"DE-{size}" for size in range(1, self.pool + 1))]
        for system in self.published.scores if self.published else ():
            if system not in systems:
                raise ValueError(f"'published' has {system!r}; this study has {', '.join(systems)}")
        source = self.images.source
        if self.corruptions.source == "official" and (
            source not in ("cifar10", "cifar100") or self.images.test is not None
        ):
            raise ValueError(
                "corruptions of source 'official' need images of source 'cifar10' or 'cifar100', "
                "with 'test' null"
            )
        if self.out_of_distribution.source == source != "folder":
            raise ValueError(f"'out_of_distribution' and 'images' have one source, {source!r}")
        return self

    def method(self, name: str) -> dict[str, Any]:
        """All settings of a method, with the study's α, τ and η where it has none of its own.

        Settings that the method's objective and perturbation do not use are left out, so that
        a change of them changes nothing.
        """
        method = self.methods[name]
        settings = {
            key: value if (value := getattr(method, key)) is not None else default
            for key, default in self.distillation.model_dump().items()
        }
        if method.objective == "cross_entropy":
            settings = {}
        elif method.perturbation == "none":
            del settings["eta"]
        return {"objective": method.objective, "perturbation": method.perturbation, **settings}


class Configuration(Section):
    """The whole of config.yaml."""

    run: Annotated[list[str], Field(min_length=1)]
    """The studies that `snakemake` without targets makes."""
    studies: Annotated[dict[Name, Study], Field(min_length=1)]
    """Studies by name; results go to results/<name>."""

    @model_validator(mode="after")
    def _runs_what_exists(self) -> Self:
        for name in self.run:
            if name not in self.studies:
                raise ValueError(f"'run' names the study {name!r}, which 'studies' does not have")
        return self


def read_configuration(config: Mapping[str, Any]) -> Configuration:
    """Check a configuration.

    Raises:
        InputError: with one sentence naming the study, the key and what is wrong.
    """
    try:
        return Configuration.model_validate(config)
    except ValidationError as error:
        raise InputError(sentence(error, Configuration.model_json_schema())) from None


if __name__ == "__main__":
    print(json.dumps(Configuration.model_json_schema(), indent=2, ensure_ascii=False))
