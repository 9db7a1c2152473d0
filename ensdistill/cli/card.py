"""`ensdistill card`: a model card of a student, and the folder that the Hub takes."""

import json
from pathlib import Path
from shlex import quote
from typing import Annotated

import typer


def card(
    student: Annotated[
        Path,
        typer.Argument(metavar="STUDENT", help="Weights of a student, in its study's folder."),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FOLDER",
            help="Where the card goes: `<study>/deployed/<method>/<seed>` unless told.",
            show_default=False,
        ),
    ] = None,
    repository: Annotated[
        str,
        typer.Option(
            "--repo-name",
            metavar="OWNER/NAME",
            help="The repository on the Hub, for the card's title and commands.",
        ),
    ] = "",
    licence: Annotated[
        str,
        typer.Option(
            "--license",
            metavar="NAME",
            help="As the Hub calls it, such as `mit`. Without it the card says that there is none.",
        ),
    ] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Say what was written as JSON.")] = False,
) -> None:
    """Write a model card, with all that the Hugging Face Hub takes beside it.

    The folder has README.md (the card), the weights, what `predict` must know of them
    (config.json), the exported file if there is one (model.onnx, by `ensdistill export`) and a
    figure. It can be uploaded as it is:

        ensdistill card results/digits/students/kd_ods/0/weights.safetensors --license mit

        hf upload someone/digits results/digits/deployed/kd_ods/0

    Every number is of the study's files; the card says what is left out for want of them.
    """
    from ensdistill.card import make_card, to_json

    made = make_card(student, output, repository, licence)
    if as_json:
        typer.echo(json.dumps(to_json(made), ensure_ascii=False, indent=2))
        return
    typer.echo(f"{made.folder}: {', '.join(made.files)}")
    for part, why in made.left_out.items():
        typer.echo(f"left out: {part} ({why})")
    typer.echo(f"to upload it: hf upload {repository or 'OWNER/NAME'} {quote(str(made.folder))}")
