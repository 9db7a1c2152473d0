"""Training steps as CUDA graphs: all kernels of a step are begun by one call of the host.

What a graph computes it computes in the same memory each time. Images and labels are copied there
before; learning rates are tensors; random numbers come from generators that the graph knows, so
they are those of a step without it. What the host decides in a step (`Step.decide`), such as which
teacher is the source of ODS, is fixed in a graph, so there is one for each outcome.

The first steps of an outcome are ordinary ones: in them libraries choose their algorithms, and the
optimiser makes its momenta. Capturing computes nothing. So there is nothing to be restored
afterwards, and training by graphs gives the bits of training without them. For the same reason
autocast keeps its cache: it begins and ends within the step.
"""

import logging
import warnings
from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import replace
from typing import Any, Protocol

import torch

from ensdistill.students import Choice, Step

logger = logging.getLogger(__name__)

WARM_UPS = 2
"""Ordinary steps of an outcome before its graph is captured."""

MOST_GRAPHS = 64
"""Graphs that are kept; outcomes that change with the epoch would make more and more."""

MOST_OUTCOMES = 100
"""Different ones, none of which has come often enough: then there is no use in graphs."""

UNKNOWN = "a step draws random numbers on the CPU"
"""Other than by `Step.decide`: a graph would repeat those of its capture."""

Call = Callable[[], None]
Take = Callable[[Step], None]
"""Computes a whole training step. All that it leaves is in the memory where it was before."""


class Capturer(Protocol):
    """Makes graphs."""

    def warm_up(self, step: Call) -> str | None:
        """Compute an ordinary step; returned is why it can be no graph, if it cannot."""

    def capture(self, step: Call, generator: torch.Generator) -> Call:
        """What repeats a step from now on; nothing is computed yet.

        Args:
            generator: from which the step draws, beside the global one of its device.

        Raises:
            RuntimeError: it does something that cannot be captured.
        """


class CudaCapturer:
    """Captures on a stream of its own, on which the ordinary steps before are computed too."""

    def __init__(self) -> None:
        self.stream = torch.cuda.Stream()
        self.pool: Any = None

    def warm_up(self, step: Call) -> str | None:
        now, on_cpu = torch.cuda.current_stream(), torch.get_rng_state()
        self.stream.wait_stream(now)
        with torch.cuda.stream(self.stream), warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                step()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        now.wait_stream(self.stream)
        if not torch.equal(torch.get_rng_state(), on_cpu):
            return UNKNOWN
        waits = [it for it in found if "called a synchronizing" in str(it.message)]
        for it in found:
            if it not in waits:
                warnings.warn_explicit(it.message, it.category, it.filename, it.lineno)
        return (
            f"a step waits for the GPU ({waits[0].filename}:{waits[0].lineno})" if waits else None
        )

    def capture(self, step: Call, generator: torch.Generator) -> Call:
        generators = (generator, torch.cuda.default_generators[torch.cuda.current_device()])
        states = [it.get_state() for it in generators]
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(generator)
        try:
            # Graphs may share their memory: none leaves anything in it that another one needs.
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
                step()
        except RuntimeError:
            for it, state in zip(generators, states, strict=True):
                # They would wait for the end of the capture for ever.
                it.graphsafe_set_state(torch.Generator(it.device).graphsafe_get_state())
                it.set_state(state)
            raise
        self.pool = graph.pool()
        return graph.replay


def capturer_for(device: torch.device) -> Capturer | None:
    """What makes graphs on a device; None where there are none."""
    return CudaCapturer() if device.type == "cuda" else None


def by_graphs(take: Take, optimizer: torch.optim.Optimizer, device: torch.device) -> Take:
    """The same steps, computed by graphs where the device has them."""
    capturer = capturer_for(device)
    if capturer is None:
        logger.info("steps are not computed by CUDA graphs: there are none on a %s", device.type)
        return take
    return StepGraphs(take, optimizer, capturer)


