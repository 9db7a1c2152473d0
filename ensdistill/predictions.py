"""Stored predictions of networks: all that metrics ever read.

A logits file has the splits of an images file, such as `/val` and `/test`, each with `logits`
float32 (N, M, K) and `labels` int64 (N,), and attributes that say what made it. The attribute
`prediction` says what the logits mean: an entry of `PREDICTIONS`, `mixture` if it is absent.

What is read here may be larger than memory: whoever asks a prediction for something of all images
gets it block by block (see `ensdistill.blocks`), and several things at once by `per_image`.
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from math import prod
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ensdistill import DamagedFile, InputError, blocks, metrics
from ensdistill.calibration import clipped_log, paired, surest
from ensdistill.hdf5 import open_hdf5

Array = NDArray[np.float64]
Labels = NDArray[np.int64]


class Prediction(ABC):
    """What one system says of N images. Every array has a value per image, in nats if it has any
    unit; None stands for what this kind of prediction does not have.

    Args:
        logits: (N, M, K), as stored.
    """

    together = 1
    """See `blocks.Blocked`."""

    def __init__(self, logits: ArrayLike):
        self.logits = np.asarray(logits)

    @classmethod
    def stored(cls, logits: ArrayLike, attributes: Mapping[str, Any]) -> Self:
        """A prediction as a file has it; a kind with parameters reads them from `attributes`."""
        return cls(logits)

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, M, K)."""
        return self.logits.shape

    @classmethod
    def join(cls, parts: Sequence[Self]) -> Self:
        """The deep ensemble of several systems, in memory."""
        return cls(np.concatenate([part.logits for part in parts], axis=1))

    def part(self, images: slice) -> "Prediction":
        """The same of some of the images, in memory."""
        return self if images == slice(0, self.shape[0]) else type(self)(self.logits[images])

    def per_image(self, function: Callable[..., Any], *arrays: NDArray) -> Any:
        """What a function finds of every image.

        Args:
            function: of a part of the prediction, and the same part of each array; see
                `blocks.collect`.
            arrays: (N, …).
        """
        return blocks.collect(
            [self], lambda images: function(self.part(images), *(it[images] for it in arrays))
        )

    def surest(self, labels: Labels) -> tuple[Array, Labels]:
        """All that `calibration.surest` keeps of the images."""
        return self.per_image(lambda it, known: surest(it.probs(), known), labels)

    @abstractmethod
    def probs(self) -> Array:
        """The predicted distribution p̄ over the classes, (N, K)."""

    def nll(self, labels: Labels) -> Array:
        """−log p̄ of the labels, (N,)."""
        return metrics.nll(self.probs(), labels, "none")

    def member_probs(self) -> Array:
        """What each member predicts, (N, M, K); their mean is p̄."""
        raise NotImplementedError

    def entropy(self) -> Array:
        """Entropy of p̄, (N,)."""
        return metrics.entropy(self.probs(), "none")

    def doubt(self) -> Array:
        """1 − max_k p̄_k, (N,), exact where p̄ is nearly one-hot."""
        return np.sort(self.probs(), axis=1)[:, :-1].sum(1)

    @abstractmethod
    def mean_logits(self) -> Array:
        """Logits z̄ of one network for all, (N, K): the mean of the members'."""

    def energy(self) -> Array:
        """Free energy at temperature 1, −log Σ_k e^z̄_k, (N,) [Liu et al. 2020, eq. 3].

        In units of logits; unlike probabilities it knows their level. Higher outside.
        """
        return -np.logaddexp.reduce(self.mean_logits(), axis=1)

    def max_logit(self) -> Array:
        """−max_k z̄_k, (N,), in units of logits [Hendrycks et al. 2022]. Higher outside."""
        return -self.mean_logits().max(1)

    def mutual_information(self) -> Array | None:
        """What the members disagree about, (N,): entropy of p̄ minus their mean entropy."""
        return None

    def diversity(self) -> Array | None:
        """KL divergence between two members, expected over ordered pairs, (N,)."""
        return None

    def disagreement(self) -> Array | None:
        """Share of the pairs of members that predict different classes, (N,)."""
        return None


