"""Training and prediction from images that stay in their file, against the same in memory."""

import gc
import logging
import multiprocessing
import os
import resource
import signal
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from ensdistill import InputError, analysis, batches, hdf5, loading, training
from ensdistill.batches import StreamedBatches, TrainingBatches
from ensdistill.jobs import Interrupted, to_tell
from ensdistill.learning import learning
from ensdistill.loading import free_memory, in_batches, load_images, mixed, read_ahead
from ensdistill.recipes import Recipe
from ensdistill.state import TrainingState
from ensdistill.stored_images import StoredImages
from ensdistill.students import build_student, predict, predictions
from ensdistill.training import fit
from tests.builders import TEACHER_PARTS, noise
from tests.stores import sorted_file, store

CPU = torch.device("cpu")
AUGMENTED = {"crop_padding": 1, "flip": True}


@pytest.fixture
def path(tmp_path):
    return sorted_file(tmp_path / "images.h5")


def numbered(path, count, chunk):
    """A stored image at place n has the pixels n mod 256 and n // 256."""
    pixels = np.zeros((count, 1, 1, 2), np.uint8)
    pixels[:, 0, 0, 0], pixels[:, 0, 0, 1] = np.arange(count) % 256, np.arange(count) // 256
    with h5py.File(path, "w") as file:
        store(file, "train", pixels, np.arange(count), chunk)
    return StoredImages(path, "train")


def places_of(pixels):
    pixels = np.asarray(pixels, int)
    return (pixels[:, 0, 0, 0] + 256 * pixels[:, 0, 0, 1]).tolist()


@pytest.fixture
def threads(monkeypatch):
    return lambda count: monkeypatch.setattr(loading, "readers", lambda: count)


@pytest.fixture
def at_once(monkeypatch):
    """Without other processes, and noting how many images were read."""
    read = []

    def in_this_process(images, reads, ahead, channels_last):
        assert channels_last
        for places in reads:
            read.append(len(places))
            yield torch.from_numpy(images.read(places)).permute(0, 2, 3, 1)

    monkeypatch.setattr(loading, "read_ahead", in_this_process)
    return read


# --- where images are ------------------------------------------------------------------------


@pytest.mark.parametrize("fits", [True, False])
def test_images_stay_in_memory_where_a_quarter_of_it_holds_them(path, monkeypatch, caplog, fits):
    caplog.set_level(logging.INFO, "ensdistill")
    stored = StoredImages(path, "train")
    monkeypatch.setattr(loading, "free_memory", lambda device: 4 * stored.nbytes - (not fits))
    images, labels = load_images(stored, CPU, logging.INFO)
    np.testing.assert_array_equal(labels, np.sort(np.arange(24) % 4))
    [said] = caplog.messages
    if fits:
        np.testing.assert_array_equal(images, noise(24, 3, 6, 6, seed=0))
        assert said.startswith("train: 0 MiB of pixels stay in memory")
    else:
        assert images is stored
        assert said.startswith("train: 0 MiB of pixels are read in the background")


def test_free_memory_is_the_least_of_all_limits(monkeypatch):
    used = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_DATA)
    whole = free_memory(CPU)
    assert 0 < whole <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        resource.setrlimit(resource.RLIMIT_DATA, (used + 2**28, before[1]))
        assert abs(free_memory(CPU) - 2**28) < 2**26
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)
    monkeypatch.setattr(loading, "_of_cgroups", lambda: iter([5 * 2**20, 9 * 2**20]))
    assert free_memory(CPU) == 5 * 2**20


def test_limits_of_control_groups_are_read_up_to_the_root(tmp_path, monkeypatch):
    real = loading.Path
    (tmp_path / "cgroup").write_text("12:cpu:/x\n0::/job/step\n")
    for place, limit in (("", None), ("job", "7000"), ("job/step", "max")):
        (tmp_path / "fs" / place).mkdir(parents=True, exist_ok=True)
        if limit:
            (tmp_path / "fs" / place / "memory.max").write_text(limit)
    moved = {"/proc/self/cgroup": tmp_path / "cgroup", "/sys/fs/cgroup": tmp_path / "fs"}
    monkeypatch.setattr(loading, "Path", lambda first, *rest: real(moved[first], *rest))
    assert list(loading._of_cgroups()) == [7000]


