"""Intervals against SciPy's, and how often their verdicts are right in simulated worlds."""

import tracemalloc
from collections import Counter

import numpy as np
import pytest
from scipy.special import softmax
from scipy.stats import gmean, norm, t, ttest_rel

from ensdistill import bootstrap
from ensdistill.bootstrap import Estimate, image_weights, interval, mean_of
from ensdistill.claims import above, verdict
from ensdistill.resampled import calibration_error, side_by_side


def ends(found):
    return [found.low, found.high]


def exact(values, resamples=100_000):
    """An estimate per seed, known without error from images."""
    values = np.asarray(values, dtype=float)
    return Estimate(values, np.tile(values, (resamples, 1)))


def test_weights_are_counts_of_images_drawn_with_replacement():
    weights = image_weights(40, seed=3, resamples=5000)
    assert len(weights) == 5000
    counts = 40 * np.array([weights[resample] for resample in range(5000)])
    np.testing.assert_allclose(counts, counts.round(), atol=1e-12)
    np.testing.assert_allclose(counts.sum(1), 40, rtol=1e-12)
    # Multinomial(40, 1/40): mean 1, variance 39/40, covariance −1/40.
    np.testing.assert_allclose(counts.mean(0), 1, atol=0.07)
    covariance = np.cov(counts.T)
    np.testing.assert_allclose(np.diag(covariance), 39 / 40, atol=0.1)
    between = covariance[~np.eye(40, dtype=bool)]
    assert between.mean() == pytest.approx(-1 / 40, abs=0.003)


def test_weights_take_a_byte_per_image_and_resample(monkeypatch):
    """86 MiB of 45,000 images; as floats they were 687."""
    monkeypatch.setattr(bootstrap, "TOGETHER", 3000)
    tracemalloc.start()
    try:
        mean_of(np.ones((3000, 3)), image_weights(3000, resamples=400))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert 3000 * 400 < peak < 1.5 * 3000 * 400


