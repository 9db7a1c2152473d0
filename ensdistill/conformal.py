"""Conformal prediction: sets of classes that hold the label of a given share of all images.

A threshold is set on calibration images so that, if these and the test images were drawn alike,
the label is in the set with at least the probability that is asked for [Vovk et al. 2005].
Probabilities are (N, K), labels (N,) integers in 0 … K−1. Arithmetic is float64, and nothing is
random but the choice of calibration images, which has a fixed seed.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ensdistill.calibration import paired

Array = NDArray[np.float64]
Pair = tuple[ArrayLike, ArrayLike]
"""Probabilities (N, K) and labels (N,)."""
Scores = Callable[[ArrayLike], Array]
"""`lac_scores` or `aps_scores`: how ill each class fits."""

WANTED = 0.9
"""The share of labels that the sets should hold."""
FEW = 64
"""Classes that are sorted at once; of many the most probable quarter, and all where a set is
larger."""


@dataclass(frozen=True)
class Sets:
    """Prediction sets of test images."""

    coverage: float
    """Share of images whose label is in their set."""
    size: float
    """Mean number of classes of a set, in 0 … K."""


def lac_scores(probs: ArrayLike) -> Array:
    """1 − p_k, (N, K) → (N, K): least ambiguous sets on average [Sadinle et al. 2019].

    Sets may be empty: of images that no class fits as well as calibration images fit theirs.

    >>> lac_scores([[0.75, 0.25]]).tolist()
    [[0.25, 0.75]]
    """
    return 1 - np.asarray(probs, dtype=np.float64)


def aps_scores(probs: ArrayLike) -> Array:
    """Σ of the probabilities above p_k, (N, K) → (N, K): adaptive sets [Romano et al. 2020].

    Without their randomisation: a class is in the set if what is more probable adds up to no more
    than the threshold, so that no set is empty, and labels are covered more often than asked where
    the most probable class alone does so.

    >>> aps_scores([[0.2, 0.5, 0.2, 0.1]]).round(4).tolist()
    [[0.5, 0.0, 0.5, 0.9]]
    """
    probs = np.asarray(probs, dtype=np.float64)
    order = np.argsort(-probs, axis=1)
    ranked = np.take_along_axis(probs, order, axis=1)
    above = np.zeros_like(ranked)
    np.cumsum(ranked[:, :-1], axis=1, out=above[:, 1:])
    above[:, 1:][ranked[:, 1:] == ranked[:, :-1]] = 0  # of equals all have what the first has
    np.maximum.accumulate(above, axis=1, out=above)
    found = np.empty_like(above)
    np.put_along_axis(found, order, above, axis=1)
    return found


def conformal_sets(scores: Scores, calibration: Pair, test: Pair, wanted: float = WANTED) -> Sets:
    """Split conformal prediction: the sets {k: score_k ≤ q} of test images.

    q is the ⌈(n + 1)·wanted⌉-th smallest score of the n calibration labels; if there is none, the
    sets hold every class.

    Args:
        scores: `lac_scores` or `aps_scores`: how ill each class fits.
        calibration, test: probabilities and labels.
        wanted: the share of labels that the sets should hold.

    >>> sure, unsure = [0.9, 0.1], [0.6, 0.4]
    >>> conformal_sets(lac_scores, ([unsure] * 9, [0] * 9), ([sure, unsure], [0, 1]))
    Sets(coverage=0.5, size=1.0)
    """
    limit = threshold(label_scores(scores, *paired(*calibration)), wanted)
    inside, sizes = sets_of(scores, *test, limit)
    return Sets(coverage=float(np.mean(inside)), size=float(sizes.mean()))


def label_scores(scores: Scores, probs: Array, labels: NDArray[np.int64]) -> Array:
    """How ill the label fits, (N,).

    >>> label_scores(lac_scores, np.array([[0.75, 0.25]]), np.array([1])).tolist()
    [0.75]
    """
    return scores(probs)[np.arange(len(labels)), labels]


def threshold(calibration: Array, wanted: float = WANTED) -> float:
    """q, of scores of the calibration labels (n,).

    >>> float(threshold(np.arange(1.0, 10.0), 0.8))
    8.0
    """
    rank = int(np.ceil((len(calibration) + 1) * wanted - 1e-9))  # 0.9 · 10 is 9
    return np.partition(calibration, rank - 1)[rank - 1] if rank <= len(calibration) else np.inf


def sets_of(
    scores: Scores, probs: ArrayLike, labels: ArrayLike, limit: float
) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """Whether the label is in the set of a threshold, and the number of its classes, (N,) each.

    >>> inside, sizes = sets_of(lac_scores, [[0.7, 0.3]], [1], limit=0.5)
    >>> inside.tolist(), sizes.tolist()
    ([False], [1])
    """
    probs, labels = paired(probs, labels)
    inside = scores(probs) <= limit
    return inside[np.arange(len(labels)), labels], inside.sum(axis=1)


def aps_sets(
    probs: ArrayLike, labels: ArrayLike, limit: float
) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """What `sets_of` finds by `aps_scores`, from the most probable classes alone.

    A set is all classes at least as probable as the last one whose score is up to the limit.

    >>> inside, sizes = aps_sets([[0.2, 0.5, 0.2, 0.1]], [3], limit=0.8)
    >>> inside.tolist(), sizes.tolist()
    ([False], [3])
    """
    probs, labels = paired(probs, labels)
    least = _least(probs, limit, max(probs.shape[1] // 4, FEW))
    unknown = np.isnan(least)
    least[unknown] = _least(probs[unknown], limit, probs.shape[1])
    inside = probs[np.arange(len(labels)), labels] >= least
    return inside, np.count_nonzero(probs >= least[:, None], axis=1)


def _least(probs: Array, limit: float, ranked: int) -> Array:
    """The least probable class with a score up to a limit, (N,); NaN if more than so many have."""
    ranked = min(ranked, probs.shape[1])
    first = np.partition(probs, -ranked, axis=1)[:, -ranked:]
    first = np.sort(first, axis=1)[:, ::-1]
    above = np.cumsum(first, axis=1)
    count = 1 + np.count_nonzero(above <= limit, axis=1)  # nothing is above the first
    beyond = count > ranked
    found = first[np.arange(len(first)), np.minimum(count, ranked) - 1]
    if ranked < probs.shape[1]:
        found[beyond] = np.nan
    return found


def calibration_half(images: int) -> NDArray[np.int64]:
    """Indices of the half of so many validation images that calibrates: random, by seed 0.

    >>> len(calibration_half(11))
    5
    """
    return np.sort(np.random.default_rng(0).permutation(images)[: images // 2])