# --- reading in the background ---------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_reads_come_in_their_order_however_many_processes_read(tmp_path, threads, workers):
    threads(workers)
    stored = numbered(tmp_path / "images.h5", 40, 4)
    reads = [np.random.default_rng(i).integers(0, 40, 5) for i in range(9)]
    torch.manual_seed(5)
    found = list(read_ahead(stored, reads, 8))
    assert [places_of(it) for it in found] == [it.tolist() for it in reads]
    drawn = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(1)), "the global generator is not touched"


@pytest.mark.parametrize("size", [1, 7, 40, 100])
@pytest.mark.parametrize("chunk", [1, 3])
def test_batches_in_the_order_of_the_file(tmp_path, size, chunk):
    stored = numbered(tmp_path / "images.h5", 40, chunk)
    found = [places_of(it) for it in in_batches(stored, size, CPU)]
    assert found == [it.tolist() for it in torch.arange(40).split(size)]


def test_a_damaged_file_is_one_sentence_from_any_process(tmp_path):
    stored = numbered(tmp_path / "images.h5", 40, 4)
    with h5py.File(stored.path, "r") as file:
        place = file["train/images"].id.get_chunk_info(7).byte_offset
    content = bytearray(stored.path.read_bytes())
    content[place + 12] ^= 1
    stored.path.write_bytes(content)
    hdf5._complete.clear()
    with pytest.raises(InputError, match=r"images\.h5: damaged") as caught:
        list(in_batches(stored, 4, CPU))
    assert "\n" not in str(caught.value)


def _wait_for(condition, seconds=10):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


