"""Training that is stopped anywhere goes on to the same bits."""

import operator
import os
import pickle
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from ensdistill import InputError, files, training
from ensdistill.jobs import Interrupted, fingerprint
from ensdistill.learning import Learning, learning
from ensdistill.recipes import Recipe
from ensdistill.state import TrainingState
from ensdistill.students import build_student
from ensdistill.training import fit

EPOCHS, STEPS = 4, 3


def train(
    state=None, before_step=None, precision="fp32", learning_rate=0.25, kind="batch_ensemble"
):
    """A student of two teachers at ODS inputs: all kinds of state there are."""
    generator = torch.Generator().manual_seed(7)
    images = torch.randint(0, 256, (20, 1, 8, 8), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, 4, (20,), generator=generator)
    architecture = {"name": "resnet8", "num_classes": 4, "in_channels": 1, "width": 4}
    torch.manual_seed(0)
    teachers = [build_student("single", architecture, 1).network.eval() for _ in range(2)]
    student = build_student(kind, architecture, 2)
    inner = learning(
        teachers,
        {"name": "one_to_one", "alpha": 0.9, "temperature": 2.0},
        {"name": "ods", "eta": 0.05, "temperature": 2.0},
    )
    calls = iter(range(EPOCHS * STEPS + 1))

    def objective(step, x_distill):
        if before_step:
            before_step(next(calls))
        parts = inner.objective(step, x_distill)
        # A method of your own may use the global generator, as dropout does.
        return {**parts, "loss": parts["loss"] * (1 + 0.1 * torch.rand(()))}

    recipe = Recipe(
        epochs=EPOCHS,
        batch_size=6,
        warmup_epochs=2,
        validate_every=1,
        learning_rate=learning_rate,
    )
    settings = {"crop_padding": 1, "flip": True, "precision": precision, "seed": 10}
    split = images, labels
    learnt = Learning(inner.teachers, objective, inner.perturbation)
    predictor, history = fit(student, learnt, split, split, recipe, state=state, **settings)
    for row in history:
        assert row.pop("seconds") > 0
    return predictor.state_dict(), history


def assert_same(first, second):
    (weights, history), (others, rows) = first, second
    assert weights.keys() == others.keys()
    for name, tensor in weights.items():
        same = torch.equal if isinstance(tensor, torch.Tensor) else operator.eq
        assert same(tensor, others[name]), name
    assert history == rows


class Kill(Exception):
    """Stands for SIGKILL: nothing is done in answer to it."""


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("every_step", [False, True])
def test_killed_before_any_step_training_ends_with_the_bits_of_an_undisturbed_run(
    tmp_path, monkeypatch, every_step, precision
):
    undisturbed = train(precision=precision)
    accuracies = [row["val_accuracy"] for row in undisturbed[1]]
    if precision == "fp32":  # in bfloat16 processors round differently
        assert max(accuracies) > max(accuracies[-2:]), "the best epoch is an early one"
    if every_step:
        monkeypatch.setattr(training, "SAVE_EVERY", 0)
    for fatal in range(EPOCHS * STEPS):
        state = TrainingState(tmp_path / f"{fatal}.pt", "same")
        made = []

        def kill(step, fatal=fatal, made=made):
            made.append(step)
            if step == fatal:
                raise Kill

        with pytest.raises(Kill):
            train(state, kill, precision)
        resumed = []
        assert_same(train(state, resumed.append, precision), undisturbed)
        repeated = fatal + len(resumed) - EPOCHS * STEPS
        assert repeated == (0 if every_step else fatal)


@pytest.mark.parametrize("kind", ["latent_batch_ensemble", "hydra", "mimo", "packed"])
def test_students_with_members_go_on_to_the_same_bits(tmp_path, monkeypatch, kind):
    """Killed within an epoch, before Hydra's copy of heads in the third, and after it."""
    undisturbed = train(kind=kind)
    monkeypatch.setattr(training, "SAVE_EVERY", 0)
    for fatal in (4, 6, 7):
        state = TrainingState(tmp_path / f"{fatal}.pt", "same")

        def kill(step, fatal=fatal):
            if step == fatal:
                raise Kill

        with pytest.raises(Kill):
            train(state, kill, kind=kind)
        assert_same(train(state, kind=kind), undisturbed)


