"""Weights files: round trips, damage, and a header that says all that made the weights."""

import runpy
import subprocess
import sys
from contextlib import nullcontext
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from ensdistill import InputError
from ensdistill.hdf5 import write_hdf5
from ensdistill.images import read_images
from ensdistill.predictions import read_attributes, read_prediction
from ensdistill.students import build_student, predict
from ensdistill.studies import Study
from ensdistill.training import train_student
from ensdistill.weights import load_student, origin, read_header, save_student
from tests.project import REPOSITORY

ARCHITECTURE = {
    "name": "resnet8", "num_classes": 4, "in_channels": 1, "width": 4, "mean": [0.3], "std": [0.2]
}  # fmt: skip


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(1)
    student = build_student("batch_ensemble", ARCHITECTURE, members=2)
    path = tmp_path / "weights.safetensors"
    save_student(path, student, {"study": "s", "seed": 1})
    return path, student


def test_a_weights_file_is_enough_to_get_the_student_back(saved):
    path, student = saved
    loaded = load_student(path)
    assert type(loaded) is type(student)
    assert loaded.members == 2
    assert loaded.spec == student.spec
    assert loaded.state_dict().keys() == student.state_dict().keys()
    for key, value in student.network.state_dict().items():
        assert torch.equal(loaded.network.state_dict()[key], value), key
    assert not any(module.training for module in loaded.modules())
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert read_header(path)["seed"] == 1


