"""What options.py says of each part of a method agrees with what is computed under its name."""

import inspect

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch import nn
from torch.nn import functional as F

from ensdistill import architectures, networks, options
from ensdistill.batches import TrainingBatches
from ensdistill.learning import Learning, learning
from ensdistill.methods import Grid, Method
from ensdistill.objectives import OBJECTIVES
from ensdistill.options import MEMBERS
from ensdistill.perturbations import PERTURBATIONS
from ensdistill.predictions import PREDICTIONS, PROBS
from ensdistill.sections import as_section
from ensdistill.students import STUDENTS, Step, build_student
from ensdistill.studies import Study

M, K = 3, 4
ARCHITECTURE = {"name": "resnet8", "num_classes": K, "in_channels": 1, "width": 4}
AXES = {
    "student": (STUDENTS, options.AnyStudent),
    "objective": (OBJECTIVES, options.AnyObjective),
    "perturbation": (PERTURBATIONS, options.AnyPerturbation),
}
MORE = {"flow_matching": {"backbone": "other"}}
"""Options of students that have no default."""


def section(axis, name):
    """The section that config.yaml may have for an entry of an axis."""
    more = MORE.get(name, {}) if axis == "student" else {}
    return TypeAdapter(AXES[axis][1]).validate_python({"name": name, **more})


def student_for(objective):
    """A student that meets the needs of an objective."""
    need = section("objective", objective).needs
    name = next(it for it in STUDENTS if need in section("student", it).offers)
    return {"name": name, **MORE.get(name, {})}


def method(**parts):
    """A method's sections, and its parts with all options filled in."""
    if "objective" in parts and "student" not in parts:
        parts["student"] = student_for(dict(as_section(parts["objective"]))["name"])
    other = {"label": "other", "student": "single"}
    methods = {"m": {"label": "M", **parts}, "other": other}
    study = Study.model_validate({"members": M, "images": {"held_out": 10}, "methods": methods})
    return study.methods["m"], study.parts("m")


class Counted(nn.Module):
    """Counts forward passes, and those of which a gradient with respect to the input is taken."""

    def __init__(self, module):
        super().__init__()
        self.module, self.passes, self.gradients = module, 0, 0

    def forward(self, x):
        self.passes += 1
        if x.requires_grad:
            x.register_hook(self._count)
        return self.module(x)

    def _count(self, gradient):
        self.gradients += 1


def computed(parts, teachers):
    """Loss of a step in double precision, and how often the student passed in training mode."""
    torch.manual_seed(1)
    student = build_student(
        **parts["student"], architecture=ARCHITECTURE, members=parts["members"]
    ).double()
    passes = []
    student.register_forward_hook(lambda module, *_: passes.append(1) if module.training else None)
    x, y = torch.rand(6, 1, 8, 8, dtype=torch.float64), torch.arange(6) % K
    others = torch.rand(6, 1, 8, 8, dtype=torch.float64)
    step = Step(student, teachers, x, y, 0.5, torch.Generator(), torch.Generator(), others)
    single_pass = parts.get("single_pass", False)
    how = learning(teachers, parts["objective"], parts["perturbation"], single_pass=single_pass)
    return how.parts(step)["loss"], len(passes)


@pytest.fixture
def teachers():
    torch.manual_seed(0)
    singles = [build_student("single", ARCHITECTURE, 1).double().network for _ in range(M)]
    return [Counted(network.eval().requires_grad_(False)) for network in singles]


@pytest.mark.parametrize("axis", AXES)
def test_every_name_of_the_configuration_is_in_the_registry_and_the_other_way_round(axis):
    registry, kinds = AXES[axis]
    schema = TypeAdapter(kinds).json_schema()
    alone, section = schema["anyOf"]
    assert set(alone["enum"]) == set(section["discriminator"]["mapping"]) == set(registry)


def test_every_family_of_the_configuration_has_a_builder_and_the_other_way_round():
    assert architectures.ARCHITECTURES.keys() == networks.ARCHITECTURES.keys()


@pytest.mark.parametrize("axis", AXES)
def test_the_options_of_the_configuration_are_those_that_the_entry_takes(axis):
    for name, entry in AXES[axis][0].items():
        parameters = inspect.signature(entry).parameters.values()
        takes = {it.name for it in parameters} - {"architecture", "members", "step", "x_distill"}
        elsewhere = {"name", "architecture", "backbone", "single_pass"}
        assert takes == type(section(axis, name)).model_fields.keys() - elsewhere, name


