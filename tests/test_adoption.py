"""Weights from elsewhere: read, brought into this package's files, and checked."""

import hashlib
import json
import logging
import os

import numpy as np
import pandas as pd
import pytest
import torch
import torchvision
from safetensors.torch import save_file
from scipy.special import log_softmax
from scipy.stats import binom
from torch import nn

from ensdistill import InputError
from ensdistill.adoption import adopt, near_chance
from ensdistill.digests import attributes
from ensdistill.images import read_images
from ensdistill.predictions import Dirichlet
from ensdistill.students import build_student, predict
from ensdistill.weights import load_student, read_header, save_student
from tests.builders import encode, hash_of, make, noise, write_tree
from tests.plain_network import Network, normalised, trained

ARCHITECTURE = {"name": "resnet8", "width": 4}
PARTS = {"student": {"name": "single"}, "members": 1, "prediction": "mixture"}
PARTS |= {"architecture": ARCHITECTURE}
ORIGIN = {"study": "mine", "method": "teacher", "replicate": 0}
DIGITS = [str(digit) for digit in range(10)]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    path = tmp_path_factory.mktemp("images") / "images.h5"
    make(path, source="digits", train=150, validation=100, test=50)
    return path


@pytest.fixture(scope="module")
def network(images):
    return trained(*read_images(images, "train"))


@pytest.fixture
def adopted(images, tmp_path):
    """A function that adopts a file and returns the student that is read again."""

    def call(source, images=images, **options):
        known = {"prefixes": {}, "classes": None, "mean": [0.5], "std": [0.5]}
        known |= {"parts": PARTS, "is_told": True, "teaches": True, "origin": ORIGIN}
        weights, history = tmp_path / "out/weights.safetensors", tmp_path / "out/history.csv"
        weights.parent.mkdir(exist_ok=True)
        weights.unlink(missing_ok=True)
        adopt(
            *(images, weights, history),
            source=str(source),
            device=torch.device("cpu"),
            **(known | options),
        )
        return load_student(weights)

    call.weights = tmp_path / "out/weights.safetensors"
    call.header = lambda: read_header(call.weights)
    call.history = tmp_path / "out/history.csv"
    return call


def logits_of(network, images, split="val", **normal):
    with torch.no_grad():
        return network(normalised(read_images(images, split)[0], **normal)).numpy()


def logits_here(student, images, split="val"):
    return predict(student, torch.from_numpy(read_images(images, split)[0]))[:, 0]


def stored(path, state):
    torch.save(state, path)
    return path


def module(network, before="module."):
    return {f"{before}{key}": tensor for key, tensor in network.state_dict().items()}


def fails(adopted, source, **options):
    """The one sentence with which a file is refused; it stays where it is."""
    with pytest.raises(InputError) as caught:
        adopted(source, **options)
    assert type(caught.value) is InputError  # a DamagedFile would be taken away by the job
    assert not adopted.weights.exists()
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"{source}: ")
    return message.removeprefix(f"{source}: ")


# --- what files can be -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 7},
        lambda state: {"model": state, "optimizer": {"state": {}}},
        lambda state: {"model_state_dict": state},
        lambda state: {**state, "epoch": 7},
    ],
)
@pytest.mark.parametrize("before", ["", "module.", "_orig_mod.", "module._orig_mod.", "a.b."])
def test_a_state_dict_of_plain_pytorch_answers_as_it_did(
    images, network, adopted, tmp_path, wrap, before
):
    student = adopted(stored(tmp_path / "a.pt", wrap(module(network, before))))
    expected = logits_of(network, images)
    np.testing.assert_allclose(logits_here(student, images), expected, rtol=1e-4, atol=1e-4)
    assert np.abs(expected).max() > 1


