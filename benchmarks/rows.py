"""Rows of results: how they are timed, and how they are shown."""

import platform
import time
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.workloads import CPU_THREADS, Call
from ensdistill.devices import prepare

WARM_UP = 2

Row = dict[str, Any]


class Bench:
    """Collects rows.

    Args:
        wanted: beginnings of the names of the rows to make; none for all.
    """

    def __init__(self, wanted: list[str]):
        self.wanted = wanted
        self.rows: list[Row] = []

    @cached_property
    def device(self) -> torch.device:
        """Taken when first needed: a GPU that is held here is not free for jobs of Snakemake."""
        return prepare(CPU_THREADS, {})

    def wants(self, *names: str) -> bool:
        """Whether one of these rows is to be made."""
        pairs = ((name, start) for name in names for start in self.wanted)
        return not self.wanted or any(name.startswith(start) for name, start in pairs)

    def clock(self, *calls: Call, rounds: int) -> np.ndarray:
        """Seconds (rounds, calls), the calls taking turns, after a warm-up."""
        taken = [[self._seconds(call) for call in calls] for _ in range(WARM_UP + rounds)]
        return np.array(taken[WARM_UP:])

    def _seconds(self, call: Call) -> float:
        if self.device.type == "cpu":
            # Of one thread the processor's time, which other processes hardly change.
            clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
            started = clock()
            call()
            return clock() - started
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1000

    def compare(
        self,
        name: str,
        what: str,
        calls: Callable[[], tuple[Call, Call]],
        *,
        rounds: int,
        over: bool = False,
        **facts: Any,
    ) -> None:
        """A row of ours and a reference.

        Args:
            name, what: of the row.
            calls: makes ours and the reference; called only if the row is wanted.
            rounds: n.
            over: the ratio is ours / reference, what ours costs more. Else it is reference / ours,
                how many times as fast ours is.
            **facts: more of the row.
        """
        if not self.wants(name):
            return
        self._compared(name, what, *self.clock(*calls(), rounds=rounds).T, over, facts)

    def over(
        self, name: str, what: str, ours: np.ndarray, reference: np.ndarray, **facts: Any
    ) -> None:
        """A row of what ours costs more, from seconds of the same rounds; if it is wanted."""
        if self.wants(name):
            self._compared(name, what, ours, reference, True, facts)

    def _compared(self, name, what, ours, reference, over: bool, facts: Row) -> None:
        ratios = ours / reference if over else reference / ours
        quartiles = np.quantile(ratios, [0.25, 0.75])
        medians = np.median(ours), np.median(reference), np.median(ratios)
        self._add(name, what, *medians, quartiles, len(ratios), facts)

    def alone(self, name: str, what: str, seconds: np.ndarray, **facts: Any) -> None:
        """A row of something that has no reference; its spread are the least and most seconds."""
        ends = [np.min(seconds), np.max(seconds)]
        self._add(name, what, np.median(seconds), None, None, ends, len(seconds), facts)

    def _add(self, name, what, ours, reference, ratio, spread, n, facts: Row) -> None:
        row = {
            "name": name,
            "what": what,
            "ours_s": float(ours),
            "reference_s": None if reference is None else float(reference),
            "ratio": None if ratio is None else float(ratio),
            "spread": [float(end) for end in spread],
            "n": n,
            "precision": None,
            "shape": None,
            **facts,
        }
        self.rows.append(row)
        print(f"{name}: {ours:.3g} s" + (f", ratio {ratio:.2f}" if ratio else ""), flush=True)


def hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(": ")[1] for line in lines if line.startswith("model name")), "CPU")
    features = next((line.split() for line in lines if line.startswith("flags")), [])
    known = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in features]
    used = torch.backends.cpu.get_cpu_capability()
    return f"{model}, {CPU_THREADS} threads, {' '.join(known)}, of which PyTorch uses {used}"


def table(rows: list[Row], shares: Mapping[str, float]) -> str:
    """The rows as Markdown."""

    def number(value: float | None) -> str:
        return "" if value is None else f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"

    lines = [
        "# Benchmarks",
        "",
        f"{rows[0]['hardware']}; Python {platform.python_version()}, PyTorch {torch.__version__}. "
        "`make bench`. Medians of n rounds in one process, taking turns; spread: quartiles of the "
        "ratios, or least and most seconds where there is no ratio. Memory: above what the process "
        "had before.",
        "",
        "| name | what | ours, s | reference, s | ratio | spread | n | precision | shape | MiB |",
        "|:--|:--|--:|--:|--:|--:|--:|:--|:--|--:|",
    ]
    for row in rows:
        cells = [
            f"`{row['name']}`",
            row["what"],
            number(row["ours_s"]),
            number(row["reference_s"]),
            number(row["ratio"]),
            " – ".join(map(number, row["spread"])),
            str(row["n"]),
            row["precision"] or "",
            row["shape"] or "",
            " / ".join(f"{row[key]:.0f}" for key in ("ours_mb", "reference_mb") if key in row),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    if shares:
        lines += ["", "Where a ConfODS step of ResNet-32 in bfloat16 spends its time:", ""]
        lines += ["| operations | share |", "|:--|--:|"]
        order = sorted(shares, key=shares.__getitem__, reverse=True)
        lines += [f"| {kind} | {shares[kind]:.0%} |" for kind in order]
    return "\n".join([*lines, ""])
