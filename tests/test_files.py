import errno
import fcntl
import io
import json
import os
import pickle
import re
import resource
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
import torch

from ensdistill import DamagedFile, InputError, files, hdf5
from ensdistill.files import atomic, read_csv, set_aside, write_csv, write_text
from ensdistill.hdf5 import open_hdf5, write_hdf5
from ensdistill.state import TrainingState
from ensdistill.students import build_student
from ensdistill.weights import load_student, save_student
from tests import lossy_disk
from tests.lossy_disk import LossyDisk

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


def test_an_error_of_the_system_names_the_file_that_it_is_about(tmp_path, monkeypatch):
    def refuse(_):
        raise os_error(errno.EIO)

    with pytest.raises(OSError, match="No such file") as caught, atomic(tmp_path / "x.txt"):
        (tmp_path / "other").read_text()
    assert caught.value.filename == str(tmp_path / "other")
    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match="Input/output error") as caught:
        write_text(tmp_path / "x.txt", "")
    assert caught.value.filename == str(tmp_path / "x.txt")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def disk(tmp_path):
    """A disk that loses at a power failure what was not forced to it, and its folder."""
    if reason := lossy_disk.why_not():
        pytest.skip(reason)
    with LossyDisk(tmp_path) as disk:
        yield disk, tmp_path


@pytest.mark.parametrize("kind", lossy_disk.KINDS)
def test_after_a_power_failure_a_finished_file_is_there_and_whole(disk, kind):
    disk, folder = disk
    for text in ("older", "newer"):
        write_text(folder / "new" / "x.txt", text)
        (folder / "not_forced.txt").write_text("lost")
        (folder / "new" / "open.txt").write_text("lost")
        lost = disk.cut(kind, seed=0)
        assert (folder / "new" / "x.txt").read_text() == text
        assert lost["data"] == (0 if kind == lossy_disk.KINDS[0] else 2)


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


NAMES = ["None", "NA", "N/A", "n/a", "nan", "NaN", "null", "<NA>", "1", "1e3", "inf", " a", 'a,"b']


@pytest.mark.parametrize("column", ["system", "name"])
def test_what_a_system_is_called_comes_back_as_it_was_and_only_what_is_empty_is_no_value(
    tmp_path, column
):
    values = [np.nan, *np.arange(1.0, len(NAMES))]
    write_csv(tmp_path / "x.csv", pd.DataFrame({column: NAMES, "nll": values}))
    table = read_csv(tmp_path / "x.csv")
    assert table[column].tolist() == NAMES
    np.testing.assert_array_equal(table["nll"], values)


def test_tables_are_read_in_one_way_alone():
    package = Path(files.__file__).parent
    readers = [
        path.name
        for path in [*package.rglob("*.py"), *package.parent.glob("workflow_scripts/*.py")]
        if re.search(r"(pd|pandas)\.read_", path.read_text())
    ]
    assert readers == ["files.py"]


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
            assert file[name].compression == (None if array.dtype.kind == "f" else "gzip")
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


# --- what is no damage -----------------------------------------------------------------------


def read_hdf5(path):
    with open_hdf5(path) as file:
        return file["val/logits"][:]


def write_weights(path):
    architecture = {"name": "resnet8", "width": 2, "in_channels": 3, "num_classes": 2}
    save_student(path, build_student("single", architecture, 1), {})


WRITERS = {
    "x.h5": lambda path: write_hdf5(path, ARRAYS, ATTRIBUTES),
    "x.csv": lambda path: write_csv(path, pd.DataFrame({"nll": [0.5]})),
    "x.safetensors": write_weights,
    "x.pt": lambda path: TrainingState(path, "same").save({"weight": torch.arange(1000)}),
}
READERS = {
    "x.h5": read_hdf5,
    "x.csv": read_csv,
    "x.safetensors": load_student,
    "x.pt": lambda path: TrainingState(path, "same").load(),
}


