"""What every job of a study takes: seconds and memory, from what its networks cost."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from ensdistill import analysis
from ensdistill.corruptions import KINDS, SEVERITIES, corrupt
from ensdistill.planning.counting import state_bytes
from ensdistill.planning.data import Data
from ensdistill.planning.jobs import Job
from ensdistill.planning.measuring import Meter, Training
from ensdistill.reports import results
from ensdistill.studies import Study
from ensdistill.training import is_validated

TRAININGS = ("teacher", "student", "judged")
ANALYSES = {
    "perturbed": "perturbed_logits",
    "swept": "sweep_logits",
    "transferred": "transfer_logits",
}
"""Rules, and their functions of `ensdistill.analysis`."""
ON_DEVICE = (*TRAININGS, *ANALYSES, "logits", "distances", "costs")
"""Rules that compute with networks; all others run on the CPU, whatever the device."""

SWEPT = 7
"""Sizes η at which `swept` asks the teachers."""

IMPORTS = {
    "networks": "import ensdistill.adoption, ensdistill.predictions",
    "tables": "import ensdistill.reports.scores, ensdistill.files",
}
"""What scripts import: most of a short job's time."""

JUDGING = {
    "claims": (0.03, 0.0065),
    "corruptions": (0.36, 0.005),
    "diversity_students": (0.008, 0.006),
    "findings": (0.3, 0.005),
    "jacobians": (0.03, 0.0),
    "out_of_distribution": (0.04, 0.014),
    "reliability": (0.005, 0.0045),
    "scores": (0.015, 0.034),
    "selective": (0.008, 0.0055),
}
"""Seconds that a table takes for each network, and for each MB of logits (float32) that it reads,
where `REFERENCE` holds: by the default study, and by 10,000 images of 1,000 classes."""
OTHERS = (0.005, 0.007)
"""The same of tables that are not named above."""
DRAWING, REFERENCE = 1.0, 0.7
"""Seconds to draw a figure, or to start a table's job, where these were measured."""

READING = 0.009
"""Seconds to read one photograph, decode and resize it (docs/own_data.md)."""

CORRUPTED = 2**16
"""Bytes of pixels that are corrupted to time it."""

WAITING = 4 * 2**30
"""Bytes of pixels of the training images up to which they are taken to wait on the device."""

MB = 2**20


@dataclass(frozen=True)
class Cost:
    """What one job takes."""

    seconds: float = 0.0
    memory: float = 0.0
    """Bytes of tensors at a time, on the device where the job computes; 0 if not known."""


@dataclass(frozen=True)
class Start:
    """What it takes until a job's script begins its work."""

    seconds: float
    memory: float
    """Bytes."""


def starts() -> dict[str, Start]:
    """Of scripts that compute with networks, and of those that make tables; the less of two."""
    return {name: min(map(_start, 2 * [code]), key=_seconds) for name, code in IMPORTS.items()}


def _seconds(start: Start) -> float:
    return start.seconds


def _start(code: str) -> Start:
    with subprocess.Popen([sys.executable, "-c", code]) as process:
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    return Start(used.ru_utime + used.ru_stime, used.ru_maxrss * 1024)


