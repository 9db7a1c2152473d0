"""From stored logits to tables of numbers: one function per CSV in results/<study>/metrics/.

Nothing here sees a network. A *system* is a row of the results table: `DE-m` or a method's label.
A *replicate* is one of the things it is averaged over: a student seed, or a subset of the pool.
Logits files of students are given by label, one per seed; the *ensemble* are the logits files of
the teachers that teach. Intervals are 95 % bootstrap intervals over images.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from ensdistill import metrics
from ensdistill.bootstrap import image_weights, interval, mean_of
from ensdistill.files import open_hdf5, read_csv
from ensdistill.logits import Split, read_attributes, read_logits, splits_of
from ensdistill.metrics import ensemble_probs, pairwise_kl

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


Students = Mapping[str, Sequence[str]]


def scores(teachers: Sequence[str], students: Students, n_bins: int) -> pd.DataFrame:
    """All metrics of every system and replicate.

    Args:
        teachers: logits files of the whole pool.
        students: see the module.
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
        rows.append({**fixed, **metrics.scores(*logits, n_bins)})

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
        frame[column] = [
            metrics.deep_ensemble_equivalent(score, curve.tolist()) for score in placed
        ]
        frame[f"{column}_outside"] = [
            metrics.dee_outside(score, curve.tolist()) for score in placed
        ]
    return frame


def _systems(
    ensemble: Sequence[str], students: Students, split: str, single: bool = False
) -> dict[str, list[Split]]:
    """Logits and labels of every replicate by system: the deep ensemble, then the students.

    `single`: with DE-1 before, whose replicates are the ensemble's members.
    """
    first = {"DE-1": [read_logits(path, split) for path in ensemble]} if single else {}
    first[f"DE-{len(ensemble)}"] = [read_pool(ensemble, split)]
    return first | {
        label: [read_logits(path, split) for path in paths] for label, paths in students.items()
    }


def reliability(ensemble: Sequence[str], students: Students, n_bins: int) -> pd.DataFrame:
    """Reliability diagrams on test images, counts pooled over replicates.

    Args:
        ensemble, students: see the module.
        n_bins: equal-width confidence bins.

    Returns:
        One row per system and bin: name, bin, low, high, count, confidence, accuracy (shares),
        and the same in every row ece (mean over replicates) and n (replicates).
    """
    tables = []
    for label, replicates in _systems(ensemble, students, "test").items():
        pairs = [(ensemble_probs(logits), labels) for logits, labels in replicates]
        probs, labels = (np.concatenate(part) for part in zip(*pairs, strict=True))
        count, confidence, correct = metrics.reliability(probs, labels, n_bins)
        table = _bins(label, np.arange(n_bins + 1) / n_bins)
        table["count"], table["confidence"], table["accuracy"] = count, confidence, correct
        table["ece"] = np.mean([metrics.ece(*pair, n_bins) for pair in pairs])
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
    bins = metrics.confidence_bins(confidence, n_bins)
    table = _bins(name, np.arange(n_bins + 1) / n_bins)
    table["count"] = np.bincount(bins, minlength=n_bins)
    totals = np.bincount(bins, weights=divergence, minlength=n_bins)
    table["kl"] = totals / np.maximum(table["count"], 1)
    table["mean_kl"] = divergence.mean()
    table["n"] = len(replicates)
    return table


def diversity_teachers(perturbed: str, ensemble: Sequence[str], n_bins: int) -> pd.DataFrame:
    """`diversity_by_confidence` of the teachers: on train as it is and perturbed, and on test.

    Args:
        perturbed: the file that rule `perturbed` makes.
        ensemble: see the module.
        n_bins: of confidence.
    """
    with open_hdf5(perturbed) as file:
        groups = {
            f"train_{name}": file[f"{name}/logits"][:] for name in json.loads(file.attrs["sets"])
        }
    groups["test_clean"] = read_pool(ensemble, "test")[0]
    tables = [diversity_by_confidence(name, [logits], n_bins) for name, logits in groups.items()]
    return pd.concat(tables, ignore_index=True)


