"""Findings of the bench: which way to distil is better, by how much, and how sure that is.

Where a claim is of a paper (`ensdistill.claims`), a finding is an answer to a question that those
ask who must choose a method. All are about the negative log-likelihood on test images, with an
interval over images and student seeds (`ensdistill.bootstrap`). Questions on where the teachers are
asked compare methods that differ in nothing else, family by family; a *family* is what such methods
share.

The first row of a question is its answer: of several families their mean. It is `yes` or `no` if
its p-value is below 0.05, and `undecided` otherwise. P-values are adjusted by Holm's method: those
of first rows for all questions, so that in at most 5 % of runs any answer is wrong by chance; those
of the other rows for the rows of their question.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy.stats import kendalltau

from ensdistill.bootstrap import (
    LEVEL,
    Estimate,
    Weights,
    holm,
    image_weights,
    interval,
    mean_of,
    p_value,
)
from ensdistill.calibration import apply_temperature
from ensdistill.judging import optimal_temperatures
from ensdistill.metrics import nll
from ensdistill.predictions import (
    Array,
    Labels,
    Prediction,
    read_prediction,
    splits_of,
)
from ensdistill.resampled import ensemble_nll, share_of_gain
from ensdistill.systems import Students

ONE_NETWORK = 1.1
"""Up to so many times the multiply–adds of one network is the cost of one network."""
MOST = 0.5
"""The share of a gain that counts as most of it."""
ORDERED = 0.5
"""Kendall's τ from which on a ranking holds: three of four pairs keep their order."""
MARGIN = 0.1
"""The share of the ensemble's gain that a method may lose and still be enough."""


class Contrast(NamedTuple):
    """A question on two places to ask the teachers."""

    question: str
    better: str
    """Where the teachers are asked, if the answer is to be yes."""
    other: str
    within: float = 0.0
    """Share of the ensemble's gain by which `better` may be worse."""


CONTRASTS = (
    Contrast("Do ConfODS inputs help, and every family of students?", "conf_ods", "none"),
    Contrast("Do ConfODS inputs help more than noise of their size?", "conf_ods", "gaussian"),
    Contrast("Is one ODS direction per teacher better than one for all?", "ods_each", "ods"),
    Contrast("Are TDiv–SDiv inputs better than ODS inputs?", "tdiv_sdiv", "ods"),
    Contrast("Is mixup enough, instead of ODS?", "mixup", "ods", MARGIN),
    Contrast("Are held-out images enough, instead of ODS?", "held_out", "ods", MARGIN),
)
ONCE = "Is one pass of the student a step enough, instead of two?"


@dataclass
class Systems:
    """NLL of deep ensembles and students, an `Estimate` each whose columns are seeds."""

    members: int
    """M, of the ensemble."""
    one: Estimate
    """NLL of one teacher on test, mean over the pool."""
    ensemble: Estimate
    """NLL of the deep ensembles of M teachers on test, mean over subsets of the pool."""
    images: int
    """Test images."""
    on_validation: dict[str, float] = field(default_factory=dict)
    """By student, the mean over seeds."""
    on_test: dict[str, Estimate] = field(default_factory=dict)
    scaled: dict[str, Estimate] = field(default_factory=dict)
    """On test after temperature scaling."""
    shifted: dict[str, Estimate] = field(default_factory=dict)
    """On corrupted copies, mean over kinds and severities."""
    shifted_images: int = 0
    """Images that were corrupted."""
    shifted_one: Estimate | None = None
    shifted_ensemble: Estimate | None = None


COLUMNS = ["question", "quantity", "system", "estimate", "low", "high", "p", "verdict", "asked"]
COLUMNS += ["n", "seeds"]

Families = Sequence[Mapping[str, str]]
"""Labels of students that differ in where their teachers are asked alone, by that place."""


def findings(
    *,
    teachers: Sequence[str],
    students: Students,
    shifted_ensemble: Sequence[str],
    shifted_students: Students,
    costs: pd.DataFrame,
    families: Families,
    members: int,
    judged: Sequence[str] = (),
) -> pd.DataFrame:
    """Every answer that a study can give.

    Args:
        teachers: logits files of the whole pool; the first `members` teach.
        students: logits files of every seed, by label.
        shifted_ensemble, shifted_students: their logits on shifted images; students without them
            are left out where those count.
        costs: metrics/costs.csv.
        families: methods that differ in where the teachers are asked alone.
        members: M.
        judged: labels of those students that are methods of others.

    Returns:
        One row per quantity: question, quantity, system (the student, where it is about one alone),
        estimate, low, high (95 % interval), p (adjusted), verdict, asked (values that make it yes),
        n (images), seeds.
    """
    systems = measured(teachers, students, shifted_ensemble, shifted_students, members)
    macs = costs.set_index("system")["macs"]
    # What costs nothing that is known is not said to cost what one network costs.
    costs_one = macs.reindex([*systems.on_test]) <= ONE_NETWORK * macs["DE-1"]
    return answers(systems, families, costs_one, judged)


