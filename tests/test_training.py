"""Objectives, optimiser steps and schedules against plain re-derivations."""

import copy
import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from ensdistill import InputError, training
from ensdistill.learning import (
    RunningSums,
    learning,
    learning_rate_factor,
    new_optimizer,
    train_step,
)
from ensdistill.networks import build_network
from ensdistill.objectives import OBJECTIVES, distillation_loss
from ensdistill.perturbations import PERTURBATIONS, conf_ods_direction, ods_direction
from ensdistill.recipes import Recipe
from ensdistill.students import Single, Step, build_student
from ensdistill.training import fit, is_validated, seeds

M, ALPHA, TAU, ETA = 3, 0.7, 2.0, 0.05
ARCHITECTURE = {"name": "resnet8", "num_classes": 5, "in_channels": 1, "width": 4}
DISTILLATION = {"alpha": ALPHA, "temperature": TAU}


@pytest.fixture
def teachers():
    torch.manual_seed(0)
    return [build_network(**ARCHITECTURE).double().eval().requires_grad_(False) for _ in range(M)]


@pytest.fixture
def student():
    torch.manual_seed(1)
    return build_student("batch_ensemble", ARCHITECTURE, M).double()


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(2)
    x = torch.rand(4, 1, 8, 8, dtype=torch.float64, generator=generator)
    return x, torch.randint(0, 5, (4,), generator=generator)


def step_of(student, teachers, x, y, seed=3):
    generators = (torch.Generator().manual_seed(seed) for _ in range(2))
    return Step(student, teachers, x, y, 0.0, *generators)


def literal_loss(student, teachers, x, x_met, y, alpha, tau, mean_target=False):
    """SPEC-literal loops: member by member, image by image, class by class."""
    network, members = student.network, student.members
    clean = network(torch.cat([x] * members))
    met = clean if x_met is x else network(torch.cat([x_met] * members))
    total = 0.0
    for j in range(members):
        for n in range(len(x)):
            row = j * len(x) + n
            total -= (1 - alpha) * F.log_softmax(clean[row], 0)[y[n]]
            taught_by = teachers if mean_target else [teachers[j]]
            target = sum(F.softmax(t(x_met[n : n + 1])[0] / tau, 0) for t in taught_by)
            target = target / len(taught_by)
            answer = F.softmax(met[row] / tau, 0)
            for k in range(len(target)):
                total += alpha * tau**2 * target[k] * (target[k] / answer[k]).log()
    return total / (members * len(x))


PERTURBED = {
    "none": {},
    "gaussian": {"eta": ETA},
    "ods": {"eta": ETA, "temperature": TAU},
    "conf_ods": {"eta": ETA, "temperature": TAU},
}


