"""EDFM against explicit loops, exact solutions, and velocities that are known in closed form."""

import copy
import math
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from scipy.special import erf
from scipy.stats import kstest
from torch import nn

from ensdistill.flow_matching import (
    VelocityNetwork,
    flow_matching_loss,
    integrate,
    random_times,
    step_times,
)
from ensdistill.learning import check_first_step, learning, train_step
from ensdistill.objectives import flow_matching
from ensdistill.students import Step, build_student
from ensdistill.weights import load_student, save_student

ARCHITECTURE = {
    "name": "resnet8", "num_classes": 5, "in_channels": 3, "width": 4,
    "mean": [0.2, 0.4, 0.6], "std": [0.1, 0.2, 0.3],
}  # fmt: skip
M, B, K, S = 3, 4, 5, 6


def time_at(t):
    return (3**t - 1) / (3**0.999 - 1)


def best_velocity(mean, spread):
    """E[h₁ − h₀ | h_t] for h₁ ~ N(mean, spread²) and h₀ ~ N(0, 16): a linear regression on h_t."""

    def velocity(h, t):
        t = t[..., None]
        covariance = t * spread**2 - (1 - t) * 16
        variance = t**2 * spread**2 + (1 - t) ** 2 * 16
        return mean + covariance / variance * (h - t * mean)

    return velocity


# --- the loss --------------------------------------------------------------------------------


def test_loss_is_that_of_an_explicit_loop():
    torch.manual_seed(0)
    h0, h1, t = torch.randn(B, K), torch.randn(B, K), torch.rand(B)
    total = 0.0
    for b in range(B):
        for k in range(K):
            h = t[b].item() * h1[b, k].item() + (1 - t[b].item()) * h0[b, k].item()
            velocity = math.sin(h) + t[b].item()
            total += (velocity - (h1[b, k].item() - h0[b, k].item())) ** 2 / B
    found = flow_matching_loss(lambda h, t: h.sin() + t[:, None], h0, h1, t)
    assert found.item() == pytest.approx(total, rel=1e-5)


def test_loss_is_smallest_at_the_conditional_expectation():
    generator = torch.Generator().manual_seed(0)
    count, mean, spread = 200_000, torch.tensor([1.0, -2.0]), 0.7
    h0 = 4 * torch.randn(count, 2, generator=generator)
    h1 = mean + spread * torch.randn(count, 2, generator=generator)
    t = random_times(count, generator)
    best = best_velocity(mean, spread)

    def loss(change):
        return flow_matching_loss(lambda h, t: best(h, t) + change(h, t[:, None]), h0, h1, t).item()

    # Var(h₁ − h₀ | h_t) = σ₁²σ₀²/Var(h_t), of each class
    u = torch.linspace(0, 1, 20_001)
    at = torch.log(1 + (3**0.999 - 1) * u) / math.log(3)
    left = 2 * (spread**2 * 16 / (at**2 * spread**2 + (1 - at) ** 2 * 16)).mean().item()
    smallest = loss(lambda h, t: 0.0)
    assert smallest == pytest.approx(left, rel=0.01)
    for change in (lambda h, t: 0.1, lambda h, t: 0.05 * h, lambda h, t: t - 0.5):
        for sign in (1, -1):
            assert loss(lambda h, t, c=change, s=sign: s * c(h, t)) > smallest + 1e-3


def test_times_have_a_density_that_triples_from_0_to_1():
    times = random_times(20_000, torch.Generator().manual_seed(0))
    assert kstest(times.numpy(), time_at).pvalue > 0.01
    assert times.min() >= 0
    assert 0.998 < times.max() < 0.9991


# --- the sampler -----------------------------------------------------------------------------


def test_steps_halve():
    times = step_times()
    assert (len(times), times[0], times[-1]) == (8, 0, 1)
    lengths = np.diff(times)
    np.testing.assert_allclose(lengths[1:], lengths[:-1] / 2)


def test_a_path_is_six_steps_of_heun_and_one_of_euler():
    grid = [sum(0.5**n for n in range(i)) / sum(0.5**n for n in range(7)) for i in range(8)]
    asked = []

    def velocity(h, t):
        asked.append(float(t))
        return torch.cos(h) * (1 + t) - h * t

    def slope(h, t):
        return math.cos(h) * (1 + t) - h * t

    start = torch.tensor([[0.3], [-1.2]], dtype=torch.float64)
    found = integrate(velocity, start, step_times())
    for row, h in zip(found, [0.3, -1.2], strict=True):
        for i in range(6):
            step = grid[i + 1] - grid[i]
            first = slope(h, grid[i])
            h += step * (first + slope(h + step * first, grid[i + 1])) / 2
        h += (grid[7] - grid[6]) * slope(h, grid[6])
        assert row.item() == pytest.approx(h, rel=1e-12)
    assert len(asked) == 13
    assert max(asked) == pytest.approx(grid[6])