def test_the_same_student_gives_the_same_bytes(saved, tmp_path):
    path, student = saved
    header = read_header(path)
    assert header.pop("spec") == student.spec
    save_student(tmp_path / "again", student, header)
    assert path.read_bytes() == (tmp_path / "again").read_bytes()


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[: len(data) // 2],
        lambda data: b"",
        lambda data: b"not safetensors at all",
        lambda data: data.replace(b"resnet8", b"resnet9"),
        lambda data: data.replace(b'num_classes\\": 4', b'num_classes\\": 5'),
        lambda data: data.replace(b'members\\": 2', b'members\\": 3'),
        lambda data: data.replace(b"batch_ensemble", b"batch_ensembla"),
        lambda data: data.replace(b'\\"spec\\"', b'\\"spek\\"'),
        lambda data: data.replace(b"ensdistill", b"something!", 1),
    ],
)
def test_damaged_weights_are_named_in_one_sentence(saved, damage):
    path, _ = saved
    data = path.read_bytes()
    assert damage(data) != data
    path.write_bytes(damage(data))
    with pytest.raises(InputError) as caught:
        load_student(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_nothing_that_takes_long_is_imported_for_a_student_or_its_training(saved):
    path, _ = saved
    code = (
        "import sys; from ensdistill.weights import load_student; import ensdistill.training; "
        "import torch; from ensdistill.numerics import check_gradients; "
        f"student = load_student({str(path)!r}).requires_grad_(); "
        "loss = lambda student, x, y: student(x).square().mean(); "
        "check_gradients(student, torch.rand(4, 1, 8, 8), torch.zeros(4), loss, 'fp32'); "
        "print({'torch._dynamo', 'torchvision', 'sklearn', 'matplotlib', 'scipy.optimize'}"
        " & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_missing_weights_are_named(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        load_student(tmp_path / "weights.safetensors")


# --- what the header says --------------------------------------------------------------------

TINY = {"epochs": 1, "batch_size": 8, "warmup_epochs": 1}
METHODS = {
    "labels": {"label": "A", "objective": "labels"},
    "one": {"label": "B", "perturbation": {"name": "ods", "eta": "1/255"}},
    "eta": {"label": "C", "perturbation": {"name": "ods", "eta": "2/255"}},
    "alpha": {
        "label": "D",
        "objective": {"name": "one_to_one", "alpha": 0.5},
        "perturbation": {"name": "ods", "eta": "1/255"},
    },
    "tau": {
        "label": "E",
        "objective": {"name": "one_to_one", "temperature": 2.0},
        "perturbation": {"name": "ods", "eta": "1/255", "temperature": 4.0},
    },
    "tau_of_ods": {
        "label": "F",
        "perturbation": {"name": "ods", "eta": "1/255", "temperature": 2.0},
    },
    "kind": {"label": "G", "perturbation": {"name": "conf_ods", "eta": "1/255"}},
    "mean": {
        "label": "H",
        "objective": "ensemble_mean",
        "perturbation": {"name": "ods", "eta": "1/255"},
    },
    "own": {
        "label": "I",
        "student": {"name": "batch_ensemble", "architecture": {"name": "wrn10x2", "width": 4}},
        "perturbation": {"name": "ods", "eta": "1/255"},
    },
    "single": {"label": "J", "student": "single", "objective": "ensemble_mean"},
}
STUDY = Study.model_validate(
    {
        "members": 2,
        "pool": 3,
        "architecture": {"name": "resnet8", "width": 4},
        "teacher": TINY,
        "student": TINY,
        "methods": METHODS,
    }
)


EVALUATION = {"resize": 9, "crop": 8, "interpolation": "bicubic"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Teachers and students, each trained for an epoch on 16 images; weights files by name."""
    folder, rng = tmp_path_factory.mktemp("trained"), np.random.default_rng(0)
    splits = {"train": 16, "val": 8, "test": 8}
    arrays = {f"{s}/images": rng.integers(0, 256, (n, 1, 8, 8), "u1") for s, n in splits.items()}
    arrays |= {f"{s}/labels": rng.permutation(np.arange(n) % 4) for s, n in splits.items()}
    known = {"classes": list("abcd"), "mean": [0.5], "std": [0.3], "evaluation": EVALUATION}
    write_hdf5(folder / "images.h5", arrays, known)
    paths = {}

    def train(name, method, seed, teachers=()):
        paths[name] = folder / name / "weights.safetensors"
        paths[name].parent.mkdir()
        recipe = STUDY.recipe(method) if method else STUDY.teacher
        train_student(
            folder / "images.h5",
            paths[name],
            folder / name / "history.csv",
            teachers=[paths[teacher] for teacher in teachers],
            device=torch.device("cpu"),
            seed=seed,
            parts=STUDY.parts(method),
            recipe=recipe.model_dump(),
            augmentation={"crop_padding": 1, "flip": False},
            precision="fp32",
            origin={"study": "tiny", "method": method or "teacher", "replicate": seed},
            fingerprint=name,
        )

    for seed in range(3):
        train(f"teacher{seed}", None, seed)
    for method in METHODS:
        needed = STUDY.methods[method].objective.needs_teachers
        train(method, method, 0, ["teacher0", "teacher1"] if needed else [])
    train("other_teachers", "one", 0, ["teacher0", "teacher2"])
    train("again", "one", 0, ["teacher0", "teacher1"])
    return paths


def test_a_header_says_what_made_the_weights(trained):
    header = read_header(trained["one"])
    assert header["student"] == {"name": "batch_ensemble"}
    assert header["members"] == 2
    assert header["architecture"] == {"name": "resnet8", "width": 4}
    assert header["objective"] == {"name": "one_to_one", "alpha": 0.9, "temperature": 4.0}
    assert header["perturbation"] == {
        "name": "ods",
        "eta": float(Fraction(1, 255)),
        "temperature": 4.0,
    }
    assert header["teachers"] == [read_header(trained[f"teacher{i}"])["digest"] for i in (0, 1)]
    assert (header["study"], header["method"], header["seed"]) == ("tiny", "one", 0)
    assert (header["device"], header["precision"]) == ("cpu", "fp32")
    assert header["recipe"]["learning_rate"] == STUDY.student.learning_rate
    assert header["prediction"] == "mixture"
    assert header["evaluation"] == EVALUATION
    teacher = read_header(trained["teacher0"])
    assert teacher["student"] == {"name": "single"}
    assert teacher["objective"] == {"name": "labels"}
    assert teacher["perturbation"] == {"name": "none"}
    assert (teacher["teachers"], teacher["members"]) == ([], 1)


@pytest.mark.parametrize(
    ("name", "place", "value"),
    [
        ("eta", ("perturbation", "eta"), 2 / 255),
        ("alpha", ("objective", "alpha"), 0.5),
        ("tau", ("objective", "temperature"), 2.0),
        ("tau_of_ods", ("perturbation", "temperature"), 2.0),
        ("kind", ("perturbation", "name"), "conf_ods"),
        ("mean", ("objective", "name"), "ensemble_mean"),
        ("own", ("architecture", "name"), "wrn10x2"),
        ("other_teachers", ("teachers", 1), None),
    ],
)
def test_whatever_differs_is_in_the_header_and_changes_the_digest(trained, name, place, value):
    one, other = read_header(trained["one"]), read_header(trained[name])
    section, key = place
    assert one[section][key] != other[section][key]
    if value is not None:
        assert other[section][key] == value
    assert one["digest"] != other["digest"]
    assert trained["one"].read_bytes() != trained[name].read_bytes()
    one[section][key] = other[section][key]
    changing = {"method", "digest", "spec"}
    assert {k: one[k] for k in one.keys() - changing} == {
        k: other[k] for k in other.keys() - changing
    }


def test_no_two_of_these_students_have_one_digest_and_the_same_ones_have(trained):
    digests = {name: read_header(path)["digest"] for name, path in trained.items()}
    assert digests.pop("again") == digests["one"]
    assert len(set(digests.values())) == len(trained) - 1
    assert trained["again"].read_bytes() == trained["one"].read_bytes()


def test_the_header_of_what_is_computed_from_weights_repeats_all_but_the_steps_own(trained):
    header = read_header(trained["one"])
    repeated = origin(trained["one"])
    assert repeated.pop("weights") == header["digest"]
    own = {"digest", "ensdistill", "torch", "device", "precision", "precision_reason"}
    header = {key: header[key] for key in header.keys() - own}
    assert repeated == header


class Named(dict):
    """Files by name, as Snakemake gives them."""

    __getattr__ = dict.__getitem__


def test_logits_name_the_precision_of_their_own_step_and_the_weights_they_are_of(
    trained, tmp_path, monkeypatch
):
    """Weights that were trained in bfloat16 give logits in float32."""
    monkeypatch.setattr("ensdistill.jobs.job", nullcontext)
    monkeypatch.setattr("ensdistill.devices.prepare", lambda *_: torch.device("cpu"))
    weights, images = tmp_path / "weights.safetensors", trained["one"].parents[1] / "images.h5"
    of_training = {**read_header(trained["one"]), "precision": "bf16"}
    save_student(weights, load_student(trained["one"]), of_training)
    files = Named(images=images, shifted=images, weights=weights)
    made = Named(images=tmp_path / "0.h5", shifted=tmp_path / "shifted.h5")
    job = SimpleNamespace(input=files, output=made, threads=1, resources={})
    runpy.run_path(str(REPOSITORY / "workflow_scripts/logits.py"), {"snakemake": job})
    known, header = read_attributes(made.images), read_header(weights)
    assert header["precision"] == "bf16"
    assert (known["precision"], known["weights"]) == ("fp32", header["digest"])
    assert read_attributes(made.shifted) == known
    images, labels = read_images(files.images, "test")
    prediction, stored_labels = read_prediction(made.images, "test")
    with torch.no_grad():
        expected = load_student(weights)(torch.from_numpy(images) / 255).transpose(0, 1)
    np.testing.assert_allclose(prediction.logits, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(stored_labels, labels)


@pytest.mark.parametrize("name", ["own", "single", "labels", "teacher0"])
def test_students_of_every_architecture_give_logits_from_their_file(trained, name):
    """Also of another architecture than their teachers."""
    student = load_student(trained[name])
    images = torch.randint(0, 256, (3, 1, 8, 8), dtype=torch.uint8)
    logits = predict(student, images)
    assert logits.shape == (3, 2 if name in ("own", "labels") else 1, 4)
    assert np.isfinite(logits).all()
    family = "PreActivationBlock" if name == "own" else "BasicBlock"
    assert type(student.network.blocks[0]).__name__ == family
    history = pd.read_csv(trained[name].with_name("history.csv"))
    assert np.isfinite(history.to_numpy()).all()
    assert ("distillation" in history) == (name in ("own", "single"))
