"""DLF against dense Gaussians: A = Φ ⊗ L element by element, inverses, torch.distributions."""

import math
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.distributions import MultivariateNormal

from ensdistill.gaussian_logits import (
    discrepancy,
    expected_squares,
    known_squares,
    posterior,
    scaled_loss,
)
from ensdistill.learning import check_first_step, learning
from ensdistill.objectives import FREE_PHASE, gaussian_likelihood
from ensdistill.students import Step, build_student
from ensdistill.weights import load_student, save_student

ARCHITECTURE = {
    "name": "resnet8", "num_classes": 5, "in_channels": 3, "width": 4,
    "mean": [0.2, 0.4, 0.6], "std": [0.1, 0.2, 0.3],
}  # fmt: skip
M, B, K, Q = 3, 4, 5, 2


def random_model(seed=0, variance=0.3):
    """f − μ (M, B, K), Φ (B, q), L (K, K) and σ² in float64."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (M, B, K), (B, Q), (K, K)
    residual, loadings, lower = (torch.randn(it, generator=generator).double() for it in shapes)
    return residual, loadings, lower.tril(), torch.tensor(variance).double()


def dense_loadings(loadings, lower):
    """A (BK, qK): row (b, k), column (c, l) is Φ_bc L_kl."""
    rows = [
        [loadings[b, c] * lower[k, m] for c in range(loadings.shape[1]) for m in range(len(lower))]
        for b in range(len(loadings))
        for k in range(len(lower))
    ]
    return torch.stack([torch.stack(row) for row in rows])


def marginal(residual, loadings, lower, variance):
    """mean_i log N(f_i − μ; 0, AAᵀ + σ²I)."""
    a = dense_loadings(loadings, lower)
    covariance = a @ a.T + variance * torch.eye(len(a)).double()
    zero = torch.zeros(len(a)).double()
    return MultivariateNormal(zero, covariance).log_prob(residual.flatten(1)).mean()


def expected_loss(residual, loadings, lower, variance, latents):
    """The M-step's loss itself."""
    squares = expected_squares(residual, loadings, lower, latents)
    return squares / (2 * variance) + residual[0].numel() / 2 * variance.log()


@pytest.mark.parametrize("variance", [0.3, 1e-4, 30.0])
def test_latents_given_a_batch_are_those_of_a_dense_gaussian(variance):
    residual, loadings, lower, variance = random_model(variance=variance)
    a = dense_loadings(loadings, lower)
    spread = torch.linalg.inv(torch.eye(Q * K).double() + a.T @ a / variance)
    found = posterior(residual, loadings, lower, variance)
    vectors = torch.kron(found.of_loadings, found.of_factor)
    torch.testing.assert_close(
        vectors @ torch.diag(found.shrinkage.flatten()) @ vectors.T, spread, rtol=1e-5, atol=1e-8
    )
    for mean, rows in zip(found.mean, residual, strict=True):
        z = spread @ a.T @ rows.flatten() / variance
        expected = torch.stack([z[c * K : (c + 1) * K] for c in range(Q)], 1)
        torch.testing.assert_close(mean, expected, rtol=1e-5, atol=1e-8)


def test_latents_are_computed_in_float64_and_returned_in_the_precision_of_the_logits():
    exact = random_model(variance=1e-5)
    single = [it.float() for it in exact]
    found, right = posterior(*single), posterior(*(it.double() for it in single))
    assert all(it.dtype == torch.float32 for it in found)
    torch.testing.assert_close(found.mean, right.mean.float(), rtol=1e-6, atol=0)
    torch.testing.assert_close(found.shrinkage, right.shrinkage.float(), rtol=1e-6, atol=0)


def test_expected_squares_are_those_of_sampled_latents():
    residual, loadings, lower, variance = random_model()
    a = dense_loadings(loadings, lower)
    spread = torch.linalg.inv(torch.eye(Q * K).double() + a.T @ a / variance)
    torch.manual_seed(0)
    count, total = 40_000, 0.0
    for rows in residual:
        z = MultivariateNormal(spread @ a.T @ rows.flatten() / variance, spread).sample((count,))
        total += (rows.flatten() - z @ a.T).square().sum(1).mean() / M
    latents = posterior(residual, loadings, lower, variance)
    found = expected_squares(residual, loadings, lower, latents)
    torch.testing.assert_close(found, total, rtol=5e-3, atol=0)