@pytest.fixture(params=READERS)
def healthy(request, tmp_path):
    """A file that can be read, and how."""
    path = tmp_path / request.param
    WRITERS[request.param](path)
    yield path, READERS[request.param]
    assert list(tmp_path.iterdir()) == [path]
    READERS[request.param](path)


class Sick(io.FileIO):
    """A file on a disk that answers with an error, after so many bytes."""

    answer: BaseException
    after: int

    def _wait(self):
        if self.tell() >= self.after:
            raise type(self.answer)(*self.answer.args)

    def readinto(self, buffer):
        self._wait()
        return super().readinto(buffer)

    def read(self, size=-1):
        self._wait()
        return super().read(size)


@pytest.fixture
def sick(monkeypatch):
    """Put files on such a disk."""

    def become(answer, after=0):
        own = {"answer": answer, "after": after}
        # Below the class that notes the error, above the system.
        monkeypatch.setattr(files, "PatientFile", type("", (files.PatientFile, Sick), own))

    return become


def os_error(number):
    return OSError(number, os.strerror(number))


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EACCES, errno.EAGAIN])
def test_an_error_of_the_system_is_named_and_is_no_damage(healthy, sick, number):
    path, read = healthy
    sick(os_error(number), after=1 if path.suffix == ".h5" else 0)
    with pytest.raises(InputError) as caught:
        read(path)
    assert not isinstance(caught.value, DamagedFile)
    assert str(caught.value) == f"{path}: {os.strerror(number)}"


def test_want_of_memory_is_no_damage(healthy, sick):
    path, read = healthy
    sick(os_error(errno.ENOMEM))
    with pytest.raises(MemoryError):
        read(path)


def test_an_interruption_while_a_file_is_read_is_no_damage(healthy, sick):
    path, read = healthy
    sick(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        read(path)


SICK_TO_THE_END = """
import errno, os, sys
from ensdistill import files
from ensdistill.hdf5 import open_hdf5, write_hdf5

class Sick(files.PatientFile.__base__):
    def readinto(self, buffer):
        raise {answer}

    def write(self, data):
        raise {answer}

files.PatientFile.__bases__ = (Sick,)
def read():
    with open_hdf5(sys.argv[1]):
        pass

def write():
    write_hdf5(sys.argv[1], {{}}, {{}})

try:
    {function}()
except BaseException as error:
    print(type(error).__name__)
"""


@pytest.mark.parametrize(
    ("function", "answer", "told"),
    [
        ("read", "OSError(errno.EIO, os.strerror(errno.EIO))", "InputError"),
        ("read", "OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))", "MemoryError"),
        ("read", "KeyboardInterrupt", "KeyboardInterrupt"),
        ("write", "OSError(errno.EIO, os.strerror(errno.EIO))", "OSError"),
    ],
)
def test_a_process_whose_disk_is_sick_ends_as_others_do(tmp_path, function, answer, told):
    write_hdf5(tmp_path / "x.h5", ARRAYS, ATTRIBUTES)
    code = SICK_TO_THE_END.format(function=function, answer=answer)
    command = [sys.executable, "-c", code, tmp_path / "x.h5"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"{told}\n"), done.stderr


def test_too_many_open_files_are_no_damage_and_no_missing_file(healthy):
    path, read = healthy
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    read(path)  # what is imported and opened once
    resource.setrlimit(resource.RLIMIT_NOFILE, (os.dup(0), limits[1]))
    try:
        with pytest.raises(InputError) as caught:
            read(path)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert not isinstance(caught.value, DamagedFile)
    assert str(caught.value) == (
        f"{path}: Too many open files; raise the limit (ulimit -n) or run fewer jobs at a time"
    )


def test_an_error_of_what_is_computed_with_a_file_is_no_damage(tmp_path):
    write_hdf5(tmp_path / "x.h5", ARRAYS, ATTRIBUTES)
    for error in (ValueError, KeyError, TypeError, OSError, RuntimeError):
        with pytest.raises(error) as caught, open_hdf5(tmp_path / "x.h5"):
            raise error("of ours")
        assert not isinstance(caught.value, InputError)


HOLD = """
import h5py, sys, time
with h5py.File(sys.argv[1], "r+"):
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
"""


@pytest.fixture
def notebook(tmp_path):
    """Another process that has a file open for writing, for so many seconds."""
    write_hdf5(tmp_path / "x.h5", ARRAYS, ATTRIBUTES)
    started = []

    def hold(seconds):
        command = [sys.executable, "-c", HOLD, tmp_path / "x.h5", str(seconds)]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE))
        assert started[-1].stdout.readline() == b"held\n"
        return tmp_path / "x.h5"

    yield hold
    for process in started:
        process.kill()
        process.communicate()


