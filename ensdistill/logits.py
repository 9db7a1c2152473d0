"""The stored predictions of a network: all that metrics ever read.

A logits file has the splits of an images file, such as `/val` and `/test`, each with `logits`
float32 (N, M, K) and `labels` int64 (N,), and attributes that say what made it.
"""

import os
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ensdistill import DamagedFile, InputError
from ensdistill.files import open_hdf5

Split = tuple[NDArray[np.float32], NDArray[np.int64]]


def read_logits(path: str | os.PathLike[str], split: str) -> Split:
    """Logits (N, M, K) and labels (N,) of one split.

    Raises:
        DamagedFile: the file is damaged or lacks the split.
        InputError: some logits are not finite.
    """
    with open_hdf5(path) as file:
        logits, labels = file[f"{split}/logits"][:], file[f"{split}/labels"][:]
    if logits.ndim != 3 or labels.shape != logits.shape[:1]:
        raise DamagedFile(path, f"logits {logits.shape} and labels {labels.shape} do not pair up")
    if not np.isfinite(logits).all():
        raise InputError(f"{path}: some {split} logits are not finite")
    return logits, labels


def splits_of(path: str | os.PathLike[str]) -> list[str]:
    """The splits of a file of logits or images, such as `test` or `corrupted/fog/3`, sorted."""
    found: list[str] = []
    with open_hdf5(path) as file:
        file.visit(found.append)
    return [name.removesuffix("/labels") for name in found if name.endswith("/labels")]


def read_attributes(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What a logits file says of itself."""
    with open_hdf5(path) as file:
        return dict(file.attrs)
