"""Training that goes on where it stopped."""

import fcntl
import logging
import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ensdistill import DamagedFile, InputError
from ensdistill.files import atomic

logger = logging.getLogger(__name__)


class TrainingState:
    """A file beside a network's weights that holds all that the rest of its training depends on.

    No rule declares it, so it outlives a failed job. It is replaced as a whole: a kill in the
    middle of a write leaves the previous state. The Snakefile removes it after a run that ended
    well; earlier, a kill just before Snakemake takes note of the weights would cost everything.

    Args:
        path: the file.
        fingerprint: of all that decides the outcome; a state with another one is not picked up.
    """

    def __init__(self, path: str | os.PathLike[str], fingerprint: str):
        self.path = Path(path)
        self.fingerprint = fingerprint

    def load(self) -> dict[str, Any] | None:
        """What was saved last, on the CPU; None if there is nothing of this fingerprint.

        Raises:
            DamagedFile: the file is no state. Nothing in it is run: it may hold tensors, numbers
                and texts only.
        """
        if not self.path.exists():
            return None
        try:
            with zipfile.ZipFile(self.path) as archive:  # PyTorch does not look at its checksums
                if (part := archive.testzip()) is not None:
                    raise zipfile.BadZipFile(f"wrong checksum of {part}")
            saved = torch.load(self.path, map_location="cpu", weights_only=True)
            if saved["fingerprint"] != self.fingerprint:
                logger.info("%s: of another configuration, not used", self.path)
                return None
            return saved["state"]
        except PermissionError:
            raise
        except Exception as error:  # torch raises nearly anything
            reason = str(error).partition("\n")[0]
            raise DamagedFile(self.path, f"damaged, or no training state ({reason})") from error

    def save(self, state: dict[str, Any]) -> None:
        """Replace the file. Tensors may be on any device."""
        with atomic(self.path) as temporary:
            torch.save({"fingerprint": self.fingerprint, "state": state}, temporary)

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Keep a second process from training the same network; the kernel ends it with us.

        Raises:
            InputError: another process trains it, perhaps one that a killed run left behind.
        """
        folder = os.open(self.path.parent, os.O_RDONLY)
        try:
            try:
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError(
                    f"{self.path.parent}: another process is training this network; "
                    "wait for it or end it"
                ) from None
            except OSError as error:  # not every network file system locks folders
                logger.info("%s: cannot be locked (%s)", self.path.parent, error.strerror)
            yield
        finally:
            os.close(folder)
