"""Selective prediction against all orders of tied images, in fractions, and sums written out."""

from fractions import Fraction
from itertools import pairwise, permutations

import numpy as np
import pytest

from ensdistill import metrics, selective

MEASURES = ("aurc", "augrc", "rejection_ratio")


def drawn(images, classes, rng, steps=None):
    """Probabilities, of few different confidences if `steps` are told, and labels."""
    p = rng.dirichlet(np.full(classes, 0.5), images)
    if steps:
        p = np.round(p[:, 0] * steps) / steps
        p = np.stack([p, 1 - p], axis=1)
    return p, np.where(rng.random(images) < 0.6, p.argmax(1), rng.integers(0, p.shape[1], images))


def by_the_definition(order):
    """AURC and AUGRC of ones (wrong) and zeros (right), surest first."""
    images = len(order)
    kept = [sum(order[:k]) for k in range(1, images + 1)]
    risk = sum(Fraction(wrong, k) for k, wrong in enumerate(kept, start=1)) / images
    return risk, Fraction(sum(kept), images * images)


@pytest.mark.parametrize("seed", range(8))
def test_areas_are_the_means_over_all_orders_of_images_of_one_confidence(seed):
    rng = np.random.default_rng(seed)
    probs, labels = drawn(6, 2, rng, steps=4)
    confidence = [max(row) for row in probs]
    wrong = [int(np.argmax(row) != y) for row, y in zip(probs, labels, strict=True)]
    found = []
    for places in permutations(range(6)):
        if all(confidence[i] >= confidence[j] for i, j in pairwise(places)):
            found.append(by_the_definition([wrong[i] for i in places]))
    assert seed or len(found) > 1
    risk, generalised = (sum(part) / len(found) for part in zip(*found, strict=True))
    assert metrics.aurc(probs, labels) == pytest.approx(float(risk), abs=1e-14)
    assert metrics.augrc(probs, labels) == pytest.approx(float(generalised), abs=1e-14)
    if 0 < sum(wrong) < 6:
        best, _ = by_the_definition(sorted(wrong))
        chance = Fraction(sum(wrong), 6)
        expected = float((chance - risk) / (chance - best))
        assert metrics.rejection_ratio(probs, labels) == pytest.approx(expected, abs=1e-13)


def test_areas_of_many_images_equal_the_loop():
    probs, labels = drawn(500, 5, np.random.default_rng(0))
    order = sorted(range(500), key=lambda i: -max(probs[i]))
    wrong = [int(np.argmax(probs[i]) != labels[i]) for i in order]
    risk, generalised = by_the_definition(wrong)
    assert metrics.aurc(probs, labels) == pytest.approx(float(risk), rel=1e-12)
    assert metrics.augrc(probs, labels) == pytest.approx(float(generalised), rel=1e-12)
    curve = selective.risks(probs, labels)
    assert curve[[0, 99, 499]] == pytest.approx(
        [wrong[0], sum(wrong[:100]) / 100, sum(wrong) / 500]
    )


@pytest.mark.parametrize("steps", [None, 10])
def test_the_order_of_images_does_not_matter(steps):
    rng = np.random.default_rng(1)
    probs, labels = drawn(300, 4, rng, steps)
    for _ in range(20):
        order = rng.permutation(300)
        for name in MEASURES:
            measure = getattr(metrics, name)
            assert measure(probs[order], labels[order]) == measure(probs, labels)


def test_rejection_is_chance_for_equals_perfect_for_the_oracle_and_undefined_for_one_outcome():
    rng = np.random.default_rng(2)
    labels = rng.integers(0, 2, 50)
    equal = np.tile([0.7, 0.3], (50, 1))
    assert metrics.aurc(equal, labels) == pytest.approx(labels.mean(), abs=1e-15)
    assert metrics.rejection_ratio(equal, labels) == pytest.approx(0, abs=1e-12)
    sure = np.where(labels == 0, 0.9, 0.6)[:, None] + rng.uniform(0, 0.05, (50, 1))
    assert metrics.rejection_ratio(np.hstack([sure, 1 - sure]), labels) == pytest.approx(1)
    assert metrics.rejection_ratio(np.hstack([1.5 - sure, sure - 0.5]), labels) < -0.5
    for label in (0, 1):
        assert np.isnan(metrics.rejection_ratio(equal, np.full(50, label)))
