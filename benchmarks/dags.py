"""How planning a study grows with its jobs: what Snakemake takes to read the rules, and to plan.

    python -m benchmarks.dags [FILE.csv] [JOBS ...]

Studies of the digits with many methods and seeds, of 100, 1,000 and 10,000 jobs unless told.
Seconds are those that the processor computed, so that other work disturbs little.
"""

import csv
import math
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from tests.project import REPOSITORY, Project

JOBS = (100, 1000, 10_000)
BESIDE = 50
"""Jobs of a study that do not grow with its students, about."""


def study(jobs: int) -> dict[str, Any]:
    """The default study with so many jobs, about: four times as many seeds as methods."""
    config = yaml.safe_load((REPOSITORY / "config.yaml").read_text(encoding="utf-8"))
    digits = config["studies"]["digits"]
    del digits["deploy"]
    students = max(1, (jobs - BESIDE) // 2)  # each is trained and asked
    count = max(1, round(math.sqrt(students / 4)))
    digits["student_seeds"] = max(1, round(students / count))
    digits["methods"] = {
        f"m{place}": {
            "label": f"M{place}",
            "perturbation": {"name": "gaussian", "eta": (place + 1) / 1000},
        }
        for place in range(count)
    }
    return digits


def seconds(project: Project, *arguments: str) -> tuple[float, str]:
    """What the processor computed for a snakemake, and what that printed."""
    before = os.times()
    done = project.snakemake(*arguments)
    after = os.times()
    assert done.returncode == 0, done.stderr
    own = after.children_user - before.children_user
    return own + after.children_system - before.children_system, done.stdout


def rows(sizes: tuple[int, ...] = JOBS) -> list[dict[str, float]]:
    """One for each size: jobs, seconds to read the rules, and of the whole dry run."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        project = Project.new(Path(folder))
        for size in sizes:
            project.configure({"run": ["digits"], "studies": {"digits": study(size)}})
            parse, _ = seconds(project, "--list-rules")
            planned, told = seconds(project, "--dry-run", "--quiet", "rules")
            jobs = int(re.search(r"^total +(\d+)", told, re.MULTILINE)[1])
            found.append({"jobs": jobs, "parse_s": parse, "dry_run_s": planned})
            print(f"{jobs:6d} jobs: rules {parse:.1f} s, dry run {planned:.1f} s", flush=True)
    return found


def exponent(found: list[dict[str, float]]) -> float:
    """b of the least-squares fit: planning, without reading the rules, ∝ jobs^b."""
    jobs = np.log([it["jobs"] for it in found])
    return float(np.polyfit(jobs, np.log([it["dry_run_s"] - it["parse_s"] for it in found]), 1)[0])


def main() -> None:
    output, *sizes = sys.argv[1:] or ["results/dags.csv"]
    found = rows(tuple(map(int, sizes)) or JOBS)
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    with Path(output).open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, found[0].keys())
        writer.writeheader()
        writer.writerows(found)
    if len(found) > 1:
        print(f"planning grows as jobs^{exponent(found):.2f}")


if __name__ == "__main__":
    main()
