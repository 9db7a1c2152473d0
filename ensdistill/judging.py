"""What a metric is, and what it may look at: the words in which `metrics.METRICS` is written."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ensdistill.calibration import apply_temperature
from ensdistill.conformal import Sets, aps_scores, calibration_half, conformal_sets, lac_scores

if TYPE_CHECKING:
    from ensdistill.predictions import Prediction

Array = NDArray[np.float64]

HIGHER, LOWER = 1, -1


@dataclass(frozen=True)
class Judged:
    """What a metric may look at: a system on the test images."""

    prediction: "Prediction"
    labels: NDArray[np.int64]
    n_bins: int
    """Of calibration errors."""
    temperature: float = 1.0
    """T*, which is the best on the validation images; only scaled metrics need it."""
    validation: tuple[Array, NDArray[np.int64]] | None = None
    """Its probabilities (N', K) of the validation images, and their labels (N',); only conformal
    sets need them."""
    human: Array | None = None
    """The shares of people who chose each class, (N, K), where they were asked."""

    @cached_property
    def probs(self) -> Array:
        """(N, K)."""
        return self.prediction.probs()

    @cached_property
    def scaled(self) -> Array:
        """Probabilities after temperature scaling, (N, K)."""
        return apply_temperature(self.probs, self.temperature)

    @cached_property
    def lac(self) -> Sets:
        """Conformal sets of the unscaled probabilities, calibrated on half of the validation
        images (see `conformal.calibration_half`)."""
        return self._sets(lac_scores)

    @cached_property
    def aps(self) -> Sets:
        """The same of `conformal.aps_scores`."""
        return self._sets(aps_scores)

    def _sets(self, scores: Callable[[ArrayLike], Array]) -> Sets:
        if self.validation is None:
            return Sets(float("nan"), float("nan"))
        probs, labels = self.validation
        half = calibration_half(len(labels))
        return conformal_sets(scores, (probs[half], labels[half]), (self.probs, self.labels))


@dataclass(frozen=True)
class Metric:
    """How a system is measured, and how the number is shown."""

    title: str
    """Heads its column in the results table."""
    function: Callable[..., float]
    """Of a `Judged`; of uncertainties inside and outside in `DETECTION`; of the means of another
    metric where `equivalent_of` names it."""
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