def _children(pid):
    return [int(it) for it in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _runs(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _reads_and_stays(stored):
    reading = read_ahead(stored, [np.arange(4)] * 1000, 4)
    next(reading)
    time.sleep(60)


def test_processes_that_read_pay_no_heed_to_signals_and_end_with_the_one_they_read_for(tmp_path):
    stored = numbered(tmp_path / "images.h5", 40, 4)
    parent = multiprocessing.get_context("fork").Process(target=_reads_and_stays, args=(stored,))
    parent.start()
    _wait_for(lambda: _children(parent.pid))
    children = _children(parent.pid)
    time.sleep(0.5)
    for child in children:
        for number in (signal.SIGTERM, signal.SIGINT):
            os.kill(child, number)
    time.sleep(0.3)
    assert all(map(_runs, children))
    os.kill(parent.pid, signal.SIGKILL)
    parent.join()
    _wait_for(lambda: not any(map(_runs, children)))


def test_a_reader_that_is_killed_is_one_sentence(tmp_path):
    """As by the system where the memory is full."""
    stored = numbered(tmp_path / "images.h5", 40, 4)
    reading = read_ahead(stored, [np.arange(4)] * 1000, 4)
    next(reading)
    os.kill(_children(os.getpid())[-1], signal.SIGKILL)
    with pytest.raises(RuntimeError) as caught:
        for _ in reading:
            pass
    assert to_tell(caught.value).startswith("a process that reads images was killed")


@pytest.mark.parametrize("error", [EOFError, ConnectionResetError, FileNotFoundError])
def test_a_reader_that_is_killed_while_it_hands_over_is_the_same_sentence(error):
    def breaking_off():
        yield 1
        raise error

    found = loading._from_living(breaking_off())
    assert next(found) == 1
    with pytest.raises(RuntimeError) as caught:
        next(found)
    assert to_tell(caught.value).startswith("a process that reads images was killed")


def test_a_reader_that_does_not_end_by_itself_is_ended(tmp_path, monkeypatch):
    """A reader that hangs when nothing more is wanted of it would stay as long as this process."""
    stored = numbered(tmp_path / "images.h5", 40, 4)
    read = loading._Reads.__getitem__

    def hanging(self, places):
        if places[0] == 5:
            time.sleep(1000)
        return read(self, places)

    monkeypatch.setattr(loading._Reads, "__getitem__", hanging)
    before = _children(os.getpid())
    reading = read_ahead(stored, [np.arange(4), np.arange(5, 9)], 4)
    next(reading)
    reading.close()
    assert [it for it in _children(os.getpid()) if it not in before] == []


# --- the order -------------------------------------------------------------------------------


def epoch_of(stored, batch_size=4, seed=0, first=0):
    labels = torch.from_numpy(stored.labels)
    streamed = StreamedBatches(stored, labels, batch_size, crop_padding=0, flip=False)
    generator = torch.Generator().manual_seed(seed)
    found = []
    for x, y in streamed.epoch(generator, first):
        assert places_of((x * 255).round()) == y.tolist()
        found.append(y.tolist())
    return found


@pytest.fixture(params=[(1, 10), (4, 10), (4, 16), (7, 30), (90, 50)], ids=str)
def blocks(request, tmp_path, monkeypatch, at_once):
    """90 images; so many to a chunk, and as a window so many as fit."""
    chunk, window = request.param
    monkeypatch.setattr(batches, "WINDOW", 2 * window)
    return numbered(tmp_path / "images.h5", 90, chunk)


def test_every_image_comes_once_an_epoch_in_an_order_of_its_seed_alone(blocks):
    def order(batch_size, seed=0):
        return np.concatenate(epoch_of(blocks, batch_size, seed)).tolist()

    found = order(9)
    assert sorted(found) == list(range(90))
    assert order(9) == found == order(6)
    assert order(9, seed=1) != found


@pytest.mark.parametrize("size", [4, 7, 40])
def test_an_epoch_that_is_entered_late_goes_on_with_the_same_batches(blocks, size):
    whole = epoch_of(blocks, size)
    assert len(whole) == 90 // size
    for first in range(len(whole) + 1):
        assert epoch_of(blocks, size, first=first) == whole[first:]


def test_no_more_is_read_ahead_than_the_next_window(tmp_path, at_once):
    stored = numbered(tmp_path / "images.h5", 96, 4)
    rng = np.random.default_rng(0)
    windows = [[np.arange(4) + 4 * it for it in own] for own in rng.permutation(24).reshape(4, 6)]
    order = np.concatenate([rng.permutation(np.concatenate(window)) for window in windows])
    for number, pixels in enumerate(mixed(stored, windows, order, 5)):
        assert places_of(pixels.permute(0, 3, 1, 2)) == order[5 * number : 5 * number + 5].tolist()
        window = (5 * number + 4) // 24
        assert sum(at_once) <= 24 * min(window + 2, 4)
        assert sum(at_once) >= min(5 * number + 5 + 24, 24 * min(window + 2, 4))


def test_every_window_of_a_file_sorted_by_class_has_the_classes_shares(
    tmp_path, monkeypatch, at_once
):
    """Blocks of 4, windows of 20 of them, 8 classes of 100 images: each has 10 ± 4 of a class."""
    monkeypatch.setattr(batches, "WINDOW", 2 * 80)
    stored = numbered(tmp_path / "images.h5", 800, 4)
    stored.labels = np.arange(800) // 100
    labels = torch.from_numpy(stored.labels)
    streamed = StreamedBatches(stored, labels, 80, crop_padding=0, flip=False)
    for _, y in streamed.epoch(torch.Generator().manual_seed(0)):
        counts = np.bincount(y, minlength=8)
        assert (abs(counts - 10) <= 4).all()
        assert (counts % 4 == 0).all(), "whole blocks"


# --- training --------------------------------------------------------------------------------


def trained(path, monkeypatch, streamed, state=None, fatal=None, number=None, **changed):
    """A student of two teachers by ODS; of one or more channels, cropped from larger images."""
    generous = lambda device: 0 if streamed else 2**40  # noqa: E731
    monkeypatch.setattr(loading, "free_memory", generous)
    architecture = {"name": "resnet8", "num_classes": 4, "in_channels": 3, "width": 4}
    torch.manual_seed(0)
    teachers = [build_student("single", architecture, 1).network.eval() for _ in range(2)]
    student = build_student("batch_ensemble", architecture, 2)
    held_out = batches.training_batches(
        *load_images(StoredImages(path, "test"), CPU), 6, **AUGMENTED
    )
    how = learning(
        teachers,
        {"name": "one_to_one", "alpha": 0.9, "temperature": 2.0},
        {"name": "held_out"},
        held_out=held_out,
    )
    steps = iter(range(1000))

    def objective(step, x_distill, inner=how.objective):
        if next(steps) == fatal:
            os.kill(os.getpid(), number or signal.SIGTERM)
        return inner(step, x_distill)

    object.__setattr__(how, "objective", objective)
    train, validation = (load_images(StoredImages(path, split), CPU) for split in ("train", "val"))
    assert isinstance(train[0], StoredImages) == streamed
    recipe = Recipe(epochs=3, batch_size=5, learning_rate=0.1, warmup_epochs=1, validate_every=1)
    settings = {"seed": 4, "precision": "fp32", "state": state, **AUGMENTED, **changed}
    predictor, rows = fit(student, how, train, validation, recipe, **settings)
    for row in rows:
        row.pop("seconds")
    return predictor.state_dict(), rows


def assert_same(one, other):
    assert one[0].keys() == other[0].keys()
    for name, value in one[0].items():
        assert torch.equal(value, other[0][name]), name
    assert one[1] == other[1]


CHANGES = {
    "crops": {},
    "parts": {"random_resized_crop": [0.3, 1.0], "policy": {"name": "trivial_augment"}},
}


@pytest.mark.parametrize("train_side", [6, 9])
@pytest.mark.parametrize("changes", CHANGES)
def test_training_from_the_file_has_the_bits_of_training_from_memory(
    tmp_path, monkeypatch, changes, train_side
):
    """The order is the same where each image is stored by itself."""
    path = sorted_file(tmp_path / "images.h5", chunk=1, train_side=train_side)
    resident = trained(path, monkeypatch, False, **CHANGES[changes])
    assert_same(trained(path, monkeypatch, True, **CHANGES[changes]), resident)


@pytest.mark.parametrize("changes", CHANGES)
def test_training_from_the_file_goes_on_within_an_epoch_to_the_same_bits(
    path, tmp_path, monkeypatch, changes, threads
):
    monkeypatch.setattr(batches, "WINDOW", 9 * 3 * 6 * 6)
    whole = trained(path, monkeypatch, True, **CHANGES[changes])
    for number, fatal in ((signal.SIGTERM, 2), (signal.SIGINT, 6)):
        state = TrainingState(tmp_path / f"{number}.pt", "same")
        with pytest.raises(Interrupted, match=f"in epoch {fatal // 4 + 1}"):
            trained(path, monkeypatch, True, state, fatal, number, **CHANGES[changes])
        assert state.load()["epoch"] == fatal // 4 + 1
        threads(2)
        assert_same(trained(path, monkeypatch, True, state, **CHANGES[changes]), whole)
    gc.collect()  # the traceback of an interruption may still hold its readers
    assert multiprocessing.active_children() == []


def test_a_state_of_training_from_memory_is_not_taken_up_from_the_file(path, tmp_path, monkeypatch):
    """The order of images is another one; and the weights say which it was."""
    from ensdistill.weights import read_header

    settings = {
        "teachers": [],
        "device": CPU,
        "seed": 1,
        "parts": TEACHER_PARTS,
        "recipe": Recipe(epochs=1, batch_size=6, warmup_epochs=1).model_dump(),
        "augmentation": AUGMENTED,
        "precision": "fp32",
        "origin": {"study": "photographs"},
        "fingerprint": "same",
    }
    found = []
    monkeypatch.setattr(training, "check_first_step", lambda *given: None)
    for streamed in (False, True, True):
        monkeypatch.setattr(loading, "free_memory", lambda device, s=streamed: 0 if s else 2**40)
        weights = tmp_path / "weights.safetensors"
        training.train_student(path, weights, tmp_path / "history.csv", **settings)
        found.append((read_header(weights), weights.read_bytes()))
    (resident, bits), (header, others), (_, again) = found
    assert "block" not in resident
    assert header["block"] == 4
    assert bits != others == again


# --- prediction and analyses -----------------------------------------------------------------


def networks(count):
    architecture = {"name": "resnet8", "num_classes": 4, "in_channels": 3, "width": 4}
    torch.manual_seed(0)
    made = [build_student("single", architecture, 1) for _ in range(count)]
    return [it.eval().requires_grad_(False) for it in made]


@pytest.mark.parametrize("rows", [500, 7])
def test_predictions_from_the_file_have_the_bits_of_those_from_memory(path, monkeypatch, rows):
    monkeypatch.setattr("ensdistill.students.ROWS", rows)
    student, stored = networks(1)[0].train(), StoredImages(path, "test")
    expected = predict(student, torch.from_numpy(stored.read(np.arange(24))))
    np.testing.assert_array_equal(predict(student, stored), expected)
    assert [len(it) for it in predictions(student, stored)] == [24] if rows == 500 else [7, 7, 7, 3]
    assert student.training


@pytest.mark.parametrize("function", ["perturbed_logits", "sweep_logits", "transfer_logits"])
def test_analyses_from_the_file_have_the_bits_of_those_from_memory(path, function):
    ods = {"ods": {"name": "ods", "eta": 0.1, "temperature": 2.0}}
    held_out = {"held_out": {"name": "held_out"}}
    settings = {
        "perturbed_logits": {"perturbations": {**ods, **held_out}},
        "sweep_logits": {"etas": [0.1, 0.2], "perturbations": ods},
        "transfer_logits": {"eta": 0.1, "temperature": 2.0},
    }[function]
    order = np.random.default_rng(0).permutation(24)[:20]
    stored, others = StoredImages(path, "train").choose(order), StoredImages(path, "val")
    others = others.choose(np.arange(9))
    teachers = [it.network for it in networks(2)]
    kinds = {}
    for kind in ("memory", "file"):
        images, beside = (
            it if kind == "file" else torch.from_numpy(it.read(np.arange(len(it))))
            for it in (stored, others)
        )
        more = {"held_out": beside} if function == "perturbed_logits" else {}
        analyse = getattr(analysis, function)
        kinds[kind] = analyse(teachers, images, batch_size=7, **more, **settings)
    assert kinds["memory"].keys() == kinds["file"].keys()
    for name, array in kinds["memory"].items():
        np.testing.assert_array_equal(kinds["file"][name], array)


def test_long_arrays_are_written_block_by_block_and_short_ones_as_before(tmp_path, monkeypatch):
    rows = np.random.default_rng(0).normal(size=(50, 2, 3)).astype(np.float32)
    parts = [rows[start : start + 4] for start in range(0, 50, 4)]
    short = hdf5.in_blocks(iter(parts), 50)
    np.testing.assert_array_equal(short, rows)
    hdf5.write_hdf5(tmp_path / "short.h5", {"a/logits": short}, {})
    hdf5.write_hdf5(tmp_path / "whole.h5", {"a/logits": rows}, {})
    assert (tmp_path / "short.h5").read_bytes() == (tmp_path / "whole.h5").read_bytes()
    monkeypatch.setattr(hdf5, "BLOCK", rows[:10].nbytes)
    taken = []
    noted = (taken.append(len(it)) or it for it in parts)
    long = hdf5.in_blocks(noted, 60)
    assert sum(taken) == 12, "of the rest nothing is taken before it is written"
    hdf5.write_hdf5(tmp_path / "long.h5", {"a/logits": long}, {})
    with hdf5.open_hdf5(tmp_path / "long.h5") as file:
        np.testing.assert_array_equal(file["a/logits"][:], rows)
        assert file["a/logits"].chunks


def test_a_resident_batch_by_itself_is_the_first_of_an_epoch(path):
    images, labels = load_images(StoredImages(path, "train"), CPU)
    resident = TrainingBatches(images, labels, 5, **AUGMENTED)
    drawn = resident.any_batch(torch.Generator().manual_seed(3))
    first = next(resident.epoch(torch.Generator().manual_seed(3)))
    assert all(map(torch.equal, drawn, first))
