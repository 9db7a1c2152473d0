"""Training that goes on where it stopped."""

import logging
import os
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ensdistill import DamagedFile, InputError
from ensdistill.files import atomic, reading, set_aside
from ensdistill.locks import try_lock

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

        Nothing in the file is run: it may hold tensors, numbers and texts only. A damaged file is
        set aside, and training begins anew.

        Raises:
            InputError: the system cannot read the file, which says nothing about its content.
            DamagedFile: it is damaged, and being written just now.
        """
        if not self.path.exists():
            return None
        try:
            saved = self._read()
        except DamagedFile as error:
            if not set_aside(self.path):
                raise
            sentence = f"{error}; set aside as {self.path}.damaged, this training begins anew"
            logger.warning(sentence)
            print(sentence, file=sys.stderr)
            return None
        if saved["fingerprint"] != self.fingerprint:
            logger.info("%s: of another configuration, not used", self.path)
            return None
        return saved["state"]

    def _read(self) -> dict[str, Any]:
        with reading(self.path, "a training state") as file:
            with zipfile.ZipFile(file) as archive:  # PyTorch does not look at its checksums
                if (part := archive.testzip()) is not None:
                    raise zipfile.BadZipFile(f"wrong checksum of {part}")
            file.seek(0)
            saved = torch.load(file, map_location="cpu", weights_only=True)
            return {key: saved[key] for key in ("fingerprint", "state")}

    def save(self, state: dict[str, Any]) -> None:
        """Replace the file. Tensors may be on any device.

        It is forced to the disk, so that a power failure costs no more than a kill: for a WRN-28-10
        (420 MiB) some seconds, which is little if it is saved every few minutes.
        """
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
            if try_lock(folder) is False:
                raise InputError(
                    f"{self.path.parent}: another process is training this network; "
                    "wait for it or end it"
                )
            yield
        finally:
            os.close(folder)
