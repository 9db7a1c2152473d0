"""Files from outside that would harm a naive reader: each is refused, in one sentence.

Where it is cheap, a test shows first that its sample does the harm.
"""

import ast
import gzip
import io
import json
import os
import pickle
import re
import resource
import struct
import tarfile
import tracemalloc
import zipfile
import zlib
from contextlib import contextmanager
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from ensdistill import InputError, images, sources
from ensdistill.hdf5 import write_hdf5
from ensdistill.images import read_description, read_images, read_source
from ensdistill.predictions import read_attributes, read_prediction, splits_of
from ensdistill.shift import KINDS, write_shifted
from ensdistill.sources import folder, tinyimagenet
from ensdistill.students import build_student
from ensdistill.studies import read_configuration
from ensdistill.weights import load_student, read_header, save_student
from tests.builders import (
    encode,
    fails,
    good_tree,
    make,
    noise,
    publish,
    write_tar,
    write_tree,
    write_zip,
)
from tests.project import REPOSITORY, Project

BOMB = 2**29 + 12_345
"""Bytes to which a bomb swells; far less memory is allowed."""


class Hostile:
    """A pickle of this makes a folder when it is read."""

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return os.mkdir, (str(self.canary),)


@pytest.fixture
def canary(tmp_path):
    return tmp_path / "canary"


@pytest.fixture
def hostile(canary):
    """Pickles plain and as PyTorch and numpy write them; each has been seen to run code."""
    plain = pickle.dumps(Hostile(canary))
    buffers = {"torch": io.BytesIO(), "numpy": io.BytesIO()}
    torch.save(Hostile(canary), buffers["torch"])
    np.save(buffers["numpy"], np.array([Hostile(canary)], dtype=object))
    pickles = {"plain": plain, **{name: buffer.getvalue() for name, buffer in buffers.items()}}
    readers = {
        "plain": pickle.loads,
        "torch": lambda data: torch.load(io.BytesIO(data), weights_only=False),
        "numpy": lambda data: np.load(io.BytesIO(data), allow_pickle=True),
    }
    for name, data in pickles.items():
        readers[name](data)
        canary.rmdir()
    return pickles


