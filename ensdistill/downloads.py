"""The official archives of the downloaded sources, fetched resumably and known by checksum.

Snakemake imports this in every process, so what is slow to import is imported where it is used.
"""

import hashlib
import logging
import os
import time
from pathlib import Path
from typing import NamedTuple

from ensdistill import DamagedFile, InputError
from ensdistill.locks import try_lock

logger = logging.getLogger(__name__)

ATTEMPTS = 3
"""How often a download is tried before it is given up until the next run."""
TIMEOUT = (10, 60)
"""Seconds to wait for a connection, and for the next bytes."""
LARGEST = 1 << 32
"""Bytes that an archive may have; the official ones have at most 2.9e9."""
BLOCK = 1 << 20
"""Bytes read at a time."""


class Archive(NamedTuple):
    """Where an official archive is, and the MD5 that its publisher states."""

    url: str
    md5: str


CIFAR = "https://www.cs.toronto.edu/~kriz"
SVHN = "http://ufldl.stanford.edu/housenumbers"
ZENODO = "https://zenodo.org/records"
CIFAR_10H = "https://raw.githubusercontent.com/jcpeterson/cifar-10h/master/data"

ARCHIVES = {
    "cifar-10-python.tar.gz": Archive(
        f"{CIFAR}/cifar-10-python.tar.gz", "c58f30108f718f92721af3b95e74349a"
    ),
    "cifar-100-python.tar.gz": Archive(
        f"{CIFAR}/cifar-100-python.tar.gz", "eb9058c3a382ffc7106e4002c42a8d85"
    ),
    "svhn_train_32x32.mat": Archive(f"{SVHN}/train_32x32.mat", "e26dedcc434d2e4c54c9b2d4a06d8373"),
    "svhn_test_32x32.mat": Archive(f"{SVHN}/test_32x32.mat", "eb5a983be6a315427106f1b164d9cef3"),
    "tiny-imagenet-200.zip": Archive(
        "http://cs231n.stanford.edu/tiny-imagenet-200.zip", "90528d7ca1a48142e341f4ef8d21d0de"
    ),
    "CIFAR-10-C.tar": Archive(
        f"{ZENODO}/2535967/files/CIFAR-10-C.tar", "56bf5dcef84df0e2308c6dcbcbbd8499"
    ),
    "CIFAR-100-C.tar": Archive(
        f"{ZENODO}/3555552/files/CIFAR-100-C.tar", "11f0ed0f1191edbf9fa23466ae6021d3"
    ),
}
"""The archives by the names they have here."""

ANSWERS = {
    "cifar10h-probs.npy": Archive(
        f"{CIFAR_10H}/cifar10h-probs.npy", "7b41f73eee90fdefc73bfc820ab29ba8"
    ),
}
"""More archives, of what people answered of test images. Their publisher states no MD5; it is that
of the file at its address. Apart from `ARCHIVES`, of which all counts as code that reads images."""


class Source(NamedTuple):
    """A data set that config.yaml can name."""

    reader: str
    """The function of `ensdistill.sources` that reads it."""
    archives: tuple[str, ...] = ()
    """The archives that it is read from, in the order in which the reader wants them."""


SOURCES = {
    "digits": Source("digits"),
    "cifar10": Source("cifar", ("cifar-10-python.tar.gz",)),
    "cifar100": Source("cifar", ("cifar-100-python.tar.gz",)),
    "svhn": Source("svhn", ("svhn_train_32x32.mat", "svhn_test_32x32.mat")),
    "tinyimagenet": Source("tinyimagenet", ("tiny-imagenet-200.zip",)),
    "folder": Source("folder"),
}
"""By the names that config.yaml uses."""

OFFICIAL_CORRUPTIONS = {"cifar10": "CIFAR-10-C.tar", "cifar100": "CIFAR-100-C.tar"}
"""By source, the archive of its corrupted test images."""

HUMAN_ANSWERS = {"cifar10": "cifar10h-probs.npy"}
"""By source, the archive of what people answered of its test images."""