def diversity_students(ensemble: Sequence[str], students: Students, n_bins: int) -> pd.DataFrame:
    """`diversity_by_confidence` of the teachers and of every method's students, on test images.

    Single networks, which have no members to differ, are left out.
    """
    groups = {
        label: [logits for logits, _ in replicates]
        for label, replicates in _systems(ensemble, students, "test").items()
    }
    tables = [
        diversity_by_confidence(name, replicates, n_bins)
        for name, replicates in groups.items()
        if replicates[0].shape[1] > 1
    ]
    return pd.concat(tables, ignore_index=True)


def _doubt(probs: NDArray[np.float64]) -> NDArray[np.float64]:
    """1 − max_k p_k, (N, K) → (N,), exact where p is nearly one-hot."""
    return np.sort(probs, axis=1)[:, :-1].sum(1)


DOUBTS = np.logspace(-6, 0, 25)
"""Thresholds on 1 − confidence at which saturation is counted."""


def saturation(perturbed: str, ensemble: Sequence[str]) -> pd.DataFrame:
    """How nearly one-hot each teacher is on train and on test.

    Returns:
        One row per split, teacher and threshold `doubt`: share (of images whose largest
        probability is at least 1 − doubt), and the same in all of a split and teacher:
        confidence (its mean), accuracy [%], n (images).
    """
    with open_hdf5(perturbed) as file:
        train = file["clean/logits"][:], file["labels"][:]
    tables = []
    for split, (logits, labels) in {"train": train, "test": read_pool(ensemble, "test")}.items():
        for teacher in range(logits.shape[1]):
            probs = ensemble_probs(logits[:, [teacher]])
            doubt = _doubt(probs)
            table = pd.DataFrame({"split": split, "teacher": teacher, "doubt": DOUBTS})
            table["share"] = (doubt[:, None] <= DOUBTS).mean(0)
            table["confidence"] = probs.max(1).mean()
            table["accuracy"] = metrics.accuracy(probs, labels)
            table["n"] = len(labels)
            tables.append(table)
    return pd.concat(tables, ignore_index=True)


def _mean_kl(logits: NDArray[np.float32], weights: NDArray[np.float64]) -> dict[str, float]:
    found = interval(mean_of(pairwise_kl(logits, "none"), weights))
    return {"kl": found.estimate, "low": found.low, "high": found.high, "n": len(logits)}


def sweep(swept: str, perturbed: str, ensemble: Sequence[str]) -> pd.DataFrame:
    """The teachers' diversity on train against the size η of each perturbation.

    Args:
        swept: the file that rule `swept` makes.
        perturbed: the file that rule `perturbed` makes, for the whole of train as it is.
        ensemble: see the module.

    Returns:
        One row per perturbation and η: perturbation, eta (pixel range), kl (nats), low, high,
        n (images), and in every row train_kl, test_kl and study_eta.
    """
    with open_hdf5(perturbed) as file:
        train, study_eta = pairwise_kl(file["clean/logits"][:]), float(file.attrs["eta"])
    rows = []
    with open_hdf5(swept) as file:
        etas = json.loads(file.attrs["etas"])
        for name in json.loads(file.attrs["sets"]):
            logits = file[f"{name}/logits"][:]
            weights = image_weights(logits.shape[1])
            for eta, moved in zip(etas, logits, strict=True):
                rows.append({"perturbation": name, "eta": eta, **_mean_kl(moved, weights)})
    test = pairwise_kl(read_pool(ensemble, "test")[0])
    return pd.DataFrame(rows).assign(train_kl=train, test_kl=test, study_eta=study_eta)


