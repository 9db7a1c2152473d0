"""What every workflow script does around its one call: logging, and errors in one sentence."""

import errno
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ensdistill import InputError


@contextmanager
def job(snakemake: Any) -> Iterator[None]:
    """Log to the rule's log file; end with one sentence and exit status 1 on a known failure.

    Anything unforeseen is raised on, its traceback in the log too.
    """
    logging.basicConfig(
        filename=snakemake.log[0],
        filemode="w",
        format="%(asctime)s %(levelname)s %(message)s",
    )
    logging.getLogger("ensdistill").setLevel(logging.INFO)
    logging.captureWarnings(True)
    label = " ".join([snakemake.rule, *snakemake.wildcards])
    try:
        yield
    except Exception as error:
        sentence = _sentence(error)
        if sentence is None:
            logging.exception("unforeseen")
            raise
        logging.error(sentence)
        print(f"{label}: error: {sentence}", file=sys.stderr)
        sys.exit(1)


def _sentence(error: Exception) -> str | None:
    """What to tell the user; None if the error was not foreseen."""
    if isinstance(error, InputError):
        return str(error)
    if isinstance(error, MemoryError):
        return "the memory is full: give the job more, or use fewer images or a smaller batch_size"
    if type(error).__name__ == "OutOfMemoryError":  # torch's; not every stage imports torch
        return "the GPU's memory is full: use a smaller batch_size, or a larger GPU"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"no space is left on the disk that holds {error.filename or 'the results'}"
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    return None
