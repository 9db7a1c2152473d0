"""What options.py says of each part of a method agrees with what is computed under its name."""

import inspect

import pytest
import torch
from pydantic import TypeAdapter
from torch import nn

from ensdistill import methods, networks
from ensdistill.learning import Learning, learning
from ensdistill.objectives import OBJECTIVES
from ensdistill.perturbations import PERTURBATIONS
from ensdistill.students import STUDENTS, Step, build_student
from ensdistill.studies import Study

M, K = 3, 4
ARCHITECTURE = {"name": "resnet8", "num_classes": K, "in_channels": 1, "width": 4}
AXES = {
    "student": (STUDENTS, methods.AnyStudent),
    "objective": (OBJECTIVES, methods.AnyObjective),
    "perturbation": (PERTURBATIONS, methods.AnyPerturbation),
}


def sections(axis):
    """The sections that config.yaml may have for an axis, by name."""
    kinds = TypeAdapter(AXES[axis][1])
    return {name: type(kinds.validate_python(name)) for name in AXES[axis][0]}


def method(**parts):
    """A method's sections, and its parts with all options filled in."""
    if not {"student", "perturbation"} & parts.keys():
        needs_members = sections("objective")[parts.get("objective", "one_to_one")].needs_members
        parts["student"] = "batch_ensemble" if needs_members else "single"
    study = Study.model_validate({"members": M, "methods": {"m": {"label": "M", **parts}}})
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
    """Loss of a step in double precision, and the student's number of forward passes."""
    torch.manual_seed(1)
    student = build_student(
        **parts["student"], architecture=ARCHITECTURE, members=parts["members"]
    ).double()
    passes = []
    student.network.register_forward_hook(lambda *_: passes.append(1))
    x, y = torch.rand(6, 1, 8, 8, dtype=torch.float64), torch.arange(6) % K
    step = Step(student, teachers, x, y, 0.5, torch.Generator(), torch.Generator())
    how = learning(teachers, parts["objective"], parts["perturbation"])
    return how.objective(step, how.perturbation(step))["loss"], len(passes)


@pytest.fixture
def teachers():
    torch.manual_seed(0)
    networks = [build_student("single", ARCHITECTURE, 1).double().network for _ in range(M)]
    return [Counted(network.eval().requires_grad_(False)) for network in networks]


@pytest.mark.parametrize("axis", AXES)
def test_every_name_of_the_configuration_is_in_the_registry_and_the_other_way_round(axis):
    registry, kinds = AXES[axis]
    schema = TypeAdapter(kinds).json_schema()
    alone, section = schema["anyOf"]
    assert set(alone["enum"]) == set(section["discriminator"]["mapping"]) == set(registry)


def test_every_family_of_the_configuration_has_a_builder_and_the_other_way_round():
    assert methods.ARCHITECTURES.keys() == networks.ARCHITECTURES.keys()


@pytest.mark.parametrize("axis", AXES)
def test_the_options_of_the_configuration_are_those_that_the_entry_takes(axis):
    for name, section in sections(axis).items():
        parameters = inspect.signature(AXES[axis][0][name]).parameters.values()
        takes = {it.name for it in parameters} - {"architecture", "members", "step", "x_distill"}
        assert takes == section.model_fields.keys() - {"name", "architecture"}, name


@pytest.mark.parametrize("name", STUDENTS)
def test_a_student_has_members_if_it_says_so(name):
    student = build_student(name, ARCHITECTURE, members=M)
    assert (student.members == M) == sections("student")[name].has_members
    assert student(torch.rand(2, 1, 8, 8)).shape == (student.members, 2, K)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_objective_asks_teachers_if_it_says_so(name, teachers):
    known, parts = method(objective=name)
    computed(parts, teachers)
    assert [teacher.passes for teacher in teachers] == [int(known.objective.needs_teachers)] * M
    if not known.objective.needs_teachers:
        assert torch.isfinite(computed(parts, [])[0])


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_objective_teaches_member_by_member_if_it_says_so(name, teachers):
    known, parts = method(objective=name, student="batch_ensemble")
    one, other = (computed(parts, them)[0] for them in (teachers, teachers[::-1]))
    assert torch.allclose(one, other, rtol=1e-10) != known.objective.needs_members
    if not known.objective.needs_members:
        _, parts = method(objective=name, student="single")
        assert torch.isfinite(computed(parts, teachers)[0])


@pytest.mark.parametrize("name", PERTURBATIONS)
def test_passes_and_gradients_are_as_many_as_a_perturbation_says(name, teachers):
    known, parts = method(perturbation=name)
    loss, passes = computed(parts, teachers)
    assert passes == known.perturbation.passes
    assert sum(it.gradients for it in teachers) == known.perturbation.teacher_gradients
    targets = M
    assert sum(it.passes for it in teachers) == targets + known.perturbation.teacher_gradients
    loss.backward()  # the student learns nothing from the teachers' gradients
    assert sum(it.gradients for it in teachers) == known.perturbation.teacher_gradients


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_without_a_perturbation_the_student_passes_once(objective, teachers):
    _, parts = method(objective=objective)
    assert computed(parts, teachers)[1] == 1


@pytest.mark.parametrize("name", sorted(PERTURBATIONS.keys() - {"none"}))
def test_at_eta_0_a_method_is_the_one_without_a_perturbation(name, teachers):
    _, parts = method(perturbation={"name": name, "eta": 0})
    assert parts["perturbation"]["eta"] == 0
    loss, passes = computed(parts, teachers)
    expected, _ = computed(method()[1], teachers)
    assert passes == 1
    assert torch.equal(loss, expected)
    _, parts = method(perturbation={"name": name, "eta": 0.1})
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
