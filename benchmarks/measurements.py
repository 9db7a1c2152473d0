"""What is measured, one function for each group of rows."""

import multiprocessing
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil
import torch
import yaml
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import scale
from benchmarks.rows import Bench, Row
from benchmarks.scale import most_memory
from benchmarks.workloads import CONF_ODS, CPU_THREADS, MEMBERS, Call, Workload, shapes, threads
from ensdistill import claims
from ensdistill.devices import prepare
from ensdistill.hdf5 import write_hdf5
from ensdistill.predictions import read_prediction
from ensdistill.reports import scores
from ensdistill.studies import read_configuration
from tests.project import REPOSITORY, Project

ON_CPU = 2
"""Jobs at a time in the copies of the workflow, one thread each."""

UNTIMED_IMAGES = {"wrn28x10", "wrn28x10_4", "calls"}
"""Workloads whose images are the same as resnet32's, or too small to tell anything."""


def steps(bench: Bench, key: str, workload: Workload) -> None:
    """Whole training steps and their parts."""
    shape, ending = workload.shape, "" if key == "resnet32" else f"_{key}"

    def whole(precision: str, reference: str, variant: str) -> None:
        facts = {"precision": precision, "rounds": shape.rounds}
        bench.compare(
            name := f"conf_ods_step_{variant}{ending}",
            f"step of a student by ConfODS, with its images / plain in {reference}",
            lambda: (workload.step(precision, **CONF_ODS), workload.plain_step(reference)),
            shape=str(shape),
            **facts,
            **(memory(key, precision, reference) if bench.wants(name) else {}),
        )
        bench.compare(
            f"teacher_step_{variant}{ending}",
            f"step of a teacher, with its images / plain in {reference}",
            lambda: (
                workload.step(precision, teacher=True),
                workload.plain_step(reference, teacher=True),
            ),
            shape=shape.of_teacher(),
            **facts,
        )

    def over_floor(precision: str) -> None:
        bench.compare(
            f"batch_ensemble_over_floor_{precision}{ending}",
            "BatchEnsemble, forward and backward / floor",
            lambda: (
                workload.both_passes("batch_ensemble", shape.images, precision),
                workload.both_passes("single", MEMBERS * shape.images, precision),
            ),
            over=True,
            shape=str(shape),
            precision=precision,
            rounds=2 * shape.rounds,
        )

    whole("bf16", "fp32", "bf16")  # as published
    whole("bf16", "bf16", "bf16_both")
    whole("fp32", "fp32", "fp32")
    over_floor("bf16")
    over_floor("fp32")
    if key in UNTIMED_IMAGES:
        return
    bench.compare(
        f"input_pipeline{ending}",
        "an augmented batch / PIL transforms in a DataLoader",
        lambda: (
            workload.batches(shape.images).__next__,
            workload.plain_batches(shape.images).__next__,
        ),
        shape=str(shape),
        rounds=100,
    )