def test_gradient_of_the_loss_is_that_of_the_marginal_likelihood():
    """Fisher's identity: after the E-step both gradients are the same."""
    given = [it.requires_grad_() for it in random_model()]
    expected = torch.autograd.grad(-marginal(*given), given)
    found = torch.autograd.grad(expected_loss(*given, posterior(*given)), given)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)


def test_gradient_of_the_trace_is_that_of_finite_differences():
    residual, loadings, lower, variance = random_model()
    latents = posterior(residual, loadings, lower, variance)
    spread = torch.linalg.inv(
        torch.eye(Q * K).double()
        + dense_loadings(loadings, lower).T @ dense_loadings(loadings, lower) / variance
    )

    def trace(loadings, lower):
        return (dense_loadings(loadings, lower).T @ dense_loadings(loadings, lower) * spread).sum()

    inputs = [loadings.requires_grad_(), lower.requires_grad_()]
    without = known_squares(residual, *inputs, latents.mean)
    value = expected_squares(residual, *inputs, latents) - without
    torch.testing.assert_close(value, trace(*inputs))
    for which, gradient in enumerate(torch.autograd.grad(value, inputs)):
        for place in [(0, 0), (3, 1), (2, 0)]:
            step = torch.zeros_like(inputs[which])
            step[place] = 1e-6
            up, down = (
                trace(*[it + sign * step if n == which else it for n, it in enumerate(inputs)])
                for sign in (1, -1)
            )
            torch.testing.assert_close(gradient[place], (up - down) / 2e-6, rtol=1e-6, atol=1e-6)


def test_known_latents_are_put_in_image_by_image():
    residual, loadings, lower, _ = random_model()
    latents = torch.randn(M, K, Q).double()
    total = 0.0
    for i in range(M):
        for b in range(B):
            fitted = lower @ latents[i] @ loadings[b]
            total += (residual[i, b] - fitted).square().sum().item() / M
    found = known_squares(residual, loadings, lower, latents)
    assert found.item() == pytest.approx(total)


@pytest.mark.parametrize("exact", [True, False])
def test_em_never_lowers_the_marginal_likelihood(exact):
    """With an M-step that is exact in σ² and μ, or a small step of gradient descent in all."""
    logits, loadings, lower, variance = random_model(seed=1)
    mean = torch.zeros(B, K).double()
    parameters = [it.requires_grad_() for it in (mean, loadings, lower)]
    reached = []
    for _ in range(30):
        with torch.no_grad():
            given = logits - mean, loadings, lower
            reached.append(marginal(*given, variance).item())
            latents = posterior(*given, variance)
        squares = expected_squares(logits - mean, loadings, lower, latents)
        gradients = torch.autograd.grad(squares, parameters)
        with torch.no_grad():
            if exact:
                mean += (logits - mean - loadings @ latents.mean.mT @ lower.mT).mean(0)
                variance = expected_squares(logits - mean, loadings, lower, latents) / (B * K)
            else:
                for parameter, gradient in zip(parameters, gradients, strict=True):
                    parameter -= 0.01 * gradient
    assert all(later > earlier for earlier, later in pairwise(reached))
    assert reached[-1] > reached[0] + 1


@pytest.mark.parametrize("log_variance", [-3.0, 0.0, 2.0])
def test_gradient_of_each_block_is_the_m_steps_times_a_positive_number(log_variance):
    residual, loadings, lower, _ = random_model()
    blocks = [
        it.requires_grad_()
        for it in (residual, loadings, lower, torch.tensor(log_variance).double())
    ]
    variance = blocks[3].exp()
    latents = posterior(*blocks[:3], variance)
    plain = torch.autograd.grad(expected_loss(*blocks[:3], variance, latents), blocks)
    squares = expected_squares(*blocks[:3], latents)
    scaled = torch.autograd.grad(scaled_loss(squares, blocks[3].exp(), B * K), blocks)
    sigma2, ratio = math.exp(log_variance), squares.item() / (B * K)
    for ours, theirs in zip(scaled[:3], plain[:3], strict=True):
        torch.testing.assert_close(ours, theirs * sigma2 / (B * K))
    weight = sigma2 / (sigma2 + ratio)
    assert scaled[3].item() == pytest.approx(plain[3].item() * weight / (B * K))
    assert scaled[3].item() == pytest.approx((sigma2 - ratio) / (sigma2 + ratio) / 2)