class StepGraphs:
    """Takes steps of one training, by graphs where it can.

    Args:
        take: see `Take`.
        optimizer: of that step; its learning rates become tensors.
        capturer: makes the graphs.
    """

    def __init__(self, take: Take, optimizer: torch.optim.Optimizer, capturer: Capturer):
        self.take, self.optimizer, self.capturer = take, optimizer, capturer
        self.choices: list[Choice] | None = None
        self.met: Counter[Hashable] = Counter()
        self.graphs: dict[Hashable, Call] = {}
        self.inputs: dict[str, Any] = {}
        self.steps = self.by_graphs = 0
        self.given_up = False
        for group in optimizer.param_groups:
            device = group["params"][0].device
            # Fused optimisers take float32 on a GPU, and the number itself on a CPU.
            dtype = torch.float32 if device.type == "cuda" else torch.float64
            group["lr"] = torch.tensor(float(group["lr"]), dtype=dtype, device=device)

    def __call__(self, step: Step) -> None:
        """Compute a step, whose generators have been seeded."""
        self.steps += 1
        if self.given_up:
            self.take(step)
            return
        start = step.host.get_state()
        outcome = None if self.choices is None else self._outcome(step)
        step.host.set_state(start)
        if outcome is None or (outcome not in self.graphs and self.met[outcome] < WARM_UPS):
            self._ordinary(step)
            return
        self._fill(step)
        if outcome not in self.graphs and not self._capture(step, outcome):
            self.take(step)
            return
        self.graphs[outcome]()
        self.by_graphs += 1

    def _outcome(self, step: Step) -> tuple[Hashable, ...]:
        """What the host decides in a step, with the draws that this takes."""
        assert self.choices is not None
        assert step.student is not None
        return step.student.phase, *(choice(step) for choice in self.choices)

    def _ordinary(self, step: Step) -> None:
        """Compute a step, and learn what is decided in it."""
        noted: list[Choice] = []

        def note(choice: Choice, step: Step) -> Any:
            noted.append(choice)
            return choice(step)

        start = step.host.get_state()
        refusal = self.capturer.warm_up(lambda: self.take(replace(step, decider=note)))
        drawn, self.choices = step.host.get_state(), noted
        step.host.set_state(start)
        self.met[self._outcome(step)] += 1
        if not torch.equal(step.host.get_state(), drawn):
            refusal = UNKNOWN
        if len(self.met) > MOST_OUTCOMES and not self.graphs:
            refusal = "the host decides something else in each step"
        if refusal:
            self._give_up(refusal)

    def _fill(self, step: Step) -> None:
        """Copy what differs between steps to where graphs look for it."""
        for name in ("x", "y", "held_out"):
            value = getattr(step, name)
            if value is None:
                continue
            if name not in self.inputs:
                self.inputs[name] = torch.empty_like(value)
            self.inputs[name].copy_(value)

    def _capture(self, step: Step, outcome: tuple[Hashable, ...]) -> bool:
        """Make the graph of an outcome; whether it could be made."""
        if len(self.graphs) >= MOST_GRAPHS:
            self.graphs.clear()
        fixed = replace(step, **self.inputs)

        def again() -> None:
            _, *decisions = outcome
            known = iter(decisions)
            self.take(replace(fixed, decider=lambda choice, step: next(known)))

        capturable = [group for group in self.optimizer.param_groups if "capturable" in group]
        for group in capturable:
            group["capturable"] = True
        try:
            self.graphs[outcome] = self.capturer.capture(again, step.generator)
        except RuntimeError as error:
            self._give_up(str(error).partition("\n")[0])
            return False
        finally:
            for group in capturable:
                group["capturable"] = False
        return True

    def _give_up(self, reason: str) -> None:
        self.given_up = True
        self.graphs.clear()
        logger.info("steps are not computed by CUDA graphs: %s", reason)
