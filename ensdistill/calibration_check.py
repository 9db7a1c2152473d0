"""Whether a student's calibration still holds on new labelled images.

Asked of its probabilities after temperature scaling, (N, K), as users get them:

- Is the calibration error larger than it would be if the probabilities were right? Labels are drawn
  from them many times [consistency resampling: Bröcker & Smith 2007].
- Do conformal sets hold the label as often as promised? If new images are drawn as validation
  images were, the number of labels that they hold is beta-binomial [Vovk 2012].
- Which temperature would be fitted to the new images, and what would it gain?
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ensdistill.bootstrap import LEVEL, Interval, holm, image_weights, interval, mean_of
from ensdistill.calibration import (
    TEMPERATURES,
    TINY,
    apply_temperature,
    clipped_log,
    confidence_bins,
    ece,
    optimal_temperature,
)
from ensdistill.deployment import Deployment, conformal_sets
from ensdistill.metrics import nll

Array = NDArray[np.float64]
Labels = NDArray[np.int64]

DRAWS = 1000
"""Of labels."""
WANTED = 0.9
"""The share of labels that the sets should hold."""
TOLERANCE = 0.03
"""Deviations of confidence and coverage that do not matter, as shares of images."""


@dataclass(frozen=True)
class Check:
    """What was found; shares are in 0 … 1, intervals have 95 %."""

    answer: str
    """One sentence that begins with "calibration holds", "calibration does not hold" or
    "undecided"."""
    gap: Interval
    """Mean confidence − accuracy; confidence is taken as known, the accuracy is binomial."""
    ece: float
    """Expected calibration error, 15 bins."""
    expected_ece: float
    """Its mean if the probabilities were right: of finitely many images it is not 0."""
    p_ece: float
    """How often it would be as large then."""
    temperature: float
    """T* of the study."""
    refitted: Interval
    """T*, fitted to the new images; ends are NaN where it is at an end of its range."""
    gain: Interval
    """By how much the refitted T lowers the NLL of the images that it was fitted to, in nats."""
    coverage: Interval | None
    """Share of labels in the sets for `WANTED`; None if nothing is known of validation images."""
    p_coverage: float | None
    """How often so few labels would be in the sets if the new images were like validation's."""


def check(probs: Array, labels: Labels, known: Deployment) -> Check:
    """All of it, of probabilities (N, K) before temperature scaling, and labels (N,)."""
    temperature = known.temperature or 1.0
    scaled = apply_temperature(probs, temperature)
    correct = scaled.argmax(1) == labels
    accuracy, confidence = binomial(int(correct.sum()), len(labels)), float(scaled.max(1).mean())
    gap = Interval(*(confidence - it for it in (accuracy.estimate, accuracy.high, accuracy.low)))
    error, expected, p_ece = consistency(scaled, labels)
    refitted = refit(probs, labels)
    gains = nll(scaled, labels, "none") - nll(
        apply_temperature(probs, refitted.estimate), labels, "none"
    )
    coverage, p_coverage = None, None
    if known.scores:
        sets = conformal_sets(scaled, known.threshold(WANTED))
        held = int(sets[np.arange(len(labels)), labels].sum())
        coverage = binomial(held, len(labels))
        p_coverage = coverage_p(held, len(labels), len(known.scores))
    return Check(
        _answer(gap, error - expected, p_ece, coverage, p_coverage, len(labels)),
        *(gap, error, expected, p_ece, temperature, refitted),
        interval(mean_of(gains, image_weights(len(labels), resamples=DRAWS))),
        *(coverage, p_coverage),
    )