class Mixture(Prediction):
    """p̄ = mean_j softmax(logits_j): members of equal weight [Lakshminarayanan et al. 2017].

    A single network is a mixture of one member, and has no diversity.

    Example:
        >>> both = Mixture(np.log([[[0.9, 0.1], [0.5, 0.5]]]))
        >>> both.probs().round(4).tolist(), both.disagreement().tolist()
        ([[0.7, 0.3]], [0.0])
    """

    @classmethod
    def join(cls, parts: Sequence[Self]) -> Self:
        joined = cls.__new__(cls)
        joined._parts = parts
        return joined

    _parts: Sequence["Mixture"] = ()
    """What was joined: in ensembles of one pool each network computes what is its own once."""

    @cached_property
    def logits(self) -> NDArray:  # type: ignore[override]  # of what was joined, if asked for
        return np.concatenate([part.logits for part in self._parts], axis=1)

    @property
    def shape(self) -> tuple[int, ...]:
        images, members, classes = (self._parts or [self])[0].logits.shape
        return images, sum(it.shape[1] for it in self._parts) or members, classes

    @cached_property
    def _softmax(self) -> tuple[Array, Array]:
        """Probabilities of the members (N, M, K), and log Σ_k e^z_k (N, M, 1), by one exponential
        of each logit."""
        most = self.logits.max(axis=2, keepdims=True)
        probs = self.logits.astype(np.float64)
        probs -= most
        np.exp(probs, out=probs)
        sums = probs.sum(axis=2, keepdims=True)
        probs /= sums
        return probs, most + np.log(sums)

    @cached_property
    def _log_probs(self) -> Array:
        """Of the members, (N, M, K)."""
        logs = self.logits.astype(np.float64)
        logs -= self._softmax[1]
        return logs

    @cached_property
    def _own(self) -> Array:
        """Σ_k p_k log p_k of each member, (N, M)."""
        return np.einsum("nmk,nmk->nm", self._softmax[0], self._log_probs)

    @cached_property
    def _member_entropies(self) -> Array:
        """As `metrics.entropy`, which clips, has them; (N, M)."""
        return metrics.entropy(self._softmax[0], "none")

    def _each(self, function: Callable[["Mixture"], Array]) -> Iterator[Array]:
        """What a function finds of every part, (N, M, …), one after the other."""
        return map(function, self._parts or [self])

    def _sum(self, function: Callable[["Mixture"], Array]) -> Array:
        """Over all members, in their order, of what a function finds of every part."""
        found = (values[:, j] for values in self._each(function) for j in range(values.shape[1]))
        total = next(found)
        for place, values in enumerate(found):
            total = np.add(total, values, out=total if place else None)
        return total

    @cached_property
    def _total(self) -> Array:
        return self._sum(lambda it: it._softmax[0])

    @cached_property
    def _probs(self) -> Array:
        return self._total / self.shape[1] if self.shape[1] > 1 else self._total

    def probs(self) -> Array:
        return self._probs

    def nll(self, labels: Labels) -> Array:
        def at_labels(part: Mixture) -> Array:
            members = part._softmax[0]
            rows = np.arange(len(members))
            return members[rows, :, paired(members[:, 0], labels)[1]]

        return -clipped_log(self._sum(at_labels) / self.shape[1])

    def member_probs(self) -> Array:
        return np.concatenate([*self._each(lambda it: it._softmax[0])], axis=1)

    def mean_logits(self) -> Array:
        return self.logits.mean(axis=1, dtype=np.float64)

    def mutual_information(self) -> Array | None:
        if self.shape[1] == 1:
            return None
        entropies = np.concatenate([*self._each(lambda it: it._member_entropies)], axis=1)
        return self.entropy() - entropies.mean(1)

    def diversity(self) -> Array | None:
        """As `metrics.pairwise_kl`, of what each member computes once."""
        members = self.shape[1]
        if members == 1:
            return None
        logs, own = self._sum(lambda it: it._log_probs), self._sum(lambda it: it._own)
        crossed = np.einsum("nk,nk->n", self._total, logs)
        return (members * own - crossed) / (members * (members - 1))

    def disagreement(self) -> Array | None:
        return metrics.disagreement(self.logits) if self.shape[1] > 1 else None


