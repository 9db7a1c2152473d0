"""Locks on files that the kernel releases together with the process that holds them."""

import fcntl
import logging
from functools import cache
from typing import Any

logger = logging.getLogger(__name__)


def try_lock(file: Any, kind: int = fcntl.LOCK_EX) -> bool | None:
    """Lock an open file or folder, without waiting; closing it releases the lock.

    Args:
        file: its descriptor, or an object with one.
        kind: `fcntl.LOCK_EX`, or `fcntl.LOCK_SH` to exclude only those who want LOCK_EX.

    Returns:
        True if it is locked now; False if another process holds it; None where the file system
        has no locks, as some network file systems do.
    """
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:  # ENOLCK, EOPNOTSUPP, ENOSYS, 524, by the file system
        _note_once(error.strerror)
        return None
    return True


@cache
def _note_once(reason: str) -> None:
    logger.info("a file system here has no locks (%s)", reason)
