"""Training images, perturbed images and their differences."""

import json

import numpy as np
from matplotlib.figure import Figure

from ensdistill.drawing import (
    GREY,
    PALE,
    WIDTH,
    add_note,
    styled,
    two_digits,
)
from ensdistill.files import open_hdf5
from ensdistill.metrics import pairwise_kl
from ensdistill.systems import PERTURBATIONS

TITLE = "Perturbed images"
DRAWN_FROM = ["logits/perturbed.h5"]

EXAMPLES = 4
"""Rows of the sheet."""
WIDEST, TALLEST = 0.4, 2.5
"""Ratios of height to width between which an image is shown as it is; beyond, it is stretched: the
sheet would be metres high, or the image a line."""


@styled
def draw(perturbed: str) -> Figure:
    """Training images, clean and perturbed (pixel range [0, 1]), and the differences, magnified.

    Under each image stands the teachers' mean pairwise KL on it (nats).
    """
    with open_hdf5(perturbed) as file:
        names, eta = json.loads(file.attrs["sets"]), float(file.attrs["eta"])
        images = {name: file[f"{name}/examples"][:EXAMPLES] for name in names}
        kl = {name: pairwise_kl(file[f"{name}/logits"][:EXAMPLES], "none") for name in names}
    clean, *perturbed = names
    changes = {name: images[name] - images[clean] for name in perturbed}
    largest = np.quantile(np.abs(list(changes.values())), 0.99)
    factor = float(f"{0.5 / largest if largest > 0 else 1:.0e}")
    rows, channels, height, width = images[clean].shape
    ratio = min(max(height / width, WIDEST), TALLEST)
    cell = min(WIDTH / (1 + 2 * len(perturbed)), 1.2) * ratio
    figure = Figure(
        figsize=(WIDTH, rows * (cell + 0.15) + (0.8 if channels == 1 else 0.4)), layout="compressed"
    )
    axes = figure.subplots(rows, 1 + 2 * len(perturbed), squeeze=False)
    frame = {"cmap": "gray", "vmin": 0, "vmax": 1, "interpolation": "nearest"}
    frame["aspect"] = ratio / (height / width)
    signed = frame | {"cmap": "RdBu_r", "vmin": -0.5 / factor, "vmax": 0.5 / factor}
    for (row, column), axis in np.ndenumerate(axes):
        name = names[(column + 1) // 2]
        title = PERTURBATIONS.get(name, name)
        if column and column % 2 == 0:
            title = f"difference × {factor:g}"
            change = changes[name][row]
            shown = change if channels == 1 else np.clip(0.5 + factor * change, 0, 1)
            picture = axis.imshow(shown.transpose(1, 2, 0), **signed)
        else:
            axis.imshow(images[name][row].transpose(1, 2, 0), **frame)
            axis.set_xlabel(f"KL {two_digits(kl[name][row])}", color=GREY)
        axis.set(xticks=(), yticks=())
        axis.spines[:].set(visible=True, color=PALE)
        if row == 0:
            axis.set_title(title, loc="center")
    note = f"η = {eta * 255:.3g}/255. KL: between the teachers, mean pairwise, in nats."
    if channels == 1:
        place = {"location": "bottom", "aspect": 50, "shrink": 0.5, "extend": "both"}
        figure.colorbar(picture, ax=axes, label="Difference (pixel range 0 to 1)", **place)
    else:
        note += f" Differences are shown as 0.5 + {factor:g} × difference: grey is no change."
    if ratio != height / width:
        note += f" Images of {height}×{width} pixels are shown stretched."
    add_note(figure, note)
    return figure
