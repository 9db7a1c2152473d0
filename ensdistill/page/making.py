"""How a study was made: its configuration in short, versions, processors and times."""

import platform
from collections import Counter
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ensdistill import DamagedFile, InputError
from ensdistill.files import reading
from ensdistill.markup import counted
from ensdistill.page.columns import read_columns

Facts = dict[str, str]
ARITHMETIC = {
    "fp32": "float32",
    "tf32": "TF32, where the processor has it",
    "bf16": "bfloat16, where the processor has it",
}


def how_it_was_made(folder: Path, study: Mapping[str, Any]) -> dict[str, Facts]:
    """What the page says of it, by heading and term.

    Trainings are told of as their files tell it, as far as these are there: the page does not need
    them, and they may have been deleted.

    Args, errors: as `first_page`.
    """
    methods, seeds = study["methods"], range(study["student_seeds"])
    students = [f"students/{method}/{seed}" for method in methods for seed in seeds]
    elsewhere = trained_elsewhere(study)
    teachers = [f"teachers/{seed}" for seed in range(study["pool"]) if seed not in elsewhere]
    return {
        "The study": _configuration(study),
        "Software and hardware": _provenance(folder, [*teachers, *students]),
        "Time (a training that was interrupted counts from where it went on)": {
            "Teachers": _times(folder, teachers) if teachers else "trained elsewhere",
            "Students": _times(folder, students),
        },
    }


def architectures_of_teachers(study: Mapping[str, Any]) -> list[str]:
    """Their names, each once."""
    own = [it["architecture"] or study["architecture"] for it in study.get("teachers") or []]
    return list(dict.fromkeys(it["name"] for it in own or [study["architecture"]]))


def trained_elsewhere(study: Mapping[str, Any]) -> list[int]:
    """Places of the teachers that were."""
    return [seed for seed, it in enumerate(study.get("teachers") or []) if it["weights"]]


def _configuration(study: Mapping[str, Any]) -> Facts:
    images, distillation = study["images"], study["distillation"]
    counts = {"train": "for training", "validation": "for validation", "test": "for testing"}
    counts |= {"held_out": "held out"} if images["held_out"] else {}
    splits = [f"{_or_all(images[key])} {what}" for key, what in counts.items()]
    taught = study["student_architecture"] or study["architecture"]
    names, elsewhere = architectures_of_teachers(study), len(trained_elsewhere(study))
    trained = f"{study['pool']} trained" + (f", {elsewhere} of them elsewhere" if elsewhere else "")
    judged = [it["label"] for it in study.get("judge", {}).values()]
    eta = f"η = {255 * distillation['eta']:.3g}/255"
    return {
        "Images": f"{images['source']}: {', '.join(splits)}",
        "Architecture": ", ".join(names)
        + (
            ""
            if [taught["name"]] == names and taught == study["architecture"]
            else f"; students {taught['name']}"
        ),
        "Ensemble": f"{study['members']} networks, of {trained}",
        "Students": f"{len(study['methods'])} methods × {study['student_seeds']} seeds",
        **({"Judged beside": ", ".join(judged)} if judged else {}),
        **(
            {"Training of teachers": _recipe(study["teacher"])} if elsewhere < study["pool"] else {}
        ),
        "Training of students": f"{_recipe(study['student'])}, unless a method has its own",
        "Distillation": f"α = {distillation['alpha']:g}, τ = {distillation['temperature']:g}, "
        f"{eta}, unless a method has its own",
        "Arithmetic": ARITHMETIC[study["precision"]],
    }


def _or_all(count: int | None) -> str:
    return "all others" if count is None else f"{count:,}"


def _recipe(recipe: Mapping[str, Any]) -> str:
    rate = f"learning rate {recipe['learning_rate']:g}"
    return f"{recipe['epochs']:,} epochs, batches of {recipe['batch_size']:,}, {rate}"


def _provenance(folder: Path, networks: list[str]) -> Facts:
    weights = [folder / network / "weights.safetensors" for network in networks]
    headers = [_header(path) for path in weights if path.exists()]
    trained = Counter(
        f"on {'the CPU' if it['device'] == 'cpu' else 'a GPU'}, {it['precision_reason']}"
        for it in headers
    )
    made = {title: sorted({it[key] for it in headers}) for key, title in (
        ("ensdistill", "ensdistill"), ("torch", "PyTorch")
    )}  # fmt: skip
    costs = read_columns(folder / "metrics/costs.csv", ["processor", "threads"])
    timed: Any = []
    if costs is not None:
        timed = costs[["processor", "threads"]].drop_duplicates().to_numpy()
    return {
        "Trained": "; ".join(f"{counted(count, 'network')} {how}" for how, count in trained.items())
        or "the weights, which would tell, are not here",
        **{title: ", ".join(versions) for title, versions in made.items() if versions},
        "Timed": "; ".join(f"on {processor}, threads: {threads}" for processor, threads in timed)
        or "not yet",
        "This page": f"Python {platform.python_version()}, Snakemake {version('snakemake')}",
    }


def _header(path: Path) -> dict[str, Any]:
    """What a weights file says of itself, without PyTorch and without reading the tensors.

    Raises:
        InputError: it is damaged. It is left where it is: the page needs no weights.
    """
    import json

    from safetensors import safe_open

    try:
        with reading(path, "weights of this package"), safe_open(path, "numpy") as file:
            header = json.loads(file.metadata()["ensdistill"])
            return {
                key: header[key] for key in ("device", "precision_reason", "torch", "ensdistill")
            }
    except DamagedFile as error:
        raise InputError(str(error)) from error


def _times(folder: Path, networks: list[str]) -> str:
    """How long training took, by Snakemake's benchmark files: seconds, and those of processors."""
    paths = [folder / "benchmarks" / f"{network}.tsv" for network in networks]
    rows = [benchmark(path) for path in paths if path.exists()]
    if not rows:
        return "not known"
    seconds = [float(row["s"]) for row in rows]
    each = f"{duration(sum(seconds) / len(rows))} each on average"
    text = f"{counted(len(rows), 'training')}, {duration(sum(seconds))} in all, {each}"
    try:  # of very short jobs Snakemake notes "NA" or "-"
        cpu = sum(float(row["cpu_time"]) for row in rows)
    except (KeyError, ValueError):
        return text
    return f"{text}; {duration(cpu)} of CPU time"


def benchmark(path: Path) -> dict[str, str]:
    """What Snakemake noted of a job, by column; `s` are seconds."""
    with reading(path, "a benchmark of Snakemake") as file:
        heads, *lines = file.read().decode().splitlines()
        row = dict(zip(heads.split("\t"), lines[0].split("\t"), strict=True))
        float(row["s"])
        return row


def duration(seconds: float) -> str:
    """In the two largest units that it has.

    >>> duration(4.88), duration(83), duration(3599.9), duration(200000)
    ('4.9 s', '1 min 23 s', '1 h 0 min', '55 h 33 min')
    """
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    if round(seconds) < 3600:
        return "{} min {} s".format(*divmod(round(seconds), 60))
    return "{} h {} min".format(*divmod(round(seconds / 60), 60))
