"""The typed configuration: what config.yaml may say, with defaults, and its JSON schema.

`python -m ensdistill.studies` prints the schema that editors use (config.schema.json).
"""

import json
import re
from collections.abc import Collection, Mapping
from typing import Annotated, Any, ClassVar, Literal, Self, cast

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from ensdistill import InputError
from ensdistill.architectures import Architecture, NamedArchitecture
from ensdistill.config_errors import sentence
from ensdistill.downloads import OFFICIAL_CORRUPTIONS, SOURCES
from ensdistill.methods import Grid, Method
from ensdistill.metrics import METRICS
from ensdistill.options import ONE, PerturbationOptions
from ensdistill.own_networks import (
    NONE_JUDGED,
    OF_ENSEMBLES,
    Judged,
    Teacher,
    Teachers,
    check_judged,
    pool_of,
)
from ensdistill.recipes import Augmentation, Recipe
from ensdistill.sections import Count, Eta, Number, Positive, Section, Seeds, Share

Name = Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_]*$")]


class Columns(Section):
    """What the columns of a table of images are called, where not as usual."""

    path: str | None = None
    """The paths of the images, from the table's folder: `path` unless told. In a saved dataset the
    images: its only column of them unless told."""
    label: str | None = None
    """The class of each image: `label` unless told."""
    split: str | None = None
    """train, validation or test: `split`, if there is such a column, unless told."""
    group: str | None = None
    """What must never be on both sides of a split, such as the patient: `group`, if there is such
    a column, unless told."""


class Images(Section):
    """Where images come from and how many each split has."""

    later: ClassVar[frozenset[str]] = frozenset({"columns", "resize"})
    source: Literal[*SOURCES] = "digits"  # type: ignore[valid-type]  # known when it runs
    """`digits` ships with scikit-learn, `folder` is your own data, the others are downloaded."""
    path: str | list[str] | None = None
    """For `folder`: a directory or tar/zip archives that hold train/<class>/… and
    test/<class>/…, or just <class>/…, or a directory of such archives; a table of paths and labels
    (.csv, .parquet); or a directory into which Hugging Face's `datasets` saved a dataset. Relative
    to where snakemake runs."""
    columns: Columns = Columns()
    """Of a table or a saved dataset: what its columns are called."""
    size: Count | None = None
    """For `folder`: side in pixels to which images are resized and centre-cropped. Without it
    all images must already have one size."""
    resize: Count | None = None
    """For `folder`: side in pixels to which the shorter side is resized before the centre of `size`
    is cropped; training images are kept at this size, for random crops. `size` unless told."""
    train: Count | None = None
    """Training images: a seeded stratified subset of this many; all that are left unless told."""
    validation: Count = 5000
    """Images taken from the training split for validation: the last ones of CIFAR (the official
    split), otherwise a seeded stratified choice. Of own data that say which images are for
    validation, at most so many of those."""
    held_out: Count | None = None
    """Images taken from the training split beside the validation images, on which no network is
    trained: where the perturbation `held_out` asks the teachers."""
    test: Count | None = None
    """Test images: a seeded stratified subset of this many; all unless told. Of own data that do
    not say which images are for testing, so many are chosen; a fifth unless told."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of the stratified choices."""

    @model_validator(mode="after")
    def _path_goes_with_folder(self) -> Self:
        if (self.source == "folder") != (self.path is not None):
            raise ValueError("'path' and the source 'folder' need each other")
        if self.path is None and self.columns != Columns():
            raise ValueError("'columns' needs a 'path'")
        if self.resize is not None and (self.size is None or self.resize < self.size):
            raise ValueError("'resize' needs a 'size' that is not larger")
        if self.resize is not None and self.path is None:
            raise ValueError("'resize' needs a 'path'")
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

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_ -]*$")] = "photographs"
    """What files and figures call them; the source's name unless told."""
    source: Literal["photographs", *SOURCES] = "photographs"  # type: ignore[valid-type]
    """`photographs`: pieces of the two photographs that ship with scikit-learn; else the test
    split of a source. Brought to the size and channels of the study's images."""
    path: str | list[str] | None = None
    """For `folder`: as in `images`, without need of train/ and classes; or just images."""
    images: Count | None = 500
    """How many: a seeded stratified choice; null for all (of the photographs: 2,000 pieces)."""

    @model_validator(mode="before")
    @classmethod
    def _is_called_like_its_source(cls, value: Any) -> Any:
        if isinstance(value, Mapping) and value.get("source") in [*SOURCES]:
            return {"name": value["source"], **value}
        return value

    @model_validator(mode="after")
    def _path_goes_with_folder(self) -> Self:
        if (self.source == "folder") != (self.path is not None):
            raise ValueError("'path' and the source 'folder' need each other")
        return self


