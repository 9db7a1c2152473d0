"""The functions of `import ensdistill`, against the workflow's training and explicit formulas."""

import copy
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

import ensdistill
from ensdistill import api
from ensdistill.calibration import apply_temperature, optimal_temperature
from ensdistill.convert import to_batch_ensemble
from ensdistill.deployment import Deployment, TorchStudent
from ensdistill.digests import attributes
from ensdistill.images import read_images
from ensdistill.students import build_student, teacher_logits
from ensdistill.studies import Study
from ensdistill.training import train_student
from ensdistill.weights import load_student, read_header, save_student
from tests.builders import make, message
from tests.project import REPOSITORY

RECIPE = {"epochs": 3, "warmup_epochs": 1, "batch_size": 16, "learning_rate": 0.1}
RESNET = {"name": "resnet8", "width": 2}
ONE_PASS = {"name": "ods", "eta": "16/255", "single_pass": True}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """images.h5 of 40 digits to train on and 30 to validate by."""
    path = tmp_path_factory.mktemp("api") / "images.h5"
    make(path, source="digits", train=40, validation=30, test=50)
    return path


@pytest.fixture(scope="module")
def splits(path):
    return [read_images(path, split) for split in ("train", "val", "test")]


@pytest.fixture(scope="module")
def teachers():
    torch.manual_seed(5)
    architecture = {**RESNET, "num_classes": 10, "in_channels": 1}
    return [build_student("single", architecture, 1) for _ in range(2)]


class Net(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, width, 3), nn.Linear(width, 10)

    def forward(self, x):
        return self.head(self.conv(x - 0.5).relu().mean((2, 3)))


def distil(teachers, architecture, splits, **options):
    train, validation, _ = splits
    given = {"validation": validation, "recipe": RECIPE, "progress": False, **options}
    return ensdistill.distil(teachers, architecture, *train, **given)


@pytest.mark.parametrize(
    ("method", "more"),
    [
        ({"perturbation": "conf_ods"}, {}),
        ({"student": "single", "objective": "proxy_dirichlet", "perturbation": "gaussian"}, {}),
        ({"student": {"name": "hydra", "together": 0.4}, "perturbation": ONE_PASS}, {"seed": 3}),
        (
            {"student": "latent_batch_ensemble", "recipe": {**RECIPE, "optimizer": "adamw"}},
            {"augmentation": {"crop_padding": 1, "flip": True}},
        ),
    ],
    ids=["conf_ods", "dirichlet", "hydra", "merged"],
)
def test_a_student_has_the_bits_of_the_workflow_s(path, splits, teachers, tmp_path, method, more):
    files = []
    for place, teacher in enumerate(teachers):  # as files, as which workflows know them
        files.append(tmp_path / f"{place}.safetensors")
        save_student(files[-1], teacher, {"digest": "0"})
    settings = {"seed": 0, "augmentation": {}, **more}
    study = Study.model_validate(
        {
            "methods": {"mine": {"label": "Mine", "recipe": RECIPE, **method}},
            **{"architecture": RESNET, "members": 2, "pool": 2},
            "augmentation": settings["augmentation"],
        }
    )
    weights = tmp_path / "mine" / "weights.safetensors"
    weights.parent.mkdir()
    train_student(
        path,
        weights,
        weights.parent / "history.csv",
        teachers=files,
        device=torch.device("cpu"),
        seed=settings["seed"],
        parts=study.parts("mine"),
        recipe=study.recipe("mine").model_dump(),
        augmentation=study.augmentation.model_dump(),
        precision="fp32",
        origin={"study": "s"},
        fingerprint="",
    )
    before = torch.random.get_rng_state()
    mine = distil(teachers, RESNET, splits, **method, **more)
    assert torch.equal(torch.random.get_rng_state(), before)
    expected = load_student(weights)
    own, theirs = (it.network.state_dict() for it in (mine.student, expected))
    assert own.keys() == theirs.keys()
    for key in own:
        assert torch.equal(own[key], theirs[key]), key
    assert mine.student.spec == expected.spec
    header, made = read_header(weights), mine.made
    for key in ("objective", "perturbation", "student", "architecture", "recipe", "prediction"):
        assert made[key] == header[key]
    assert [row["epoch"] for row in mine.history] == [1, 2, 3]


# --- networks of one's own -------------------------------------------------------------------


