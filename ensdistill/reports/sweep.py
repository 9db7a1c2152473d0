"""Diversity of the teachers on train by the size η of the perturbation."""

import json
from collections.abc import Sequence

import pandas as pd
from matplotlib.figure import Figure

from ensdistill.bootstrap import Weights, image_weights, interval, mean_of
from ensdistill.drawing import (
    INK,
    SPLITS,
    WIDTH,
    add_legend,
    add_note,
    count_of,
    plain_numbers,
    styled,
    styles_of_perturbations,
    two_digits,
)
from ensdistill.hdf5 import open_hdf5
from ensdistill.metrics import pairwise_kl
from ensdistill.predictions import Array, Prediction, read_ensemble, read_mixture, read_mixtures

TITLE = "Diversity by size of the perturbation"
READS = {
    "swept": "logits/swept.h5",
    "perturbed": "logits/perturbed.h5",
    "ensemble": "logits/{ensemble}.h5",
}


def table(swept: str, perturbed: str, ensemble: Sequence[str]) -> pd.DataFrame:
    """The teachers' diversity on train against the size η of each perturbation.

    Args:
        swept: the file that rule `swept` makes.
        perturbed: the file that rule `perturbed` makes, for the whole of train as it is.
        ensemble: logits files of the teachers that teach.

    Returns:
        One row per perturbation and η: perturbation, title (what the figure calls it), eta (pixel
        range), kl (nats), low, high, n (images), and in every row train_kl, test_kl and study_eta.
    """
    with open_hdf5(perturbed) as file:
        study_eta = float(file.attrs["eta"])
    train, rows = divergence(read_mixture(perturbed, "clean")).mean(), []
    with open_hdf5(swept) as file:
        etas = json.loads(file.attrs["etas"])
        titles = json.loads(file.attrs["titles"])
    for name, title in titles.items():
        found = [divergence(it) for it in read_mixtures(swept, name)]
        weights = image_weights(len(found[0]))
        for eta, values in zip(etas, found, strict=True):
            known = {"perturbation": name, "title": title, "eta": eta}
            rows.append({**known, **mean_kl(values, weights)})
    test = read_ensemble(ensemble, "test")[0].diversity()
    assert test is not None, "an ensemble has members"
    return pd.DataFrame(rows).assign(train_kl=train, test_kl=test.mean(), study_eta=study_eta)


def divergence(prediction: Prediction, members: Sequence[int] | slice = slice(None)) -> Array:
    """Mean pairwise KL between some of the members, (N,); 0 of a single one."""
    return prediction.per_image(lambda it: pairwise_kl(it.logits[:, members], "none"))


def mean_kl(values: Array, weights: Weights) -> dict[str, float]:
    """Of a divergence (N,), the mean over images: kl, low, high (95 % interval), n."""
    found = interval(mean_of(values, weights))
    return {"kl": found.estimate, "low": found.low, "high": found.high, "n": len(values)}


@styled
def draw(frame: pd.DataFrame) -> Figure:
    """Teachers' mean pairwise KL (nats) on training images by the size η of their perturbation.

    With 95 % bootstrap intervals over images (bands), beside that on clean images.
    """
    study = frame.iloc[0]
    figure = Figure(figsize=(WIDTH, 3), layout="constrained")
    axis = figure.subplots()
    axis.set(xscale="log", yscale="log", ylabel="Pairwise KL of the teachers (nats)")
    axis.set_xlabel("Size η of the perturbation (1/255 of the pixel range)")
    for name, style in styles_of_perturbations(frame["perturbation"]).items():
        curve = frame[frame["perturbation"] == name]
        eta = 255 * curve["eta"]
        axis.fill_between(eta, curve["low"], curve["high"], color=style["color"], alpha=0.2, lw=0)
        axis.plot(eta, curve["kl"], ms=4, label=curve["title"].iloc[0], **style)
    lower, upper = sorted(SPLITS, key=lambda split: study[f"{split}_kl"])
    for split, side in ((lower, "top"), (upper, "bottom")):  # apart, however near they are
        kl = study[f"{split}_kl"]
        axis.axhline(kl, color=SPLITS[split], ls="--", lw=0.8, zorder=1)
        text, right = f"{split}, clean: {two_digits(kl)}", ("axes fraction", "data")
        axis.annotate(text, (1, kl), (3, 0), right, "offset points", va=side)
    if study["study_eta"] > 0:
        eta, top = 255 * study["study_eta"], ("data", "axes fraction")
        axis.axvline(eta, color=INK, ls=":", lw=0.8, zorder=1)
        text = f"the study: η = {eta:.3g}/255"
        axis.annotate(text, (eta, 1), (0, 3), top, "offset points", ha="center")
    plain_numbers(axis.yaxis)
    sizes = 255 * frame["eta"].unique()
    axis.set_xticks(sizes, [f"{eta:.4g}" for eta in sizes])
    axis.set_xticks([], minor=True)
    add_legend(figure, axis.get_legend_handles_labels()[0])
    images = count_of(frame["n"], "training image")
    bands = f"Bands: 95 % bootstrap intervals of the mean over n = {images}."
    add_note(figure, f"{bands} Dashed: means over all of train and test.")
    return figure