def transfer(transferred: str, members: int) -> pd.DataFrame:
    """Diversity of the other teachers where ODS from one leads [Nam et al. 2021, Fig. 6].

    Args:
        transferred: the file that rule `transferred` makes.
        members: M; the first M networks of the pool are the ensemble.

    Returns:
        One row per source: source, where (`inside` or `outside` of the ensemble), mean pairwise
        KL in nats of the ensemble's members other than the source, on images as they are (clean)
        and at the source's ODS inputs (ods, ods_low, ods_high); own: the same with the source
        among them (NaN outside); n (images).
    """
    rows = []
    with open_hdf5(transferred) as file:
        clean, moved = file["clean/logits"][:], file["ods/logits"][:]
    weights = image_weights(len(clean))
    for source, logits in enumerate(moved):
        inside = source < members
        others = [member for member in range(members) if member != source]
        ods = _mean_kl(logits[:, others], weights)
        rows.append(
            {
                "source": source,
                "where": "inside" if inside else "outside",
                "clean": pairwise_kl(clean[:, others]),
                **{f"ods_{key}".replace("_kl", ""): ods[key] for key in ("kl", "low", "high")},
                "own": pairwise_kl(logits[:, :members]) if inside else np.nan,
                "n": len(clean),
            }
        )
    return pd.DataFrame(rows)


def direction_cosines(transferred: str, members: int) -> dict[str, NDArray[np.float32]]:
    """Cosines (N, pairs) between ODS directions: of two ensemble members (`inside`), of a member
    and an external network (`outside`; none if the pool has none), and of each with `random`."""
    with open_hdf5(transferred) as file:
        cosines, noise = file["cosines"][:], file["random_cosines"][:]
    rows, columns = np.triu_indices(cosines.shape[1], 1)
    named = {
        "inside": cosines[:, rows, columns][:, columns < members],
        "outside": cosines[:, rows, columns][:, (rows < members) & (columns >= members)],
        "random": noise,
    }
    return {name: values for name, values in named.items() if values.shape[1]}


def directions(transferred: str, members: int) -> pd.DataFrame:
    """Histograms of `direction_cosines`: name, bin, low, high, count, and mean and n of a name."""
    tables = []
    for name, cosines in direction_cosines(transferred, members).items():
        edges = np.linspace(-1, 1, 81)
        table = _bins(name, edges)
        table["count"] = np.histogram(cosines.clip(-1, 1), edges)[0]
        table["mean"], table["n"] = cosines.mean(), cosines.size
        tables.append(table)
    return pd.concat(tables, ignore_index=True)


def jacobian_means(distances: str, measure: str) -> dict[str, NDArray[np.float64]]:
    """`error` or `cosine` of a method's students, (N, seeds): means over members, per image.

    See `analysis.jacobian_distances`.
    """
    with open_hdf5(distances) as file:
        return {
            method: np.stack(
                [
                    seeds[seed][measure][:].mean(1, dtype=np.float64)
                    for seed in sorted(seeds, key=int)
                ],
                axis=1,
            )
            for method, seeds in file["students"].items()
        }


def jacobians(distances: str, labels: Mapping[str, str]) -> pd.DataFrame:
    """How near students' logit Jacobians are to their teachers', on test images.

    Args:
        distances: the file that rule `distances` makes.
        labels: the system of each method.

    Returns:
        One row per student: system, replicate, error (mean over members and images of
        ‖J_S − J_T‖_F / ‖J_T‖_F), cosine, for each `_low` and `_high`, and n (images).
    """
    measured = {name: jacobian_means(distances, name) for name in ("error", "cosine")}
    rows = []
    for method, label in labels.items():
        for replicate in range(measured["error"][method].shape[1]):
            row: dict[str, Any] = {"system": label, "replicate": replicate}
            for name, means in measured.items():
                values = means[method][:, replicate]
                found = interval(mean_of(values, image_weights(len(values))))
                row |= {name: found.estimate, f"{name}_low": found.low, f"{name}_high": found.high}
            rows.append({**row, "n": len(values)})
    return pd.DataFrame(rows)


