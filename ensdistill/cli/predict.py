"""`ensdistill predict`: what a student says of images of one's own."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from ensdistill import InputError

StudentFile = Annotated[
    Path,
    typer.Argument(
        metavar="STUDENT",
        help="Weights in the folder of their study (weights.safetensors), or an exported file.",
    ),
]
Device = Annotated[str, typer.Option(help="Where weights are computed: cpu, cuda, cuda:1, mps.")]
BatchSize = Annotated[
    int, typer.Option(min=1, help="Images that the student is asked about at once.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")]

BROKEN = 3
"""Exit status where all is done, but some images could not be read."""


def predict(
    student: StudentFile,
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="PATH...",
            help="Images, folders of them (with all folders inside), tar or zip archives.",
        ),
    ],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", help="The table to write: .csv, .jsonl or .parquet."),
    ],
    coverage: Annotated[
        float | None,
        typer.Option(help="Add sets of classes that hold the label of such a share of images: 0.9"),
    ] = None,
    batch_size: BatchSize = 64,
    as_json: AsJson = False,
    device: Device = "cpu",
) -> None:
    """Predict the classes of images of your own, with what the members say, and how unsure all is.

    The table has one row for each image, in order. One that cannot be read is a row with its
    **error**; then the exit status is **3**. It is 1 if nothing could be done, and nothing is
    written then.

    `ensdistill predict weights.safetensors photos/ more.zip -o answers.csv --coverage 0.9`
    """
    from ensdistill.predicting import WRITERS, check_output, said_of, write_predictions

    check_output(output, WRITERS, [student, *paths])
    opened = open_on(student, device)
    with progress() as bar:
        found = write_predictions(
            opened, paths, output, coverage=coverage, batch_size=batch_size, tell=bar.update
        )
    known = opened.deployment
    facts = {"output": str(output), "student": str(student), "temperature": known.temperature}
    if as_json:
        typer.echo(json.dumps({**found, **facts, "coverage": coverage}))
    else:
        typer.echo(f"{output}: images: {found['images']:,}{said_of(found['skipped'])}")
    tell_resized(found["resized"], known.size)
    tell_broken(found["broken"], found["images"])


def open_on(student: Path, device: str) -> Any:
    """The student, computed on a device.

    Raises:
        InputError: as of `deployment.open_student`, or there is no such device.
    """
    from ensdistill.deployment import open_student

    try:
        return open_student(student, device)
    except (AssertionError, RuntimeError) as error:  # PyTorch's, of devices
        reason = str(error).partition("\n")[0]
        raise InputError(f"{student}: cannot be computed on {device!r} ({reason})") from error


def progress(total: int | None = None) -> Any:
    """A bar on stderr, if that is a terminal."""
    from tqdm import tqdm

    return tqdm(total=total, unit=" images", disable=None)


def tell_resized(count: int, size: tuple[int, int] | None) -> None:
    """Say that pictures were resized, though the study resized none."""
    if count and size:
        typer.echo(
            f"resized to the study's {size[1]}×{size[0]} pixels, as the centre square: {count:,}",
            err=True,
        )


def tell_broken(broken: int, images: int, where: str = "the column 'error' says why") -> None:
    """Say that images could not be read, and end so that scripts see it."""
    if broken:
        typer.echo(f"images that could not be read: {broken:,} of {images:,}; {where}", err=True)
        raise typer.Exit(BROKEN)
