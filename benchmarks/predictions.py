"""What a prediction costs, over that of a single network."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from benchmarks.rows import Bench
from benchmarks.workloads import MEMBERS, threads
from ensdistill.costs import BATCH_SIZES, take_turns
from ensdistill.inference import ensemble_forms, fastest, inference_forms
from ensdistill.networks import build_network, fold_batch_norms
from ensdistill.students import build_student

SHAPES = {
    "resnet8_w8": ({"name": "resnet8", "width": 8, "num_classes": 10, "in_channels": 1}, 8),
    "resnet20": ({"name": "resnet20", "width": 16, "num_classes": 10, "in_channels": 3}, 32),
    "resnet32": ({"name": "resnet32", "width": 16, "num_classes": 10, "in_channels": 3}, 32),
}
"""By key: arguments of `build_network`, and the side of the images."""

STUDENTS = {
    "single": "single",
    "batch_ensemble": "batch_ensemble",
    "latent_batch_ensemble": "latent_batch_ensemble",
    "hydra": "hydra",
    "dirichlet": "single",
    "mimo": "mimo",
    "packed": "packed",
    "dlf": "gaussian_logits",
    "edfm": "flow_matching",
}
"""Names of rows, and the students that they are of, with their usual options."""

SECONDS = 20
"""That each shape and batch size may take, warm-up aside."""


def predictions(bench: Bench) -> None:
    """Every kind of student and an ensemble over one network, in the fastest forms, one thread."""
    for key, (architecture, side) in SHAPES.items():
        for size in BATCH_SIZES:
            names = [*STUDENTS, f"de_{MEMBERS}"]
            rows = {name: f"prediction_{key}_{size}_{name}" for name in names}
            if not bench.wants(*rows.values()):
                continue
            x = torch.rand(size, architecture["in_channels"], side, side)
            x = x.to(bench.device, memory_format=torch.channels_last)
            with threads(1), torch.inference_mode():
                forms = [
                    fastest([form.to(bench.device) for form in its], x)
                    for its in _forms(architecture)
                ]
                rounds = take_turns([(form, x) for form in forms], SECONDS)
            for name, form, taken in zip(names, forms, rounds.T, strict=True):
                bench.over(
                    rows[name],
                    f"prediction for an image ({type(form).__name__}) / one network",
                    taken,
                    rounds[:, 0],
                    precision="fp32",
                    shape=f"{size} × {side}×{side}, {key}, M = {MEMBERS}, 1 thread",
                )


def _forms(architecture: Mapping[str, Any]) -> Iterator[list[nn.Module]]:
    """Of every student of `STUDENTS`, and of the ensemble."""
    for kind in STUDENTS.values():
        yield inference_forms(build_student(kind, architecture, MEMBERS))
    networks = [build_network(**architecture).eval().requires_grad_(False) for _ in range(MEMBERS)]
    yield ensemble_forms([fold_batch_norms(network) for network in networks], architecture)
