"""Metrics against scikit-learn, SciPy, torchmetrics and explicit loops."""

import math
import subprocess
import sys
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch
from scipy.optimize import brentq, minimize_scalar
from scipy.special import log_softmax, softmax
from scipy.stats import entropy as scipy_entropy
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    brier_score_loss,
    log_loss,
    roc_auc_score,
    roc_curve,
)
from torchmetrics.functional.classification import multiclass_calibration_error

from ensdistill import calibration, metrics
from ensdistill.calibration import slopes
from ensdistill.conformal import aps_scores, calibration_half, conformal_sets, lac_scores
from ensdistill.judging import fitted, judge
from ensdistill.metrics import METRICS
from ensdistill.predictions import Mixture


@pytest.fixture
def logits():
    return np.random.default_rng(0).normal(size=(400, 4, 7)).astype(np.float32) * 3


@pytest.fixture
def labels(logits):
    rng = np.random.default_rng(1)
    guesses = logits.mean(1).argmax(1)
    return np.where(rng.random(len(guesses)) < 0.6, guesses, rng.integers(0, 7, len(guesses)))


@pytest.fixture
def probs(logits):
    return metrics.ensemble_probs(logits)


def test_ensemble_probs_average_probabilities_not_logits(logits, probs):
    one_by_one = [softmax(logits[:, j].astype(float), axis=1) for j in range(4)]
    np.testing.assert_allclose(probs, sum(one_by_one) / 4, rtol=1e-12)


def test_proper_scores_agree_with_scikit_learn(probs, labels):
    assert metrics.accuracy(probs, labels) == 100 * accuracy_score(labels, probs.argmax(1))
    assert metrics.nll(probs, labels) == pytest.approx(
        log_loss(labels, probs, labels=range(7)), abs=1e-12
    )
    reference = brier_score_loss(labels, probs, labels=range(7), scale_by_half=False)
    assert metrics.brier(probs, labels) == pytest.approx(reference, abs=1e-12)


def test_proper_scores_of_every_image_equal_the_loop(probs, labels):
    nll = [-math.log(row[y]) for row, y in zip(probs, labels, strict=True)]
    brier = [
        sum((p - (k == y)) ** 2 for k, p in enumerate(row))
        for row, y in zip(probs, labels, strict=True)
    ]
    np.testing.assert_allclose(metrics.nll(probs, labels, "none"), nll, rtol=1e-12)
    np.testing.assert_allclose(metrics.brier(probs, labels, "none"), brier, rtol=1e-12)


def test_ece_agrees_with_torchmetrics(probs, labels):
    reference = multiclass_calibration_error(
        torch.tensor(probs), torch.tensor(labels), num_classes=7, n_bins=15, norm="l1"
    )
    assert metrics.ece(probs, labels) == pytest.approx(reference.item(), abs=1e-6)


@pytest.mark.parametrize("n_bins", [1, 5, 15])
def test_ece_at_every_edge_equals_the_definition_in_exact_arithmetic(n_bins):
    # Confidences on each border k/n_bins, just beside it, and at 0 and 1.
    borders = np.arange(n_bins + 1) / n_bins
    confidence = np.unique(
        np.clip([borders, np.nextafter(borders, 0), np.nextafter(borders, 1)], 0, 1)
    )
    expected = [
        next((b for b in range(n_bins) if c <= borders[b + 1]), n_bins - 1) for c in confidence
    ]
    assert metrics.confidence_bins(confidence, n_bins).tolist() == expected


def test_ece_has_no_phantom_bin_at_confidence_one():
    # Three sure and right, one sure and wrong: |0.75 − 1| = 0.25.
    probs = np.eye(3)[[0, 1, 2, 0]]
    assert metrics.ece(probs, [0, 1, 2, 1]) == pytest.approx(0.25)


def test_nll_clips_impossible_labels():
    assert metrics.nll([[1.0, 0.0]], [1]) == pytest.approx(-math.log(1e-12))


