"""A result such as a user may add: how sure every system is of its test images."""

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from ensdistill.drawing import WIDTH, styled
from ensdistill.systems import read_systems

TITLE = "Mean confidence"
READS = {"ensemble": "logits/{ensemble}.h5", "students": "logits/{students}.h5"}


def table(ensemble, students):
    """One row per system: name, confidence (its mean over images and replicates)."""
    rows = [
        {
            "name": name,
            "confidence": np.mean([it.per_image(confidence).mean() for it, _ in replicates]),
        }
        for name, replicates in read_systems(ensemble, students, "test")
    ]
    return pd.DataFrame(rows)


def confidence(prediction):
    """Of each image of a block: not all of their probabilities need fit in memory."""
    return prediction.probs().max(1)


@styled
def draw(frame):
    """A bar per system."""
    figure = Figure(figsize=(WIDTH, 3))
    figure.subplots().barh(frame["name"], frame["confidence"])
    return figure
