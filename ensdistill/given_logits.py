"""Logits that were computed elsewhere, of a method that is judged beside the students.

The file is HDF5 with the splits of the study's images: `/val/logits` and `/test/logits`, each
(N, M, K) or, of one network, (N, K), and `/val/labels` and `/test/labels` (N,), in the order of
results/<study>/images.h5. Of shifted images it has the splits of results/<study>/shifted.h5, such
as `/corrupted/fog/3/logits`. An attribute `prediction` says what the logits mean if that is no
mixture of softmax distributions (see `ensdistill.predictions`), and `parameters` how many the
method has.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from ensdistill import DamagedFile, InputError
from ensdistill.class_order import class_order
from ensdistill.digests import attributes
from ensdistill.hdf5 import open_hdf5, write_hdf5
from ensdistill.images import read_description
from ensdistill.predictions import kind_of, splits_of

UNUSED = ("train", "held_out")
"""Splits that nothing is judged on."""
NUMBERS = {"concentration_offset": float, "parameters": int}
SAID = ("prediction", *NUMBERS)
"""Attributes of the file that count."""


def take_over(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    images: str | os.PathLike[str],
    described: str | os.PathLike[str],
    classes: Sequence[str] | None,
    origin: Mapping[str, Any],
) -> None:
    """Write logits of others as logits of this package, split by split.

    Args:
        source: their file.
        output: path.
        images: images.h5 or shifted.h5 of the study, whose splits and labels they must have.
        described: its images.h5.
        classes: names of the outputs in their order, if that is not the study's.
        origin: whose logits they become; written into the file.

    Raises:
        InputError: a split is missing, or is not of these images: one sentence that says what.
    """
    known = read_description(described)["classes"]
    try:
        order = class_order(classes, known)
    except ValueError as error:
        raise InputError(f"{source}: {error}") from None
    splits = [name for name in splits_of(images) if name not in UNUSED]
    try:
        with open_hdf5(source) as file:
            said = _attributes(source, file)
        made = attributes(**origin, **said, given={"path": os.fspath(source)})
        write_hdf5(output, _arrays(source, images, splits, order, len(classes or known)), made)
    except DamagedFile as error:
        if error.path != source:
            raise
        # It is the user's, and is not set aside as ours are.
        raise InputError(str(error)) from None


def _attributes(source: str | os.PathLike[str], file: h5py.File) -> dict[str, Any]:
    """What the file says of its logits: prediction, and where they are given its parameters."""
    said = {"prediction": "mixture", **{key: file.attrs[key] for key in SAID if key in file.attrs}}
    said["prediction"] = str(said["prediction"])
    for key, kind in NUMBERS.items():
        if key in said:
            try:
                said[key] = kind(said[key])
                if not abs(said[key]) < 2**63:  # no HDF5 file has larger ones
                    raise ValueError
            except (TypeError, ValueError, OverflowError):
                raise InputError(f"{source}: the attribute {key!r} is no number") from None
    try:
        kind_of(said)
    except ValueError as error:
        raise InputError(f"{source}: {error}") from None
    return said


def _arrays(
    source: str | os.PathLike[str],
    images: str | os.PathLike[str],
    splits: Sequence[str],
    order: Sequence[int],
    outputs: int,
) -> Iterator[tuple[str, NDArray[Any]]]:
    """Checked logits and labels; one split at a time is in memory."""
    for split in splits:
        with open_hdf5(images) as file:
            labels = file[f"{split}/labels"][:]
        with open_hdf5(source) as file:
            names = f"{split}/logits", f"{split}/labels"
            for name in names:
                if not isinstance(file.get(name), h5py.Dataset):
                    raise InputError(f"{source}: has no /{name}, which {images} has images for")
            logits, theirs = (file[name][:] for name in names)
        logits = logits[:, None] if logits.ndim == 2 else logits
        if logits.ndim != 3 or logits.dtype.kind != "f" or 0 in logits.shape:
            raise InputError(
                f"{source}: /{split}/logits {logits.dtype} {logits.shape} are no logits: they are "
                "floating point (N, M, K), or (N, K) of one network"
            )
        if logits.shape[2] != outputs:
            raise InputError(
                f"{source}: /{split}/logits have {logits.shape[2]} columns for {outputs} classes"
            )
        if theirs.shape != labels.shape or len(logits) != len(labels):
            raise InputError(
                f"{source}: /{split} has {len(logits)} logits and labels {theirs.shape}, and "
                f"{images} {len(labels)} images"
            )
        if (theirs != labels).any():
            place = int((theirs != labels).argmax())
            raise InputError(
                f"{source}: /{split}/labels are not those of {images}: the image at {place} has "
                f"label {labels[place]}, not {theirs[place]}; logits must be in the order there"
            )
        if not np.isfinite(logits).all():
            raise InputError(f"{source}: some of /{split}/logits are not finite")
        yield names[0], logits[:, :, order].astype(np.float32)
        yield names[1], labels
