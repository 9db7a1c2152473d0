"""Whether own images have changed since images.h5 was made of them: a rule's parameter.

Snakemake imports this in every process, so what is slow to import is imported where it is used.
Nothing here changes a number, so this module is no part of any stage's code digest.
"""

import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ensdistill import InputError
from ensdistill.archives import TABLES, entries, is_hidden

logger = logging.getLogger(__name__)

MISSING = "missing"
"""What stands for images that are not there and never were read."""


def known_state(
    record: str | os.PathLike[str],
    roots: str | Sequence[str],
    *,
    labelled: bool,
    columns: Mapping[str, str | None] | None = None,
) -> str:
    """What changes exactly when the images do, for a rule's parameters.

    It is found by names, sizes and times of change, without reading any file. Only if these have
    changed since the last time, all images are read and compared by checksum: of states with the
    same images the first one stands for all. Images that are not there any more, as on a disk that
    is not mounted, count as unchanged.

    Args:
        record: a file of states that are known, with the checksums of their images; see `remember`.
        roots, labelled, columns: as of `own_images`, where roots are its path.
    """
    state, known = current_state(roots, columns), _read(record)
    states = known["states"]
    if state is None:
        if states:
            logger.warning("%s: not there, so what was made of it stays as it is", roots)
        return known["made"] or MISSING
    if not states:
        return state
    if state not in states:
        from ensdistill.own_images import own_images

        logger.warning("%s: changed; reading it to see whether the images did", roots)
        try:
            images = own_images(roots, labelled=labelled, columns=columns)
            for _ in images.read():
                pass
        except InputError:
            return state  # the job will say the same
        states[state] = images.sha256()
        _write(record, known)
    return next(first for first, sha256 in states.items() if sha256 == states[state])


def remember(record: str | os.PathLike[str], state: str, sha256: str) -> None:
    """Note which images, by their checksum, a state had that were made into images.h5."""
    known = _read(record)
    known["states"][state] = sha256
    _write(record, {**known, "made": state})


def current_state(
    roots: str | Sequence[str], columns: Mapping[str, str | None] | None = None
) -> str | None:
    """A digest of names, sizes and times of all files; None if there are none.

    Of a table these are its own and those of the files that it lists. Of what cannot be read the
    reason counts.
    """
    digest, count = hashlib.sha256(), 0
    for root in map(Path, [roots] if isinstance(roots, str) else roots):
        if not root.is_dir():
            if not root.exists():
                return None
            for path in [os.fspath(root), *_listed(root, columns)]:
                digest.update(repr(_size_and_time(path)).encode())
            count += 1
            continue
        try:
            for entry in entries(root):
                if not any(map(is_hidden, entry.parts)):
                    known = (entry.parts, entry.kind, entry.size, entry.modified)
                    digest.update(repr(known).encode())
                    count += entry.kind != "folder"
        except InputError as error:
            digest.update(str(error).encode())
            count += 1
    return digest.hexdigest() if count else None


def _listed(table: Path, columns: Mapping[str, str | None] | None) -> list[str]:
    """The files of a table of paths; none of anything else, or if it cannot be read."""
    if table.suffix.lower() not in TABLES:
        return []
    from ensdistill.table_readers import listed_files

    return listed_files(table, columns)


def _size_and_time(path: str | os.PathLike[str]) -> tuple[int, int] | None:
    try:
        status = os.stat(path)
    except (OSError, ValueError):  # no path has a zero in it
        return None
    return status.st_size, status.st_mtime_ns


def _read(record: str | os.PathLike[str]) -> dict[str, Any]:
    try:
        known = json.loads(Path(record).read_text(encoding="utf-8"))
        states, made = known["states"], known["made"]
        if all(isinstance(it, str) for it in (*states, *states.values(), made or "")):
            return {"states": states, "made": made or None}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass  # as if nothing had been made yet
    return {"states": {}, "made": None}


def _write(record: str | os.PathLike[str], known: dict[str, Any]) -> None:
    from ensdistill.files import write_text

    try:
        write_text(record, json.dumps(known))
    except OSError as error:  # then all is read again the next time
        logger.warning("%s: %s", record, error.strerror)
