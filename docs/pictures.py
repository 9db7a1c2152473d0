"""Draws the pictures of docs/methods/ by a finished `digits_bench` study.

    python docs/pictures.py results/digits_bench

What students are is a schematic (SVG); what their scores are, and where the places to ask move an
image, is drawn from the study's tables, images and weights (PNG).
"""

import sys
from html import escape
from itertools import pairwise
from pathlib import Path

import h5py
import matplotlib.pyplot as plt
import pandas as pd
import torch

from ensdistill.metrics import pairwise_kl
from ensdistill.perturbations import PERTURBATIONS
from ensdistill.students import Step, teacher_logits
from ensdistill.weights import load_student

FOLDER = Path(__file__).parent / "methods" / "pictures"
M, ETA, TEMPERATURE = 4, 16 / 255, 1.0
"""Of the study `digits_bench`."""
SEED = 4
"""Of random numbers by which mixup mixes visibly."""

# --- what students are -----------------------------------------------------------------------

FOUR = range(1, M + 1)
SCHEMATICS = {
    "single": [["image x"], ["one network"], ["softmax"]],
    "batch_ensemble": [
        ["image x"],
        [f"W ∘ s{j} r{j}ᵀ" for j in FOUR],
        [f"softmax {j}" for j in FOUR],
        ["mean"],
    ],
    "latent_batch_ensemble": [
        [f"W ∘ s{j} r{j}ᵀ" for j in FOUR],
        ["mean factors s̄, r̄"],
        ["one network W ∘ s̄ r̄ᵀ"],
        ["softmax"],
    ],
    "hydra": [
        ["image x"],
        ["shared trunk"],
        [f"head {j}" for j in FOUR],
        [f"softmax {j}" for j in FOUR],
        ["mean"],
    ],
    "mimo": [
        ["image x"] * M,
        ["one network"],
        [f"softmax {j}" for j in FOUR],
        ["mean"],
    ],
    "packed": [
        ["image x"],
        [f"{j}: half the width" for j in FOUR],
        [f"softmax {j}" for j in FOUR],
        ["mean"],
    ],
    "proxy_dirichlet": [["image x"], ["one network"], ["α = exp z + 1"], ["Dirichlet(α)"]],
    "dirichlet": [["image x"], ["one network"], ["α = exp z"], ["Dirichlet(α)"]],
    "gaussian_logits": [
        ["image x"],
        ["one network"],
        ["mean μ(x)", "loadings φ(x)"],
        [*(f"μ + L Z{s} φ" for s in "₁₂₃"), "…"],
        ["mean softmax"],
    ],
    "flow_matching": [
        ["image x"],
        ["backbone, frozen"],
        ["velocity v, 13 calls"],
        [*(f"sample {s} of z" for s in "123"), "…"],
        ["mean softmax"],
    ],
}
WIDTH, HEIGHT, GAP, STEP = 140, 26, 34, 34


def schematic(columns: list[list[str]]) -> str:
    """Boxes by column, with arrows from each column to the next."""
    tallest = max(map(len, columns)) * STEP
    places, shapes = [], []
    for number, column in enumerate(columns):
        x, first = number * (WIDTH + GAP) + 2, (tallest - len(column) * STEP) / 2
        places.append([(x, first + row * STEP + STEP / 2) for row in range(len(column))])
        for (left, y), text in zip(places[-1], column, strict=True):
            shapes.append(
                f'<rect x="{left}" y="{y - HEIGHT / 2}" width="{WIDTH}" height="{HEIGHT}" rx="5"/>'
                f'<text x="{left + WIDTH / 2}" y="{y + 4}">{escape(text)}</text>'
            )
    for one, other in pairwise(places):
        pairs = (
            zip(one, other, strict=True)
            if len(one) == len(other)
            else ((a, b) for a in one for b in other)
        )
        for (x, y), (to, down) in pairs:
            shapes.append(f'<path d="M{x + WIDTH} {y} L{to - 2} {down}"/>')
    width = len(columns) * (WIDTH + GAP) - GAP + 4
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {tallest}" '
        f'width="{width}" height="{tallest}"><defs><marker id="a" viewBox="0 0 6 6" refX="6" '
        'refY="3" markerWidth="6" markerHeight="6" orient="auto"><path d="M0 0 6 3 0 6z" '
        'fill="#556" stroke="none"/></marker></defs><style>rect{fill:#e8f3f6;stroke:#0b4f5f}'
        "text{font:12px sans-serif;text-anchor:middle;fill:#123}"
        "path{stroke:#556;fill:none;marker-end:url(#a)}marker path{marker-end:none}</style>"
        + "".join(shapes)
        + "</svg>\n"
    )


# --- what their scores are -------------------------------------------------------------------