@contextmanager
def little_memory(extra=BOMB * 3 // 4):
    """So that what takes more fails at once, and not the machine."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + extra, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def refusal(read, *arguments, **options):
    """The one line with which a reader refuses in little memory."""
    with little_memory(), pytest.raises(InputError) as caught:
        read(*arguments, **options)
    message = str(caught.value)
    assert message.isprintable()
    return message


def read_one(data, tmp_path, name="0.png", size=None):
    """A folder source whose one training image has this content."""
    path = write_tree(tmp_path / "tree", {f"test/a/{name}": encode(noise(4, 4))})
    write_tree(path, {f"train/a/{name}": data})
    return folder(path=path, size=size)


# --- code in files ---------------------------------------------------------------------------

READERS = {
    "weights.safetensors": [load_student, read_header],
    "images.h5": [lambda path: read_images(path, "test"), read_description],
    "logits.h5": [lambda path: read_prediction(path, "test"), splits_of, read_attributes],
    "images.tar": [lambda path: folder(path=str(path), size=None)],
    "images.zip": [lambda path: folder(path=str(path), size=None)],
}


@pytest.mark.parametrize("kind", ["plain", "torch", "numpy"])
@pytest.mark.parametrize("name", READERS)
def test_a_pickle_in_a_files_place_is_not_run(tmp_path, canary, hostile, name, kind):
    path = tmp_path / name
    path.write_bytes(hostile[kind])
    for read in READERS[name]:
        assert str(path) in refusal(read, path)
    assert not canary.exists()


@pytest.mark.parametrize("kind", ["plain", "torch", "numpy"])
@pytest.mark.parametrize("ending", ["png", "jpg", "tif", "eps"])
def test_a_pickle_in_an_images_place_is_not_run(tmp_path, canary, hostile, kind, ending):
    message = refusal(read_one, hostile[kind], tmp_path, f"0.{ending}")
    assert f"train/a/0.{ending}: not an image of a known format" in message
    assert not canary.exists()


@pytest.mark.parametrize("source", ["cifar10", "cifar100", "svhn", "tinyimagenet"])
def test_pickles_in_an_archive_that_is_not_the_official_one_are_not_run(
    tmp_path, canary, hostile, source
):
    """CIFAR's archives are of pickles, so nothing is read of them before their checksum."""
    names = sources_archives(source)
    for name in names:
        members = dict.fromkeys(
            ["cifar-10-batches-py/data_batch_1", "cifar-100-python/train", "../escaped"],
            hostile["plain"],
        )
        write_tar(tmp_path / "downloads" / name, members, "w:gz")
    archives = [str(tmp_path / "downloads" / name) for name in names]
    before = sorted(tmp_path.rglob("*"))
    message = refusal(read_source, source=source, archives=archives)
    assert message.startswith(f"{archives[0]}: not the official")
    assert sorted(tmp_path.rglob("*")) == before


def sources_archives(source):
    from ensdistill.downloads import SOURCES

    return SOURCES[source].archives


def test_a_pickle_among_corrupted_images_is_not_run(tmp_path, monkeypatch, canary, hostile):
    """Even of an archive that has the official checksum, MD5 being no proof against all."""
    write_hdf5(
        tmp_path / "images.h5",
        {"test/images": noise(2, 3, 32, 32), "test/labels": np.array([0, 1])},
        {"sha256": "x"},
    )
    path = tmp_path / "CIFAR-10-C.tar"
    write_tar(path, {f"CIFAR-10-C/{name}.npy": hostile["numpy"] for name in ["labels", *KINDS]})
    message = refusal(
        write_shifted,
        tmp_path / "shifted.h5",
        tmp_path / "images.h5",
        corruptions={"source": "official", "images": None},
        out_of_distribution=[{"name": "far", "source": "photographs", "path": None, "images": 2}],
        seed=0,
        official=[publish(monkeypatch, path, path.read_bytes())],
        attributes={},
    )
    assert message.startswith(f"{path}: labels.npy is no array")
    assert not canary.exists()


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n%%EndComments\nshowpage\n%%EOF\n"


@pytest.mark.parametrize("name", ["0.eps", "0.png"])
def test_postscript_starts_no_interpreter(tmp_path, monkeypatch, canary, name):
    """PostScript is a program, whatever its file is called; Pillow would give it to Ghostscript."""
    from PIL import EpsImagePlugin

    gs = tmp_path / "bin" / "gs"
    write_tree(tmp_path, {"bin/gs": f"#!/bin/sh\nmkdir -p {canary}\n".encode()})
    gs.chmod(0o755)
    monkeypatch.setenv("PATH", f"{gs.parent}:{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    with pytest.raises(OSError, match="cannot identify"):
        Image.open(io.BytesIO(POSTSCRIPT)).load()
    assert canary.is_dir()
    canary.rmdir()
    message = refusal(read_one, POSTSCRIPT, tmp_path, name)
    assert f"train/a/{name}: not an image of a known format" in message
    assert not canary.exists()


FORBIDDEN = {
    "eval", "exec", "__import__", "os.system", "os.popen", "extractall", "pickle.load",
    "pickle.loads", "read_pickle", "joblib.load", "yaml.load", "unsafe_load", "unpack_archive",
    "torch.hub.load",
}  # fmt: skip


def test_no_code_of_this_repository_runs_what_it_reads():
    """A shell sees no name from outside either: no rule has one, and no subprocess."""
    trees = {
        path: ast.parse(path.read_text())
        for part in ("ensdistill", "workflow_scripts")
        for path in (REPOSITORY / part).glob("*.py")
    }
    assert len(trees) > 20
    for path, tree in trees.items():
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            name, options = ast.unparse(call.func), {k.arg: k.value for k in call.keywords}
            place = f"{path}:{call.lineno}"
            assert name not in FORBIDDEN, place
            assert name.rpartition(".")[2] not in FORBIDDEN - {"eval"}, place  # network.eval()
            assert "shell" not in options, place
            for function, option, safe in (
                ("torch.load", "weights_only", True),
                ("np.load", "allow_pickle", False),
            ):
                assert name != function or ast.literal_eval(options[option]) is safe, place
    rules = "\n".join(path.read_text() for path in (REPOSITORY / "rules").glob("*.smk"))
    assert not re.search(r"^\s*(shell|run):", rules, re.MULTILINE)


# --- weights ---------------------------------------------------------------------------------

ARCHITECTURE = {
    "name": "resnet8", "num_classes": 4, "in_channels": 1, "width": 4, "mean": [0.3], "std": [0.2]
}  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [
        {"name": "resnet9999998"},
        {"name": "wrn10x1000000000"},
        {"name": "resnet" + "8" * 5000},
        {"width": 10**5},
        {"width": 10**9},
        {"num_classes": 10**8},
        {"num_classes": 10**12},
        {"ensemble_size": 2},
        {"in_channels": 10**9, "mean": None},
        {"in_channels": 10**12},
        {"num_classes": -1},
        {"num_classes": "4"},
        {"__class__": "os.system"},
        {"device": "cuda"},
    ],
)
def test_weights_that_ask_for_another_architecture_take_no_memory(tmp_path, change):
    architecture = {k: v for k, v in {**ARCHITECTURE, **change}.items() if v is not None}
    assert_unfitting(tmp_path / "weights.safetensors", {"architecture": architecture})


@pytest.mark.parametrize(
    "change",
    [
        {"members": 10**9},
        {"members": 10**20},
        {"members": -1},
        {"members": "2"},
        {"members": None},
        {"members": 1},
        {"name": "single"},
        {"name": "forest"},
        {"name": ["batch_ensemble"]},
        {"name": "__class__"},
        {"device": "cuda"},
        {"architecture": "resnet8"},
        {"architecture": []},
        {"architecture": None},
        {"architecture": {}},
    ],
)
def test_weights_that_ask_for_another_student_take_no_memory(tmp_path, change):
    assert_unfitting(tmp_path / "weights.safetensors", change)


@pytest.mark.parametrize("spec", [None, [], "batch_ensemble", 3, {}])
def test_weights_whose_spec_is_none_are_refused(tmp_path, spec):
    path = tmp_path / "weights.safetensors"
    student = build_student("batch_ensemble", ARCHITECTURE, members=2)
    student.spec = spec
    save_student(path, student, {})
    assert refusal(load_student, path).startswith(f"{path}: its weights fit no network")


@pytest.mark.parametrize(
    "change",
    [
        {"members": 10**4},
        {"members": 10**9},
        {"members": 10**20},
        {"members": -1},
        {"architecture": ARCHITECTURE | {"in_channels": 10**9}},
        {"architecture": ARCHITECTURE | {"name": "resnet9999998"}},
        {"cut": "block"},
        {"cut": ["stage"]},
        {"widen": 1e200},
        {"widen": float("inf")},
        {"widen": float("nan")},
        {"groups": 10**9},
        {"groups": 0.5},
    ],
)
@pytest.mark.parametrize("kind", ["hydra", "mimo", "packed"])
def test_weights_that_ask_for_a_student_of_other_options_take_no_memory(tmp_path, kind, change):
    assert_unfitting(tmp_path / "weights.safetensors", change, kind)
    assert torch.is_grad_enabled()  # refused at the end of a no_grad


TIMM = {"name": "timm:test_vit", "options": {"img_size": 32}, "mean": [0.5] * 3, "std": [0.2] * 3}
TIMM |= {"num_classes": 4, "in_channels": 3}


@pytest.fixture
def online(monkeypatch, tmp_path):
    """Where whatever asks for a file of the internet is noted."""
    asked = []

    def asks(*arguments, **_):
        asked.append(arguments)
        raise OSError("no network here")

    monkeypatch.chdir(tmp_path)
    for name in ("socket.create_connection", "socket.socket.connect", "urllib.request.urlopen"):
        monkeypatch.setattr(name, asks)
    monkeypatch.setattr("torch.hub.load_state_dict_from_url", asks)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", asks)
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", asks)
    yield asked
    assert not asked


@pytest.mark.parametrize(
    "change",
    [
        {"pretrained": True},
        {"pretrained": "canary.pth"},
        {"pretrained": False},
        {"name": "timm:test_vit.r160_in1k", "pretrained": True},
        {"name": "timm:hf-hub:someone/else"},
        {"name": "timm:hf_hub:someone/else"},
        {"name": "timm:local-dir:."},
        {"name": "timm:../test_vit"},
        {"name": "torchvision:../resnet18"},
        {"name": "torchvision:hub"},
        {"name": "torchvision:get_model", "options": {"name": "resnet18", "weights": "DEFAULT"}},
        {"name": "torchvision:resnet18", "options": {"weights": "DEFAULT"}},
        {"name": "torchvision:resnet18", "options": {"pretrained": True}},
        {"options": {"pretrained": True}},
        {"options": {"checkpoint_path": "canary.pth"}},
        {"options": {"cache_dir": "canary"}},
        {"options": {"pretrained_cfg": {"file": "canary.pth"}}},
        {"options": {"pretrained_cfg_overlay": {"url": "http://127.0.0.1/canary.pth"}}},
        {"options": {"img_size": 32, "depth": 10**7}},
        {"options": {"img_size": 32, "embed_dim": 10**9}},
        {"options": {"img_size": 10**7}},
        {"options": ["img_size"]},
        {"options": "img_size"},
    ],
)
def test_weights_of_a_librarys_network_fetch_and_load_nothing(tmp_path, hostile, online, change):
    (tmp_path / "canary.pth").write_bytes(hostile["torch"])
    path = tmp_path / "weights.safetensors"
    student = build_student("single", TIMM, members=1)
    student.spec = {**student.spec, "architecture": {**TIMM, **change}}
    save_student(path, student, {})
    before = sorted(tmp_path.iterdir())
    with little_memory():
        assert one_line(path)
    assert sorted(tmp_path.iterdir()) == before


def one_line(path):
    with pytest.raises(InputError) as caught:
        load_student(path)
    message = str(caught.value)
    assert message.isprintable()
    assert message.startswith(str(path))
    return message


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("file:../outside.py:build", {}),
        ("file:/OUTSIDE:build", {}),
        ("file:link.py:build", {}),
        ("file:venv/lib/python3.11/site-packages/its.py:mkdir", {"path": "canary"}),
        ("file:.venv/its.py:mkdir", {"path": "canary"}),
        ("file:mine.py:mkdir", {"path": "canary"}),
        ("file:mine.py:mkdir", {"path": "canary", "mode": 0o777}),
        ("file:mine.py:os.mkdir", {"path": "canary"}),
        ("file:mine.py:__import__", {"name": "antigravity"}),
        ("file:mine.txt:build", {}),
        ("file:absent.py:build", {}),
    ],
)
def test_weights_run_no_file_but_the_users_own(tmp_path, monkeypatch, name, options):
    folder = tmp_path / "project"
    harm = "from os import mkdir\nmkdir('canary')\n"
    for place in ("venv/lib/python3.11/site-packages/its.py", ".venv/its.py", "../outside.py"):
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        (folder / place).write_text(harm)
    (folder / "mine.txt").write_text(harm)
    (folder / "mine.py").write_text("import os\nfrom os import mkdir\n")
    (folder / "link.py").symlink_to(tmp_path / "outside.py")
    monkeypatch.chdir(folder)
    student = build_student("single", ARCHITECTURE, members=1)
    name = name.replace("/OUTSIDE", str(tmp_path / "outside.py"))
    student.spec["architecture"] = {**ARCHITECTURE, "name": name, "options": options}
    del student.spec["architecture"]["width"]
    save_student("weights.safetensors", student, {})
    one_line("weights.safetensors")
    assert not (folder / "canary").exists()


