"""Damaged files of every kind that is read: a right result, or one sentence that names the file.

Mutated copies are read in processes of their own, with a limit of time and memory. Some are in the
suite; `python -m pytest -m fuzz -s` reads `COPIES` of each kind, and says the seeds of what failed.
What once failed stands below, as small as it goes.
"""

import io
import json
import os
import struct
from dataclasses import replace

import h5py
import numpy as np
import onnx
import pytest

from ensdistill.deployment import Deployment
from ensdistill.own_data import current_state
from ensdistill.pictures import decode, size_of
from tests.builders import encode, noise
from tests.fuzzed import DEPLOYED, KINDS
from tests.fuzzing import campaign, copies_of

COPIES = int(os.environ.get("FUZZ_COPIES", 2000))
"""Of each kind, in the whole campaign."""
FEW = 25
"""Of each kind, in the suite."""


@pytest.mark.parametrize("name", KINDS)
def test_few_mutated_copies(tmp_path, name):
    summary = campaign(KINDS[name], tmp_path, range(FEW), copies_of(name, KINDS[name]))
    assert not summary.failures
    assert sum(summary.outcomes.values()) == FEW
    assert summary.outcomes["refused"] or name == "record"


@pytest.mark.fuzz
@pytest.mark.parametrize("name", KINDS)
def test_mutated_copies(tmp_path, name):
    summary = campaign(KINDS[name], tmp_path, range(COPIES), copies_of(name, KINDS[name]))
    print(f"\n{name}: {summary}")
    assert not summary.failures


# --- what tells that the campaign can fail ---------------------------------------------------


def test_a_campaign_sees_what_goes_wrong(tmp_path):
    def read(path):
        said = path.read_text()
        if said == "crash":
            os.abort()
        if said == "hang":
            os.kill(os.getpid(), 27)  # as the timer would, after seconds
        if said == "memory":
            return bytearray(2**31)
        if said == "wrong":
            raise ValueError("x")
        return said

    kind = replace(KINDS["results"], read=read)
    words = ["crash", "fine", "hang", "memory", "wrong"]
    found = campaign(kind, tmp_path, range(5), lambda sound, at: words[at].encode())
    assert found.outcomes == {"failed": 4, "other": 1}
    assert [found.failures[it].split()[0] for it in (0, 2, 3, 4)] == [
        "ended", "took", "MemoryError:", "ValueError:"
    ]  # fmt: skip


def test_a_seed_gives_the_same_copy_each_time(tmp_path):
    sound = KINDS["png"].make(tmp_path).read_bytes()
    copy = copies_of("png", KINDS["png"])
    assert [copy(sound, seed) for seed in range(9)] == [copy(sound, seed) for seed in range(9)]
    assert len({copy(sound, seed) for seed in range(99)} - {sound}) > 80


# --- what once failed ------------------------------------------------------------------------


def assert_refused(name, folder, *changes):
    found = campaign(KINDS[name], folder, range(len(changes)), lambda sound, at: changes[at](sound))
    assert not found.failures
    assert found.outcomes == {"refused": len(changes)}
    return found


def test_a_chunk_shorter_than_its_checksum_does_not_crash(tmp_path):
    """HDF5 takes four bytes off its length, and then reads what follows in the memory."""

    def shortened(sound, length):
        path = tmp_path / "x.h5"
        path.write_bytes(sound)
        with h5py.File(path) as file:
            chunk = file["val/logits"].id.get_chunk_info(0)
        # The key of the only chunk: its size, its filters, where it begins along each axis.
        known = struct.pack("<LL4Q", chunk.size, 0, 0, 0, 0, 0)
        start = sound.index(known)
        return sound[:start] + struct.pack("<L", length) + sound[start + 4 :]

    lengths = (0, 1, 4, 2**31, 2**32 - 1)
    changes = [lambda sound, length=length: shortened(sound, length) for length in lengths]
    assert_refused("logits.h5", tmp_path / "work", *changes)


def test_a_heap_of_texts_whose_sizes_do_not_add_up_does_not_hang(tmp_path):
    def changed(sound, place, content):
        start = sound.index(b"GCOL") + place
        return sound[:start] + content + sound[start + len(content) :]

    changes = [(0, b"XCOL"), (8, b"\xff" * 4), (8, bytes(8)), (16, b"\xff" * 64), (24, b"\xff" * 8)]
    changes += [(11, b"\x40"), (4, b"\2")]
    assert_refused(
        "images.h5 of files",
        tmp_path,
        *(lambda it, c=change: changed(it, *c) for change in changes),
    )


def set_in(place, value, kind="attribute"):
    """Changes one attribute, or an array, of an HDF5 file."""

    def change(sound):
        buffer = io.BytesIO(sound)
        with h5py.File(buffer, "r+") as file:
            if kind == "attribute":
                holder, name = place.rpartition("/")[::2]
                file[holder or "/"].attrs[name] = value
            else:
                array = file[place][()]
                del file[place]
                file[place] = value(array) if callable(value) else value
        return buffer.getvalue()

    return change


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("classes", "3"),
        ("classes", "[1, 2]"),
        ("classes", 5),
        ("mean", "[0.5]"),
        ("mean", "0.5"),
        ("mean", '["a", "b", "c"]'),
        ("std", "[0.5, NaN, 0.5]"),
        ("std", "{}"),
        ("evaluation", "7"),
        ("evaluation", '{"resize": 8}'),
        ("evaluation", '{"resize": 8, "crop": 1e99}'),
    ],
)
def test_attributes_that_do_not_describe_images_are_refused(tmp_path, key, value):
    assert_refused("images.h5", tmp_path, set_in(key, value))


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("val/images", lambda it: it[..., 0]),
        ("val/images", lambda it: it.astype("f4")),
        ("train/images", lambda it: it[:, :1]),
        ("train/images", lambda it: it[:, :, :3]),
        ("test/images", lambda it: it[:-1]),
        ("test/images", np.dtype("f4")),
        ("test/labels", lambda it: it[:, None]),
        ("test/labels", lambda it: it + 0.5),
        ("test/labels", np.dtype("i8")),
    ],
)
def test_arrays_that_are_no_images_with_labels_are_refused(tmp_path, place, value):
    assert_refused("images.h5", tmp_path, set_in(place, value, "array"))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("re", 8),
        ("resize", "8"),
        ("resize", 10**12),
        ("resize", 5),
        ("crop", -1),
        ("mode", "F"),
        ("mode", 3),
    ],
)
def test_files_in_images_h5_that_would_be_decoded_otherwise_are_refused(tmp_path, key, value):
    assert_refused("images.h5 of files", tmp_path, set_in(f"train/files/{key}", value))