@pytest.mark.parametrize("name", STUDENTS)
def test_a_student_has_members_if_it_says_so(name):
    student = build_student(name, ARCHITECTURE, members=M)
    assert (student.members == M) == section("student", name).has_members
    assert student(torch.rand(2, 1, 8, 8)).shape == (student.members, 2, K)


@pytest.mark.parametrize("name", STUDENTS)
def test_a_student_meets_the_needs_of_its_own_objective(name):
    parts = section("student", name)
    assert section("objective", parts.own_objective).needs in parts.offers
    known, _ = method(student={"name": name, **MORE.get(name, {})})
    assert known.objective.name == parts.own_objective


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_objective_says_what_logits_mean(name):
    _, parts = method(objective=name)
    assert parts["prediction"] in PREDICTIONS
    logits = np.random.default_rng(0).normal(size=(5, 1, K))
    probs = PREDICTIONS[parts["prediction"]].stored(logits, parts).probs()
    np.testing.assert_allclose(PROBS[parts["prediction"]](logits, parts), probs, rtol=1e-12)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_objective_asks_teachers_if_it_says_so(name, teachers):
    known, parts = method(objective=name)
    computed(parts, teachers)
    # A flow learns from one teacher, drawn anew in each step.
    expected = 1 if name == "flow_matching" else M * known.objective.needs_teachers
    assert sum(teacher.passes for teacher in teachers) == expected
    if not known.objective.needs_teachers:
        assert torch.isfinite(computed(parts, [])[0])


@pytest.mark.parametrize("name", ["labels", "one_to_one", "ensemble_mean"])
def test_an_objective_teaches_member_by_member_if_it_says_so(name, teachers):
    known, parts = method(objective=name, student="batch_ensemble")
    one, other = (computed(parts, them)[0] for them in (teachers, teachers[::-1]))
    assert torch.allclose(one, other, rtol=1e-10) != (known.objective.needs == MEMBERS)
    if known.objective.needs != MEMBERS:
        _, parts = method(objective=name, student="single")
        assert torch.isfinite(computed(parts, teachers)[0])


STUDENT_OF = {"ods_each": "batch_ensemble", "tdiv_sdiv": "batch_ensemble"}


@pytest.mark.parametrize("name", PERTURBATIONS)
def test_passes_and_gradients_are_as_many_as_a_perturbation_says(name, teachers):
    known, parts = method(perturbation=name, student=STUDENT_OF.get(name, "single"))
    loss, passes = computed(parts, teachers)
    gradients = known.perturbation.teacher_gradients(M)
    assert passes == known.passes == (1 if name == "none" else 2)
    assert sum(it.gradients for it in teachers) == gradients
    second_of_the_pair = name == "tdiv_sdiv"
    assert sum(it.passes for it in teachers) == M + gradients + second_of_the_pair
    loss.backward()  # the student learns nothing from the teachers' gradients
    assert sum(it.gradients for it in teachers) == gradients


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_without_a_perturbation_the_student_passes_once(objective, teachers):
    known, parts = method(objective=objective)
    assert known.passes == 1
    if options.LOGITS in known.student.offers:
        assert computed(parts, teachers)[1] == 1


@pytest.mark.parametrize("objective", ["dirichlet", "proxy_dirichlet"])
def test_without_labels_the_student_passes_once_at_the_perturbed_images(objective, teachers):
    known, parts = method(objective=objective, perturbation="ods")
    loss, passes = computed(parts, teachers)
    assert passes == known.passes == 1
    _, parts = method(objective=objective)
    assert not torch.equal(loss, computed(parts, teachers)[0])


SIZED = [name for name in PERTURBATIONS if hasattr(section("perturbation", name), "eta")]


@pytest.mark.parametrize("name", SIZED)
def test_at_eta_0_a_method_is_the_one_without_a_perturbation(name, teachers):
    student = STUDENT_OF.get(name, "single")
    _, parts = method(perturbation={"name": name, "eta": 0}, student=student)
    assert parts["perturbation"]["eta"] == 0
    loss, passes = computed(parts, teachers)
    expected, _ = computed(method(student=student)[1], teachers)
    assert passes == 1
    assert torch.equal(loss, expected)
    _, parts = method(perturbation={"name": name, "eta": 0.1}, student=student)
    other, passes = computed(parts, teachers)
    assert passes == 2
    assert not torch.equal(other, expected)