PLACES = {
    "clean": "",
    "Gaussian": "+Gaussian",
    "ODS": "+ODS",
    "ConfODS": "+ConfODS",
    "ODS-each": "+ODS-each",
    "TDiv–SDiv": "+TDiv–SDiv",
    "mixup": "+mixup",
    "held-out": "+held-out",
}
FAMILIES = {
    "single": "KD-single",
    "batch_ensemble": "KD",
    "latent_batch_ensemble": "LatentBE",
    "hydra": "Hydra",
    "proxy_dirichlet": "Proxy-EnD²",
    "dirichlet": "EnD²",
    "gaussian_logits": "DLF",
    "flow_matching": "EDFM",
}


def scores(table: pd.DataFrame, family: str) -> plt.Figure:
    """NLL of a family at each place, beside the deep ensembles."""
    figure, axes = plt.subplots(figsize=(7, 2.4), layout="constrained")
    rows = {place: family + end for place, end in PLACES.items() if family + end in table.index}
    means = [table.nll[label] for label in rows.values()]
    axes.errorbar(
        [*rows],
        means,
        [table.nll_std[it] for it in rows.values()],
        fmt="o",
        color="#c96a00",
        capsize=3,
    )
    for label, style in (("DE-1", ":"), ("DE-4", "--")):
        axes.axhline(table.nll[label], color="#0b4f5f", linestyle=style, label=label)
    axes.set_xlim(-0.6, len(PLACES) - 0.4)
    axes.set_ylabel("NLL [nats], test")
    axes.legend(loc="upper right", fontsize=8)
    axes.tick_params(labelsize=8)
    return figure


# --- where the places move an image ----------------------------------------------------------


def places(study: Path) -> dict[str, plt.Figure]:
    """An image, where it is moved to, and what the four teachers say there."""
    weights = "students/batch_ensemble_none/0/weights.safetensors"
    student = load_student(study / weights).train()
    teachers = [
        load_student(study / f"teachers/{j}/weights.safetensors").network.eval() for j in range(M)
    ]
    with h5py.File(study / "images.h5") as file:
        x = torch.from_numpy(file["train/images"][:]).float() / 255
        held_out = torch.from_numpy(file["held_out/images"][:]).float() / 255
    found = {}
    for name, place in PERTURBATIONS.items():
        known = {"eta": ETA, "temperature": TEMPERATURE, "sdiv": True, "beta": 0.4}
        taken = place.__kwdefaults__ or {}
        wanted = place.__code__.co_varnames[1 : 1 + place.__code__.co_kwonlyargcount]
        options = {key: known[key] for key in wanted} | taken
        generators = [torch.Generator().manual_seed(SEED) for _ in range(2)]
        step = Step(student, teachers, x, None, 0.0, *generators, held_out)
        found[name] = picture(name, teachers, x, place(step, **options))
    return found


def picture(name: str, teachers: list, x: torch.Tensor, moved: torch.Tensor) -> plt.Figure:
    """The image at which the teachers differ by more than at nine in ten; their probabilities."""
    before, after = (teacher_logits(teachers, it).transpose(0, 1).numpy() for it in (x, moved))
    clean, there = (pairwise_kl(it, "none") for it in (before, after))
    shown = int(there.argsort()[int(0.9 * len(there))])
    each = moved[:, shown] if moved.ndim == 5 else moved[None, shown]
    figure, axes = plt.subplots(
        1,
        3 + len(each),
        figsize=(3 + 1.3 * (2 + len(each)), 2.1),
        layout="constrained",
        width_ratios=[1, *[1] * len(each), 1.6, 1.6],
    )
    for at, image in zip(axes, [x[shown], *each], strict=False):
        at.imshow(image[0], cmap="gray", vmin=0, vmax=1)
        at.axis("off")
    axes[0].set_title("a training image" if name == "held_out" else "image x", fontsize=8)
    for at, number in zip(axes[1:-2], FOUR, strict=False):
        title = "a held-out image" if name == "held_out" else "asked at x̃"
        at.set_title(f"{title}{number if len(each) > 1 else ''}", fontsize=8)
    for at, logits, kl, where in zip(
        axes[-2:], (before, after), (clean, there), ("x", "x̃"), strict=True
    ):
        probs = torch.from_numpy(logits[shown]).softmax(-1)
        at.imshow(probs, cmap="Blues", vmin=0, vmax=1, aspect="auto")
        at.set_title(
            f"teachers at {where}: KL {kl[shown]:.3f}\nmean of all: {kl.mean():.3f}", fontsize=8
        )
        at.set_xticks(range(10))
        at.set_yticks(range(M), [f"{j}" for j in FOUR])
        at.tick_params(labelsize=7)
    return figure


def main(study: Path) -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, columns in SCHEMATICS.items():
        (FOLDER / f"{name}.svg").write_text(schematic(columns), encoding="utf-8")
    table = pd.read_csv(study / "tables/results.csv", index_col="system")
    drawn = {f"{name}_nll": scores(table, family) for name, family in FAMILIES.items()}
    for name, figure in {**drawn, **places(study)}.items():
        figure.savefig(FOLDER / f"{name}.png", dpi=110, metadata={"Software": None})
        plt.close(figure)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