def assert_unfitting(path, change, kind="batch_ensemble"):
    student = build_student(kind, ARCHITECTURE, members=2)
    student.spec = {**student.spec, **change}
    save_student(path, student, {})
    assert refusal(load_student, path).startswith(f"{path}: its weights fit no network")


def safetensors(header, data=b"", length=None):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def tensor(start, end, shape, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


@pytest.mark.parametrize(
    "content",
    [
        safetensors({}, length=2**63),
        safetensors({}, length=2**40),
        safetensors({"a": tensor(0, 2**40, [2**38])}, bytes(16)),
        safetensors({"a": tensor(-8, 0, [2])}, bytes(16)),
        safetensors({"a": tensor(0, 16, [4]), "b": tensor(0, 16, [4])}, bytes(16)),
        safetensors({"a": tensor(0, 4, [2**33, 2**33])}, bytes(4)),
        safetensors({"a": tensor(0, 4, [1], "PICKLE")}, bytes(4)),
        safetensors(b"[" * 100_000),
        safetensors({"__metadata__": {"ensdistill": "[" * 100_000}}),
        safetensors({"__metadata__": {"ensdistill": "1" * 10_000}}),
    ],
)
def test_a_header_that_lies_is_refused(tmp_path, content):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(content)
    for read in (load_student, read_header):
        assert refusal(read, path).startswith(f"{path}: damaged, or not weights of this package")


# --- HDF5 ------------------------------------------------------------------------------------


def another_file(path):
    write_hdf5(path, {"test/logits": noise(3, 2, 2) / 1.0, "test/labels": np.arange(3)}, {})
    return str(path)


def external_link(file, other):
    file["test"] = h5py.ExternalLink(other, "/test")


def soft_link(file, _):
    file["elsewhere/logits"], file["elsewhere/labels"] = noise(3, 2, 2) / 1.0, np.arange(3)
    file["test"] = h5py.SoftLink("/elsewhere")


def another_files_bytes(file, other):
    size = os.path.getsize(other)
    file.create_dataset("test/labels", (size,), "u1", external=[(other, 0, size)])
    file["test/logits"] = np.zeros((size, 1, 1))


def virtual(file, other):
    for name, shape in (("logits", (3, 2, 2)), ("labels", (3,))):
        layout = h5py.VirtualLayout(shape, "f8")
        layout[:] = h5py.VirtualSource(other, f"test/{name}", shape)
        file.create_virtual_dataset(f"test/{name}", layout)


@pytest.mark.parametrize(
    ("show", "expected"),
    [
        (external_link, "the link 'test' leads elsewhere"),
        (soft_link, "the link 'test' leads elsewhere"),
        (another_files_bytes, "the data of 'test/labels' are in another file"),
        (virtual, "the data of 'test/labels' are in another file"),
    ],
)
def test_a_results_file_shows_nothing_that_is_stored_elsewhere(tmp_path, show, expected):
    path = tmp_path / "logits.h5"
    with h5py.File(path, "w") as file:
        show(file, another_file(tmp_path / "secret.h5"))
    with h5py.File(path) as file:
        assert file["test/labels"][:].any()
    assert expected in refusal(read_prediction, path, "test")
    assert str(path) in refusal(splits_of, path)


@pytest.mark.parametrize("harm", [lambda file: file.create_group("test/logits"), lambda file: 0])
def test_what_is_no_array_in_an_arrays_place_is_refused(tmp_path, harm):
    path = tmp_path / "logits.h5"
    with h5py.File(path, "w") as file:
        file["test/labels"] = np.dtype("i8")  # a named type
        harm(file)
    assert str(path) in refusal(read_prediction, path, "test")


@pytest.mark.parametrize("options", [{"chunks": (1, 3, 64, 64)}, {}, {"chunks": True}])
def test_a_small_file_of_ten_million_images_is_refused(tmp_path, options):
    path = tmp_path / "images.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("test/images", (10**7, 3, 64, 64), "u1", fillvalue=1, **options)
        file["test/labels"] = np.zeros(3)
    assert path.stat().st_size < 10_000
    message = refusal(read_images, path, "test")
    assert message.startswith(f"{path}: ")
    assert "of 'test/images' (10000000, 3, 64, 64) not all is stored" in message


# --- archives --------------------------------------------------------------------------------

SECRET = encode(np.full((8, 8), 77, np.uint8))


def add(path, name, data=b"", **fields):
    """Put one more member of any kind into a tar archive."""
    with tarfile.open(path, "a", format=fields.pop("format", tarfile.PAX_FORMAT)) as archive:
        member = tarfile.TarInfo(name)
        member.size = len(data)
        for key, value in fields.items():
            setattr(member, key, value)
        archive.addfile(member, io.BytesIO(data))


@pytest.mark.parametrize(
    "kind", ["SYMTYPE", "LNKTYPE", "CHRTYPE", "BLKTYPE", "FIFOTYPE", "DIRTYPE"]
)
@pytest.mark.parametrize("up", ["", "../../.."])
def test_no_member_of_a_tar_leads_outside(tmp_path, kind, up):
    write_tree(tmp_path, {"secret.png": SECRET})
    path = write_tar(tmp_path / "below/x.tar", good_tree())
    link = f"{up}{tmp_path}/secret.png" if not up else f"{up}/secret.png"
    name = f"{up}/train/cat/9.png" if up else "train/cat/9.png"
    add(path, name, type=getattr(tarfile, kind), linkname=link, devmajor=1, devminor=5)
    before = sorted(tmp_path.rglob("*"))
    if kind in ("SYMTYPE", "LNKTYPE"):
        message = refusal(folder, path=path, size=None)
        assert message.startswith(f"{path}/{name}: is a link that cannot be followed")
        return
    data = folder(path=path, size=None)
    assert data.sha256 == folder(path=write_tree(tmp_path / "plain", good_tree()), size=None).sha256
    assert not (data.train[0] == 77).all(axis=(1, 2, 3)).any()
    assert set(before) == {p for p in tmp_path.rglob("*") if "plain" not in p.parts}


def test_a_link_and_what_follows_through_it_write_nothing(tmp_path):
    """An archive first makes a folder of its own a link to another, then puts a file into it."""
    path = write_tar(tmp_path / "x.tar", good_tree())
    (tmp_path / "outside").mkdir()
    add(path, "train/bird", type=tarfile.SYMTYPE, linkname=str(tmp_path / "outside"))
    add(path, "test/bird", type=tarfile.SYMTYPE, linkname=str(tmp_path / "outside"))
    for split in ("train", "test"):
        add(path, f"{split}/bird/0.png", encode(noise(40, 30)))
    with tarfile.open(path) as archive:
        archive.extractall(tmp_path / "naive", filter="fully_trusted")
    assert [file.name for file in (tmp_path / "outside").iterdir()] == ["0.png"]
    (tmp_path / "outside/0.png").unlink()
    assert "/bird: is a link that cannot be followed" in refusal(folder, path=path, size=None)
    assert not list((tmp_path / "outside").iterdir())


NAMES = [
    "train/a\nERROR x/0.png",
    "train/a/\x1b[2J\x1b[31m0.png",
    "train/\u202egnp/0.png",
    "train/a/\udcff.png",
    "train/a\u2028/0.png",
    "train/$(touch canary)/;touch canary;.png",
    "train/<script>alert(1)<script>/0.png",
    "train/" + "a" * 5000 + "/0.png",
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("write", [write_tar, write_zip])
def test_names_of_members_are_shown_in_one_harmless_line(tmp_path, name, write, capsys):
    if write is write_zip:
        name = name.replace("\udcff", "\N{LATIN SMALL LETTER Y WITH DIAERESIS}")
    path = write(tmp_path / "x.archive", {**good_tree(), name: b"no image"})
    message = fails(tmp_path / "images.h5", path=path)
    assert message.isprintable()
    assert message.endswith(".png: not an image of a known format")
    path = write(tmp_path / "y.archive", {**good_tree(), name: encode(noise(40, 30))})
    data_or_message = fails(tmp_path / "images.h5", path=path)
    assert data_or_message.isprintable()
    assert "is in train/ but not in test/" in data_or_message
    assert not list(Path().glob("canary"))


def test_a_name_with_nul_ends_there(tmp_path):
    path = write_tar(tmp_path / "x.tar", good_tree())
    content = Path(path).read_bytes().replace(b"train/cat/1.png\0", b"train/cat/1\0png\0", 1)
    Path(path).write_bytes(content)
    assert "not a whole tar or zip archive" in fails(tmp_path / "images.h5", path=path)


# --- bombs in archives -----------------------------------------------------------------------


class Zeros(io.RawIOBase):
    """That many zeros."""

    def __init__(self, size):
        self.left = size

    def readable(self):
        return True

    def readinto(self, buffer):
        count = min(len(buffer), self.left)
        buffer[:count] = bytes(count)
        self.left -= count
        return count


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2])
@pytest.mark.parametrize("honest", [True, False])
def test_a_zip_bomb_is_refused_before_it_swells(tmp_path, method, honest):
    """One that hides its size says it in neither of its two headers."""
    path = Path(write_zip(tmp_path / "x.zip", good_tree()))
    with zipfile.ZipFile(path, "a", method) as archive, archive.open("train/cat/9.png", "w") as f:
        for _ in range(BOMB >> 20):
            f.write(bytes(2**20))
        f.write(bytes(BOMB % 2**20))
    assert path.stat().st_size < 2**21
    if not honest:
        content = path.read_bytes()
        assert content.count(struct.pack("<L", BOMB)) == 2
        path.write_bytes(content.replace(struct.pack("<L", BOMB), struct.pack("<L", 100)))
    with little_memory(), zipfile.ZipFile(path) as archive, pytest.raises(MemoryError):
        archive.read("train/cat/9.png")
    message = refusal(folder, path=str(path), size=None)
    if honest:
        assert message == (
            f"{path}/train/cat/9.png: has 536,883,257 bytes; images have at most 268,435,456"
        )
    elif method == zipfile.ZIP_DEFLATED:
        assert message.startswith(f"{path}: not a whole tar or zip archive (Bad CRC-32")
    else:
        assert message == (
            f"{path}: not a whole tar or zip archive (train/cat/9.png is not deflated, but bzip2)"
        )


