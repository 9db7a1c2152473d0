"""How near students' logit Jacobians are to their teachers'."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from numpy.typing import NDArray

from ensdistill.bootstrap import image_weights, interval, mean_of
from ensdistill.drawing import (
    add_note,
    by_system,
    count_of,
    panels_by_system,
    replicates_of,
    styled,
    styles_of,
)
from ensdistill.hdf5 import open_hdf5

TITLE = "Jacobians of students and teachers"
READS = {"distances": "logits/distances.h5"}
SETTINGS = ["labels"]


def table(distances: str, labels: Mapping[str, str]) -> pd.DataFrame:
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


@styled
def draw(frame: pd.DataFrame) -> Figure:
    """How far the students' logit Jacobians are from their teachers', and in which direction.

    Distilling at perturbed inputs should make them agree. Nam et al. 2021, section 3.2.
    """
    systems = by_system(frame, "system")
    styles = styles_of(systems)
    titles = {"error": "Relative error, lower is better", "cosine": "Cosine, higher is better"}
    figure, axes = panels_by_system(systems, titles.values(), 0.3)
    for axis, key in zip(axes, titles, strict=True):
        for row, (name, runs) in enumerate(systems.items()):
            style, several = styles[name], len(runs) > 1
            places = row + several * np.linspace(0.06, 0.34, len(runs))
            small = {"color": style["color"], "lw": 0.8}
            axis.hlines(places, runs[f"{key}_low"], runs[f"{key}_high"], **small)
            axis.plot(runs[key], places, **small | {"ls": ""}, marker=".", ms=4)
            axis.plot(runs[key].mean(), row - 0.17 * several, **style | {"ls": ""}, ms=5)
    images = count_of(frame["n"], "test image")
    add_note(
        figure,
        f"Large: mean over n = {replicates_of(frame)}. Small: each, "
        f"with its 95 % bootstrap interval over n = {images}.",
    )
    return figure