class Dirichlet(Prediction):
    """Dirichlet distributions over the class probabilities π, of equal weight: one per network.

    Concentrations α_k = e^{z_k} + offset of the logits z, α₀ = Σ_k α_k; offset 0 in EnD²
    [Malinin et al. 2020], 1 in Proxy-EnD² [Ryabinin et al. 2021]. p̄ is the expected π, α/α₀ of one
    network (the official evaluation of Proxy-EnD² uses softmax(z) instead, which ignores the
    offset). The *members* of such a prediction are all that can be drawn from it: its mutual
    information and diversity are the limits of those of a `Mixture` of S members from each network,
    S → ∞. How often two of them predict different classes has no closed form.

    All is computed from log α in float64 and is exact for logits of any finite size, but that the
    diversity takes a log α below −700 as −700: as α → 0 it grows without bound.

    Example:
        >>> one = Dirichlet(np.log([[[2.0, 6.0]]]))  # Dir(2, 6)
        >>> one.probs().round(4).tolist(), one.diversity().round(4).tolist()  # (K − 1)/α₀
        ([[0.25, 0.75]], [0.125])
    """

    def __init__(self, logits: ArrayLike, offset: float = 0.0):
        z = np.asarray(logits, dtype=np.float64)
        super().__init__(np.logaddexp(z, np.log(offset)) if offset else z)
        self._log_alpha = self.logits
        self._log_total = np.logaddexp.reduce(self._log_alpha, axis=2, keepdims=True)
        self._log_means = self._log_alpha - self._log_total
        self._means = np.exp(self._log_means)

    @classmethod
    def stored(cls, logits: ArrayLike, attributes: Mapping[str, Any]) -> Self:
        """The attribute `concentration_offset` is the offset, 0 if it is absent.

        Raises:
            ValueError: it is no number, or one below 0.
        """
        given = attributes.get("concentration_offset", 0.0)
        try:
            offset = float(given)
        except (TypeError, ValueError):
            offset = np.nan
        if not 0 <= offset < np.inf:
            raise ValueError(f"the concentration_offset {str(given)[:50]!r} is no offset")
        return cls(logits, offset)

    def probs(self) -> Array:
        return self._means.mean(1)

    def member_probs(self) -> Array:
        """Of each network the expected π."""
        return self._means

    def mean_logits(self) -> Array:
        """Of log α, so that the energy of one network is −log α₀."""
        return self._log_alpha.mean(1)

    def mutual_information(self) -> Array:
        """Of prediction and π, (N,): H(p̄) − E H(π), with −E H(π) = Σ_k p_k(ψ(α_k+1) − ψ(α₀+1)).

        Of one network H(p) + Σ_k p_k(ψ(α_k+1) − ψ(α₀+1)) [Malinin & Gales 2018, §3].
        """
        between = self.entropy() - metrics.entropy(self._means, "none").mean(1)
        excess = _digamma_excess(self._log_alpha) - _digamma_excess(self._log_total)
        return between + np.sum(self._means * excess, axis=2).mean(1)

    def diversity(self) -> Array:
        """KL(π_i ‖ π_j) of two independent draws, expected over them and all M² pairs, (N,).

        Both of one network: (K−1)/α₀. Of networks i and j: Σ_k p_ik(ψ(α_ik+1) − ψ(α_i0+1) −
        ψ(α_jk) + ψ(α_j0)). Two members of the limit that `Dirichlet` describes are of the same
        network with probability 1/M.
        """
        networks = range(self.logits.shape[1])
        pairs = [self._divergence(i, j) for i in networks for j in networks]
        return np.mean(pairs, axis=0)

    def _divergence(self, i: int, j: int) -> Array:
        total = np.maximum(self._log_total, LOWEST)
        if i == j:
            return (self.logits.shape[2] - 1) * np.exp(-total[:, i, 0])
        alpha = np.maximum(self._log_alpha, LOWEST)
        # ψ(a+1) − log a, and with ψ(a+1) = ψ(a) + 1/a also ψ(a) − log a.
        above = _digamma_excess(alpha[:, i]) - _digamma_excess(total[:, i])
        below = _digamma_excess(alpha[:, j]) - _digamma_excess(total[:, j])
        below += np.exp(-total[:, j]) - np.exp(-alpha[:, j])
        logs = self._log_means[:, i] - self._log_means[:, j]
        return np.sum(self._means[:, i] * (logs + above - below), axis=1)


