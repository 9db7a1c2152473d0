"""Metrics of students and deep ensembles, as measured and on resamples of the test images."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ensdistill.blocks import collect
from ensdistill.bootstrap import Estimate, Weights, image_weights, mean_of
from ensdistill.calibration import confidence_bins, surest
from ensdistill.metrics import brier, deep_ensemble_equivalent, nll
from ensdistill.predictions import Labels, Prediction, join, read_attributes, read_prediction
from ensdistill.systems import Students, subsets


class ResampledSystems:
    """Metrics of the students and of deep ensembles, as measured and resampled by test image."""

    def __init__(self, teachers: Sequence[str], students: Students, members: int, n_bins: int):
        read = [read_prediction(path, "test") for path in teachers]
        pool, labels = [prediction for prediction, _ in read], read[0][1]
        self.images = len(labels)
        self.weights = image_weights(self.images)
        self.members = members
        self.ensemble_parameters = sum(
            int(read_attributes(path)["parameters"]) for path in teachers[:members]
        )
        sizes = ensemble_nll(pool, labels, range(1, len(pool) + 1))
        self.curve = mean_of(np.stack(sizes, axis=1), self.weights)
        """NLL of deep ensembles; its columns are not seeds but sizes."""
        self.parameters = {
            label: int(read_attributes(paths[0])["parameters"]) for label, paths in students.items()
        }
        self.metrics = {
            label: self._measure((read_prediction(path, "test") for path in paths), n_bins)
            for label, paths in students.items()
        }

    def _measure(
        self, replicates: Iterable[tuple[Prediction, Labels]], n_bins: int
    ) -> dict[str, Estimate]:
        seeds, errors = [], []
        for pair in replicates:
            found = _per_image(*pair)
            probs, labels = found.pop("surest")
            errors.append(calibration_error(probs, labels, n_bins, self.weights))
            seeds.append(found)
        found = {
            key: mean_of(np.stack([seed[key] for seed in seeds], axis=1), self.weights)
            for key in seeds[0]
        }
        found["ece"] = side_by_side(errors)
        found["dee"] = _equivalents(found["nll"], self.curve)
        return found


def ensemble_nll(pool: Sequence[Prediction], labels: Labels, sizes: Sequence[int]) -> list[NDArray]:
    """NLL (N,) of the deep ensembles of each size, the mean over `subsets` of the pool."""
    joined = [[join([pool[i] for i in it]) for it in subsets(len(pool), size)] for size in sizes]

    def means(images: slice) -> list[NDArray]:
        known = labels[images]
        of_sizes = ([it.part(images).nll(known) for it in its] for its in joined)
        return [np.mean(scores, axis=0) for scores in of_sizes]

    return collect([ensembles[0] for ensembles in joined], means)


def share_of_gain(student: Estimate, one: Estimate, ensemble: Estimate) -> Estimate:
    """(NLL of one network − of the student) / (of one network − of the ensemble), by seed."""

    def share(student: NDArray, one: NDArray, ensemble: NDArray) -> NDArray:
        return (one - student) / (one - ensemble)

    return Estimate(
        share(student.measured, one.measured, ensemble.measured),
        share(student.resampled, one.resampled, ensemble.resampled),
    )


def _per_image(prediction: Prediction, labels: Labels) -> dict[str, Any]:
    """Values (N,) whose means over images are metrics, those that the prediction has; and what
    `calibration.surest` keeps."""

    def values(part: Prediction, known: Labels) -> list[Any]:
        probs = part.probs()
        pair = surest(probs, known)
        scores = nll(probs, known, "none"), brier(probs, known, "none"), 100.0 * (pair[1] == 0)
        return [*scores, part.diversity(), part.disagreement(), pair]

    keys = "nll", "bs", "acc", "diversity", "disagreement", "surest"
    found = dict(zip(keys, prediction.per_image(values, labels), strict=True))
    if found["disagreement"] is not None:
        found["disagreement"] = 100 * found["disagreement"]
    return {key: it for key, it in found.items() if it is not None}


def side_by_side(columns: Sequence[Estimate]) -> Estimate:
    measured = np.concatenate([column.measured for column in columns])
    return Estimate(measured, np.concatenate([column.resampled for column in columns], axis=1))


def calibration_error(probs: NDArray, labels: Labels, n_bins: int, weights: Weights) -> Estimate:
    """ECE = Σ_b |mean over images of 1[in bin b]·(correct − confidence)|."""
    gaps = (probs.argmax(1) == labels) - probs.max(1)
    by_bin = np.zeros((len(labels), n_bins))
    by_bin[np.arange(len(labels)), confidence_bins(probs.max(1), n_bins)] = gaps
    means = mean_of(by_bin, weights)
    return Estimate(
        np.abs(means.measured).sum(keepdims=True),
        np.abs(means.resampled).sum(1, keepdims=True),
    )


def _equivalents(nll: Estimate, curve: Estimate) -> Estimate:
    """Deep Ensemble Equivalents, the curve resampled with the students."""

    def dee(scores: NDArray, sizes: Any) -> list[float]:
        return [deep_ensemble_equivalent(score, sizes) for score in scores]

    resampled = [dee(*pair) for pair in zip(nll.resampled, curve.resampled, strict=True)]
    return Estimate(np.array(dee(nll.measured, curve.measured)), np.array(resampled))