def test_a_methods_parts_become_its_learning(teachers):
    _, parts = method(
        objective={"name": "one_to_one", "alpha": 0.3}, perturbation={"name": "ods", "eta": 0.1}
    )
    how = learning(teachers, parts["objective"], parts["perturbation"])
    assert isinstance(how, Learning)
    assert how.teachers == teachers
    assert (how.objective.func, how.objective.keywords) == (
        OBJECTIVES["one_to_one"],
        {"alpha": 0.3, "temperature": 4.0},
    )
    assert (how.perturbation.func, how.perturbation.keywords) == (
        PERTURBATIONS["ods"],
        {"eta": 0.1, "temperature": 4.0},
    )


# --- one pass, and held-out images -------------------------------------------------------------


@pytest.mark.parametrize("name", SIZED)
def test_in_a_single_pass_labels_teach_at_the_perturbed_images(name, teachers):
    """(1−α)·CE(S(x̃), y) + α·τ²·KL(T(x̃) ‖ S(x̃)), member by member, of one forward pass."""
    alpha, tau = 0.3, 2.0
    known, parts = method(
        student="batch_ensemble",
        objective={"name": "one_to_one", "alpha": alpha, "temperature": tau},
        perturbation={"name": name, "eta": 0.05, "single_pass": True},
    )
    assert parts["single_pass"] is True
    assert "single_pass" not in parts["perturbation"]
    loss, passes = computed(parts, teachers)
    assert passes == known.passes == 1

    torch.manual_seed(1)
    student = build_student("batch_ensemble", ARCHITECTURE, M).double()
    x, y = torch.rand(6, 1, 8, 8, dtype=torch.float64), torch.arange(6) % K
    step = Step(student, teachers, x, y, 0.5, torch.Generator(), torch.Generator())
    chosen = {key: value for key, value in parts["perturbation"].items() if key != "name"}
    moved = PERTURBATIONS[name](step, **chosen)
    each = moved if moved.ndim == 5 else moved.expand(M, *moved.shape)
    logits = student(each)
    expected = 0.0
    for teacher, own, images in zip(teachers, logits, each, strict=True):
        p = (teacher(images) / tau).softmax(-1)
        divergence = (p * (p.log() - (own / tau).log_softmax(-1))).sum(-1).mean()
        expected += ((1 - alpha) * F.cross_entropy(own, y) + alpha * tau**2 * divergence) / M
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)


def test_held_out_images_are_drawn_anew_for_every_step_from_its_generator(teachers):
    images = torch.arange(40, dtype=torch.uint8).view(40, 1, 1, 1).expand(40, 1, 2, 2)
    batches = TrainingBatches(images, torch.zeros(40, dtype=torch.int64), 8, 0, False)
    seen = []

    def objective(step, x_distill):
        assert x_distill is step.held_out
        seen.append((255 * x_distill[:, 0, 0, 0]).round().int().tolist())
        return {"loss": torch.zeros(())}

    how = Learning([], objective, PERTURBATIONS["held_out"], held_out=batches)
    for seed in (1, 2, 1):
        generators = torch.Generator().manual_seed(seed), torch.Generator()
        how.parts(Step(None, [], torch.zeros(5, 1, 2, 2), None, 0.0, *generators))
    assert seen[0] == seen[2] != seen[1]
    assert all(len(set(them)) == 8 and set(them) <= set(range(40)) for them in seen)


# --- what goes together -------------------------------------------------------------------------