def test_discrepancy_is_the_kernels_expectation_over_draws_of_a_normal():
    torch.manual_seed(0)
    size = 6
    x = torch.randn(4, 3, 2).double() * 1.5 + 0.3

    def kernel(a, b):
        return (-(torch.cdist(a.flatten(1), b.flatten(1)) ** 2) / (2 * size)).exp().mean()

    y, other = torch.randn(2, 3000, size).double()
    expected = kernel(x, x) - 2 * kernel(x, y) + kernel(y, other)
    assert discrepancy(x).item() == pytest.approx(expected.item(), abs=3e-3)
    assert discrepancy(x).item() > 0.02
    assert 0 <= discrepancy(torch.randn(2000, size).double()).item() < 2e-3


# --- the student and its objective -----------------------------------------------------------


@pytest.fixture
def student():
    torch.manual_seed(0)
    student = build_student("gaussian_logits", ARCHITECTURE, M, rank=Q, samples=7)
    nn.init.normal_(student.network.factor)
    return student.eval()


@pytest.fixture
def step(student):
    torch.manual_seed(1)
    teachers = [build_student("single", ARCHITECTURE, 1).network.eval() for _ in range(M)]
    x, y = torch.rand(B, 3, 8, 8), torch.randint(0, K, (B,))
    return Step(student, teachers, x, y, 0.5, torch.Generator(), torch.Generator())


def test_a_prediction_is_that_of_every_sample_alone(student):
    x = torch.rand(B, 3, 8, 8)
    with torch.no_grad():
        outputs, logits = student.network.body(x), student(x)
    assert student.members == len(logits) == 7
    for s, sample in enumerate(student.network.noise):
        for b in range(B):
            mean, loading = outputs[b, :K], outputs[b, K:]
            expected = mean.clone()
            for k in range(K):
                for m in range(k + 1):  # what is above the diagonal of the parameter has no use
                    for c in range(Q):
                        entry = student.network.factor[k, m] * sample[m, c] * loading[c]
                        expected[k] += entry.detach()
            torch.testing.assert_close(logits[s, b], expected)


def test_samples_differ_little_at_the_start():
    """Or the latents explain what the mean has not learnt, and the student learns badly."""
    torch.manual_seed(0)
    student, x = build_student("gaussian_logits", ARCHITECTURE, M), torch.rand(B, 3, 8, 8)
    with torch.no_grad():
        mean, loadings = student.eval().network(x)
        spread = (student(x) - mean).square().mean((0, 2)).sqrt()
    torch.testing.assert_close(spread, 0.1 * loadings.norm(dim=1), rtol=0.2, atol=0)


def test_samples_are_draws_of_the_gaussian():
    torch.manual_seed(0)
    student = build_student("gaussian_logits", ARCHITECTURE, M, rank=Q, samples=20_000).eval()
    nn.init.normal_(student.network.factor)
    x = torch.rand(1, 3, 8, 8)
    with torch.no_grad():
        logits = student(x)[:, 0].double()
        mean, loadings = (it[0].double() for it in student.network(x))
    lower = student.network.factor.detach().double().tril()
    spread = loadings.square().sum() * lower @ lower.T
    torch.testing.assert_close(logits.T.cov(), spread, rtol=0.05, atol=0.02 * spread.max().item())
    torch.testing.assert_close(logits.mean(0), mean, rtol=0, atol=0.05)


