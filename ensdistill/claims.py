"""The claims of Nam et al. (2021), each with what this run says of it.

They are about the paper's methods alone: those that say in the configuration which of them they
are (`paper`). A claim on a method that a study does not have is left out.

A claim is about one or more quantities. The verdict on each comes from its 95 % interval (see
`ensdistill.bootstrap`) and from the values that the paper claims for it: `supported` if the whole
interval lies among them, `not supported` if none of it does, `undecided` otherwise. Most claims
have a bound on one side only, so that a quantity exactly at the bound is called supported, and
called not supported, in 2.5 % of runs each.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from ensdistill.bootstrap import Estimate, Interval, image_weights, interval, mean_of
from ensdistill.hdf5 import open_hdf5
from ensdistill.metrics import LOWER, METRICS
from ensdistill.predictions import read_ensemble, read_mixture, read_mixtures
from ensdistill.reports.directions import direction_cosines
from ensdistill.reports.jacobians import jacobian_means
from ensdistill.reports.sweep import divergence
from ensdistill.resampled import ResampledSystems, share_of_gain
from ensdistill.systems import Students

MUCH = 2.0
"""How many times more counts as much more (≫)."""
UNCHANGED = (0.8, 1.25)
"""Ratios that count as no change: the usual margin of equivalence studies."""
MOST = 0.5
"""The share of a gain that counts as recovering most of it."""

COMPARED = ("nll", "ece", "bs", "acc", "dee")
"""Metrics by which students are compared."""
DIVERSIFIED = ("kd_ods", "kd_conf_ods")
"""The methods that the paper proposes."""

Bounds = tuple[float, float]


def verdict(found: Interval, claimed: Bounds) -> str:
    """What an interval says of a claim that a quantity lies strictly within bounds.

    An interval that ends at a bound decides nothing: two methods whose DEE is clipped to 1 differ
    by exactly 0.
    """
    low, high = claimed
    if low < found.low and found.high < high:
        return "supported"
    return "not supported" if found.high < low or high < found.low else "undecided"


class _Page:
    """Collects rows."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def add(
        self, claim: str, quantity: str, found: Interval, claimed: Bounds, images: int, seeds: int
    ) -> None:
        low, high = claimed
        if np.isinf(low):
            text = f"< {high:g}"
        elif np.isinf(high):
            text = f"> {low:g}"
        else:
            text = f"{low:g} to {high:g}"
        self.rows.append(
            {
                "claim": claim,
                "quantity": quantity,
                "estimate": found.estimate,
                "low": found.low,
                "high": found.high,
                "verdict": verdict(found, claimed),
                "n": images,
                "seeds": seeds,
                "claimed": text,
            }
        )


def above(bound: float) -> Bounds:
    """All values above a bound."""
    return bound, np.inf


def below(bound: float) -> Bounds:
    """All values below a bound."""
    return -np.inf, bound


def claims(
    *,
    teachers: Sequence[str],
    students: Students,
    paper: Mapping[str, Mapping[str, str]],
    members: int,
    n_bins: int,
    perturbed: str,
    transferred: str,
    distances: str,
) -> pd.DataFrame:
    """Every claim that a study can speak of, in the paper's order.

    Args:
        teachers: logits files of the whole pool; the first `members` teach.
        students: logits files of every seed, by label.
        paper: which of the paper's methods the study has (`be`, `kd_single`, `kd`, `kd_gaussian`,
            `kd_ods`, `kd_conf_ods`), each with its `name` in the configuration and its `label`.
        members: M.
        n_bins: of the calibration error.
        perturbed, transferred, distances: files of the rules of these names.

    Returns:
        One row per quantity: claim, quantity, estimate, low, high (95 % interval), verdict, n
        (images), seeds (students per method; 0 if none are concerned), claimed (the values
        that support the claim).
    """
    page = _Page()
    _on_teachers(page, teachers[:members], members, perturbed, transferred)
    labels = {key: method["label"] for key, method in paper.items()}
    of_the_paper = {label: students[label] for label in labels.values()}
    systems = ResampledSystems(teachers, of_the_paper, members, n_bins)

    def pairs(methods: Sequence[str], others: Sequence[str]) -> list[tuple[str, str]]:
        return [
            (labels[method], labels[other])
            for method in methods
            for other in others
            if method in labels and other in labels
        ]

    for label, other in pairs(DIVERSIFIED, ["kd"]):
        _more_diverse(page, systems, label, other)
    for label, other in pairs(DIVERSIFIED, ["kd", "kd_gaussian"]):
        _better(page, systems, f"{label} is better than {other}", label, other)
    for label, other in pairs(["kd_conf_ods"], ["kd_ods"]):
        _better(page, systems, f"{label} is at least as good as {other}", label, other)
    for label, other in pairs(["kd"], ["kd_single"]):
        claim = f"{other}, a single student, falls short of {label}"
        _better(page, systems, claim, label, other)
    names = {method["label"]: method["name"] for method in paper.values()}
    for label, other in pairs(DIVERSIFIED, ["kd"]):
        _nearer_jacobians(page, distances, (label, names[label]), (other, names[other]))
    for key, label in labels.items():
        _recovers(page, systems, label, key in DIVERSIFIED)
    return pd.DataFrame(page.rows)


