"""Failures made on purpose: one clear sentence, nothing finished lost, and a rerun completes."""

import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
import venv
from contextlib import contextmanager

import h5py
import pytest
import torch

from ensdistill.downloads import ARCHIVES
from tests.test_downloads import CONTENT, NAME, md5, serving

TEACHER = "results/tiny/teachers/0/weights.safetensors"
ENDLESS = 10**6
"""Epochs of a training that does not end before the test ends it."""


def contents(project):
    """Every result by its path; logs and run times are none."""
    return {
        path.relative_to(project.folder): path.read_bytes()
        for path in project.file("").rglob("*")
        if path.is_file() and not {"logs", "benchmarks"} & set(path.parts)
    }


def told(done, sentence):
    """Check that a run failed with this sentence, and say nothing else of an error."""
    assert done.returncode != 0
    errors = [line for line in done.stderr.splitlines() if "error: " in line]
    assert len(errors) == 1, done.stderr
    assert re.search(sentence, errors[0]), errors[0]
    assert "Traceback" not in done.stderr


def assert_as(project, finished, *names):
    """These files are bit by bit what a run without failures made."""
    for name in names:
        assert project.file(name).read_bytes() == finished.file(name).read_bytes(), name


@pytest.fixture
def untrained(changed):
    """The finished study without its first teacher, which is to be trained again."""
    for path in changed.file("teachers/0").iterdir():
        path.unlink()
    return changed


def remove(project, name):
    """Delete a result, and what the same job makes, which Snakemake removes when that fails."""
    made = {
        name,
        name.replace("weights.safetensors", "history.csv"),
        name.replace(".png", ".pdf"),
    }
    if name.startswith("logits/"):
        made |= {
            name.replace("shifted/", ""),
            name.replace("logits/teachers", "logits/shifted/teachers"),
        }
    if name.startswith("tables/"):
        made |= {f"tables/results.{ending}" for ending in ("csv", "md", "tex", "html")}
        made |= {f"tables/wide.{ending}" for ending in ("md", "html")}
    for one in made:
        project.file(one).unlink(missing_ok=True)


