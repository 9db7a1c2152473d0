"""What a card tells of a student, read from its header and from the files of its study.

Nothing is computed here but means over rows. What is not there is None.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ensdistill.hdf5 import open_hdf5
from ensdistill.images import read_description
from ensdistill.markup import counted, number
from ensdistill.page.columns import read_columns
from ensdistill.page.making import benchmark, duration
from ensdistill.verdict_pages import with_interval

if TYPE_CHECKING:
    import pandas as pd

SPLITS = {"train": "train", "val": "validate", "held_out": "are held out", "test": "test"}
AUGMENTATION = ("crop_padding", "flip", "random_resized_crop", "policy")
"""What a header has of it."""
SHOWN = (1, 3, 5)
"""Severities of corruption that are told of."""
COSTS: dict[str, tuple[str, Callable[["pd.Series"], str]]] = {
    "parameters": ("Parameters", lambda row: f"{row['parameters']:,.0f}"),
    "bytes": ("Bytes", lambda row: f"{row['bytes']:,.0f}"),
    "macs": ("Multiply–adds", lambda row: f"{row['macs']:,.0f}"),
    "ms_1": ("ms, batch of 1", lambda row: _milliseconds(row, "ms_1")),
    "ms_128": ("ms, batch of 128", lambda row: _milliseconds(row, "ms_128")),
}
"""Columns of metrics/costs.csv that a card has: heads, and what stands under them."""
SCORES = {"entropy": "entropy", "mutual_information": "mutual information"}
"""Uncertainties that `ensdistill predict` writes, of those in out_of_distribution.csv."""


@dataclass(frozen=True)
class Data:
    """The images of a study."""

    source: str
    shape: str
    """As "grey images of 8 × 8 pixels"."""
    counts: dict[str, int]
    """Images by what they are for."""
    smallest: int
    """Test images of the class that has fewest."""
    sha256: str | None
    """Of what was downloaded or read."""
    is_chosen: bool
    """Whether the test images are some of those that there are."""
    interpolation: str | None
    """By which pictures of other sizes are resized, if they were."""


def data_of(images: Path) -> Data:
    """What images.h5 says of itself.

    Where own images were on the disk of whoever ran the study is left out.
    """
    known = read_description(images)
    channels, height, width = known["shape"]
    with open_hdf5(images) as file:
        said, sha256 = json.loads(file.attrs["images"]), file.attrs.get("sha256")
        labels = {split: file[f"{split}/labels"][:] for split in SPLITS if split in file}
    return Data(
        source=said["source"],
        shape=f"{'grey' if channels == 1 else 'colour'} images of {height} × {width} pixels",
        counts={what: len(labels[split]) for split, what in SPLITS.items() if split in labels},
        smallest=int(np.bincount(labels["test"], minlength=len(known["classes"])).min()),
        sha256=sha256 if isinstance(sha256, str) else None,
        is_chosen=said["test"] is not None,
        interpolation=known.get("evaluation", {}).get("interpolation"),
    )


def training_of(header: Mapping[str, Any], time: Path) -> dict[str, str]:
    """How a student was trained, by term.

    Args:
        header: of its weights.
        time: Snakemake's benchmark of its training, if that is there.
    """
    spec, facts = header["spec"], {}
    facts["Network"] = spec["architecture"]["name"]
    if "student" in header:
        facts["Student"] = _with_options(header["student"])
        facts["Members"] = f"{spec['members']}"
    if "adopted" in header:
        return facts | {"Weights": f"trained elsewhere, SHA-256 {header['adopted']['sha256']}"}
    recipe = dict(header["recipe"])
    facts["Objective"] = _with_options(header["objective"])
    if header["teachers"]:
        digests = ", ".join(it[:12] for it in header["teachers"])
        facts["Teachers"] = f"{counted(len(header['teachers']), 'network')} ({digests})"
        facts["Teachers are asked at"] = _with_options(header["perturbation"])
    facts["Epochs"] = f"{recipe.pop('epochs'):,}"
    facts["Recipe"] = _options(recipe)
    facts["Augmentation"] = _options({key: header[key] for key in AUGMENTATION if key in header})
    facts["Seed"] = str(header["seed"])
    facts["Arithmetic"] = f"{header['precision_reason']}, on {header['device']}"
    facts["Software"] = f"ensdistill {header['ensdistill']}, PyTorch {header['torch']}"
    if time.exists():
        row = benchmark(time)
        facts["Time"] = duration(float(row["s"]))
    return facts


def _with_options(part: Mapping[str, Any]) -> str:
    options = {key: it for key, it in part.items() if key != "name"}
    return f"{part['name']} ({_options(options)})" if options else part["name"]


def _options(options: Mapping[str, Any]) -> str:
    shown = {key: f"{it:.6g}" if isinstance(it, float) else str(it) for key, it in options.items()}
    return ", ".join(f"{key.replace('_', ' ')} {it}" for key, it in shown.items() if it != "None")


def costs_of(folder: Path, systems: Mapping[str, str]) -> "tuple[list[list[str]], str] | None":
    """A table of costs, and on which processor.

    Args:
        folder: of the study.
        systems: how the card calls them, by their names in metrics/costs.csv.

    Returns:
        The heads and a line for each system that is there; None if the student, the first, is not.
    """
    needed = ["system", "n", "processor", "threads", *COSTS]
    frame = read_columns(folder / "metrics/costs.csv", needed)
    rows = {} if frame is None else {row["system"]: row for _, row in frame.iterrows()}
    if next(iter(systems)) not in rows:
        return None
    table = [["System", *(head for head, _ in COSTS.values())]]
    for system, name in systems.items():
        row = rows.get(system)
        if row is not None:
            table.append([name, *(show(row) for _, show in COSTS.values())])
    row = rows[next(iter(systems))]
    return table, f"{row['processor']}; threads: {row['threads']}; n = {row['n']} timings"


def _milliseconds(row: "pd.Series", key: str) -> str:
    """The median and the quartiles."""
    return f"{row[key]:.3g} ({row[f'{key}_low']:.3g} to {row[f'{key}_high']:.3g})"


def shift_of(folder: Path, system: str, replicate: int) -> "list[tuple[int, Any]] | None":
    """Means over kinds of corruption, by severity; 0 are the same images as they are."""
    frame = _own(folder / "metrics/corruptions.csv", system, replicate, ["severity", "kind", "n"])
    if frame is None:
        return None
    means = frame.groupby("severity")[["acc", "nll", "ece", "n"]].mean()
    means["kinds"] = frame.groupby("severity")["kind"].nunique()
    return [(severity, means.loc[severity]) for severity in (0, *SHOWN) if severity in means.index]


def out_of_distribution_of(folder: Path, system: str, replicate: int) -> list[dict] | None:
    """How well its uncertainty tells images of other things: a row per set and score."""
    needed = ["score", "set", "auroc", "aupr", "fpr95", "n_in", "n_out"]
    path = folder / "metrics/out_of_distribution.csv"
    frame = _own(path, system, replicate, needed)
    if frame is None:
        return None
    frame = frame[frame["score"].isin([*SCORES])].assign(score=lambda it: it["score"].map(SCORES))
    return frame.sort_values("set", kind="stable").to_dict("records")


def _own(path: Path, system: str, replicate: int, columns: list[str]) -> "pd.DataFrame | None":
    """The rows of one student; None if there are none."""
    frame = read_columns(path, ["system", "replicate", *columns])
    if frame is None:
        return None
    rows = frame[(frame["system"] == system) & (frame["replicate"].astype(str) == str(replicate))]
    return rows if len(rows) else None


def spread_of(scores: "pd.DataFrame", system: str) -> dict[str, str] | None:
    """What students of other seeds score, by metric; None if there are none."""
    rows = scores[scores["system"] == system]
    if len(rows) < 2:
        return None
    digits = {"acc": 2, "nll": 3, "ece": 3}
    return {
        key: f"{number(rows[key].mean(), it)} ± {number(rows[key].std(), it)}"
        for key, it in digits.items()
    } | {"n": str(len(rows))}


def text_of(interval: Any) -> str:
    """An estimate with its interval."""
    return with_interval(interval.estimate, interval.low, interval.high)
