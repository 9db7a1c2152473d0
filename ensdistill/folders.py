"""Your own images: which files of folders and archives are images, and a count of all the others.

How each kind of file is treated:

- Images in train/<class>/ and test/<class>/ are read: files whose ending is that of a format that
  Pillow reads, and files without an ending whose first bytes are those of an image. One that turns
  out to be damaged, empty or no image is refused, as is a link that leads nowhere (a cache that was
  not fetched) or stands in an archive, and a class all of whose files were skipped.
- What is an image, but cannot be used, is skipped and told in a warning, since it may be missed:
  formats that Pillow does not read (HEIC, raw files of cameras …), images with the ending of
  something else, images in a folder below their class or in none, archives beside images, pipes.
- Of files with the same bytes in one class and split the first by name is read; the others are
  counted in the warning, for otherwise one could come into training and one into validation. Equal
  images in two classes, or in train and in test, are read: which is wrong, only the user knows.
  They are told in the warning.
- A second train/ or test/ in the same folder or archive (a copy of all of it) is refused.
- Where there is no train/ and no test/ at all, the classes are the folders in which the paths of
  the images part: <class>/<name>, or flowers/<class>/<name> where all is in flowers/.
- What is no image (readme.txt, licence.pdf, features.h5), hidden, or outside of train/ and test/
  is skipped and counted in the log.
"""

import hashlib
import logging
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from itertools import takewhile
from pathlib import Path, PurePosixPath

from ensdistill import InputError
from ensdistill.archives import PACKED, SPLITS, Entry, entries, is_hidden
from ensdistill.own_images import Key, OwnImages

logger = logging.getLogger(__name__)

TREATMENTS = {
    "read": "read",
    "duplicates": "the same as another of their class",
    "formats": "formats that are not read",
    "endings": "endings of no image format",
    "deeper": "in folders below a class",
    "classless": "in no class",
    "archives": "archives within a folder",
    "special": "no regular files",
    "others": "no images",
    "hidden": "hidden",
    "elsewhere": "outside of train/ and test/",
}
"""What is counted of files, and how it is said."""
MISSED = ("duplicates", "formats", "endings", "deeper", "classless", "archives", "special")
"""Skipped, but perhaps missed by the user."""
NO_IMAGES = {"BUFR", "GRIB", "HDF5", "MPEG", "PALM", "PDF", "WMF"}
"""Formats with endings that Pillow knows, but does not read by itself."""
UNREAD = {
    *(".heic", ".heif", ".hif", ".avif", ".jxl", ".jxr", ".wdp", ".bpg", ".svg", ".wmf", ".emf"),
    *(".dng", ".cr2", ".cr3", ".crw", ".nef", ".nrw", ".arw", ".orf", ".rw2", ".raf", ".pef"),
    *(".srw", ".raw", ".dcm", ".exr", ".hdr", ".xcf", ".palm", ".djvu", ".svs", ".czi", ".ndpi"),
}
"""Endings of images in formats that Pillow does not read."""
SIGNATURES = (b"\x89PNG\r\n", b"\xff\xd8\xff", b"GIF8", b"II*\0", b"MM\0*", b"\0\0\0\x0cjP  ")
"""First bytes of images in formats that Pillow reads; see also `_looks_like`."""


