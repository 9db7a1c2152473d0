import fcntl
import http.server
import io
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from errno import EIO, ENOLCK, ENOSPC
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from torchvision import datasets

from ensdistill import DamagedFile, InputError, downloads, files, sources
from ensdistill.downloads import (
    ANSWERS,
    ARCHIVES,
    HUMAN_ANSWERS,
    OFFICIAL_CORRUPTIONS,
    SOURCES,
    Archive,
    download,
    verify,
)
from tests.builders import md5

NAME = "cifar-10-python.tar.gz"
CONTENT = np.random.default_rng(0).bytes(3_000_000)


@pytest.fixture
def pauses(monkeypatch):
    found = []
    monkeypatch.setattr(time, "sleep", found.append)
    return found


class Server(http.server.ThreadingHTTPServer):
    """On this machine, in an official server's place; what it should do is set by tests."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.resumes, self.headers = CONTENT, True, {}
        self.breaks = []
        """Bytes after which the connection breaks, request by request; None: no HTTP at all."""
        self.requests = []
        """The range that each request wanted."""


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server, wanted = self.server, self.headers["Range"]
        server.requests.append(wanted)
        sent = server.breaks.pop(0) if server.breaks else len(server.content)
        if sent is None:
            self.wfile.write(b"no HTTP at all\r\n\r\n")
            return
        start = int(wanted[len("bytes=") : -1]) if wanted and server.resumes else 0
        body = server.content[start:]
        status = (206 if body else 416) if start else 200
        self.send_response(status if server.content else 404)
        for key, value in {"Content-Length": len(body), **server.headers}.items():
            self.send_header(key, str(value))
        self.end_headers()
        self.wfile.write(body[:sent])

    def log_message(self, *_):
        pass


@contextmanager
def serving():
    """A running server."""
    with Server() as listening:
        thread = threading.Thread(target=listening.serve_forever, args=(0.01,))
        thread.start()
        yield listening
        listening.shutdown()
        thread.join()


@pytest.fixture
def server(monkeypatch):
    with serving() as listening:
        url = f"http://127.0.0.1:{listening.server_port}/{NAME}"
        monkeypatch.setitem(ARCHIVES, NAME, Archive(url, md5(CONTENT)))
        yield listening


@pytest.fixture
def target(tmp_path):
    return tmp_path / "new" / NAME


def part(target):
    return target.with_name(f".{NAME}.part")


def left(target):
    """What lies in the target's folder, but for the lock."""
    return sorted(path.name for path in target.parent.iterdir() if path.suffix != ".lock")


def refused(target):
    with pytest.raises(InputError) as caught:
        download(NAME, target)
    message = str(caught.value)
    assert message.startswith(ARCHIVES[NAME].url)
    assert "\n" not in message
    return message


def test_a_download_is_whole_and_leaves_nothing_beside_it(target, server, pauses):
    download(NAME, target)
    assert target.read_bytes() == CONTENT
    assert left(target) == [NAME]
    assert server.requests == [None]
    assert pauses == []


def test_attempts_go_on_where_the_connection_broke(target, server, pauses):
    server.breaks = [1_200_000, None]
    download(NAME, target)
    assert target.read_bytes() == CONTENT
    first, *others = server.requests
    assert first is None
    assert others == ["bytes=1200000-"] * 2
    assert pauses == [2, 4]


def test_a_later_run_goes_on_where_the_last_one_gave_up(target, server, pauses):
    server.breaks = [1000, 500_000, 7]
    assert "could not be downloaded" in refused(target)
    assert left(target) == [part(target).name]
    assert part(target).read_bytes() == CONTENT[:501_007]
    download(NAME, target)
    assert target.read_bytes() == CONTENT
    assert left(target) == [NAME]
    assert server.requests[1:] == ["bytes=1000-", "bytes=501000-", "bytes=501007-"]


def test_a_server_that_cannot_resume_sends_everything_again(target, server, pauses):
    server.breaks, server.resumes = [1_000_000], False
    download(NAME, target)
    assert target.read_bytes() == CONTENT
    assert server.requests == [None, "bytes=1000000-"]


def test_a_whole_part_is_taken_as_it_is(target, server, pauses):
    target.parent.mkdir()
    part(target).write_bytes(CONTENT)
    download(NAME, target)
    assert target.read_bytes() == CONTENT
    assert server.requests == [f"bytes={len(CONTENT)}-"]


