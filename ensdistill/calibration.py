"""Calibration of predicted probabilities: bins, calibration errors, temperature scaling.

Probabilities are (N, K), labels (N,) integers in 0 … K−1; anything that NumPy can convert is
taken. Arithmetic is float64. SciPy is imported where it is used: Snakemake reads this module in
every job.
"""

from collections.abc import Generator

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

SMALLEST_PROBABILITY = 1e-12
"""Where −log p stops growing."""
TINY = np.finfo(np.float64).tiny
"""Stands for probability 0 where temperature scaling takes a logarithm."""
SMOOTHED = 4096
"""Steps from 0 to 1 in which a smooth calibration error is computed."""
TEMPERATURES = (0.05, 20.0)
"""The range in which the optimal temperature is sought."""
TOGETHER = 2**21
"""Numbers of an array that is made only to be summed."""
MOST_STEPS = 100
"""Of this search, which takes about five: an end where rounding alone would go on."""


def paired(probs: ArrayLike, labels: ArrayLike) -> tuple[Array, NDArray[np.int64]]:
    """Probabilities (N, K) and labels (N,) as arrays.

    Raises:
        ValueError: they do not fit together.

    >>> probs, labels = paired([[0.9, 0.1]], [0])
    >>> probs.dtype, labels.dtype
    (dtype('float64'), dtype('int64'))
    """
    probs, labels = np.asarray(probs, dtype=np.float64), np.asarray(labels)
    if probs.ndim != 2 or labels.shape != probs.shape[:1] or not len(labels):
        raise ValueError(f"probabilities {probs.shape} and labels {labels.shape} do not pair up")
    if labels.min() < 0 or labels.max() >= probs.shape[1]:
        raise ValueError(f"labels must be in 0 … {probs.shape[1] - 1}")
    return probs, labels.astype(np.int64)


def clipped_log(probs: ArrayLike, smallest: float = SMALLEST_PROBABILITY) -> Array:
    """log p, of no less than the smallest probability.

    >>> clipped_log([1.0, 0.0], smallest=0.001).round(4).tolist()
    [0.0, -6.9078]
    """
    return np.log(np.clip(np.asarray(probs, dtype=np.float64), smallest, None))


def softmax(logits: ArrayLike) -> Array:
    """Over the last axis, in float64.

    >>> softmax([[0.0, np.log(3)]]).round(4).tolist()
    [[0.25, 0.75]]
    """
    from scipy.special import softmax

    return softmax(np.asarray(logits, dtype=np.float64), axis=-1)


def confidence_bins(confidence: ArrayLike, n_bins: int = 15) -> NDArray[np.int64]:
    """Index of the equal-width bin (lo, hi] of each confidence in [0, 1]; 0 is in the first.

    >>> confidence_bins([0.0, 0.5, 0.51, 1.0], n_bins=2).tolist()
    [0, 0, 1, 1]
    """
    edges = np.arange(n_bins + 1) / n_bins
    return np.clip(np.searchsorted(edges, np.asarray(confidence), side="left") - 1, 0, n_bins - 1)


def surest(probs: ArrayLike, labels: ArrayLike) -> tuple[Array, NDArray[np.int64]]:
    """The same predictions of two classes, (N, 2) and (N,): of the most probable one, or another.

    The first column is the confidence, the second one 0, and the label 0 where the most probable
    class is right. Whatever looks at the confidence and at whether it is right alone, such as `ece`
    and `aurc`, finds the same in them.

    >>> surest([[0.1, 0.9], [0.8, 0.2]], [1, 1])[0].tolist()
    [[0.9, 0.0], [0.8, 0.0]]
    >>> surest([[0.1, 0.9], [0.8, 0.2]], [1, 1])[1].tolist()
    [0, 1]
    """
    probs, labels = paired(probs, labels)
    first = probs.argmax(1)
    confidence = probs[np.arange(len(probs)), first]
    return np.stack([confidence, np.zeros_like(confidence)], 1), 1 * (first != labels)


