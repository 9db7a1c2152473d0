import json
import os
import stat
import time
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest

from ensdistill import InputError
from ensdistill.files import atomic, open_hdf5, write_csv, write_hdf5, write_text

# --- whole files -----------------------------------------------------------------------------


def test_atomic_leaves_just_the_finished_file(tmp_path):
    path = tmp_path / "new" / "deep" / "x.txt"
    with atomic(path) as temporary:
        temporary.write_text("whole")
        assert not path.exists()
        assert temporary.parent == path.parent  # else it could not be renamed at once
    assert path.read_text() == "whole"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("older", [None, "older"])
def test_a_failure_inside_atomic_leaves_what_was_there(tmp_path, error, older):
    path = tmp_path / "x.txt"
    if older:
        path.write_text(older)

    def write_half():
        with atomic(path) as temporary:
            temporary.write_text("half")
            raise error

    with pytest.raises(error):
        write_half()
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == (
        {"x.txt": older} if older else {}
    )


def test_what_a_killed_writer_left_is_removed_by_the_next_of_the_same_file_alone(tmp_path):
    for name in ("x.txt", "xy.txt", "x.csv"):
        with pytest.raises(FileNotFoundError), atomic(tmp_path / name) as temporary:
            temporary.rename(tmp_path / f"{temporary.name}.kept")  # as if it were killed here
    for path in tmp_path.iterdir():
        path.rename(path.with_suffix(""))
    write_text(tmp_path / "x.txt", "whole")
    names = sorted(path.name for path in tmp_path.iterdir())
    assert len(names) == 3
    assert names[0].startswith(".x.csv-")
    assert names[1].startswith(".xy.txt-")
    assert names[2] == "x.txt"


def test_atomic_replaces_an_older_file(tmp_path):
    (tmp_path / "x.txt").write_text("a longer older file")
    write_text(tmp_path / "x.txt", "τ\n")
    assert (tmp_path / "x.txt").read_bytes() == "τ\n".encode()


@pytest.mark.parametrize("name", ["x.png", "x.csv.gz", "x"])
def test_the_temporary_name_is_hidden_and_keeps_the_ending(tmp_path, name):
    with atomic(tmp_path / name) as temporary:
        assert temporary.suffix == Path(name).suffix
        assert temporary.name.startswith(".")


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_the_files_mode_follows_the_umask(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        write_text(tmp_path / "x.txt", "")
        assert os.umask(umask) == umask
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "x.txt").stat().st_mode) == mode


def test_a_table_keeps_full_precision(tmp_path):
    frame = pd.DataFrame({"system": ["KD+ODS", "BE"], "nll": [1 / 3, np.pi * 1e-7]})
    write_csv(tmp_path / "x.csv", frame)
    lines = (tmp_path / "x.csv").read_text().splitlines()
    assert lines[0] == "system,nll"
    assert [float(line.split(",")[1]) for line in lines[1:]] == [1 / 3, np.pi * 1e-7]


# --- HDF5 ------------------------------------------------------------------------------------

ARRAYS = {
    "val/logits": np.random.default_rng(0).normal(size=(50, 4, 10)).astype(np.float32),
    "test/labels": np.arange(300, dtype=np.int64),
}
ATTRIBUTES = {"study": "digits", "seed": 3, "eta": 1 / 255, "nested": {"τ": [1, None, "x"]}}


def test_arrays_and_attributes_come_back_as_written(tmp_path):
    write_hdf5(tmp_path / "x.h5", ARRAYS, ATTRIBUTES)
    with open_hdf5(tmp_path / "x.h5") as file:
        for name, array in ARRAYS.items():
            assert file[name].dtype == array.dtype
            assert file[name].fletcher32
            assert file[name].compression == "gzip"
            np.testing.assert_array_equal(file[name][:], array)
        read = dict(file.attrs)
    assert json.loads(read.pop("nested")) == ATTRIBUTES["nested"]
    assert read == {"study": "digits", "seed": 3, "eta": 1 / 255}


def test_the_same_content_makes_the_same_bytes_at_another_time(tmp_path):
    write_hdf5(tmp_path / "x.h5", ARRAYS, ATTRIBUTES)
    time.sleep(1.1)  # HDF5 counts in seconds
    write_hdf5(tmp_path / "y.h5", ARRAYS, ATTRIBUTES)
    assert (tmp_path / "x.h5").read_bytes() == (tmp_path / "y.h5").read_bytes()


def test_a_failed_write_leaves_nothing(tmp_path):
    with pytest.raises(TypeError):
        write_hdf5(tmp_path / "x.h5", {**ARRAYS, "bad": np.array([object()])}, {})
    assert list(tmp_path.iterdir()) == []


def flip_in_chunk(path):
    with h5py.File(path) as file:
        place = file["val/logits"].id.get_chunk_info(0).byte_offset
    content = bytearray(path.read_bytes())
    content[place + 40] ^= 0x10
    path.write_bytes(content)


@pytest.mark.parametrize(
    "harm",
    [
        Path.unlink,
        flip_in_chunk,
        lambda path: path.write_bytes(path.read_bytes()[:-300]),
        lambda path: path.write_text("x"),
        lambda path: write_hdf5(path, {"other": np.zeros(3)}, {}),
        lambda path: (path.unlink(), path.mkdir()),
    ],
    ids=["missing", "flipped", "truncated", "text", "other content", "a folder"],
)
def test_what_cannot_be_read_is_named_in_one_sentence(tmp_path, harm):
    path = tmp_path / "x.h5"
    write_hdf5(path, ARRAYS, ATTRIBUTES)
    harm(path)
    with pytest.raises(InputError) as caught, open_hdf5(path) as file:
        file["val/logits"][:]
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)
