"""Intervals for means over test images and over student seeds.

Images are resampled with replacement (Efron 1979), the same images for everything that is
compared. Seeds are few, and resampling three of them would call every fourth difference without
cause significant; so the error of a mean over seeds follows Student's t distribution instead, and
its draws are added to the resampled means.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import stdtr, stdtrit

Array = NDArray[np.float64]

RESAMPLES = 2000
LEVEL = 0.95
TOGETHER = 2**20
"""How many counts are converted to floats at a time."""


@dataclass(frozen=True)
class Estimate:
    """A quantity for each of R student seeds, as measured and on B resamples of the images."""

    measured: Array
    """(R,)"""
    resampled: Array
    """(B, R)"""


@dataclass(frozen=True)
class Interval:
    """An estimate and the ends of its interval."""

    estimate: float
    low: float
    high: float


@dataclass(frozen=True)
class Weights:
    """Weights (B, N) of N images in each of B resamples, kept as counts of one byte each.

    `len(weights)` is B, and `weights[b]` (N,) float64 are the weights of one resample, whose sum
    is 1.
    """

    counts: NDArray[np.uint8]
    """(B, N) how often each image was drawn; that one of N is drawn 256 times does not happen."""

    def __len__(self) -> int:
        return len(self.counts)

    def __getitem__(self, resample: int) -> Array:
        return self.counts[resample] / self.counts.shape[1]

    def means(self, columns: Array) -> Array:
        """Means (B, R) of columns (N, R) over the images of each resample."""
        resamples, images = self.counts.shape
        means = np.empty((resamples, columns.shape[1]))
        step = max(1, TOGETHER // images)
        for start in range(0, resamples, step):
            rows = slice(start, start + step)
            np.matmul(self.counts[rows].astype(np.float64), columns, out=means[rows])
        return means / images


def image_weights(images: int, seed: int = 0, resamples: int = RESAMPLES) -> Weights:
    """Weights of each image in each resample: how often it was drawn with replacement, by N.

    The same arguments give the same weights, so that comparisons are paired by image.
    """
    rng = np.random.default_rng(seed)
    counts = np.empty((resamples, images), np.uint8)
    for row in counts:
        row[:] = np.bincount(rng.integers(images, size=images), minlength=images)
    return Weights(counts)


def mean_of(values: ArrayLike, weights: Weights) -> Estimate:
    """The mean over images of values (N, R) or (N,), one column per seed."""
    columns = np.asarray(values, dtype=np.float64).reshape(weights.counts.shape[1], -1)
    return Estimate(columns.mean(0), weights.means(columns))


def interval(*sides: Estimate, log: bool = False, seed: int = 0) -> Interval:
    """The mean over seeds of one quantity, or the difference of two, with its 95 % interval.

    A difference is paired by seed: students of the same seed start alike and see the same images in
    the same order, whatever their method. The interval is the estimate plus the quantiles of the
    resampled deviations, each moved by a draw of the seeds' error: the standard error of the mean
    over R seeds times Student's t with R − 1 degrees of freedom. A single seed adds none, so then
    the interval speaks of those students only.

    Args:
        sides: one quantity, or two whose difference (first − second) is wanted; both of the same
            seeds, or one of them of a single one.
        log: take logarithms first and return to the original scale: a geometric mean, or the
            ratio of two.
        seed: of the draws.

    Returns:
        NaN throughout if a value is not finite, or its logarithm is not.
    """
    found = _deviations(sides, log)
    if not np.isfinite(found.estimate):
        return Interval(np.nan, np.nan, np.nan)
    estimate, deviations, error, count = found
    if count > 1:
        # Evenly spread over the distribution, in random order: its tails without their chance.
        ranks = np.random.default_rng(seed).permutation(len(deviations)) + 0.5
        deviations = deviations + error * stdtrit(count - 1, ranks / len(deviations))
    tail = (1 - LEVEL) / 2
    low, high = estimate + np.quantile(deviations, [tail, 1 - tail])
    ends = np.array([estimate, low, high])
    return Interval(*(np.exp(ends) if log else ends).tolist())


def p_value(*sides: Estimate, bound: float = 0.0) -> float:
    """How unlikely so large a deviation from a bound is if the quantity is right at it, 0 … 1.

    Of the quantities and errors of `interval`: two-sided, 2·min P(deviation beyond bound −
    estimate), where the resampled deviations and the seeds' error are added exactly, not by draws.
    A 95 % interval that just ends at the bound has 0.05.

    Args:
        sides: as those of `interval`.
        bound: of the quantity, or of the difference.

    Returns:
        NaN if a value is not finite.
    """
    estimate, deviations, error, count = _deviations(sides, log=False)
    if not np.isfinite(estimate):
        return np.nan
    gap = bound - estimate
    if count > 1 and error > 0:
        beyond = stdtr(count - 1, (gap - deviations) / error)
        below, above = beyond.mean(), (1 - beyond).mean()
    else:  # one resample more, which is the measured one: an error of 0 is never certain
        ranks = len(deviations) + 1
        below = (np.sum(deviations <= gap) + 1) / ranks
        above = (np.sum(deviations >= gap) + 1) / ranks
    return min(1.0, 2 * float(min(below, above)))


def holm(p_values: ArrayLike) -> Array:
    """P-values adjusted for their number, (T,) → (T,) [Holm 1979].

    Whoever calls those below 0.05 decided calls any of them wrongly in at most 5 % of runs. The
    k-th smallest of T is multiplied by T + 1 − k; none is smaller than one before it. NaN stays,
    and does not count.

    >>> holm([0.01, 0.04, 0.03]).round(4).tolist()
    [0.03, 0.06, 0.06]
    """
    raw = np.asarray(p_values, dtype=np.float64)
    adjusted, known = np.full(raw.shape, np.nan), np.flatnonzero(np.isfinite(raw))
    order = known[np.argsort(raw[known], kind="stable")]
    factors = np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(np.maximum.accumulate(factors * raw[order]), 1)
    return adjusted


class _Deviations(NamedTuple):
    """An estimate, how it deviates by image (B,), its error by seed, and the seeds' number."""

    estimate: float
    by_image: Array
    by_seed: float
    seeds: int


def _deviations(sides: Sequence[Estimate], log: bool) -> _Deviations:
    """Of one quantity or of the difference of two; the estimate is NaN if any value is."""
    with np.errstate(divide="ignore", invalid="ignore"):
        scale = np.log if log else np.asarray
        pairs = [(scale(side.measured), scale(side.resampled)) for side in sides]
        signed = list(zip((1, -1)[: len(pairs)], pairs, strict=True))
        seeds = np.asarray(sum(sign * measured for sign, (measured, _) in signed))
        means = np.asarray(sum(sign * resampled.mean(1) for sign, (_, resampled) in signed))
    estimate, count = seeds.mean(), len(seeds)
    if not (np.isfinite(estimate) and np.isfinite(means).all()):
        return _Deviations(np.nan, means, np.nan, count)
    error = seeds.std(ddof=1) / np.sqrt(count) if count > 1 else 0.0
    # Centred: an expected calibration error grows by resampling alone. At the median, so that
    # the estimate lies inside where values are clipped, as Deep Ensemble Equivalents are.
    return _Deviations(estimate, means - np.median(means), error, count)