def reliability(
    probs: ArrayLike, labels: ArrayLike, n_bins: int = 15
) -> tuple[NDArray[np.int64], Array, Array]:
    """Per confidence bin: image count, mean confidence, accuracy as a share (0 where empty).

    >>> count, confidence, correct = reliability([[0.8, 0.2], [0.6, 0.4]], [0, 1], n_bins=2)
    >>> count.tolist(), confidence.round(4).tolist(), correct.tolist()
    ([0, 2], [0.0, 0.7], [0.0, 0.5])
    """
    probs, labels = paired(probs, labels)
    confidence, correct = probs.max(1), probs.argmax(1) == labels
    bins = confidence_bins(confidence, n_bins)
    count = np.bincount(bins, minlength=n_bins)
    mean_confidence, mean_correct = (
        np.bincount(bins, weights=values, minlength=n_bins) / np.maximum(count, 1)
        for values in (confidence, correct)
    )
    return count, mean_confidence, mean_correct


def ece(probs: ArrayLike, labels: ArrayLike, n_bins: int = 15) -> float:
    """Expected calibration error, Σ_b n_b/N·|acc_b − conf_b|, in 0 … 1 [Naeini et al. 2015].

    Bins are those of `confidence_bins`.

    >>> round(ece([[0.8, 0.2], [0.7, 0.3]], [0, 1]), 4)
    0.45
    """
    count, confidence, correct = reliability(probs, labels, n_bins)
    return float(np.sum(count * np.abs(correct - confidence)) / count.sum())


def classwise_ece(probs: ArrayLike, labels: ArrayLike, n_bins: int = 15) -> float:
    """Class-wise ECE: mean over K classes of Σ_b n_b/N·|mean p_k − share of class k|, in 0 … 1.

    Kull et al. 2019, eq. 3. Bins are those of `confidence_bins`, of p_k.

    >>> round(classwise_ece([[0.8, 0.2], [0.7, 0.3]], [0, 1]), 4)
    0.45
    """
    return mean_gap(classwise_gaps(probs, labels, n_bins), len(np.asarray(labels)))


def classwise_gaps(probs: ArrayLike, labels: ArrayLike, n_bins: int = 15) -> Array:
    """Σ of p_k − 1[k = y] over the images of every class and bin, (K, n_bins)."""
    probs, labels = paired(probs, labels)
    gaps, _, places, beyond = _split_gaps(probs, labels, n_bins)
    # Of no places NumPy counts integers, whatever the weights.
    sums = np.bincount(places, beyond, n_bins * gaps.shape[1]).astype(np.float64)
    sums = sums.reshape(-1, n_bins)
    sums[:, 0] = gaps.sum(axis=0)
    return sums


def _split_gaps(
    probs: Array, labels: NDArray[np.int64], n_bins: int
) -> tuple[Array, NDArray[np.int64], NDArray[np.int64], Array]:
    """p_k − 1[k = y] (N, K) in the first bin, 0 elsewhere; and in the others, where an image has
    fewer than n_bins classes: their images, n_bins·k + bin, and values."""
    gaps = probs.copy()
    gaps[np.arange(len(labels)), labels] -= 1
    rows, columns = np.divmod(np.flatnonzero(probs > 1 / n_bins), probs.shape[1])
    places = confidence_bins(probs[rows, columns], n_bins) + n_bins * columns
    beyond = gaps[rows, columns]
    gaps[rows, columns] = 0
    return gaps, rows, places, beyond


