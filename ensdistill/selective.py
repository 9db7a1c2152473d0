"""Selective prediction: what is left wrong if the least sure predictions are rejected.

Images are ranked by confidence, the largest probability. Images of one confidence have no order:
every number here is its expected value over all orders of them, so it does not depend on the order
in which images are stored. Probabilities are (N, K), labels (N,) integers in 0 … K−1; anything that
NumPy can convert is taken. Arithmetic is float64.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ensdistill.calibration import paired

Array = NDArray[np.float64]


def errors_kept(probs: ArrayLike, labels: ArrayLike) -> Array:
    """Expected number of errors among the k surest images, k = 1 … N, (N,).

    >>> errors_kept([[0.9, 0.1], [0.6, 0.4], [0.6, 0.4]], [0, 1, 0]).tolist()
    [0.0, 0.5, 1.0]
    """
    probs, labels = paired(probs, labels)
    wrong = probs.argmax(1) != labels
    _, group, sizes = np.unique(-probs.max(1), return_inverse=True, return_counts=True)
    errors = np.bincount(group, weights=wrong)
    # Of a group of equals every place has the same share of its errors.
    before = np.repeat(np.cumsum(errors) - errors, sizes)
    place = np.arange(1, len(labels) + 1) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return before + place * np.repeat(errors / sizes, sizes)


def risks(probs: ArrayLike, labels: ArrayLike) -> Array:
    """The risk–coverage curve: the error rate among the k surest images, k = 1 … N, (N,).

    A share, whose place k is at the coverage k/N [El-Yaniv & Wiener 2010].
    """
    errors = errors_kept(probs, labels)
    return errors / np.arange(1, len(errors) + 1)


def aurc(probs: ArrayLike, labels: ArrayLike) -> float:
    """Area under the risk–coverage curve, the mean of `risks` over k, in 0 … 1.

    Geifman, Uziel & El-Yaniv 2019, eq. 2.

    >>> round(aurc([[0.9, 0.1], [0.6, 0.4]], [0, 1]), 4)
    0.25
    """
    return float(risks(probs, labels).mean())


def augrc(probs: ArrayLike, labels: ArrayLike) -> float:
    """Area under the generalised risk–coverage curve, in 0 … 1 [Traub et al. 2024].

    The mean over k of the k surest images' errors as a share of all N images: how many undetected
    errors a threshold lets through, each of them with the same weight, unlike AURC.

    >>> round(augrc([[0.9, 0.1], [0.6, 0.4]], [0, 1]), 4)
    0.25
    """
    errors = errors_kept(probs, labels)
    return float(errors.mean() / len(errors))


def rejection_ratio(probs: ArrayLike, labels: ArrayLike) -> float:
    """(AURC_random − AURC)/(AURC_random − AURC_oracle): 1 is perfect ranking, 0 is chance.

    Prediction rejection ratio [Malinin et al. 2021], of `aurc`. A random ranking has the error rate
    as its AURC; the oracle ranks all errors last. Below 0: worse than chance.

    Returns:
        NaN if no prediction is wrong, or all are: then there is nothing to rank.

    >>> rejection_ratio([[0.9, 0.1], [0.6, 0.4]], [0, 1])
    1.0
    """
    curve = risks(probs, labels)
    images, chance = len(curve), curve[-1]
    wrong = round(chance * images)
    if wrong in (0, images):
        return float("nan")
    kept = np.arange(1, images + 1)
    oracle = np.mean(np.maximum(kept - (images - wrong), 0) / kept)
    return float((chance - curve.mean()) / (chance - oracle))