def test_a_state_is_saved_as_soon_as_the_time_for_it_has_come_and_at_the_end(tmp_path, monkeypatch):
    """By a clock that each step moves on by 50 seconds, every third step is due."""
    saves, now = [], iter(range(0, 10**9, 25))  # the clock is read twice a step
    monkeypatch.setattr(training.time, "perf_counter", lambda: next(now))
    state = TrainingState(tmp_path / "state.pt", "same")
    monkeypatch.setattr(state, "save", lambda saved: saves.append(saved))
    train(state)
    assert 2 < len(saves) < EPOCHS * STEPS
    assert (saves[-1]["epoch"], saves[-1]["steps"]) == (EPOCHS + 1, 0)
    assert not saves[-1]["measured"]["sums"].any()


def test_killed_again_and_again_training_ends_with_the_same_bits(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "SAVE_EVERY", 0)
    state = TrainingState(tmp_path / "state.pt", "same")

    def kill(step):
        if step == 1:
            raise Kill

    kills = 0
    while True:
        try:
            outcome = train(state, kill)
            break
        except Kill:
            kills += 1
    assert kills == EPOCHS * STEPS - 1
    assert_same(outcome, train())


def test_after_the_last_epoch_nothing_is_left_to_train(tmp_path):
    state, steps = TrainingState(tmp_path / "state.pt", "same"), []
    undisturbed = train(state)
    assert_same(train(state, steps.append), undisturbed)
    assert steps == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_the_step_end_saves_it_and_stops(tmp_path, number):
    state, made = TrainingState(tmp_path / "state.pt", "same"), []

    def tell(step):
        made.append(step)
        if step == STEPS + 1:
            os.kill(os.getpid(), number)

    handlers = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(Interrupted, match="in epoch 2") as caught:
        train(state, tell)
    assert caught.value.number == number
    assert handlers == [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    rest = []
    assert_same(train(state, rest.append), train())
    assert len(made) + len(rest) == EPOCHS * STEPS


def test_only_a_second_ctrl_c_stops_at_once(tmp_path):
    def tell_twice(number):
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), number)

    state = TrainingState(tmp_path / "state.pt", "same")
    with pytest.raises(Interrupted, match=r"^interrupted by SIGINT$"):
        train(state, lambda step: tell_twice(signal.SIGINT))
    assert state.load() is None
    with pytest.raises(Interrupted, match=r"^interrupted by SIGTERM in epoch 1; a rerun goes on"):
        train(state, lambda step: tell_twice(signal.SIGTERM))
    assert state.load()["epoch"] == 1


def test_a_state_of_another_configuration_is_not_picked_up_and_is_replaced(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "SAVE_EVERY", 0)

    def kill(step):
        if step == 2 * STEPS:
            raise Kill

    path = tmp_path / "state.pt"
    with pytest.raises(Kill):
        train(TrainingState(path, "one"), kill, learning_rate=0.01)
    other = TrainingState(path, "other")
    assert other.load() is None
    assert_same(train(other), train())
    assert other.load()["epoch"] == EPOCHS + 1
    assert TrainingState(path, "one").load() is None


def test_a_fingerprint_is_of_parameters_and_of_what_is_in_the_inputs(tmp_path):
    def of(content, **params):
        (tmp_path / "images.h5").write_bytes(content)
        return fingerprint(SimpleNamespace(input=[tmp_path / "images.h5"], params=params))

    known = of(b"pixels", training={"epochs": 3, "seed": 0}, code="abc")
    assert known == of(b"pixels", code="abc", training={"seed": 0, "epochs": 3})
    others = {
        of(b"pixel5", training={"epochs": 3, "seed": 0}, code="abc"),
        of(b"pixels", training={"epochs": 4, "seed": 0}, code="abc"),
        of(b"pixels", training={"epochs": 3, "seed": 0}, code="abd"),
        of(b"pixels", training={"epochs": 3, "seed": 0}, code="abc", method={"eta": 0.1}),
    }
    assert len(others | {known}) == 5