def answers(
    systems: Systems,
    families: Families,
    costs_one: Mapping[str, bool] | pd.Series,
    judged: Sequence[str] = (),
) -> pd.DataFrame:
    """The findings on systems that are measured.

    Args:
        systems: their NLL.
        families: as `findings` takes them.
        costs_one: by student, whether it costs what one network costs.
        judged: as `findings` takes them.
    """
    rows = [
        *_near_the_ensemble(systems, costs_one),
        *_near_by_others(systems, judged),
        *(row for contrast in CONTRASTS for row in _contrasted(systems, families, contrast)),
        *_contrasted_once(systems, families),
        *_rankings(systems),
    ]
    table = pd.DataFrame([row.known for row in rows])
    table["p"] = adjusted([row.p for row in rows], table["question"])
    yes = np.array([row.is_yes for row in rows])
    table["verdict"] = np.where(table["p"] < 1 - LEVEL, np.where(yes, "yes", "no"), "undecided")
    return table[COLUMNS]


def adjusted(p_values: Sequence[float], questions: pd.Series) -> Array:
    """By Holm's method: of first rows together, of the others question by question."""
    found, groups = np.array(p_values), questions.where(questions.duplicated(), "first rows")
    for group in groups.unique():
        found[groups == group] = holm(found[groups == group])
    return found


class _Row(NamedTuple):
    """A row of the table but for its verdict."""

    known: dict[str, Any]
    p: float
    is_yes: bool


def _row(
    question: str,
    quantity: str,
    sides: Sequence[Estimate],
    bound: float,
    images: int,
    system: str = "",
    most: float = np.inf,
) -> _Row:
    """Asked is whether a quantity or a difference is above a bound; it can be `most` at most."""
    found = interval(*sides)
    known = {
        "question": question,
        "quantity": quantity,
        "system": system,
        "estimate": found.estimate,
        "low": found.low,
        "high": min(found.high, most),
        "asked": f"> {bound + 0.0:.3g}".replace("-", "−"),
        "n": images,
        "seeds": min(len(side.measured) for side in sides),
    }
    return _Row(known, p_value(*sides, bound=bound), found.estimate > bound)


def _near_the_ensemble(
    systems: Systems, costs_one: Mapping[str, bool] | pd.Series
) -> Iterator[_Row]:
    """Chosen on validation images, or the best of many would seem better than it is."""
    ranked = sorted(systems.on_validation, key=systems.on_validation.__getitem__)
    cheap = [label for label in ranked if costs_one[label]]
    question = "How near do students come to the ensemble?"
    quantity = f"share of DE-{systems.members}'s gain in NLL over DE-1"
    best = dict.fromkeys([*ranked[:1], *cheap[:1]])  # once, if they are the same
    for label in best:
        share = share_of_gain(systems.on_test[label], systems.one, systems.ensemble)
        yield _row(question, quantity, [share], MOST, systems.images, label)
    if systems.shifted_one is None or systems.shifted_ensemble is None:
        return
    for label in filter(systems.shifted.__contains__, best):
        sides = systems.shifted[label], systems.shifted_one, systems.shifted_ensemble
        yield _row(
            "How near do they come on corrupted images?",
            quantity,
            [share_of_gain(*sides)],
            MOST,
            systems.shifted_images,
            label,
        )


def _near_by_others(systems: Systems, judged: Sequence[str]) -> Iterator[_Row]:
    """Each method of others: none is chosen here."""
    quantity = f"share of DE-{systems.members}'s gain in NLL over DE-1"
    for label in judged:
        share = share_of_gain(systems.on_test[label], systems.one, systems.ensemble)
        question = "How near do the methods that are judged beside come?"
        yield _row(question, quantity, [share], MOST, systems.images, label)


def _contrasted(systems: Systems, families: Families, contrast: Contrast) -> Iterator[_Row]:
    pairs = [
        (at[contrast.other], at[contrast.better])
        for at in families
        if {contrast.other, contrast.better} <= at.keys()
    ]
    yield from _compared(systems, contrast.question, pairs, contrast.within)


def _contrasted_once(systems: Systems, families: Families) -> Iterator[_Row]:
    pairs = [
        (at[where], at[f"{where}_single_pass"])
        for at in families
        for where in at
        if f"{where}_single_pass" in at
    ]
    yield from _compared(systems, ONCE, pairs, MARGIN)


def _compared(
    systems: Systems, question: str, pairs: Sequence[tuple[str, str]], within: float
) -> Iterator[_Row]:
    """The mean over pairs, if there are several, and every pair: other − better.

    `within` is the share of the ensemble's gain by which `better` may be worse.
    """
    if not pairs:
        return
    gain = systems.one.measured.mean() - systems.ensemble.measured.mean()
    bound = -within * max(gain, 0.0)
    of_pairs = [[systems.on_test[label] for label in pair] for pair in pairs]
    if len(pairs) > 1:
        sides = [_mean(side) for side in zip(*of_pairs, strict=True)]
        quantity = f"NLL, mean difference over {len(pairs)} families"
        yield _row(question, quantity, sides, bound, systems.images)
    for (other, better), sides in zip(pairs, of_pairs, strict=True):
        yield _row(question, f"NLL, {other} − {better}", sides, bound, systems.images)