def test_safetensors_and_other_types_of_numbers_are_read_too(images, network, adopted, tmp_path):
    path = tmp_path / "a.bin"  # whatever its name
    save_file(module(network), path)
    np.testing.assert_allclose(
        logits_here(adopted(path), images), logits_of(network, images), rtol=1e-4, atol=1e-4
    )
    halves = {
        key: it.half() if it.is_floating_point() else it for key, it in module(network).items()
    }
    student = adopted(stored(tmp_path / "half.pt", halves))
    np.testing.assert_allclose(
        logits_here(student, images), logits_of(network, images), rtol=0.02, atol=0.02
    )
    assert {it.dtype for it in student.parameters()} == {torch.float32}


def test_what_torch_compile_wraps_inside_is_found(images, network, adopted, tmp_path):
    state = {
        key.replace("blocks.", "blocks._orig_mod."): it for key, it in network.state_dict().items()
    }
    student = adopted(stored(tmp_path / "a.pt", state))
    np.testing.assert_allclose(
        logits_here(student, images), logits_of(network, images), rtol=1e-4, atol=1e-4
    )


def test_the_pixels_are_normalised_as_the_network_expects(images, adopted, tmp_path):
    network = trained(*read_images(images, "train"), mean=0.0, std=1 / 255)  # pixels to 255
    path = stored(tmp_path / "a.pt", network.state_dict())
    student = adopted(path, mean=[0.0], std=[1 / 255])
    expected = logits_of(network, images, mean=0.0, std=1 / 255)
    np.testing.assert_allclose(logits_here(student, images), expected, rtol=1e-3, atol=1e-3)
    assert np.abs(logits_here(adopted(path), images) - expected).max() > 1
    # Else it is the study's, which the file may bring itself.
    known = adopted(path, mean=None, std=None).spec["architecture"]
    pixels = read_images(images, "train")[0] / 255
    np.testing.assert_allclose([known["mean"], known["std"]], [[pixels.mean()], [pixels.std()]])
    own = {"normalize.mean": torch.full((1, 1, 1), 0.25), "normalize.std": torch.ones(1, 1, 1)}
    path = stored(tmp_path / "b.pt", {**network.state_dict(), **own})
    student = adopted(path, mean=None, std=None)
    expected = logits_of(network, images, mean=0.25, std=1.0)
    np.testing.assert_allclose(logits_here(student, images), expected, rtol=1e-4, atol=1e-4)
    student = adopted(path, mean=[0.0], std=[1 / 255])  # what is told counts
    expected = logits_of(network, images, mean=0.0, std=1 / 255)
    np.testing.assert_allclose(logits_here(student, images), expected, rtol=1e-3, atol=1e-3)


def test_prefixes_are_mapped_and_the_longest_counts(images, network, adopted, tmp_path):
    state = {
        ("body." if key.startswith(("stem", "blocks")) else "last.") + key: it
        for key, it in network.state_dict().items()
    } | {"teacher.weight": torch.ones(3), "last.teacher": torch.ones(3)}
    prefixes = {"body.": "", "last.head": "head", "last.": None, "teacher.": None}
    student = adopted(stored(tmp_path / "a.pt", state), prefixes=prefixes)
    np.testing.assert_allclose(
        logits_here(student, images), logits_of(network, images), rtol=1e-4, atol=1e-4
    )
    assert adopted.header()["adopted"]["prefixes"] == prefixes


# --- the order of the classes ----------------------------------------------------------------


