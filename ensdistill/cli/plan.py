"""`ensdistill plan`: how long a study will take, and on how many cards."""

from pathlib import Path
from typing import Annotated

import typer


def plan(
    targets: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[TARGET]...",
            help="What is to be made, as `snakemake` takes it: the studies under `run` unless "
            "told.",
            show_default=False,
        ),
    ] = None,
    everything: Annotated[
        bool,
        typer.Option("--all", help="As if nothing was made yet; else what is still to be made."),
    ] = False,
    flops: Annotated[
        float | None,
        typer.Option(
            min=1,
            help="Plan for cards with so many additions and multiplications per second at their "
            "peak, such as 60e12; else the speed of this machine is measured.",
            show_default=False,
        ),
    ] = None,
    share: Annotated[
        float, typer.Option(min=1e-6, max=1, help="Of that peak, what training reaches.")
    ] = 0.3,
    classes: Annotated[
        int | None,
        typer.Option(min=2, help="Of your own images, if these are not here.", show_default=False),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="A table of all jobs to write besides: .csv."),
    ] = None,
) -> None:
    """Forecast how long the study in this folder will take, before it runs.

    The jobs are those that Snakemake plans. A few real training steps of every distinct network
    and method are timed here, on random images; or, with `--flops`, their operations are counted,
    and nothing needs the device that is planned for. Then all jobs run on paper on 1, 4, 16 and 64
    cards (or CPU cores). Nothing is made.

    `ensdistill plan --flops 60e12 --share 0.3 -o plan.csv results/cifar10_resnet32/claims.md`
    """
    from ensdistill.files import write_text
    from ensdistill.planning.plan import Speed, table, text
    from ensdistill.planning.plan import plan as planned
    from ensdistill.predicting import check_output

    if output:
        check_output(output, (".csv",), [])
    speed = None if flops is None else Speed(flops, share)
    made = planned(targets or [], everything, speed, classes)
    if output:
        write_text(output, table(made))
    typer.echo(text(made))