@contextmanager
def small_disk(folder, size):
    """A disk of so many bytes in place of a folder."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small disk")
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], check=True)
    (folder / "lost+found").mkdir()  # or Snakemake would remove the folder once it is empty
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)  # whoever still uses it


@pytest.mark.parametrize(
    ("every", "size", "unwritten", "left"),
    [
        (0, "56k", "state.pt", []),
        (0, "100k", "state.pt", ["state.pt"]),
        (120, "124k", "weights.safetensors", ["state.pt"]),
    ],
)
def test_the_disk_is_full_while_training_writes(untrained, every, size, unwritten, left):
    untrained.edit("ensdistill/training.py", "SAVE_EVERY = 120", f"SAVE_EVERY = {every}")
    folder = untrained.file("teachers/0")
    with small_disk(folder, size):
        done = untrained.snakemake(TEACHER)
        told(done, f"no space is left on the disk that holds results/tiny/teachers/0/{unwritten}")
        assert {path.name for path in folder.iterdir()} == {"lost+found", *left}
        subprocess.run(["mount", "-o", "remount,size=10m", folder], check=True)
        untrained.run(TEACHER)
        assert ("going on from epoch" in untrained.log("teachers/0")) == bool(left)


@pytest.mark.parametrize(
    ("name", "size"), [("logits/shifted/teachers/0.h5", "16k"), ("tables/results.csv", "4k")]
)
def test_the_disk_is_full_while_results_are_written(changed, finished, name, size):
    remove(changed, name)
    with small_disk(changed.file(name).parent, size):
        before = contents(changed)
        done = changed.snakemake(f"results/tiny/{name}")
        told(done, f"no space is left on the disk that holds results/tiny/{name.split('.')[0]}")
        assert contents(changed) == before
    changed.run(f"results/tiny/{name}")
    assert_as(changed, finished, name)


@pytest.mark.parametrize(
    ("name", "unwritten"),
    [
        ("teachers/0/weights.safetensors", "teachers/0/state.pt"),
        ("logits/shifted/teachers/0.h5", "logits/shifted/teachers/0.h5"),
    ],
)
def test_a_file_becomes_larger_than_the_user_may_write(changed, finished, name, unwritten):
    remove(changed, name)
    before = contents(changed)
    limit = 40_000
    done = changed.snakemake(
        f"results/tiny/{name}",
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    told(done, f"results/tiny/{unwritten}: File too large")
    assert contents(changed) == before
    changed.run(f"results/tiny/{name}")
    assert_as(changed, finished, name)


def test_the_memory_is_full(untrained):
    untrained.change("studies", "tiny", "architecture", "width", value=512)
    untrained.change("studies", "tiny", "teacher", "epochs", value=1)
    status = "import ensdistill.training; print(open('/proc/self/status').read())"
    python = subprocess.run([sys.executable, "-c", status], capture_output=True, text=True)
    needed = int(re.search(r"VmPeak:\s+(\d+) kB", python.stdout)[1]) << 10
    limit = needed + (256 << 20)
    before = contents(untrained)
    done = untrained.snakemake(
        TEACHER, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    )
    told(done, "the memory is full: give the job more")
    assert contents(untrained) == before
    untrained.change("studies", "tiny", "architecture", "width", value=4)  # less to compute
    untrained.run(TEACHER)


def cut(path):
    path.write_bytes(path.read_bytes()[:1000])


def empty(path):
    path.write_bytes(b"")


def write_garbage(path):
    path.write_bytes(b"\0garbage" * 100)


def flip_a_bit_of_the_test_logits(path):
    with h5py.File(path) as file:
        place = file["test/logits"].id.get_chunk_info(0).byte_offset
    data = bytearray(path.read_bytes())
    data[place + 20] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damaged", "damage", "lost"),
    [
        ("images.h5", cut, "teachers/0/weights.safetensors"),
        ("teachers/0/weights.safetensors", cut, "logits/teachers/0.h5"),
        ("teachers/0/weights.safetensors", write_garbage, "students/kd/0/weights.safetensors"),
        ("logits/teachers/0.h5", cut, "metrics/scores.csv"),
        ("logits/teachers/0.h5", flip_a_bit_of_the_test_logits, "metrics/reliability.csv"),
        ("logits/perturbed.h5", cut, "figures/examples.png"),
        ("metrics/scores.csv", empty, "tables/results.csv"),
    ],
)
def test_a_damaged_file_is_set_aside_and_made_again_alone(changed, finished, damaged, damage, lost):
    path = changed.file(damaged)
    stamps = path.stat().st_atime_ns, path.stat().st_mtime_ns
    damage(path)
    os.utime(path, ns=stamps)
    harmed = path.read_bytes()
    remove(changed, lost)
    target = f"results/tiny/{lost}"
    before = contents(changed)
    told(
        changed.snakemake(target),
        f"results/tiny/{damaged}: damaged.*; set aside as results/tiny/{damaged}.damaged, "
        f"`snakemake --cores all results/tiny/{damaged}` makes it again",
    )
    aside = path.with_name(f"{path.name}.damaged")
    assert aside.read_bytes() == harmed
    aside.rename(path)
    assert contents(changed) == before, "nothing else is lost"
    remove(changed, damaged)
    changed.run(f"results/tiny/{damaged}")
    assert_as(changed, finished, damaged)
    assert len(changed.planned(target)) == 1, "what was made of the same bytes is kept"
    changed.run(target)
    assert_as(changed, finished, lost)


def test_after_a_damaged_file_was_set_aside_a_plain_rerun_completes_too(changed, finished):
    cut(changed.file("logits/teachers/0.h5"))
    changed.file("metrics/scores.csv").unlink()
    told(changed.snakemake("results/tiny/metrics/scores.csv"), "logits/teachers/0.h5: damaged")
    changed.run("results/tiny/metrics/scores.csv")
    assert_as(changed, finished, "logits/teachers/0.h5", "metrics/scores.csv")


def test_a_damaged_state_is_set_aside_and_training_begins_anew(untrained, finished):
    state = untrained.file("teachers/0/state.pt")
    torch.save({"epoch": 3}, state)
    cut(state)
    harmed = state.read_bytes()
    done = untrained.run(TEACHER)
    assert re.search(
        r"teachers/0/state.pt: damaged, .*; set aside as .*/state.pt.damaged, this training begins",
        done.stderr,
    )
    assert state.with_name("state.pt.damaged").read_bytes() == harmed
    assert_as(untrained, finished, "teachers/0/weights.safetensors")


def test_a_file_that_a_notebook_has_open_for_writing_is_left_alone(untrained, finished):
    untrained.edit("ensdistill/hdf5.py", "PATIENCE = 10", "PATIENCE = 1")
    before = contents(untrained)
    with h5py.File(untrained.file("images.h5"), "r+"):
        told(
            untrained.snakemake(TEACHER),
            "results/tiny/images.h5: another program, perhaps a notebook, has it open for writing; "
            "close it there and run again",
        )
        assert contents(untrained).keys() == before.keys()
    untrained.run(TEACHER)
    assert_as(untrained, finished, "teachers/0/weights.safetensors")


WITHOUT_LOCKS = """
#include <errno.h>
int flock(int file, int operation) { errno = ENOLCK; return -1; }
"""


def test_a_file_system_without_locks_is_used_without(untrained, finished):
    if not (compiler := shutil.which("cc")):
        pytest.skip("what stands for such a file system must be compiled")
    library = untrained.folder / "locks.so"
    command = [compiler, "-shared", "-fPIC", "-x", "c", "-", "-o", library]
    subprocess.run(command, input=WITHOUT_LOCKS, text=True, check=True)
    environment = {"LD_PRELOAD": str(library), "PYTHONPATH": str(untrained.folder)}
    done = untrained.snakemake(TEACHER, env={**os.environ, **environment})
    assert done.returncode == 0, done.stderr
    assert_as(untrained, finished, "teachers/0/weights.safetensors")


@pytest.fixture
def server(changed):
    """A server in place of the official one of CIFAR, for the project's own workflow."""
    with serving() as listening:
        changed.edit(
            "ensdistill/downloads.py",
            'CIFAR = "https://www.cs.toronto.edu/~kriz"',
            f'CIFAR = "http://127.0.0.1:{listening.server_port}"',
        )
        changed.edit("ensdistill/downloads.py", ARCHIVES[NAME].md5, md5(CONTENT))
        yield listening


