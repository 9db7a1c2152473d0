"""What every system costs: parameters, bytes, multiply–adds, and time.

It depends on what is built and how it is trained, not on trained weights: students have new ones
here. Systems that predict by the same kind of network are built and timed once.
"""

import json
import logging
import math
import os
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ensdistill.files import open_hdf5
from ensdistill.images import read_description
from ensdistill.inference import ensemble_forms, fastest, inference_forms, seconds
from ensdistill.networks import build_network, described, fold_batch_norms
from ensdistill.operations import prediction_macs, training_macs
from ensdistill.students import Student, build_student, count_parameters, unfilled

logger = logging.getLogger(__name__)

BATCH_SIZES = (1, 128)
"""Images at once."""

TURN = 0.005
"""Seconds that a timing takes at least; a faster prediction is repeated as often as needed."""

ROUNDS = (5, 101)
"""The least and the most."""

BUSY = 0.95
"""Share of the time of all timings below which the log says that the processor had other work."""

INSTRUCTIONS = ("amx_bf16", "avx512_bf16", "avx512f", "avx2")
"""Sets of instructions that decide how fast a processor convolves, as Linux calls them."""


def cost_table(
    images: str | os.PathLike[str],
    *,
    teacher: Mapping[str, Any],
    methods: Mapping[str, Mapping[str, Any]],
    pool: int,
    time_limit: float,
    device: torch.device,
) -> pd.DataFrame:
    """The costs of deep ensembles and of every method's student.

    A system's *passes* are its multiply–adds for an image over those of the plain network of its
    architecture: m of DE-m and of a BatchEnsemble with m members, the trunk and M heads of a Hydra.

    Args:
        images: images.h5.
        teacher, methods: what is trained, the methods by name: its `parts` (those of
            `studies.Study.parts` that training needs), how many `teachers` it asks, `epochs`,
            `batch_size`, and a method's `label`.
        pool: teachers.
        time_limit: seconds for all timings; every system is timed 5 times nevertheless.
        device: where predictions are timed.

    Returns:
        One row per system, DE-1 … DE-pool and the methods: system, parameters, bytes (of its stored
        tensors), passes, macs (multiply–adds for an image), ms_1 and ms_128 (milliseconds for an
        image in batches of 1 and 128: the median, with quartiles `_low` and `_high`), training_macs
        (of a student without its teachers, but with the student that it starts from; of DE-m those
        of m teachers), n (timings), threads, processor.
    """
    description = read_description(images)
    trainings = _Trainings(images, description, teacher, methods, device)
    systems = [(f"DE-{size}", teacher, size) for size in range(1, pool + 1)]
    systems += [(method["label"], method, 1) for method in methods.values()]
    of_systems = [size * trainings.macs() for size in range(1, pool + 1)]
    of_systems += [trainings.macs(name) for name in methods]
    kinds = [_Kind.of(it["parts"], size, description) for _, it, size in systems]
    x = torch.rand(max(BATCH_SIZES), *description["shape"]).to(
        device, memory_format=torch.channels_last
    )
    distinct = list(dict.fromkeys(kinds))
    sizes = {}
    calls = []
    for kind in distinct:
        forms = [form.to(device) for form in kind.forms()]
        sizes[kind] = kind.sizes(forms, x)
        calls += [(fastest(forms, x[:size]), x[:size]) for size in BATCH_SIZES]
    before = time.perf_counter(), time.process_time()
    rounds = take_turns(calls, time_limit)
    taken, computed = time.perf_counter() - before[0], time.process_time() - before[1]
    if device.type == "cpu" and computed < BUSY * taken:
        share = 100 * (1 - computed / taken)
        logger.warning("for %.0f %% of the time of all timings other work had the CPU", share)
    times = dict(zip(distinct, _milliseconds(rounds), strict=True))
    return pd.DataFrame(
        {
            "system": system,
            **sizes[kind],
            **times[kind],
            "training_macs": macs,
            "n": len(rounds),
            "threads": torch.get_num_threads(),
            "processor": processor(device),
        }
        for (system, *_), kind, macs in zip(systems, kinds, of_systems, strict=True)
    )


