"""`ensdistill evaluate`: how good a student is on new labelled images."""

import json
from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

from ensdistill.cli.predict import (
    AsJson,
    BatchSize,
    Device,
    StudentFile,
    open_on,
    progress,
    tell_broken,
    tell_resized,
)

ENDINGS = (".csv", ".json")


def evaluate(
    student: StudentFile,
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="FOLDER",
            help="Labelled images: a folder or archive with a folder for each class, or a table "
            "(.csv, .parquet) with the columns path and label.",
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="A file to write besides: .csv (metrics) or .json."),
    ] = None,
    batch_size: BatchSize = 64,
    as_json: AsJson = False,
    device: Device = "cpu",
) -> None:
    """Measure a student on new labelled images, and say whether its calibration still holds.

    All metrics have 95 % intervals. Classes are matched by name. Images that cannot be read are
    left out and told; then the exit status is **3**.

    `ensdistill evaluate weights.safetensors new_photos/ -o metrics.csv`
    """
    from ensdistill.evaluating import answers_to, labelled_files, table, text
    from ensdistill.evaluating import evaluate as evaluated
    from ensdistill.files import write_text
    from ensdistill.predicting import check_output, said_of

    if output:
        check_output(output, ENDINGS, [student, folder])
    opened, skipped = open_on(student, device), Counter[str]()
    known = opened.deployment
    with progress() as bar:
        files = labelled_files(folder, known.classes, skipped)
        answered = answers_to(opened, files, batch_size, bar.update)
    found = {"student": str(student), "skipped": dict(skipped), **evaluated(answered, known)}
    whole = json.dumps(found, indent=2)
    if output:
        lines = "".join(",".join(row) + "\n" for row in table(found))
        write_text(output, whole if output.suffix.lower() == ".json" else lines)
    if as_json:
        typer.echo(whole)
    else:
        absent = f"; of no image: {', '.join(found['absent'])}" if found["absent"] else ""
        typer.echo(f"{folder}: images: {found['images']:,}{said_of(skipped)}{absent}\n")
        typer.echo(text(found))
    tell_resized(found["resized"], known.size)
    some = next(iter(found["broken"].items()), ("", ""))
    tell_broken(len(found["broken"]), found["images"], f"such as {some[0]}: {some[1]}")