def verify(path: str | os.PathLike[str]) -> str:
    """The SHA-256 of an official archive, known by its file's name and its MD5.

    Raises:
        InputError: the file is missing, or the system cannot read it.
        DamagedFile: it is not the official one.
    """
    path = Path(path)
    md5, sha256 = _digests(path)
    if md5 != ARCHIVES[path.name].md5:
        raise DamagedFile(path, f"not the official {path.name}")
    return sha256


def verify_answers(path: str | os.PathLike[str]) -> None:
    """As `verify`, of an archive of `ANSWERS`."""
    path = Path(path)
    if _digests(path)[0] != ANSWERS[path.name].md5:
        raise DamagedFile(path, f"not the official {path.name}")


def download(name: str, path: str | os.PathLike[str]) -> None:
    """Fetch the official archive `name` to `path`, whole and verified, or not at all.

    What came before a connection broke is kept in a hidden file beside `path`, and the next
    attempt, in this run or a later one, asks for the rest only. Of several processes one
    fetches and the others wait. Shows a progress bar on a terminal, and tries three times.

    Raises:
        InputError: the server cannot be reached, or what came is not the official archive.
        OSError: it cannot be written; `filename` says where.
    """
    from requests import RequestException
    from urllib3.exceptions import HTTPError

    from ensdistill.files import replace

    url, md5 = {**ARCHIVES, **ANSWERS}[name]
    path = Path(path)
    part = path.with_name(f".{path.name}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f".{path.name}.lock").open("ab") as lock:
        while try_lock(lock) is False:
            time.sleep(1)
        if path.exists() and _digests(path)[0] == md5:  # by the process that was waited for
            return
        for attempt in range(1, ATTEMPTS + 1):
            try:
                _fetch(url, part)
                break
            except (RequestException, HTTPError) as error:
                reason = _reason(error)
                logger.warning("attempt %d of %d failed: %s", attempt, ATTEMPTS, reason)
                if attempt == ATTEMPTS:
                    raise InputError(
                        f"{url}: could not be downloaded ({reason}); run again to go on"
                    ) from error
                time.sleep(2**attempt)
            except OSError as error:  # of a full disk the system does not say which
                error.filename = error.filename or str(part)
                raise
        if _digests(part)[0] != md5:
            part.unlink()
            raise InputError(f"{url}: what came has another checksum than the official archive")
        replace(part, path)


def _fetch(url: str, part: Path) -> None:
    """Append to `part` what is missing from it."""
    import requests
    from tqdm import tqdm

    have = part.stat().st_size if part.exists() else 0
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as response:
        if have and response.status_code == requests.codes.requested_range_not_satisfiable:
            return  # nothing is missing
        response.raise_for_status()
        start = have if response.status_code == requests.codes.partial_content else 0
        length = response.headers.get("Content-Length") or None
        with (
            part.open("ab" if start else "wb") as file,
            tqdm(
                initial=start,
                total=length and start + int(length),
                desc=url.rpartition("/")[2],
                unit="B",
                unit_scale=True,
                disable=None,
            ) as bar,
        ):
            # The bytes as they are sent: a server may call the file's own compression an encoding.
            for block in response.raw.stream(BLOCK, decode_content=False):
                bar.update(file.write(block))
                if file.tell() > LARGEST:
                    part.unlink()
                    raise InputError(f"{url}: sends more than {LARGEST:,} bytes")


def _reason(error: BaseException) -> str:
    """The innermost cause in one line, without the wrappings of the network libraries."""
    while error.__context__ is not None:
        error = error.__context__
    return " ".join(str(error).split()) or type(error).__name__


def _digests(path: Path) -> tuple[str, str]:
    """MD5 and SHA-256 in one reading."""
    from ensdistill.files import reading

    md5, sha256 = hashlib.md5(usedforsecurity=False), hashlib.sha256()
    with reading(path, "readable") as file:
        while block := file.read(BLOCK):
            md5.update(block)
            sha256.update(block)
    return md5.hexdigest(), sha256.hexdigest()