class Forecast:
    """The costs of a study's jobs.

    Args:
        study, data: what is configured, and how many images it has.
        meter: of these images.
        started: as of `starts`.
        makers: the job of every file that a job makes.
    """

    def __init__(
        self,
        study: Study,
        data: Data,
        meter: Meter,
        started: Mapping[str, Start],
        makers: Mapping[str, Job],
    ):
        self.study, self.data, self.meter, self.makers = study, data, meter, makers
        self.started, self.known = started, dict[str, Any]()
        self.tables = {name: it for name, it in results().items() if it.has_table}

    def cost(self, job: Job) -> Cost | None:
        """What a job takes, its start included; None of a rule that is not ensdistill's."""
        with self.meter.arithmetic():
            return self._cost(job)

    def _cost(self, job: Job) -> Cost | None:
        start = self.started["networks" if job.rule in ON_DEVICE else "tables"]
        if job.rule in TRAININGS:
            work = self._training(job)
        elif job.rule in ANALYSES:
            work = self._analysis(job.rule)
        elif job.rule == "logits":
            images = self.data.validation + self.data.test + self.data.shifted
            work = Cost(images * self._prediction(self._parts(job)))
        elif job.rule == "distances":
            work = self._distances(job)
        elif job.rule == "costs":
            work = self._costs
        elif job.rule in ("images", "shifted"):
            work = self._images(job.rule)
        elif (judged := self._judging(job)) is not None:
            work = Cost(judged * start.seconds / REFERENCE)
        else:
            return None
        return Cost(start.seconds + work.seconds, work.memory)

    def input_mb(self, job: Job) -> float:
        """MB of a job's input files that others make."""
        with self.meter.arithmetic():
            return sum(self._file_mb(file) for file in job.input)

    def _parts(self, job: Job) -> Mapping[str, Any]:
        """Of a job's network."""
        *_, method, seed = f"/{job.wildcards.get('network', '')}".split("/")[-3:]
        if "network" not in job.wildcards:
            method, seed = job.wildcards.get("method", "teachers"), job.wildcards["seed"]
        if method in self.study.methods and job.rule != "teacher":
            return self.study.parts(method)
        return self.study.parts(teacher=int(seed))

    def _training(self, job: Job) -> Cost:
        method = job.wildcards.get("method")
        if job.rule == "judged" or (
            not method and self.study.own(int(job.wildcards["seed"])).weights
        ):
            return Cost()  # adopted: read and written
        parts, data = self._parts(job), self.data
        recipe = self.study.recipe(method) if method else self.study.teacher
        asked = bool(method and self.study.methods[method].objective.needs_teachers)
        found: Training = self._once(
            ["training", parts, recipe.model_dump(), asked],
            lambda: self.meter.training(
                parts,
                recipe.model_dump(),
                self.study.augmentation.model_dump(),
                self.study.precision,
                teachers=self._pool(self.study.members) if asked else [],
                backbone=self.study.parts(parts["backbone"]) if "backbone" in parts else None,
                count=data.train,
                side=self.study.images.resize,
                processes=self.study.gpus_per_job,
            ),
        )
        steps = recipe.epochs * (data.train // min(recipe.batch_size, data.train))
        epochs = range(1, recipe.epochs + 1)
        validations = sum(is_validated(it, recipe.epochs, recipe.validate_every) for it in epochs)
        predicted = validations * data.validation * self._prediction(parts)
        pixels = (data.train + data.validation) * data.pixels
        waiting = 2 * pixels if pixels < WAITING else 0  # once more for the augmentation
        return Cost(found.start + steps * found.step + predicted, found.memory + waiting)

    def _pool(self, count: int) -> list[Mapping[str, Any]]:
        return [self.study.parts(teacher=place) for place in range(count)]

    def _prediction(self, parts: Mapping[str, Any]) -> float:
        """Seconds for an image."""
        key = ["prediction", _of_network(parts)]
        return self._once(key, lambda: self.meter.prediction(parts, self.data.test))

    def _analysis(self, rule: str) -> Cost:
        study, teachers = self.study, self.study.members
        eta, temperature = study.distillation.eta or 1 / 255, study.distillation.temperature
        # Of held-out images just the passes would count, as of the images themselves.
        others = {key: it for key, it in study.perturbations().items() if key != "held_out"}
        how: dict[str, Any] = {"perturbations": others}
        if rule == "swept":
            how = {"perturbations": study.perturbations(sized=True), "etas": [eta]}
        if rule == "transferred":
            teachers, how = study.pool, {"eta": eta, "temperature": temperature}
        most = self._analysed(rule)
        networks = self.meter.teachers(self._pool(teachers))
        function = getattr(analysis, ANALYSES[rule])

        def call(images: int) -> Any:
            pixels = self.meter.pixels(images)
            return lambda: function(networks, pixels, **how)

        seconds = most * self.meter.each(call, most) * (SWEPT if rule == "swept" else 1)
        return Cost(seconds, self.meter.memory(call, min(256, most)))

    def _analysed(self, rule: str) -> int:
        """Training images that an analysis looks at."""
        its = self.study.analyses
        most = its.perturbed_images if rule == "perturbed" else its.train_images
        return min(self.data.train, most)

    def _distances(self, job: Job) -> Cost:
        """Jacobians of all networks at some test images."""
        count = min(self.data.test, self.study.analyses.jacobian_images)
        seconds = 0.0
        for file in job.input:
            maker = self.makers.get(file)
            if file.endswith("weights.safetensors"):
                parts = self._parts(maker) if maker else self.study.parts()
                seconds += self._once(
                    ["jacobians", _of_network(parts)],
                    lambda it=parts: self.meter.jacobians(it, self.study.members, count),
                )
        return Cost(seconds)

    @cached_property
    def _costs(self) -> Cost:
        """Every kind of network predicts 1 and 128 images at least 11 times; few steps each."""
        of_teacher = self._prediction(self.study.parts())
        each = [of_teacher * size for size in range(1, self.study.pool + 1)]
        each += [self._prediction(self.study.parts(method)) for method in self.study.methods]
        once = 129 * sum(each)
        return Cost(6 * once + max(self.study.costs.seconds, 5 * once))

    def _images(self, rule: str) -> Cost:
        data, source = self.data, self.study.images.source
        if rule == "images":
            count = data.train + data.validation + data.test
            return Cost(count * READING if source in ("folder", "tinyimagenet") else 0.0)
        if self.study.corruptions.source == "official":
            return Cost()
        others = sum(it.images or 0 for it in self.study.out_of_distribution if it.path)
        corrupted = min(self.study.corruptions.images or data.test, data.test)
        return Cost(corrupted * self._once(["corrupt"], self._corrupt) + others * READING)

    def _corrupt(self) -> float:
        """Seconds to corrupt an image in every way."""
        count = max(2, CORRUPTED // self.data.pixels)
        pixels = np.random.default_rng(0).integers(0, 256, (count, *self.data.shape), np.uint8)
        before = time.process_time()
        for kind in KINDS:
            corrupt(pixels, kind, SEVERITIES[2])
        return (time.process_time() - before) / count * len(SEVERITIES)

    def _judging(self, job: Job) -> float | None:
        """Seconds of a table or figure, where `REFERENCE` holds."""
        if job.rule in self.tables or job.rule in JUDGING:
            of_network, of_mb = JUDGING.get(job.rule, OTHERS)
            networks = {file for file in job.input if "/logits/" in file}
            return of_network * len(networks) + of_mb * self.input_mb(job)
        if job.rule.startswith("figure_") or job.rule in ("table", "page", "card"):
            return DRAWING
        return 0.0 if job.rule in ("download", "given", "given_shifted", "export") else None

    def _file_mb(self, file: str) -> float:
        """Of a file that a job makes."""
        data, maker = self.data, self.makers.get(file)
        if maker is None or maker.rule in self.tables:
            return 0.0
        if maker.rule in ("images", "shifted"):
            count = data.train + data.validation + data.test
            return data.pixels * (count if maker.rule == "images" else data.shifted) / MB
        logits = self.study.members * data.classes * 4 / MB
        if maker.rule in ANALYSES:
            times = {
                "perturbed": 1 + len(self.study.perturbations()),
                "transferred": self.study.pool,
            }
            sizes = SWEPT * len(self.study.perturbations(sized=True))
            return times.get(maker.rule, sizes) * self._analysed(maker.rule) * logits
        if maker.rule in (*TRAININGS, "logits"):
            members, weights = self._sizes(self._parts(maker))
            if maker.rule != "logits":
                return weights / MB
            shifted = file == maker.output[-1]
            count = data.shifted if shifted else data.validation + data.test
            return count * members * data.classes * 4 / MB
        return 0.0

    def _sizes(self, parts: Mapping[str, Any]) -> tuple[int, int]:
        """Members of what predicts, and bytes of its weights."""

        def sizes() -> tuple[int, int]:
            student = self.meter.student(parts).predictor()
            return student.members, state_bytes(student)

        return self._once(["sizes", _of_network(parts)], sizes)

    def _once(self, key: Sequence[Any], find: Any) -> Any:
        """What was found before for an equal key is not sought again."""
        text = json.dumps(key, sort_keys=True, default=str)
        if text not in self.known:
            self.known[text] = find()
        return self.known[text]


def _of_network(parts: Mapping[str, Any]) -> list[Any]:
    return [parts[key] for key in ("student", "members", "architecture")]