def test_a_linear_field_is_solved_with_second_order():
    """dh/dt = a·h + b·t: h(1) = eᵃ·h₀ + b·(eᵃ − 1 − a)/a²."""
    a, b = -1.3, 0.8
    start = torch.tensor([[2.0, -0.5]]).double()
    exact = math.exp(a) * start + b * (math.exp(a) - 1 - a) / a**2
    reference = solve_ivp(
        lambda t, h: a * h + b * t, (0, 1), start[0].numpy(), rtol=1e-10, atol=1e-12
    )
    np.testing.assert_allclose(exact[0], reference.y[:, -1], rtol=1e-8)
    errors = []
    for steps in (8, 16, 32, 64):
        times = [i / steps for i in range(steps + 1)]
        errors.append((integrate(lambda h, t: a * h + b * t, start, times) - exact).abs().max())
    orders = [math.log2(more / less) for more, less in pairwise(errors)]
    assert orders == pytest.approx([2, 2, 2], abs=0.25)
    found = integrate(lambda h, t: a * h + b * t, start, step_times())
    torch.testing.assert_close(found, exact, rtol=0.1, atol=0)


@pytest.mark.parametrize("spread", [1.0, 3.0])
def test_noise_becomes_the_gaussian_of_the_teachers(spread):
    """Along E[h₁ − h₀ | h_t] h_t = t·m + √(t²σ₁² + (1−t)²σ₀²)/σ₀·h₀, so h₁ = m + (σ₁/σ₀)·h₀."""
    mean = torch.tensor([1.0, -2.0, 0.5]).double()
    torch.manual_seed(0)
    noise = 4 * torch.randn(50, 3).double()
    exact = mean + spread / 4 * noise
    velocity = best_velocity(mean, spread)
    fine = integrate(velocity, noise, torch.linspace(0, 1, 2001).tolist())
    torch.testing.assert_close(fine, exact, rtol=0, atol=1e-3)
    coarse = integrate(velocity, noise, step_times())
    torch.testing.assert_close(coarse, exact, rtol=0.15, atol=0.15)


# --- the velocity network --------------------------------------------------------------------


def random_velocity_network(features=3, width=8, seed=0):
    """In float64, with modulations that are not 0."""
    torch.manual_seed(seed)
    network = VelocityNetwork(features, K, width).double()
    for parameter in network.parameters():
        nn.init.normal_(parameter, 0, 0.5)
    return network


def explicit_velocity(state, h, features, t, width):
    """Of one image, in NumPy."""
    frequencies = 10_000.0 ** (-np.arange(16) / 16)
    angles = math.log(1000 * (1 - t)) / 4 * frequencies
    time = np.concatenate([np.cos(angles), np.sin(angles)])
    spread = math.sqrt(t**2 + 16 * (1 - t) ** 2)
    x = np.concatenate([h / spread, features])
    for index in range(4):
        weights = {
            name: state[f"blocks.{index}.{name}"].numpy()
            for name in ("modulation.weight", "modulation.bias", "linear.weight", "linear.bias")
        }
        modulation = weights["modulation.weight"] @ time + weights["modulation.bias"]
        modulation = modulation / (1 + np.exp(-modulation))
        size = len(x)
        shift, scale, gate = (modulation[n * size : (n + 1) * size] for n in range(3))
        normal = (x - x.mean()) / np.sqrt(x.var() + 1e-5)
        out = weights["linear.weight"] @ (normal * (1 + scale) + shift) + weights["linear.bias"]
        out = out * (1 + erf(out / math.sqrt(2))) / 2
        x = out if index == 0 else x + gate * out
    out = state["out.weight"].numpy() @ x + state["out.bias"].numpy()
    return (t - 16 * (1 - t)) / spread**2 * h + 4 / spread * out


