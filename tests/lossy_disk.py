"""A file system that loses, at a pretended power failure, what was not forced to the disk.

It speaks the kernel's FUSE protocol (linux/fuse.h, version 7.31) itself, in a process of its own:
it needs root and /dev/fuse, but no library.
"""

import ctypes
import errno
import multiprocessing
import os
import random
import select
import stat
import struct
import time
from collections import Counter
from contextlib import suppress
from itertools import count
from pathlib import Path

LIBC = ctypes.CDLL(None, use_errno=True)
DETACH = 2  # MNT_DETACH of umount2
LARGEST = 1 << 20  # bytes of one write
FOR_LONG = 3600  # seconds that the kernel may remember: nobody else changes anything
KEEP_CACHE = 2  # FOPEN_KEEP_CACHE
BIG_WRITES, FLOCK_LOCKS, MAX_PAGES = 1 << 5, 1 << 10, 1 << 22
MODE, UID, GID, SIZE, MTIME, MTIME_NOW = 1, 2, 4, 8, 32, 256  # what SETATTR sets
SILENT = {2, 36, 42}  # FORGET, INTERRUPT, BATCH_FORGET: nothing is answered

KINDS = ("all that was not forced", "data but not names", "some of both")
"""What a power failure loses."""


def why_not() -> str | None:
    """What this machine lacks for such a disk; None if nothing."""
    if os.geteuid() != 0:
        return "mounting a file system needs root"
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR))
    except OSError as error:
        return f"/dev/fuse: {error.strerror}"
    return None


class LossyDisk:
    """Such a file system, mounted at `folder` inside of a `with`.

    Args:
        folder: an empty one.
        locks: whether files can be locked; without, flock fails as on some NFS mounts.
    """

    def __init__(self, folder: Path, locks: bool = True):
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(str(folder), locks, theirs))

    def __enter__(self) -> "LossyDisk":
        self._process.start()
        self._pipe.recv()
        return self

    def __exit__(self, *_) -> None:
        self._ask("end")
        self._process.join()

    def sync(self) -> None:
        """Force everything to the disk."""
        self._ask("sync")

    def cut(self, kind: str, seed: int) -> Counter:
        """Lose what was not forced; all processes that use the disk must have been killed.

        Returns:
            how many `names` (files made, renamed, removed) and how many files' `data` were lost.
        """
        return self._ask("cut", kind, seed)

    def _ask(self, *question):
        self._pipe.send(question)
        return self._pipe.recv()


class _Node:
    """A file or folder: as processes see it, and what is safe on the disk."""

    def __init__(self, mode, uid, gid, parent=None):
        self.mode, self.uid, self.gid, self.parent = mode, uid, gid, parent
        self.mtime, self.links, self.opened, self.number = time.time_ns(), 0, 0, 0
        self.folder = stat.S_ISDIR(mode)
        self.content = {} if self.folder else bytearray()
        self.safe = {} if self.folder else b""
        self.changes = []  # of a folder, in order, each {name: node, or None where removed}
        self.dirty = False

    def change(self, names):
        self.changes.append(names)
        self.content = _changed(self.content, names)
        self.mtime = time.time_ns()

    def force(self):
        """A file's data; or a folder's names, and those of the folders above, as with a journal."""
        if not self.folder:
            self.safe, self.dirty = bytes(self.content), False
            return
        self.safe, self.changes = dict(self.content), []
        if self.parent:
            self.parent.force()

    def survive(self, kind, rng, lost):
        """Become what a power failure leaves of it."""
        if self.folder:
            kept = {KINDS[0]: 0, KINDS[1]: len(self.changes)}.get(kind)
            kept = rng.randint(0, len(self.changes)) if kept is None else kept
            lost["names"] += len(self.changes) - kept
            self.content = self.safe
            for names in self.changes[:kept]:
                self.content = _changed(self.content, names)
            self.safe, self.changes = dict(self.content), []
            for child in self.content.values():
                child.parent = self
                child.survive(kind, rng, lost)
        elif self.dirty:
            lost["data"] += 1
            new = bytes(self.content)
            half = new[: rng.randint(0, len(new))]
            torn = [self.safe, half, half + bytes(len(new) - len(half)), bytes(len(new))]
            self.content = bytearray(self.safe if kind == KINDS[0] else rng.choice(torn))
            self.force()


def _changed(content, names):
    return {name: node for name, node in {**content, **names}.items() if node}