@pytest.fixture(scope="module")
def own(splits):
    """Teachers and a student of an own module."""
    torch.manual_seed(6)
    teachers = [Net(5), nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.Dropout(0.9))]
    network = Net()
    before = copy.deepcopy([it.state_dict() for it in (*teachers, network)])
    student = distil(teachers, network, splits, classes=[*"abcdefghij"])
    after = [it.state_dict() for it in (*teachers, network)]
    for old, new in zip(before, after, strict=True):
        assert all(torch.equal(old[key], new[key]) for key in old)
    assert all(it.training for it in (*teachers, network))
    return student, network


def test_an_own_module_becomes_a_student_of_its_weights(splits):
    torch.manual_seed(7)
    network, x = Net(), torch.rand(4, 1, 8, 8)
    still = {"recipe": {**RECIPE, "epochs": 1, "learning_rate": 1e-12}}
    teachers = [network, copy.deepcopy(network)]
    single = distil(teachers, network, splits, student="single", **still)
    torch.testing.assert_close(single.student(x)[0], network(x).detach())
    ones = {"name": "batch_ensemble", "init": "ones"}
    ensemble = distil(teachers, network, splits, student=ones, **still)
    torch.testing.assert_close(ensemble.student(x), network(x).detach().expand(2, -1, -1))
    merged = distil(teachers, network, splits, student="latent_batch_ensemble", **still)
    assert merged.student.members == 1
    torch.testing.assert_close(merged.student(x)[0], network(x).detach())


