"""The answer: how near students come to the ensemble, and at what cost."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ensdistill.markup import number

if TYPE_CHECKING:
    import pandas as pd

GLANCE = ("nll", "acc", "parameters", "macs", "ms_1")
"""Columns of the few systems that the answer is about."""


@dataclass(frozen=True)
class Scale:
    """Where shares of a gain are drawn, from the left end to the right end."""

    low: float
    high: float

    def place(self, share: float) -> float:
        """In percent of the width; what lies outside is drawn at the end."""
        inside = min(max(share, self.low), self.high)
        return round(100 * (inside - self.low) / (self.high - self.low), 2)


SCALE = Scale(-0.25, 1.5)
"""From somewhat worse than one network to half as good again as the ensemble."""


@dataclass(frozen=True)
class Answer:
    """What one student keeps of the ensemble's gain, as shares: 1 is all of it."""

    system: str
    share: float
    low: float
    high: float
    parameters: float | None
    """Of the ensemble's; None if not known."""
    compute: float | None
    """Its multiply–adds for an image, of the ensemble's; None if not measured."""

    @property
    def keeps(self) -> bool:
        """Whether there is anything to keep, and something of it is kept."""
        return self.share > 0

    @property
    def is_defined(self) -> bool:
        """False where the ensemble has no gain over one network."""
        return bool(np.isfinite(self.share))

    @property
    def has_interval(self) -> bool:
        return bool(np.isfinite([self.low, self.high]).all())


def answers(
    findings: "pd.DataFrame | None", results: "pd.DataFrame | None", members: int
) -> list[Answer]:
    """Of the best student, then of the best that costs one network if that is another.

    Args:
        findings: whose first question is how near students come to the ensemble, with the best
            in its first row and the best that costs one network in its second.
        results: the results table; parameters and macs of students and of DE-M are read there.
        members: M.

    Returns:
        At most two; none without findings.
    """
    if findings is None:
        return []
    first = findings[findings["question"] == findings["question"].iloc[0]].head(2)
    first = first.drop_duplicates("system")
    return [
        Answer(
            row["system"],
            float(row["estimate"]),
            float(row["low"]),
            float(row["high"]),
            _ratio(results, row["system"], members, "parameters"),
            _ratio(results, row["system"], members, "macs"),
        )
        for _, row in first.iterrows()
    ]


def _ratio(results: "pd.DataFrame | None", system: str, members: int, key: str) -> float | None:
    """A student's value over that of the ensemble that taught it."""
    if results is None or key not in results:
        return None
    known = results.set_index("system")[key]
    ratio = known.get(system, np.nan) / known.get(f"DE-{members}", np.nan)
    return float(ratio) if np.isfinite(ratio) else None


def percent(share: float) -> str:
    """A share as a whole number of percent, without the sign; below 1 % its first digit.

    >>> percent(0.254), percent(-0.05), percent(0.0042), percent(0.0)
    ('25', '−5', '0.4', '0')
    """
    value = 100 * share
    return number(value, 0) if abs(value) >= 1 or value == 0 else f"{value:.1g}".replace("-", "−")
