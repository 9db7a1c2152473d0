"""A model card of a student, and the folder that the Hugging Face Hub takes as it is.

The card is README.md with metadata in front (YAML), as the Hub has it. Every number is read from
the study's files or computed from its stored logits; what is not there is left out, and the card
says so. The same files give the same bytes. Its words stand in README.md.jinja.
"""

import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ensdistill import InputError
from ensdistill.card.citations import citations
from ensdistill.card.facts import (
    costs_of,
    data_of,
    out_of_distribution_of,
    shift_of,
    spread_of,
    text_of,
    training_of,
)
from ensdistill.card.measured import BINS, Measured, measured, row_of, teachers_of
from ensdistill.deployment import Deployment, deployment_of, study_folder
from ensdistill.files import atomic, reading, write_text
from ensdistill.headers import WEIGHTS as KIND
from ensdistill.headers import read_header
from ensdistill.markup import markdown
from ensdistill.metrics import METRICS
from ensdistill.page.columns import read_columns

if TYPE_CHECKING:
    import pandas as pd

WEIGHTS, EXPORTED, FIGURE, CARD = (
    "weights.safetensors",
    "model.onnx",
    "reliability.png",
    "README.md",
)
FACTS = "config.json"
"""The deployment, for whoever reads it; the Hugging Face Hub counts downloads by this name."""
TAGS = ["deep-ensemble", "knowledge-distillation", "uncertainty", "calibration"]
ON_THE_HUB = {"acc": "accuracy", "nll": "nll", "bs": "brier_score", "ece": "ece"}
"""What the Hub calls metrics, where it has a name for them."""


@dataclass(frozen=True)
class Student:
    """A student in its study's folder."""

    weights: Path
    folder: Path
    """results/<study>."""
    place: Path
    """Of its weights in that: students/<method>/<seed> or teachers/<seed>."""
    header: dict[str, Any]
    deployment: Deployment

    @property
    def logits(self) -> Path:
        return self.folder / "logits" / self.place.with_name(f"{self.place.name}.h5")


@dataclass
class Card:
    """What has been written."""

    folder: Path
    files: dict[str, int] = field(default_factory=dict)
    """Bytes by name."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Parts of the card that are not there, and why."""
    systems: list[Measured] = field(default_factory=list)
    """The student, and those that taught it, on the test images."""


def make_card(
    weights: str | os.PathLike[str],
    folder: str | os.PathLike[str] | None = None,
    repository: str = "",
    licence: str = "",
) -> Card:
    """Write a student's card, with the files that it tells of beside it.

    Args:
        weights: of a student or a teacher, in its study's folder.
        folder: where the card goes; <study>/deployed/<method>/<seed> unless told.
        repository: `owner/name` on the Hub, for the title and the commands.
        licence: as the Hub calls it, such as `mit`; not stated unless told.

    Raises:
        InputError: the weights lie in no study, or a file is damaged.
    """
    _check("--repo-name", repository, r"\w[\w.-]*(/\w[\w.-]*)?", "someone/digits")
    _check("--license", licence, r"[a-z0-9][a-z0-9.+-]*", "mit")
    student = _student(weights)
    card = Card(Path(folder or student.folder / "deployed" / Path(*student.place.parts[-2:])))
    files = _files(student, card)
    text = _text(student, card, {WEIGHTS, *files}, repository, licence)
    for name, source in files.items():
        _copy(source, card.folder / name)
    _write_weights(student, card.folder / WEIGHTS)
    write_text(card.folder / FACTS, student.deployment.to_json() + "\n")
    write_text(card.folder / CARD, text)  # last: the card is there once all that it tells of is
    card.files = {
        name: (card.folder / name).stat().st_size for name in [CARD, FACTS, WEIGHTS, *files]
    }
    return card


def _check(option: str, value: str, pattern: str, example: str) -> None:
    if value and not re.fullmatch(pattern, value):
        raise InputError(f"{option} {value!r}: not as the Hub has it, such as {example}")


def _student(weights: str | os.PathLike[str]) -> Student:
    path = Path(weights)
    header, folder = read_header(path), study_folder(path)
    place = path.absolute().parent.relative_to(folder) if folder else Path()
    if folder is None or place.parts[0] not in ("students", "teachers", "judged"):
        raise InputError(
            f"{path}: lies in no study's folder, such as results/<study>/students/<method>/<seed>: "
            "a card tells of the study's images (images.h5) and logits, which are not here"
        )
    return Student(path, folder, place, header, deployment_of(path, header))


def _files(student: Student, card: Card) -> dict[str, Path]:
    """Files that belong beside the card: where they are, by their names there."""
    files: dict[str, Path] = {}
    figure = student.folder / "figures/reliability.png"
    if figure.exists():
        files[FIGURE] = figure
    else:
        card.left_out["figure"] = "figures/reliability.png has not been drawn"
    for path in (card.folder / EXPORTED, student.weights.with_name(EXPORTED)):
        if path.exists():
            if student.header["digest"].encode() not in path.read_bytes():
                raise InputError(
                    f"{path}: not of the weights {student.weights}; export these, or delete it"
                )
            return {**files, EXPORTED: path}
    card.left_out["exported file"] = f"the student has not been exported to {EXPORTED}"
    return files


def _write_weights(student: Student, path: Path) -> None:
    """The weights, which say in their header what only their study knew, as `ensdistill.save`'s."""
    from safetensors.numpy import load, save_file

    if path.exists() and path.samefile(student.weights):  # those of the study stay as they are
        return
    header = json.dumps({**student.header, "deployment": student.deployment.in_header()})
    with reading(student.weights, KIND) as file:
        tensors = load(file.read())
    with atomic(path) as temporary:
        save_file(tensors, temporary, metadata={"ensdistill": header})


