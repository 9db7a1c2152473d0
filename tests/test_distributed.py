"""Several processes that train one network, against one that trains it alone.

Two of them are this process and a second one that this module starts; they talk by gloo.
"""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import psutil
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from ensdistill import DamagedFile, InputError, batches, devices, distributed, launching, training
from ensdistill.batches import StreamedBatches, TrainingBatches
from ensdistill.distributed import Place
from ensdistill.hdf5 import write_hdf5
from ensdistill.jobs import Interrupted
from ensdistill.launching import train_together
from ensdistill.learning import learning
from ensdistill.networks import build_network
from ensdistill.recipes import Recipe
from ensdistill.state import TrainingState
from ensdistill.students import build_student
from ensdistill.training import fit, train_student
from ensdistill.weights import read_header
from tests.builders import TEACHER_PARTS, noise
from tests.project import REPOSITORY
from tests.test_streaming import numbered

CPU = torch.device("cpu")
ARCHITECTURE = {"name": "resnet8", "num_classes": 5, "in_channels": 1, "width": 4}
ONE_TO_ONE = {"name": "one_to_one", "alpha": 0.9, "temperature": 2.0}
MOVED = {"eta": 0.05, "temperature": 2.0}
CASES = {  # student, objective, perturbation
    "teacher": ("single", {"name": "labels"}, {"name": "none"}),
    "without batch norm": ("single", {"name": "labels"}, {"name": "none"}),
    "ods": ("batch_ensemble", ONE_TO_ONE, {"name": "ods", **MOVED}),
    "mixup": ("batch_ensemble", ONE_TO_ONE, {"name": "mixup", "beta": 0.4}),
    "gaussian": ("hydra", ONE_TO_ONE, {"name": "gaussian", "eta": 0.05}),
    "latents": ("gaussian_logits", {"name": "gaussian_likelihood"}, {"name": "none"}),
    "flow": ("flow_matching", {"name": "flow_matching"}, {"name": "none"}),
}
OPTIONS = {"flow_matching": {"width": 8, "samples": 4}}
SIZES = {"epochs": 4, "batch_size": 24, "warmup_epochs": 1, "validate_every": 2}
RECIPE = Recipe(**SIZES, learning_rate=0.05, clip_norm=2.0)
STEPS = 2

# Of each tensor's largest number. Sums of float32 in another order differ by some 1e-7 of it, and
# steps carry that on: by 3e-6 was measured. What is drawn or averaged wrongly makes 1e-2 or more.
ROUNDING = 1e-4


def train(case, state=None, before_step=None):
    """Weights of a student, and the history of its training."""
    kind, objective, perturbation = CASES[case]
    torch.manual_seed(1)
    teachers = [build_network(**ARCHITECTURE).eval().requires_grad_(False) for _ in range(2)]
    members = 1 if kind == "single" else 2
    student = build_student(kind, ARCHITECTURE, members, **OPTIONS.get(kind, {}))
    if case == "without batch norm":
        layers = nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 5)
        student.network = nn.Sequential(nn.Flatten(), *layers)
    learnt = learning(teachers, objective, perturbation)
    if before_step:
        ask = learnt.perturbation
        learnt = replace(learnt, perturbation=lambda step: before_step() or ask(step))
    images = torch.from_numpy(noise(50, 1, 8, 8)), torch.arange(50) % 5
    held = images[0][:20], images[1][:20]
    how = {"seed": 0, "precision": "fp32", "crop_padding": 1, "flip": True, "progress": False}
    _, history = fit(student, learnt, images, held, RECIPE, state=state, **how)
    rows = [{key: row[key] for key in row if key != "seconds"} for row in history]
    numbers = {**dict(student.named_parameters()), **dict(student.named_buffers())}
    return {name: tensor.detach().clone() for name, tensor in numbers.items()}, rows


def interrupted(folder, who):
    """Train until one of the processes gets SIGTERM in the third of eight steps."""
    steps = iter(range(STEPS * SIZES["epochs"]))

    def before_step():
        if next(steps) == 2 and distributed.place().rank == who:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted) as caught:
        train("ods", TrainingState(f"{folder}/state.pt", "same"), before_step)
    return str(caught.value)


def normed():
    """Output, gradients and statistics of a batch normalisation of this process's part."""
    x, weight, bias, mean, var = tensors()
    part = x[distributed.part_of(len(x))].clone().requires_grad_()
    with distributed._Synchronised():
        out = F.batch_norm(part, mean, var, weight, bias, True, 0.3, 0.01)
    out.pow(3).mean().backward()
    of_weights = map(distributed.averaged, (weight.grad, bias.grad))
    return out.detach(), part.grad / distributed.place().count, *of_weights, mean, var