def classwise_resampled(
    probs: Array, labels: NDArray[np.int64], counts: NDArray[np.uint8], n_bins: int = 15
) -> Array:
    """The class-wise ECE of resamples, (B,), in each of which every image is so often, (B, N).

    >>> once, twice = [[1, 1]], [[2, 0]]
    >>> probs, labels = np.array([[0.8, 0.2], [0.7, 0.3]]), np.array([0, 1])
    >>> classwise_resampled(probs, labels, np.array(once + twice, np.uint8)).round(4).tolist()
    [0.45, 0.2]
    """
    from scipy.sparse import csr_array

    (resamples, images), classes = counts.shape, probs.shape[1]
    first, others = np.zeros((resamples, classes)), []
    step = max(1, TOGETHER // (classes + resamples))
    for start in range(0, images, step):
        part = slice(start, start + step)
        gaps, rows, places, beyond = _split_gaps(probs[part], labels[part], n_bins)
        first += counts[:, part].astype(np.float64) @ gaps
        others.append((start + rows, places, beyond))
    rows, places, beyond = (np.concatenate(it) for it in zip(*others, strict=True))
    rest = csr_array((beyond, (rows, places)), shape=(images, n_bins * classes))
    totals = np.abs(first).sum(axis=1)
    step = max(1, TOGETHER // max(rest.shape))
    for start in range(0, resamples, step):
        sums = counts[start : start + step].astype(np.float64) @ rest
        totals[start : start + step] += np.abs(sums).sum(axis=1)
    return totals / (images * classes)


def mean_gap(gaps: Array, images: int) -> float:
    """The class-wise ECE of so many images, of the sum of their `classwise_gaps`."""
    return float(np.abs(gaps).sum()) / (images * len(gaps))


def adaptive_ece(probs: ArrayLike, labels: ArrayLike, n_bins: int = 15) -> float:
    """ECE of the confidence in bins of equal counts, in 0 … 1 [Nguyen & O'Connor 2015].

    Images in order of confidence make `n_bins` parts, the first N mod n_bins of which hold one
    image more. Images of one confidence all count with their mean correctness, so that it does not
    matter which of them stand on which side of a border.

    >>> round(adaptive_ece([[0.8, 0.2], [0.7, 0.3]], [0, 1], n_bins=2), 4)
    0.45
    """
    probs, labels = paired(probs, labels)
    confidence, group, sizes = np.unique(probs.max(1), return_inverse=True, return_counts=True)
    correct = np.bincount(group, weights=probs.argmax(1) == labels) / sizes
    gaps = np.repeat(correct - confidence, sizes)
    return float(sum(abs(part.sum()) for part in np.array_split(gaps, n_bins)) / len(gaps))


def smooth_ece(probs: ArrayLike, labels: ArrayLike) -> float:
    """Smooth calibration error of the confidence, in 0 … 1 [Błasiok & Nakkiran 2023].

    ∫|r_σ(t)| dt over 0 … 1, r_σ(t) being the mean over images of (correct − confidence) times a
    Gaussian density of standard deviation σ around the confidence, reflected at 0 and 1; for the
    one σ that it then equals, so that neither bins nor a bandwidth are to be chosen (§3). Found on
    `SMOOTHED` + 1 points, each residual shared by the two points beside it.

    >>> round(smooth_ece([[0.4, 0.6], [0.4, 0.6]], [0, 1]), 4)
    0.1
    """
    from scipy.fft import dct, idct
    from scipy.optimize import brentq

    probs, labels = paired(probs, labels)
    confidence = probs.max(1)
    gaps = ((probs.argmax(1) == labels) - confidence) / len(labels)
    point = np.minimum((confidence * SMOOTHED).astype(np.int64), SMOOTHED - 1)
    right = confidence * SMOOTHED - point
    mass = np.bincount(point, weights=(1 - right) * gaps, minlength=SMOOTHED + 1)
    mass += np.bincount(point + 1, weights=right * gaps, minlength=SMOOTHED + 1)
    # Cosines are what a reflected Gaussian only scales: cos(πkt) by exp(−(πkσ)²/2).
    ends = np.ones(SMOOTHED + 1)
    ends[[0, -1]] = 2
    waves, decay = dct(mass * ends, type=1), (np.pi * np.arange(SMOOTHED + 1)) ** 2 / 2

    def excess(sigma: float) -> float:
        residual = idct(waves * np.exp(-decay * sigma**2), type=1)
        return float(np.sum(np.abs(residual) / ends) - sigma)

    return brentq(excess, 0.0, 2.0, xtol=1e-12) if mass.any() else 0.0


def apply_temperature(probs: ArrayLike, temperature: float) -> Array:
    """softmax(log p / T), (N, K) → (N, K).

    >>> apply_temperature([[0.2, 0.8]], 0.5).round(4).tolist()
    [[0.0588, 0.9412]]
    """
    return scaled_by(clipped_log(probs, TINY), temperature)


def scaled_by(log_probs: Array, temperature: float) -> Array:
    """softmax(log p / T), of log p (N, K)."""
    return _normalised(log_probs / temperature)


def _normalised(logits: Array) -> Array:
    """`softmax` in place of the logits: large arrays are slow to make."""
    logits -= logits.max(axis=-1, keepdims=True)
    np.exp(logits, out=logits)
    logits /= logits.sum(axis=-1, keepdims=True)
    return logits


def optimal_temperature(probs: ArrayLike, labels: ArrayLike) -> float:
    """T* that minimises the NLL of softmax(log p / T) [Guo et al. 2017; Ashukha et al. 2020].

    The NLL is convex in 1/T, so T* is the root of its derivative; sought in 0.05 … 20, whose
    ends are returned where it lies outside (as with labels that are all predicted rightly).

    >>> round(optimal_temperature([[0.8, 0.2]] * 4, [0, 0, 0, 1]), 4)
    1.2619
    """
    probs, labels = paired(probs, labels)
    log_probs, search = clipped_log(probs, TINY), search_temperature()
    inverse = next(search)
    while True:
        slope, curvature = slopes(log_probs, labels, inverse)
        try:
            inverse = search.send((slope.mean(), curvature.mean()))
        except StopIteration as found:
            return found.value


def slopes(log_probs: Array, labels: NDArray[np.int64], inverse: float) -> tuple[Array, Array]:
    """First and second derivative of every image's NLL with respect to 1/T, (N,) each.

    E log p − log p_y and Var log p under softmax(log p / T), of log p (N, K).
    """
    weighted = _normalised(inverse * log_probs)
    weighted *= log_probs
    mean = weighted.sum(axis=1)
    weighted *= log_probs
    at_label = log_probs[np.arange(len(labels)), labels]
    return mean - at_label, weighted.sum(axis=1) - mean**2


def search_temperature() -> Generator[float, tuple[float, float], float]:
    """T* of `optimal_temperature` by Newton's method, which needs few passes over the images.

    Where its steps leave what is known to hold 1/T*, or are long and do not become shorter, the
    end of the range is asked in their direction, or else the middle of what is known.

    Yields:
        1/T, of which it is sent the first and the second derivative of the NLL.

    Returns:
        T*, to twelve digits: the last step is shorter than 10⁻⁸, and Newton's errors are squared.
    """
    low, high = smallest, largest = 1 / TEMPERATURES[1], 1 / TEMPERATURES[0]
    inverse, before, asked = 1.0, np.inf, set[float]()
    while True:
        slope, curvature = yield inverse
        asked.add(inverse)
        low, high = (low, inverse) if slope > 0 else (inverse, high)
        if high == smallest or (slope == 0 and inverse == smallest):
            return TEMPERATURES[1]
        if low == largest:
            return TEMPERATURES[0]
        step = -slope / curvature if curvature > 0 else -np.sign(slope) * np.inf
        if abs(step) < 1e-8 * inverse or len(asked) == MOST_STEPS:
            return float(1 / (inverse + step))
        following, end = inverse + step, high if step > 0 else low
        slow = abs(step) > max(before / 2, inverse / 10)
        if slow or not low < following < high:
            following = end if end not in asked else np.sqrt(low * high)
        inverse, before = float(following), abs(step)