def _mean(estimates: Sequence[Estimate]) -> Estimate:
    """Of several quantities, seed by seed."""
    return Estimate(
        np.mean([it.measured for it in estimates], axis=0),
        np.mean([it.resampled for it in estimates], axis=0),
    )


def _rankings(systems: Systems) -> Iterator[_Row]:
    """Whether students are in the same order elsewhere, seed by seed.

    What is judged beside with another number of seeds is left out.
    """
    seeds = len(next(iter(systems.on_test.values())).measured)
    for question, others, what, images in (
        (
            "Does the ranking of the students hold under shift?",
            systems.shifted,
            "on corrupted copies",
            systems.shifted_images,
        ),
        (
            "Does the ranking hold after temperature scaling?",
            systems.scaled,
            "after temperature scaling",
            systems.images,
        ),
    ):
        labels = [
            label
            for label, found in systems.on_test.items()
            if label in others and len(found.measured) == seeds
        ]
        if len(labels) > 2:
            order = rank_correlation(
                [systems.on_test[x] for x in labels], [others[x] for x in labels]
            )
            quantity = f"Kendall's τ of NLL, {len(labels)} students, on test and {what}"
            yield _row(question, quantity, [order], ORDERED, images, most=1.0)


def rank_correlation(here: Sequence[Estimate], there: Sequence[Estimate]) -> Estimate:
    """Kendall's τ between two orders of the same systems, by seed."""

    def correlations(here: Array, there: Array) -> Array:  # (systems, R) each
        return np.array([kendalltau(*pair).statistic for pair in zip(here.T, there.T, strict=True)])

    measured = correlations(*(np.stack([it.measured for it in side]) for side in (here, there)))
    first, second = (np.stack([it.resampled for it in side], axis=1) for side in (here, there))
    resampled = [correlations(*pair) for pair in zip(first, second, strict=True)]
    return Estimate(measured, np.array(resampled))


# --- from files ------------------------------------------------------------------------------


def measured(
    teachers: Sequence[str],
    students: Students,
    shifted_ensemble: Sequence[str],
    shifted_students: Students,
    members: int,
) -> Systems:
    """NLL of all systems, a file at a time."""
    read = [read_prediction(path, "test") for path in teachers]
    pool, labels = [prediction for prediction, _ in read], read[0][1]
    weights = image_weights(len(labels))
    corrupted = [it for it in splits_of(shifted_ensemble[0]) if it.startswith("corrupted/")]
    corrupted = [it for it in corrupted if not it.endswith("/0")]
    copied = len(read_prediction(shifted_ensemble[0], corrupted[0])[1])
    # Which test images were copied is not said, so the draws are independent.
    of_copies = image_weights(copied, seed=1)
    one, ensemble = ensemble_nll(pool, labels, (1, members))
    alone, together = _on_copies(shifted_ensemble, corrupted, (1, len(shifted_ensemble)))
    systems = Systems(
        members,
        one=mean_of(one, weights),
        ensemble=mean_of(ensemble, weights),
        images=len(labels),
        shifted_images=copied,
        shifted_one=mean_of(alone, of_copies),
        shifted_ensemble=mean_of(together, of_copies),
    )
    for label, paths in students.items():
        _add(systems, label, paths, weights)
        if label not in shifted_students:  # its logits alone are known
            continue
        copies = [_on_copies([path], corrupted, (1,))[0] for path in shifted_students[label]]
        systems.shifted[label] = mean_of(np.stack(copies, axis=1), of_copies)
    return systems


def _on_copies(paths: Sequence[str], splits: Sequence[str], sizes: Sequence[int]) -> list[Array]:
    """NLL (N,) of ensembles on corrupted copies of each image, mean over kinds and severities.

    Of every size the mean over the ensembles of so many of the networks.
    """
    totals: list[Array | float] = [0.0] * len(sizes)
    for split in splits:
        read = [read_prediction(path, split) for path in paths]
        found = ensemble_nll([copies for copies, _ in read], read[0][1], sizes)
        totals = [total + values / len(splits) for total, values in zip(totals, found, strict=True)]
    return [np.asarray(total) for total in totals]


def _both_nll(temperature: float, prediction: Prediction, labels: Labels) -> list[Array]:
    """As it is, and after temperature scaling."""
    probs = prediction.probs()
    return [nll(it, labels, "none") for it in (probs, apply_temperature(probs, temperature))]


def _add(systems: Systems, label: str, paths: Sequence[str], weights: Weights) -> None:
    on_validation: list[float] = []
    on_test: list[Array] = []
    scaled: list[Array] = []
    for path in paths:
        validation, known = read_prediction(path, "val")
        on_validation.append(validation.nll(known).mean())
        (temperature,) = optimal_temperatures([validation], known)
        test, known = read_prediction(path, "test")
        of_test = test.per_image(partial(_both_nll, temperature), known)
        for values, found in zip((on_test, scaled), of_test, strict=True):
            values.append(found)
    systems.on_validation[label] = float(np.mean(on_validation))
    systems.on_test[label] = mean_of(np.stack(on_test, axis=1), weights)
    systems.scaled[label] = mean_of(np.stack(scaled, axis=1), weights)