def test_outputs_are_brought_into_the_order_of_the_study(images, adopted, tmp_path):
    pixels, labels = read_images(images, "train")
    names = ["other", *reversed(DIGITS), "none"]  # more than the study has
    places = np.array([names.index(digit) for digit in DIGITS])
    network = trained(pixels, places[labels], classes=12)
    expected = logits_of(network, images)[:, places]
    path = stored(tmp_path / "a.pt", network.state_dict())
    files = {
        "by option": (path, {"classes": names}),
        "of the file": (
            stored(tmp_path / "b.pt", {"state_dict": network.state_dict(), "classes": names}),
            {},
        ),
        "of ImageFolder": (
            stored(
                tmp_path / "c.pt",
                {
                    "model": network.state_dict(),
                    "class_to_idx": {name: names.index(name) for name in sorted(names)},
                },
            ),
            {},
        ),
    }
    save_file(network.state_dict(), tmp_path / "d.st", metadata={"classes": json.dumps(names)})
    files["of safetensors"] = (tmp_path / "d.st", {})
    for source, options in files.values():
        student = adopted(source, **options)
        found = logits_here(student, images)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
        accuracy = 100 * np.mean(found.argmax(1) == read_images(images, "val")[1])
        assert accuracy > 60
        assert adopted.header()["adopted"]["outputs"] == places.tolist()
    error = fails(adopted, path, classes=[*names[:-1], "3 too"][1:])
    assert error.endswith("it has 12 outputs, and 11 classes are named")
    error = fails(adopted, path)
    assert "it has 12 outputs, and the study 10 classes: name those of its outputs" in error
    error = fails(adopted, path, classes=["zero", "one", "two"])
    assert "none of its 3 classes (zero, one, two, …) is the study's class '0'" in error


# --- what does not fit -----------------------------------------------------------------------


def test_keys_that_do_not_fit_are_named_with_the_likely_prefix(network, adopted, tmp_path):
    state = {f"net.{key}": it for key, it in network.state_dict().items()} | {
        "loss.a": torch.ones(1)
    }
    error = fails(adopted, stored(tmp_path / "a.pt", state))
    begin = "'{0}stem.weight', '{0}stem_norm.weight', '{0}stem_norm.bias' and {1} more"
    count = len(network.state_dict())
    missing = count - sum("num_batches" in key for key in network.state_dict())
    assert error == (
        f"its weights fit no resnet8: missing: {begin.format('', missing - 3)}; unexpected: "
        f"{begin.format('net.', missing + 1 - 3)}; "
        f'prefixes: {{"net.": ""}} would find {count} of its keys'
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda state: state.pop("head.bias"), "missing: 'head.bias'"),
        (lambda state: state.update(more=torch.ones(2)), "unexpected: 'more'"),
        (
            lambda state: state.update({"stem.weight": torch.ones(4, 3, 3, 3)}),
            "'stem.weight' is of another shape, (4, 3, 3, 3) and not (4, 1, 3, 3)",
        ),
        (
            lambda state: state["head.weight"].__setitem__((0, 0), float("nan")),
            "'head.weight' is not finite",
        ),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(network, adopted, tmp_path, change, said):
    state = {key: it.clone() for key, it in network.state_dict().items()}
    change(state)
    error = fails(adopted, stored(tmp_path / "a.pt", state))
    assert error == f"its weights fit no resnet8: {said}"


def test_wrong_options_are_told(network, adopted, tmp_path):
    path = stored(tmp_path / "a.pt", network.state_dict())
    assert fails(adopted, path, mean=[0.5, 0.5], std=[1.0, 1.0]) == (
        "'mean' has 2 numbers, and images have 1 channel"
    )
    error = fails(adopted, path, prefixes={"model.": ""})
    assert "'prefixes' has 'model.', but no key begins so; keys are 'stem.weight', " in error
    error = fails(adopted, path, prefixes={"stem.": "head."})
    assert "'prefixes' makes two keys 'head.weight'" in error


def test_files_that_hold_no_state_dict_are_told(network, adopted, tmp_path):
    assert "neither at its top ('epoch') nor under" in fails(
        adopted, stored(tmp_path / "a.pt", {"epoch": 3})
    )
    assert "no state dict" in fails(adopted, stored(tmp_path / "b.pt", [1, 2]))
    for name, content in (("c.pt", b"no weights at all"), ("d.pt", b"\x08" + bytes(7) + b"{x")):
        (tmp_path / name).write_bytes(content)
        assert "damaged, or not a state dict" in fails(adopted, tmp_path / name)
    assert "no such file" in fails(adopted, tmp_path / "nosuch.pt")