def _answer(
    gap: Interval,
    excess: float,
    p_ece: float,
    coverage: Interval | None,
    p_coverage: float | None,
    images: int,
) -> str:
    """One sentence: both tests hold their level together [Holm 1979], and what is significant but
    small does not count."""
    tests = [p_ece] if p_coverage is None else [p_ece, p_coverage]
    found = [p < 1 - LEVEL for p in holm(tests)]
    low, high = (f"{100 * it:+.1f}" for it in (gap.low, gap.high))
    wrong = []
    if found[0] and excess > TOLERANCE:
        wrong.append(
            f"the calibration error is {100 * excess:.1f} points larger than if the probabilities "
            f"were right ({_p(p_ece)}), confidence − accuracy {100 * gap.estimate:+.1f} points"
        )
    if (
        coverage is not None
        and p_coverage is not None
        and found[1]
        and WANTED - coverage.estimate > TOLERANCE
    ):
        wrong.append(
            f"sets for {WANTED:.0%} of labels hold {coverage.estimate:.1%} ({_p(p_coverage)})"
        )
    if wrong:
        return f"calibration does not hold: {'; '.join(wrong)}"
    between = f"confidence − accuracy is between {low} and {high} points"
    if max(abs(gap.low), abs(gap.high)) < TOLERANCE:
        return f"calibration holds to within {100 * TOLERANCE:.0f} points: {between}"
    return f"undecided: too few images: by {images:,} images {between}"


def _p(value: float) -> str:
    return f"p = {value:.2g}" if value > 0.001 else "p ≤ 0.001"


def binomial(count: int, images: int) -> Interval:
    """The share of so many images, with its exact interval [Clopper & Pearson 1934].

    >>> binomial(10, 10).low.__round__(3)
    0.692
    """
    from scipy.special import betaincinv

    tail = (1 - LEVEL) / 2
    low = betaincinv(count, images - count + 1, tail) if count else 0.0
    high = betaincinv(count + 1, images - count, 1 - tail) if count < images else 1.0
    return Interval(count / images, float(low), float(high))


def consistency(probs: Array, labels: Labels, seed: int = 0) -> tuple[float, float, float]:
    """The calibration error, its mean if the probabilities were right, and the p-value.

    Only whether the most probable class is right matters to it, which then is so with the
    probability of that class.

    Returns:
        the error, the mean of `DRAWS` errors of drawn labels, and the share of errors, the measured
        one among them, that are at least as large.
    """
    confidence, generator = probs.max(1), np.random.default_rng(seed)
    bins, measured = confidence_bins(confidence), ece(probs, labels)
    wanted = np.bincount(bins, confidence)
    drawn = np.empty(DRAWS)
    for draw in range(DRAWS):
        right = np.bincount(bins, generator.random(len(bins)) < confidence)
        drawn[draw] = np.abs(right - wanted).sum() / len(bins)
    # Of perfect fits the sums differ by rounding.
    larger = int(np.sum(drawn >= measured - 1e-12))
    return measured, float(drawn.mean()), (larger + 1) / (DRAWS + 1)


def refit(probs: Array, labels: Labels) -> Interval:
    """T* of new images, and the interval of a root of a mean of slopes [Huber 1967].

    The NLL has the slope mean g, g = E_q log p − log p_y, in 1/T, q being the scaled
    probabilities, and g has the slope Var_q log p; so 1/T* has the standard error
    √(mean g² / N) / mean Var_q log p. The interval is that of log T*.
    """
    found = optimal_temperature(probs, labels)
    if found in TEMPERATURES:
        return Interval(found, np.nan, np.nan)
    logs, scaled = clipped_log(probs, TINY), apply_temperature(probs, found)
    mean = np.sum(scaled * logs, 1)
    variance = np.sum(scaled * (logs - mean[:, None]) ** 2, 1).mean()
    slopes = mean - logs[np.arange(len(labels)), labels]
    error = found * np.sqrt(np.mean(slopes**2) / len(labels)) / variance
    return Interval(found, *(found * np.exp(sign * 1.96 * error) for sign in (-1, 1)))


def coverage_p(held: int, images: int, scores: int) -> float:
    """P(at most so many labels in the sets) if new images are drawn as validation images were.

    The probability that a set holds a label is that of the r-th smallest of n scores,
    r = ⌈(n + 1)·0.9⌉: Beta(r, n + 1 − r) [Vovk 2012], so that the number is beta-binomial. Adding
    the most probable class to each set only makes it larger.
    """
    from scipy.stats import betabinom

    rank = int(np.ceil((scores + 1) * WANTED - 1e-9))
    if rank > scores:  # sets of all classes
        return 1.0
    return float(betabinom.cdf(held, images, rank, scores + 1 - rank))