PHOTOGRAPHS = [OutOfDistribution()]
NONE_DEPLOYED: list[str] = []


def _several(value: Any) -> Any:
    """One section stands for a list of just that one."""
    return [value] if isinstance(value, Mapping | Section) else value


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

    perturbed_images: Count = 100_000
    """Training images at which teachers are asked, as they are and perturbed; all if there are
    fewer."""
    train_images: Count = 1000
    """Training images of the sweep over η and of transferability; all if there are fewer."""
    jacobian_images: Count = 200
    """Test images whose Jacobians are compared; all if there are fewer."""


class Costs(Section):
    """How the time of a prediction is measured."""

    threads: Count = 1
    """Threads of the CPU that predict; whatever their number, nothing else runs meanwhile."""
    seconds: Positive = 5
    """What all timings of the study take together, unless few of them already take longer."""


class Deploy(Section):
    """Which students leave the study: with a model card, and all that the Hugging Face Hub takes
    beside it."""

    methods: list[Name] = NONE_DEPLOYED
    """Methods of whose first student there is a card when the study is made; of any other on
    demand."""
    export: bool = False
    """Whether these students are exported, too: each to one ONNX file, which takes some 15 seconds
    and `ensdistill[onnx]`."""


class Published(Section):
    """Results that others published for the same study, shown beside ours."""

    source: str
    """Where they stand."""
    scores: Annotated[
        dict[str, dict[Literal[*METRICS], Number]],  # type: ignore[valid-type]
        Field(min_length=1),
    ]
    """By system (DE-m or a method's label) and metric."""


PAPERS_METHODS = {
    "be": Method(label="BE", objective="labels", paper="be"),
    "kd_single": Method(label="KD-single", student="single", paper="kd_single"),
    "kd": Method(label="KD", paper="kd"),
    "kd_gaussian": Method(label="KD+Gaussian", perturbation="gaussian", paper="kd_gaussian"),
    "kd_ods": Method(label="KD+ODS", perturbation="ods", paper="kd_ods"),
    "kd_conf_ods": Method(label="KD+ConfODS", perturbation="conf_ods", paper="kd_conf_ods"),
}
"""The methods of Nam et al. (2021), and an ordinary student of the ensemble's mean."""

TEACHER = Method(label="teacher", student="single", objective="labels")
"""How teachers learn."""


