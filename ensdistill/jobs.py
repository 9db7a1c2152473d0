"""What every workflow script does around its one call: logging, signals, errors in one sentence."""

import atexit
import ctypes
import errno
import gc
import hashlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ensdistill import DamagedFile, InputError
from ensdistill.digests import attributes
from ensdistill.files import explain, is_of_memory, reading, set_aside

ENDINGS = (signal.SIGTERM, signal.SIGINT)
"""Signals that ask a process to end."""

PR_SET_PDEATHSIG = 1  # linux/prctl.h


class Interrupted(KeyboardInterrupt):
    """A signal came: SIGTERM from a scheduler, SIGINT from Ctrl-C.

    Args:
        number: of the signal.
        where: what was interrupted.
    """

    def __init__(self, number: int, where: str = ""):
        super().__init__(f"interrupted by {signal.Signals(number).name} {where}".rstrip())
        self.number = number


@contextmanager
def job(snakemake: Any) -> Iterator[None]:
    """Log to the rule's log file; end with one sentence and exit status 1 on a known failure.

    Warnings of this package are printed too.

    On SIGTERM and SIGINT half-written files are removed, and the exit status is 128 more than the
    signal's number. An input that is found damaged is set aside. Anything unforeseen is raised on,
    its traceback in the log too.
    """
    # Emptied first and then added to, as other processes of the job may add to it too.
    Path(snakemake.log[0]).write_bytes(b"")
    logging.basicConfig(
        filename=snakemake.log[0],
        filemode="a",
        format="%(asctime)s %(levelname)s %(message)s",
    )
    label = " ".join([snakemake.rule, *snakemake.wildcards])
    terminal = logging.StreamHandler()
    terminal.setLevel(logging.WARNING)
    terminal.setFormatter(logging.Formatter(f"{label}: warning: %(message)s"))
    logging.getLogger("ensdistill").setLevel(logging.INFO)
    logging.getLogger("ensdistill").addHandler(terminal)
    logging.captureWarnings(True)
    # What libraries print of their own while they give up.
    sys.unraisablehook = lambda it: logging.debug("%s", it.err_msg, exc_info=it.exc_value)
    sys.excepthook = lambda *error: logging.debug("", exc_info=error)
    for number in ENDINGS:
        signal.signal(number, interrupt)
    status = 1
    try:
        yield
        gc.freeze()  # or the interpreter would search all of PyTorch for garbage before it ends
        atexit.register(_say_no_more)
        return
    except Interrupted as interruption:
        for number in ENDINGS:
            signal.signal(number, signal.SIG_IGN)
        sentence: str | None = str(interruption)
        status = 128 + interruption.number
    except DamagedFile as error:
        sentence = f"{error}; {_set_aside(error.path)}"
    except Exception as error:
        sentence = to_tell(error)
        if sentence is None:
            logging.exception("unforeseen")
            sys.excepthook = sys.__excepthook__
            raise
    logging.error(sentence)
    print(f"{label}: error: {sentence}", file=sys.stderr)
    sys.exit(status)


def fingerprint(snakemake: Any) -> str:
    """A digest of all that decides what a job makes: its parameters and its inputs' contents."""
    contents = []
    for path in snakemake.input:
        with reading(path, "readable") as file:
            contents.append(hashlib.file_digest(file, "sha256").hexdigest())
    return attributes(inputs=contents, params=dict(snakemake.params.items()))["digest"]


@contextmanager
def deferred_interrupts() -> Iterator[Callable[[], int]]:
    """Let SIGTERM and SIGINT wait until the work inside is at a point where it can be stopped.

    Yields:
        a function that returns the number of the first signal that came, 0 if none has. A SIGINT
        after another signal acts at once; a scheduler repeats SIGTERM without meaning more by it.
    """
    came: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # where signals never come
        yield lambda: 0
        return

    def note(number: int, frame: Any) -> None:
        if came and number == signal.SIGINT:
            raise Interrupted(number)
        came.append(number)

    before = {number: signal.signal(number, note) for number in ENDINGS}
    try:
        yield lambda: came[0] if came else 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _say_no_more() -> None:
    """Let nothing be printed while the interpreter ends: Triton calls leaked what is frozen."""
    sys.stderr.flush()
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)


def end_with_parent() -> None:
    """Be killed when the process that started this one ends, however it does (on Linux)."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def interrupt(number: int, frame: Any) -> None:
    """What a job does at a signal in `ENDINGS`."""
    raise Interrupted(number)


def _set_aside(path: str | os.PathLike[str]) -> str:
    """Move a damaged file out of the way; what to tell the user."""
    again = f"`snakemake --cores all {path}` makes it again"
    try:
        if set_aside(path):
            return f"set aside as {path}.damaged, {again}"
        return "it is being written just now: run again when that has ended"
    except OSError as error:
        return f"delete it ({error.strerror}), {again}"


def to_tell(error: Exception) -> str | None:
    """What to tell the user; None if the error was not foreseen."""
    if isinstance(error, InputError):
        return str(error)
    # PyTorch's own: of a GPU, which not every stage can name, and of the CPU.
    if type(error).__name__ == "OutOfMemoryError":
        return "the GPU's memory is full: use a smaller batch_size, or a larger GPU"
    if is_of_memory(error):
        return "the memory is full: give the job more, or use fewer images or a smaller batch_size"
    if isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker"):
        return (
            "a process that reads images was killed, as the system does where the memory is full: "
            "give the job more"
        )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"no space is left on the disk that holds {error.filename or 'the results'}"
    if isinstance(error, OSError) and error.filename:
        return explain(error)
    return None