class ImageFolder(OwnImages):
    """The images of folders and archives, and a count of everything that is met there.

    Args:
        roots: folders that hold train/<class>/… and test/<class>/…, or just <class>/…, tar or zip
            archives of them, or folders of such archives.
        labelled: whether images have classes. Otherwise they are all those below test/, or,
            without any train/ and test/, all there are.
    """

    def __init__(self, roots: str | Sequence[str], *, labelled: bool = True):
        self.roots = [Path(root) for root in ([roots] if isinstance(roots, str) else roots)]
        super().__init__(", ".join(map(str, self.roots)), labelled)
        self._depth: int | None = None
        """Of the classes, where there is no train/ and no test/."""
        self._everything = False
        self._examples: defaultdict[str, list[str]] = defaultdict(list)
        self._classes: dict[tuple[Path, tuple[str, ...], str, str], str] = {}
        """Of every class folder that was met, where it is, what its first file was."""
        self._splits: dict[tuple[Path, str], tuple[str, ...]] = {}
        """Where each folder or archive has its train/ and test/."""
        self._dead: list[str] = []

    def read(self) -> Iterator[tuple[str, Key, bytes]]:
        sources = [source for root in self.roots for source in _sources(root)]
        if not any(self._is_split(entry) for source in sources for entry in entries(source)):
            self._everything = not self.labelled
            self._depth = self._depth_of_classes(sources) if self.labelled else None
        for source in sources:
            seen: dict[tuple[str, ...], str] = {}
            for entry in entries(source):
                split, label, treatment = self._treatment(entry)
                if treatment == "read" and entry.kind == "link":
                    self._dead.append(entry.place)
                elif treatment == "read":
                    content = entry.read()
                    key = (split, label, hashlib.sha256(content).hexdigest())
                    if seen.setdefault(entry.parts, key[-1]) != key[-1]:
                        raise InputError(f"{entry.place}: is there twice, with different content")
                    if self.keep(entry.place, key, entry.parts[-1], content, None):
                        yield entry.place, key, content
                    else:
                        treatment = "duplicates"
                if treatment:
                    self._count(treatment, entry.place)
        self._finish()

    def _contents(self, places: Mapping[str, Key]) -> Iterator[tuple[str, bytes]]:
        done = set()  # a tar may hold a file twice
        for source in (source for root in self.roots for source in _sources(root)):
            for entry in entries(source):
                if entry.kind == "file" and entry.place in places and entry.place not in done:
                    done.add(entry.place)
                    yield entry.place, entry.read()

    def _is_split(self, entry: Entry) -> bool:
        """Whether an entry shows that there is a train/ or test/; for classes an empty one does."""
        alone = self.labelled and entry.kind != "file"
        return not SPLITS.isdisjoint(entry.parts if alone else entry.parts[:-1])

    def _depth_of_classes(self, sources: Sequence[Path]) -> int:
        """How many folders all images have in common: below those are the classes."""
        common: tuple[str, ...] | None = None
        for entry in (entry for source in sources for entry in entries(source)):
            if not entry.parts or any(map(is_hidden, entry.parts)) or entry.kind != "file":
                continue
            if treatment_of(entry) == "read":
                folders = entry.parts[:-1]
                pairs = zip(folders if common is None else common, folders, strict=False)
                common = tuple(one for one, _ in takewhile(lambda it: it[0] == it[1], pairs))
        return len(common or ())

    def _treatment(self, entry: Entry) -> tuple[str, str, str]:
        """Split, class and treatment of an entry; `read` also of a link that would be read."""
        folder = entry.kind == "folder"
        if not entry.parts or any(map(is_hidden, entry.parts)):
            return "", "", "hidden" if entry.parts else ""
        if self._everything:
            return "test", "", "" if folder else treatment_of(entry)
        found = self._split(entry)
        if found is None:
            packed = entry.parts[-1].lower().endswith(PACKED)
            return "", "", "" if folder else "archives" if packed else "elsewhere"
        split, above, inner = found
        if folder:
            if len(inner) == 1:
                self._classes.setdefault((entry.root, above, split, inner[0]), "missing")
            return "", "", ""
        if entry.kind == "link" and len(inner) < 2:
            return split, "", "read"  # would be a split or a class
        treatment = treatment_of(entry)
        if treatment == "read" and self.labelled and len(inner) != 2:
            treatment = "deeper" if inner[1:] else "classless"
        if treatment == "read" and entry.kind == "file":
            self._note_place(entry, split, above)
        if inner[1:]:
            key = (entry.root, above, split, inner[0])
            if self._classes.get(key, "missing") == "missing":
                self._classes[key] = f"{TREATMENTS[treatment]} ({entry.place})"
        return split, inner[0] if inner[1:] else "", treatment

    def _split(self, entry: Entry) -> tuple[str, tuple[str, ...], tuple[str, ...]] | None:
        """Split of an entry, the folders above it, and the path below; None outside of splits."""
        if self._depth is not None:
            return "train", entry.parts[: self._depth], entry.parts[self._depth :]
        at = _split_at(entry, self.labelled)
        if at is None or not (self.labelled or entry.parts[at] == "test"):
            return None
        return entry.parts[at], entry.parts[:at], entry.parts[at + 1 :]

    def _note_place(self, entry: Entry, split: str, above: tuple[str, ...]) -> None:
        """Refuse a split that is in two places of one folder or archive."""
        first = self._splits.setdefault((entry.root, split), above)
        if first != above:
            one, other = ("/".join([str(entry.root), *place, split]) for place in (first, above))
            raise InputError(
                f"{one} and {other}: images are in both; keep one, or name one of them"
            )

    def _count(self, treatment: str, place: str) -> None:
        self.counts[treatment] += 1
        if len(self._examples[treatment]) < 5:
            self._examples[treatment].append(place)

    def _finish(self) -> None:
        """Refuse what lacks, and tell what was met."""
        if self._dead:
            count = len(self._dead)
            raise InputError(
                f"{self._dead[0]}: is a link that cannot be followed"
                + (f", as are {count - 1:,} others" if count > 1 else "")
                + "; put the images themselves there"
            )
        listing, inside = self.listing(), "<class>/" if self.labelled else ""
        for split in self._needed():
            if not listing[split]:
                place = f"{split}/{inside}" if self._depth is None else inside
                raise InputError(f"{self.where}: holds no images in {place}{self._skipped()}")
        if self.labelled:
            self._check_classes()
        self.count_equal()
        for kind, examples in self._examples.items():
            if kind != "read":
                more = ", …" if self.counts[kind] > len(examples) else ""
                logger.info("%s: %s%s", TREATMENTS[kind], ", ".join(examples), more)
        self.tell(self._skipped(), any(self.counts[kind] for kind in MISSED))

    def _needed(self) -> list[str]:
        """The splits in which there must be images."""
        if not self.labelled:
            return ["test"]
        return ["train", "test"] if self._depth is None else ["train"]

    def _check_classes(self) -> None:
        """Refuse a class folder of which nothing was read."""
        read = {(split, label) for split, label, _ in self.names}
        for (root, above, split, label), what in self._classes.items():
            beside = self._splits.get((root, split), above) == above
            if beside and (split, label) not in read:
                place = f"{split}/{label}/" if self._depth is None else f"{label}/"
                raise InputError(
                    f"{self.where}: class {label!r} has no images in {place}: "
                    f"files there are {what}"
                )

    def _skipped(self) -> str:
        """How many files were skipped, and why."""
        said = [
            f"{what} ({self.counts[kind]:,})"
            for kind, what in TREATMENTS.items()
            if kind != "read" and self.counts[kind]
        ]
        return f"; skipped: {', '.join(said)}" if said else ""