LOWEST = -700.0
"""A logarithm whose exponential, and its inverse, still are float64."""


def _digamma_excess(log_a: Array) -> Array:
    """ψ(a+1) − log a of a positive a, to at least ten digits; a large a is never computed."""
    from scipy.special import digamma

    small = np.exp(np.minimum(log_a, 7.0))
    inverse = np.exp(-np.maximum(log_a, 7.0))
    return np.where(log_a < 7.0, digamma(small + 1) - log_a, inverse / 2 - inverse**2 / 12)


PREDICTIONS: dict[str, type[Prediction]] = {"mixture": Mixture, "dirichlet": Dirichlet}
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


def _by_block(name: str) -> Callable[["Joined"], Any]:
    return lambda joined: joined.per_image(lambda part: getattr(part, name)())


class Joined(Prediction):
    """One system, or the deep ensemble of several, whose logits are put together block by block.

    Args:
        parts: predictions of one kind, of the same images.
    """

    def __init__(self, parts: Sequence["Prediction | _Stored"]):
        self.parts = [it for part in parts for it in getattr(part, "parts", [part])]
        self.together = max(part.together for part in self.parts)

    @property
    def shape(self) -> tuple[int, ...]:
        images, _, classes = self.parts[0].shape
        return images, sum(part.shape[1] for part in self.parts), classes

    @property
    def logits(self) -> NDArray:  # type: ignore[override]  # read when they are asked for
        return self.per_image(lambda part: part.logits)

    def part(self, images: slice) -> Prediction:
        first, *others = (part.part(images) for part in self.parts)
        if not others:
            return first
        return type(first).join([first, *others])

    def nll(self, labels: Labels) -> Array:
        return self.per_image(lambda part, known: part.nll(known), labels)

    probs, entropy, doubt = map(_by_block, ("probs", "entropy", "doubt"))
    mean_logits, energy, max_logit = map(_by_block, ("mean_logits", "energy", "max_logit"))
    mutual_information = _by_block("mutual_information")
    diversity, disagreement = map(_by_block, ("diversity", "disagreement"))


