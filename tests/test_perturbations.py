"""Perturbations against closed forms, plain autograd and finite differences."""

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from ensdistill.networks import build_network
from ensdistill.perturbations import (
    PERTURBATIONS,
    conf_ods_direction,
    ods_direction,
    tdiv_sdiv_direction,
)
from ensdistill.students import Step, build_student

TEMPERATURE = 2.5


class LinearTeacher(nn.Module):
    def __init__(self, weight, bias):
        super().__init__()
        self.weight, self.bias = weight, bias

    def forward(self, x):
        return x.flatten(1) @ self.weight.T + self.bias


@pytest.fixture
def linear():
    rng = torch.Generator().manual_seed(0)
    weight = torch.randn(5, 12, dtype=torch.float64, generator=rng)
    return LinearTeacher(weight, torch.randn(5, dtype=torch.float64, generator=rng))


@pytest.fixture
def x():
    return torch.rand(6, 3, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def w():
    rng = np.random.default_rng(2)
    return torch.tensor(rng.uniform(-1, 1, (6, 5)))


def closed_form(teacher, x, w, temperature):
    """√D·g/‖g‖ with g = Aᵀ(diag(p) − ppᵀ)w/τ, image by image, and max p."""
    directions, confidences = [], []
    for image, weights in zip(x.numpy(), w.numpy(), strict=True):
        z = (teacher.weight.numpy() @ image.ravel() + teacher.bias.numpy()) / temperature
        p = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
        g = teacher.weight.numpy().T @ ((np.diag(p) - np.outer(p, p)) @ weights) / temperature
        directions.append((np.sqrt(g.size) * g / np.linalg.norm(g)).reshape(image.shape))
        confidences.append(p.max())
    return np.stack(directions), np.array(confidences)


def test_directions_equal_the_closed_form_for_a_linear_softmax_teacher(linear, x, w):
    expected, confidence = closed_form(linear, x, w, TEMPERATURE)
    ours = ods_direction(linear, x, TEMPERATURE, w)
    np.testing.assert_allclose(ours.numpy(), expected, rtol=1e-10, atol=1e-10)
    ours = conf_ods_direction(linear, x, TEMPERATURE, w)
    weighted = expected * confidence[:, None, None, None]
    np.testing.assert_allclose(ours.numpy(), weighted, rtol=1e-10, atol=1e-10)


def test_direction_equals_finite_differences_for_a_resnet():
    torch.manual_seed(0)
    network = build_network("resnet8", 4, in_channels=1, width=4).double().eval()
    x = torch.rand(2, 1, 6, 6, dtype=torch.float64)
    w = torch.rand(2, 4, dtype=torch.float64) * 2 - 1
    step = 1e-6
    gradient = torch.zeros_like(x)
    with torch.no_grad():
        for index in np.ndindex(*x.shape):
            values = []
            for sign in (1, -1):
                moved = x.clone()
                moved[index] += sign * step
                probs = (network(moved) / TEMPERATURE).softmax(1)
                values.append((w * probs).sum())
            gradient[index] = (values[0] - values[1]) / (2 * step)
    expected = 6 * gradient / gradient.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    ours = ods_direction(network, x, TEMPERATURE, w)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def test_direction_equals_plain_autograd_in_float32():
    torch.manual_seed(0)
    network = build_network("resnet8", 4, in_channels=3, width=8).eval()
    x, w = torch.rand(5, 3, 8, 8), torch.rand(5, 4) * 2 - 1
    probe = x.clone().requires_grad_()
    ((network(probe) / TEMPERATURE).softmax(1) * w).sum().backward()
    unit = probe.grad / probe.grad.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    ours = ods_direction(network, x, TEMPERATURE, w)
    torch.testing.assert_close(ours, unit * 192**0.5, rtol=1e-3, atol=1e-3)


def test_every_image_has_root_mean_square_one(linear, x):
    epsilon = ods_direction(linear, x, 1.0)
    torch.testing.assert_close(epsilon.square().mean((1, 2, 3)), torch.ones(6).double())


@pytest.mark.parametrize("temperature", [1.0, 0.02])
def test_saturated_teachers_still_give_the_true_direction(temperature):
    # Top probability 1 − 1e-26 or closer: a plain softmax gradient in float32 is 0 or noise.
    weight = torch.randn(3, 12, generator=torch.Generator().manual_seed(3))
    teacher = LinearTeacher(weight, torch.tensor([60.0, 0.0, -1.0]))
    x, w = torch.zeros(1, 3, 2, 2), torch.tensor([[0.3, -0.7, 0.9]])
    exact = LinearTeacher(weight.double(), teacher.bias.double())
    # In float64 the top class's tiny share is kept by working with log-odds.
    odds = (exact.bias / temperature - exact.bias[0] / temperature).exp()
    drift = (odds * (w - w[0, 0]).double()[0])[:, None] * (exact.weight - exact.weight[0])
    g = drift.sum(0)
    ours = ods_direction(teacher, x, temperature, w)
    if odds[1] < 1e-44:  # beyond float32: no direction is better than a wrong one
        assert not ours.any()
    else:
        expected = (12**0.5 * g / g.norm()).view(1, 3, 2, 2).float()
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("direction", [ods_direction, conf_ods_direction])
def test_zero_gradient_gives_zero_not_nan(direction):
    constant = LinearTeacher(torch.zeros(4, 12), torch.tensor([1.0, 2.0, 3.0, 4.0]))
    epsilon = direction(constant, torch.rand(2, 3, 2, 2), 1.0)
    assert torch.equal(epsilon, torch.zeros(2, 3, 2, 2))


def uniformity(w=None):
    """p values of what shows of w ~ U(−1, 1): order within an image, and which class is first.

    Logits that are the ten pixels, at equal probabilities: ε is w − w̄, scaled. Shift and scale of w
    never show, U(0, 1) gives the same ε. But between the smallest and the largest of uniform values
    the others lie uniformly, which no other kind of distribution has.
    """
    teacher = LinearTeacher(torch.eye(10), torch.zeros(10))
    generator = torch.Generator().manual_seed(0)
    x = torch.zeros(4000, 1, 2, 5)
    epsilon = ods_direction(teacher, x, 1.0, w, generator=generator).flatten(1)
    ordered = epsilon.double().sort(1).values.numpy()
    low, high = ordered[:, :1], ordered[:, -1:]
    between = ((ordered[:, 1:-1] - low) / (high - low)).ravel()
    first = np.bincount(epsilon.argmax(1).numpy(), minlength=10)
    return stats.kstest(between, "uniform").pvalue, stats.chisquare(first).pvalue


def test_w_is_uniform_anew_for_each_image_and_class():
    assert min(uniformity()) > 0.001
    rng = np.random.default_rng(1)
    uniform = rng.uniform(-1, 1, (4000, 10))
    for other in (
        rng.normal(size=(4000, 10)),
        np.sign(uniform) * uniform**2,
        np.tile(uniform[0], (4000, 1)),
        uniform + np.eye(10)[0] / 2,
    ):
        assert min(uniformity(torch.tensor(other, dtype=torch.float32))) < 1e-6


def step_at(x, teachers, seed=5):
    generators = (torch.Generator().manual_seed(seed) for _ in range(2))
    return Step(None, teachers, x, None, 0.0, *generators)


ETA = {"eta": 0.05}
OPTIONS = {
    "none": {},
    "gaussian": ETA,
    "ods": {**ETA, "temperature": TEMPERATURE},
    "conf_ods": {**ETA, "temperature": TEMPERATURE},
}


def test_gaussian_steps_have_standard_deviation_eta(linear):
    x = torch.full((10, 3, 50, 50), 0.5)
    moved = PERTURBATIONS["gaussian"](step_at(x, [linear]), eta=0.02)
    assert ((moved - x) / 0.02).std().item() == pytest.approx(1, abs=0.01)
    assert (moved - x).mean().item() == pytest.approx(0, abs=0.001)


@pytest.mark.parametrize("name", OPTIONS)
def test_every_perturbation_clips_and_steps_by_eta(name, linear):
    other = LinearTeacher(linear.weight.flip(0, 1), linear.bias)
    x = torch.rand(8, 3, 2, 2, dtype=torch.float64)
    x[0], x[1] = 0, 1
    step = step_at(x, [linear, other])
    ours = PERTURBATIONS[name](step, **OPTIONS[name])
    if name == "none":
        assert ours is x
        return
    generator, host = (torch.Generator().manual_seed(5) for _ in range(2))
    source = [linear, other][torch.randint(2, (), generator=host).item()]
    if name == "gaussian":
        epsilon = torch.empty_like(x).normal_(generator=generator)
    else:
        w = torch.empty(8, 5, dtype=x.dtype).uniform_(-1, 1, generator=generator)
        directions, confidences = closed_form(source, x, w, TEMPERATURE)
        epsilon = torch.tensor(directions)
        if name == "conf_ods":
            epsilon *= torch.tensor(confidences)[:, None, None, None]
    torch.testing.assert_close(ours, torch.clamp(x + 0.05 * epsilon, 0, 1))
    assert (ours - x).abs().max() > 0.05
    assert ours.min() >= 0
    assert ours.max() <= 1


@pytest.mark.parametrize("name", OPTIONS)
def test_a_step_of_size_0_gives_the_images_themselves(name, linear, x):
    options = {key: 0.0 if key == "eta" else value for key, value in OPTIONS[name].items()}
    assert PERTURBATIONS[name](step_at(x, [linear]), **options) is x


def test_every_teacher_is_the_source_anew_each_time(x):
    used = []

    class Spy(LinearTeacher):
        def forward(self, x):
            used.append(self)
            return super().forward(x)

    teachers = [Spy(torch.randn(5, 12).double(), torch.zeros(5).double()) for _ in range(3)]
    step = step_at(x, teachers)
    for _ in range(300):
        PERTURBATIONS["ods"](step, eta=0.1, temperature=1.0)
    counts = [used.count(teacher) for teacher in teachers]
    assert sum(counts) == 300
    assert min(counts) > 70


# --- ODS of every teacher ----------------------------------------------------------------------


def test_ods_of_every_teacher_is_the_closed_form_of_each(linear):
    others = [LinearTeacher(linear.weight.roll(k, 1), linear.bias * k) for k in (1, 2)]
    teachers = [linear, *others]
    x = torch.rand(8, 3, 2, 2, dtype=torch.float64)
    ours = PERTURBATIONS["ods_each"](step_at(x, teachers), eta=0.05, temperature=TEMPERATURE)
    generator = torch.Generator().manual_seed(5)
    w = torch.empty(3, 8, 5, dtype=x.dtype).uniform_(-1, 1, generator=generator)
    for own, teacher, weights in zip(ours, teachers, w, strict=True):
        epsilon = torch.tensor(closed_form(teacher, x, weights, TEMPERATURE)[0])
        torch.testing.assert_close(own, torch.clamp(x + 0.05 * epsilon, 0, 1))
    assert PERTURBATIONS["ods_each"](step_at(x, teachers), eta=0.0, temperature=1.0) is x


# --- TDiv-SDiv -----------------------------------------------------------------------------------


def networks(*kinds):
    torch.manual_seed(0)
    architecture = {"name": "resnet8", "num_classes": 4, "in_channels": 1, "width": 4}
    built = [build_student(kind, architecture, members=3).double() for kind in kinds]
    for student in built:
        for module in student.modules():
            if isinstance(module, nn.BatchNorm2d):  # statistics of training, not those of the start
                module.running_mean.uniform_(-0.3, 0.3)
                module.running_var.uniform_(0.5, 2)
    return built


def by_differences(value, x, step=1e-6):
    """√D·g/‖g‖ with the gradient g of value(x) (B,), by central differences."""
    gradient = torch.zeros_like(x)
    with torch.no_grad():
        for index in np.ndindex(*x.shape[1:]):
            values = []
            for sign in (1, -1):
                moved = x.clone()
                moved[(slice(None), *index)] += sign * step
                values.append(value(moved))
            gradient[(slice(None), *index)] = (values[0] - values[1]) / (2 * step)
    norm = gradient.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    return x[0].numel() ** 0.5 * gradient / norm


@pytest.mark.parametrize("with_student", [True, False])
def test_tdiv_sdiv_equals_finite_differences(with_student):
    *teachers, student = networks("single", "single", "single", "batch_ensemble")
    teachers = [teacher.network.eval() for teacher in teachers]
    student.train()
    x = torch.rand(2, 1, 6, 6, dtype=torch.float64)
    i, j = 2, 0
    with torch.no_grad():
        student.eval()
        held_t, held_s = teachers[j](x).softmax(1), student(x)[j].softmax(1)

    def value(x):
        tdiv = -(held_t * teachers[i](x).log_softmax(1)).sum(1)
        sdiv = -(held_s * student(x)[i].log_softmax(1)).sum(1)
        return tdiv - sdiv if with_student else tdiv

    expected = by_differences(value, x)
    student.train()
    ours = tdiv_sdiv_direction(teachers, student if with_student else None, x, (i, j))
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
    assert student.training


def test_tdiv_sdiv_leaves_the_student_as_it_is():
    *teachers, student = networks("single", "single", "single", "batch_ensemble")
    teachers = [teacher.network.eval() for teacher in teachers]
    before = {key: value.clone() for key, value in student.state_dict().items()}
    step = Step(
        student.train(),
        teachers,
        torch.rand(4, 1, 6, 6, dtype=torch.float64),
        None,
        0.0,
        *(torch.Generator().manual_seed(5) for _ in range(2)),
    )
    x_distill = PERTURBATIONS["tdiv_sdiv"](step, eta=0.01, sdiv=True)
    assert not x_distill.requires_grad
    assert all(parameter.grad is None for parameter in student.parameters())
    assert all(torch.equal(before[key], value) for key, value in student.state_dict().items())


def test_tdiv_sdiv_draws_pairs_of_two_teachers_that_are_the_students_members(
    x, linear, monkeypatch
):
    drawn = []

    def direction(teachers, student, x, pair):
        drawn.append(tuple(pair))
        return torch.zeros_like(x)

    monkeypatch.setattr("ensdistill.perturbations.tdiv_sdiv_direction", direction)
    step = step_at(x, [linear] * 3)
    for _ in range(600):
        PERTURBATIONS["tdiv_sdiv"](step, eta=0.1, sdiv=True)
    counts = [drawn.count((i, j)) for i in range(3) for j in range(3) if i != j]
    assert sum(counts) == 600
    assert min(counts) > 60


def test_tdiv_sdiv_of_teachers_that_agree_moves_nothing(x, linear):
    epsilon = tdiv_sdiv_direction([linear, linear], None, x, (0, 1))
    assert torch.equal(epsilon, torch.zeros_like(x))


def test_tdiv_of_saturated_teachers_survives_float32():
    """Both teachers nearly one-hot: p_i − p_j of the top class is rounding error."""
    rng = torch.Generator().manual_seed(0)
    weights = torch.randn(2, 4, 9, generator=rng, dtype=torch.float64)
    bias = torch.tensor([40.0, 0, 0, 0], dtype=torch.float64)
    x = torch.rand(3, 1, 3, 3, generator=rng, dtype=torch.float64)
    exact = tdiv_sdiv_direction([LinearTeacher(w, bias) for w in weights], None, x, (0, 1))
    rounded = [LinearTeacher(w.float(), bias.float()) for w in weights]
    ours = tdiv_sdiv_direction(rounded, None, x.float(), (0, 1)).double()
    cosine = (ours * exact).flatten(1).sum(1) / 9
    assert cosine.min().item() > 0.999


# --- mixup ----------------------------------------------------------------------------------


def test_mixup_mixes_each_image_with_one_other_by_a_share_of_a_beta_distribution():
    x = torch.eye(7, dtype=torch.float64).view(7, 7, 1, 1)
    step, shares, partners = step_at(x, []), [], []
    for _ in range(2000):
        mixed = PERTURBATIONS["mixup"](step, beta=0.4)[:, :, 0, 0]
        assert torch.allclose(mixed.sum(1), torch.ones(7).double())
        assert torch.allclose(mixed.sum(0), torch.ones(7).double())  # a permutation
        other = mixed - torch.diag(mixed.diag())
        moved = other.sum(1) > 0
        if moved.any():
            share = other.sum(1)[moved]
            assert torch.allclose(share, share[0])
            shares.append(share[0].item())
            partners += other[moved].argmax(1).tolist()
    assert stats.kstest(shares, stats.beta(0.4, 0.4).cdf).pvalue > 1e-3
    assert min(np.bincount(partners, minlength=7)) > 0.12 * len(partners)