class Bomb:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (self.mark,)


def test_nothing_in_a_file_is_run(network, adopted, tmp_path):
    mark = tmp_path / "run"
    path = stored(tmp_path / "a.pt", {"state_dict": network.state_dict(), "x": Bomb(str(mark))})
    assert "holds a Python object, posix.mkdir, which is not loaded" in fails(adopted, path)
    assert not mark.exists()
    path = stored(tmp_path / "b.pt", network)
    assert "holds a Python object, tests.plain_network.Network, which is not" in fails(
        adopted, path
    )


# --- files of this package -------------------------------------------------------------------


def own_file(path, name="single", width=4, **header):
    architecture = {**ARCHITECTURE, "width": width, "num_classes": 10, "in_channels": 1}
    architecture |= {"mean": [0.4], "std": [0.3]}
    torch.manual_seed(3)
    student = build_student(name, architecture, 2 if name == "batch_ensemble" else 1).eval()
    made = attributes(
        study="theirs", method="x", objective={"name": "labels"}, prediction="mixture"
    )
    save_student(path, student, {**made, **header})
    return student


def test_a_file_of_this_package_says_itself_what_it_is(images, adopted, tmp_path):
    path = tmp_path / "a.safetensors"
    known = own_file(path)
    student = adopted(path, mean=None, std=None)
    np.testing.assert_array_equal(logits_here(student, images), logits_here(known, images))
    header = adopted.header()
    assert (header["study"], header["objective"]) == ("mine", {"name": "labels"})
    own_file(path, width=5)
    assert "its architecture is another: write {name: resnet8, width: 5}" in fails(adopted, path)
    for options in ({"name": "batch_ensemble"}, {"prediction": "dirichlet"}):
        own_file(path, **options)
        assert "a teacher must be one network with the logits of a softmax" in fails(adopted, path)


def test_what_is_judged_may_be_any_student_and_keeps_its_meaning(images, adopted, tmp_path):
    path, how = tmp_path / "a.safetensors", {"is_told": False, "teaches": False}
    known = own_file(path, "batch_ensemble", width=5)
    student = adopted(path, **how, mean=None, std=None)
    pixels = torch.from_numpy(read_images(images, "val")[0])
    np.testing.assert_array_equal(predict(student, pixels), predict(known, pixels))
    # Its factors and biases have the classes elsewhere than in their first dimension.
    names = DIGITS[::-1]
    student = adopted(path, **how, mean=None, std=None, classes=names)
    np.testing.assert_allclose(
        predict(student, pixels), predict(known, pixels)[:, :, ::-1], rtol=1e-4, atol=1e-5
    )
    known = own_file(path, prediction="dirichlet", concentration_offset=1.0)
    adopted(path, **how, mean=None, std=None)
    header = adopted.header()
    assert (header["prediction"], header["concentration_offset"]) == ("dirichlet", 1.0)
    labels = read_images(images, "val")[1]
    probs = Dirichlet(predict(known, pixels), 1.0).probs()
    nll = -np.log(probs[np.arange(len(labels)), labels]).mean()
    assert header["validation"]["nll"] == pytest.approx(nll, rel=1e-5)


# --- what is said of it ----------------------------------------------------------------------


def test_the_header_says_where_it_comes_from(images, network, adopted, tmp_path):
    path = stored(tmp_path / "a.pt", module(network))
    adopted(path)
    header, logits = adopted.header(), logits_of(network, images)
    labels = read_images(images, "val")[1]
    assert header["adopted"] == {
        "path": str(path),
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "prefixes": {"module.": ""},
        "outputs": None,
    }
    accuracy = 100 * np.mean(logits.argmax(1) == labels)
    nll = -log_softmax(logits, axis=1)[np.arange(len(labels)), labels].mean()
    assert header["validation"]["accuracy"] == pytest.approx(accuracy)
    assert header["validation"]["nll"] == pytest.approx(nll, rel=1e-4)
    assert {key: header[key] for key in ORIGIN} == ORIGIN
    history = pd.read_csv(adopted.history)
    assert len(history) == 0
    assert {"epoch", "loss", "val_nll"} <= {*history.columns}


