"""The forecast of a whole study: its jobs, their costs, and how long machines take for them."""

import csv
import io
import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from ensdistill import InputError
from ensdistill.config_errors import check_files
from ensdistill.planning.jobs import Job, planned_jobs
from ensdistill.planning.schedule import Schedule, Task, critical_path, schedule
from ensdistill.studies import Configuration, read_configuration

SIZES = (1, 4, 16, 64)
"""Cards, or cores, of the machines on which a study runs on paper."""
CORES_PER_CARD = 4
MOST_NEIGHBOURS = 15
"""Each takes some 300 MB."""


@dataclass(frozen=True)
class Speed:
    """Of a device that is not here."""

    flops: float
    """Additions and multiplications per second: the peak that its maker states."""
    share: float
    """Of that peak, which training reaches."""


@dataclass(frozen=True)
class Planned:
    """A job and its costs."""

    job: Job
    task: Task
    memory: float
    """Bytes of tensors at a time on its device; 0 if not known."""


@dataclass(frozen=True)
class Plan:
    """What `ensdistill plan` tells."""

    jobs: list[Planned]
    schedules: dict[int, Schedule]
    """By the number of cards, or cores."""
    path: list[Planned]
    """The longest chain."""
    unknown: set[str]
    """Rules that are not ensdistill's: they take no time here."""
    cards: bool
    """Whether the machines are counted in cards."""
    processor: str


def plan(
    targets: Sequence[str],
    everything: bool,
    speed: Speed | None,
    classes: int | None,
) -> Plan:
    """Forecast what `snakemake` with these targets would make in this folder.

    Args:
        targets, everything: as of `planned_jobs`.
        speed: of a device to plan for; None for this machine, whose speed is measured.
        classes: of own images that are not there.

    Raises:
        InputError: config.yaml or a target is wrong, or too little is known.
    """
    configuration = _configuration()
    jobs = planned_jobs(targets, everything)
    if not jobs:
        raise InputError("nothing is to be made: plan all of it with `--all`")
    import torch

    from ensdistill.costs import processor
    from ensdistill.devices import prepare
    from ensdistill.planning.data import data_of
    from ensdistill.planning.forecast import ON_DEVICE, Cost, Forecast, starts
    from ensdistill.planning.measuring import Meter, neighbours

    device = prepare(max((job.threads for job in jobs if job.rule == "teacher"), default=1), {})
    makers = {file: job for job in jobs for file in job.output}
    forecasts, planned, unknown = dict[str, Forecast](), [], set()
    alone = speed is not None or device.type != "cpu"
    jobs_at_once = 1 if alone else (os.cpu_count() or 1) // torch.get_num_threads()
    with neighbours(min(jobs_at_once - 1, MOST_NEIGHBOURS)):
        started = starts()
        for name in dict.fromkeys(job.wildcards.get("study", "") for job in jobs):
            if name in configuration.studies:
                study = configuration.studies[name]
                data = data_of(study, f"results/{name}/images.h5", classes)
                reached = None if speed is None else speed.flops * speed.share
                meter = Meter(data.description, device, reached)
                forecasts[name] = Forecast(study, data, meter, started, makers)
        for job in jobs:
            forecast = forecasts.get(job.wildcards.get("study", ""))
            cost = forecast.cost(job) if forecast else Cost() if job.rule == "download" else None
            if cost is None:
                unknown.add(job.rule)
            size = forecast.input_mb(job) if forecast else 0.0
            seconds = (cost or Cost()).seconds
            task = Task(seconds, job.after, job.threads, job.gpu, job.priority, size)
            memory = cost.memory if cost and job.rule in ON_DEVICE else 0.0
            planned.append(Planned(job, task, memory))
    cards = speed is not None or device.type == "cuda"
    where = "a device that is not here" if speed else processor(device)
    return Plan(planned, *_on_paper(planned, cards), unknown, cards, where)