IMPOSSIBLE = [
    (
        {"student": "single", "perturbation": "ods_each"},
        "perturbation 'ods_each' has other images for every teacher, so each must teach a member, "
        "as in objective 'one_to_one'; 'ensemble_mean' asks all of them at the same",
    ),
    (
        {"objective": "ensemble_mean", "perturbation": "ods_each"},
        "'ensemble_mean' asks all of them at the same",
    ),
    (
        {"student": "single", "perturbation": "tdiv_sdiv"},
        "perturbation 'tdiv_sdiv' needs a student with members, such as 'batch_ensemble', "
        "not 'single'",
    ),
    (
        {"student": "single", "objective": "one_to_one"},
        "objective 'one_to_one' needs a student with members, such as 'batch_ensemble', "
        "not 'single'",
    ),
    (
        {"objective": "proxy_dirichlet"},
        "objective 'proxy_dirichlet' needs a student that is one network, such as 'single', "
        "not 'batch_ensemble'",
    ),
    (
        {"student": "gaussian_logits", "objective": "labels"},
        "objective 'labels' needs a student with logits of its own, such as 'batch_ensemble', "
        "not 'gaussian_logits'",
    ),
    (
        {"student": "mimo", "perturbation": "ods"},
        "objective 'labels' asks no teachers, so perturbation 'ods' has no use",
    ),
    (
        {
            "student": "single",
            "objective": "dirichlet",
            "perturbation": {"name": "ods", "single_pass": True},
        },
        "objective 'dirichlet' has no labels, so 'single_pass' has no use",
    ),
    (
        {"student": "single", "objective": "labels", "recipe": "published"},
        "no recipe was published for student 'single' with objective 'labels'",
    ),
]


@pytest.mark.parametrize(("parts", "reason"), IMPOSSIBLE)
def test_what_does_not_go_together_is_one_sentence(parts, reason):
    with pytest.raises(ValidationError) as caught:
        Method.model_validate({"label": "M", **parts})
    (error,) = caught.value.errors()
    assert reason in error["msg"]
    assert "\n" not in error["msg"]


def test_tdiv_without_the_students_part_goes_with_any_student(teachers):
    _, parts = method(student="single", perturbation={"name": "tdiv_sdiv", "sdiv": False})
    assert torch.isfinite(computed(parts, teachers)[0])


def grid(students, perturbations):
    return Grid.model_validate({"students": students, "perturbations": perturbations}).methods()


def test_a_grid_has_all_that_goes_together_and_labels_made_of_the_parts():
    found = grid(
        [
            "batch_ensemble",
            {"name": "hydra", "cut": "linear"},
            {"student": "single", "objective": "proxy_dirichlet", "recipe": "published"},
            {"student": "mimo", "label": "Many in, many out"},
            "packed",
        ],
        ["none", {"name": "ods", "single_pass": True}, "ods_each"],
    )
    assert {name: it.label for name, it in found.items()} == {
        "batch_ensemble_none": "KD",
        "batch_ensemble_ods_single_pass": "KD+ODS, one pass",
        "batch_ensemble_ods_each": "KD+ODS-each",
        "hydra_none": "Hydra",
        "hydra_ods_single_pass": "Hydra+ODS, one pass",
        "hydra_ods_each": "Hydra+ODS-each",
        "single_proxy_dirichlet_published_none": "Proxy-EnD², own recipe",
        "mimo_none": "Many in, many out",
        "packed_none": "Packed",
    }
    assert found["hydra_none"].student.cut == "linear"
    assert found["packed_none"].objective.name == "labels"
    assert found["single_proxy_dirichlet_published_none"].recipe.published


def test_all_students_at_all_perturbations_make_valid_methods():
    students = [
        {"student": student_for(name), "objective": name, "label": name} for name in OBJECTIVES
    ]
    students += [{"name": name, **MORE.get(name, {})} for name in STUDENTS if name != "mimo"]
    found = {}
    for student in students:
        found |= grid([student], ["none"])
    assert len({it.label for it in found.values()}) == len(found)
    of_members = [
        name for name in STUDENTS if section("student", name).own_objective == "one_to_one"
    ]
    assert len(grid(of_members, [*PERTURBATIONS])) == len(of_members) * len(PERTURBATIONS)


@pytest.mark.parametrize(
    ("students", "perturbations", "reason"),
    [
        (["mimo", "single"], ["ods"], "student 'mimo' goes with none of the others"),
        (["single"], ["none", "ods_each"], "perturbation 'ods_each' goes with none of the others"),
        (["hydra", {"name": "hydra", "cut": "linear"}], ["none"], "two methods are called"),
    ],
)
def test_a_grid_says_what_is_wrong_with_it(students, perturbations, reason):
    with pytest.raises(ValueError, match=reason):
        grid(students, perturbations)
