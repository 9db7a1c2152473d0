"""Dirichlet losses against torch.distributions, SciPy and Monte Carlo."""

import numpy as np
import pytest
import torch
from scipy.special import digamma, gammaln, softmax
from torch.distributions import Dirichlet, kl_divergence

from ensdistill.objectives import OBJECTIVES, dirichlet_loss, proxy_dirichlet_loss
from ensdistill.students import Step, build_student

M, B, K = 3, 5, 4


@pytest.fixture
def z():
    """Logits of a student (B, K)."""
    return torch.randn(B, K, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.fixture
def t():
    """Logits of the teachers (M, B, K), which disagree more on some images than on others."""
    rng = torch.Generator().manual_seed(1)
    scale = torch.linspace(0.1, 3, B, dtype=torch.float64)[:, None]
    return scale * torch.randn(M, B, K, generator=rng, dtype=torch.float64)


@pytest.mark.parametrize("tau", [1.0, 2.5, 10.0])
def test_dirichlet_loss_is_the_negative_log_likelihood_of_the_smoothed_teachers(z, t, tau):
    expected = 0.0
    for b in range(B):
        student = Dirichlet((z[b] / tau).exp())
        for m in range(M):
            p = torch.tensor(softmax(t[m, b].numpy() / tau))
            p = 0.999 * p + 0.001 / K
            expected -= tau**2 * student.log_prob(p / p.sum()).item() / (M * B)
    assert dirichlet_loss(z, t, tau).item() == pytest.approx(expected, rel=1e-12)


def proxy(t, tau):
    """p̄ and β₀ of each image, by loops."""
    means, precisions = [], []
    for b in range(B):
        p = [softmax(t[m, b].numpy() / tau) for m in range(M)]
        mean = sum(p) / M
        divergence = sum(float((mean * (np.log(mean) - np.log(it))).sum()) for it in p) / M
        means.append(mean)
        precisions.append((K - 1) / (2 * divergence + np.finfo(np.float32).eps))
    return np.array(means), np.array(precisions)


@pytest.mark.parametrize("tau", [1.0, 2.5])
def test_proxy_loss_equals_its_formula_by_loops_over_images(z, t, tau):
    means, precisions = proxy(t, tau)
    total = 0.0
    for b in range(B):
        alpha = np.exp(z[b].numpy() / tau) + 1
        psi = digamma(alpha) - digamma(alpha.sum())
        flat = gammaln(alpha.sum()) - gammaln(alpha).sum() - gammaln(K) + ((alpha - 1) * psi).sum()
        total += -(means[b] * psi).sum() + flat / (precisions[b] + K)
    ours = proxy_dirichlet_loss(z, t, tau)
    assert ours.item() == pytest.approx(total / B, rel=1e-8)


def test_the_reverse_loss_is_the_divergence_from_the_proxy_up_to_a_constant(z, t):
    """With β₀ for β₀ + K as the divisor, which is nearly the same where teachers agree."""
    agreeing = 0.01 * t
    means, precisions = map(torch.tensor, proxy(agreeing, 1.0))
    target = Dirichlet(means * precisions[:, None] + 1)

    def exact(z):
        return (kl_divergence(Dirichlet(z.exp() + 1), target) / precisions).mean()

    other = z.flip(0)
    difference = exact(z) - exact(other)
    ours = proxy_dirichlet_loss(z, agreeing, 1.0) - proxy_dirichlet_loss(other, agreeing, 1.0)
    assert ours.item() == pytest.approx(difference.item(), rel=1e-3)


def test_the_forward_loss_is_the_divergence_of_the_proxy_by_monte_carlo(z, t):
    means, precisions = map(torch.tensor, proxy(t, 2.0))
    torch.manual_seed(0)
    target, student = Dirichlet(means * precisions[:, None] + 1), Dirichlet((z / 2).exp() + 1)
    drawn = target.sample((100_000,))
    ratios = (target.log_prob(drawn) - student.log_prob(drawn)).mean(1)
    ours = proxy_dirichlet_loss(z, t, 2.0, direction="forward").item()
    assert ours == pytest.approx(ratios.mean().item(), abs=5 * ratios.std().item() / 100_000**0.5)


@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_an_images_loss_does_not_depend_on_the_others_of_its_batch(z, t, direction):
    """A division of (B,) by (B, 1) would mix them."""
    each = [proxy_dirichlet_loss(z[b : b + 1], t[:, b : b + 1], 1.0, direction) for b in range(B)]
    whole = proxy_dirichlet_loss(z, t, 1.0, direction)
    assert whole.item() == pytest.approx(torch.stack(each).mean().item(), rel=1e-12)


@pytest.mark.parametrize("loss", [dirichlet_loss, proxy_dirichlet_loss])
def test_losses_and_gradients_stay_finite_where_teachers_agree_and_logits_are_large(loss):
    z = torch.tensor([[40.0, -60.0, 0.0], [5.0, 5.0, 5.0]], requires_grad=True)
    t = torch.tensor([[200.0, 0.0, -200.0], [0.0, 0.0, 0.0]]).expand(M, 2, 3)
    value = loss(z, t, 1.0)
    value.backward()
    assert value.dtype == torch.float64
    assert torch.isfinite(value)
    assert torch.isfinite(z.grad).all()


@pytest.fixture
def step():
    torch.manual_seed(0)
    architecture = {"name": "resnet8", "num_classes": K, "in_channels": 1, "width": 4}
    student = build_student("single", architecture, 1)
    teachers = [build_student("single", architecture, 1).network.eval() for _ in range(M)]
    x, y = torch.rand(8, 1, 8, 8), torch.arange(8) % K
    return lambda progress: Step(
        student, teachers, x, y, progress, torch.Generator(), torch.Generator()
    )


@pytest.mark.parametrize(
    ("progress", "temperature"), [(0.0, 10), (0.5, 10), (0.75, 5.5), (0.99, 1.18), (1.0, 1)]
)
def test_the_temperature_falls_to_1_in_the_second_half(step, progress, temperature):
    now = step(progress)
    z = now.student(now.x)[0]
    t = torch.stack([teacher(now.x) for teacher in now.teachers])
    found = OBJECTIVES["dirichlet"](now, now.x, first_temperature=10.0)["loss"]
    expected = dirichlet_loss(z, t, temperature)
    assert found.item() == pytest.approx(expected.item(), rel=1e-9)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("dirichlet", {"first_temperature": 10.0}),
        ("proxy_dirichlet", {"temperature": 1.0, "direction": "reverse"}),
    ],
)
def test_labels_teach_nothing_and_accuracy_is_told_at_the_images_themselves(step, name, options):
    now = step(0.2)
    parts = OBJECTIVES[name](now, now.x, **options)
    right = (now.student(now.x)[0].argmax(1) == now.y).double().mean().item()
    assert parts["accuracy"].item() == pytest.approx(100 * right)
    moved = OBJECTIVES[name](now, now.x + 0.1, **options)
    assert torch.isnan(moved["accuracy"])
    assert moved["loss"] != parts["loss"]