def _configuration() -> Configuration:
    """Of config.yaml in this folder."""
    if not os.path.exists("config.yaml"):
        raise InputError("config.yaml: there is none in this folder; `ensdistill init` begins one")
    check_files(["config.yaml"])
    return read_configuration(yaml.safe_load(Path("config.yaml").read_text(encoding="utf-8")))


def _on_paper(planned: Sequence[Planned], cards: bool) -> tuple[dict[int, Schedule], list[Planned]]:
    tasks = {it.job.number: it.task for it in planned}
    by_number = {it.job.number: it for it in planned}
    most = max(task.cards for task in tasks.values()) if cards else 0
    schedules = {
        size: schedule(tasks, CORES_PER_CARD * size, size) if cards else schedule(tasks, size)
        for size in [it for it in SIZES if it >= most] or [most]  # others have too few cards
    }
    return schedules, [by_number[number] for number in critical_path(tasks)]


def text(plan: Plan) -> str:
    """The plan as tables for a terminal."""
    lines = [f"Computing on: {plan.processor}", "", *_rules(plan.jobs), ""]
    unit = "cards" if plan.cards else "cores"
    lines.append(f"{unit:>6} {'makespan':>10} {'idle':>6}")
    for size, it in plan.schedules.items():
        lines.append(f"{size:6d} {duration(it.makespan):>10} {100 * it.idle:5.0f}%")
    total = sum(it.task.seconds for it in plan.path)
    chain = " → ".join(dict.fromkeys(_name(it.job) for it in plan.path))
    lines += ["", f"Longest chain of jobs, which no machine shortens: {duration(total)}", chain]
    if plan.unknown:
        lines += ["", f"Without a forecast, counted as 0 s: {', '.join(sorted(plan.unknown))}"]
    return "\n".join(lines)


def _rules(planned: Sequence[Planned]) -> list[str]:
    """One line for each rule, figures and tables together."""
    groups: dict[str, list[Planned]] = defaultdict(list)
    for it in planned:
        rule = it.job.rule
        groups["figures" if rule.startswith("figure_") else rule].append(it)
    lines = [f"{'rule':22} {'jobs':>6} {'each':>10} {'all':>10} {'memory':>9}"]
    for rule, some in sorted(groups.items(), key=lambda it: -_sum(it[1])):
        memory = max(it.memory for it in some) / 2**30
        shown = f"{memory:6.2f} GB" if memory else "–"
        each = duration(_sum(some) / len(some))
        lines.append(f"{rule:22} {len(some):6d} {each:>10} {duration(_sum(some)):>10} {shown:>9}")
    lines.append(f"{'all':22} {len(planned):6d} {'':>10} {duration(_sum(planned)):>10}")
    return lines


def _sum(planned: Sequence[Planned]) -> float:
    return sum(it.task.seconds for it in planned)


def _name(job: Job) -> str:
    values = [value for key, value in job.wildcards.items() if key != "study"]
    return " ".join([job.rule, *values])


def duration(seconds: float) -> str:
    """In the unit that fits.

    >>> duration(5.25), duration(600), duration(9000), duration(9e5)
    ('5.2 s', '10.0 min', '2.5 h', '250 h')
    """
    if seconds < 120:
        return f"{seconds:.1f} s"
    if seconds < 7200:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.{1 if seconds < 360_000 else 0}f} h"


def table(plan: Plan) -> str:
    """One line of CSV for each job: what it is, what it takes, and when it starts where."""
    unit = "cards" if plan.cards else "cores"
    lines = io.StringIO()
    writer = csv.writer(lines, lineterminator="\n")
    starts = [f"start_{size}_{unit}" for size in plan.schedules]
    writer.writerow(["job", "rule", "seconds", "memory_bytes", "cores", "cards", *starts])
    for it in plan.jobs:
        cores = min(it.task.cores, max(SIZES) * CORES_PER_CARD)
        known: list[object] = [
            _name(it.job),
            it.job.rule,
            f"{it.task.seconds:.3f}",
            round(it.memory),
        ]
        known += [cores, it.task.cards]
        known += [f"{on.starts[it.job.number]:.1f}" for on in plan.schedules.values()]
        writer.writerow(known)
    return lines.getvalue()
