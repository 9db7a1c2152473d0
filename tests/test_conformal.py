"""Conformal sets against loops over classes, and their promise in simulated worlds."""

import math

import numpy as np
import pytest

from ensdistill.conformal import (
    aps_scores,
    aps_sets,
    calibration_half,
    conformal_sets,
    lac_scores,
    sets_of,
)
from ensdistill.judging import fitted, judge
from ensdistill.metrics import METRICS
from ensdistill.predictions import Mixture

SCORES = {"lac": lac_scores, "aps": aps_scores}


def drawn(images, rng, classes=6, honest=True):
    """Probabilities, and labels drawn from them, or from others."""
    probs = rng.dirichlet(np.full(classes, 0.4), images)
    true = probs if honest else rng.dirichlet(np.full(classes, 0.4), images) / 2 + probs / 2
    return probs, np.array([rng.choice(classes, p=row / row.sum()) for row in true])


def score(kind, row, k):
    return 1 - row[k] if kind == "lac" else math.fsum(p for p in row if p > row[k])


@pytest.mark.parametrize("kind", SCORES)
def test_scores_equal_the_loop(kind):
    probs = drawn(50, np.random.default_rng(0))[0]
    probs[:10] = np.round(probs[:10], 1)  # with classes that tie
    expected = [[score(kind, row, k) for k in range(6)] for row in probs]
    np.testing.assert_allclose(SCORES[kind](probs), expected, atol=1e-15)


@pytest.mark.parametrize("wanted", [0.5, 0.9])
@pytest.mark.parametrize("count", [9, 40, 5])
@pytest.mark.parametrize("kind", SCORES)
def test_sets_are_those_of_the_threshold_that_enough_calibration_labels_meet(kind, count, wanted):
    rng = np.random.default_rng(1)
    calibration, test = drawn(count, rng), drawn(30, rng)
    own = sorted(score(kind, row, y) for row, y in zip(*calibration, strict=True))
    # The least threshold with at least (count + 1)·wanted calibration scores up to it.
    enough = [q for q in own if sum(s <= q for s in own) * 10 >= (count + 1) * round(10 * wanted)]
    threshold = enough[0] if enough else math.inf
    sets = [[k for k in range(6) if score(kind, row, k) <= threshold + 1e-12] for row in test[0]]
    found = conformal_sets(SCORES[kind], calibration, test, wanted)
    assert found.size == pytest.approx(np.mean([len(chosen) for chosen in sets]))
    inside = [y in chosen for y, chosen in zip(test[1], sets, strict=True)]
    assert found.coverage == pytest.approx(np.mean(inside))
    if not enough:
        assert (found.coverage, found.size) == (1, 6)


@pytest.mark.parametrize("honest", [True, False])
@pytest.mark.parametrize("kind", SCORES)
def test_sets_hold_the_label_as_often_as_promised_whatever_the_probabilities(kind, honest):
    rng = np.random.default_rng(2)
    probs, labels = drawn(24_000, rng, honest=honest)
    found = []
    for place in range(400):  # worlds of 40 images that calibrate and 20 that test
        part = slice(60 * place, 60 * place + 60)
        p, y = probs[part], labels[part]
        found.append(conformal_sets(SCORES[kind], (p[:40], y[:40]), (p[40:], y[40:])).coverage)
    # ⌈0.9 · 41⌉ / 41 = 37 / 41 of continuous scores; more where many scores are equal.
    error = np.std(found) / np.sqrt(len(found))
    assert np.mean(found) > 0.9 - 3 * error
    if kind == "lac":
        assert np.mean(found) == pytest.approx(37 / 41, abs=3 * error)


def test_adaptive_sets_are_the_best_class_alone_where_that_is_right_often_enough():
    rng = np.random.default_rng(3)
    labels = rng.integers(0, 4, 400)
    guesses = np.where(rng.random(400) < 0.95, labels, (labels + 1) % 4)
    probs = 0.7 * np.eye(4)[guesses] + 0.3 * rng.dirichlet(np.ones(4), 400)
    halves = [(probs[part], labels[part]) for part in (slice(200), slice(200, None))]
    found = conformal_sets(aps_scores, *halves)
    assert found.size == 1
    assert found.coverage == np.mean(guesses[200:] == labels[200:])


@pytest.mark.parametrize("limit", [0.0, 0.3, 0.9, 0.9999, math.inf])
def test_adaptive_sets_of_many_classes_are_those_of_their_scores(limit):
    rng = np.random.default_rng(5)
    sure, unsure = (rng.dirichlet(np.full(300, sharp), 40) for sharp in (0.02, 5.0))
    tied = np.round(unsure, 2)  # many classes are as probable as others, and as 0
    probs, labels = np.concatenate([sure, unsure, tied]), rng.integers(0, 300, 120)
    expected, found = sets_of(aps_scores, probs, labels, limit), aps_sets(probs, labels, limit)
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_array_equal(found[1], expected[1])
    assert found[1].min() >= 1


def measured(prediction, labels, fits=None):
    chosen = {key: METRICS[key] for key in METRICS if key.startswith(("lac", "aps"))}
    return judge(chosen, [prediction], labels, 5, fits)[0]


def test_half_of_the_validation_images_calibrate_a_system():
    assert len(calibration_half(101)) == len(set(calibration_half(101))) == 50
    chosen = calibration_half(80)
    assert chosen.tolist() == sorted(chosen)
    assert 10 < np.sum(chosen < 40) < 30
    rng = np.random.default_rng(4)
    logits, labels = rng.normal(0, 2, (80, 3, 4)), rng.integers(0, 4, 80)
    logits[np.arange(80), :, labels] += 2
    p = (np.exp(logits) / np.exp(logits).sum(2, keepdims=True)).mean(1)
    found = measured(Mixture(logits[:30]), labels[:30], fitted([Mixture(logits)], labels))
    for kind, scores in SCORES.items():
        expected = conformal_sets(scores, (p[chosen], labels[chosen]), (p[:30], labels[:30]))
        assert found[f"{kind}_size"] == pytest.approx(expected.size)
        assert found[f"{kind}_coverage"] == pytest.approx(100 * expected.coverage)
    assert np.isnan(measured(Mixture(logits[:30]), labels[:30])["lac_size"])
