"""The jobs of a study, as Snakemake itself plans them.

`python -m ensdistill.planning.jobs FILE …` is a dry run of Snakemake, with the arguments behind
FILE, that writes what Snakemake announces of each job there instead of printing it.
"""

import json
import logging
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ensdistill import InputError

ALL_CORES = 2**20
"""Cores of the dry run: a job that then has as many takes all that a machine has."""


@dataclass(frozen=True)
class Job:
    """One job, as Snakemake announces it."""

    number: int
    rule: str
    wildcards: dict[str, str]
    input: tuple[str, ...]
    output: tuple[str, ...]
    threads: int
    gpu: int
    priority: int
    after: frozenset[int]
    """Numbers of the jobs that make its input."""


def planned_jobs(targets: Sequence[str] = (), everything: bool = False) -> list[Job]:
    """The jobs that a `snakemake` with these targets would run here; rules without files are none.

    Args:
        targets: of Snakemake; what it makes without them, unless told.
        everything: as if nothing was made yet.

    Raises:
        InputError: Snakemake cannot plan them; in its own words.
    """
    with tempfile.TemporaryDirectory() as folder:
        told = Path(folder, "jobs.json")
        command = [sys.executable, "-m", "ensdistill.planning.jobs", str(told)]
        command += ["--dry-run", "--quiet", "all", "--nolock", "--cores", str(ALL_CORES)]
        command += ["--forceall"] if everything else []
        done = subprocess.run([*command, "--", *targets], capture_output=True, text=True)
        if not told.exists():
            raise InputError(f"snakemake --dry-run: {done.stderr.strip() or done.returncode}")
        announced = json.loads(told.read_text(encoding="utf-8"))
    if announced["errors"]:
        raise InputError(announced["errors"][0])
    jobs = [it for it in announced["jobs"] if it["output"]]
    makers = {file: it["number"] for it in jobs for file in it["output"]}
    return [
        Job(
            **{**it, "input": tuple(it["input"]), "output": tuple(it["output"])},
            after=frozenset(makers[file] for file in it["input"] if file in makers),
        )
        for it in jobs
    ]


class _Listener(logging.Filter):
    """Keeps what Snakemake announces, and lets nothing be printed."""

    def __init__(self) -> None:
        super().__init__()
        self.jobs: dict[int, dict[str, Any]] = {}
        self.errors: list[str] = []

    def filter(self, record: logging.LogRecord) -> bool:
        told: Any = record
        if str(getattr(record, "event", None)) == "job_info":
            gpu = dict(told.resources.items()).get("gpu", 0)
            self.jobs[told.jobid] = {
                "number": told.jobid,
                "rule": told.rule_name,
                "wildcards": dict(told.wildcards or {}),
                "input": list(map(str, told.input or [])),
                "output": list(map(str, told.output or [])),
                "threads": told.threads,
                "gpu": gpu if isinstance(gpu, int) else 0,
                "priority": told.priority if isinstance(told.priority, int) else 0,
            }
        elif record.levelno >= logging.ERROR:
            # Where it happened in the Snakefile stands around the sentence.
            said = [it for it in record.getMessage().splitlines() if not it.startswith("  File")]
            self.errors.append(said[-1].strip())
        return False


def _main() -> None:
    from snakemake import cli
    from snakemake.logging import logger

    listener = _Listener()
    logger.addFilter(listener)
    try:
        cli.main(sys.argv[2:])
    except SystemExit as ended:
        if ended.code and not listener.errors:
            raise
    told = {"jobs": list(listener.jobs.values()), "errors": listener.errors}
    Path(sys.argv[1]).write_text(json.dumps(told), encoding="utf-8")


if __name__ == "__main__":
    _main()