def tensors():
    generator = torch.Generator().manual_seed(0)
    shapes = (8, 3, 4, 2), (3,), (3,), (3,), (3,)
    x, *rest = (torch.rand(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return x, *(it.requires_grad_() for it in rest[:2]), *rest[2:]


def write_images(folder):
    sizes = {"train": 200, "val": 40}
    arrays = {f"{s}/images": noise(n, 1, 8, 8, seed=n) for s, n in sizes.items()}
    arrays |= {f"{s}/labels": np.arange(n) % 5 for s, n in sizes.items()}
    known = {"classes": [*"abcde"], "mean": [0.5], "std": [0.3]}
    write_hdf5(folder / "images.h5", arrays, known)


def arguments(folder, **recipe):
    """Of `train_student`, for a teacher."""
    sizes = {"epochs": 12, "batch_size": 20, "learning_rate": 0.002, "warmup_epochs": 1}
    return {
        "images": folder / "images.h5",
        "weights": folder / "weights.safetensors",
        "history": folder / "history.csv",
        "teachers": [],
        "seed": 1,
        "parts": TEACHER_PARTS,
        "recipe": Recipe(**{**sizes, **recipe}).model_dump(),
        "augmentation": {"crop_padding": 1, "flip": True},
        "precision": "fp32",
        "origin": {"study": "tiny"},
        "fingerprint": "same",
    }


def everything(folder):
    """What each of the two processes does; their numbers."""
    torch.set_num_threads(1)
    train_student(**arguments(Path(folder), epochs=3), device=CPU, processes=2)
    found = {case: train(case) for case in CASES}
    found["normed"] = normed()
    found["interrupted"] = interrupted(folder, who=1)
    found["agreed"] = distributed.agreed(7 * distributed.place().rank)
    distributed.leave()
    return found


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """What the first of two processes comes to."""
    folder = tmp_path_factory.mktemp("together")
    write_images(folder)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    known = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    code = "import sys; from tests import test_distributed as it; it.everything(sys.argv[1])"
    command = [sys.executable, "-c", code, str(folder)]
    with pytest.MonkeyPatch.context() as patch:
        for name, value in known.items():
            patch.setenv(name, value)
        patch.setenv("RANK", "0")
        patch.setattr(distributed, "PATIENCE", timedelta(minutes=3))
        with subprocess.Popen(command, cwd=REPOSITORY, env={**os.environ, "RANK": "1"}) as other:
            try:
                found = everything(folder)
                assert other.wait(60) == 0
            finally:
                other.kill()
    return {**found, "folder": folder}


def assert_near(found, expected):
    (weights, history), (others, rows) = found, expected
    assert weights.keys() == others.keys()
    for name, tensor in others.items():
        off = (weights[name] - tensor).abs().max()
        assert off <= ROUNDING * tensor.abs().max(), name
    for row, other in zip(history, rows, strict=True):
        assert row == pytest.approx(other, rel=ROUNDING, nan_ok=True)


@pytest.mark.parametrize("case", CASES)
def test_two_processes_come_to_the_losses_and_weights_of_one(together, case):
    assert_near(together[case], train(case))


def test_the_first_of_them_writes_what_they_have_made(together, tmp_path):
    ours = arguments(together["folder"], epochs=3)
    assert read_header(ours["weights"])["processes"] == 2
    write_images(tmp_path)
    theirs = arguments(tmp_path, epochs=3)
    train_student(**theirs, device=CPU)
    assert "processes" not in read_header(theirs["weights"])
    weights, others = (load_file(it["weights"]) for it in (ours, theirs))
    history, rows = (pd.read_csv(it["history"]).drop(columns="seconds") for it in (ours, theirs))
    assert_near((weights, history.to_dict("records")), (others, rows.to_dict("records")))


def test_a_batch_normalisation_is_that_of_the_whole_batch(together):
    """In float64, against PyTorch's own: output, gradients, running statistics."""
    x, weight, bias, mean, var = tensors()
    x.requires_grad_()
    out = F.batch_norm(x, mean, var, weight, bias, True, 0.3, 0.01)
    out.pow(3).mean().backward()
    expected = out[:4], x.grad[:4], weight.grad, bias.grad, mean, var
    for ours, theirs in zip(together["normed"], expected, strict=True):
        torch.testing.assert_close(ours, theirs.detach(), rtol=1e-12, atol=1e-14)


def test_what_one_process_is_told_all_do_and_one_goes_on(together):
    """SIGTERM to the second ends both after the same step; the rest is trained alone."""
    assert together["agreed"] == 7
    assert (
        together["interrupted"] == "interrupted by SIGTERM in epoch 2; a rerun goes on from there"
    )
    state = TrainingState(together["folder"] / "state.pt", "same")
    assert (state.load()["epoch"], state.load()["steps"]) == (2, 1)
    done = []
    resumed = train("ods", state, lambda: done.append(1))
    assert len(done) == STEPS * SIZES["epochs"] - 3
    assert_near(resumed, train("ods"))


@pytest.fixture
def places(monkeypatch):
    """Be each of three processes in turn."""

    def of_each(action):
        found = []
        for rank in range(3):
            monkeypatch.setattr(distributed, "_places", [Place(rank, 3)])
            found.append(action())
        monkeypatch.setattr(distributed, "_places", [Place()])
        return found

    return of_each


def test_parts_of_random_numbers_are_those_of_the_whole(places):
    for layout in (torch.contiguous_format, torch.channels_last):
        like = torch.empty(12, 3, 5, 4).contiguous(memory_format=layout)

        def draw(rows, like=like):
            generator = torch.Generator().manual_seed(3)
            return distributed.drawn(like[:rows], lambda it: it.normal_(generator=generator))

        parts = places(lambda draw=draw: draw(4))
        assert all(part.shape == (4, 3, 5, 4) for part in parts)
        assert torch.equal(torch.cat(parts), draw(12))


@pytest.mark.parametrize("chunk", [None, 1, 3])
@pytest.mark.parametrize("first", [0, 2])
def test_parts_of_batches_are_those_of_one(tmp_path, monkeypatch, places, chunk, first):
    """Of images in memory, and of those that are read one by one or in blocks, by windows."""
    monkeypatch.setattr(batches, "WINDOW", 20)
    stored = numbered(tmp_path / "images.h5", 40, chunk)
    pixels = torch.from_numpy(stored.read(np.arange(40)))
    kind, images = (StreamedBatches, stored) if chunk else (TrainingBatches, pixels)

    def epoch():
        made = kind(images, torch.arange(40), 9, crop_padding=0, flip=False)
        return list(made.epoch(torch.Generator().manual_seed(5), first))

    whole, parts = epoch(), places(epoch)
    assert len(whole) == 4 - first
    for batch, *of_each in zip(whole, *parts, strict=True):
        for ours, theirs in zip(map(torch.cat, zip(*of_each, strict=True)), batch, strict=True):
            assert torch.equal(ours, theirs)


def test_a_batch_without_equal_parts_is_refused(places):
    def sentence():
        with pytest.raises(InputError) as caught:
            distributed.own(slice(10, 20))
        return str(caught.value)

    assert set(places(sentence)) == {
        "10 images of a batch cannot be shared out equally among 3 devices: set batch_size to a "
        "multiple of gpus_per_job (3)"
    }


@pytest.fixture
def how(tmp_path, monkeypatch):
    """Arguments of `train_student`; afterwards signals and the environment are as before."""
    write_images(tmp_path)
    monkeypatch.setattr(os, "environ", os.environ.copy())
    handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
    yield arguments(tmp_path)
    for number, handler in handlers.items():
        if signal.getsignal(number) != handler:
            signal.signal(number, handler)


def workers():
    return {
        it.environ()["RANK"]: it
        for it in psutil.Process().children(recursive=True)
        if "ensdistill.launching" in it.cmdline()
    }


def once_logged(log, text, action):
    """Do something in a thread, once the log says something new."""
    before = log.read_text() if log.exists() else ""

    def wait():
        until = time.monotonic() + 120
        while text not in (log.read_text() if log.exists() else "").removeprefix(before):
            if time.monotonic() > until:
                break
            time.sleep(0.02)
        action()

    threading.Thread(target=wait, daemon=True).start()


def test_the_death_of_one_process_ends_the_others_and_loses_nothing(tmp_path, how, monkeypatch):
    """One begins, two go on, one of the two is killed, one ends what was begun."""
    log, state = tmp_path / "train.log", tmp_path / "state.pt"
    with monkeypatch.context() as patch:
        steps, step = iter(range(24)), training.train_step
        patch.setattr(training, "train_step", lambda *given: (next(steps), step(*given))[1])
        patch.setattr(training, "SAVE_EVERY", 0)
        with pytest.raises(StopIteration):
            train_student(**how, device=CPU)
    saved, died = state.read_bytes(), []
    once_logged(
        log, "INFO epoch 4 ", lambda: (workers()["1"].kill(), died.append(time.monotonic()))
    )
    with pytest.raises(InputError) as killed:
        train_together(2, 2, {}, str(log), **how)
    assert time.monotonic() - died[0] < launching.GRACE
    assert not workers()
    assert str(killed.value) == (
        "one of 2 processes that train this network together was ended by SIGKILL, as the system "
        "does where the memory is full, and the others with it; a rerun goes on from the last "
        "state that was saved"
    )
    assert "going on from epoch 3, after 4 of its steps" in log.read_text()
    assert state.read_bytes() == saved
    assert not how["weights"].exists()
    rows = []
    for _ in range(2):  # from where it stopped; and from the beginning, undisturbed
        train_student(**how, device=CPU)
        rows.append(pd.read_csv(how["history"]).drop(columns="seconds"))
        state.unlink()
    assert rows[0].equals(rows[1])


@pytest.mark.kills
def test_a_scheduler_s_signal_ends_all_and_the_rest_is_trained_alone(tmp_path, how):
    log, state = tmp_path / "train.log", tmp_path / "state.pt"
    once_logged(log, "INFO epoch 3 ", lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Interrupted, match="by SIGTERM while 2 processes trained") as caught:
        train_together(2, 2, {}, str(log), **how)
    assert caught.value.number == signal.SIGTERM
    assert not workers()
    assert TrainingState(state, torch.load(state)["fingerprint"]).load()["epoch"] >= 3
    rows = []
    for _ in range(2):
        train_student(**how, device=CPU)
        rows.append(pd.read_csv(how["history"])["loss"])
        state.unlink()
    np.testing.assert_allclose(*rows, rtol=ROUNDING)


def test_two_that_need_the_same_cards_do_not_wait_for_each_other(tmp_path, monkeypatch):
    """Cards are leased all at once or not at all; the leases are real, the cards are not."""
    cards, held = {"0": "GPU-a", "1": "GPU-b", "2": "GPU-c"}, []
    monkeypatch.setattr(devices, "visible_cards", lambda: cards)
    monkeypatch.setattr(devices, "_held", held)
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert devices.lease_cards(2) == ["0", "1"]
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0,1"
    assert devices._take_some(cards, 2, 1) == ["2"]  # too few, so it is free again
    assert len(held) == 2
    assert devices._take_some(cards, 3, 2) == ["2", "0", "1"]
    monkeypatch.setattr(devices.time, "sleep", lambda seconds: os.close(held.pop()))
    assert len(devices.lease_cards(3)) == 3
    with pytest.raises(InputError, match="gpus_per_job is 4, and this job sees 3 GPUs: 0, 1, 2"):
        devices.lease_cards(4)
    for file in held:
        os.close(file)


def test_what_ended_first_is_told(tmp_path):
    """A process that lost another one raises errors too; one that was killed writes nothing."""

    def failure(exitcode, error=None):
        message = launching._told(error) if error else "<NONE>"
        return SimpleNamespace(exitcode=exitcode, error_file_data={"message": message}, message="")

    lost = failure(1, RuntimeError("Connection closed by peer"))
    wrong = failure(1, DamagedFile("images.h5", "damaged"))
    found = launching._cause([lost, wrong], 2)
    assert (type(found), found.path) == (DamagedFile, "images.h5")
    said = launching._cause([lost, failure(1, InputError("no cards"))], 2)
    assert (type(said), str(said)) == (InputError, "no cards")
    assert "ended by SIGSEGV" in str(launching._cause([lost, failure(-signal.SIGSEGV)], 2))
    assert str(launching._cause([lost], 2)) == "RuntimeError: Connection closed by peer"
    ended = launching._cause([lost, failure(128 + signal.SIGTERM)], 2)
    assert (type(ended), ended.number) == (Interrupted, signal.SIGTERM)


SEVERAL_LOG = """
import logging, sys
from types import SimpleNamespace
from ensdistill.jobs import job

with job(SimpleNamespace(log=sys.argv[1:], rule="teacher", wildcards=[])):
    logging.getLogger("ensdistill").info("first")
    with open(sys.argv[1], "a") as file:
        file.write("of another process\\n")
    logging.getLogger("ensdistill").info("last")
"""


def test_all_processes_of_a_job_write_to_its_log(tmp_path):
    log = tmp_path / "train.log"
    log.write_text("of an earlier run\n")
    subprocess.run([sys.executable, "-c", SEVERAL_LOG, str(log)], cwd=REPOSITORY, check=True)
    lines = log.read_text().splitlines()
    assert [line.split("INFO ")[-1] for line in lines] == ["first", "of another process", "last"]