@dataclass(frozen=True)
class _Kind:
    """What predicts: so many networks of one description; equal ones cost the same."""

    spec: str
    """Arguments of `build_student`, as JSON."""
    count: int

    @classmethod
    def of(cls, parts: Mapping[str, Any], count: int, description: Mapping[str, Any]) -> "_Kind":
        predictor = unfilled(**_spec(parts, description)).predictor()
        return cls(json.dumps(predictor.spec, sort_keys=True), count)

    def forms(self) -> list[nn.Module]:
        """See `inference_forms`; with newly drawn weights."""
        spec = json.loads(self.spec)
        students = [build_student(**spec) for _ in range(self.count)]
        if self.count == 1:
            return inference_forms(students[0])
        networks = [inference_forms(student)[0].network for student in students]
        return ensemble_forms(networks, spec["architecture"])

    def sizes(self, forms: Sequence[nn.Module], x: Tensor) -> dict[str, float]:
        """Parameters, bytes, passes and multiply–adds."""
        spec = json.loads(self.spec)
        network = unfilled(**spec).network
        stored = sum(tensor.nbytes for tensor in network.state_dict().values())
        plain = fold_batch_norms(build_network(**spec["architecture"]).eval()).to(x.device)
        macs = prediction_macs(forms[0], x[:2])
        return {
            "parameters": self.count * count_parameters(network),
            "bytes": self.count * stored,
            "passes": macs / prediction_macs(plain, x[:2]),
            "macs": macs,
        }


class _Trainings:
    """Multiply–adds of a study's trainings; arguments as of `cost_table`."""

    def __init__(
        self,
        images: str | os.PathLike[str],
        description: Mapping[str, Any],
        teacher: Mapping[str, Any],
        methods: Mapping[str, Mapping[str, Any]],
        device: torch.device,
    ):
        with open_hdf5(images) as file:
            self.images = len(file["train/labels"])
        self.description, self.device = description, device
        self.teacher, self.methods = teacher, methods
        asked = max([0, *(method["teachers"] for method in methods.values())])
        self.teachers = [
            fold_batch_norms(self._new(teacher["parts"]).network.eval().requires_grad_(False))
            for _ in range(asked)
        ]
        self.known: dict[str | None, int] = {}

    def macs(self, method: str | None = None) -> int:
        """Of a method's student, with that of the student that it starts from; or of a teacher."""
        if method not in self.known:
            what = self.teacher if method is None else self.methods[method]
            parts = what["parts"]
            before = self.macs(parts["backbone"]) if "backbone" in parts else 0
            self.known[method] = before + training_macs(
                self._new(parts),
                self.teachers[: what["teachers"]],
                parts,
                images=self.images,
                shape=self.description["shape"],
                epochs=what["epochs"],
                batch_size=what["batch_size"],
            )
        return self.known[method]

    def _new(self, parts: Mapping[str, Any]) -> Student:
        return build_student(**_spec(parts, self.description)).to(self.device)


def _spec(parts: Mapping[str, Any], description: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `build_student` for the images that `read_description` describes."""
    architecture = described({**parts["architecture"]}, description)
    architecture.pop("pretrained", None)  # new weights cost the same
    return {**parts["student"], "architecture": architecture, "members": parts["members"]}


@torch.inference_mode()
def take_turns(calls: Sequence[tuple[nn.Module, Tensor]], time_limit: float) -> NDArray[np.float64]:
    """Seconds for an image, (rounds, calls): in each round every call is timed once.

    Args:
        calls: forms and their images.
        time_limit: seconds after which no further round begins, unless there are too few.
    """
    for call in calls:
        seconds(*call)
    repeats = [math.ceil(TURN / seconds(*call)) for call in calls]

    def turn(form: nn.Module, x: Tensor, count: int) -> float:
        if count > 1:  # caches hold what the call before needed, which a short one would feel
            form(x)
        return seconds(form, x, count) / count / len(x)

    least, most = ROUNDS
    rounds: list[list[float]] = []
    ends = time.perf_counter() + time_limit
    while len(rounds) < least or (len(rounds) < most and time.perf_counter() < ends):
        rounds.append([turn(*call, count) for call, count in zip(calls, repeats, strict=True)])
    return np.array(rounds)


def _milliseconds(rounds: NDArray[np.float64]) -> list[dict[str, float]]:
    """Median and quartiles of each kind, whose timings stand side by side, one per batch size."""
    low, middle, high = 1000 * np.quantile(rounds, [0.25, 0.5, 0.75], axis=0)
    names = [f"ms_{size}" for size in BATCH_SIZES]
    return [
        {
            f"{name}{ending}": values[start + place]
            for place, name in enumerate(names)
            for ending, values in (("", middle), ("_low", low), ("_high", high))
        }
        for start in range(0, len(middle), len(names))
    ]


def processor(device: torch.device) -> str:
    """The GPU's name, or the CPU's model with the instructions that decide its speed."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return platform.processor() or platform.machine()
    said = dict(map(str.strip, line.partition(":")[::2]) for line in reversed(lines))
    name = said.get("model name", platform.machine())
    model = f" (model {said['model']})" if "model" in said else ""
    features = said.get("flags", said.get("Features", "")).split()
    return ", ".join([f"{name}{model}", *(it for it in INSTRUCTIONS if it in features)])