def test_entropy_agrees_with_scipy(probs):
    per_image = scipy_entropy(probs, axis=1)
    np.testing.assert_allclose(metrics.entropy(probs, "none"), per_image, rtol=1e-10)
    assert metrics.entropy(probs) == pytest.approx(per_image.mean(), rel=1e-10)
    assert metrics.entropy([[1.0, 0.0]]) == 0


def test_pairwise_kl_equals_the_double_loop(logits):
    per_image = np.zeros(len(logits))
    for n, image in enumerate(logits.astype(float)):
        p = softmax(image, axis=1)
        pairs = [scipy_entropy(p[i], p[j]) for i in range(4) for j in range(4) if i != j]
        per_image[n] = np.mean(pairs)
    np.testing.assert_allclose(metrics.pairwise_kl(logits, "none"), per_image, rtol=1e-9)
    assert metrics.pairwise_kl(logits) == pytest.approx(per_image.mean(), rel=1e-9)


def test_pairwise_kl_of_equal_or_single_members_is_zero(logits):
    assert metrics.pairwise_kl(logits[:, :1]) == 0
    equal = np.repeat(logits[:, :1], 3, axis=1)
    assert metrics.pairwise_kl(equal) == pytest.approx(0, abs=1e-12)


def test_pairwise_kl_survives_underflowing_probabilities():
    assert metrics.pairwise_kl([[[0.0, -2000.0], [-2000.0, 0.0]]]) == pytest.approx(2000)


def test_disagreement_counts_pairs_that_predict_different_classes(logits):
    for image, value in zip(logits, metrics.disagreement(logits), strict=True):
        pairs = list(combinations(image.argmax(1), 2))
        assert value == pytest.approx(np.mean([a != b for a, b in pairs]))


def test_mutual_information_equals_the_loop(logits):
    found = metrics.mutual_information(logits)
    for image, value in zip(logits.astype(float), found, strict=True):
        p = [softmax(member) for member in image]
        expected = scipy_entropy(sum(p) / 4) - sum(map(scipy_entropy, p)) / 4
        assert value == pytest.approx(expected, abs=1e-9)
    np.testing.assert_array_equal(metrics.mutual_information(logits[:, :1]), 0)


SCORES = {
    "continuous": lambda rng, n, shift: rng.normal(shift, size=n),
    "tied": lambda rng, n, shift: rng.integers(0, 4, n) + rng.integers(0, 2, n) * round(shift),
    "saturated": lambda rng, n, shift: np.maximum(rng.normal(shift, size=n), 0.5),
    "constant": lambda rng, n, shift: np.full(n, 0.1),
}


@pytest.mark.parametrize("kind", SCORES)
def test_detection_scores_agree_with_scikit_learn(kind):
    rng = np.random.default_rng(0)
    for _ in range(100):
        inside = SCORES[kind](rng, rng.integers(1, 80), 0.0)
        outside = SCORES[kind](rng, rng.integers(1, 80), rng.normal())
        is_outside = np.repeat([0, 1], [len(inside), len(outside)])
        both = np.concatenate([inside, outside])
        assert metrics.auroc(inside, outside) == pytest.approx(roc_auc_score(is_outside, both))
        reference = average_precision_score(is_outside, both)
        assert metrics.aupr(inside, outside) == pytest.approx(reference)
        false, true, _ = roc_curve(is_outside, both, drop_intermediate=False)
        assert metrics.fpr95(inside, outside) == pytest.approx(false[np.argmax(true >= 0.95)])


def test_detection_is_perfect_when_all_others_score_higher_and_worst_when_all_score_lower():
    low, high = np.linspace(0, 1, 30), np.linspace(2, 3, 20)
    assert [metrics.auroc(low, high), metrics.aupr(low, high)] == pytest.approx([1, 1])
    assert metrics.fpr95(low, high) == metrics.auroc(high, low) == 0
    assert metrics.fpr95(high, low) == 1
    # The k-th outside image found comes after all 20 inside: precision k / (20 + k).
    expected = np.mean([k / (20 + k) for k in range(1, 31)])
    assert metrics.aupr(high, low) == pytest.approx(expected)


