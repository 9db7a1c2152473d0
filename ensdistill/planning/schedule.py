"""Jobs that run on paper, as Snakemake's greedy scheduler would start them."""

import heapq
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from graphlib import TopologicalSorter

from ensdistill import InputError


@dataclass(frozen=True)
class Task:
    """What the schedule knows of a job."""

    seconds: float
    after: frozenset[int] = frozenset()
    """Numbers of the tasks that must be done before."""
    cores: int = 1
    """CPU cores; a machine that has fewer gives all it has."""
    cards: int = 0
    priority: int = 0
    size: float = 0.0
    """Of its input files: of tasks with one priority, Snakemake starts that with the most first."""


@dataclass(frozen=True)
class Schedule:
    """When tasks start on a machine."""

    starts: dict[int, float]
    """Seconds, by number."""
    makespan: float
    """Seconds until the last one ends."""
    core_seconds: float
    """Of all tasks: time × cores."""
    card_seconds: float
    cores: int
    cards: int | None

    @property
    def idle(self) -> float:
        """The share of the time of all cards in which they compute nothing; of cores without."""
        used, there = self.core_seconds, self.cores
        if self.cards is not None:
            used, there = self.card_seconds, self.cards
        return 1 - used / (there * self.makespan) if self.makespan else 0.0


def schedule(tasks: Mapping[int, Task], cores: int, cards: int | None = None) -> Schedule:
    """Start every task as soon as there is room for it.

    Whenever a task has ended, the waiting ones whose predecessors are done are gone through, those
    of the highest priority and the largest inputs first; each that fits into what is free starts
    [`snakemake --scheduler greedy`]. None waits for room that a smaller one takes.

    Args:
        cores, cards: of the machine; None where tasks need no card, whatever they say.

    Raises:
        InputError: a task needs more cards than there are.
        graphlib.CycleError: tasks wait for each other.
    """
    needs = {
        number: (min(task.cores, cores), 0 if cards is None else task.cards)
        for number, task in tasks.items()
    }
    if cards is not None and (most := max((it[1] for it in needs.values()), default=0)) > cards:
        raise InputError(f"a job needs {most} cards, and there are {cards}")
    order = TopologicalSorter({number: task.after for number, task in tasks.items()})
    order.prepare()
    # Tasks of equal needs fit or do not fit together, so that only the first of each is looked at.
    waiting: dict[tuple[int, int], list[tuple[int, float, int]]] = defaultdict(list)
    running: list[tuple[float, int]] = []
    free, now, starts = [cores, cards or 0], 0.0, dict[int, float]()
    while order.is_active():
        for number in order.get_ready():
            task = tasks[number]
            heapq.heappush(waiting[needs[number]], (-task.priority, -task.size, number))
        while fitting := [
            (queue[0], need)
            for need, queue in waiting.items()
            if queue and need[0] <= free[0] and need[1] <= free[1]
        ]:
            _, need = min(fitting)
            number = heapq.heappop(waiting[need])[2]
            starts[number] = now
            free = [free[0] - need[0], free[1] - need[1]]
            heapq.heappush(running, (now + tasks[number].seconds, number))
        now, number = heapq.heappop(running)
        free = [free[0] + needs[number][0], free[1] + needs[number][1]]
        order.done(number)
    return Schedule(
        starts,
        now,
        sum(tasks[number].seconds * need[0] for number, need in needs.items()),
        sum(tasks[number].seconds * need[1] for number, need in needs.items()),
        cores,
        cards,
    )


def critical_path(tasks: Mapping[int, Task]) -> list[int]:
    """The numbers of the longest chain of tasks: no machine is faster than it."""
    ends: dict[int, float] = {}
    before: dict[int, int | None] = {}
    for number in TopologicalSorter({it: task.after for it, task in tasks.items()}).static_order():
        task = tasks[number]
        before[number] = max(task.after, key=lambda it: (ends[it], -it), default=None)
        last = before[number]
        ends[number] = task.seconds + (0.0 if last is None else ends[last])
    path: list[int] = []
    place = max(ends, key=lambda it: (ends[it], -it), default=None)
    while place is not None:
        path.append(place)
        place = before[place]
    return path[::-1]