def _copy(source: Path, path: Path) -> None:
    if path.exists() and path.samefile(source):
        return
    with atomic(path) as temporary:
        shutil.copyfile(source, temporary)


def _text(student: Student, card: Card, files: set[str], repository: str, licence: str) -> str:
    """The card; what it leaves out is noted in `card`."""
    # Slow to import, and Snakemake imports this package in every job.
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    told, header = _told(student, card), student.header
    title = repository.rpartition("/")[2] or f"{told['label']} of {student.folder.name}"
    metadata = _metadata(student, told, title, licence, EXPORTED in files)
    looks = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        # All that is shown is text of the user's, but what was made here as Markdown.
        finalize=lambda it: it if isinstance(it, Raw) else markdown(str(it)),
    )
    return looks.get_template("README.md.jinja").render(
        title=title,
        metadata=Raw(metadata),
        repository=repository,
        licence=licence,
        deployment=student.deployment,
        header=header,
        files=files,
        study=student.folder.name,
        left_out=card.left_out,
        bins=BINS,
        metrics=METRICS,
        text_of=text_of,
        citations=Raw("\n\n".join(citations(header))),
        raw=Raw,
        **told,
    )


class Raw(str):
    """Text that is Markdown already."""


def _told(student: Student, card: Card) -> dict[str, Any]:
    """The facts of the card, by name; what is absent is None."""
    folder, header, deployment = student.folder, student.header, student.deployment
    absent = "coverage", "costs", "shift", "unknown", "spread"
    told = {**dict.fromkeys(absent), "systems": [], "label": header.get("method", "network")}
    told["data"] = data_of(folder / "images.h5")
    time = folder / "benchmarks" / student.place.with_name(f"{student.place.name}.tsv")
    told["training"] = training_of(header, time)
    if deployment.temperature is None:
        card.left_out["metrics"] = "there are no logits of these weights in the study"
        return told
    teachers = teachers_of(folder, header)
    if teachers is None:
        card.left_out["its teachers"] = "there are no logits of their weights in the study"
    told["systems"], told["coverage"] = measured(student.logits, deployment, teachers or {})
    card.systems = told["systems"]
    needed = ["system", "replicate", "nll", "acc", "ece"]
    scores = read_columns(folder / "metrics/scores.csv", needed)
    row = row_of(scores, told["systems"][0].metrics["nll"].estimate)
    if scores is None or row is None:
        for part in ("cost", "shifted images", "other images", "other seeds"):
            card.left_out[part] = "no row of metrics/scores.csv, or more than one, has its NLL"
        return told
    return told | _of_tables(student, card, row, scores, len(teachers or {}))


def _of_tables(
    student: Student, card: Card, row: "pd.Series", scores: "pd.DataFrame", ensemble: int
) -> dict[str, Any]:
    """What the study's tables know of the student whose row of scores this is."""
    folder, system, replicate = student.folder, row["system"], int(row["replicate"])
    systems = {"DE-1": "One teacher", f"DE-{ensemble}": f"Ensemble of {ensemble}"}
    systems = {system: "This student", **(systems if ensemble else {})}
    found = {
        "costs": costs_of(folder, systems),
        "shift": shift_of(folder, system, replicate),
        "unknown": out_of_distribution_of(folder, system, replicate),
        "spread": spread_of(scores, system),
    }
    files = {"costs": "costs", "shift": "corruptions", "unknown": "out_of_distribution"}
    titles = {"costs": "cost", "shift": "shifted images", "unknown": "other images"}
    for key, file in files.items():
        if found[key] is None:
            card.left_out[titles[key]] = f"metrics/{file}.csv has nothing of this student"
    return found | {"label": system if system != "DE-1" else f"teacher {replicate}"}


def _metadata(
    student: Student, told: Mapping[str, Any], title: str, licence: str, is_exported: bool
) -> str:
    """What the Hub reads: YAML."""
    import yaml

    source, study = told["data"].source, student.folder.name
    is_named = source != "folder"
    known: dict[str, Any] = {"license": licence} if licence else {}
    known |= {"library_name": "ensdistill", "pipeline_tag": "image-classification"}
    known["tags"] = [*TAGS, *(["onnx"] if is_exported else [])]
    known |= {"datasets": [source]} if is_named else {}
    if told["systems"]:
        known["metrics"] = [*ON_THE_HUB.values()]
        called = source if is_named else study
        images = f"{called}, {told['data'].counts['test']:,} test images"
        result = {
            "task": {"type": "image-classification"},
            "dataset": {"type": called, "name": images, "split": "test"},
            "metrics": _results(told["systems"][0]),
        }
        known["model-index"] = [{"name": title, "results": [result]}]
    return yaml.safe_dump(known, sort_keys=False, allow_unicode=True, width=1000).strip()


def _results(system: Measured) -> list[dict[str, Any]]:
    """Metrics as the Hub has them: the accuracy as a share."""
    scales = {"acc": 0.01}
    return [
        {
            "type": name,
            "value": round(scales.get(key, 1) * system.metrics[key].estimate, 6),
            "name": METRICS[key].meaning,
        }
        for key, name in ON_THE_HUB.items()
    ]


def to_json(card: Card) -> dict[str, Any]:
    """What was written, for programs."""
    return {
        "folder": str(card.folder),
        "files": card.files,
        "left_out": card.left_out,
        "metrics": {
            it.name: {key: asdict(interval) for key, interval in it.metrics.items()}
            for it in card.systems
        },
    }