def tar_header(name, size, type=tarfile.REGTYPE):
    member = tarfile.TarInfo(name)
    member.size, member.type = size, type
    return member.tobuf(tarfile.GNU_FORMAT)


def write_tar_bomb(path, *pieces):
    """A .tar.gz of these pieces; a number stands for that many zeros."""
    with gzip.open(path, "wb", compresslevel=1) as file:
        for piece in pieces:
            if isinstance(piece, int):
                for _ in range(piece >> 20):
                    file.write(bytes(2**20))
            else:
                file.write(piece)
    return str(path)


def pax(records):
    """A header whose records hold for the next member."""
    lines = b""
    for key, value in records.items():
        body = f" {key}={value}\n".encode()
        length = len(body)
        while len(str(length)) + len(body) != length:
            length = len(str(length)) + len(body)
        lines += str(length).encode() + body
    return tar_header("x", len(lines), tarfile.XHDTYPE) + lines.ljust(512, b"\0")


HOLE = {"GNU.sparse.size": 2**40, "GNU.sparse.map": f"{2**40},0"}
SPARSE = {"GNU.sparse.major": 1, "GNU.sparse.minor": 0, "GNU.sparse.realsize": 8}
IMAGE = tar_header("train/cat/9.png", len(SECRET)) + SECRET.ljust(512, b"\0")
TAR_BOMBS = {
    "a member": (
        [tar_header("train/cat/9.png", BOMB), BOMB],
        "train/cat/9.png: has 536,883,257 bytes; images have at most 268,435,456",
    ),
    "a long name": (
        [IMAGE, tar_header("././@LongLink", BOMB, tarfile.GNUTYPE_LONGNAME), BOMB],
        "a header of 536,883,257 bytes; at most 1,048,576 are read",
    ),
    "a pax header": (
        [IMAGE, tar_header("x", BOMB, tarfile.XHDTYPE), BOMB],
        "a header of 536,883,257 bytes; at most 1,048,576 are read",
    ),
    "a global header": (
        [IMAGE, tar_header("x", BOMB, tarfile.XGLTYPE), BOMB],
        "a header of 536,883,257 bytes; at most 1,048,576 are read",
    ),
    "a hole": (
        [IMAGE, pax(HOLE), tar_header("train/cat/8.png", 0)],
        "train/cat/8.png: has 1,099,511,627,776 bytes; images have at most",
    ),
    "a list of holes": (
        [IMAGE, pax(SPARSE), tar_header("train/cat/8.png", BOMB)]
        + [(f"{10**9}\n".encode() + b"0\n" * 2**20) for _ in range(100)],
        "it holds a sparse file",
    ),
    "an old list of holes": (
        [IMAGE, tar_header("train/cat/8.png", 0, tarfile.GNUTYPE_SPARSE)],
        "it holds a sparse file",
    ),
    "a size below zero": ([IMAGE, tar_header("a", -1024)], "a header of -1,024 bytes"),
    "a size below zero in a pax header": (
        [IMAGE, pax({"size": -2048}), tar_header("a", 0)],
        "a member ends before it begins",
    ),
    "a size beyond all": ([IMAGE, tar_header("a", 2**80)], "not a whole tar or zip archive"),
    "a size of letters": (
        [IMAGE, pax({"GNU.sparse.map": "a,b", "GNU.sparse.size": "c"}), tar_header("a", 0)],
        "not a whole tar or zip archive",
    ),
    "headers of headers": (
        [IMAGE, *([pax({"a": "b"})] * 5000)],
        "not a whole tar or zip archive (maximum recursion depth exceeded",
    ),
}


