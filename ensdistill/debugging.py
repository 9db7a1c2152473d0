"""Run the script of one job in this process, so that a debugger can stop in it.

    python -m pdb -m ensdistill.debugging results/digits/logits/teachers/0.h5

In an IDE start the module `ensdistill.debugging` with the file as its argument. The job's inputs
must be there; its output is replaced.
"""

import runpy
import sys
from pathlib import Path
from typing import Any

from ensdistill import InputError


def snakemake_of(output: str) -> tuple[Path, Any]:
    """The script that makes a file, and the object `snakemake` that Snakemake would give it.

    Args:
        output: a file of the workflow in this folder, such as results/digits/images.h5.

    Raises:
        InputError: no rule that has a script makes it.
    """
    from snakemake.api import SnakemakeApi
    from snakemake.exceptions import MissingRuleException
    from snakemake.iocontainers import Snakemake
    from snakemake.settings.types import DAGSettings, OutputSettings, Quietness, ResourceSettings

    settings = OutputSettings(quiet={Quietness.ALL})
    with SnakemakeApi(settings) as api:
        workflow = api.workflow(
            resource_settings=ResourceSettings(cores=1), snakefile=Path("Snakefile")
        )
        try:
            workflow.dag(DAGSettings(targets={output})).execute_workflow(executor="dryrun")
            jobs = workflow._workflow.dag.jobs
            (job,) = [job for job in jobs if output in job.output and job.rule.script]
        except (MissingRuleException, ValueError):
            raise InputError(f"{output}: no rule with a script makes this file") from None
        script = Path(str(job.rule.basedir)) / job.rule.script
        return script.resolve(), Snakemake(
            job.input,
            job.output,
            job.params,
            job.wildcards,
            job.threads,
            job.resources,
            job.log,
            workflow._workflow.config,
            job.rule.name,
            None,
            str(script.parent),
        )


if __name__ == "__main__":
    try:
        script, snakemake = snakemake_of(sys.argv[1])
    except InputError as error:
        sys.exit(str(error))
    for missing in (path for path in snakemake.input if not Path(path).exists()):
        sys.exit(f"{missing}: missing; make it first: snakemake --cores all {missing}")
    for path in [*snakemake.output, *snakemake.log]:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    runpy.run_path(str(script), init_globals={"snakemake": snakemake})
