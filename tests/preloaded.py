"""Snakemake and its Python scripts, forked from processes that have imported the large libraries.

Importing them takes most of the time of a dry run and of a small job. What is tested of how jobs
begin, end and fail runs them as users do.
"""

import multiprocessing
import os
import runpy
import subprocess
import sys
from multiprocessing.connection import wait
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Lock

from snakemake.benchmark import benchmarked
from snakemake.cli import main
from snakemake.script import PythonScript

CONTEXT = multiprocessing.get_context("forkserver")
# Starting a process also reads how others ended, which can be read once: a thread that waits for
# such a process in `join` would be told 255.
STARTS_AND_ENDS = Lock()


def snakemake(*arguments, folder, environment):
    """What `subprocess.run` would return."""
    CONTEXT.set_forkserver_preload([__name__])
    with TemporaryDirectory() as temporary:
        outputs = [Path(temporary, name) for name in ("stdout", "stderr")]
        its = [*map(str, arguments)], str(folder), dict(environment), outputs
        process = CONTEXT.Process(target=_snakemake, args=its)
        _start(process)
        _join(process)
        said = [path.read_text() for path in outputs]
    return subprocess.CompletedProcess(arguments, process.exitcode, *said)


def _start(process):
    with STARTS_AND_ENDS:
        process.start()


def _join(process):
    wait([process.sentinel])
    with STARTS_AND_ENDS:
        process.join()


def _snakemake(arguments, folder, environment, outputs):
    for number, path in enumerate(outputs, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.path.insert(0, folder)
    sys.argv = ["snakemake", *arguments]
    # For the processes of its scripts, of which a dry run has none.
    CONTEXT.set_forkserver_preload(["h5py", "matplotlib.pyplot", "pandas", "torch"])
    PythonScript.execute_script = _execute_script
    main(sys.argv[1:])


def _execute_script(self, fname, edit=False):
    job = CONTEXT.Process(target=runpy.run_path, args=(fname,), kwargs={"run_name": "__main__"})
    _start(job)
    with benchmarked(job.pid, self.bench_record):
        _join(job)
    if job.exitcode:
        raise subprocess.CalledProcessError(job.exitcode, fname)
