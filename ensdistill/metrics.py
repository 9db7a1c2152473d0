"""Metrics of predicted probabilities, and `METRICS`, all that a system is measured by.

K classes, M members, N images. Probabilities are (N, K), member logits (N, M, K), labels (N,)
integers in 0 … K−1; anything that NumPy can convert is taken. Logarithms are natural, and
probabilities are clipped at 1e-12 inside them. Arithmetic is float64. What is slow to import is
imported where it is used: Snakemake reads this module in every job.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ensdistill.blocks import Total
from ensdistill.calibration import (
    SMALLEST_PROBABILITY,
    adaptive_ece,
    classwise_gaps,
    clipped_log,
    ece,
    mean_gap,
    paired,
    smooth_ece,
    softmax,
    surest,
)
from ensdistill.calibration import apply_temperature as apply_temperature
from ensdistill.calibration import classwise_ece as classwise_ece
from ensdistill.calibration import confidence_bins as confidence_bins
from ensdistill.calibration import optimal_temperature as optimal_temperature
from ensdistill.calibration import reliability as reliability
from ensdistill.detection import aupr, auroc, fpr95
from ensdistill.judging import HIGHER, LOWER, Metric, percent
from ensdistill.judging import Judged as Judged
from ensdistill.judging import judge as judge
from ensdistill.selective import augrc, aurc, rejection_ratio

Array = NDArray[np.float64]

LOG_SMALLEST = np.log(SMALLEST_PROBABILITY)


def ensemble_probs(logits: ArrayLike) -> Array:
    """p̄ = mean_j softmax(logits_j), (N, M, K) → (N, K) [Lakshminarayanan et al. 2017].

    >>> ensemble_probs([[[0.0, 0.0], [0.0, np.log(3)]]]).tolist()
    [[0.375, 0.625]]
    """
    return softmax(logits).mean(axis=1)


def dirichlet_probs(logits: ArrayLike, offset: float = 0.0) -> Array:
    """Mean over M networks of α/α₀, α = e^z + offset, (N, M, K) → (N, K); exact for any finite z.

    The mean of each network's Dirichlet distribution. Offset 0 in EnD² [Malinin et al. 2020], where
    it is softmax(z); 1 in Proxy-EnD² [Ryabinin et al. 2021], whose official evaluation uses
    softmax(z) all the same.

    >>> dirichlet_probs([[[0.0, np.log(3)]]], offset=1.0).round(4).tolist()
    [[0.3333, 0.6667]]
    """
    logits = np.asarray(logits, dtype=np.float64)
    return softmax(np.logaddexp(logits, np.log(offset)) if offset else logits).mean(axis=1)


def accuracy(probs: ArrayLike, labels: ArrayLike) -> float:
    """Share of images whose most probable class is the label, in percent.

    >>> accuracy([[0.9, 0.1], [0.6, 0.4]], [0, 1])
    50.0
    """
    probs, labels = paired(probs, labels)
    return 100 * float(np.mean(probs.argmax(1) == labels))


@overload
def nll(probs: ArrayLike, labels: ArrayLike, reduction: Literal["mean"] = ...) -> float: ...
@overload
def nll(probs: ArrayLike, labels: ArrayLike, reduction: Literal["none"]) -> Array: ...
def nll(
    probs: ArrayLike, labels: ArrayLike, reduction: Literal["mean", "none"] = "mean"
) -> float | Array:
    """Negative log-likelihood, −mean log p_y, in nats.

    Returns the mean over images, or (N,) with reduction "none".

    >>> round(nll([[0.5, 0.5]], [0]), 4)
    0.6931
    """
    probs, labels = paired(probs, labels)
    return _reduce(-clipped_log(probs[np.arange(len(labels)), labels]), reduction)


@overload
def brier(probs: ArrayLike, labels: ArrayLike, reduction: Literal["mean"] = ...) -> float: ...
@overload
def brier(probs: ArrayLike, labels: ArrayLike, reduction: Literal["none"]) -> Array: ...
def brier(
    probs: ArrayLike, labels: ArrayLike, reduction: Literal["mean", "none"] = "mean"
) -> float | Array:
    """Brier score, mean Σ_k (p_k − 1[k = y])², in 0 … 2 [Brier 1950].

    Returns the mean over images, or (N,) with reduction "none".

    >>> round(brier([[0.9, 0.1]], [0]), 4)
    0.02
    """
    probs, labels = paired(probs, labels)
    at_label = probs[np.arange(len(labels)), labels]
    others = np.einsum("nk,nk->n", probs, probs) - at_label**2
    return _reduce(others + (1 - at_label) ** 2, reduction)


@overload
def entropy(probs: ArrayLike, reduction: Literal["mean"] = ...) -> float: ...
@overload
def entropy(probs: ArrayLike, reduction: Literal["none"]) -> Array: ...
def entropy(probs: ArrayLike, reduction: Literal["mean", "none"] = "mean") -> float | Array:
    """Entropy of the prediction, −Σ_k p_k log p_k, in nats: 0 … log K.

    Returns the mean over images, or (N,) with reduction "none".

    >>> round(entropy([[0.5, 0.5]]), 4)
    0.6931
    """
    probs = np.asarray(probs, dtype=np.float64)
    terms = clipped_log(probs)
    terms *= probs
    return _reduce(-terms.sum(axis=-1), reduction)


@overload
def pairwise_kl(logits: ArrayLike, reduction: Literal["mean"] = ...) -> float: ...
@overload
def pairwise_kl(logits: ArrayLike, reduction: Literal["none"]) -> Array: ...
def pairwise_kl(logits: ArrayLike, reduction: Literal["mean", "none"] = "mean") -> float | Array:
    """Diversity: KL(p_i ‖ p_j) averaged over the M(M−1) ordered pairs of members, in nats.

    Nam et al. 2021, §3. A single member has diversity 0.

    Args:
        logits: (N, M, K).
        reduction: "mean" over images, or "none" for (N,).

    >>> round(pairwise_kl([[[0.0, 0.0], [0.0, np.log(3)]]]), 4)
    0.1373
    """
    from scipy.special import log_softmax

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
    votes = np.asarray(logits).argmax(2)
    members = votes.shape[1]
    agreeing = (votes[:, :, None] == votes[:, None]).sum((1, 2)) - members
    return 1 - agreeing / (members * (members - 1)) if members > 1 else np.zeros(len(votes))


def mutual_information(logits: ArrayLike) -> Array:
    """Of prediction and member: H(p̄) − mean_j H(p_j), in nats: 0 … log M [Houlsby et al. 2011].

    What the members disagree about, as opposed to what each finds ambiguous; 0 for one member.
    (N, M, K) → (N,).

    >>> mutual_information([[[-99.0, 99.0], [99.0, -99.0]]]).round(4).tolist()
    [0.6931]
    """
    members = softmax(logits)
    return entropy(members.mean(1), "none") - entropy(members, "none").mean(1)


def human_kl(
    probs: ArrayLike, human: ArrayLike, reduction: Literal["mean", "none"] = "mean"
) -> float | Array:
    """KL(h ‖ p), in nats, the mean over images of Σ_k h_k log(h_k/p_k) [Peterson et al. 2019].

    Args:
        probs: p, (N, K).
        human: h, the shares of people who chose each class, (N, K).
        reduction: "mean" over images, or "none" for (N,).

    >>> round(human_kl([[0.5, 0.5]], [[1.0, 0.0]]), 4)
    0.6931
    """
    human = np.asarray(human, dtype=np.float64)
    terms = human * (clipped_log(human) - clipped_log(probs))
    return _reduce(np.sum(terms, axis=1), reduction)


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
    """−1: worse than one network; +1: better than all of the curve; 0: the DEE is exact.

    >>> dee_outside(0.9, [0.8, 0.7]), dee_outside(0.75, [0.8, 0.7]), dee_outside(0.5, [0.8, 0.7])
    (-1, 0, 1)
    """
    return -1 if score > curve[0] else int(score < min(curve))


def _reduce(values: Array, reduction: str) -> float | Array:
    return float(values.mean()) if reduction == "mean" else values


def _surest(judged: Judged) -> tuple[Array, NDArray[np.int64]]:
    """What all metrics that look at the confidence alone are made of."""
    return judged.surest


METRICS: dict[str, Metric] = {
    "acc": Metric(
        "ACC",
        lambda it: it.surest[1] == 0,
        HIGHER,
        "%",
        decimals=2,
        meaning="accuracy",
        name="accuracy",
        whole=percent,
    ),
    "nll": Metric(
        "NLL",
        lambda it: nll(it.probs, it.labels, "none"),
        LOWER,
        "nats",
        meaning="negative log-likelihood",
    ),
    "bs": Metric(
        "BS",
        lambda it: brier(it.probs, it.labels, "none"),
        LOWER,
        meaning="Brier score",
        name="Brier score",
    ),
    "ece": Metric(
        "ECE",
        _surest,
        LOWER,
        meaning="expected calibration error",
        whole=lambda pair, n_bins: ece(pair[0], pair[1], n_bins),
    ),
    "nll_ts": Metric(
        "NLL, TS",
        lambda it: nll(it.scaled, it.labels, "none"),
        LOWER,
        "nats",
        meaning="NLL after scaling by T*",
    ),
    "bs_ts": Metric(
        "BS, TS",
        lambda it: brier(it.scaled, it.labels, "none"),
        LOWER,
        meaning="Brier score after scaling by T*",
    ),
    "ece_ts": Metric(
        "ECE, TS",
        lambda it: surest(it.scaled, it.labels),
        LOWER,
        meaning="expected calibration error after scaling by T*",
        whole=lambda pair, n_bins: ece(pair[0], pair[1], n_bins),
    ),
    "temperature": Metric(
        "T*",
        lambda it: np.full(len(it.labels), it.fit.temperature),
        decimals=2,
        meaning="temperature that is best on the validation split",
        whole=lambda values, n_bins: float(values[0]),
    ),
    "dee": Metric(
        "DEE",
        deep_ensemble_equivalent,
        HIGHER,
        decimals=2,
        meaning="Deep Ensemble Equivalent, the number of ensembled networks with the same NLL; '<' "
        "or '>' where all replicates lie outside the pool's curve, '≤' or '≥' where some do",
        equivalent_of="nll",
    ),
    "dee_ts": Metric(
        "DEE, TS",
        deep_ensemble_equivalent,
        HIGHER,
        decimals=2,
        meaning="Deep Ensemble Equivalent of the NLL after scaling by T*",
        equivalent_of="nll_ts",
    ),
    "diversity": Metric(
        "Diversity",
        lambda it: it.prediction.diversity(),
        unit="nats",
        meaning="pairwise KL between members, or between draws from a Dirichlet distribution",
    ),
    "entropy": Metric(
        "Entropy",
        lambda it: -np.einsum("nk,nk->n", it.probs, np.maximum(it.log_probs, LOG_SMALLEST)),
        unit="nats",
        meaning="entropy of the prediction",
        in_table=False,
    ),
    "aurc": Metric(
        "AURC",
        _surest,
        LOWER,
        meaning="area under the risk–coverage curve, the error rate among the k surest images "
        "averaged over k",
        in_table=False,
        whole=lambda pair, n_bins: aurc(*pair),
    ),
    "augrc": Metric(
        "AUGRC",
        _surest,
        LOWER,
        meaning="area under the generalised risk–coverage curve, the k surest images' errors as a "
        "share of all images, averaged over k",
        in_table=False,
        whole=lambda pair, n_bins: augrc(*pair),
    ),
    "rejection_ratio": Metric(
        "Rejection ratio",
        _surest,
        HIGHER,
        meaning="how much of the AURC between a random ranking (0) and one with all errors last "
        "(1) is gained",
        in_table=False,
        whole=lambda pair, n_bins: rejection_ratio(*pair),
    ),
    "classwise_ece": Metric(
        "Class-wise ECE",
        lambda it: (Total(classwise_gaps(it.probs, it.labels, it.n_bins)), it.labels),
        LOWER,
        meaning="calibration error of every class's probability, the mean over classes",
        in_table=False,
        whole=lambda pair, n_bins: mean_gap(pair[0], len(pair[1])),
    ),
    "adaptive_ece": Metric(
        "Adaptive ECE",
        _surest,
        LOWER,
        meaning="calibration error in bins of equally many images",
        in_table=False,
        whole=lambda pair, n_bins: adaptive_ece(pair[0], pair[1], n_bins),
    ),
    "smooth_ece": Metric(
        "Smooth ECE",
        _surest,
        LOWER,
        meaning="calibration error smoothed over confidences instead of binned",
        in_table=False,
        whole=lambda pair, n_bins: smooth_ece(*pair),
    ),
    "lac_coverage": Metric(
        "LAC coverage",
        lambda it: it.lac[0],
        unit="%",
        decimals=2,
        meaning="images whose label is in their conformal set (least ambiguous sets, LAC); "
        "90 % are asked for; calibrated on half of the validation split",
        in_table=False,
        whole=percent,
    ),
    "lac_size": Metric(
        "LAC size",
        lambda it: it.lac[1],
        LOWER,
        "classes",
        decimals=3,
        meaning="mean number of classes in these sets, LAC",
        in_table=False,
    ),
    "aps_coverage": Metric(
        "APS coverage",
        lambda it: it.aps[0],
        unit="%",
        decimals=2,
        meaning="images whose label is in their adaptive prediction set (APS), which is never "
        "empty; at least 90 % are asked for",
        in_table=False,
        whole=percent,
    ),
    "aps_size": Metric(
        "APS size",
        lambda it: it.aps[1],
        LOWER,
        "classes",
        decimals=3,
        meaning="mean number of classes in adaptive prediction sets",
        in_table=False,
    ),
    "human_kl": Metric(
        "KL to people",
        lambda it: None if it.human is None else human_kl(it.probs, it.human, "none"),
        LOWER,
        "nats",
        meaning="divergence of the prediction from the shares of people who chose each class "
        "(CIFAR-10H)",
        in_table=False,
    ),
}
"""What every system is measured by. An entry more is a column more of the results."""

DETECTION: dict[str, Metric] = {
    "auroc": Metric("AUROC", auroc, HIGHER),
    "aupr": Metric("AUPR", aupr, HIGHER),
    "fpr95": Metric("FPR95", fpr95, LOWER),
}
"""How well an uncertainty tells out-of-distribution images from others."""