def _on_teachers(
    page: _Page, ensemble: Sequence[str], members: int, perturbed: str, transferred: str
) -> None:
    """Claims on the teachers' diversity, and on directions that transfer."""
    with open_hdf5(perturbed) as file:
        titles = json.loads(file.attrs["titles"])
    train = {name: divergence(read_mixture(perturbed, name)) for name in titles}
    test = read_ensemble(ensemble, "test")[0].diversity()
    assert test is not None, "an ensemble has members"
    on_train = image_weights(len(train["clean"]))
    clean, on_test = mean_of(train["clean"], on_train), mean_of(test, image_weights(len(test), 1))

    def add(
        claim: str, quantity: str, sides: Sequence[Estimate], claimed: Bounds, n: int, **how: Any
    ) -> None:
        page.add(claim, quantity, interval(*sides, **how), claimed, n, seeds=0)

    agree = "On training images the teachers agree far more than on test images"
    ratio = "diversity of the teachers, train ÷ test"
    add(agree, ratio, (clean, on_test), below(1 / MUCH), len(test), log=True)
    for name, claim, claimed in (
        ("gaussian", "Gaussian noise leaves the teachers' diversity unchanged", UNCHANGED),
        ("ods", "ODS raises the teachers' diversity", above(1)),
        ("conf_ods", "ConfODS raises the teachers' diversity", above(1)),
    ):
        moved = mean_of(train[name], on_train)
        quantity = f"diversity on train, {titles[name]} ÷ clean"
        add(claim, quantity, (moved, clean), claimed, len(on_train[0]), log=True)
    still, each = read_mixture(transferred, "clean"), read_mixtures(transferred, "ods")
    images = still.shape[0]
    weights = image_weights(images)
    for where, sources in (
        # Of two members one is not the source, and there is no other from which it could differ.
        ("inside", range(members if members > 2 else 0)),
        ("outside", range(members, len(each))),
    ):
        if not sources:
            continue
        pairs = []
        for source in sources:
            others = [member for member in range(members) if member != source]
            pairs.append([divergence(it, others) for it in (each[source], still)])
        means = [mean_of(np.mean(side, axis=0), weights) for side in zip(*pairs, strict=True)]
        claim = f"ODS directions transfer from a network {where} the ensemble to its members"
        quantity = "diversity of the other teachers, ODS ÷ clean"
        add(claim, quantity, means, above(MUCH), images, log=True)
    cosines = direction_cosines(transferred, members)
    between, noise = (mean_of(cosines[name].mean(1), weights) for name in ("inside", "random"))
    claim = "ODS directions of different teachers are alike"
    quantity = "mean cosine between two teachers' directions − between ODS and random ones"
    add(claim, quantity, (between, noise), above(0), images)


def _more_diverse(page: _Page, systems: ResampledSystems, label: str, other: str) -> None:
    """By the divergence, and by a measure that does not fall where students grow less confident."""
    claim = f"{label} students are more diverse on test images than {other} students"
    for key, title, sign, bound in (
        ("diversity", "diversity (KL) on test", "÷", 1),
        ("disagreement", "pairs of members that disagree on test (%)", "−", 0),
    ):
        if not all(key in systems.metrics[name] for name in (label, other)):
            continue
        sides = [systems.metrics[name][key] for name in (label, other)]
        found = interval(*sides, log=sign == "÷")
        quantity = f"{title}, {label} {sign} {other}"
        page.add(claim, quantity, found, above(bound), systems.images, _seeds(sides))


def _better(page: _Page, systems: ResampledSystems, claim: str, label: str, other: str) -> None:
    """`label` against `other` by every metric, as differences that are positive if it is better."""
    for key in COMPARED:
        metric = METRICS[key]
        names = (other, label) if metric.better == LOWER else (label, other)
        sides = [systems.metrics[name][key] for name in names]
        unit = " (%)" if metric.unit == "%" else ""
        quantity = f"{metric.name or metric.title}{unit}, {names[0]} − {names[1]}"
        found = interval(*sides)
        page.add(claim, quantity, found, above(0), systems.images, _seeds(sides))


def _nearer_jacobians(
    page: _Page, distances: str, method: tuple[str, str], other: tuple[str, str]
) -> None:
    (label, name), (other_label, other_name) = method, other
    for measure, title, better in (
        ("error", "relative error of the Jacobians", -1),
        ("cosine", "cosine of the Jacobians", 1),
    ):
        means = jacobian_means(distances, measure)
        weights = image_weights(len(means[name]))
        sides = [mean_of(means[wanted], weights) for wanted in (name, other_name)]
        labels = [label, other_label]
        ordered, shown = (sides, labels) if better > 0 else (sides[::-1], labels[::-1])
        page.add(
            f"{label} brings the students' Jacobians nearer to the teachers' than {other_label}",
            f"{title}, {shown[0]} − {shown[1]}",
            interval(*ordered),
            above(0),
            len(means[name]),
            _seeds(sides),
        )


def _recovers(page: _Page, systems: ResampledSystems, label: str, diversified: bool) -> None:
    """The share of a deep ensemble's gain in NLL, and at what share of its parameters."""
    size, curve = systems.members, systems.curve
    nll = systems.metrics[label]["nll"]
    one, ensemble = (
        Estimate(curve.measured[[at]], curve.resampled[:, [at]]) for at in (0, size - 1)
    )
    found = share_of_gain(nll, one, ensemble)
    part = systems.parameters[label] / systems.ensemble_parameters
    extent = "more" if diversified else "less"
    page.add(
        f"{label} recovers {extent} than half of the ensemble's gain",
        f"share of DE-{size}'s gain in NLL over DE-1, at {100 * part:.0f} % of its parameters",
        interval(found),
        above(MOST) if diversified else below(MOST),
        systems.images,
        len(nll.measured),
    )


def _seeds(sides: Sequence[Estimate]) -> int:
    return min(len(side.measured) for side in sides)