@pytest.mark.parametrize("perturbation", PERTURBED)
def test_distillation_and_its_gradient_equal_the_literal_loops(
    teachers, student, batch, perturbation
):
    x, y = batch
    twin = copy.deepcopy(student)
    step = step_of(student, teachers, x, y)
    x_distill = PERTURBATIONS[perturbation](step, **PERTURBED[perturbation])
    parts = OBJECTIVES["one_to_one"](step, x_distill, **DISTILLATION)
    x_met = x
    if perturbation != "none":
        generator, host = (torch.Generator().manual_seed(3) for _ in range(2))
        source = teachers[torch.randint(M, (), generator=host).item()]
        if perturbation == "gaussian":
            epsilon = torch.empty_like(x).normal_(generator=generator)
        else:
            direction = {"ods": ods_direction, "conf_ods": conf_ods_direction}[perturbation]
            epsilon = direction(source, x, TAU, generator=generator)
        x_met = torch.clamp(x + ETA * epsilon, 0, 1)
        assert not torch.equal(x_met, x)
    reference = literal_loss(twin, teachers, x, x_met, y, ALPHA, TAU)
    torch.testing.assert_close(parts["loss"], reference, rtol=1e-10, atol=1e-10)
    parts["loss"].backward()
    reference.backward()
    for (name, ours), theirs in zip(student.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-10, msg=name)
    # Batch statistics of clean and perturbed images are not mixed: the buffers agree too.
    for ours, theirs in zip(student.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("kind", ["single", "batch_ensemble"])
def test_ensemble_mean_teaches_every_member_the_mean_prediction(teachers, batch, kind):
    x, y = batch
    torch.manual_seed(4)
    taught = build_student(kind, ARCHITECTURE, M).double()
    step = step_of(copy.deepcopy(taught), teachers, x, y)
    ours = OBJECTIVES["ensemble_mean"](step, x, **DISTILLATION)["loss"]
    reference = literal_loss(taught, teachers, x, x, y, ALPHA, TAU, mean_target=True)
    torch.testing.assert_close(ours, reference, rtol=1e-10, atol=1e-10)


def test_the_parts_of_a_loss_are_what_it_is_made_of(teachers, student, batch):
    """And the accuracy is that of the mean of the members' probabilities at the clean images."""
    x, y = batch
    moved = (x + 0.1).clamp(0, 1)
    parts = OBJECTIVES["one_to_one"](step_of(student, teachers, x, y), moved, **DISTILLATION)
    from_labels = literal_loss(copy.deepcopy(student), teachers, x, moved, y, 0.0, TAU)
    from_teachers = literal_loss(copy.deepcopy(student), teachers, x, moved, y, 1.0, TAU)
    assert parts["cross_entropy"].item() == pytest.approx(from_labels.item(), rel=1e-10)
    assert parts["distillation"].item() == pytest.approx(from_teachers.item(), rel=1e-10)
    probs = [student.network(torch.cat([x] * M))[j * 4 : j * 4 + 4].softmax(1) for j in range(M)]
    right = (sum(probs).argmax(1) == y).tolist()
    assert parts["accuracy"].item() == pytest.approx(100 * sum(right) / 4)
    assert [name for name, value in parts.items() if value.requires_grad] == ["loss"]


def test_batch_ensemble_from_scratch_is_the_mean_cross_entropy_of_the_members(student, batch):
    x, y = batch
    parts = OBJECTIVES["labels"](step_of(student, [], x, y), x)
    logits = student.network(torch.cat([x] * M))
    reference = np.mean([-F.log_softmax(logits[i], 0)[y[i % 4]].item() for i in range(4 * M)])
    assert parts["loss"].item() == pytest.approx(reference, rel=1e-10)


def test_tau_squared_keeps_the_gradient_scale(teachers, student, batch):
    """With α = 1 the gradient is (softmax(Ŝ/τ) − softmax(T̂/τ))·τ per logit [Hinton 2015]."""
    x, _ = batch
    logits = torch.randn(M, 4, 5, requires_grad=True)
    targets = torch.stack([(t(x) / 8).softmax(1).float() for t in teachers])
    distillation_loss(logits, targets, 8.0).backward()
    expected = 8 * ((logits.detach() / 8).softmax(-1) - targets) / (4 * M)
    torch.testing.assert_close(logits.grad, expected)


@pytest.mark.parametrize(("nesterov", "clip_norm"), [(False, None), (True, None), (False, 0.5)])
def test_one_optimiser_step_equals_sgd_written_out(student, batch, nesterov, clip_norm):
    x, y = batch
    twin = copy.deepcopy(student)
    recipe = Recipe(learning_rate=0.2, weight_decay=5e-4, momentum=0.9, nesterov=nesterov)
    optimizer = new_optimizer(student, recipe)
    how = learning([], {"name": "labels"}, {"name": "none"})
    velocity = {name: torch.zeros_like(p) for name, p in twin.named_parameters()}
    norms = []
    for _ in range(3):
        train_step(step_of(student, [], x, y), how, optimizer, "fp32", clip_norm)
        loss = F.cross_entropy(twin.network(torch.cat([x] * M)), torch.cat([y] * M))
        grads = torch.autograd.grad(loss, list(twin.parameters()))
        norms.append(sum(float((g**2).sum()) for g in grads) ** 0.5)
        if clip_norm:
            grads = [gradient * min(1, clip_norm / norms[-1]) for gradient in grads]
        with torch.no_grad():
            for (name, parameter), gradient in zip(twin.named_parameters(), grads, strict=True):
                factor = name.endswith((".r", ".s"))
                decayed = gradient if factor else gradient + 5e-4 * parameter
                velocity[name] = 0.9 * velocity[name] + decayed
                moved = decayed + 0.9 * velocity[name] if nesterov else velocity[name]
                parameter -= (0.1 if factor else 0.2) * moved
    if clip_norm:
        assert max(norms) > clip_norm
    for (name, ours), theirs in zip(student.named_parameters(), twin.parameters(), strict=True):
        # PyTorch divides by the norm plus 10⁻⁶.
        tolerance = {"rtol": 1e-4, "atol": 1e-6} if clip_norm else {"rtol": 1e-10, "atol": 1e-12}
        torch.testing.assert_close(ours, theirs, **tolerance, msg=name)


def test_every_parameter_is_in_one_group_and_only_factors_are_special(student):
    others, factors = student.parameter_groups(0.2, 5e-4)
    assert (others["lr"], others["weight_decay"]) == (0.2, 5e-4)
    assert (factors["lr"], factors["weight_decay"]) == (0.1, 0)
    layers = [m for m in student.modules() if hasattr(m, "r")]
    assert {id(p) for p in factors["params"]} == {id(p) for m in layers for p in (m.r, m.s)}
    assert len(others["params"]) + len(factors["params"]) == len(list(student.parameters()))


@pytest.mark.parametrize(
    ("epoch", "factor"),
    [
        (1, 0.01),
        (2, 0.2575),
        (4, 0.7525),
        (5, 1.0),
        (6, 1.0),
        (149, 1.0),
        (150, 1.0),
        (151, 1 - 0.99 / 120),
        (210, 0.505),
        (270, 0.01),
        (271, 0.01),
        (300, 0.01),
    ],
)
def test_learning_rate_of_the_authors_recipe(epoch, factor):
    assert learning_rate_factor(epoch, 300) == pytest.approx(factor, abs=1e-12)


def test_cosine_schedule_is_pytorch_s_after_the_warm_up():
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    reference = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=46)
    for epoch in range(5, 51):
        expected = optimizer.param_groups[0]["lr"]
        assert learning_rate_factor(epoch, 50, "cosine") == pytest.approx(expected, abs=1e-9)
        optimizer.step()
        reference.step()
    assert learning_rate_factor(3, 50, "cosine") == pytest.approx(0.505)