@pytest.mark.parametrize("harm", ["part", "server"])
def test_a_wrong_checksum_deletes_the_part_and_keeps_an_older_file(target, server, pauses, harm):
    target.parent.mkdir()
    target.write_bytes(b"older")
    if harm == "part":
        part(target).write_bytes(b"something else")
    else:
        server.content = b"another archive"
    assert refused(target).endswith("another checksum than the official archive")
    assert left(target) == [NAME]
    assert target.read_bytes() == b"older"
    assert len(server.requests) == 1
    server.content = CONTENT
    download(NAME, target)
    assert target.read_bytes() == CONTENT


def test_a_server_that_sends_without_end_is_cut_off(target, server, pauses, monkeypatch):
    monkeypatch.setattr(downloads, "LARGEST", 2_000_000)
    assert refused(target).endswith(": sends more than 2,000,000 bytes")
    assert left(target) == []


def test_what_a_server_calls_an_encoding_stays_packed(target, server, pauses):
    server.headers = {"Content-Encoding": "x-gzip"}
    download(NAME, target)
    assert target.read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("breaks", "content", "reason"),
    [([None] * 3, CONTENT, "no HTTP at all"), ([], b"", "404"), ([5] * 3, CONTENT, "Incomplete")],
)
def test_three_attempts_are_made_and_the_last_ones_cause_is_told(
    target, server, pauses, breaks, content, reason
):
    server.breaks, server.content = breaks, content
    message = refused(target)
    assert "could not be downloaded (" in message
    assert reason in message
    assert len(server.requests) == 3
    assert pauses == [2, 4]
    assert not target.exists()


def test_an_unreachable_server_is_one_sentence(target, server, pauses):
    server.shutdown()
    server.server_close()
    message = refused(target)
    assert ": could not be downloaded ([Errno " in message
    assert message.endswith("] Connection refused); run again to go on")
    assert left(target) == []


def test_a_silent_server_is_not_waited_for(target, server, pauses, monkeypatch):
    monkeypatch.setattr(downloads, "TIMEOUT", (1, 0.05))
    silence = threading.Event()
    monkeypatch.setattr(Handler, "do_GET", lambda _: silence.wait(5))
    assert "(timed out)" in refused(target)
    silence.set()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_is_named(target, server, pauses):
    target.parent.mkdir()
    part(target).symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left") as caught:
        download(NAME, target)
    assert caught.value.errno == ENOSPC
    assert caught.value.filename == str(part(target))
    assert pauses == []


def test_of_several_that_want_a_file_one_fetches_it(target, server):
    threads = [threading.Thread(target=download, args=(NAME, target)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert target.read_bytes() == CONTENT
    assert server.requests == [None]
    assert left(target) == [NAME]


def test_a_file_system_without_locks_is_downloaded_to(target, server, monkeypatch):
    def refuse(*_):
        raise OSError(ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    download(NAME, target)
    assert target.read_bytes() == CONTENT


def test_the_registry_is_the_publishers():
    """torchvision knows the same addresses and checksums."""
    for cls in (datasets.CIFAR10, datasets.CIFAR100):
        assert ARCHIVES[cls.filename] == (cls.url, cls.tgz_md5)
    for split in ("train", "test"):
        url, name, checksum = datasets.SVHN.split_list[split]
        assert ARCHIVES[f"svhn_{name}"] == (url, checksum)
    read = [*chain.from_iterable(it.archives for it in SOURCES.values())]
    assert sorted([*read, *OFFICIAL_CORRUPTIONS.values()]) == sorted(ARCHIVES)
    assert [*HUMAN_ANSWERS.values()] == [*ANSWERS]
    assert all(callable(getattr(sources, it.reader)) for it in SOURCES.values())


def test_a_verified_archive_has_its_sha256(target, monkeypatch):
    target.parent.mkdir()
    target.write_bytes(b"abc")
    monkeypatch.setitem(ARCHIVES, NAME, Archive("", "900150983cd24fb0d6963f7d28e17f72"))
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, B.1
    assert verify(target) == known


def test_an_archive_that_the_system_cannot_read_is_no_damage(target, monkeypatch):
    with pytest.raises(InputError, match=f"^{target}: no such file$") as caught:
        verify(target)
    assert not isinstance(caught.value, DamagedFile)
    target.parent.mkdir()
    target.write_bytes(b"abc")

    class Sick(io.FileIO):
        def read(self, size=-1):
            raise OSError(EIO, "Input/output error")

    monkeypatch.setattr(files, "PatientFile", type("", (files.PatientFile, Sick), {}))
    with pytest.raises(InputError, match=f"^{target}: Input/output error$") as caught:
        verify(target)
    assert not isinstance(caught.value, DamagedFile)


def test_the_registry_imports_nothing_slow():
    code = (
        "import sys, ensdistill.downloads; "
        "print({'torch', 'torchvision', 'numpy', 'requests', 'tqdm'} & {*sys.modules})"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"
