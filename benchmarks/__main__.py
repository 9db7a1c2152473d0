"""How fast everything is, side by side with the published algorithm and with the floor.

    python -m benchmarks [NAME ...]     # all measurements, or those whose names begin so

Every comparison happens in one process: after a warm-up, the implementations take turns, round by
round. Reported are medians, and the quartiles of the rounds' ratios. On a GPU the same command
times the same things with CUDA events. results/benchmarks.json holds the rows,
results/benchmarks.md the same as a table.

- *plain*: `benchmarks.plain`, the published algorithm as literally as PyTorch says it;
- *floor*: one ordinary network of the same shape on as many rows as all members have together, in
  the same precision: what a BatchEnsemble would cost if its factors were free.
"""

import json
import sys

from benchmarks.forms import forms
from benchmarks.measurements import (
    ceiling,
    dry_run,
    hours,
    judging,
    judging_at_scale,
    methods,
    operations,
    passes,
    steps,
    workflow,
)
from benchmarks.predictions import predictions
from benchmarks.roofline import roofline
from benchmarks.rows import Bench, hardware, table
from benchmarks.streaming import streaming
from benchmarks.workloads import Workload, shapes, threads
from ensdistill.files import write_text
from tests.project import REPOSITORY

RESULTS = REPOSITORY / "results"


def main() -> None:
    bench = Bench(sys.argv[1:])
    dry_run(bench)
    workflow(bench)
    judging(bench)
    predictions(bench)
    judging_at_scale(bench)
    streaming(bench)
    workloads = {key: Workload(it, bench.device) for key, it in shapes(bench.device).items()}
    for key, workload in workloads.items():
        with threads(workload.shape.threads):
            steps(bench, key, workload)
            if key in ("digits", "resnet32"):
                methods(bench, key, workload)
                passes(bench, key, workload)
    forms(bench)
    ceiling(bench, workloads)
    roofline(bench, workloads)
    hours(bench, workloads["resnet32"])
    shares = operations(bench, workloads["resnet32"])
    if not bench.rows:
        sys.exit(f"no measurement has a name that begins with {' or '.join(sys.argv[1:])}")
    rows = [row | {"hardware": hardware(bench.device)} for row in bench.rows]
    RESULTS.mkdir(exist_ok=True)
    write_text(RESULTS / "benchmarks.json", json.dumps(rows, indent=1, ensure_ascii=False))
    write_text(RESULTS / "benchmarks.md", table(rows, shares))
    print(f"Rows: {RESULTS / 'benchmarks.json'}   Table: {RESULTS / 'benchmarks.md'}")


if __name__ == "__main__":
    main()