def methods(bench: Bench, key: str, workload: Workload) -> None:
    """A training step of every method of the bench, over one of KD."""
    config = yaml.safe_load((REPOSITORY / "config.yaml").read_text())
    study = read_configuration(config).studies["digits_bench"]
    kd = study.parts("batch_ensemble_none")
    for name, method in study.methods.items():
        bench.compare(
            f"method_step_{name}_{key}",
            f"step of {method.label}, with its images / KD",
            lambda name=name: (
                workload.step_of_method(study.parts(name)),
                workload.step_of_method(kd),
            ),
            over=True,
            shape=str(workload.shape),
            precision="fp32",
            rounds=max(5, workload.shape.rounds // 3),
        )


def passes(bench: Bench, key: str, workload: Workload) -> None:
    """A step that asks every teacher at its own images, or makes one pass, over the paper's."""
    paper = {"student": {"name": "batch_ensemble"}, "members": MEMBERS, **CONF_ODS}
    each = {**paper, "perturbation": {**CONF_ODS["perturbation"], "name": "ods_each"}}
    others = {
        "conf_ods_once": ("ConfODS in one pass of the student", {**paper, "single_pass": True}),
        "ods_each": ("ODS-each", each),
        "ods_each_once": ("ODS-each in one pass of the student", {**each, "single_pass": True}),
    }
    for name, (label, parts) in others.items():
        bench.compare(
            f"passes_{name}_{key}",
            f"step by {label}, with its images / by ConfODS",
            lambda parts=parts: (workload.step_of_method(parts), workload.step_of_method(paper)),
            over=True,
            shape=str(workload.shape),
            precision="fp32",
            rounds=max(5, workload.shape.rounds // 3),
        )


def memory(key: str, precision: str, reference: str) -> dict[str, float]:
    """MiB that two ConfODS steps take, each implementation in a process of its own."""
    calls = {"ours_mb": ("ours", precision), "reference_mb": ("plain", reference)}
    return {name: in_a_new_process(peak_mb, key, *call) for name, call in calls.items()}


def in_a_new_process(function: Any, *arguments: Any) -> Any:
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:
        return pool.submit(function, *arguments).result()


def peak_mb(key: str, kind: str, precision: str) -> float:
    """Memory of a workload and two ConfODS steps, above what the process had before."""
    device = prepare(CPU_THREADS, {"jobs_per_gpu": 2})  # beside the process that waits for this one
    before = most_memory()
    workload = Workload(shapes(device)[key], device)
    plain = kind == "plain"
    step = workload.plain_step(precision) if plain else workload.step(precision, **CONF_ODS)
    for _ in range(2):
        step()
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return most_memory() - before


def ceiling(bench: Bench, workloads: Mapping[str, Workload]) -> None:
    """What the hardware does at best, and what share of it training reaches."""
    if not bench.wants("ceiling"):
        return
    most = {}
    for precision, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        calls = arithmetic(bench.device, dtype)
        facts = {"precision": precision, "rounds": 10}
        most[precision] = max(
            reached(bench, f"ceiling_{name}_{precision}", what, call, **facts)
            for name, (what, call) in calls.items()
        )
    source = torch.randn(2**28 if bench.device.type == "cuda" else 2**26, device=bench.device)
    target = torch.empty_like(source)
    seconds = bench.clock(lambda: target.copy_(source), rounds=10)
    rate = 2 * source.nbytes / np.median(seconds) / 1e9
    what = f"copy of {source.nbytes >> 20} MiB: {rate:.3g} GB/s"
    bench.alone("ceiling_copy", what, seconds, gb_per_s=rate)
    for key, workload in workloads.items():
        shape = workload.shape
        if key == "calls":  # hardly any arithmetic
            continue
        for precision, best in most.items():
            name = f"ceiling_reached_{precision}_{key}"
            what = "BatchEnsemble, forward and backward"
            with threads(shape.threads):
                call = workload.both_passes("batch_ensemble", shape.images, precision)
                facts = {"precision": precision, "shape": str(shape), "rounds": shape.rounds}
                reached(bench, name, what, call, best * shape.threads / CPU_THREADS, **facts)


def arithmetic(device: torch.device, dtype: torch.dtype) -> dict[str, tuple[str, Call]]:
    """Operations in which little else counts, from two libraries: either may be slow somewhere."""
    side, images = (8192, 1024) if device.type == "cuda" else (2048, 64)
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    x, weight = (
        torch.randn(shape, device=device).to(dtype, memory_format=torch.channels_last)
        for shape in ((images, 512, 16, 16), (512, 512, 3, 3))
    )
    return {
        "matmul": (f"product of two {side}×{side} matrices", lambda: a @ b),
        "convolution": (
            f"3×3 convolution of {images} images of 16×16, 512 channels",
            lambda: F.conv2d(x, weight, padding=1),
        ),
    }


def reached(
    bench: Bench,
    name: str,
    what: str,
    call: Call,
    best: float | None = None,
    *,
    rounds: int,
    **facts: Any,
) -> float:
    """A row with the TFLOP/s of a call, and what share that is of the best."""
    with FlopCounterMode(display=False) as counter:
        call()
    seconds = bench.clock(call, rounds=rounds)
    rate = counter.get_total_flops() / np.median(seconds) / 1e12
    share = f", {rate / best:.0%} of the most" if best else ""
    bench.alone(name, f"{what}: {rate:.3g} TFLOP/s{share}", seconds, tflops=rate, **facts)
    return rate


KINDS = {
    "convolution": ("conv", "xmma", "cudnn", "gemm", "cutlass"),
    "batch normalisation": ("batch_norm", "bn_fw", "bn_bw"),
    "copies": ("aten::cat", "aten::copy_", "CatArray", "Memcpy"),
    "element-wise and the rest": ("",),
}


def operations(bench: Bench, workload: Workload) -> dict[str, float]:
    """Where a ConfODS step in bfloat16 spends its time: shares by kind of operation."""
    if not bench.wants("operations"):
        return {}
    step = workload.step("bf16", **CONF_ODS)
    bench.clock(step, rounds=1)
    on_gpu = bench.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as seen:
        for _ in range(3):
            step()
    spent = dict.fromkeys(KINDS, 0.0)
    for event in seen.key_averages():
        kind = next(kind for kind, parts in KINDS.items() if any(it in event.key for it in parts))
        spent[kind] += event.self_device_time_total if on_gpu else event.self_cpu_time_total
    return {kind: own / sum(spent.values()) for kind, own in spent.items()}


def hours(bench: Bench, workload: Workload) -> None:
    """Extrapolated hours of the trainings of `cifar10_resnet32`, one after the other."""
    configuration = yaml.safe_load((REPOSITORY / "config.yaml").read_text(encoding="utf-8"))
    study = read_configuration(configuration).studies["cifar10_resnet32"]
    images = 50_000 - study.images.validation
    for precision in ("bf16", "fp32"):
        if not bench.wants(name := f"hours_cifar10_resnet32_{precision}"):
            continue
        calls = {"teacher": (workload.step(precision, teacher=True), study.teacher, study.pool)}
        for method in study.methods:
            parts = study.parts(method)
            chosen = {key: parts[key] for key in ("objective", "perturbation")}
            call = workload.step(precision, student=parts["student"]["name"], **chosen)
            calls[method] = call, study.recipe(method), study.student_seeds
        total, parts = 0.0, []
        for method, (call, recipe, networks) in calls.items():
            seconds = np.median(bench.clock(call, rounds=4))
            total += networks * recipe.epochs * (images // recipe.batch_size) * seconds
            parts.append(f"{method} {1000 * seconds:.3g}")
        what = f"all {sum(it[2] for it in calls.values())} trainings: {total / 3600:.3g} hours; "
        what += f"milliseconds a step: {', '.join(parts)}"
        bench.alone(name, what, [total], precision=precision, shape=str(workload.shape))


def judging(bench: Bench) -> None:
    """From logits of 10,000 images, 4 members, 200 classes to metrics and claims."""
    if not bench.wants("metrics_10k_s", "logits_10k_write_s"):
        return
    size = scale.Scale(classes=200, students=1, images=10_000, teachers=MEMBERS)
    found = in_a_new_process(write_and_judge, size)
    facts = {"shape": "10,000 images, 4 members, 200 classes"}
    bench.alone("logits_10k_write_s", "a student's logits to HDF5", [found["write"]], **facts)
    bench.alone(
        "metrics_10k_s",
        "all metrics and claims of a student and of its four teachers, from HDF5",
        found["judge"],
        ours_mb=found["mb"],
        **facts,
    )


def judging_at_scale(bench: Bench) -> None:
    """From logits of 50,000 images to tables, each in a process of its own."""
    for key, size in scale.SCALES.items():
        wanted = [name for name in scale.JUDGED if bench.wants(f"{key}_{name}_s")]
        if not wanted:
            continue
        with tempfile.TemporaryDirectory() as folder:
            scale.write(folder, size)
            for name in wanted:
                seconds, peak = in_a_new_process(scale.judged, name, folder, size)
                bench.alone(
                    f"{key}_{name}_s",
                    f"{name}, from HDF5; memory: of the whole process",
                    [seconds],
                    ours_mb=peak,
                    shape=str(size),
                )


def write_and_judge(size: scale.Scale) -> Row:
    """Seconds of writing a student's logits and of judging a study, and the MiB of the latter."""
    with tempfile.TemporaryDirectory() as folder:
        scale.write(folder, size)
        files = scale.Files(folder, size)
        ((label, [student]),) = files.students.items()
        written = {}
        for split in ("test", "val"):
            prediction, labels = read_prediction(student, split)
            written |= {f"{split}/logits": prediction.logits, f"{split}/labels": labels}
        started = time.perf_counter()
        write_hdf5(Path(folder, "written.h5"), written, {})
        seconds = {"write": time.perf_counter() - started, "judge": []}
        before = most_memory()
        for _ in range(3):
            started = time.perf_counter()
            scores.table(files.pool, files.students, n_bins=15)
            claims.claims(
                teachers=files.pool,
                students=files.students,
                paper={"kd": {"name": "kd", "label": label}},
                members=MEMBERS,
                n_bins=15,
                perturbed=files.perturbed,
                transferred=files.transferred,
                distances="",
            )
            seconds["judge"].append(time.perf_counter() - started)
        taken = most_memory() - before
    return {**seconds, "mb": taken}


def workflow(bench: Bench) -> None:
    """The default study as a user runs it, and the start of a job in it."""
    if not bench.wants("default_study_s", "first_step_s", "snakemake_to_first_step_s"):
        return
    with copy_of_the_workflow() as project:
        shutil.copy2(REPOSITORY / "config.yaml", project.folder)
        started = time.perf_counter()
        project.run()
        wall = time.perf_counter() - started
        histories = (project.folder / "results" / "digits").rglob("history.csv")
        training = [pd.read_csv(path)["seconds"].sum() for path in histories]
        share = 1 - sum(training) / (ON_CPU * wall)
        what = f"the default study, {len(training)} trainings and all else on {ON_CPU} cores; "
        what += f"{share:.0%} of their time is not training steps"
        bench.alone("default_study_s", what, [wall], not_training=share)
        starts = zip(*(first_step(project, "digits", "kd_conf_ods") for _ in range(3)), strict=True)
        names = {"first_step_s": "start of a job", "snakemake_to_first_step_s": "command"}
        for (name, start), seconds in zip(names.items(), starts, strict=True):
            what = f"from the {start} to the first step of a ConfODS student of digits"
            bench.alone(name, what, seconds)


def dry_run(bench: Bench) -> None:
    if not bench.wants("dry_run_1000_jobs_s"):
        return
    with copy_of_the_workflow() as project:
        study = yaml.safe_load((REPOSITORY / "config.yaml").read_text(encoding="utf-8"))
        study = study["studies"]["digits"] | {"student_seeds": 53}
        project.configure({"run": ["digits"], "studies": {"digits": study}})
        seconds = []
        for _ in range(3):
            started = time.perf_counter()
            planned = project.run("--dry-run").stdout
            seconds.append(time.perf_counter() - started)
        jobs = re.search(r"^total +(\d+)", planned, re.MULTILINE)[1]
        bench.alone("dry_run_1000_jobs_s", f"`snakemake -n` of {jobs} jobs", seconds)


@contextmanager
def copy_of_the_workflow() -> Iterator[Project]:
    with tempfile.TemporaryDirectory() as folder:
        yield Project.new(Path(folder))


def first_step(project: Project, study: str, method: str) -> tuple[float, float]:
    """Seconds until a student's first step: from the start of its job, and from the command's.

    The job logs the moment at which it has everything.
    """
    student = f"students/{method}/0"
    log = project.folder / "results" / study / "logs" / f"{student}.log"
    log.unlink()
    shutil.rmtree(project.folder / "results" / study / student)
    command = [sys.executable, "-m", "snakemake", "--cores", "1"]
    command += [f"results/{study}/{student}/weights.safetensors"]
    started = time.time()
    with subprocess.Popen(command, cwd=project.folder, stderr=subprocess.DEVNULL) as snakemake:
        began, ready = None, None
        while not ready:
            if snakemake.poll() is not None:
                raise RuntimeError(f"snakemake ended before the first step of {student}")
            if not began:
                with suppress(psutil.NoSuchProcess):
                    processes = psutil.Process(snakemake.pid).children()
                    if any("train.py" in " ".join(process.cmdline()) for process in processes):
                        began = time.time()
            elif log.exists():
                ready = re.search(READY, log.read_text())
            time.sleep(0.02)
        snakemake.send_signal(signal.SIGINT)
    first = datetime.strptime(ready[1], "%Y-%m-%d %H:%M:%S,%f").timestamp()
    return first - began, first - started


READY = r"(\S+ \S+) INFO \d+ images, \d+ steps per epoch"