@pytest.mark.parametrize("progress", [0.0, 0.5])
def test_objective_is_the_m_steps_loss_of_the_teachers_centred_logits(student, step, progress):
    step = Step(*[getattr(step, it) for it in ("student", "teachers", "x", "y")], progress,
                torch.Generator(), torch.Generator())  # fmt: skip
    nn.init.constant_(student.network.log_variance, 0.4)
    parts = gaussian_likelihood(step, step.x)
    with torch.no_grad():
        logits = torch.stack([teacher(step.x) for teacher in step.teachers]).double()
        centred = logits - torch.stack([logits.sum(-1) / K] * K, -1)
        mean, loadings = (it.double() for it in student.network(step.x))
        lower, variance = student.network.factor.double().tril(), torch.tensor(0.4).double().exp()
        a, z = dense_loadings(loadings, lower), student.latents.double()
        penalty = discrepancy(z) if progress < FREE_PHASE else 0.0
        if progress < FREE_PHASE:
            fitted = torch.stack([a @ it.T.flatten() for it in z])
            squares = ((centred - mean).flatten(1) - fitted).square().sum(1).mean()
        else:
            spread = torch.linalg.inv(torch.eye(Q * K).double() + a.T @ a / variance)
            rows = (centred - mean).flatten(1)
            fitted = rows @ a @ spread @ a.T / variance
            squares = (rows - fitted).square().sum(1).mean() + (a.T @ a * spread).sum()
        ratio = squares / (B * K)
        loss = ratio / 2 + variance / (variance + ratio) * (ratio / variance + 0.4) / 2 + penalty
        probs = student(step.x).softmax(-1).mean(0)
    assert parts["loss"].item() == pytest.approx(loss.item(), rel=1e-4)
    assert parts["squared_error"].item() == pytest.approx(ratio.item(), rel=1e-4)
    assert parts["variance"].item() == pytest.approx(math.exp(0.4))
    assert parts["accuracy"].item() == 100 * (probs.argmax(-1) == step.y).float().mean().item()
    parts["loss"].backward()
    assert (student.latents.grad is None) == (progress >= FREE_PHASE)
    assert all(it.grad is not None for it in student.network.parameters())


def test_labels_are_not_those_of_other_images(step):
    elsewhere = gaussian_likelihood(step, step.x.clone())
    assert elsewhere["accuracy"].isnan()
    assert torch.equal(elsewhere["loss"], gaussian_likelihood(step, step.x)["loss"])


def test_under_autocast_only_the_network_is_rounded(step):
    exact = gaussian_likelihood(step, step.x)["loss"]
    with torch.autocast("cpu", torch.bfloat16):
        mean, loadings = step.student.network(step.x)
        rounded = gaussian_likelihood(step, step.x)["loss"]
        logits = torch.stack([teacher(step.x) for teacher in step.teachers])
    residual = logits - logits.mean(-1, keepdim=True) - mean
    given = residual, loadings, step.student.network.lower
    variance = torch.tensor(1.0)
    squares = expected_squares(*given, posterior(*given, variance))
    assert not torch.equal(rounded, exact)
    torch.testing.assert_close(rounded, scaled_loss(squares, variance, B * K), rtol=1e-6, atol=0)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_its_first_step_is_checked(step, precision):
    taught = learning(step.teachers, {"name": "gaussian_likelihood"}, {"name": "none"})
    images = torch.randint(0, 256, (B, 3, 8, 8), dtype=torch.uint8)
    before = {key: value.clone() for key, value in step.student.state_dict().items()}
    check_first_step(step.student, taught, (images, step.y), B, precision)
    assert all(torch.equal(before[key], it) for key, it in step.student.state_dict().items())


def test_only_the_networks_weights_decay(student):
    body, others = student.parameter_groups(0.1, 5e-4)
    assert (body["lr"], others["lr"]) == (0.1, 0.1)
    assert (body["weight_decay"], others["weight_decay"]) == (5e-4, 0.0)
    assert {id(it) for it in body["params"]} == {id(it) for it in student.network.body.parameters()}
    own = student.network.factor, student.network.log_variance, student.latents
    assert {id(it) for it in others["params"]} == {id(it) for it in own}


def test_weights_are_read_again_without_the_teachers_latents(student, tmp_path):
    save_student(tmp_path / "weights", student, {})
    loaded, x = load_student(tmp_path / "weights"), torch.rand(B, 3, 8, 8)
    assert loaded.spec == student.spec
    assert torch.equal(loaded(x), student(x))
    assert loaded.latents.shape == student.latents.shape
    assert not loaded.latents.any()


def test_the_same_seed_draws_the_same_student():
    first, again, other = (
        (torch.manual_seed(seed), build_student("gaussian_logits", ARCHITECTURE, M))[1]
        for seed in (0, 0, 1)
    )
    for key, value in first.state_dict().items():
        assert torch.equal(value, again.state_dict()[key])
    for key in ("latents", "network.noise"):
        assert not torch.equal(first.state_dict()[key], other.state_dict()[key])
    assert first.latents.std().item() == pytest.approx(1, abs=0.2)
