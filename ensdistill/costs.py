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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ensdistill.hdf5 import open_hdf5
from ensdistill.images import read_description
from ensdistill.inference import ensemble_forms, fastest, inference_forms, seconds
from ensdistill.networks import build_network, described, fold_batch_norms
from ensdistill.operations import prediction_macs, training_macs
from ensdistill.students import Student, build_student, count_parameters, unfilled
from ensdistill.weights import read_header

logger = logging.getLogger(__name__)

BATCH_SIZES = (1, 128)
"""Images at once."""

TURN = 0.005
"""Seconds that a timing takes at least; a faster prediction is repeated as often as needed."""

ROUNDS = (5, 101)
"""The least and the most."""

SIZES = ("parameters", "bytes", "passes", "macs")
"""Columns that need no timing."""

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
    teachers: Sequence[Mapping[str, Any]] = (),
    judged: Mapping[str, str | os.PathLike[str]] | None = None,
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
        teachers: the same of every teacher of the pool, where they are not all alike or were not
            all trained here; those have no `epochs`.
        judged: weights files by the label of what is judged beside.

    Returns:
        One row per system, DE-1 … DE-pool and the methods: system, parameters, bytes (of its stored
        tensors), passes, macs (multiply–adds for an image), ms_1 and ms_128 (milliseconds for an
        image in batches of 1 and 128: the median, with quartiles `_low` and `_high`), training_macs
        (of a student without its teachers, but with the student that it starts from; of DE-m those
        of m teachers; NaN of what was trained elsewhere), n (timings), threads, processor. Of a
        pool of different networks DE-m has the mean over its subsets, the networks one after the
        other.
    """
    description = read_description(images)
    judged, teachers = judged or {}, teachers or [teacher] * pool
    trainings = _Trainings(images, description, teachers, methods, device)
    specs = {it["label"]: _spec(it["parts"], description) for it in methods.values()}
    specs |= {label: read_header(path)["spec"] for label, path in judged.items()}
    systems = _ensembles([_Kind.of(_spec(it["parts"], description)) for it in teachers])
    systems |= {label: {_Kind.of(spec): 1} for label, spec in specs.items()}
    of_systems = [size * trainings.of_teacher() for size in range(1, pool + 1)]
    of_systems += [*map(trainings.macs, methods), *[math.nan] * len(judged)]
    x = torch.rand(max(BATCH_SIZES), *description["shape"]).to(
        device, memory_format=torch.channels_last
    )
    distinct = list(dict.fromkeys(kind for kinds in systems.values() for kind in kinds))
    sizes = {}
    calls = []
    for kind in distinct:
        forms = [form.to(device) for form in kind.forms()]
        sizes[kind] = kind.sizes(forms, x)
        calls += [(fastest(forms, x[:size]), x[:size]) for size in BATCH_SIZES]
    rounds = _watched(calls, time_limit, device)
    measured = dict(zip(distinct, np.split(rounds, len(distinct), axis=1), strict=True))
    return pd.DataFrame(
        {
            "system": system,
            **{
                key: _weighted(kinds, {k: it[key] for k, it in sizes.items()}.__getitem__)
                for key in SIZES
            },
            **_milliseconds(_weighted(kinds, measured.__getitem__)),
            "training_macs": macs,
            "n": len(rounds),
            "threads": torch.get_num_threads(),
            "processor": processor(device),
        }
        for (system, kinds), macs in zip(systems.items(), of_systems, strict=True)
    )


def _ensembles(of_pool: Sequence["_Kind"]) -> dict[str, dict["_Kind", float]]:
    """What predicts as DE-1, DE-2 …, and how often each part of it counts."""
    alike, pool = len({*of_pool}) == 1, len(of_pool)
    return {
        f"DE-{size}": {replace(of_pool[0], count=size): 1}
        if alike
        else {kind: size * of_pool.count(kind) / pool for kind in of_pool}
        for size in range(1, pool + 1)
    }


def _watched(
    calls: Sequence[tuple[nn.Module, Tensor]], time_limit: float, device: torch.device
) -> NDArray[np.float64]:
    """`take_turns`, with a warning if the processor had other work."""
    before = time.perf_counter(), time.process_time()
    rounds = take_turns(calls, time_limit)
    taken, computed = time.perf_counter() - before[0], time.process_time() - before[1]
    if device.type == "cpu" and computed < BUSY * taken:
        share = 100 * (1 - computed / taken)
        logger.warning("for %.0f %% of the time of all timings other work had the CPU", share)
    return rounds


def _weighted(kinds: Mapping["_Kind", float], value: Callable[["_Kind"], Any]) -> Any:
    return sum(share * value(kind) for kind, share in kinds.items())


@dataclass(frozen=True)
class _Kind:
    """What predicts: so many networks of one description; equal ones cost the same."""

    spec: str
    """Arguments of `build_student`, as JSON."""
    count: int = 1

    @classmethod
    def of(cls, spec: Mapping[str, Any]) -> "_Kind":
        return cls(json.dumps(unfilled(**spec).predictor().spec, sort_keys=True))

    def forms(self) -> list[nn.Module]:
        """See `inference_forms`; with newly drawn weights."""
        spec = json.loads(self.spec)
        students = [build_student(**spec) for _ in range(self.count)]
        if self.count == 1:
            return inference_forms(students[0])
        networks = [cast(Student, inference_forms(student)[0]).network for student in students]
        return ensemble_forms(networks, spec["architecture"])

    def sizes(self, forms: Sequence[nn.Module], x: Tensor) -> dict[str, float]:
        """Parameters, bytes, passes and multiply–adds."""
        spec = json.loads(self.spec)
        network = unfilled(**spec).network
        stored = sum(tensor.nbytes for tensor in network.state_dict().values())
        plain = fold_batch_norms(build_network(**spec["architecture"]).eval()).to(x.device)
        macs = prediction_macs(forms[0], x[:2])
        values = (
            self.count * count_parameters(network),
            self.count * stored,
            macs / prediction_macs(plain, x[:2]),
            macs,
        )
        return dict(zip(SIZES, values, strict=True))


class _Trainings:
    """Multiply–adds of a study's trainings; arguments as of `cost_table`."""

    def __init__(
        self,
        images: str | os.PathLike[str],
        description: Mapping[str, Any],
        pool: Sequence[Mapping[str, Any]],
        methods: Mapping[str, Mapping[str, Any]],
        device: torch.device,
    ):
        with open_hdf5(images) as file:
            self.images = len(file["train/labels"])
        self.description, self.device = description, device
        self.pool, self.methods = pool, methods
        asked = max([0, *(method["teachers"] for method in methods.values())])
        self.teachers = [
            fold_batch_norms(self._new(it["parts"]).network.eval().requires_grad_(False))
            for it in pool[:asked]
        ]
        self.known: dict[str, int] = {}

    def macs(self, method: str) -> int:
        """Of a method's student, with that of the student that it starts from."""
        if method not in self.known:
            what = self.methods[method]
            before = self.macs(what["parts"]["backbone"]) if "backbone" in what["parts"] else 0
            self.known[method] = before + self._of(what)
        return self.known[method]

    def of_teacher(self) -> float:
        """Of one teacher, the mean over the pool; NaN if one was trained elsewhere."""
        distinct = [it for place, it in enumerate(self.pool) if it not in self.pool[:place]]
        if any("epochs" not in it for it in distinct):
            return math.nan
        macs = [self._of(it) for it in distinct]
        if len(macs) == 1:
            return macs[0]
        return sum(macs[distinct.index(it)] for it in self.pool) / len(self.pool)

    def _of(self, what: Mapping[str, Any]) -> int:
        return training_macs(
            self._new(what["parts"]),
            self.teachers[: what["teachers"]],
            what["parts"],
            images=self.images,
            shape=self.description["shape"],
            epochs=what["epochs"],
            batch_size=what["batch_size"],
        )

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


def _milliseconds(rounds: NDArray[np.float64]) -> dict[str, float]:
    """Median and quartiles over rounds (rounds, batch sizes)."""
    low, middle, high = 1000 * np.quantile(rounds, [0.25, 0.5, 0.75], axis=0)
    names = [f"ms_{size}" for size in BATCH_SIZES]
    return {
        f"{name}{ending}": values[place]
        for place, name in enumerate(names)
        for ending, values in (("", middle), ("_low", low), ("_high", high))
    }


def processor(device: torch.device) -> str:
    """The GPU's name, or the CPU's model with the instructions that decide its speed."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return platform.processor() or platform.machine()
    pairs = (line.partition(":") for line in reversed(lines))
    said = {key.strip(): value.strip() for key, _, value in pairs}
    name = said.get("model name", platform.machine())
    model = f" (model {said['model']})" if "model" in said else ""
    features = said.get("flags", said.get("Features", "")).split()
    return ", ".join([f"{name}{model}", *(it for it in INSTRUCTIONS if it in features)])