@pytest.mark.parametrize("what", TAR_BOMBS)
def test_a_tar_bomb_is_refused_before_it_swells(tmp_path, what):
    pieces, expected = TAR_BOMBS[what]
    path = write_tar_bomb(tmp_path / "x.tar.gz", *pieces, bytes(1024))
    assert os.path.getsize(path) < 2**23
    message = refusal(folder, path=path, size=None)
    assert message.startswith(path)
    assert expected in message


def test_a_tar_of_endless_headers_does_not_pile_up(tmp_path):
    path = Path(write_tar(tmp_path / "x.tar", good_tree()))
    with tarfile.open(path) as archive:
        images = path.read_bytes()[: archive.getmembers() and archive.offset]
    path.write_bytes(images + tar_header("x", 0) * 30_000 + bytes(1024))

    def peak(read):
        tracemalloc.start()
        read()
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    with tarfile.open(path) as archive:
        assert peak(lambda: list(archive)) > 10**7
    assert peak(lambda: folder(path=str(path), size=None)) < 3 * 10**6


def test_a_huge_file_in_a_folder_is_not_read(tmp_path):
    path = Path(write_tree(tmp_path / "tree", good_tree()))
    with (path / "train/cat/9.png").open("wb") as file:
        file.truncate(2**40)
    message = refusal(folder, path=str(path), size=None)
    assert message == (
        f"{path}/train/cat/9.png: has 1,099,511,627,776 bytes; images have at most 268,435,456"
    )