class Study(Section):
    """One data set, one architecture, one ensemble and the students that learn from it."""

    later: ClassVar[frozenset[str]] = frozenset(
        {"cuda_graphs", "deploy", "gpus_per_job", "judge", "teachers"}
    )

    images: Images = Images()
    """The data."""
    corruptions: Corruptions = Corruptions()
    """Corrupted test images, to see how uncertainty grows with the shift."""
    out_of_distribution: Annotated[
        list[OutOfDistribution],
        Field(min_length=1),
        BeforeValidator(
            _several, json_schema_input_type=OutOfDistribution | list[OutOfDistribution]
        ),
    ] = PHOTOGRAPHS
    """Images that belong to none of the classes, to see whether uncertainty tells them apart: one
    set, or a list of sets, such as one near the study's images and one far from them."""
    architecture: NamedArchitecture = Architecture()
    """The architecture of teachers and, unless told, of students."""
    student_architecture: NamedArchitecture | None = None
    """The architecture of students; that of the teachers unless told. A method may have its own."""
    members: Annotated[int, Field(ge=2)] = 4
    """M: teachers in the ensemble, and members of a BatchEnsemble student."""
    pool: Seeds = 5
    """Teachers; the first `members` of them teach, all make the deep-ensemble curve."""
    teachers: Teachers | None = None
    """The teachers one by one, if they have different architectures or were trained elsewhere: a
    path of weights, or {architecture, weights, …}. `pool` is their number then, and so is `members`
    unless told."""
    student_seeds: Seeds = 3
    """Students trained per method, from different seeds."""
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"
    """Arithmetic of training: float32; on GPUs that have it TF32, which is float32 with products of
    10 bits; or bfloat16 autocast where the processor has bfloat16, else float32. Logits are always
    computed and stored in float32."""
    cuda_graphs: bool = False
    """Whether a GPU computes a training step as one CUDA graph, which a CPU begins by one call
    instead of many hundreds. Not yet tried on a GPU: tests replay steps on a CPU alone."""
    gpus_per_job: Count = 1
    """GPUs, or processes where there are none, that train one network together, each with an equal
    part of every batch; what it comes to is the same but for rounding."""
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
    costs: Costs = Costs()
    """What systems cost."""
    confidence_bins: Count = 15
    """Equal-width bins of calibration errors, reliability diagrams and diversity figures."""
    deploy: Deploy = Deploy()
    """Which students get a model card."""
    published: Published | None = None
    """Published results, for the tables."""
    methods: Annotated[dict[Name, Method], Field(min_length=1)] = PAPERS_METHODS
    """The students, in the order of the table's rows; the paper's six unless these or a grid are
    given."""
    grid: Grid | None = None
    """More methods, behind those: all students at all perturbations that go together."""
    judge: dict[Name, Judged] = NONE_JUDGED
    """Methods of others, trained anywhere, whose rows stand behind those of `methods`."""

    @model_validator(mode="before")
    @classmethod
    def _has_no_old_keys(cls, value: Any) -> Any:
        if isinstance(value, Mapping) and "network" in value:
            raise ValueError("'network' is now 'architecture'")
        return value

    @model_validator(mode="after")
    def _grid_becomes_methods(self) -> Self:
        if self.grid is not None:
            given = self.methods if "methods" in self.model_fields_set else {}
            try:
                found = self.grid.methods()
            except ValueError as error:
                raise ValueError(f"grid: {error}") from None
            if twice := given.keys() & found.keys():
                raise ValueError(f"{min(twice)!r} is a method of 'methods' and of 'grid'")
            papers = {method.paper for method in given.values()}
            found = {name: _of_the_paper(method, papers) for name, method in found.items()}
            # The section is frozen for all others.
            self.__dict__["methods"] = {**given, **found}
        return self

    @model_validator(mode="after")
    def _teachers_are_the_pool(self) -> Self:
        given = {key: getattr(self, key) for key in {"members", "pool"} & self.model_fields_set}
        self.__dict__.update(pool_of(given, self.teachers))
        return self

    @model_validator(mode="after")
    def _recipes_are_possible(self) -> Self:
        for name in self.methods:
            try:
                self.recipe(name)
            except ValidationError as error:
                message = error.errors()[0]["msg"].removeprefix("Value error, ")
                raise ValueError(f"methods.{name}.recipe: {message}") from None
        return self

    @model_validator(mode="after")
    def _several_devices_are_possible(self) -> Self:
        if self.cuda_graphs and self.gpus_per_job > 1:
            raise ValueError("'cuda_graphs' is for one GPU, and 'gpus_per_job' asks for more")
        recipes = {"teacher": self.teacher} | {
            f"methods.{name}": self.recipe(name) for name in self.methods
        }
        for name, recipe in recipes.items():
            if recipe.batch_size % self.gpus_per_job:
                raise ValueError(
                    f"{name}: a batch_size of {recipe.batch_size} images is no multiple of "
                    f"'gpus_per_job' ({self.gpus_per_job})"
                )
        return self

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.pool < self.members:
            raise ValueError(f"'pool' ({self.pool}) is smaller than 'members' ({self.members})")
        labels = [method.label for method in self.methods.values()]
        for label in labels:
            if labels.count(label) > 1 or re.fullmatch(OF_ENSEMBLES, label):
                raise ValueError(f"the label {label!r} in 'methods' is already taken")
        check_judged(self.judge, {name: method.label for name, method in self.methods.items()})
        labels += [judged.label for judged in self.judge.values()]
        papers = [method.paper for method in self.methods.values() if method.paper]
        for paper in papers:
            if papers.count(paper) > 1:
                raise ValueError(f"two of 'methods' have paper: {paper}")
        for name in self.deploy.methods:
            if name not in self.methods:
                raise ValueError(f"'deploy' names the method {name!r}, which 'methods' lacks")
        self._images_and_backbones_exist()
        systems = [*labels, *(f"DE-{size}" for size in range(1, self.pool + 1))]
        for system in self.published.scores if self.published else ():
            if system not in systems:
                raise ValueError(f"'published' has {system!r}; this study has {', '.join(systems)}")
        source = self.images.source
        if self.corruptions.source == "official" and (
            source not in OFFICIAL_CORRUPTIONS or self.images.test is not None
        ):
            raise ValueError(
                "corruptions of source 'official' need images of source 'cifar10' or 'cifar100', "
                "with 'test' null"
            )
        names = [others.name for others in self.out_of_distribution]
        for others in self.out_of_distribution:
            if others.source == source != "folder":
                raise ValueError(f"'out_of_distribution' and 'images' have one source, {source!r}")
            if names.count(others.name) > 1:
                raise ValueError(f"two sets of 'out_of_distribution' are called {others.name!r}")
        return self

    def _images_and_backbones_exist(self) -> None:
        for name, method in self.methods.items():
            if method.perturbation.needs_held_out and self.images.held_out is None:
                raise ValueError(
                    f"methods.{name}: perturbation {method.perturbation.name!r} needs "
                    "'images.held_out', the number of images to hold out"
                )
            architecture = Architecture(**self.parts(name)["architecture"])
            if architecture.is_of_library and not method.student.any_architecture:
                raise ValueError(
                    f"methods.{name}: student {method.student.name!r} is made of this package's "
                    f"own architectures, such as resnet32, not of {architecture.name!r}"
                )
            if (backbone := self.backbone(name)) is None:
                continue
            if backbone not in self.methods:
                raise ValueError(
                    f"methods.{name}: there is no method {backbone!r} to be its 'backbone'"
                )
            if ONE not in self.methods[backbone].student.offers:
                raise ValueError(
                    f"methods.{name}: its 'backbone' {backbone!r} must be {ONE}, such as 'single'"
                )

    def backbone(self, method: str) -> str | None:
        """The method whose student of the same seed a method's student starts from, if any."""
        return getattr(self.methods[method].student, "backbone", None)

    def recipe(self, method: str) -> Recipe:
        """The recipe of a method: the study's `student`, or the published one, with its changes."""
        known, changes = {**self.student.model_dump()}, self.methods[method].recipe
        if changes.published:
            known |= self.methods[method].published()
        known |= changes.model_dump(exclude_none=True)
        return Recipe(**{key: known[key] for key in Recipe.model_fields if key in known})

    def own(self, teacher: int) -> Teacher:
        """What the configuration says of one teacher alone."""
        return self.teachers[teacher] if self.teachers else Teacher()

    def parts_of_pool(self) -> list[dict[str, Any]]:
        """The parts of every teacher; just one where all are alike."""
        return [self.parts(teacher=place) for place in range(len(self.teachers or "1"))]

    def parts(self, method: str | None = None, teacher: int = 0) -> dict[str, Any]:
        """What is trained how: the parts of a method, or of a teacher.

        Options that a method does not set have the study's values; options that its parts do not
        use are left out, so that a change of them changes nothing.

        Returns:
            student, objective, perturbation (each with its name and options), architecture,
            members (M, or 1), and what the student's logits mean: prediction, with its parameters.
            Where they apply: backbone, the method whose student it starts from, single_pass, and
            held_out, whether teachers are asked at the held-out images.
        """
        if method is None:
            chosen, architecture = TEACHER, self.own(teacher).architecture or self.architecture
        else:
            chosen = self.methods[method]
            architecture = (
                chosen.student.architecture or self.student_architecture or self.architecture
            )
        student, backbone = chosen.student, method and self.backbone(method)
        known = self.distillation.model_dump()
        if chosen.recipe.published:
            known |= chosen.published()
        objective = _filled(chosen.objective, known)
        return {
            "student": student.model_dump(exclude={"architecture", "backbone"}),
            "members": self.members if student.has_members or student.counts_teachers else 1,
            "architecture": architecture.model_dump(),
            "objective": objective,
            "perturbation": _filled(chosen.perturbation, known | objective),
            **chosen.objective.prediction,
            **({"backbone": backbone} if backbone else {}),
            **({"single_pass": True} if chosen.perturbation.is_single_pass() else {}),
            **({"held_out": True} if chosen.perturbation.needs_held_out else {}),
        }

    def perturbations(self, sized: bool = False) -> dict[str, dict[str, Any]]:
        """Where the teachers are analysed: the perturbations of the methods and of the paper's.

        Args:
            sized: only those that have a size η.

        Returns:
            Options by name, with the study's η and τ.
        """
        known = self.distillation.model_dump()
        return {
            name: _filled(cast(Any, kind)(), known) for name, kind in self._kinds(sized).items()
        }

    def perturbation_titles(self, sized: bool = False) -> dict[str, str]:
        """What figures call these perturbations, by name."""
        return {name: kind.title for name, kind in self._kinds(sized).items()}

    def families(self) -> list[dict[str, str]]:
        """Methods that differ in nothing but where the teachers are asked, if there are several.

        Returns:
            For each such family the labels of its methods by the name of their perturbation, which
            has the study's η and τ; by `<name>_single_pass` where a student passes once a step
            instead of twice.
        """
        known = self.distillation.model_dump()
        found: dict[str, dict[str, str]] = {}
        for name, method in self.methods.items():
            parts, perturbation = self.parts(name), method.perturbation
            asked = {
                key: parts.pop(key, None) for key in ("perturbation", "single_pass", "held_out")
            }
            usual = _filled(type(perturbation)(), known | parts["objective"])
            if method.objective.needs_teachers and asked["perturbation"] == usual:
                family = json.dumps([parts, self.recipe(name).model_dump()], sort_keys=True)
                once = "_single_pass" if asked["single_pass"] else ""
                found.setdefault(family, {}).setdefault(f"{perturbation.name}{once}", method.label)
        return [family for family in found.values() if len(family) > 1]

    def _kinds(self, sized: bool) -> dict[str, type[PerturbationOptions]]:
        methods = [*PAPERS_METHODS.values(), *self.methods.values()]
        kinds = {it.perturbation.name: type(it.perturbation) for it in methods}
        return {
            name: kind
            for name, kind in kinds.items()
            if kind.moves and ("eta" in kind.model_fields or not sized)
        }


def _of_the_paper(method: Method, taken: Collection[str | None]) -> Method:
    """A method of a grid that is one of the paper's says so, unless another one does already."""
    parts = {"student", "objective", "perturbation", "recipe"}
    for paper, known in PAPERS_METHODS.items():
        same = all(getattr(method, part) == getattr(known, part) for part in parts)
        if same and paper not in taken:
            return method.model_copy(update={"paper": paper})
    return method


def _filled(section: Section, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """What a section's entry takes: its options, those that are not set from `defaults`."""
    options = section.model_dump(exclude={"single_pass"})
    return {key: defaults[key] if value is None else value for key, value in options.items()}


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
