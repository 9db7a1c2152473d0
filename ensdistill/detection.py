"""How well a score tells out-of-distribution images from others, by scikit-learn.

scikit-learn is imported where it is used: Snakemake reads this module in every job.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray


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
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(*_is_outside(inside, outside)))


def aupr(inside: ArrayLike, outside: ArrayLike) -> float:
    """Average precision of a score that should be high outside: Σ (R_n − R_{n−1})·P_n.

    Out-of-distribution images are the positive class, so chance is their share of all images.
    Arguments as `auroc`.

    >>> round(aupr([0.1, 0.2, 0.3], [0.2, 0.9]), 4)
    0.75
    """
    from sklearn.metrics import average_precision_score

    return float(average_precision_score(*_is_outside(inside, outside)))


def fpr95(inside: ArrayLike, outside: ArrayLike) -> float:
    """Share of images from the distribution that are flagged when 95 % of the others are.

    The false positive rate at 95 % recall, out-of-distribution images being the positive class
    [Hendrycks et al. 2019]; lower is better. Arguments as `auroc`.

    >>> round(fpr95([0.1, 0.2, 0.3], [0.2, 0.9]), 4)
    0.6667
    """
    from sklearn.metrics import roc_curve

    false, true, _ = roc_curve(*_is_outside(inside, outside), drop_intermediate=False)
    return float(false[np.argmax(true >= 0.95)])


def _is_outside(inside: ArrayLike, outside: ArrayLike) -> tuple[NDArray[np.bool_], NDArray]:
    """Labels and scores as scikit-learn takes them."""
    both = np.concatenate([inside, outside])
    return np.arange(len(both)) >= len(np.asarray(inside)), both
