"""`ensdistill`, the command: what surrounds the workflow, and what uses its students.

Each subcommand is a module of this package with one function, registered here. Heavy libraries are
imported by the functions that need them, so that `--help` and `predict` of an exported file need
few.
"""

import sys
from typing import Annotated

import typer

from ensdistill import InputError, __version__
from ensdistill.cli.card import card
from ensdistill.cli.evaluate import evaluate
from ensdistill.cli.export import export
from ensdistill.cli.init import init
from ensdistill.cli.plan import plan
from ensdistill.cli.predict import predict

app = typer.Typer(
    name="ensdistill",
    help="Distil deep ensembles into compact networks that keep their uncertainty.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"ensdistill {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options of all subcommands."""


app.command()(init)
app.command()(plan)
app.command()(predict)
app.command()(evaluate)
app.command()(export)
app.command()(card)


def main() -> None:
    """Run the command; what is wrong with its input is one sentence, and exit status 1."""
    try:
        app()
    except InputError as error:
        sentence = str(error)
    except OSError as error:
        if not error.filename:
            raise
        from ensdistill.files import explain

        sentence = explain(error)
    except ModuleNotFoundError as error:
        if (error.name or "ensdistill").startswith("ensdistill"):
            raise
        # As of `ensdistill-predict`, which brings what predictions need alone.
        sentence = f"{error.name} is not installed: `pip install ensdistill` brings it"
    else:
        return
    print(f"ensdistill: error: {sentence}", file=sys.stderr)
    sys.exit(1)
