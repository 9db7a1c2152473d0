"""Accuracy, calibration and diversity of predicted probabilities, from stored logits.

K classes, M members, N images. Probabilities are (N, K), member logits (N, M, K), labels (N,)
integers in 0 … K−1; anything that NumPy can convert is taken. Logarithms are natural, and
probabilities are clipped at 1e-12 inside them. Arithmetic is float64.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import log_softmax, softmax

Array = NDArray[np.float64]

SMALLEST_PROBABILITY = 1e-12
"""Where −log p stops growing."""
TINY = np.finfo(np.float64).tiny
"""Stands for probability 0 where temperature scaling takes a logarithm."""
TEMPERATURES = (0.05, 20.0)
"""The range in which the optimal temperature is sought."""


def _pair(probs: ArrayLike, labels: ArrayLike) -> tuple[Array, NDArray[np.int64]]:
    probs, labels = np.asarray(probs, dtype=np.float64), np.asarray(labels)
    if probs.ndim != 2 or labels.shape != probs.shape[:1] or not len(labels):
        raise ValueError(f"probabilities {probs.shape} and labels {labels.shape} do not pair up")
    if labels.min() < 0 or labels.max() >= probs.shape[1]:
        raise ValueError(f"labels must be in 0 … {probs.shape[1] - 1}")
    return probs, labels.astype(np.int64)


def _log(probs: ArrayLike, smallest: float = SMALLEST_PROBABILITY) -> Array:
    return np.log(np.clip(np.asarray(probs, dtype=np.float64), smallest, None))


def ensemble_probs(logits: ArrayLike) -> Array:
    """p̄ = mean_j softmax(logits_j), (N, M, K) → (N, K) [Lakshminarayanan et al. 2017].

    >>> ensemble_probs([[[0.0, 0.0], [0.0, np.log(3)]]]).tolist()
    [[0.375, 0.625]]
    """
    return softmax(np.asarray(logits, dtype=np.float64), axis=-1).mean(axis=1)


def accuracy(probs: ArrayLike, labels: ArrayLike) -> float:
    """Share of images whose most probable class is the label, in percent.

    >>> accuracy([[0.9, 0.1], [0.6, 0.4]], [0, 1])
    50.0
    """
    probs, labels = _pair(probs, labels)
    return 100 * float(np.mean(probs.argmax(1) == labels))


def nll(
    probs: ArrayLike, labels: ArrayLike, reduction: Literal["mean", "none"] = "mean"
) -> float | Array:
    """Negative log-likelihood, −mean log p_y, in nats.

    Returns the mean over images, or (N,) with reduction "none".

    >>> round(nll([[0.5, 0.5]], [0]), 4)
    0.6931
    """
    probs, labels = _pair(probs, labels)
    return _reduce(-_log(probs[np.arange(len(labels)), labels]), reduction)


def brier(
    probs: ArrayLike, labels: ArrayLike, reduction: Literal["mean", "none"] = "mean"
) -> float | Array:
    """Brier score, mean Σ_k (p_k − 1[k = y])², in 0 … 2 [Brier 1950].

    Returns the mean over images, or (N,) with reduction "none".

    >>> round(brier([[0.9, 0.1]], [0]), 4)
    0.02
    """
    probs, labels = _pair(probs, labels)
    errors = probs.copy()
    errors[np.arange(len(labels)), labels] -= 1
    return _reduce(np.square(errors).sum(axis=1), reduction)


def confidence_bins(confidence: ArrayLike, n_bins: int = 15) -> NDArray[np.int64]:
    """Index of the equal-width bin (lo, hi] of each confidence in [0, 1]; 0 is in the first.

    >>> confidence_bins([0.0, 0.5, 0.51, 1.0], n_bins=2).tolist()
    [0, 0, 1, 1]
    """
    edges = np.arange(n_bins + 1) / n_bins
    return np.clip(np.searchsorted(edges, np.asarray(confidence), side="left") - 1, 0, n_bins - 1)


def reliability(
    probs: ArrayLike, labels: ArrayLike, n_bins: int = 15
) -> tuple[NDArray[np.int64], Array, Array]:
    """Per confidence bin: image count, mean confidence, accuracy as a share (0 where empty)."""
    probs, labels = _pair(probs, labels)
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


def entropy(probs: ArrayLike, reduction: Literal["mean", "none"] = "mean") -> float | Array:
    """Entropy of the prediction, −Σ_k p_k log p_k, in nats: 0 … log K.

    Returns the mean over images, or (N,) with reduction "none".

    >>> round(entropy([[0.5, 0.5]]), 4)
    0.6931
    """
    probs = np.asarray(probs, dtype=np.float64)
    return _reduce(-np.sum(probs * _log(probs), axis=-1), reduction)


def pairwise_kl(logits: ArrayLike, reduction: Literal["mean", "none"] = "mean") -> float | Array:
    """Diversity: KL(p_i ‖ p_j) averaged over the M(M−1) ordered pairs of members, in nats.

    Nam et al. 2021, §3. A single member has diversity 0.

    Args:
        logits: (N, M, K).
        reduction: "mean" over images, or "none" for (N,).

    >>> round(pairwise_kl([[[0.0, 0.0], [0.0, np.log(3)]]]), 4)
    0.1373
    """
    log_probs = log_softmax(np.asarray(logits, dtype=np.float64), axis=-1)
    members = log_probs.shape[1]
    if members == 1:
        return _reduce(np.zeros(len(log_probs)), reduction)
    # Σ_ij KL(p_i ‖ p_j) = M Σ_i p_i·log p_i − (Σ_i p_i)·(Σ_j log p_j); pairs i = j add 0.
    probs = np.exp(log_probs)
    own = np.sum(probs * log_probs, axis=(1, 2))
    crossed = np.sum(probs.sum(1) * log_probs.sum(1), axis=1)
    return _reduce((members * own - crossed) / (members * (members - 1)), reduction)


def disagreement(logits: ArrayLike) -> Array:
    """Share of the pairs of members that predict different classes, (N, M, K) → (N,).

    Unlike the divergence it does not fall when members only become less confident. A single
    member disagrees with none.

    >>> disagreement([[[1.0, 0.0], [0.0, 1.0], [0.0, 2.0]]]).round(4).tolist()
    [0.6667]
    """
    logits = np.asarray(logits)
    members, classes = logits.shape[1:]
    votes = (logits.argmax(2)[:, :, None] == np.arange(classes)).sum(1)
    agreeing = (votes * (votes - 1)).sum(1)
    return 1 - agreeing / (members * (members - 1)) if members > 1 else np.zeros(len(logits))


def mutual_information(logits: ArrayLike) -> Array:
    """Of prediction and member: H(p̄) − mean_j H(p_j), in nats: 0 … log M [Houlsby et al. 2011].

    What the members disagree about, as opposed to what each finds ambiguous; 0 for one member.
    (N, M, K) → (N,).

    >>> mutual_information([[[-99.0, 99.0], [99.0, -99.0]]]).round(4).tolist()
    [0.6931]
    """
    members = softmax(np.asarray(logits, dtype=np.float64), axis=-1)
    return entropy(members.mean(1), "none") - entropy(members, "none").mean(1)


def _roc(inside: ArrayLike, outside: ArrayLike) -> tuple[Array, Array]:
    """Images of each kind that lie at or above every threshold, from the highest down."""
    both = [np.asarray(values, dtype=np.float64) for values in (inside, outside)]
    thresholds = np.unique(np.concatenate(both))[::-1]
    below, found = (
        len(values) - np.searchsorted(np.sort(values), thresholds, side="left") for values in both
    )
    return below.astype(np.float64), found.astype(np.float64)


def auroc(inside: ArrayLike, outside: ArrayLike) -> float:
    """Area under the receiver operating characteristic of a score that should be high outside.

    The probability that an out-of-distribution image scores above one from the distribution,
    ties counting half; 0.5 is chance.

    Args:
        inside: scores of images from the distribution, (N,).
        outside: scores of out-of-distribution images, the positive class, (N',).

    >>> auroc([0.1, 0.2, 0.3], [0.2, 0.9])
    0.75
    """
    alarms, found = _roc(inside, outside)
    rates = np.r_[0, alarms / alarms[-1]], np.r_[0, found / found[-1]]
    return float(np.trapezoid(rates[1], rates[0]))


def aupr(inside: ArrayLike, outside: ArrayLike) -> float:
    """Average precision of a score that should be high outside: Σ (R_n − R_{n−1})·P_n.

    Out-of-distribution images are the positive class, so chance is their share of all images.
    Arguments as `auroc`.

    >>> round(aupr([0.1, 0.2, 0.3], [0.2, 0.9]), 4)
    0.75
    """
    alarms, found = _roc(inside, outside)
    return float(np.sum(np.diff(found / found[-1], prepend=0) * found / (alarms + found)))


def fpr95(inside: ArrayLike, outside: ArrayLike) -> float:
    """Share of images from the distribution that are flagged when 95 % of the others are.

    The false positive rate at 95 % recall, out-of-distribution images being the positive class
    [Hendrycks et al. 2019]; lower is better. Arguments as `auroc`.

    >>> round(fpr95([0.1, 0.2, 0.3], [0.2, 0.9]), 4)
    0.6667
    """
    alarms, found = _roc(inside, outside)
    # Counted in images: 0.95·N' may not be a binary fraction.
    enough = np.argmax(found >= np.ceil(0.95 * found[-1] - 1e-9))
    return float(alarms[enough] / alarms[-1])


def _reduce(values: Array, reduction: str) -> float | Array:
    return float(values.mean()) if reduction == "mean" else values


def apply_temperature(probs: ArrayLike, temperature: float) -> Array:
    """softmax(log p / T), (N, K) → (N, K).

    >>> apply_temperature([[0.2, 0.8]], 0.5).round(4).tolist()
    [[0.0588, 0.9412]]
    """
    return softmax(_log(probs, TINY) / temperature, axis=-1)


def optimal_temperature(probs: ArrayLike, labels: ArrayLike) -> float:
    """T* that minimises the NLL of softmax(log p / T) [Guo et al. 2017; Ashukha et al. 2020].

    The NLL is convex in 1/T, so T* is the root of its derivative; sought in 0.05 … 20, whose
    ends are returned where it lies outside (as with labels that are all predicted rightly).

    >>> round(optimal_temperature([[0.8, 0.2]] * 4, [0, 0, 0, 1]), 4)
    1.2619
    """
    from scipy.optimize import brentq  # long to import, and training needs other metrics only

    probs, labels = _pair(probs, labels)
    log_probs = _log(probs, TINY)
    at_label = log_probs[np.arange(len(labels)), labels].mean()

    def slope(inverse: float) -> float:
        scaled = softmax(inverse * log_probs, axis=1)
        return float(np.mean(np.sum(scaled * log_probs, axis=1)) - at_label)

    smallest, largest = 1 / TEMPERATURES[1], 1 / TEMPERATURES[0]
    if slope(smallest) >= 0:
        return TEMPERATURES[1]
    if slope(largest) <= 0:
        return TEMPERATURES[0]
    return 1 / brentq(slope, smallest, largest, xtol=1e-12)


def deep_ensemble_equivalent(score: float, curve: Sequence[float]) -> float:
    """DEE: the smallest real m ≥ 1 at which deep ensembles reach a score [Ashukha et al. 2020].

    Args:
        score: lower is better, such as NLL.
        curve: the mean score of deep ensembles of m = 1 … P networks, joined linearly.

    Returns:
        m in 1 … P. A score worse than one network's gives 1, one better than the whole curve
        gives P; `dee_outside` tells these apart from being there exactly.

    >>> round(deep_ensemble_equivalent(0.65, [0.8, 0.7, 0.6]), 4)
    2.5
    """
    if score >= curve[0]:
        return 1.0
    for m, (before, here) in enumerate(pairwise(curve), start=1):
        if here <= score:
            return m + (before - score) / (before - here)
    return float(len(curve))


def dee_outside(score: float, curve: Sequence[float]) -> int:
    """−1: worse than one network; +1: better than all of the curve; 0: the DEE is exact."""
    return -1 if score > curve[0] else int(score < min(curve))


def scores(
    logits: ArrayLike,
    labels: ArrayLike,
    val_logits: ArrayLike,
    val_labels: ArrayLike,
    n_bins: int = 15,
) -> dict[str, float]:
    """All metrics of one system on test images; temperature from its validation images.

    Args:
        logits, val_logits: (N, M, K); M = 1 for one network.
        labels, val_labels: (N,).
        n_bins: of the calibration errors.

    Returns:
        acc [%], nll, bs, ece, entropy, diversity, temperature T*, and the temperature-scaled
        twins nll_ts, bs_ts, ece_ts.
    """
    probs = ensemble_probs(logits)
    temperature = optimal_temperature(ensemble_probs(val_logits), val_labels)
    scaled = apply_temperature(probs, temperature)
    return {
        "acc": accuracy(probs, labels),
        "nll": nll(probs, labels),
        "bs": brier(probs, labels),
        "ece": ece(probs, labels, n_bins),
        "nll_ts": nll(scaled, labels),
        "bs_ts": brier(scaled, labels),
        "ece_ts": ece(scaled, labels, n_bins),
        "temperature": temperature,
        "entropy": entropy(probs),
        "diversity": pairwise_kl(logits),
    }
