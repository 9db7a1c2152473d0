"""Diversity of the ensemble and of the students by confidence, on test images."""

from collections.abc import Sequence

import pandas as pd
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from ensdistill.drawing import SHADES, add_note, are_many, by_system, count_of, rows_of_bins, styled
from ensdistill.reports.diversity_teachers import diversity_by_confidence, draw_bins
from ensdistill.systems import Students, read_systems

TITLE = "Diversity of the students"
READS = {"ensemble": "logits/{ensemble}.h5", "students": "logits/{students}.h5"}
SETTINGS = ["n_bins"]


def table(ensemble: Sequence[str], students: Students, n_bins: int) -> pd.DataFrame:
    """`diversity_by_confidence` of the teachers and of every method's students, on test images.

    Systems without a diversity, such as most single networks, are left out.
    """
    tables = []
    for name, replicates in read_systems(ensemble, students, "test"):
        predictions = [prediction for prediction, _ in replicates]
        if predictions[0].part(slice(0, 1)).diversity() is not None:
            tables.append(diversity_by_confidence(name, predictions, n_bins))
    return pd.concat(tables, ignore_index=True)


@styled
def draw(frame: pd.DataFrame) -> Figure:
    """Members' mean pairwise KL (nats) against confidence on test, for teachers and students.

    Images are pooled over student seeds. Nam et al. 2021, Fig. 3b.
    """
    if not are_many(frame["name"]):
        return draw_bins(frame, "name")
    middles = frame.assign(middle=(frame["low"] + frame["high"]) / 2)
    colours = {"norm": Normalize(0, frame["kl"].max() or 1.0), "cmap": SHADES}
    figure = rows_of_bins(
        by_system(middles, "name"),
        ("Pairwise KL (nats), mean of a bin", "Overall mean (nats)"),
        "middle",
        "kl",
        "mean_kl",
        **colours,
    )
    add_note(figure, f"Students: pooled over {count_of([frame['n'].max()], 'seed')}.")
    return figure