def test_a_kill_in_the_middle_of_a_write_leaves_the_previous_state(tmp_path):
    script = """
import os, sys, torch
from ensdistill.state import TrainingState

state = TrainingState(sys.argv[1], "same")
state.save({"epoch": 1})

def half(content, path):
    path.write_bytes(b"half of it")
    os.kill(os.getpid(), 9)

torch.save = half
state.save({"epoch": 2})
"""
    path = tmp_path / "state.pt"
    done = subprocess.run([sys.executable, "-c", script, path], check=False)
    assert done.returncode == -signal.SIGKILL
    assert TrainingState(path, "same").load() == {"epoch": 1}


class Harm:
    def __reduce__(self):
        return os.mkdir, (os.environ["CANARY"],)


@pytest.mark.parametrize(
    "harm", ["truncated", "flipped", "text", "empty", "pickle", "torch pickle"]
)
def test_a_damaged_or_hostile_state_is_set_aside_and_nothing_in_it_is_run(
    tmp_path, monkeypatch, capsys, harm
):
    path, canary = tmp_path / "state.pt", tmp_path / "canary"
    monkeypatch.setenv("CANARY", str(canary))
    state = TrainingState(path, "same")
    state.save({"network": {"weight": torch.arange(1000.0)}})
    content = path.read_bytes()
    place = content.index(torch.arange(1000.0).numpy().tobytes()) + 2001
    damaged = {
        "truncated": content[:-100],
        "flipped": content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :],
        "text": b"not a state",
        "empty": b"",
        "pickle": pickle.dumps(Harm()),
    }
    if harm in damaged:
        path.write_bytes(damaged[harm])
    else:
        torch.save({"fingerprint": "same", "state": Harm()}, path)
    harmed, aside = path.read_bytes(), path.with_name("state.pt.damaged")
    monkeypatch.setattr(files, "SETTLED", 0)
    assert state.load() is None
    [sentence] = capsys.readouterr().err.splitlines()
    assert sentence.startswith(f"{path}: damaged, or not a training state (")
    assert sentence.endswith(f"; set aside as {aside}, this training begins anew")
    assert [aside] == list(tmp_path.iterdir())
    assert aside.read_bytes() == harmed
    assert not canary.exists()
    if "pickle" in harm:  # the sample does what it threatens to
        with pytest.raises(Exception, match=r".*"):
            torch.load(aside, weights_only=False)["fingerprint"]["none"]
        assert canary.exists()


PAGE = 4096
"""Bytes that reach a disk together, or not at all."""


def test_a_state_that_reached_the_disk_in_part_is_never_believed(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "SETTLED", 0)
    state = TrainingState(tmp_path / "state.pt", "same")
    saved = {"weight": torch.arange(5000.0), "bias": torch.arange(3000), "epoch": 3}
    state.save(saved)
    whole = state.path.read_bytes()
    torn = 0
    for start in range(0, len(whole), PAGE):
        rest = whole[start + PAGE :]
        page = bytes(len(whole[start : start + PAGE]))
        for content in (whole[:start], whole[:start] + page + rest):
            state.path.write_bytes(content)
            torn += state.load() is None
    assert torn == 2 * -(-len(whole) // PAGE) > 20
    state.path.write_bytes(whole)
    loaded = state.load()
    assert loaded.keys() == saved.keys()
    assert torch.equal(loaded["weight"], saved["weight"])


def test_one_network_is_trained_by_one_process_at_a_time(tmp_path):
    script = """
import sys, time
from ensdistill.state import TrainingState
with TrainingState(sys.argv[1], "same").exclusive():
    print("held", flush=True)
    time.sleep(60)
"""
    path = tmp_path / "state.pt"
    with subprocess.Popen([sys.executable, "-c", script, path], stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"held\n"
        with (
            pytest.raises(InputError, match="another process is training this network"),
            TrainingState(path, "same").exclusive(),
        ):
            pass
        other.kill()
    for _ in range(100):  # the kernel lets go when the process is gone
        try:
            with TrainingState(path, "same").exclusive():
                return
        except InputError:
            time.sleep(0.05)
    pytest.fail("still locked")
