"""From stored logits to tables of numbers: scores, reliability, diversity against confidence.

Nothing here sees a network. A *system* is a row of the results table: `DE-m` or a method's label.
A *replicate* is one of the things it is averaged over: a student seed, or a subset of the pool.
"""

import json
import math
from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from ensdistill.logits import Split, read_attributes, read_logits
from ensdistill.metrics import (
    confidence_bins,
    dee_outside,
    deep_ensemble_equivalent,
    ece,
    ensemble_probs,
    pairwise_kl,
    reliability,
    scores,
)
from ensdistill.provenance import open_hdf5

MOST_SUBSETS = 64
"""Of the teacher pool, per ensemble size."""

METRICS = ["acc", "nll", "bs", "ece", "nll_ts", "bs_ts", "ece_ts", "temperature"]
METRICS += ["dee", "dee_ts", "diversity", "entropy"]


def subsets(pool: int, size: int) -> list[tuple[int, ...]]:
    """Subsets of the pool of one size: all when they are at most 64, else 64 drawn by seed 0."""
    if math.comb(pool, size) <= MOST_SUBSETS:
        return list(combinations(range(pool), size))
    rng, drawn = np.random.default_rng(0), set()
    while len(drawn) < MOST_SUBSETS:
        drawn.add(tuple(sorted(rng.choice(pool, size, replace=False).tolist())))
    return sorted(drawn)


def read_pool(paths: Sequence[str], split: str) -> Split:
    """Logits of several networks side by side, (N, P, K), and their common labels (N,)."""
    networks = [read_logits(path, split) for path in paths]
    return np.concatenate([logits for logits, _ in networks], axis=1), networks[0][1]


def score_systems(
    teachers: Sequence[str], students: Mapping[str, Sequence[str]], n_bins: int
) -> pd.DataFrame:
    """All metrics of every system and replicate.

    Args:
        teachers: logits files of the whole pool.
        students: logits files of every seed, by the method's label.
        n_bins: of the calibration errors.

    Returns:
        One row per replicate: system, replicate, parameters, the metrics of
        `metrics.scores`, dee and dee_ts (Deep Ensemble Equivalents on NLL and temperature-scaled
        NLL, clipped to 1 … P) with dee_outside and dee_ts_outside (−1 below, +1 beyond).
    """
    (test, labels), (val, val_labels) = (read_pool(teachers, split) for split in ("test", "val"))
    one = int(read_attributes(teachers[0])["parameters"])
    rows = []

    def add(system: str, replicate: str, parameters: int, *logits: np.ndarray) -> None:
        fixed = {"system": system, "replicate": replicate, "parameters": parameters}
        rows.append({**fixed, **scores(*logits, n_bins)})

    for size in range(1, len(teachers) + 1):
        for chosen in subsets(len(teachers), size):
            members, name = list(chosen), "+".join(map(str, chosen))
            pair = test[:, members], labels, val[:, members], val_labels
            add(f"DE-{size}", name, size * one, *pair)
    for label, paths in students.items():
        for replicate, path in enumerate(paths):
            parameters = int(read_attributes(path)["parameters"])
            pair = *read_logits(path, "test"), *read_logits(path, "val")
            add(label, str(replicate), parameters, *pair)
    frame = pd.DataFrame(rows)
    is_ensemble = frame.system.str.fullmatch(r"DE-\d+")
    for column, metric in (("dee", "nll"), ("dee_ts", "nll_ts")):
        curve = frame[is_ensemble].groupby("system", sort=False)[metric].mean()
        # An ensemble size's place on the curve is that of its mean score.
        placed = frame.system.map(curve).fillna(frame[metric])
        frame[column] = [deep_ensemble_equivalent(score, curve.tolist()) for score in placed]
        frame[f"{column}_outside"] = [dee_outside(score, curve.tolist()) for score in placed]
    return frame


def _on_test(
    systems: Mapping[str, Sequence[str]], ensemble: Sequence[str]
) -> dict[str, list[Split]]:
    """Test logits and labels of every replicate by label, the deep ensemble first."""
    first = {f"DE-{len(ensemble)}": [read_pool(ensemble, "test")]}
    return first | {
        label: [read_logits(path, "test") for path in paths] for label, paths in systems.items()
    }