def _serve(folder, locks, pipe):
    root = _Node(stat.S_IFDIR | 0o755, 0, 0)
    connection = _Connection(folder, root, locks)
    pipe.send("mounted")
    while True:
        ready = select.poll()
        ready.register(connection.device, select.POLLIN)
        ready.register(pipe, select.POLLIN)
        asked = {number for number, _ in ready.poll()}
        if connection.device in asked:
            connection.answer_all()
        if pipe.fileno() not in asked:
            continue
        try:
            what, *arguments = pipe.recv()
        except EOFError:  # the test was killed
            what = "end"
        reply = None
        if what == "sync":
            for node in connection.nodes.values():
                node.force()
        else:
            connection.close()
        if what == "cut":
            kind, seed = arguments
            reply = Counter()
            root.survive(kind, random.Random(seed), reply)
            connection = _Connection(folder, root, locks)
        try:
            pipe.send(reply)
        except BrokenPipeError:
            return
        if what == "end":
            return


class _Connection:
    """A mount, from which the kernel asks."""

    def __init__(self, folder, root, locks):
        self.folder, self.locks = folder.encode(), locks
        self.numbers = count(1)
        self.nodes, self.listings = {0: root}, {}  # 0: where no node is meant
        self.add(root)
        self.device = os.open("/dev/fuse", os.O_RDWR | os.O_NONBLOCK)
        options = f"fd={self.device},rootmode=40000,user_id=0,group_id=0"
        options += ",default_permissions,allow_other"
        if LIBC.mount(b"lossy", self.folder, b"fuse", 0, options.encode()):
            raise OSError(ctypes.get_errno(), "cannot be mounted", folder)

    def close(self):
        os.close(self.device)  # from now on everything fails there
        LIBC.umount2(self.folder, DETACH)

    def add(self, node):
        """Number a node, and all below it."""
        node.number, node.opened, node.links = next(self.numbers), 0, 1
        self.nodes[node.number] = node
        if node.folder:
            for child in node.content.values():
                self.add(child)

    def answer_all(self):
        while True:
            try:
                message = os.read(self.device, LARGEST + 8192)
            except BlockingIOError:
                return
            _, number, unique, node, uid, gid, *_ = struct.unpack_from("<IIQQIIIHH", message)
            if number in SILENT:
                continue
            operation = OPERATIONS.get(number)
            failed, reply = 0, b""
            try:
                if operation is None:
                    raise OSError(errno.ENOSYS, "")
                reply = operation(self, self.nodes[node], message[40:], (uid, gid)) or b""
            except KeyError:
                failed = errno.ENOENT
            except OSError as error:
                failed = error.errno
            header = struct.pack("<IiQ", 16 + len(reply), -failed, unique)
            with suppress(FileNotFoundError):  # who asked was killed
                os.write(self.device, header + reply)

    def start(self, _node, body, _user):
        flags = BIG_WRITES | MAX_PAGES | (0 if self.locks else FLOCK_LOCKS)
        pages = LARGEST // 4096
        return struct.pack("<IIIIHHIIHH32x", 7, 31, LARGEST, flags, 16, 12, LARGEST, 1, pages, 0)

    def attributes(self, node):
        size = 0 if node.folder else len(node.content)
        seconds, rest = divmod(node.mtime, 10**9)
        return struct.pack(
            "<QQQ3Q3I7I",
            *(node.number, size, -(-size // 512), seconds, seconds, seconds, rest, rest, rest),
            *(node.mode, node.links, node.uid, node.gid, 0, 4096, 0),
        )

    def attributes_reply(self, node, *_):
        return struct.pack("<QII", FOR_LONG, 0, 0) + self.attributes(node)

    def entry(self, node):
        known = struct.pack("<QQQQII", node.number, 0, FOR_LONG, FOR_LONG, 0, 0)
        return known + self.attributes(node)

    def look_up(self, folder, body, _user):
        return self.entry(folder.content[body[:-1]])

    def set_attributes(self, node, body, _user):
        valid, _, _, size, _, _, mtime, _, _, rest, _, mode, _, uid, gid, _ = struct.unpack_from(
            "<IIQQQQQQIIIIIIII", body
        )
        if valid & MODE:
            node.mode = mode
        if valid & UID:
            node.uid = uid
        if valid & GID:
            node.gid = gid
        if valid & SIZE:
            del node.content[size:]
            node.content.extend(bytes(size - len(node.content)))
            node.dirty, node.mtime = True, time.time_ns()
        if valid & MTIME:
            node.mtime = time.time_ns() if valid & MTIME_NOW else mtime * 10**9 + rest
        return self.attributes_reply(node)

    def make(self, folder, name, mode, user):
        if name in folder.content:
            raise FileExistsError(errno.EEXIST, "")
        node = _Node(mode, *user, folder)
        self.add(node)
        folder.change({name: node})
        return self.entry(node)

    def make_file(self, folder, body, user):
        mode = struct.unpack_from("<I", body)[0]
        return self.make(folder, body[16:-1], mode, user)

    def make_folder(self, folder, body, user):
        mode = struct.unpack_from("<I", body)[0]
        return self.make(folder, body[8:-1], stat.S_IFDIR | mode, user)

    def make_symlink(self, folder, body, user):
        name, target, _ = body.split(b"\0")
        entry = self.make(folder, name, stat.S_IFLNK | 0o777, user)
        folder.content[name].content.extend(target)
        folder.content[name].force()
        return entry

    def make_link(self, folder, body, _user):
        node = self.nodes[struct.unpack_from("<Q", body)[0]]
        node.links += 1
        folder.change({body[8:-1]: node})
        return self.entry(node)

    def create(self, folder, body, user):
        _, mode = struct.unpack_from("<II", body)
        entry = self.make(folder, body[16:-1], mode, user)
        return entry + self.open(folder.content[body[16:-1]], body, user)

    def remove(self, folder, body, _user):
        node = folder.content[body[:-1]]
        if node.folder and node.content:
            raise OSError(errno.ENOTEMPTY, "")
        folder.change({body[:-1]: None})
        self.drop(node)

    def drop(self, node):
        node.links -= 1
        self.forget_unused(node)

    def forget_unused(self, node):
        if node.links <= 0 and not node.opened:
            self.nodes.pop(node.number, None)

    def rename(self, folder, body, _user, skip=8):
        there = self.nodes[struct.unpack_from("<Q", body)[0]]
        old, new, _ = body[skip:].split(b"\0")
        node, replaced = folder.content[old], there.content.get(new)
        if skip == 16 and struct.unpack_from("<I", body, 8)[0] & 1 and replaced:  # NOREPLACE
            raise FileExistsError(errno.EEXIST, "")
        if replaced and replaced.folder and replaced.content:
            raise OSError(errno.ENOTEMPTY, "")
        if there is folder:
            folder.change({old: None, new: node})
        else:  # which is kept or lost as one: here it is always kept
            folder.change({old: None})
            there.change({new: node})
            node.parent = there
            folder.force()
            there.force()
        if replaced and replaced is not node:
            self.drop(replaced)

    def rename2(self, folder, body, user):
        self.rename(folder, body, user, 16)

    def read_symlink(self, node, *_):
        return bytes(node.content)

    def open(self, node, *_):
        node.opened += 1
        return struct.pack("<QII", 0, KEEP_CACHE, 0)

    def release(self, node, *_):
        node.opened -= 1
        self.forget_unused(node)

    def read(self, node, body, _user):
        _, offset, size = struct.unpack_from("<QQI", body)
        return bytes(node.content[offset : offset + size])

    def write(self, node, body, _user):
        _, offset, size = struct.unpack_from("<QQI", body)
        node.content.extend(bytes(max(0, offset - len(node.content))))
        node.content[offset : offset + size] = body[40 : 40 + size]
        node.dirty, node.mtime = True, time.time_ns()
        return struct.pack("<II", size, 0)

    def space(self, *_):
        return struct.pack("<5Q10I", 1 << 24, 1 << 23, 1 << 23, 0, 0, 4096, 255, 4096, *[0] * 7)

    def force(self, node, *_):
        node.force()

    def open_folder(self, folder, *_):
        handle = next(self.numbers)
        self.listings[handle] = list(folder.content.items())
        return struct.pack("<QII", handle, 0, 0)

    def list_folder(self, _folder, body, _user):
        handle, offset, size = struct.unpack_from("<QQI", body)
        reply = b""
        for place, (name, node) in enumerate(self.listings[handle][offset:], offset + 1):
            kind = node.mode >> 12
            one = struct.pack("<QQII", node.number, place, len(name), kind) + name
            one += bytes(-len(one) % 8)
            if len(reply) + len(one) > size:
                break
            reply += one
        return reply

    def release_folder(self, _folder, body, _user):
        del self.listings[struct.unpack_from("<Q", body)[0]]

    def lock(self, *_):
        raise OSError(errno.ENOLCK, "")


OPERATIONS = {
    **{1: _Connection.look_up, 3: _Connection.attributes_reply, 4: _Connection.set_attributes},
    **{5: _Connection.read_symlink, 6: _Connection.make_symlink, 8: _Connection.make_file},
    **{9: _Connection.make_folder, 10: _Connection.remove, 11: _Connection.remove},
    **{12: _Connection.rename, 13: _Connection.make_link, 14: _Connection.open},
    **{15: _Connection.read, 16: _Connection.write, 17: _Connection.space},
    **{18: _Connection.release, 20: _Connection.force, 26: _Connection.start},
    **{27: _Connection.open_folder, 28: _Connection.list_folder},
    **{29: _Connection.release_folder, 30: _Connection.force, 32: _Connection.lock},
    **{33: _Connection.lock, 35: _Connection.create, 45: _Connection.rename2},
}
"""By their numbers in linux/fuse.h; the kernel does without the others."""