def test_saved_loaded_and_asked_it_says_what_the_formulas_say(own, splits, tmp_path):
    (student, network), (_, (held, labels), (test, _)) = own, splits
    path = tmp_path / "own.safetensors"
    ensdistill.save(student, path)
    loaded = ensdistill.load(path, network=copy.deepcopy(network).double().float())
    assert loaded.deployment.classes == [*"abcdefghij"]
    assert loaded.deployment.size == (8, 8)

    def softmax(logits):
        e = np.exp(logits - logits.max(-1, keepdims=True))
        return e / e.sum(-1, keepdims=True)

    def logits(images):
        x = torch.from_numpy(images).float() / 255
        rows = student.student.network(x.repeat(2, 1, 1, 1)).detach().double().numpy()
        return rows.reshape(2, len(x), 10).transpose(1, 0, 2)

    temperature = optimal_temperature(softmax(logits(held)).mean(1), labels)
    assert loaded.deployment.temperature == pytest.approx(temperature, rel=1e-4)
    temperature = loaded.deployment.temperature
    mean = apply_temperature(softmax(logits(test)).mean(1), temperature)
    members = softmax(logits(test) / temperature)
    answers = ensdistill.predict(loaded, test)
    np.testing.assert_allclose(answers.probabilities, mean, rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(answers.member_probabilities, members, rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(answers.entropy, -(mean * np.log(mean)).sum(1), rtol=1e-4)
    inner = members.mean(1)
    between = (members * np.log(members)).sum(2).mean(1) - (inner * np.log(inner)).sum(1)
    np.testing.assert_allclose(answers.mutual_information, between, rtol=1e-3, atol=1e-6)
    for before, after in zip(ensdistill.predict(student, test), answers, strict=True):
        np.testing.assert_array_equal(before, after)
    scores = loaded.deployment.scores
    assert scores == sorted(scores)
    of_held = 1 - apply_temperature(softmax(logits(held)).mean(1), temperature)
    every = of_held[np.arange(len(labels)), labels]
    assert all(np.abs(every - it).min() < 1e-5 for it in scores)
    again = tmp_path / "again.safetensors"
    ensdistill.save(loaded, again)
    assert again.read_bytes() == path.read_bytes()


def test_without_its_module_an_own_student_says_what_it_needs(own, tmp_path):
    path = tmp_path / "own.safetensors"
    ensdistill.save(own[0], path)
    assert message(ensdistill.load, path) == (
        f"{path}: its network is a module of your own (Net), which no file of weights holds: give "
        "it too, as in ensdistill.load(path, network=module)"
    )
    assert "fit no network" in message(ensdistill.load, path, network=Net(5))


def test_a_header_can_name_no_module(own, tmp_path):
    """It is JSON: what it calls a module is none."""
    path = tmp_path / "own.safetensors"
    ensdistill.save(own[0], path)
    header, tensors = read_header(path), load_file(path)
    header["spec"]["architecture"]["module"] = "os.system"
    save_file(tensors, path, metadata={"ensdistill": json.dumps(header)})
    assert "its network is a module of your own (Net)" in message(ensdistill.load, path)


def test_a_deployment_of_another_version_is_one_sentence(own, tmp_path):
    path = tmp_path / "own.safetensors"
    ensdistill.save(own[0], path)
    header, tensors = read_header(path), load_file(path)
    header["deployment"]["colour"] = "red"
    save_file(tensors, path, metadata={"ensdistill": json.dumps(header)})
    said = message(ensdistill.load, path, network=own[1])
    assert said.startswith(f"{path}: its header is not of this version (")


def test_teachers_are_asked_in_eval_mode(own, splits):
    """With dropout of nine tenths in a teacher a run has the bits of one without it."""
    torch.manual_seed(6)
    teachers = [Net(5), nn.Sequential(nn.Flatten(), nn.Linear(64, 10))]
    other = distil(teachers, own[1], splits)
    states = (it.student.state_dict() for it in (own[0], other))
    assert all(torch.equal(*pair) for pair in zip(*(it.values() for it in states), strict=True))


# --- asking ----------------------------------------------------------------------------------


def test_batches_pictures_and_tensors_give_the_same(own, splits, tmp_path, monkeypatch):
    (student, _), test = own, splits[2][0]
    whole = ensdistill.predict(student, test)
    paths = [tmp_path / f"{place}.png" for place in range(len(test))]
    for path, image in zip(paths, test, strict=True):
        Image.fromarray(image[0]).save(path)
    monkeypatch.setattr(api, "AT_ONCE", 7)
    for given in (test, torch.from_numpy(test), paths, tuple(map(str, paths))):
        for before, after in zip(whole, ensdistill.predict(student, given), strict=True):
            np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-7)
    larger = tmp_path / "larger.png"
    Image.fromarray(test[3][0].repeat(4, 0).repeat(4, 1)).save(larger)
    square = np.array(Image.open(larger).resize((8, 8), Image.Resampling.BICUBIC))[None, None]
    resized = [ensdistill.predict(student, it).probabilities for it in (larger, square)]
    np.testing.assert_array_equal(*resized)
    one = ensdistill.predict(student, paths[3])
    np.testing.assert_allclose(one.probabilities[0], whole.probabilities[3], rtol=1e-5)


def test_one_network_has_no_mutual_information(teachers, splits):
    student = distil(teachers, RESNET, splits, student="single")
    answers = ensdistill.predict(student, splits[2][0])
    assert answers.mutual_information is None
    assert answers.member_probabilities.shape == (50, 1, 10)


def test_what_cannot_be_asked_is_refused(own, tmp_path):
    def says(images):
        return message(ensdistill.predict, own[0], images)

    assert says([]) == says(np.zeros((0, 1, 8, 8), np.uint8)) == "there are no images"
    wanted = "images must be uint8 (N, 1, 8, 8), not "
    assert says(np.zeros((2, 1, 8, 8))) == f"{wanted}float64 (2, 1, 8, 8)"
    assert says(np.zeros((2, 3, 8, 8), np.uint8)) == f"{wanted}uint8 (2, 3, 8, 8)"
    assert says(np.zeros((2, 1, 8, 9), np.uint8)) == f"{wanted}uint8 (2, 1, 8, 9)"
    assert "no such file" in says(str(tmp_path / "none.png")).lower()
    (tmp_path / "text.png").write_text("text")
    assert "not an image" in says(tmp_path / "text.png")


def test_pictures_of_several_sizes_are_refused_where_the_size_is_not_known(tmp_path):
    student = build_student("single", {**RESNET, "num_classes": 3, "in_channels": 1}, 1)
    for width in (8, 9):
        Image.new("L", (width, 8)).save(tmp_path / f"{width}.png")
    asked = TorchStudent(student, Deployment(["a", "b", "c"], channels=1), made={})
    paths = [tmp_path / "8.png", tmp_path / "9.png"]
    said = message(ensdistill.predict, asked, paths)
    assert said == f"{paths[1]}: has 9×8 pixels, the first 8×8"


def test_samples_count_as_members(tmp_path):
    architecture, path = (
        {**RESNET, "num_classes": 3, "in_channels": 1},
        tmp_path / "dlf.safetensors",
    )
    save_student(path, build_student("gaussian_logits", architecture, 2, samples=5), attributes())
    loaded = ensdistill.load(path)
    answers = ensdistill.predict(loaded, np.zeros((2, 1, 8, 8), np.uint8))
    assert answers.member_probabilities.shape[1] == loaded.deployment.members == 5


# --- what is refused before it is trained ----------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"student": "batchensemble"}, 'student: unknown name "batchensemble"; known are'),
        ({"perturbation": {"name": "ods", "et": 1}}, "unknown key 'perturbation.et'; did you mean"),
        ({"perturbation": "held_out"}, "distil: perturbation 'held_out' needs"),
        ({"recipe": {"epochs": 2}}, "'warmup_epochs' is larger than 'epochs'"),
        ({"recipe": {"epochs": 0}}, "recipe.epochs: input should be greater"),
        ({"student": "single", "objective": "one_to_one"}, "needs a student with members"),
        ({"classes": ["a"]}, "classes: 1 names, and teachers have logits of 10"),
        (
            {"validation": (np.zeros((2, 1, 9, 8), np.uint8), [0, 1])},
            "validation: images are (1, 9",
        ),
        ({"validation": (np.zeros((2, 1, 8, 8)), [0, 1])}, "validation: images must be uint8"),
        ({"validation": (np.zeros((2, 1, 8, 8), np.uint8), [0, 10])}, "a label is 10"),
        ({"validation": (np.zeros((2, 1, 8, 8), np.uint8), [0.0, 1])}, "labels must be integers"),
        ({"validation": (np.zeros((2, 1, 8, 8), np.uint8), [-1, 1])}, "labels must be integers"),
    ],
)
def test_wrong_settings_are_one_sentence(teachers, splits, options, said):
    assert said in message(distil, teachers, RESNET, splits, **options)