def test_a_download_breaks_off_and_the_rerun_asks_for_the_rest(changed, server):
    server.breaks = [1_000_000, 0, 500_000]
    archive = changed.folder / "results" / "downloads" / NAME
    told(changed.snakemake(f"results/downloads/{NAME}"), "could not be downloaded .*run again")
    assert not archive.exists()
    changed.run(f"results/downloads/{NAME}")
    assert archive.read_bytes() == CONTENT
    assert server.requests == [None, "bytes=1000000-", "bytes=1000000-", "bytes=1500000-"]


def test_a_download_has_a_wrong_checksum(changed, server):
    server.content = CONTENT[:-1] + b"x"
    archive = changed.folder / "results" / "downloads" / NAME
    told(changed.snakemake(f"results/downloads/{NAME}"), "another checksum than the official")
    assert not archive.exists()
    server.content = CONTENT
    changed.run(f"results/downloads/{NAME}")
    assert archive.read_bytes() == CONTENT


def test_the_loss_is_not_finite(untrained, finished):
    untrained.change("studies", "tiny", "teacher", "learning_rate", value=1e30)
    before = contents(untrained)
    told(untrained.snakemake(TEACHER), r"the loss is not finite at step \d .*learning rate 1e\+30")
    assert contents(untrained) == before
    untrained.change("studies", "tiny", "teacher", "learning_rate", value=0.1)
    untrained.run(TEACHER)
    assert_as(untrained, finished, "teachers/0/weights.safetensors")


def test_the_results_folder_is_read_only(untrained, finished):
    folder = untrained.folder / "results"
    if os.geteuid() != 0:
        pytest.skip("only root can mount a folder read-only")
    before = contents(untrained)
    subprocess.run(["mount", "--bind", folder, folder], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", folder], check=True)
        done = untrained.snakemake(TEACHER)
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)  # whoever still uses it
    assert done.returncode != 0
    assert f"{folder}: this folder cannot be written to" in done.stderr
    assert "Traceback" not in done.stderr
    assert contents(untrained) == before
    untrained.run(TEACHER)
    assert_as(untrained, finished, "teachers/0/weights.safetensors")


