"""Methods: a student, an objective and a perturbation; and grids of all that go together.

The Snakefile reads this module in every process, so it does not import PyTorch.
"""

from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from ensdistill.options import (
    AnyObjective,
    AnyPerturbation,
    AnyStudent,
    BatchEnsemble,
    NoPerturbation,
    ObjectiveOptions,
    PerturbationOptions,
)
from ensdistill.recipes import RecipeChanges
from ensdistill.sections import Section, as_section, kinds


def _one_line(label: str) -> str:
    if not label or label != label.strip() or not label.isprintable():
        raise ValueError(f"{label!r} is no name: write one line, without blanks at its ends")
    return label


Label = Annotated[str, AfterValidator(_one_line)]


def _own_objective(known: Mapping[str, Any]) -> ObjectiveOptions | None:
    """The objective of a method that names none; None if its student is not valid."""
    student = known.get("student")
    return named(AnyObjective)[student.own_objective]() if student else None


@cache
def named(kind: Any) -> dict[str, Any]:
    """The sections of an axis by their names."""
    sections = [it for it in kinds(kind) if isinstance(it, type) and issubclass(it, Section)]
    return {section.model_fields["name"].default: section for section in sections}


class Learner(Section):
    """A student and what it minimises."""

    student: AnyStudent = BatchEnsemble()
    """What is trained."""
    objective: AnyObjective = Field(default_factory=_own_objective)
    """What it minimises; the usual objective of its student unless told."""
    recipe: RecipeChanges = RecipeChanges()
    """Where its training differs from the study's `student`; `published` for the recipe of its
    source."""

    @model_validator(mode="after")
    def _published_recipe_exists(self) -> Self:
        if self.recipe.published and not self.published():
            raise ValueError(
                f"no recipe was published for student {self.student.name!r} with objective "
                f"{self.objective.name!r}"
            )
        return self

    @model_validator(mode="after")
    def _student_meets_needs(self) -> Self:
        if self.objective.needs not in self.student.offers:
            raise ValueError(_needs("objective", self.objective, self.objective.needs, self))
        return self

    def published(self) -> dict[str, Any]:
        """The recipe of the method's source, with α and τ."""
        return {**self.objective.published, **self.student.published}


def _needs(
    axis: str, part: ObjectiveOptions | PerturbationOptions, need: str, learner: Learner
) -> str:
    """That a part of a method needs another student."""
    example = next(name for name, it in named(AnyStudent).items() if need in it.offers)
    given = learner.student.name
    return f"{axis} {part.name!r} needs {need}, such as {example!r}, not {given!r}"


def conflict(learner: Learner, perturbation: PerturbationOptions) -> str | None:
    """Why a perturbation does not go with a student and its objective; None if it does."""
    objective, what = learner.objective, f"perturbation {perturbation.name!r}"
    if perturbation.moves and not objective.needs_teachers:
        return f"objective {objective.name!r} asks no teachers, so {what} has no use"
    if perturbation.is_single_pass() and not objective.has_labels:
        return f"objective {objective.name!r} has no labels, so 'single_pass' has no use"
    need = perturbation.needs_of_student()
    if need and need not in learner.student.offers:
        return _needs("perturbation", perturbation, need, learner)
    if perturbation.needs_teaching and perturbation.needs_teaching != objective.needs:
        return (
            f"{what} has other images for every teacher, so each must teach a member, as in "
            f"objective 'one_to_one'; {objective.name!r} asks all of them at the same"
        )
    return None


class Method(Learner):
    """One way to train a student: a row of the results table."""

    label: Label
    """The system's name in tables and figures: one line, without blanks at its ends."""
    perturbation: AnyPerturbation = NoPerturbation()
    """At which inputs the teachers are asked."""
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
    def _perturbation_goes_with_the_rest(self) -> Self:
        if reason := conflict(self, self.perturbation):
            raise ValueError(reason)
        return self

    @property
    def passes(self) -> int:
        """Forward passes of the student in a step: a second one for labels of the clean images."""
        moved = self.perturbation.moves and not self.perturbation.is_single_pass()
        return 1 + (moved and self.objective.has_labels)


# --- grids -----------------------------------------------------------------------------------


class GridLearner(Learner):
    """A student of a grid: with its usual objective, or another one."""

    label: Label | None = None
    """Begins the labels of its methods; a usual abbreviation unless told."""

    def title(self) -> str:
        """Begins the labels of its methods."""
        student, objective = self.student, self.objective
        of_labels = not objective.needs_teachers and student.title_of_labels
        return self.label or objective.title or of_labels or student.title

    def suffix(self) -> str:
        """Ends the labels of its methods."""
        return ", own recipe" if self.recipe.published and not self.label else ""

    def key(self) -> str:
        """Begins the names of its methods."""
        names = [self.student.name]
        if self.objective.name != self.student.own_objective:
            names.append(self.objective.name)
        return "_".join([*names, *(["published"] if self.recipe.published else [])])


def _as_learner(value: Any) -> Any:
    """A student's name alone, or with its options, stands for it with its usual objective."""
    alone = isinstance(value, str) or (isinstance(value, Mapping) and "name" in value)
    return {"student": value} if alone else value


class Grid(Section):
    """All students at all perturbations that go together."""

    students: Annotated[
        list[
            Annotated[
                GridLearner,
                BeforeValidator(_as_learner, json_schema_input_type=AnyStudent | GridLearner),
            ]
        ],
        Field(min_length=1),
    ]
    """Students: a name, a student with options, or {student, objective, recipe, label}. A recipe is
    the study's unless told, so that all are compared by the same."""
    perturbations: Annotated[list[AnyPerturbation], Field(min_length=1)]
    """Where the teachers are asked; a student that learns from labels alone goes with `none`."""

    def methods(self) -> dict[str, Method]:
        """The methods by name, `<student>_<perturbation>`; labels are made of the parts.

        Raises:
            ValueError: two have the same name, or a part goes with no other.
        """
        found: dict[str, Method] = {}
        alone = {f"perturbation {it.name!r}" for it in self.perturbations}
        for learner in self.students:
            lonely = True
            for perturbation in self.perturbations:
                if conflict(learner, perturbation):
                    continue
                lonely = False
                alone.discard(f"perturbation {perturbation.name!r}")
                once = perturbation.is_single_pass()
                name = f"{learner.key()}_{perturbation.name}{'_single_pass' if once else ''}"
                if name in found:
                    raise ValueError(f"two methods are called {name!r}: set one under 'methods'")
                label = "+".join(filter(None, [learner.title(), perturbation.title]))
                found[name] = Method(
                    label=f"{label}{', one pass' if once else ''}{learner.suffix()}",
                    perturbation=perturbation,
                    **{key: getattr(learner, key) for key in Learner.model_fields},
                )
            if lonely:
                alone.add(f"student {learner.student.name!r}")
        if alone:
            raise ValueError(f"{min(alone)} goes with none of the others")
        return found


OLD_KEYS = {
    "network": "'student'",
    "alpha": "an option of the objective: {name: one_to_one, alpha: 0.9}",
    "temperature": "an option of the objective: {name: one_to_one, temperature: 4}",
    "eta": "an option of the perturbation: {name: ods, eta: 1/255}",
}
"""Keys of earlier versions, and where their values are written now."""