def test_wrong_networks_are_one_sentence(teachers, splits):
    assert message(distil, teachers[:1], RESNET, splits).endswith("two teachers, not 1")
    several = [teachers[0], nn.Sequential(nn.Flatten(), nn.Linear(64, 9))]
    assert message(distil, several, RESNET, splits) == "teachers have logits of 10, 9 classes"
    other = [teachers[0], nn.Linear(64, 10)]
    assert message(distil, other, RESNET, splits).startswith("teacher 1 cannot take the images (")
    assert message(distil, [teachers[0], nn.Identity()], RESNET, splits).endswith("not (B, K)")
    assert "unknown architecture 'resnet'" in message(distil, teachers, "resnet", splits)
    assert "its logits have the shape" in message(distil, teachers, nn.Flatten(), splits)
    assert "by name" in message(distil, teachers, Net(), splits, student="packed")
    assert "in memory" in message(distil, teachers, "module:Net", splits)


# --- the package -----------------------------------------------------------------------------


def run(code):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPOSITORY
    ).stdout


def test_the_package_imports_no_torch_until_it_is_needed():
    code = """
import sys, ensdistill
assert {*ensdistill.__all__} <= {*dir(ensdistill)}
ensdistill.load, ensdistill.predict, ensdistill.save, ensdistill.distil
print("torch" in sys.modules)
print(callable(ensdistill.convert), "torch" in sys.modules)
"""
    assert run(code) == "False\nTrue True\n"


def test_an_unknown_name_is_no_attribute():
    with pytest.raises(AttributeError, match="module 'ensdistill' has no attribute 'distill'"):
        ensdistill.distill  # noqa: B018
    assert {*ensdistill.__all__} <= {*dir(ensdistill)}
    for name in ensdistill.__all__:
        assert callable(getattr(ensdistill, name))


def test_convert_is_a_function_and_a_module():
    """Whatever was imported before it."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 3))
    first = ensdistill.convert(network, 4, init="signs")
    torch.manual_seed(0)
    nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 3))
    second = to_batch_ensemble(network, 4, "signs")
    assert first.state_dict().keys() == second.state_dict().keys()
    for key, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[key])
    assert ensdistill.convert.to_batch_ensemble is to_batch_ensemble


# --- its page --------------------------------------------------------------------------------


def test_the_page_of_the_library_runs(splits, tmp_path, monkeypatch):
    """Its blocks one after the other, with fewer epochs."""
    (images, labels), held, (test, _) = splits
    torch.manual_seed(0)
    known = {
        "teachers": [Net(), Net(3)],
        "network": Net(),
        "images": images,
        "labels": labels,
        "validation_images": held[0],
        "validation_labels": held[1],
        "test_images": test,
        "names": [f"digit {k}" for k in range(10)],
    }
    (page,) = Path(REPOSITORY, "docs").rglob("library.md")
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)
    assert len(blocks) == 3
    monkeypatch.chdir(tmp_path)
    for block in blocks:
        short = block.replace('"epochs": 75', '"epochs": 6')
        exec(compile(short, str(page), "exec"), known)
    answers, student = known["answers"], known["student"]
    assert answers.probabilities.shape == (50, 10)
    assert answers.member_probabilities.shape == (50, 2, 10)
    assert (known["sets"].sum(1) >= 0).all()
    assert known["sets"].shape == (50, 10)
    assert isinstance(student.student, nn.Module)
    own = teacher_logits([known["network"]], torch.rand(2, 1, 8, 8))
    assert own.shape == (1, 2, 10)