def corruptions(ensemble: Sequence[str], students: Students, n_bins: int) -> pd.DataFrame:
    """Metrics of every system on corrupted copies of test images.

    Args:
        ensemble, students: files of rule `shifted_logits`.
        n_bins: of the calibration error.

    Returns:
        One row per system, replicate and corrupted set: system, replicate, kind, severity (0: the
        same images as they are), acc [%], nll, ece, bs, entropy, diversity, n (images).
    """
    rows = []
    for split in splits_of(ensemble[0]):
        group, *rest = split.split("/")
        if group != "corrupted":
            continue
        for system, replicates in _systems(ensemble, students, split, single=True).items():
            for replicate, (logits, labels) in enumerate(replicates):
                probs = ensemble_probs(logits)
                rows.append(
                    {
                        "system": system,
                        "replicate": replicate,
                        "kind": rest[0],
                        "severity": int(rest[1]),
                        "acc": metrics.accuracy(probs, labels),
                        "nll": metrics.nll(probs, labels),
                        "ece": metrics.ece(probs, labels, n_bins),
                        "bs": metrics.brier(probs, labels),
                        "entropy": metrics.entropy(probs),
                        "diversity": pairwise_kl(logits),
                        "n": len(labels),
                    }
                )
    return pd.DataFrame(rows)


UNCERTAINTIES: dict[str, Callable[[NDArray[np.float32]], NDArray[np.float64]]] = {
    "max_probability": lambda logits: _doubt(ensemble_probs(logits)),
    "entropy": lambda logits: metrics.entropy(ensemble_probs(logits), "none"),
    "mutual_information": metrics.mutual_information,
}
"""Scores (N, M, K) → (N,) that should be higher for images from outside the distribution."""


def out_of_distribution(
    ensemble: Sequence[str],
    students: Students,
    shifted_ensemble: Sequence[str],
    shifted_students: Students,
) -> pd.DataFrame:
    """How well uncertainty tells out-of-distribution images from test images.

    Args:
        ensemble, students: see the module.
        shifted_ensemble, shifted_students: their files of rule `shifted_logits`.

    Returns:
        One row per system, replicate and score of `UNCERTAINTIES`: system, replicate, score,
        auroc, aupr, fpr95 (see `metrics`), n_in, n_out (images). Mutual information needs
        members, so single networks have none.
    """
    rows = []
    inside = _systems(ensemble, students, "test", single=True)
    outside = _systems(shifted_ensemble, shifted_students, "out_of_distribution", single=True)
    for system, replicates in inside.items():
        pairs = zip(replicates, outside[system], strict=True)
        for replicate, ((own, _), (other, _)) in enumerate(pairs):
            for name, uncertainty in UNCERTAINTIES.items():
                if name == "mutual_information" and own.shape[1] == 1:
                    continue
                values = uncertainty(own), uncertainty(other)
                rows.append(
                    {
                        "system": system,
                        "replicate": replicate,
                        "score": name,
                        "auroc": metrics.auroc(*values),
                        "aupr": metrics.aupr(*values),
                        "fpr95": metrics.fpr95(*values),
                        "n_in": len(own),
                        "n_out": len(other),
                    }
                )
    return pd.DataFrame(rows)


def learning_curves(teachers: Sequence[str], students: Students) -> pd.DataFrame:
    """The histories of all networks in one table: system, replicate, and a history's columns.

    Args:
        teachers: histories of the pool, the system `teacher`.
        students: histories by label, one per seed.
    """
    tables = []
    for label, group in {"teacher": teachers, **students}.items():
        for replicate, path in enumerate(group):
            tables.append(read_csv(path).assign(system=label, replicate=replicate))
    joined = pd.concat(tables, ignore_index=True)
    who = ["system", "replicate"]
    return joined[who + [column for column in joined if column not in who]]


def by_label(labels: Sequence[str], paths: Sequence[str]) -> dict[str, list[str]]:
    """Files grouped by the label that stands at the same place."""
    groups: dict[str, list[str]] = {}
    for label, path in zip(labels, paths, strict=True):
        groups.setdefault(label, []).append(path)
    return groups


def _bins(name: str, edges: NDArray[np.float64]) -> pd.DataFrame:
    ends = {"low": edges[:-1], "high": edges[1:]}
    return pd.DataFrame({"name": name, "bin": range(len(edges) - 1), **ends})