def test_a_file_that_is_open_for_writing_elsewhere_is_named_and_is_no_damage(notebook, monkeypatch):
    path = notebook(60)
    monkeypatch.setattr(hdf5, "PATIENCE", 0.2)
    with pytest.raises(InputError) as caught:
        read_hdf5(path)
    assert not isinstance(caught.value, DamagedFile)
    assert str(caught.value) == (
        f"{path}: another program, perhaps a notebook, has it open for writing; close it there and "
        "run again"
    )


def test_hdf5s_own_switch_turns_locks_off(notebook, monkeypatch):
    monkeypatch.setenv("HDF5_USE_FILE_LOCKING", "FALSE")
    np.testing.assert_array_equal(read_hdf5(notebook(60)), ARRAYS["val/logits"])


def test_a_whole_file_of_another_shape_is_named_and_left_alone(tmp_path):
    write_hdf5(tmp_path / "x.h5", {"val/logits/more": np.zeros(3)}, {})
    with pytest.raises(InputError, match=r"x\.h5: not what it should be") as caught:
        read_hdf5(tmp_path / "x.h5")
    assert not isinstance(caught.value, DamagedFile)


def test_a_short_write_elsewhere_is_waited_for(notebook):
    np.testing.assert_array_equal(read_hdf5(notebook(0.5)), ARRAYS["val/logits"])


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, 524])
def test_a_file_system_without_locks_is_read_without(tmp_path, monkeypatch, number):
    def refuse(*_):
        raise os_error(number)

    write_hdf5(tmp_path / "x.h5", ARRAYS, ATTRIBUTES)
    monkeypatch.setattr(fcntl, "flock", refuse)
    np.testing.assert_array_equal(read_hdf5(tmp_path / "x.h5"), ARRAYS["val/logits"])


LITTLE_MEMORY = """
import resource, sys
from pathlib import Path
from ensdistill.hdf5 import open_hdf5

with open_hdf5(sys.argv[1]) as file:
    dataset = file["x"]
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limit = used + dataset.nbytes + (6 << 20)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    dataset[:]
"""


def test_too_little_memory_to_unpack_a_sound_file_is_no_damage(tmp_path):
    path = tmp_path / "x.h5"
    with h5py.File(path, "w") as file:
        options = {"chunks": (12 << 20,), "compression": "gzip", "fletcher32": True}
        file.create_dataset("x", data=np.zeros(96 << 20, np.uint8), **options)
    command = [sys.executable, "-c", LITTLE_MEMORY, path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "MemoryError: Can't synchronously read data" in done.stderr.splitlines()[-1], done.stderr


def test_a_file_that_is_being_written_is_not_set_aside(tmp_path):
    path = tmp_path / "x.h5"
    path.write_bytes(b"half")

    def write():
        time.sleep(0.2)
        with path.open("ab") as file:
            file.write(b"whole")

    writer = threading.Thread(target=write)
    writer.start()
    assert not set_aside(path)
    writer.join()
    assert path.read_bytes() == b"halfwhole"
    assert set_aside(path)
    assert [it.name for it in tmp_path.iterdir()] == ["x.h5.damaged"]


def test_a_damaged_file_is_told_by_other_processes_too():
    error = DamagedFile("results/images.h5", "cut")
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.path) == (str(error), error.path)