@pytest.mark.parametrize("scale", [0.3, 1.0, 4.0])
def test_optimal_temperature_is_the_minimum_found_by_scipy(probs, labels, scale):
    probs = metrics.apply_temperature(probs, 1 / scale)
    log_probs = np.log(probs)

    def loss(log_temperature):
        scaled = softmax(log_probs / math.exp(log_temperature), axis=1)
        return log_loss(labels, scaled, labels=range(7))

    reference = minimize_scalar(loss, bounds=(-3, 3), method="bounded", options={"xatol": 1e-10})
    found = metrics.optimal_temperature(probs, labels)
    assert found == pytest.approx(math.exp(reference.x), rel=1e-5)
    assert loss(math.log(found)) <= reference.fun + 1e-12


def test_optimal_temperature_stays_in_its_range():
    assert metrics.optimal_temperature([[0.9, 0.1], [0.2, 0.8]], [0, 1]) == 0.05
    assert metrics.optimal_temperature([[0.9, 0.1], [0.2, 0.8]], [1, 0]) == 20.0


@pytest.mark.parametrize("best", [0.052, 0.2, 0.7, 1.0, 1.4, 5.0, 19.0, 0.01, 300.0])
def test_the_temperature_is_the_root_that_brent_finds_and_needs_few_passes(monkeypatch, best):
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 3, (3000, 7))
    right = softmax(logits / best, axis=1)
    labels = (right.cumsum(1) > rng.random((3000, 1))).argmax(1)
    log_probs, asked = log_softmax(logits, axis=1), []

    def slope(inverse):
        mean = np.sum(softmax(inverse * log_probs, axis=1) * log_probs, axis=1)
        return np.mean(mean - log_probs[np.arange(3000), labels])

    def counted(*arguments):
        asked.append(arguments[2])
        return slopes(*arguments)

    monkeypatch.setattr(calibration, "slopes", counted)
    found = metrics.optimal_temperature(np.exp(log_probs), labels)
    ends = [slope(inverse) for inverse in (1 / 20, 20)]
    if ends[0] >= 0 or ends[1] <= 0:
        assert found == (20 if ends[0] >= 0 else 0.05)
    else:
        assert 1 / found == pytest.approx(brentq(slope, 1 / 20, 20, xtol=1e-13), rel=1e-10)
    assert len(asked) <= 12


def test_apply_temperature_one_changes_nothing(probs):
    np.testing.assert_allclose(metrics.apply_temperature(probs, 1.0), probs, rtol=1e-9)


@pytest.mark.parametrize(
    ("score", "curve", "expected", "outside"),
    [
        (0.9, [0.8, 0.7, 0.6], 1.0, -1),
        (0.8, [0.8, 0.7, 0.6], 1.0, 0),
        (0.75, [0.8, 0.7, 0.6], 1.5, 0),
        (0.7, [0.8, 0.7, 0.6], 2.0, 0),
        (0.6, [0.8, 0.7, 0.6], 3.0, 0),
        (0.5, [0.8, 0.7, 0.6], 3.0, 1),
        (0.65, [0.8, 0.9, 0.6], 2 + 0.25 / 0.3, 0),  # not monotone: where it first gets there
        (0.75, [0.8, 0.7, 0.9, 0.6], 1.5, 0),
        (0.7, [0.8, 0.7, 0.7, 0.6], 2.0, 0),  # a plateau: the smallest m
        (0.5, [0.8], 1.0, 1),
    ],
)
def test_deep_ensemble_equivalent(score, curve, expected, outside):
    assert metrics.deep_ensemble_equivalent(score, curve) == pytest.approx(expected)
    assert metrics.dee_outside(score, curve) == outside


def test_deep_ensemble_equivalent_inverts_numpy_interpolation():
    curve = np.sort(np.random.default_rng(2).random(6))[::-1]
    for size in np.linspace(1, 6, 23):
        score = np.interp(size, np.arange(1, 7), curve)
        assert metrics.deep_ensemble_equivalent(score, curve) == pytest.approx(size)