def test_velocity_is_that_of_explicit_layers():
    network = random_velocity_network()
    h, features = torch.randn(2, B, K).double(), torch.randn(B, 3).double()
    own = torch.rand(B).double()
    with torch.no_grad():
        for found, times in (
            (network(h, features, torch.tensor(0.4, dtype=torch.float64)), [0.4] * B),
            (network(h, features, own), own.tolist()),
        ):
            for s in range(2):
                for b in range(B):
                    expected = explicit_velocity(
                        network.state_dict(), h[s, b].numpy(), features[b].numpy(), times[b], 8
                    )
                    np.testing.assert_allclose(found[s, b], expected, rtol=1e-9)


def test_preconditioning_is_the_best_velocity_of_a_standard_normal():
    network = random_velocity_network()
    nn.init.zeros_(network.out.weight)
    nn.init.zeros_(network.out.bias)
    h, t = torch.randn(B, K).double(), torch.rand(B).double()
    with torch.no_grad():
        found = network(h, torch.randn(B, 3).double(), t)
    torch.testing.assert_close(found, best_velocity(torch.zeros(K).double(), 1.0)(h, t))


def test_what_the_network_has_to_learn_has_variance_one():
    torch.manual_seed(0)
    for time in (0.0, 0.3, 0.9):
        h0, h1 = 4 * torch.randn(100_000, 1), torch.randn(100_000, 1)
        network = VelocityNetwork(1, 1, 4)
        t = torch.tensor(time)
        h = t * h1 + (1 - t) * h0
        with torch.no_grad():
            nn.init.zeros_(network.out.weight)
            nn.init.zeros_(network.out.bias)
            skipped = network(h, torch.zeros(1), t)
            nn.init.ones_(network.out.bias)
            c_out = (network(h, torch.zeros(1), t) - skipped).mean()
        wanted = (h1 - h0 - skipped) / c_out
        assert wanted.var().item() == pytest.approx(1, abs=0.02)


# --- the student and its objective -----------------------------------------------------------


@pytest.fixture
def backbone():
    torch.manual_seed(2)
    student = build_student("single", ARCHITECTURE, 1)
    for norm in (it for it in student.modules() if isinstance(it, nn.BatchNorm2d)):
        nn.init.normal_(norm.running_mean, 0, 0.3)
        nn.init.uniform_(norm.running_var, 0.5, 2)
    return student.eval()


@pytest.fixture
def student(backbone):
    torch.manual_seed(0)
    student = build_student("flow_matching", ARCHITECTURE, M, width=8, samples=S)
    for parameter in student.network.velocity.parameters():
        nn.init.normal_(parameter, 0, 0.3)
    student.start_from(backbone)
    return student.eval()


def step_of(student, seed=0, count=B):
    torch.manual_seed(1)
    teachers = [build_student("single", ARCHITECTURE, 1).network.eval() for _ in range(M)]
    x, y = torch.rand(count, 3, 8, 8), torch.randint(0, K, (count,))
    draws = (torch.Generator().manual_seed(seed) for _ in range(2))
    return Step(student, teachers, x, y, 0.5, *draws)


def test_features_are_what_the_backbones_head_sees(student, backbone):
    x = torch.rand(B, 3, 8, 8)
    with torch.no_grad():
        head = backbone.network.head
        torch.testing.assert_close(head(student.network.features(x)), backbone.network(x))
    assert not any("head" in key for key in student.network.state_dict())


def test_another_architecture_is_no_backbone(student):
    wider = build_student("single", {**ARCHITECTURE, "width": 8}, 1)
    with pytest.raises(RuntimeError, match="size mismatch"):
        student.start_from(wider)


def at_features(velocity, features, h, t):
    return velocity(h, features, t)


def test_a_prediction_is_that_of_every_sample_and_image_alone(student):
    x = torch.rand(B, 3, 8, 8)
    with torch.no_grad():
        logits, features = student(x), student.network.features(x)
        assert student.members == len(logits) == S
        for s in range(S):
            for b in range(B):
                field = partial(at_features, student.network.velocity, features[b])
                expected = integrate(field, student.network.noise[s], step_times())
                torch.testing.assert_close(logits[s, b], expected, rtol=1e-4, atol=1e-4)
    many = build_student("flow_matching", ARCHITECTURE, M, samples=5000).network.noise
    assert many.std().item() == pytest.approx(4, rel=0.03)