def test_weights_are_decided_by_the_seed():
    first, same, other = (image_weights(30, seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first.counts, same.counts)
    assert not np.array_equal(first.counts, other.counts)


@pytest.mark.parametrize("together", [1, 30, 2**20])
def test_mean_of_is_the_mean_of_the_images_drawn(monkeypatch, together):
    monkeypatch.setattr(bootstrap, "TOGETHER", together)  # of 7 · 21: by rows, 4 rows, all
    values = np.random.default_rng(0).normal(size=(7, 2))
    weights = image_weights(7, resamples=21)
    found = mean_of(values, weights)
    assert found.resampled.shape == (21, 2)
    np.testing.assert_allclose(found.measured, values.sum(0) / 7)
    for row, means in zip(weights, found.resampled, strict=True):
        drawn = np.repeat(values, np.rint(7 * row).astype(int), axis=0)
        np.testing.assert_allclose(means, drawn.mean(0))
    one = mean_of(values[:, 0], weights)
    np.testing.assert_allclose(one.resampled[:, 0], found.resampled[:, 0])


@pytest.mark.parametrize("log", [False, True])
def test_over_images_alone_the_interval_is_the_normal_one(log):
    values = np.random.default_rng(1).gamma(3.0, size=2000)
    found = interval(mean_of(values, image_weights(2000)), log=log)
    mean, error = values.mean(), values.std(ddof=1) / np.sqrt(2000)
    expected = np.array(norm.interval(0.95, mean, error))
    if log:  # by the delta method
        expected = np.exp(norm.interval(0.95, np.log(mean), error / mean))
    assert found.estimate == pytest.approx(mean)
    assert ends(found) == pytest.approx(expected, abs=0.25 * error)


def test_a_difference_is_paired_by_image():
    rng = np.random.default_rng(2)
    image = rng.normal(0, 10, size=2000)
    first, second = (image + rng.normal(size=2000) for _ in range(2))
    weights = image_weights(2000)
    found = interval(mean_of(first, weights), mean_of(second, weights))
    difference = first - second
    error = difference.std(ddof=1) / np.sqrt(2000)
    assert found.estimate == pytest.approx(difference.mean())
    expected = norm.interval(0.95, difference.mean(), error)
    assert ends(found) == pytest.approx(expected, abs=0.25 * error)


@pytest.mark.parametrize("seeds", [2, 3, 5, 20])
def test_over_seeds_alone_the_interval_is_students(seeds):
    values = np.random.default_rng(seeds).normal(3, 1, seeds)
    found = interval(exact(values))
    error = values.std(ddof=1) / np.sqrt(seeds)
    expected = t.interval(0.95, seeds - 1, values.mean(), error)
    assert found.estimate == pytest.approx(values.mean())
    # An end is a quantile of 100,000 draws.
    assert ends(found) == pytest.approx(expected, abs=0.04 * (expected[1] - expected[0]))


@pytest.mark.parametrize("seeds", [2, 3, 6])
def test_a_difference_over_seeds_alone_is_paired_by_seed(seeds):
    rng = np.random.default_rng(seeds)
    start = rng.normal(0, 5, seeds)  # what students of the same seed share
    first, second = start + rng.normal(2, 1, seeds), start + rng.normal(0, 0.2, seeds)
    found = interval(exact(first), exact(second))
    reference = ttest_rel(first, second).confidence_interval(0.95)
    width = reference.high - reference.low
    assert found.estimate == pytest.approx(first.mean() - second.mean())
    assert ends(found) == pytest.approx([reference.low, reference.high], abs=0.04 * width)


def test_errors_of_images_and_seeds_add_up():
    rng = np.random.default_rng(4)
    values = rng.normal(size=(2000, 1)) + rng.normal(0, 0.02, 30)
    found = interval(mean_of(values, image_weights(2000)))
    by_image, by_seed = values.mean(1).var(ddof=1) / 2000, values.mean(0).var(ddof=1) / 30
    expected = 2 * norm.ppf(0.975) * np.sqrt(by_image + by_seed)
    assert found.high - found.low == pytest.approx(expected, rel=0.1)


def test_logarithms_compare_geometric_means_by_their_ratio():
    first, second = np.array([1.0, 2.0, 4.0]), np.array([0.5, 0.7, 0.6])
    ratio = interval(exact(first), exact(second), log=True)
    plain = interval(exact(np.log(first)), exact(np.log(second)))
    assert ratio.estimate == pytest.approx(gmean(first) / gmean(second))
    assert ends(ratio) == pytest.approx(np.exp(ends(plain)))


def test_a_single_seed_adds_no_error():
    several = [1.0, 1.5, 1.3]
    assert ends(interval(exact([2.0]))) == [2, 2]
    alone, against = interval(exact(several)), interval(exact(several), exact([2.0]))
    assert ends(against) == pytest.approx([end - 2 for end in ends(alone)])


@pytest.mark.parametrize(
    ("values", "log"), [([np.nan, 1.0], False), ([0.0, 1.0], True), ([-1.0], True)]
)
def test_what_has_no_value_has_no_interval(values, log):
    found = interval(exact(values), exact([1.0]), log=log)
    assert np.isnan([found.estimate, *ends(found)]).all()
    assert verdict(found, above(0)) == "undecided"


def test_one_resample_without_a_logarithm_is_enough_for_none():
    resampled = np.ones((50, 1))
    resampled[7] = 0
    assert np.isnan(interval(Estimate(np.ones(1), resampled), log=True).low)


# --- verdicts on simulated worlds ---------------------------------------------------------------

IMAGES, DRAWS = 100, 20


@pytest.fixture(scope="module")
def weights():
    """Several draws, so that no world's verdict hangs on the luck of one."""
    return [image_weights(IMAGES, seed, resamples=300) for seed in range(DRAWS)]


def fixed(estimate):
    """As if there were no other students: seeds averaged, their spread ignored."""
    measured, resampled = estimate.measured.mean(), estimate.resampled.mean(1)
    return Estimate(measured[None], resampled[:, None])


def rates(worlds, sides):
    """Shares of worlds in which "first > second" is supported, and is not, by kind of interval.

    `sides` simulates a world: first and second, and second by other images.
    """
    counts = {kind: Counter() for kind in ("ours", "naive", "unpaired")}
    for world in range(worlds):
        first, second, elsewhere = sides(world)
        for kind, found in (
            ("ours", interval(first, second, seed=world)),
            ("naive", interval(fixed(first), fixed(second))),
            ("unpaired", interval(first, elsewhere, seed=world)),
        ):
            counts[kind][verdict(found, above(0))] += 1
    decided = ("supported", "not supported")
    return {kind: [count[word] / worlds for word in decided] for kind, count in counts.items()}


def means_of_students(weights, seeds, effect, shared=0.0):
    """Worlds in which images differ most, students of one method less, by what is `shared` too.

    `shared` is the deviation of what students of the same seed have in common.
    """
    rng = np.random.default_rng(seeds)

    def sides(world):
        image = rng.normal(0, 2, (IMAGES, 1)) + rng.normal(0, shared, seeds)
        first, second = (
            image + mean + rng.normal(0, 0.2, seeds) + rng.normal(0, 0.5, (IMAGES, seeds))
            for mean in (effect, 0)
        )
        here, elsewhere = weights[world % DRAWS], weights[(world + 1) % DRAWS]
        return mean_of(first, here), mean_of(second, here), mean_of(second, elsewhere)

    return sides


@pytest.mark.parametrize("shared", [0.0, 1.0])
@pytest.mark.parametrize("seeds", [3, 5])
def test_without_an_effect_verdicts_are_rarely_wrong(weights, seeds, shared):
    found = rates(1000, means_of_students(weights, seeds, 0, shared))
    # 2.5 % each are allowed; 5 % of 1000 worlds vary by 0.7 %.
    assert 0.01 < sum(found["ours"]) < 0.07
    assert max(found["ours"]) < 0.04
    assert sum(found["naive"]) > 0.5  # whoever ignores seeds finds an effect in every other world


@pytest.mark.parametrize("shared", [0.0, 1.0])
@pytest.mark.parametrize("seeds", [3, 5])
def test_a_large_effect_is_nearly_always_found(weights, seeds, shared):
    # With 3 seeds two degrees of freedom are left, and their interval is wide.
    found = rates(300, means_of_students(weights, seeds, {3: 1.6, 5: 1.2}[seeds], shared))
    assert found["ours"][0] > 0.95
    assert found["ours"][1] == 0
    smaller = rates(300, means_of_students(weights, seeds, 0.8, shared))
    assert smaller["ours"][0] > smaller["unpaired"][0] + 0.1  # pairing by image finds more


def calibration_errors(weights, overconfidence):
    """Worlds with calibrated labels, and students of both methods that are too sure of them."""
    rng, seeds = np.random.default_rng(5), 5

    def students(x, labels, factor, here):
        sharpness = factor * np.exp(rng.normal(0, 0.15, seeds))
        logits = [s * x + rng.normal(0, 0.3, x.shape) for s in sharpness]
        return side_by_side(
            [calibration_error(softmax(z, axis=1), labels, 15, here) for z in logits]
        )

    def sides(world):
        x, here = rng.normal(0, 1.5, (IMAGES, 4)), weights[world % DRAWS]
        labels = (softmax(x, axis=1).cumsum(1) > rng.random((IMAGES, 1))).argmax(1)
        first, second = (students(x, labels, 2 * more, here) for more in (overconfidence, 1))
        return first, second, second

    return sides


def test_calibration_errors_of_equal_systems_differ_by_nothing(weights):
    sides = calibration_errors(weights, overconfidence=1)
    differences = [interval(*sides(world)[:2]).estimate for world in range(200)]
    error = np.std(differences) / np.sqrt(200)
    assert np.mean(differences) == pytest.approx(0, abs=3 * error)
    assert error < 0.002
    found = rates(300, sides)
    assert sum(found["ours"]) < 0.07
    assert sum(found["naive"]) > 0.1
    worse = rates(100, calibration_errors(weights, overconfidence=2))
    assert worse["ours"][0] > 0.9


def test_resampling_alone_raises_a_calibration_error_and_the_interval_does_not_follow():
    rng = np.random.default_rng(6)
    x = rng.normal(0, 1.5, (IMAGES, 4))
    labels = (softmax(x, axis=1).cumsum(1) > rng.random((IMAGES, 1))).argmax(1)
    estimate = calibration_error(softmax(x, axis=1), labels, 15, image_weights(IMAGES))
    found = interval(estimate)
    assert estimate.resampled.mean() > found.estimate + 0.02  # of calibrated predictions
    assert (found.low + found.high) / 2 == pytest.approx(found.estimate, abs=0.01)