def test_an_accuracy_near_chance_is_a_warning_with_the_usual_causes(
    images, network, adopted, tmp_path, caplog
):
    caplog.set_level(logging.INFO, "ensdistill")
    adopted(stored(tmp_path / "a.pt", network.state_dict()))
    assert "accuracy" in caplog.text
    assert "near chance" not in caplog.text
    torch.manual_seed(0)
    adopted(stored(tmp_path / "b.pt", nn.Sequential(Network()).eval()[0].state_dict()))
    assert "is near chance (" in caplog.text
    for cause in ("normalisation", "order of the classes", "0 to 255", "BGR", "image size"):
        assert cause in caplog.text


def test_near_chance_is_within_three_standard_errors_of_the_most_frequent_class():
    labels = np.repeat([0, 1, 2], [50, 30, 20])
    limit, chance = near_chance(labels)
    assert chance == 50
    assert limit == pytest.approx(50 + 3 * binom(100, 0.5).std())


# --- networks of libraries -------------------------------------------------------------------


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Two classes of 32×32 pixels in colour."""
    folder = tmp_path_factory.mktemp("pictures")
    files = {
        f"{split}/{name}/{i}.png": encode(noise(32, 32, 3, seed=hash_of(split, name, i)))
        for split, count in (("train", 12), ("test", 4))
        for name in ("cat", "dog", "emu")
        for i in range(count)
    }
    make(folder / "images.h5", path=write_tree(folder / "tree", files), size=32, validation=9)
    return folder / "images.h5"


def test_a_header_says_how_images_are_brought_to_size(pictures, images, network, adopted, tmp_path):
    model = "torchvision:shufflenet_v2_x0_5"
    other = torchvision.models.get_model(model.partition(":")[2], num_classes=3)
    parts = {**PARTS, "architecture": {"name": model}}
    normal = {"mean": [0.5] * 3, "std": [0.5] * 3}
    adopted(stored(tmp_path / "a.pt", other.state_dict()), pictures, parts=parts, **normal)
    expected = {"resize": 32, "crop": 32, "interpolation": "bicubic"}
    assert adopted.header()["evaluation"] == expected
    adopted(stored(tmp_path / "b.pt", network.state_dict()))
    assert "evaluation" not in adopted.header()


def of_timm(model, **options):
    timm = pytest.importorskip("timm")
    return timm.create_model(model, **options)


@pytest.mark.parametrize(
    ("name", "build", "options"),
    [
        ("timm:test_resnet", of_timm, {}),
        ("timm:test_vit", of_timm, {"img_size": 32}),
        ("torchvision:shufflenet_v2_x0_5", torchvision.models.get_model, {}),
    ],
)
def test_a_network_of_a_library_is_adopted_with_its_classes_in_order(
    pictures, adopted, tmp_path, name, build, options
):
    torch.manual_seed(0)
    network = build(name.partition(":")[2], num_classes=4, **options).eval()
    path = stored(tmp_path / "a.pt", module(network))
    parts = {**PARTS, "architecture": {"name": name, **({"options": options} if options else {})}}
    mean, std = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]
    classes = ["emu", "fox", "dog", "cat"]
    how = {"images": pictures, "parts": parts, "mean": mean, "std": std, "classes": classes}
    student = adopted(path, **how)
    x = torch.from_numpy(read_images(pictures, "val")[0]) / 255
    with torch.no_grad():
        x = (x - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
        expected = network(x).numpy()[:, [3, 2, 0]]
    np.testing.assert_allclose(logits_here(student, pictures), expected, rtol=1e-4, atol=1e-4)
    assert adopted.header()["adopted"]["prefixes"] == {"module.": "body."}