def test_every_metric_is_its_function_of_the_prediction(logits, labels):
    prediction, probs = Mixture(logits), metrics.ensemble_probs(logits)
    scaled = metrics.apply_temperature(probs, 1.7)
    human = np.random.default_rng(3).dirichlet(np.ones(7), len(labels))
    validation = Mixture(logits[:200] / 3)
    (fit,) = fitted([validation], labels[:200])
    assert fit.temperature == metrics.optimal_temperature(validation.probs(), labels[:200])
    fits = [replace(fit, temperature=1.7)]
    half = calibration_half(200)
    calibration = validation.probs()[half], labels[half]
    lac, aps = (
        conformal_sets(scores, calibration, (probs, labels)) for scores in (lac_scores, aps_scores)
    )
    expected = {
        "acc": metrics.accuracy(probs, labels),
        "nll": metrics.nll(probs, labels),
        "bs": metrics.brier(probs, labels),
        "ece": metrics.ece(probs, labels, 9),
        "nll_ts": metrics.nll(scaled, labels),
        "bs_ts": metrics.brier(scaled, labels),
        "ece_ts": metrics.ece(scaled, labels, 9),
        "temperature": 1.7,
        "diversity": metrics.pairwise_kl(logits),
        "entropy": metrics.entropy(probs),
        "aurc": metrics.aurc(probs, labels),
        "augrc": metrics.augrc(probs, labels),
        "rejection_ratio": metrics.rejection_ratio(probs, labels),
        "classwise_ece": metrics.classwise_ece(probs, labels, 9),
        "adaptive_ece": metrics.adaptive_ece(probs, labels, 9),
        "smooth_ece": metrics.smooth_ece(probs, labels),
        "lac_coverage": 100 * lac.coverage,
        "lac_size": lac.size,
        "aps_coverage": 100 * aps.coverage,
        "aps_size": aps.size,
        "human_kl": metrics.human_kl(probs, human),
    }
    assert len(set(expected.values())) == len(expected)
    alone = {key: metric for key, metric in METRICS.items() if not metric.equivalent_of}
    assert judge(alone, [prediction], labels, 9, fits, human) == [expected]
    for key, metric in METRICS.items() - alone.items():
        assert METRICS[metric.equivalent_of].better == -1, key
        assert metric.function(0.65, [0.8, 0.7, 0.6]) == pytest.approx(2.5)


def test_divergence_from_people_agrees_with_scipy(probs):
    human = np.random.default_rng(4).multinomial(50, probs) / 50  # with classes that nobody chose
    expected = np.mean([scipy_entropy(h, p) for h, p in zip(human, probs, strict=True)])
    assert metrics.human_kl(probs, human) == pytest.approx(expected, rel=1e-12)
    assert metrics.human_kl(human, human) == 0
    alone, chosen = Mixture(np.log(probs[:, None])), {"human_kl": METRICS["human_kl"]}
    assert np.isnan(judge(chosen, [alone], np.zeros(len(probs), int), 9)[0]["human_kl"])


def test_every_metric_says_what_it_is():
    for key, metric in METRICS.items():
        assert metric.title, key
        assert metric.meaning, key
        assert not metric.meaning.endswith("."), key
    assert len({metric.title for metric in METRICS.values()}) == len(METRICS)


def test_metrics_are_titled_by_their_unit_and_by_what_is_better():
    assert [METRICS[key].column for key in ("acc", "nll", "temperature")] == [
        "ACC % ↑",
        "NLL ↓",
        "T*",
    ]
    assert [METRICS[key].axis for key in ("acc", "nll", "ece", "diversity")] == [
        "Accuracy (%), higher is better",
        "NLL (nats), lower is better",
        "ECE, lower is better",
        "Diversity (nats)",
    ]


def test_what_is_slow_to_import_is_not_imported_with_the_names_of_metrics():
    slow = {"scipy", "sklearn", "pandas", "matplotlib", "torch"}
    code = f"import sys, ensdistill.studies; assert not {slow} & sys.modules.keys()"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("labels", [[0, 1, 2], [0, 7], [-1, 0]])
def test_labels_that_do_not_fit_are_refused(labels):
    with pytest.raises(ValueError, match="labels"):
        metrics.nll([[0.5, 0.5], [0.1, 0.9]], labels)