def test_objective_is_the_loss_of_one_teachers_centred_logits(student, monkeypatch):
    """h₀, h₁ and t are inferred from what the velocity network is asked."""
    chosen = set()
    for seed in range(8):
        step, asked = step_of(student, seed, count=300), []

        def recording(h, features, t, asked=asked):
            asked.append((h, features, t))
            return h.sin()

        monkeypatch.setattr(student.network.velocity, "forward", recording)
        parts = flow_matching(step, step.x)
        (h, features, t), (zeros, again, start) = asked
        with torch.no_grad():
            logits = torch.stack([teacher(step.x) for teacher in step.teachers])
            centred = logits - (logits.sum(-1) / K)[..., None]
            assert torch.equal(features, student.network.features(step.x))
            assert torch.equal(features, again)
        t = t[:, None]
        noise = (h - t * centred) / (1 - t)
        spreads = noise.std((1, 2))
        losses = [
            (h.sin() - (h1 - h0)).square().sum(-1).mean()
            for h1, h0 in zip(centred, noise, strict=True)
        ]
        found = [
            j for j in range(M) if math.isclose(losses[j], parts["velocity_error"], rel_tol=1e-5)
        ]
        assert len(found) == 1
        assert spreads[found[0]].item() == pytest.approx(4, rel=0.1)
        assert abs(noise[found[0]].mean().item()) < 0.5
        assert kstest(t[:, 0].numpy(), time_at).pvalue > 1e-3
        assert parts["loss"].item() == pytest.approx(losses[found[0]].item() / (16 * K), rel=1e-5)
        chosen |= set(found)
        assert not zeros.any()
        assert not start.any()
    assert chosen == {0, 1, 2}


def test_accuracy_is_that_of_the_expected_logits(student):
    step = step_of(student)
    parts = flow_matching(step, step.x)
    with torch.no_grad():
        features = student.network.features(step.x)
        expected = student.network.velocity(torch.zeros(B, K), features, torch.zeros(B))
    right = sum(
        int(row.argmax()) == int(label) for row, label in zip(expected, step.y, strict=True)
    )
    assert parts["accuracy"].item() == 100 * right / B
    assert flow_matching(step_of(student), step.x.clone())["accuracy"].isnan()


def test_the_same_generators_give_the_same_loss(student):
    first, again, other = (
        flow_matching(step_of(student, seed), step_of(student).x)["loss"] for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_backbones_weights_get_no_gradients_and_are_not_among_the_parameters(student):
    x = torch.rand(B, 3, 8, 8, requires_grad=True)
    student(x).sum().backward()
    assert x.grad.any()
    assert all(it.grad is None for it in student.network.backbone.parameters())
    assert all(it.grad is not None for it in student.network.velocity.parameters())
    (group,) = student.parameter_groups(0.1, 5e-4)
    assert (group["lr"], group["weight_decay"]) == (0.1, 5e-4)
    velocity = {id(it) for it in student.network.velocity.parameters()}
    assert {id(it) for it in group["params"]} == velocity


def test_the_backbone_does_not_change(student):
    before = copy.deepcopy(student.state_dict())
    student.train()
    assert student.network.velocity.training
    assert not any(it.training for it in student.network.backbone.modules())
    taught = learning(step_of(student).teachers, {"name": "flow_matching"}, {"name": "none"})
    optimizer = torch.optim.SGD(student.parameter_groups(0.1, 5e-4), momentum=0.9)
    for seed in range(2):
        train_step(step_of(student, seed), taught, optimizer, "fp32")
    changed = {key for key, it in student.state_dict().items() if not torch.equal(it, before[key])}
    learnt = {f"network.velocity.{key}" for key, _ in student.network.velocity.named_parameters()}
    assert changed == learnt


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_its_first_step_is_checked(student, precision):
    step = step_of(student)
    taught = learning(step.teachers, {"name": "flow_matching"}, {"name": "none"})
    images = torch.randint(0, 256, (B, 3, 8, 8), dtype=torch.uint8)
    check_first_step(student.train(), taught, (images, step.y), B, precision)


def test_under_autocast_only_the_backbone_is_rounded(student):
    x = torch.rand(B, 3, 8, 8)
    with torch.no_grad():
        exact = student(x)
        with torch.autocast("cpu", torch.bfloat16):
            features, rounded = student.network.features(x), student(x)
        assert features.dtype == torch.float32
        assert not torch.equal(rounded, exact)
        assert torch.equal(rounded, student.network.sample(features))


def test_weights_are_enough_to_get_backbone_and_flow_back(student, tmp_path):
    save_student(tmp_path / "weights", student, {})
    loaded, x = load_student(tmp_path / "weights"), torch.rand(B, 3, 8, 8)
    assert loaded.spec == student.spec
    assert torch.equal(loaded(x), student(x))
    again = build_student(**student.spec)
    again.load_state_dict(student.state_dict())
    assert torch.equal(again.eval()(x), student(x))
