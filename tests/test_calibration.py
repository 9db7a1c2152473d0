"""Calibration errors against loops over bins, and against the reflected Gaussian written out."""

import numpy as np
import pytest
from scipy.special import logsumexp
from scipy.stats import norm

from ensdistill import calibration, metrics


def drawn(images, classes, seed=0, spread=0.5):
    rng = np.random.default_rng(seed)
    probs = rng.dirichlet(np.full(classes, spread), images)
    right = rng.random(images) < 0.7
    return probs, np.where(right, probs.argmax(1), rng.integers(0, classes, images))


@pytest.mark.parametrize("n_bins", [1, 5, 15])
def test_classwise_error_equals_the_loop_over_classes_and_bins(n_bins):
    probs, labels = drawn(200, 4)
    probs[:20] = np.eye(4)[labels[:20]]  # at both ends of the outer bins
    total = 0
    for k in range(4):
        for b in range(n_bins):
            inside = [
                i
                for i, p in enumerate(probs[:, k])
                if (b / n_bins < p <= (b + 1) / n_bins) or (p == 0 and b == 0)
            ]
            if inside:
                mean = sum(probs[i, k] for i in inside) / len(inside)
                share = sum(labels[i] == k for i in inside) / len(inside)
                total += len(inside) / 200 * abs(mean - share)
    assert metrics.classwise_ece(probs, labels, n_bins) == pytest.approx(total / 4, abs=1e-13)


@pytest.mark.parametrize(("images", "n_bins"), [(200, 15), (7, 3), (4, 9), (30, 1)])
def test_adaptive_error_equals_the_loop_over_bins_of_equal_counts(images, n_bins):
    probs, labels = drawn(images, 3)
    order = sorted(range(images), key=lambda i: max(probs[i]))
    total = 0
    for b in range(n_bins):
        # The first `images % n_bins` bins have one image more.
        count = images // n_bins + (b < images % n_bins)
        inside, order = order[:count], order[count:]
        gaps = [(np.argmax(probs[i]) == labels[i]) - max(probs[i]) for i in inside]
        total += abs(sum(gaps)) / images
    assert not order
    assert metrics.adaptive_ece(probs, labels, n_bins) == pytest.approx(total, abs=1e-13)


def test_adaptive_error_does_not_depend_on_the_order_of_images_of_one_confidence():
    rng = np.random.default_rng(3)
    probs = np.where(rng.random((90, 1)) < 0.5, [[0.6, 0.4]], [[0.9, 0.1]])
    labels = rng.integers(0, 2, 90)
    expected = metrics.adaptive_ece(probs, labels, 7)
    for _ in range(10):
        order = rng.permutation(90)
        assert metrics.adaptive_ece(probs[order], labels[order], 7) == expected
    # All equal: whatever the bins, the gap is that of all.
    equal = np.tile([0.75, 0.25], (90, 1))
    gap = abs(np.mean(labels == 0) - 0.75)
    assert metrics.adaptive_ece(equal, labels, 7) == pytest.approx(gap)


def smoothed(sigma, confidence, correct, steps=20000):
    """∫|mean (correct − confidence)·reflected Gaussian| by its mirror images, at midpoints."""
    t = (np.arange(steps) + 0.5) / steps
    residual = np.zeros(steps)
    for f, c in zip(confidence, correct, strict=True):
        for turn in range(-3, 4):
            density = norm.pdf(t, 2 * turn + f, sigma) + norm.pdf(t, 2 * turn - f, sigma)
            residual += (c - f) * density / len(confidence)
    return np.abs(residual).mean()


@pytest.mark.parametrize(("spread", "seed"), [(0.5, 0), (0.05, 1), (4.0, 2)])
def test_smooth_error_is_the_width_at_which_the_smoothed_error_equals_it(spread, seed):
    probs, labels = drawn(60, 3, seed, spread)
    confidence, correct = probs.max(1), probs.argmax(1) == labels
    found = metrics.smooth_ece(probs, labels)
    assert 0.01 < found < 0.5
    assert smoothed(found, confidence, correct) == pytest.approx(found, abs=2e-6)


def test_smooth_error_at_the_ends():
    probs = np.eye(3)[[0, 1, 2, 0]]
    assert metrics.smooth_ece(probs, [0, 1, 2, 0]) == 0
    assert metrics.smooth_ece(probs, [1, 2, 0, 2]) == pytest.approx(1)
    # One confidence: a Gaussian keeps its mass, so the error is the gap.
    assert metrics.smooth_ece([[0.8, 0.2]] * 10, [0] * 5 + [1] * 5) == pytest.approx(0.3)
    # Within a small width the errors of near confidences cancel, of far ones they do not.
    near = metrics.smooth_ece([[0.70, 0.30], [0.71, 0.29]] * 50, [0, 1] * 50)
    far = metrics.smooth_ece([[0.52, 0.48], [0.98, 0.02]] * 50, [0, 1] * 50)
    assert near < 0.22 < 0.3 < far


@pytest.mark.parametrize("inverse", [0.3, 1.0, 4.0])
def test_slopes_are_the_derivatives_of_the_nll(inverse):
    """By differences of log Σ_k e^{b·log p_k} − b·log p_y."""
    probs, labels = drawn(50, 6)
    log_probs, step = np.log(probs), 1e-4

    def nll(b):
        return logsumexp(b * log_probs, axis=1) - b * log_probs[np.arange(50), labels]

    below, here, above = (nll(inverse + it) for it in (-step, 0, step))
    slope, curvature = calibration.slopes(log_probs, labels, inverse)
    np.testing.assert_allclose(slope, (above - below) / (2 * step), atol=1e-6)
    np.testing.assert_allclose(curvature, (above - 2 * here + below) / step**2, atol=1e-5)