class _Stored:
    """Logits that are read when they are asked for; the last ones read are kept.

    Args:
        path, name, at: the array of a file, or what stands in it `at` an index.
        shape, together: as those of a `Prediction`.
        kind: what makes a prediction of logits.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        name: str,
        at: tuple[int, ...],
        shape: tuple[int, ...],
        together: int,
        kind: Callable[[Array], Prediction],
    ):
        self.path, self.name, self.at, self.kind = path, name, at, kind
        self.shape, self.together = shape, together
        self._start, self._logits = 0, np.empty(0)
        self._last: tuple[slice, Prediction] | None = None

    def part(self, images: slice) -> Prediction:
        if self._last is None or self._last[0] != images:
            self._last = images, self._read(images)
        return self._last[1]

    def _read(self, images: slice) -> Prediction:
        place = images.start - self._start
        if place < 0 or images.stop - self._start > len(self._logits):
            self._start = images.start // self.together * self.together
            place = images.start - self._start
            end = -(-images.stop // self.together) * self.together
            with open_hdf5(self.path) as file:
                found = file[self.name][(*self.at, slice(self._start, end))]
            self._logits = _checked(self.path, self.name, found)
        return self.kind(self._logits[place : place + images.stop - images.start])


def _checked(path: str | os.PathLike[str], name: str, logits: NDArray) -> NDArray:
    if np.isfinite(logits).all():
        return logits
    raise InputError(f"{path}: some {name.removesuffix('/logits')} logits are not finite")


def _stored(
    path: str | os.PathLike[str],
    dataset: Any,
    kind: Callable[[Array], Prediction],
    at: tuple[int, ...] = (),
) -> Prediction:
    """A prediction of an array in an open file: in memory if it is a single block."""
    name, shape = dataset.name.removeprefix("/"), dataset.shape[len(at) :]
    if prod(shape) <= blocks.WHOLE:
        return kind(_checked(path, name, dataset[(*at, slice(None))]))
    together = dataset.chunks[len(at)] if dataset.chunks else 1
    return Joined([_Stored(path, name, at, shape, together, kind)])


def read_prediction(path: str | os.PathLike[str], split: str) -> tuple[Prediction, Labels]:
    """The prediction for one split, and its labels (N,).

    What does not fit into a block is read when it is asked for; then its errors come as late.

    Raises:
        DamagedFile: the file is damaged or lacks the split.
        InputError: some logits are not finite, or it is not known what they mean.
    """
    with open_hdf5(path) as file:
        dataset = file[f"{split}/logits"]
        dataset[:0]  # an error of HDF5 if it is no array
        labels, attributes = file[f"{split}/labels"][:], dict(file.attrs)
        if not _fit_together(dataset, labels):
            said = f"logits {dataset.shape} and labels {labels.shape} do not pair up"
            raise DamagedFile(path, said)
        try:
            kind = kind_of(attributes)
        except ValueError as error:
            raise InputError(f"{path}: {error}") from None
        return _stored(path, dataset, kind), labels


def kind_of(attributes: Mapping[str, Any]) -> Callable[[NDArray[Any]], Prediction]:
    """What makes a prediction of logits, by the attributes of their file.

    Raises:
        ValueError: they do not say what logits mean.
    """
    name = str(attributes.get("prediction", "mixture"))
    if name not in PREDICTIONS:
        raise ValueError(f"unknown prediction {name!r}; known are {', '.join(PREDICTIONS)}")
    kind = partial(PREDICTIONS[name].stored, attributes=attributes)
    kind(np.zeros((1, 1, 1)))  # reads the attributes
    return kind


def _fit_together(logits: Any, labels: NDArray[Any]) -> bool:
    """Whether arrays are logits (N, M, K) and labels (N,) below K."""
    pair = logits.ndim == 3 and labels.shape == logits.shape[:1] and 0 not in logits.shape[1:]
    kinds = logits.dtype.kind == "f" and labels.dtype.kind == "i"
    return pair and kinds and bool((labels < logits.shape[2]).all())


def read_mixture(path: str | os.PathLike[str], name: str) -> Prediction:
    """The mixture whose logits (N, M, K) an analysis stored by a name."""
    with open_hdf5(path) as file:
        return _stored(path, file[f"{name}/logits"], Mixture)


def read_mixtures(path: str | os.PathLike[str], name: str) -> list[Prediction]:
    """Those of several (…, N, M, K), such as the images moved by every size."""
    with open_hdf5(path) as file:
        dataset = file[f"{name}/logits"]
        return [_stored(path, dataset, Mixture, (place,)) for place in range(len(dataset))]


def read_ensemble(paths: Sequence[str], split: str) -> tuple[Prediction, Labels]:
    """The deep ensemble of several networks, and their common labels (N,)."""
    networks = [read_prediction(path, split) for path in paths]
    return join([prediction for prediction, _ in networks]), networks[0][1]


def join(parts: Sequence[Prediction]) -> Prediction:
    """The deep ensemble of systems that all predict in the same way.

    >>> both = join([Mixture(np.log([[[0.9, 0.1]]])), Mixture(np.log([[[0.5, 0.5]]]))])
    >>> both.probs().round(4).tolist()
    [[0.7, 0.3]]
    """
    return Joined(parts)


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