def reliability_table(
    systems: Mapping[str, Sequence[str]], ensemble: Sequence[str], n_bins: int
) -> pd.DataFrame:
    """Reliability diagrams on test images, counts pooled over replicates.

    Args:
        systems: logits files of every replicate, by label.
        ensemble: logits files of the teachers that form the deep ensemble; it is put first.
        n_bins: equal-width confidence bins.

    Returns:
        One row per system and bin: name, bin, low, high, count, confidence, accuracy (shares),
        and the same in every row ece (mean over replicates) and n (replicates).
    """
    tables = []
    for label, replicates in _on_test(systems, ensemble).items():
        pairs = [(ensemble_probs(logits), labels) for logits, labels in replicates]
        probs, labels = (np.concatenate(part) for part in zip(*pairs, strict=True))
        count, confidence, correct = reliability(probs, labels, n_bins)
        table = _bins(label, n_bins)
        table["count"], table["confidence"], table["accuracy"] = count, confidence, correct
        table["ece"] = np.mean([ece(*pair, n_bins) for pair in pairs])
        table["n"] = len(pairs)
        tables.append(table)
    return pd.concat(tables, ignore_index=True)


def diversity_by_confidence(
    name: str, replicates: Sequence[NDArray[np.float32]], n_bins: int
) -> pd.DataFrame:
    """Diversity of members within bins of the ensemble's confidence [Nam et al. 2021, Fig. 3].

    Args:
        name: what the logits are of.
        replicates: logits (N, M, K) of each; their images are pooled.
        n_bins: equal-width bins of max_k p̄_k.

    Returns:
        One row per bin: name, bin, low, high, count (images), kl (mean pairwise KL of the bin's
        images, in nats; 0 if it has none), and the same in every row mean_kl (of all images)
        and n (replicates).
    """
    confidence = np.concatenate([ensemble_probs(logits).max(1) for logits in replicates])
    divergence = np.concatenate([pairwise_kl(logits, "none") for logits in replicates])
    bins = confidence_bins(confidence, n_bins)
    table = _bins(name, n_bins)
    table["count"] = np.bincount(bins, minlength=n_bins)
    totals = np.bincount(bins, weights=divergence, minlength=n_bins)
    table["kl"] = totals / np.maximum(table["count"], 1)
    table["mean_kl"] = divergence.mean()
    table["n"] = len(replicates)
    return table


def teacher_diversity(perturbed: str, ensemble: Sequence[str], n_bins: int) -> pd.DataFrame:
    """`diversity_by_confidence` of the teachers: on train as it is and perturbed, and on test.

    Args:
        perturbed: the file that rule `perturbed` makes.
        ensemble: logits files of the teachers.
        n_bins: of confidence.
    """
    with open_hdf5(perturbed) as file:
        groups = {
            f"train_{name}": file[f"{name}/logits"][:] for name in json.loads(file.attrs["sets"])
        }
    groups["test_clean"] = read_pool(ensemble, "test")[0]
    tables = [diversity_by_confidence(name, [logits], n_bins) for name, logits in groups.items()]
    return pd.concat(tables, ignore_index=True)


def student_diversity(
    students: Mapping[str, Sequence[str]], ensemble: Sequence[str], n_bins: int
) -> pd.DataFrame:
    """`diversity_by_confidence` of the teachers and of every method's students, on test images.

    Single networks, which have no members to differ, are left out.
    """
    groups = {
        label: [logits for logits, _ in replicates]
        for label, replicates in _on_test(students, ensemble).items()
    }
    tables = [
        diversity_by_confidence(name, replicates, n_bins)
        for name, replicates in groups.items()
        if replicates[0].shape[1] > 1
    ]
    return pd.concat(tables, ignore_index=True)


def learning_curves(labels: Sequence[str], paths: Sequence[str]) -> pd.DataFrame:
    """The histories of all networks in one table: system, replicate, and a history's columns."""
    tables = []
    for label, group in by_label(labels, paths).items():
        for replicate, path in enumerate(group):
            tables.append(pd.read_csv(path).assign(system=label, replicate=replicate))
    joined = pd.concat(tables, ignore_index=True)
    who = ["system", "replicate"]
    return joined[who + [column for column in joined if column not in who]]


def by_label(labels: Sequence[str], paths: Sequence[str]) -> dict[str, list[str]]:
    """Files grouped by the label that stands at the same place."""
    groups: dict[str, list[str]] = {}
    for label, path in zip(labels, paths, strict=True):
        groups.setdefault(label, []).append(path)
    return groups


def _bins(name: str, n_bins: int) -> pd.DataFrame:
    edges = np.arange(n_bins + 1) / n_bins
    return pd.DataFrame({"name": name, "bin": range(n_bins), "low": edges[:-1], "high": edges[1:]})
