"""Stored predictions of networks: all that metrics ever read.

A logits file has the splits of an images file, such as `/val` and `/test`, each with `logits`
float32 (N, M, K) and `labels` int64 (N,), and attributes that say what made it. The attribute
`prediction` says what the logits mean: an entry of `PREDICTIONS`, `mixture` if it is absent.
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ensdistill import DamagedFile, InputError, metrics
from ensdistill.files import open_hdf5

Array = NDArray[np.float64]
Labels = NDArray[np.int64]


class Prediction(ABC):
    """What one system says of N images. Every array has a value per image, in nats if it has any
    unit; None stands for what this kind of prediction does not have.

    Args:
        logits: (N, M, K), as stored.
    """

    def __init__(self, logits: ArrayLike):
        self.logits = np.asarray(logits)

    @classmethod
    def stored(cls, logits: ArrayLike, attributes: Mapping[str, Any]) -> Self:
        """A prediction as a file has it; a kind with parameters reads them from `attributes`."""
        return cls(logits)

    @classmethod
    @abstractmethod
    def join(cls, parts: Sequence[Self]) -> Self:
        """The deep ensemble of several systems."""

    @abstractmethod
    def probs(self) -> Array:
        """The predicted distribution p̄ over the classes, (N, K)."""

    def entropy(self) -> Array:
        """Entropy of p̄, (N,)."""
        return metrics.entropy(self.probs(), "none")

    def doubt(self) -> Array:
        """1 − max_k p̄_k, (N,), exact where p̄ is nearly one-hot."""
        return np.sort(self.probs(), axis=1)[:, :-1].sum(1)

    def mutual_information(self) -> Array | None:
        """What the members disagree about, (N,): entropy of p̄ minus their mean entropy."""
        return None

    def diversity(self) -> Array | None:
        """KL divergence between two members, expected over pairs, (N,)."""
        return None

    def disagreement(self) -> Array | None:
        """Share of the pairs of members that predict different classes, (N,)."""
        return None


class Mixture(Prediction):
    """p̄ = mean_j softmax(logits_j): members of equal weight [Lakshminarayanan et al. 2017].

    A single network is a mixture of one member, and has no diversity.
    """

    @classmethod
    def join(cls, parts: Sequence[Self]) -> Self:
        return cls(np.concatenate([part.logits for part in parts], axis=1))

    def probs(self) -> Array:
        return metrics.ensemble_probs(self.logits)

    def mutual_information(self) -> Array | None:
        return self._of_members(metrics.mutual_information)

    def diversity(self) -> Array | None:
        return self._of_members(lambda logits: metrics.pairwise_kl(logits, "none"))

    def disagreement(self) -> Array | None:
        return self._of_members(metrics.disagreement)

    def _of_members(self, function: Any) -> Array | None:
        return function(self.logits) if self.logits.shape[1] > 1 else None


PREDICTIONS: dict[str, type[Prediction]] = {"mixture": Mixture}
"""What stored logits can mean, by the name that their file gives."""


PROBS: dict[str, Callable[[ArrayLike, Mapping[str, Any]], Array]] = {
    "mixture": lambda logits, attributes: metrics.ensemble_probs(logits),
    "dirichlet": lambda logits, attributes: metrics.dirichlet_probs(
        logits, attributes["concentration_offset"]
    ),
}
"""Their p̄ alone, of logits (N, M, K) and a file's attributes: what training validates by.

Apart from the classes, so that networks need no training anew if an uncertainty changes.
"""


def read_prediction(path: str | os.PathLike[str], split: str) -> tuple[Prediction, Labels]:
    """The prediction for one split, and its labels (N,).

    Raises:
        DamagedFile: the file is damaged or lacks the split.
        InputError: some logits are not finite, or the kind of prediction is unknown.
    """
    with open_hdf5(path) as file:
        logits, labels = file[f"{split}/logits"][:], file[f"{split}/labels"][:]
        attributes = dict(file.attrs)
    if logits.ndim != 3 or labels.shape != logits.shape[:1]:
        raise DamagedFile(path, f"logits {logits.shape} and labels {labels.shape} do not pair up")
    if not np.isfinite(logits).all():
        raise InputError(f"{path}: some {split} logits are not finite")
    kind = str(attributes.get("prediction", "mixture"))
    if kind not in PREDICTIONS:
        raise InputError(f"{path}: unknown prediction {kind!r}; known are {', '.join(PREDICTIONS)}")
    return PREDICTIONS[kind].stored(logits, attributes), labels


def read_ensemble(paths: Sequence[str], split: str) -> tuple[Prediction, Labels]:
    """The deep ensemble of several networks, and their common labels (N,)."""
    networks = [read_prediction(path, split) for path in paths]
    return join([prediction for prediction, _ in networks]), networks[0][1]


def join(parts: Sequence[Prediction]) -> Prediction:
    """The deep ensemble of systems that all predict in the same way."""
    return type(parts[0]).join(parts)


def splits_of(path: str | os.PathLike[str]) -> list[str]:
    """The splits of a file of logits or images, such as `test` or `corrupted/fog/3`, sorted."""
    found: list[str] = []
    with open_hdf5(path) as file:
        file.visit(found.append)
    return [name.removesuffix("/labels") for name in found if name.endswith("/labels")]


def read_attributes(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What a logits file says of itself."""
    with open_hdf5(path) as file:
        return dict(file.attrs)