def test_validation_is_every_so_often_and_in_the_last_tenth():
    validated = [epoch for epoch in range(1, 301) if is_validated(epoch, 300, 30)]
    assert validated == [*range(30, 271, 30), *range(271, 301)]


LABELS = learning([], {"name": "labels"}, {"name": "none"})


def small_fit(seed=0, learning_rate=0.05, epochs=3, precision="fp32", validate_every=30):
    generator = torch.Generator().manual_seed(7)
    images = torch.randint(0, 128, (40, 1, 8, 8), dtype=torch.uint8, generator=generator)
    labels = torch.arange(40) % 4
    images[torch.arange(40), 0, labels * 2] = 255  # a bright row tells the class
    torch.manual_seed(seed)
    architecture = {"name": "resnet8", "num_classes": 4, "in_channels": 1, "width": 4}
    student = build_student("single", architecture, 1)
    recipe = Recipe(
        epochs=epochs,
        batch_size=16,
        learning_rate=learning_rate,
        warmup_epochs=1,
        validate_every=validate_every,
    )
    settings = {"crop_padding": 1, "flip": False, "precision": precision, "seed": seed}
    split = images, labels
    return fit(student, LABELS, split, split, recipe, **settings)


def same(first, second):
    pairs = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_same_seed_gives_the_same_bits_and_another_does_not(precision):
    first, again, other = (small_fit(seed, precision=precision)[0] for seed in (0, 0, 1))
    assert same(first, again)
    assert not same(first, other)


def test_bfloat16_trains_to_nearly_the_same_loss():
    exact, rounded = (
        small_fit(epochs=6, precision=precision)[1][-1] for precision in ("fp32", "bf16")
    )
    assert rounded["loss"] != exact["loss"]
    assert rounded["loss"] == pytest.approx(exact["loss"], rel=0.1)


