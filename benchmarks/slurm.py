"""What SLURM adds to many short jobs.

    python -m benchmarks.slurm [JOBS]

As root, with what `make test-slurm` needs. Students of digits, 200 unless told, are each trained
for one epoch, by a SLURM of this machine's own and by the machine itself.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path

from tests.cluster import Cluster, why_not
from tests.project import METHODS, RECIPE, Project

TEACHERS = 2
SLURM = ("--workflow-profile", "profiles/slurm", "--slurm-status-command", "squeue")
"""The cluster has no accounting that could be asked."""
HERE = ("--cores", "all")
SPANS = {"waits_s": ("SubmitTime", "StartTime"), "runs_s": ("StartTime", "EndTime")}
"""Of a job, each a median."""


def new_study(folder: Path, jobs: int) -> Project:
    project = Project.new(folder)
    project.change("studies", "tiny", "methods", value={"kd": METHODS["kd"]})
    project.change("studies", "tiny", "pool", value=TEACHERS)
    project.change("studies", "tiny", "student_seeds", value=jobs)
    for role in ("teacher", "student"):
        recipe = {**RECIPE, "epochs": 1}
        project.change("studies", "tiny", role, value=recipe)
    return project


def seconds(project: Project, environment: dict[str, str], *options: str) -> float:
    """Until all students are trained."""
    started = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "snakemake", *options, "--quiet", "--until", "student"],
        cwd=project.folder,
        env={**environment, "PYTHONPATH": str(project.folder)},
        check=True,
    )
    return time.perf_counter() - started


def main() -> None:
    if reason := why_not():
        sys.exit(reason)
    jobs = int(sys.argv[1]) if sys.argv[1:] else 200
    with tempfile.TemporaryDirectory() as folder, Cluster() as cluster:
        submitted, local = (new_study(Path(folder, name), jobs) for name in ("slurm", "here"))
        made = {"slurm_s": seconds(submitted, cluster.environment, *SLURM)}
        made["here_s"] = seconds(local, local.environment, *HERE)
        weights = "results/tiny/students/kd/*/weights.safetensors"
        files = [sorted(it.folder.glob(weights)) for it in (submitted, local)]
        made["lost"] = jobs - len(files[0])
        made["differences"] = sum(
            one.read_bytes() != other.read_bytes() for one, other in zip(*files, strict=True)
        )
        done = cluster.jobs()
        made["jobs"] = len(done)
        made["not_completed"] = sum(job["JobState"] != "COMPLETED" for job in done)
        for name, span in SPANS.items():
            made[name] = statistics.median(_between(job, *span) for job in done)
    print(json.dumps(made))


def _between(job: dict[str, str], begin: str, end: str) -> float:
    first, last = (datetime.fromisoformat(job[key]) for key in (begin, end))
    return (last - first).total_seconds()


if __name__ == "__main__":
    main()
