"""Systems and their replicates, as the results compare them.

A *system* is a row of the results table: `DE-m`, a deep ensemble of m networks, or a method's
label. A *replicate* is one of what it is averaged over: a student seed, or a subset of the pool of
teachers. The *ensemble* are those teachers of the pool that teach.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations

import numpy as np

from ensdistill.predictions import Labels, Prediction, read_ensemble, read_prediction

Students = Mapping[str, Sequence[str]]
"""Files of students by their method's label, one per seed."""

MOST_SUBSETS = 64
"""Of the pool, per ensemble size."""


def by_label(labels: Sequence[str], paths: Sequence[str]) -> dict[str, list[str]]:
    """Files grouped by the label that stands at the same place.

    Labels may go on: of systems that stand last there may be no such files.
    """
    if len(paths) > len(labels):
        raise ValueError(f"{len(paths)} files have {len(labels)} labels")
    groups: dict[str, list[str]] = {}
    for label, path in zip(labels, paths, strict=False):
        groups.setdefault(label, []).append(path)
    return groups


def subsets(pool: int, size: int) -> list[tuple[int, ...]]:
    """Subsets of the pool of one size: all when they are at most 64, else 64 drawn by seed 0."""
    if math.comb(pool, size) <= MOST_SUBSETS:
        return list(combinations(range(pool), size))
    rng, drawn = np.random.default_rng(0), set[tuple[int, ...]]()
    while len(drawn) < MOST_SUBSETS:
        drawn.add(tuple(sorted(rng.choice(pool, size, replace=False).tolist())))
    return sorted(drawn)


def read_systems(
    ensemble: Sequence[str], students: Students, split: str, single: bool = False
) -> Iterator[tuple[str, Iterator[tuple[Prediction, Labels]]]]:
    """Every system's name and its replicates, predictions with labels: the ensemble, then students.

    Each replicate is read when it is asked for, so that not all need be in memory.

    Args:
        ensemble, students: logits files.
        split: of these files.
        single: with DE-1 before, whose replicates are the members of the ensemble.
    """
    if single:
        yield "DE-1", (read_prediction(path, split) for path in ensemble)
    yield f"DE-{len(ensemble)}", (read_ensemble(paths, split) for paths in [ensemble])
    for label, paths in students.items():
        yield label, (read_prediction(path, split) for path in paths)