def test_proxy_dirichlet_learns_a_known_dirichlet():
    """Teachers drawn from a Dirichlet of known mean: the student's mean comes to it."""
    torch.manual_seed(0)
    true = torch.tensor([6.0, 3.0, 1.0], dtype=torch.float64)
    t = Dirichlet(true).sample((4000,)).log()[:, None]
    for direction in ("reverse", "forward"):
        z = torch.zeros(1, 3, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS([z], max_iter=200, line_search_fn="strong_wolfe")

        def closure(z=z, direction=direction, optimizer=optimizer):
            optimizer.zero_grad()
            loss = proxy_dirichlet_loss(z, t, 1.0, direction)
            loss.backward()
            return loss

        optimizer.step(closure)
        mean, precisions = t.softmax(-1).mean(0)[0], []
        divergence = (mean * (mean.log() - t.log_softmax(-1).mean(0)[0])).sum()
        precisions = 2 / (2 * divergence)
        alpha = z.detach().exp()[0] + 1
        if direction == "forward":  # its minimum is the proxy itself
            torch.testing.assert_close(alpha, mean * precisions + 1, rtol=1e-3, atol=1e-3)
        else:
            expected = (mean * precisions + 1) / (precisions + 3)
            torch.testing.assert_close(alpha / alpha.sum(), expected, rtol=0.05, atol=0.02)