@contextmanager
def training(project):
    """A run in a process group of its own, once it has trained an epoch; killed at the end."""
    project.file("logs/teachers/0.log").unlink(missing_ok=True)
    process = subprocess.Popen(
        [sys.executable, "-m", "snakemake", "--cores", "2", TEACHER],
        cwd=project.folder,
        env={**os.environ, "PYTHONPATH": str(project.folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        while not epochs_logged(project):
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.05)
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def epochs_logged(project):
    log = project.file("logs/teachers/0.log")
    text = log.read_text() if log.exists() else ""
    return [int(epoch) for epoch in re.findall(r"INFO epoch (\d+) .*\n", text)]


def training_process(run):
    """The process in which the one job of a run trains."""
    children = subprocess.run(
        ["pgrep", "-g", str(run.pid), "-f", r"\.snakemake/scripts/.*train"],
        capture_output=True,
        text=True,
    )
    return [int(pid) for pid in children.stdout.split()][-1]


@pytest.mark.parametrize(
    ("number", "whom"),
    [
        (signal.SIGINT, "everything"),  # Ctrl-C
        (signal.SIGTERM, "job"),  # a scheduler's grace
        (signal.SIGKILL, "job"),  # the end of the grace, or of the memory
        (signal.SIGKILL, "everything"),  # a power failure
    ],
)
def test_training_is_interrupted_and_goes_on(untrained, number, whom):
    untrained.change("studies", "tiny", "teacher", "epochs", value=ENDLESS)
    if number == signal.SIGKILL:
        untrained.edit("ensdistill/training.py", "SAVE_EVERY = 120", "SAVE_EVERY = 0")
    before = contents(untrained)
    with training(untrained) as run:
        if whom == "job":
            os.kill(training_process(run), number)
        else:
            os.killpg(run.pid, number)
        _, stderr = run.communicate(timeout=30)
    assert run.returncode != 0
    done = epochs_logged(untrained)[-1]
    if number != signal.SIGKILL:
        told(
            subprocess.CompletedProcess([], run.returncode, "", stderr),
            rf"interrupted by {number.name} in epoch {done + 1}; a rerun goes on from there",
        )
    after = contents(untrained)
    assert after.pop(untrained.file("teachers/0/state.pt").relative_to(untrained.folder))
    if number == signal.SIGKILL:  # in the middle of a write, perhaps
        after = {path: content for path, content in after.items() if path.name[0] != "."}
    assert after == before
    if whom == "everything" and number == signal.SIGKILL:
        unlocked = untrained.snakemake("--unlock", cores=())
        assert unlocked.returncode == 0, unlocked.stderr
    with training(untrained):
        first = epochs_logged(untrained)[0]
    # An epoch ends after the state of its last step is saved, so a kill may come in between.
    assert first in ([done, done + 1] if number == signal.SIGKILL else [done + 1])


def test_two_runs_at_once(untrained):
    untrained.change("studies", "tiny", "teacher", "epochs", value=ENDLESS)
    with training(untrained) as first:
        second = untrained.snakemake(TEACHER)
        assert second.returncode != 0
        assert "Directory cannot be locked" in second.stderr
        told(
            untrained.snakemake("--nolock", TEACHER),
            "teachers/0: another process is training this network; wait for it or end it",
        )
        assert first.poll() is None


def test_the_checkout_and_its_environment_lie_where_a_path_has_spaces(finished, tmp_path):
    project = finished.copy(tmp_path / "my (own) projects" / "it's & more")
    project.file("tables/results.csv").unlink()
    venv.create(project.folder / ".venv", symlinks=True)
    installed = sysconfig.get_path("purelib")
    folder = f"lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages"
    (project.folder / ".venv" / folder / "installed.pth").write_text(installed)
    done = subprocess.run(
        [".venv/bin/python", "-m", "snakemake", "--cores", "1", "results/tiny/tables/results.csv"],
        cwd=project.folder,
        env={**os.environ, "PYTHONPATH": str(project.folder)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert_as(project, finished, "tables/results.csv")


def test_a_key_given_twice_is_refused_in_every_file_that_snakemake_reads(changed):
    other = changed.folder / "other.yaml"
    other.write_text("run: [tiny]\nrun: [tiny]\n")
    done = changed.snakemake("--dry-run", "--configfile", other)
    assert done.returncode != 0
    said = done.stdout + done.stderr  # a dry run says everything on stdout
    assert f"{other}: the key 'run' is given twice, in lines 1 and 2" in said
    assert "Traceback" not in said
    other.write_text("run: [tiny]\n")
    changed.run("--dry-run", "--configfile", other)
    with (changed.folder / "config.yaml").open("a") as file:
        file.write("run: [tiny]\n")
    done = changed.snakemake("--dry-run")
    assert done.returncode != 0
    assert re.search(
        r"config.yaml: the key 'run' is given twice, in lines 1 and \d+", done.stdout + done.stderr
    )