def treatment_of(entry: Entry) -> str:
    """The key of `TREATMENTS` of what is where images are; `read` also of a link to an image."""
    name = entry.parts[-1].lower()
    ending = _ending(name)
    image = ending in _readable() or not ending
    if entry.kind != "file":
        return "others" if not image else "read" if entry.kind == "link" else "special"
    if name.endswith(PACKED):
        return "archives"
    if ending in _readable():
        return "read"
    if ending in UNREAD:
        return "formats"
    looks = _looks_like(entry.read(32))
    return "endings" if looks == "read" and ending else looks


def _sources(root: Path) -> list[Path]:
    """The folder or archive itself; of a folder without train/ and test/ the archives in it."""
    if not root.is_dir():
        return [root]
    archives = sorted(path for path in root.iterdir() if path.name.lower().endswith(PACKED))
    if archives and any(
        entry.kind != "file" and entry.parts[-1] in SPLITS for entry in entries(root)
    ):
        return [root]
    return archives or [root]


def _split_at(entry: Entry, labelled: bool) -> int | None:
    """Where in an entry's path its split stands: two before an image, or else the first."""
    parts = entry.parts[:-1] if entry.kind == "file" else entry.parts
    if labelled and len(entry.parts) > 2 and entry.parts[-3] in SPLITS:
        return len(entry.parts) - 3
    return next((at for at, part in enumerate(parts) if part in SPLITS), None)


@cache
def _readable() -> frozenset[str]:
    """Endings of images that Pillow reads, or refuses by itself."""
    from PIL import Image

    known = Image.registered_extensions().items()
    return frozenset(ending for ending, name in known if name not in NO_IMAGES)


def _ending(name: str) -> str:
    return PurePosixPath(name).suffix.lower()


def _looks_like(head: bytes) -> str:
    """The treatment of a file that begins so, whatever its name."""
    if head.startswith(SIGNATURES) or (head[:4], head[8:12]) == (b"RIFF", b"WEBP"):
        return "read"
    if head[:2] == b"BM" and head[6:10] == bytes(4):
        return "read"
    if head[4:12] == b"ftypavif" and ".avif" in _readable():
        return "read"
    if head[4:8] == b"ftyp" and head[8:12] in (b"heic", b"heix", b"mif1", b"msf1", b"avif"):
        return "formats"
    if head.startswith((b"\xff\x0a", b"\0\0\0\x0cJXL ")):  # JPEG XL
        return "formats"
    return "others"
