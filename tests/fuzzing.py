"""Mutated copies of a file, read one after another in a process that may end badly."""

import faulthandler
import json
import logging
import os
import resource
import shutil
import signal
import time
import traceback
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ensdistill import InputError, files
from tests.mutations import mutated

SECONDS = 10
"""Of a processor that a reader may take for one file."""
PATIENCE = 90
"""Seconds after which a reader that waits for something is ended."""
MEMORY = 2**30
"""Bytes that a reader may take beside what the process has."""
BATCH = 200
"""Copies that one process reads, unless it ends badly."""


@dataclass(frozen=True)
class Kind:
    """A kind of file that is read.

    Args:
        make: writes a sound file, and what belongs to it, into a folder; returns its path.
        read: what the product does with it; raises if what comes of it is not valid. Returns
            anything that says what was read.
        known: mutations that know the format.
        named: what a sentence may name instead of the file.
    """

    make: Callable[[Path], Path]
    read: Callable[[Path], Any]
    known: Sequence[Callable[..., bytes]] = ()
    named: Sequence[str] = ()


@dataclass
class Summary:
    """What became of the mutated copies of one kind."""

    outcomes: Counter = field(default_factory=Counter)
    """`same`: read as the sound file; `other`: read as another valid one; `refused`; `failed`."""
    failures: dict[int, str] = field(default_factory=dict)
    """By seed, what happened."""
    seconds: float = 0.0
    slowest: float = 0.0
    """Seconds that a single file took."""
    peak: int = 0
    """Bytes that the reading process took beside what it began with."""

    def __str__(self):
        counts = ", ".join(f"{self.outcomes[it]:,} {it}" for it in OUTCOMES)
        return (
            f"{sum(self.outcomes.values()):,} tried: {counts}; {self.seconds:.0f} s, one at most "
            f"{self.slowest:.2f} s, memory {self.peak / 2**20:.0f} MiB"
        )


OUTCOMES = ("same", "other", "refused", "failed")


def copies_of(name: str, kind: Kind) -> Callable[[bytes, int], bytes]:
    """What makes the mutated copy of a seed, always the same."""
    salt = zlib.crc32(name.encode())
    return lambda sound, seed: mutated(np.random.default_rng([salt, seed]), sound, kind.known)


def campaign(
    kind: Kind, folder: Path, seeds: Sequence[int], copy: Callable[[bytes, int], bytes]
) -> Summary:
    """Read mutated copies in processes of their own, and say what became of them.

    Args:
        folder: where files are written.
        copy: makes the copy of a seed from the sound content.
    """
    path, summary = kind.make(folder / "sound"), Summary()
    began, waiting = time.monotonic(), list(seeds)
    expected = kind.read(path)
    assert expected == kind.read(path), "what is read of a sound file must not vary"
    while waiting:
        batch = waiting[:BATCH]
        done = _in_a_process(kind, folder, path, expected, batch, copy, summary)
        waiting = waiting[done:]
    summary.seconds = time.monotonic() - began
    return summary


def _in_a_process(kind, folder, path, expected, batch, copy, summary) -> int:
    """How many copies of the batch are done; fewer than all if the process ended at the last."""
    begin, end = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(begin)
        try:
            with os.fdopen(end, "w", buffering=1) as told:
                _read_all(kind, folder, path, expected, batch, copy, told)
        finally:
            os._exit(0)
    os.close(end)
    with os.fdopen(begin) as told:
        lines = [json.loads(line) for line in told]
    _, status = os.waitpid(child, 0)
    for line in lines:
        summary.outcomes[line["outcome"]] += 1
        summary.slowest = max(summary.slowest, line["seconds"])
        summary.peak = max(summary.peak, line["peak"])
        if line["outcome"] == "failed":
            summary.failures[line["seed"]] = line["said"]
    if len(lines) == len(batch):
        return len(batch)
    summary.outcomes["failed"] += 1
    number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    what = "took too long" if number in (signal.SIGALRM, signal.SIGPROF) else "ended the process"
    summary.failures[batch[len(lines)]] = f"{what} ({number and signal.Signals(number).name})"
    return len(lines) + 1


def _read_all(kind, folder, path, expected, batch, copy, told) -> None:
    """In the process that may end badly: read copies, and tell a line of each."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    logging.disable()
    faulthandler.disable()
    files.SETTLED = 0
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    work = folder / "work"
    place = work / path.relative_to(folder / "sound")
    sound = path.read_bytes()
    for seed in batch:
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(folder / "sound", work, copy_function=os.link)
        place.unlink()
        began = time.process_time()
        signal.alarm(PATIENCE)
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        outcome, said = _outcome(kind, place, partial(copy, sound, seed), expected)
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        told.write(
            json.dumps(
                {
                    "seed": seed,
                    "outcome": outcome,
                    "said": said,
                    "seconds": time.process_time() - began,
                    "peak": peak * 1024,
                }
            )
            + "\n"
        )


def _outcome(kind: Kind, path: Path, make: Callable[[], bytes], expected: Any) -> tuple[str, str]:
    try:
        path.write_bytes(make())
        found = kind.read(path)
        return ("same" if found == expected else "other"), ""
    except InputError as error:
        sentence = str(error)
        if sentence.isprintable() and any(it in sentence for it in (path.name, *kind.named)):
            return "refused", sentence
        return "failed", f"a sentence without the file, or of several lines: {sentence!r}"
    except BaseException as error:
        frames = traceback.extract_tb(error.__traceback__)
        places = " < ".join(f"{Path(it.filename).name}:{it.lineno}" for it in reversed(frames[-8:]))
        return "failed", f"{type(error).__name__}: {str(error)[:200]!r} at {places}"