def test_what_is_no_file_in_a_folder_is_passed_over(tmp_path):
    path = Path(write_tree(tmp_path / "tree", good_tree()))
    os.mkfifo(path / "train/cat/8.png")
    (path / "train/cat/9.png").symlink_to("/dev/zero")
    (path / "train/loop").symlink_to(path)
    assert folder(path=str(path), size=None).train[0].shape[0] == 8


@pytest.mark.parametrize("size", [None, 40])
def test_many_images_that_are_small_only_as_files_fill_neither_memory_nor_disk(
    tmp_path, monkeypatch, size
):
    """A blank image of a million pixels is a file of a kilobyte."""
    monkeypatch.setattr(sources, "KEPT", 3 * 10**6)
    monkeypatch.setattr(images, "MOST_PIXELS", 3 * 10**6)
    files = {}
    for i in range(4):
        blank = Image.new("1", (1000, 1000))
        blank.putpixel((i, 0), 1)
        files[f"{'train' if i < 2 else 'test'}/a/{i % 2}.png"] = encode(blank)
    assert max(map(len, files.values())) < 2000
    path = write_zip(tmp_path / "x.zip", files)
    side = size or 1000
    assert folder(path=path, size=size).train[0].shape == (2, 1, side, side)
    make(tmp_path / "images.h5", path=path, size=size, validation=1)
    assert (tmp_path / "images.h5").stat().st_size < 50_000
    assert read_images(tmp_path / "images.h5", "test")[0].shape == (2, 1, side, side)


