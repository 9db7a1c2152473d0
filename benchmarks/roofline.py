"""What share of the hardware's best each kind of operation of a training step reaches.

The roofline of an operation is the time that its arithmetic takes at the highest rate that was
measured (`measurements.ceiling`), or its tensors at the rate of a copy, whichever is longer
[Williams, Waterman and Patterson 2009]. It holds for these operations, one after the other; fewer
or fused ones may be faster.
"""

import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.measurements import arithmetic
from benchmarks.rows import Bench
from benchmarks.workloads import CONF_ODS, Call, Workload, threads
from ensdistill.operations import macs_of

KINDS = {
    "convolution": ("convolution",),
    "batch normalisation": ("batch_norm",),
    "ReLU": ("relu", "threshold"),
    "copies": ("cat", "copy", "clone", "pad", "slice_backward"),
    "update": ("_fused_sgd", "zero"),
    "views": ("view", "permute", "detach", "as_strided", "expand", "split", "transpose", "slice"),
    "the rest": ("",),
}
"""By parts of the names of PyTorch's operations."""

STEPS = 3


class Operations(TorchDispatchMode):
    """Adds up seconds, FLOP and bytes of every kind of operation, and the roofline's seconds.

    Args:
        rate: FLOP/s at best.
        bandwidth: bytes/s at best.
    """

    def __init__(self, rate: float, bandwidth: float):
        super().__init__()
        self.rate, self.bandwidth = rate, bandwidth
        self.seconds: Counter[str] = Counter()
        self.roofline: Counter[str] = Counter()
        self.flop: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # or PyTorch would import its compiler

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
        started = clock()
        result = operation(*args, **kwargs)
        seconds = clock() - started
        name = operation.name().removeprefix("aten::")
        kind = next(kind for kind, parts in KINDS.items() if any(it in name for it in parts))
        flop = 2 * macs_of(operation, args, kwargs, result)
        tensors = [it for it in tree_leaves((args, kwargs, result)) if isinstance(it, Tensor)]
        moved = 0 if kind == "views" else sum(it.nbytes for it in tensors)
        self.seconds[kind] += seconds
        self.flop[kind] += flop
        self.bytes[kind] += moved
        self.roofline[kind] += max(flop / self.rate, moved / self.bandwidth)
        return result


def roofline(bench: Bench, workloads: Mapping[str, Workload]) -> None:
    """A row for each kind of operation of a step in float32, and one of the whole step.

    Of a student by ConfODS, and of a teacher.
    """
    wanted = {
        f"roofline_{'teacher_' if teacher else ''}{key}": (workload, teacher)
        for key, workload in workloads.items()
        for teacher in (False, True)
        if key != "calls"
    }
    if bench.device.type != "cpu" or not bench.wants(*wanted):
        return
    for name, (workload, teacher) in wanted.items():
        if not bench.wants(name):
            continue
        shape = workload.shape
        with threads(shape.threads):
            rate, bandwidth = best(bench)
            step = workload.step("fp32", **({"teacher": True} if teacher else CONF_ODS))
            step()
            with Operations(rate, bandwidth) as seen:
                for _ in range(STEPS):
                    step()
        add_rows(bench, name, seen, shape.of_teacher() if teacher else str(shape))


def best(bench: Bench) -> tuple[float, float]:
    """FLOP/s of the faster of a matrix product and a convolution, and bytes/s of a copy."""
    rates = []
    for _, call in arithmetic(bench.device, torch.float32).values():
        rates.append(_flop(call) / bench.clock(call, rounds=3).min())
    source = torch.randn(2**24)
    target = torch.empty_like(source)
    seconds = bench.clock(lambda: target.copy_(source), rounds=10).min()
    return max(rates), 2 * source.nbytes / seconds


def _flop(call: Call) -> int:
    with Operations(1.0, 1.0) as seen:
        call()
    return sum(seen.flop.values())


def add_rows(bench: Bench, name: str, seen: Operations, shape: str) -> None:
    """Seconds per step of every kind, and what share of the roofline they reach."""
    for kind in [*KINDS, "step"]:
        seconds, roof, flop, moved = (
            (sum(it.values()) if kind == "step" else it[kind]) / STEPS
            for it in (seen.seconds, seen.roofline, seen.flop, seen.bytes)
        )
        bench.alone(
            f"{name}_{kind.replace(' ', '_')}",
            f"{kind}: {flop / 1e9:.3g} GFLOP at {flop / seconds / 1e9:.3g} GFLOP/s, "
            f"{moved / 1e9:.3g} GB at {moved / seconds / 1e9:.3g} GB/s, "
            f"roofline {roof:.3g} s, {roof / seconds:.0%} of it reached",
            np.array([seconds]),
            precision="fp32",
            shape=shape,
            roofline_s=roof,
        )