def test_history_has_a_row_per_epoch_and_validation_where_it_was_due():
    _, history = small_fit(epochs=10, validate_every=4)
    assert [row["epoch"] for row in history] == list(range(1, 11))
    assert history[0]["learning_rate"] == pytest.approx(0.05)
    assert history[-1]["learning_rate"] == pytest.approx(0.0005)
    assert all(row["loss"] == row["cross_entropy"] and row["seconds"] > 0 for row in history)
    assert [row["epoch"] for row in history if "val_nll" in row] == [4, 8, 10]


def test_the_kept_network_is_the_one_of_the_best_epoch(monkeypatch):
    accuracies, states = iter([50.0, 70.0, 70.0, 60.0]), []

    def spied(student, images):
        states.append(copy.deepcopy(student.state_dict()))
        return np.zeros((len(images), 1, 4))

    monkeypatch.setattr(training, "predict", spied)
    monkeypatch.setattr(training, "accuracy", lambda probs, labels: next(accuracies))
    student, _ = small_fit(epochs=4, validate_every=1)
    kept = student.state_dict()
    equal = [all(torch.equal(kept[k], s[k]) for k in kept) for s in states]
    assert equal == [False, False, True, False]  # of two equals the later


def test_random_numbers_of_a_step_depend_on_seed_epoch_and_step_alone():
    found = {
        tuple(seeds(seed, epoch, step, 3))
        for seed in range(5)
        for epoch in range(1, 6)
        for step in range(6)
    }
    words = {word for own in found for word in own}
    assert (len(found), len(words)) == (150, 450)
    assert seeds(7, 3, 2, 3) == seeds(7, 3, 2, 3)


def test_a_merged_predictor_is_validated_kept_and_returned():
    """A student whose predictor has the negated weights of its last layer."""

    class Negated(Single):
        def predictor(self):
            twin = copy.deepcopy(self)
            twin.network.head.weight.data.neg_()
            return twin

    architecture = {"name": "resnet8", "num_classes": 4, "in_channels": 1, "width": 4}
    torch.manual_seed(0)
    student = Negated(architecture)
    generator = torch.Generator().manual_seed(7)
    images = torch.randint(0, 256, (40, 1, 8, 8), dtype=torch.uint8, generator=generator)
    split = images, torch.arange(40) % 4
    recipe = Recipe(epochs=1, batch_size=16, warmup_epochs=1)
    settings = {"crop_padding": 0, "flip": False, "precision": "fp32", "seed": 0}
    predictor, history = fit(student, LABELS, split, split, recipe, **settings)
    assert torch.equal(predictor.network.head.weight, -student.network.head.weight)
    with torch.no_grad():
        probs = predictor.eval()(images / 255)[0].softmax(1)
    expected = F.nll_loss(probs.log(), split[1]).item()
    assert history[-1]["val_nll"] == pytest.approx(expected, rel=1e-5)


def test_a_loss_that_is_not_finite_stops_with_step_and_learning_rate():
    with pytest.raises(InputError, match=r"not finite at step \d+ .*learning rate 1e\+30"):
        small_fit(learning_rate=1e30)


def test_running_sums_give_the_mean_of_all_numbers_at_once_to_the_bit():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(700, 2, generator=generator).exp() * torch.tensor([1.0, 100.0])
    sums = RunningSums()
    for loss, accuracy in values:
        sums.add({"loss": loss, "accuracy": accuracy})
    means = [total / len(values) for total, _ in sums.read().values()]
    assert means == values.double().mean(0).tolist()
    sums.clear()
    sums.add({"loss": torch.tensor(2.0), "accuracy": torch.tensor(3.0)})
    assert sums.read() == {"loss": (2.0, 1), "accuracy": (3.0, 1)}


def test_running_sums_know_the_first_step_that_is_not_finite():
    sums, parts = (
        RunningSums(),
        {"loss": [1, math.inf, 2, -math.inf], "accuracy": [1, 2, math.nan, 4]},
    )
    for values in zip(*parts.values(), strict=True):
        sums.add(dict(zip(parts, map(torch.tensor, map(float, values)), strict=True)))
    assert {name: finite for name, (_, finite) in sums.read().items()} == {"loss": 1, "accuracy": 2}


def test_labels_of_the_training_set_are_learnt():
    _, history = small_fit(epochs=20)
    assert history[-1]["accuracy"] > 75
    assert history[-1]["loss"] < math.log(4) / 2
