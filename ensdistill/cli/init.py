"""`ensdistill init`: a study of one's own."""

import json
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer


def init(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where the study shall be.")],
    images: Annotated[
        Path | None,
        typer.Option(
            help="Images by class: a folder or archive of `CLASS/IMAGE`, or of `train/` and "
            "`test/`; a table of paths and labels; or a saved dataset. Without it: the digits "
            "that ship with scikit-learn."
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Say what was found and written as JSON.")
    ] = False,
) -> None:
    """Begin a study of your own images.

    Writes DIR/config.yaml, with few keys and what they mean, and DIR/Snakefile, which uses the
    workflow of the installed package. Image size, network and numbers of images are guessed from
    the images, and said. Nothing is overwritten.

    Examples:

        ensdistill init flowers --images /data/flowers

        cd flowers && snakemake --cores all
    """
    from ensdistill.new_study import new_study

    made = new_study(folder, images)
    next_steps = [f"cd {shlex.quote(str(folder))}", "snakemake --cores all"]
    if as_json:
        typer.echo(json.dumps(asdict(made) | {"next": next_steps}, ensure_ascii=False, indent=2))
        return
    if made.found:
        typer.echo(f"Found: {made.found}.")
        typer.echo("Guessed, to be changed in config.yaml:")
        for key, (value, reason) in made.guesses.items():
            typer.echo(f"  {key}: {value} ({reason})")
    else:
        typer.echo("The default study, of scikit-learn's handwritten digits.")
    typer.echo(f"Written: {', '.join(made.files)}")
    typer.echo("Next:")
    for step in next_steps:
        typer.echo(f"  {step}")
    typer.echo(f"Then open results/{made.study}/index.html there.")
