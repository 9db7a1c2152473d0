"""Images of one's own, found, decoded and shown to a finished student, batch by batch.

Nothing is kept of an image whose answer was taken: memory does not grow with their number. What is
in folders and archives is treated as `ensdistill.folders` says, except that every image counts,
wherever it lies, and that one which cannot be read is told with its error, in its place.
"""

import os
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ensdistill import InputError
from ensdistill.archives import PACKED, Entry, entries, is_hidden
from ensdistill.deployment import Answers, Deployment, Predictor
from ensdistill.folders import treatment_of
from ensdistill.pictures import as_array, centre, decode, squared

BATCH = 64
"""Images that a student is asked about at once; as many more are decoded meanwhile."""
MOST_WORKERS = 8
"""Threads that decode."""


class Found(NamedTuple):
    """An image file that was met."""

    place: str
    """Its path; in an archive that of the archive, and then its own."""
    parts: tuple[str, ...]
    """Its path below the folder or in the archive, of `archives.path_parts`."""
    read: Callable[[], bytes]
    """Gives its content, or raises an InputError."""


class Picture(NamedTuple):
    """An image file that was decoded, or could not be."""

    place: str
    parts: tuple[str, ...]
    image: NDArray[np.uint8] | None
    """(C, H, W) as the network saw images in evaluation; None if it is broken."""
    error: str | None = None
    """Why it is broken, in one sentence."""
    resized: bool = False
    """Whether it was resized, though the study resized none; see `as_trained`."""


def image_files(paths: Iterable[str | os.PathLike[str]], skipped: Counter[str]) -> Iterator[Found]:
    """Image files in the order given, and sorted by name within folders.

    Args:
        paths: images, folders (with all folders in them) and archives, which are not unpacked.
        skipped: counts files that are not read, by the keys of `folders.TREATMENTS`.

    Yields:
        of an archive or a folder that cannot be read to its end also itself, with that error.

    Raises:
        InputError: one of the paths does not exist, or is neither a file nor a folder; before the
            first image.
    """
    roots = [Path(path) for path in paths]
    for root in roots:
        if not root.exists():
            raise InputError(f"{root}: no such file or folder")
        if not (root.is_file() or root.is_dir()):
            raise InputError(f"{root}: is neither a file nor a folder")
    return (found for root in roots for found in _below(root, skipped))


def _below(root: Path, skipped: Counter[str]) -> Iterator[Found]:
    if not root.is_dir() and not root.name.lower().endswith(PACKED):
        yield Found(str(root), (root.name,), partial(content_of, root))
        return
    try:
        for entry in entries(root):
            if treatment := treatment_in(entry):
                if treatment == "read":
                    yield Found(entry.place, entry.parts, _reader(entry))
                else:
                    skipped[treatment] += 1
    except InputError as error:
        yield Found(str(root), (), partial(_fail, error))


def content_of(path: Path) -> bytes:
    """Of an image file that was named, and may be gone by now.

    Raises:
        InputError: it cannot be read, or is too large to be an image.
    """
    try:
        size = path.stat().st_size
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from error
    parts, opened = (path.name,), lambda: path.open("rb")
    return Entry(path.parent, str(path), parts, "file", size, open=opened).read()


def treatment_in(entry: Entry) -> str:
    """What is done with an entry, a key of `folders.TREATMENTS`; nothing of a folder."""
    if entry.kind == "folder" or not entry.parts:
        return ""
    if any(map(is_hidden, entry.parts)):
        return "hidden"
    try:
        return treatment_of(entry)
    except InputError:  # its first bytes cannot be read, as its row will say
        return "read"


def _reader(entry: Entry) -> Callable[[], bytes]:
    """What reads an entry later: those of archives must be read at once."""
    if entry.kind == "link":
        return partial(_fail, InputError(f"{entry.place}: is a link that cannot be followed"))
    if entry.root.is_dir():
        return entry.read
    try:
        content = entry.read()
    except InputError as error:
        return partial(_fail, error)
    return lambda: content


def _fail(error: InputError) -> NoReturn:
    raise error


def as_trained(content: bytes, known: Deployment, place: str) -> tuple[NDArray[np.uint8], bool]:
    """The pixels (C, H, W) of a picture as the network saw images in evaluation.

    Where the study resized images, so is this one: its centre square, bicubic, then the centre
    crop. Where it did not, a picture of the study's size stays as it is; of another size its
    centre square is resized to the study's, if that is a square.

    Returns:
        the pixels, and whether it was resized by the last rule.

    Raises:
        InputError: it cannot be read, or it has another size, which is no square.
    """
    picture, side = decode(place, content), known.resize
    other = False
    if not side and known.size and known.size != picture.size[::-1]:
        (height, side), other = known.size, True
        if height != side:
            raise InputError(
                f"{place}: has {picture.width}×{picture.height} pixels, and the student takes "
                f"{side}×{height}"
            )
    return centre(as_array([squared(picture, side)], known.mode)[0], known.crop), other


def decoded(found: Found, known: Deployment) -> Picture:
    """An image file's picture, or why there is none."""
    try:
        image, resized = as_trained(found.read(), known, found.place)
    except InputError as error:
        sentence = str(error).removeprefix(f"{found.place}: ")
        return Picture(found.place, found.parts, None, sentence)
    return Picture(found.place, found.parts, image, None, resized)


def ahead(found: Iterable[Found], known: Deployment, most: int) -> Iterator[Picture]:
    """Pictures in the order of their files, of which at most `most` are decoded ahead."""
    waiting: deque[Future[Picture]] = deque()
    pool = ThreadPoolExecutor(min(MOST_WORKERS, os.cpu_count() or 1))
    with warnings.catch_warnings():
        # As each decoder says for itself, but these filters belong to all threads together.
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            for it in found:
                waiting.append(pool.submit(decoded, it, known))
                if len(waiting) >= most:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def answered(
    predictor: Predictor, found: Iterable[Found], batch_size: int = BATCH
) -> Iterator[tuple[list[Picture], Answers | None]]:
    """Pictures in order, batch by batch, and what the student says of those that are not broken.

    Where the size of its images is not known, pictures may have any, and are taken one by one.

    Raises:
        InputError: the student cannot take them, or its answers are not finite.
    """
    known = predictor.deployment
    size = batch_size if known.size or known.resize else 1
    pictures = ahead(found, known, size)
    while batch := list(islice(pictures, size)):
        images = [it.image for it in batch if it.image is not None]
        yield batch, _ask(predictor, np.stack(images)) if images else None


def _ask(predictor: Predictor, images: NDArray[np.uint8]) -> Answers:
    try:
        answers = predictor(images)
    except (AssertionError, RuntimeError, ValueError) as error:
        if predictor.deployment.size:
            raise
        height, width = images.shape[2:]
        reason = " ".join(str(error).split())
        raise InputError(
            f"the student takes no pictures of {width}×{height} pixels ({reason})"
        ) from error
    if not np.isfinite(answers.probabilities).all():
        raise InputError("some of the student's probabilities are not finite")
    return answers