@pytest.mark.parametrize("value", ["x", "", np.nan, -1.0, np.inf, np.arange(3), h5py.Empty("f")])
def test_logits_whose_offset_is_no_offset_are_refused(tmp_path, value):
    assert_refused("logits.h5 dirichlet", tmp_path, set_in("concentration_offset", value))


@pytest.mark.parametrize("value", [np.inf, np.nan, "x", "1" * 30])
def test_given_logits_whose_number_of_parameters_is_none_are_refused(tmp_path, value):
    assert_refused("given logits", tmp_path, set_in("parameters", value))


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("val/labels", np.dtype("i8")),
        ("val/logits", np.dtype("f4")),
        ("val/labels", lambda it: it + 3),
        ("val/labels", lambda it: it * 1.0),
        ("val/logits", lambda it: it.astype("i8")),
        ("val/logits", lambda it: it[:, :, :0]),
        ("val/logits", lambda it: it.astype("S3")),
    ],
)
def test_arrays_that_are_no_logits_with_labels_are_refused(tmp_path, place, value):
    assert_refused("logits.h5", tmp_path, set_in(place, value, "array"))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("classes", []),
        ("classes", ["a", 2, "c"]),
        ("classes", "abc"),
        ("channels", "3"),
        ("size", "88"),
        ("size", [8]),
        ("size", [10**9, 10**9]),
        ("resize", [8]),
        ("resize", 10**9),
        ("crop", 9),
        ("members", 0),
        ("prediction", {"name": "x"}),
        ("prediction", {"prediction": "0.5"}),
        ("prediction", {"prediction": "dirichlet", "concentration_offset": "x"}),
        ("temperature", "1"),
        ("temperature", -1.0),
        ("temperature", float("nan")),
        ("scores", [None]),
        ("scores", {}),
        ("origin", 3),
    ],
)
def test_what_an_exported_student_says_of_itself_is_checked(tmp_path, key, value):
    assert Deployment.from_json(DEPLOYED.to_json()) == DEPLOYED
    text = json.dumps({**json.loads(DEPLOYED.to_json()), key: value})
    with pytest.raises((KeyError, TypeError, ValueError)):
        Deployment.from_json(text)

    def change(sound):
        model = onnx.load_from_string(sound)
        model.metadata_props[0].value = text
        return model.SerializeToString()

    assert_refused("onnx", tmp_path, change)


def test_an_exported_student_that_answers_something_else_is_refused(tmp_path):
    def one_class_less(sound):
        model = onnx.load_from_string(sound)
        model.graph.initializer[0].dims[0] -= 1
        model.graph.initializer[0].raw_data = model.graph.initializer[0].raw_data[: 2 * 27 * 4]
        return model.SerializeToString()

    def other_input(sound):
        model = onnx.load_from_string(sound)
        model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 5
        return model.SerializeToString()

    def no_text(sound):
        return sound.replace(b"prediction", b"predict\xff\xff\xff")

    assert_refused("onnx", tmp_path, one_class_less, other_input, no_text)


@pytest.mark.parametrize("write", ["csv", "parquet"])
def test_a_table_with_a_zero_in_a_path_or_names_that_are_no_text_is_refused(tmp_path, write):
    change = {"csv": (b"some/1/", b"some\0/1"), "parquet": (b"label", b"\x80abel")}[write]
    assert_refused(write, tmp_path, lambda sound: sound.replace(*change))


def test_the_state_of_a_table_with_a_zero_in_a_path_is_known(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("path,label\na\0b.png,cat\n")
    assert current_state(str(path)) == current_state(str(path))


RECORDS = ["[]", "{}", "3", '{"states": [], "made": null}', '{"states": {}}', "[" * 9999]
RECORDS += [
    '{"states": {"a": 1}, "made": null}',
    '{"states": 0.5, "made": 1}',
    '{"states":{},"made":2}',
]


@pytest.mark.parametrize("text", RECORDS)
def test_a_record_of_other_things_is_as_if_there_were_none(tmp_path, text):
    found = campaign(KINDS["record"], tmp_path, [0], lambda sound, at: text.encode())
    assert not found.failures


@pytest.mark.parametrize("orientation", [0, 1, 4, 5, 8, 9, 64640])
def test_the_size_of_a_picture_is_that_of_its_pixels_whatever_its_orientation(orientation):
    exif = (
        b"Exif\0\0MM\0*\0\0\0\x08\0\1\1\x12\0\3\0\0\0\1" + struct.pack(">H", orientation) + bytes(6)
    )
    data = encode(noise(6, 9), "jpg", exif=exif)
    assert size_of("x", data) == decode("x", data).size[::-1]