# --- bombs in images -------------------------------------------------------------------------

SIDE = 60_000


def chunk(kind, data):
    return struct.pack(">L", len(data)) + kind + data + struct.pack(">L", zlib.crc32(kind + data))


def png(*chunks, width=4, height=4):
    header = chunk(b"IHDR", struct.pack(">2L5B", width, height, 8, 0, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(bytes(20)))  # four rows of four
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + pixels + chunk(b"IEND", b"")


def jpeg(side):
    data = encode(noise(8, 8), "jpg")
    place = data.index(b"\xff\xc0") + 5
    return data[:place] + struct.pack(">2H", side, side) + data[place + 4 :]


def gif(side):
    data = encode(noise(8, 8), "gif")
    large = struct.pack("<2H", side, side)
    place = data.index(b",\0\0\0\0") + 5
    return data[:6] + large + data[10:place] + large + data[place + 4 :]


def tiff(side):
    tags = [(256, 4, side), (257, 4, side), (258, 3, 8), (259, 3, 1), (262, 3, 1), (273, 4, 8)]
    tags += [(277, 3, 1), (278, 4, side), (279, 4, 8)]
    entries = b"".join(struct.pack("<2H2L", tag, kind, 1, value) for tag, kind, value in tags)
    return b"II*\0" + struct.pack("<LH", 8, len(tags)) + entries + bytes(4)


def bmp(side):
    data = encode(noise(8, 8), "bmp")
    return data[:18] + struct.pack("<2l", side, side) + data[26:]


def webp(side):
    header = struct.pack("<L", 10) + bytes(4) + (side - 1).to_bytes(3, "little") * 2
    body = b"WEBPVP8X" + header + encode(noise(8, 8), "webp")[12:]
    return b"RIFF" + struct.pack("<L", len(body)) + body


LARGE = {
    "png": png(width=SIDE, height=SIDE),
    "jpg": jpeg(SIDE),
    "gif": gif(SIDE),
    "tif": tiff(SIDE),
    "bmp": bmp(SIDE),
    "webp": webp(16_000),
    "pgm": f"P5 {SIDE} {SIDE} 255\n".encode() + bytes(100),
}


@pytest.mark.parametrize("ending", LARGE)
def test_an_image_of_huge_dimensions_is_refused(tmp_path, ending):
    with pytest.raises(Image.DecompressionBombError), Image.open(io.BytesIO(LARGE[ending])):
        pass
    message = refusal(read_one, LARGE[ending], tmp_path, f"0.{ending}")
    assert f"train/a/0.{ending}: not a readable image (Image size (" in message
    assert "exceeds limit of 178956970 pixels" in message


def test_an_image_above_the_limit_is_refused_in_tinyimagenet_too(tmp_path, monkeypatch):
    """Between Pillow's limit and its double it only warns."""
    large = png(width=10_000, height=10_000)
    with pytest.warns(Image.DecompressionBombWarning), Image.open(io.BytesIO(large)):
        pass
    top = "tiny-imagenet-200"
    files = {
        f"{top}/wnids.txt": b"n1\n",
        f"{top}/val/val_annotations.txt": b"val_0.JPEG\tn1\n",
        f"{top}/train/n1/images/n1_0.JPEG": large,
    }
    path = Path(write_zip(tmp_path / f"{top}.zip", files))
    archive = publish(monkeypatch, path, path.read_bytes())
    message = refusal(tinyimagenet, archives=[archive])
    assert message.startswith(f"{archive}/{top}/train/n1/images/n1_0.JPEG: not a readable image")
    assert "exceeds limit of 89478485 pixels" in message


SWOLLEN = zlib.compress(bytes(BOMB // 2))


@pytest.mark.parametrize(
    "inside",
    [
        chunk(b"zTXt", b"a\0\0" + SWOLLEN),
        chunk(b"iTXt", b"a\0\1\0\0\0" + SWOLLEN),
        chunk(b"iCCP", b"a\0\0" + SWOLLEN),
        b"".join(chunk(b"zTXt", b"a%d\0\0" % i + zlib.compress(bytes(2**20))) for i in range(99)),
    ],
    ids=["text", "international text", "colour profile", "many texts"],
)
def test_what_swells_beside_the_pixels_is_refused(tmp_path, inside):
    message = refusal(read_one, png(inside), tmp_path)
    assert "train/a/0.png: not a readable image" in message


def test_a_swelling_row_of_pixels_is_cut_off(tmp_path):
    data = png().replace(zlib.compress(bytes(20)), b"")
    data = data[:33] + chunk(b"IDAT", SWOLLEN) + chunk(b"IEND", b"")
    with little_memory():
        read = read_one(data, tmp_path).train[0]
    np.testing.assert_array_equal(read, np.zeros((1, 1, 4, 4)))


@pytest.mark.parametrize("ending", ["gif", "tif", "webp", "png"])
def test_of_thousands_of_frames_one_is_read(tmp_path, ending, monkeypatch):
    first, rest = Image.fromarray(noise(4, 4)), [Image.fromarray(noise(4, 4, seed=1))] * 1000
    if ending == "webp":
        first, rest = first.convert("RGB"), [frame.convert("RGB") for frame in rest]
    data = encode(first, ending, save_all=True, append_images=rest)
    with Image.open(io.BytesIO(data)) as picture:
        assert picture.n_frames >= 2
    seen = []
    for name in ("GifImagePlugin.GifImageFile", "TiffImagePlugin.TiffImageFile"):
        monkeypatch.setattr(f"PIL.{name}.seek", lambda self, frame: seen.append(frame))
    read = read_one(data, tmp_path, f"0.{ending}").train[0]
    np.testing.assert_array_equal(read[0, 0], noise(4, 4))
    assert not any(seen)


# --- configuration ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return Project.new(tmp_path_factory.mktemp("security") / "project")


def planned(project, config):
    (project.folder / "config.yaml").write_text(config)
    done = project.snakemake("--dry-run")
    assert done.returncode != 0
    assert not list(project.folder.rglob("canary*"))
    return done.stdout + done.stderr


@pytest.mark.parametrize(
    "tag",
    [
        "!!python/object/apply:os.system [mkdir canary]",
        "!!python/object/new:os.system [mkdir canary]",
        "!!python/object/apply:os.mkdir [canary]",
        "!!python/name:os.system",
        "!!python/module:os",
    ],
)
def test_yaml_that_names_code_runs_none(project, tag):
    output = planned(project, f"run: {tag}\n")
    assert "config.yaml" in output or "YAML" in output


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("../escape", "study"),
        ("/tmp/escape", "study"),
        ("tiny\\n", "study"),
        ("a b", "study"),
        ("$(mkdir canary)", "method"),
        ("kd;mkdir canary", "method"),
        ("{wildcards.seed}", "method"),
        ("../../0", "method"),
    ],
)
def test_a_name_that_becomes_a_path_is_a_plain_word(project, name, kind):
    study = name if kind == "study" else "tiny"
    method = name if kind == "method" else "kd"
    text = f'run: ["{study}"]\nstudies: {{"{study}": {{methods: {{"{method}": {{label: KD}}}}}}}}\n'
    output = planned(project, text)
    sentences = [line for line in output.splitlines() if "config.yaml" in line]
    assert len([line for line in sentences if "should match pattern" in line]) == 1


def laughs():
    """YAML of lists of nine, ten deep: 3.5 billion words in 600 bytes."""
    lists = ["&a0 [lol, lol, lol, lol, lol, lol, lol, lol, lol]"]
    lists += [f"&a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 10)]
    return f"[{', '.join(lists)}]"


@pytest.mark.parametrize(
    "text",
    [
        "run: [tiny]\nstudies: {{tiny: {{images: {{source: folder, path: {}}}}}}}",
        "run: [tiny]\nstudies: {{tiny: {{members: {}}}}}",
        "run: {}\nstudies: {{tiny: {{}}}}",
        "run: [tiny]\nstudies: {{tiny: {{}}}}\nmore: {}",
    ],
)
def test_yaml_that_swells_is_refused(project, text):
    config = yaml.safe_load(text.format(laughs()))
    assert len(refusal(read_configuration, config)) < 300
    assert "config.yaml" in planned(project, text.format(laughs()))
