"""What a metric is, and what it may look at: the words in which `metrics.METRICS` is written."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ensdistill.blocks import blocks, collect
from ensdistill.calibration import (
    TINY,
    clipped_log,
    optimal_temperature,
    scaled_by,
    search_temperature,
    slopes,
    surest,
)
from ensdistill.conformal import (
    aps_scores,
    aps_sets,
    calibration_half,
    label_scores,
    lac_scores,
    sets_of,
    threshold,
)

if TYPE_CHECKING:
    from ensdistill.predictions import Prediction

Array = NDArray[np.float64]
Labels = NDArray[np.int64]

HIGHER, LOWER = 1, -1


def mean(values: NDArray, n_bins: int = 0) -> float:
    """Over images."""
    return float(values.mean())


def percent(values: NDArray, n_bins: int = 0) -> float:
    """The share of images of which something is true, or NaN."""
    return 100 * float(np.mean(values))


@dataclass(frozen=True)
class Fit:
    """What is fitted to a system's validation images."""

    temperature: float = 1.0
    """T*, which is the best; only scaled metrics need it."""
    lac: float = np.nan
    aps: float = np.nan
    """Thresholds of conformal sets of the unscaled probabilities, from half of the images (see
    `conformal.calibration_half`)."""


@dataclass(frozen=True)
class Judged:
    """What a metric may look at: a system on some of the test images, n of them."""

    prediction: "Prediction"
    labels: Labels
    n_bins: int
    """Of calibration errors."""
    fit: Fit = Fit()
    human: Array | None = None
    """The shares of people who chose each class, (n, K), where they were asked."""

    @cached_property
    def probs(self) -> Array:
        """(n, K)."""
        return self.prediction.probs()

    @cached_property
    def log_probs(self) -> Array:
        """As temperature scaling has them, of no less than `calibration.TINY`; (n, K)."""
        return clipped_log(self.probs, TINY)

    @cached_property
    def scaled(self) -> Array:
        """Probabilities after temperature scaling, (n, K)."""
        return scaled_by(self.log_probs, self.fit.temperature)

    @cached_property
    def surest(self) -> tuple[Array, Labels]:
        """See `calibration.surest`."""
        return surest(self.probs, self.labels)

    @cached_property
    def lac(self) -> tuple[NDArray, NDArray]:
        """Whether the label is in the set by `conformal.lac_scores`, and the set's size, (n,) each;
        NaN where no threshold is known."""
        return self._sets(partial(sets_of, lac_scores), self.fit.lac)

    @cached_property
    def aps(self) -> tuple[NDArray, NDArray]:
        """The same of `conformal.aps_scores`."""
        return self._sets(aps_sets, self.fit.aps)

    def _sets(
        self, sets: Callable[..., tuple[NDArray, NDArray]], limit: float
    ) -> tuple[NDArray, NDArray]:
        if np.isnan(limit):
            return (np.full(len(self.labels), np.nan),) * 2
        return sets(self.probs, self.labels, limit)


@dataclass(frozen=True)
class Metric:
    """How a system is measured, and how the number is shown."""

    title: str
    """Heads its column in the results table."""
    function: Callable[..., Any]
    """Of a `Judged`: a value per image (n,), or what else `blocks.collect` takes, of which `whole`
    makes the metric; None where a system has none. Of uncertainties inside and outside in
    `DETECTION`; of the means of another metric where `equivalent_of` names it."""
    better: int = 0
    """`HIGHER`, `LOWER`, or 0 where neither is better."""
    unit: str = ""
    decimals: int = 4
    meaning: str = ""
    """Explains the title under the results table."""
    name: str = ""
    """In figures and sentences, where that is not the title."""
    equivalent_of: str = ""
    """The metric whose curve over ensemble sizes is asked for the size that does as well."""
    in_table: bool = True
    """Whether the results table has a column of it; the CSV has all."""
    whole: Callable[[Any, int], float] = mean
    """Of the values of all images, and the number of bins."""

    @property
    def column(self) -> str:
        """The head of its column, with an arrow to what is better."""
        arrow = {HIGHER: " ↑", LOWER: " ↓", 0: ""}[self.better]
        return f"{self.title}{' %' if self.unit == '%' else ''}{arrow}"

    @property
    def axis(self) -> str:
        """The title of a panel."""
        name = self.name or self.title
        unit = f" ({self.unit})" if self.unit else ""
        better = {HIGHER: ", higher is better", LOWER: ", lower is better", 0: ""}[self.better]
        return f"{name[0].upper()}{name[1:]}{unit}{better}"


def judge(
    chosen: Mapping[str, Metric],
    systems: Sequence["Prediction"],
    labels: Labels,
    n_bins: int,
    fits: Sequence[Fit] | None = None,
    human: Array | None = None,
) -> list[dict[str, float]]:
    """Metrics of several systems, by which all images are looked at once.

    Args:
        chosen: metrics by their keys.
        systems: predictions of the same images.
        labels: (N,).
        n_bins, human: as `Judged` has them, of all images.
        fits: by `fitted`, one per system.
    """

    # What several metrics are made of is kept once.
    functions = dict.fromkeys(metric.function for metric in chosen.values())

    def values(images: slice) -> list[list[Any]]:
        people = None if human is None else human[images]
        seen = (
            Judged(system.part(images), labels[images], n_bins, fit, people)
            for system, fit in zip(systems, fits or [Fit()] * len(systems), strict=True)
        )
        return [[function(it) for function in functions] for it in seen]

    judged = []
    for found in collect(systems, values):
        known = dict(zip(functions, found, strict=True))
        judged.append(
            {
                key: np.nan if known[it.function] is None else it.whole(known[it.function], n_bins)
                for key, it in chosen.items()
            }
        )
    return judged


def fitted(systems: Sequence["Prediction"], labels: Labels) -> list[Fit]:
    """The fits of several systems to validation images, of which they have predictions."""
    calibrates = np.zeros(len(labels), bool)
    calibrates[calibration_half(len(labels))] = True

    def scores(images: slice) -> list[list[Array]]:
        used = calibrates[images]
        return [
            [label_scores(of, probs, labels[images][used]) for of in (lac_scores, aps_scores)]
            for probs in (system.part(images).probs()[used] for system in systems)
        ]

    thresholds = [map(threshold, found) for found in collect(systems, scores)]
    temperatures = optimal_temperatures(systems, labels)
    return [Fit(*found) for found in zip(temperatures, *zip(*thresholds, strict=True), strict=True)]


def optimal_temperatures(systems: Sequence["Prediction"], labels: Labels) -> list[float]:
    """`optimal_temperature` of several systems, which share the passes over the images."""
    if len(list(blocks(systems))) == 1:
        whole = slice(0, len(labels))
        return [optimal_temperature(it.part(whole).probs(), labels) for it in systems]
    searches = [search_temperature() for _ in systems]
    asked = {place: next(search) for place, search in enumerate(searches)}
    found = [np.nan] * len(systems)
    while asked:

        def terms(images: slice, asked: Mapping[int, float] = asked) -> list[tuple[Array, Array]]:
            logs = (clipped_log(systems[it].part(images).probs(), TINY) for it in asked)
            known = labels[images]
            return [slopes(its, known, at) for its, at in zip(logs, asked.values(), strict=True)]

        sums, going = collect(systems, terms), dict[int, float]()
        for place, (slope, curvature) in zip(asked, sums, strict=True):
            try:
                going[place] = searches[place].send((slope.mean(), curvature.mean()))
            except StopIteration as end:
                found[place] = end.value
        asked = going
    return found
