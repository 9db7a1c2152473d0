"""Training images, perturbed images and their differences."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ensdistill.drawing import (
    GREY,
    PALE,
    WIDTH,
    add_note,
    styled,
    two_digits,
    wrapped,
)
from ensdistill.hdf5 import open_hdf5
from ensdistill.metrics import pairwise_kl

TITLE = "Perturbed images"
DRAWN_FROM = ["logits/perturbed.h5"]

EXAMPLES = 4
"""How many images the sheet shows."""
WIDEST, TALLEST = 0.4, 2.5
"""Ratios of height to width between which an image is shown as it is; beyond, it is stretched: the
sheet would be metres high, or the image a line."""
MOST_COLUMNS = 7
"""With more, the sheet is turned: a row has all images under one perturbation."""


@styled
def draw(perturbed: str) -> Figure:
    """Training images, clean and perturbed (pixel range [0, 1]), and the differences, magnified.

    Under each image stands the teachers' mean pairwise KL on it (nats). Differences are shown of
    perturbations that have a size η; those of others, such as mixtures, would be whole images.
    """
    with open_hdf5(perturbed) as file:
        titles, eta = json.loads(file.attrs["titles"]), float(file.attrs["eta"])
        options = json.loads(file.attrs["perturbations"])
        images = {name: file[f"{name}/examples"][:EXAMPLES] for name in titles}
        kl = {name: pairwise_kl(file[f"{name}/logits"][:EXAMPLES], "none") for name in titles}
    clean = images[next(iter(titles))]
    changes = {name: images[name] - clean for name in titles if "eta" in options.get(name, {})}
    largest = np.quantile(np.abs(list(changes.values())), 0.99)
    factor = float(f"{0.5 / largest if largest > 0 else 1:.0e}")
    count, channels, height, width = clean.shape
    ratio = min(max(height / width, WIDEST), TALLEST)
    parts = {}
    for name, title in titles.items():
        parts[name, False] = title
        if name in changes:
            parts[name, True] = f"difference × {factor:g}"
    figure, panels = _sheet(parts, count, ratio, 0.8 if channels == 1 else 0.4)
    frame: dict[str, Any] = {"cmap": "gray", "vmin": 0, "vmax": 1, "interpolation": "nearest"}
    frame["aspect"] = ratio / (height / width)
    signed = frame | {"cmap": "RdBu_r", "vmin": -0.5 / factor, "vmax": 0.5 / factor}
    for (name, changed), column in panels.items():
        shown = changes[name] if changed else images[name]
        for axis, image, value in zip(column, shown, kl[name], strict=False):
            if changed:
                image = image if channels == 1 else np.clip(0.5 + factor * image, 0, 1)
                picture = axis.imshow(image.transpose(1, 2, 0), **signed)
            else:
                axis.imshow(image.transpose(1, 2, 0), **frame)
                axis.set_xlabel(f"KL {two_digits(value)}", color=GREY)
            axis.set_axis_on()
            axis.set(xticks=(), yticks=())
            axis.spines[:].set(visible=True, color=PALE)
    note = f"η = {eta * 255:.3g}/255. KL: between the teachers, mean pairwise, in nats."
    if channels == 1:
        place: Any = {"location": "bottom", "aspect": 50, "shrink": 0.5, "extend": "both"}
        figure.colorbar(picture, ax=figure.axes, label="Difference (pixel range 0 to 1)", **place)
    else:
        note += f" Differences are shown as 0.5 + {factor:g} × difference: grey is no change."
    if len(parts) > MOST_COLUMNS:
        note += " Right of an image: its difference."
    if ratio != height / width:
        note += f" Images of {height}×{width} pixels are shown stretched."
    add_note(figure, note)
    return figure


def _sheet(
    parts: Mapping[tuple[str, bool], str], count: int, ratio: float, more: float
) -> tuple[Figure, dict[tuple[str, bool], Sequence[Axes]]]:
    """A figure, and its panels, one per image, by perturbation and whether they show differences.

    Args:
        parts: titles by perturbation and whether they show differences.
        count: of images.
        ratio: of their height to their width.
        more: inches of height beside the panels.
    """
    names = list(dict.fromkeys(name for name, _ in parts))
    if len(parts) <= MOST_COLUMNS:
        rows, columns = count, len(parts)
        cell = min(WIDTH / columns, 1.2) * ratio
    else:
        rows, columns = len(names), 2 * count
        cell = min((WIDTH - 0.8) / columns * ratio, 11 / rows - 0.15)
    figure = Figure(figsize=(WIDTH, rows * (cell + 0.15) + more), layout="compressed")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axis in grid.flat:
        axis.set_axis_off()  # until it has an image
    if len(parts) <= MOST_COLUMNS:
        panels = dict(zip(parts, grid.T, strict=True))
        for part, title in parts.items():
            panels[part][0].set_title(title, loc="center")
    else:
        panels = {part: grid[names.index(part[0]), part[1] :: 2] for part in parts}
        for name in names:
            label = {"rotation": 0, "ha": "right", "va": "center"}
            panels[name, False][0].set_ylabel(wrapped(parts[name, False], 14), **label)
    return figure, panels
