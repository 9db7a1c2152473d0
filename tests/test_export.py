"""Exported files: every student's answers by formulas in float64, fewer bits, metadata, damage."""

import copy
import json
import subprocess
import sys

import numpy as np
import onnx
import pytest
import torch
from scipy.special import digamma, logsumexp
from torch import nn

from ensdistill import cli, deployment, flow_matching, parity
from ensdistill.answering import OUTPUTS, Answering
from ensdistill.convert import to_batch_ensemble
from ensdistill.deployment import Deployment, deployment_of, open_student
from ensdistill.export import write_exported
from ensdistill.exported import OnnxStudent, TorchExported
from ensdistill.hdf5 import write_hdf5
from ensdistill.inference import MemberByMember
from ensdistill.parity import export_student
from ensdistill.predictions import Dirichlet, Mixture
from ensdistill.students import STUDENTS, build_student
from ensdistill.weights import save_student
from tests import small_networks
from tests.builders import message, noise
from tests.project import REPOSITORY
from tests.test_convert import shaken

K, M, SIZE = 3, 2, (8, 8)
ARCHITECTURE = {
    "name": "resnet8", "num_classes": K, "in_channels": 1, "width": 4, "mean": [0.4], "std": [0.3]
}  # fmt: skip
OPTIONS = {
    "gaussian_logits": {"rank": 2, "samples": 3},
    "flow_matching": {"width": 6, "samples": 3},
}
OF_PYTORCH = {"latent_batch_ensemble": False, "mimo": True}
"""Students whose files of PyTorch are looked at, and whether those take bytes; ONNX of others."""
DIRICHLET = {"prediction": "dirichlet", "concentration_offset": 1.0}
CLASSES = ["Łódź", "二", "c"]
IMAGES = noise(7, 1, *SIZE)


def student_of(kind, **architecture):
    torch.manual_seed(0)
    options = OPTIONS.get(kind, {})
    student = build_student(kind, {**ARCHITECTURE, **architecture}, M, **options)
    return shaken(student).predictor().eval().requires_grad_(False)


def known_of(student, prediction=None):
    prediction = prediction or {"prediction": "mixture"}
    return Deployment(
        CLASSES, 1, SIZE, 9, 8, student.members, prediction, 1.7, [0.1], {"study": "s"}
    )


def exported(folder, name, student, prediction=None, precision="float32", uint8=False):
    path = folder / name
    to = "onnx" if path.suffix == ".onnx" else "torch"
    known = known_of(student, prediction)
    write_exported(path, student, known, to, precision, uint8, noise(20, 1, *SIZE, seed=1))
    return path


@pytest.fixture(scope="module")
def ensemble(tmp_path_factory):
    """A BatchEnsemble and its ONNX file."""
    student = student_of("batch_ensemble", width=16)
    return student, exported(tmp_path_factory.mktemp("ensemble"), "student.onnx", student)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Weights of a packed ensemble in a study's folder."""
    folder = tmp_path_factory.mktemp("study")
    labels = {"val": np.arange(40) % K, "test": np.arange(30) % K, "train": np.arange(4) % K}
    splits = {f"{split}/labels": of_split for split, of_split in labels.items()}
    splits |= {f"{it}/images": noise(len(labels[it]), 1, *SIZE, seed=7) for it in labels}
    write_hdf5(folder / "images.h5", splits, {"classes": CLASSES, "mean": [0.4], "std": [0.3]})
    path = folder / "students/kd/0/weights.safetensors"
    path.parent.mkdir(parents=True)
    save_student(path, student_of("packed"), {"digest": "d"})
    logits = np.random.default_rng(0).normal(size=(40, M, K))
    stored = {"val/logits": logits, "val/labels": labels["val"]}
    write_hdf5(folder / "logits/students/kd/0.h5", stored, {"weights": "d"})
    return path


# --- formulas in float64 ------------------------------------------------------------------------


def softmax(logits):
    return np.exp(logits - logsumexp(logits, -1, keepdims=True))


def entropy(probs):
    return -np.sum(probs * np.log(np.maximum(probs, 1e-12)), -1)


def expected(logits, prediction=None, temperature=1.7):
    """Answers for logits (M, B, K) in float64."""
    z = logits.numpy().transpose(1, 0, 2)
    if prediction is None:
        members, scaled = softmax(z), softmax(z / temperature)
        information = entropy(scaled.mean(1)) - entropy(scaled).mean(1)
    else:
        alpha = np.exp(z) + prediction["concentration_offset"]
        total = alpha.sum(-1, keepdims=True)
        members = alpha / total
        scaled = softmax(np.log(members) / temperature)
        inner = np.sum(members * (digamma(alpha + 1) - digamma(total + 1)), -1)
        information = entropy(members.mean(1)) + inner.mean(1)
    probabilities = softmax(np.log(members.mean(1)) / temperature)
    return probabilities, scaled, entropy(probabilities), information


def logits_of(student, images):
    student = copy.deepcopy(student).double()
    with torch.no_grad():
        return student(torch.from_numpy(images).double() / 255)


def check(answers, right, one=False):
    assert np.ptp(right[0]) > 0.01  # not all the same
    for name, ours, theirs in zip(OUTPUTS, answers, right, strict=True):
        if name == "mutual_information" and one:
            assert ours is None
        else:
            assert ours.shape == theirs.shape
            np.testing.assert_allclose(ours, theirs, atol=1e-5, rtol=0, err_msg=name)


# --- every student ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [it for it in STUDENTS if it not in OF_PYTORCH])
def test_an_onnx_file_says_what_formulas_say_in_float64(tmp_path, kind, request, monkeypatch):
    monkeypatch.setattr(flow_matching, "STEPS", 2)  # thirteen calls take long to export
    if kind == "batch_ensemble":
        student, path = request.getfixturevalue("ensemble")
    else:
        student = student_of(kind)
        path = exported(tmp_path, "student.onnx", student)
    predictor = open_student(path)
    right = expected(logits_of(student, IMAGES))
    check(predictor(IMAGES), right, one=kind == "single")
    for number in range(2):
        one = slice(number, number + 1)
        np.testing.assert_allclose(
            predictor(IMAGES[one]).member_probabilities, right[1][one], atol=1e-5
        )
    outputs = predictor.session.run(None, {"images": IMAGES.astype(np.float32) / np.float32(255)})
    assert [it.dtype for it in outputs] == [np.float32] * 4
    np.testing.assert_allclose(outputs[3], right[3], atol=1e-5)  # 0 of one network


def test_dirichlet_networks_and_bytes(tmp_path):
    student = student_of("single")
    path = exported(tmp_path, "student.onnx", student, DIRICHLET, uint8=True)
    predictor = OnnxStudent(path)
    assert predictor.session.get_inputs()[0].type == "tensor(uint8)"
    check(predictor(IMAGES), expected(logits_of(student, IMAGES), DIRICHLET))


@pytest.mark.parametrize(("kind", "uint8"), OF_PYTORCH.items())
def test_a_file_of_pytorch_says_the_same(tmp_path, kind, uint8):
    student = student_of(kind)
    path = exported(tmp_path, "student.pt2", student, uint8=uint8)
    predictor = open_student(path)
    assert isinstance(predictor, TorchExported)
    right = expected(logits_of(student, IMAGES))
    check(predictor(IMAGES), right, one=kind == "latent_batch_ensemble")
    np.testing.assert_allclose(predictor(IMAGES[:1]).probabilities, right[0][:1], atol=1e-5)
    assert predictor.deployment.classes == CLASSES
    assert str(REPOSITORY).encode() not in path.read_bytes()


@pytest.mark.parametrize("build", [small_networks.resnet_v2, small_networks.vit])
def test_members_of_any_network_one_after_the_other(build):
    torch.manual_seed(0)
    network = shaken(to_batch_ensemble(build(K), M)).eval()
    x = torch.rand(4, 3, 32, 32)
    with torch.no_grad():
        right = network(x.repeat(M, 1, 1, 1)).unflatten(0, (M, 4))
        found = MemberByMember(network, M)(x)
    torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-5)


# --- formulas at their ends ---------------------------------------------------------------------


class Given(nn.Module):
    """Answers given logits (M, B, K), whatever the images."""

    def __init__(self, logits):
        super().__init__()
        self.logits = torch.as_tensor(logits, dtype=torch.float32)

    def forward(self, x):
        return self.logits


def graph_says(logits, prediction, temperature):
    found = Answering(Given(logits), prediction, temperature, False)(torch.zeros(1))
    return [it.double().numpy() for it in found]


@pytest.mark.parametrize("temperature", [0.05, 1.0, 20.0])
@pytest.mark.parametrize("kind", [Mixture, Dirichlet])
def test_extreme_logits(kind, temperature):
    steps = [0.0, 1.0, -30.0, 90.0, -120.0, 1e4, -1e4]
    rows = [[a, b, 0.0] for a in steps for b in steps]
    logits = np.array([rows, rows[::-1]] if kind is Mixture else [rows])
    prediction = {"prediction": "mixture" if kind is Mixture else "dirichlet"}
    right = deployment.answers(kind(logits.transpose(1, 0, 2)), temperature)
    for name, ours, theirs in zip(
        OUTPUTS, graph_says(logits, prediction, temperature), right, strict=True
    ):
        np.testing.assert_allclose(ours, theirs, atol=2e-6, rtol=2e-6, err_msg=name)


def test_mutual_information_of_dirichlets():
    rng = np.random.default_rng(0)
    logits = rng.uniform(-20, 20, (1, 500, 5))
    for offset in (0.0, 1.0):
        prediction = {"prediction": "dirichlet", "concentration_offset": offset}
        found = graph_says(logits, prediction, 3.0)[3]
        alpha = np.exp(logits[0]) + offset
        total = alpha.sum(1, keepdims=True)
        p = alpha / total
        right = entropy(p) + np.sum(p * (digamma(alpha + 1) - digamma(total + 1)), 1)
        np.testing.assert_allclose(found, right, atol=3e-6)
        stored = Dirichlet(logits.transpose(1, 0, 2), offset).mutual_information()
        np.testing.assert_allclose(found, stored, atol=3e-6)


# --- fewer bits ---------------------------------------------------------------------------------


def bytes_of_weights(path):
    return sum(len(it.raw_data) for it in onnx.load(path).graph.initializer)


def test_members_share_weights_in_the_file(ensemble):
    student, path = ensemble
    own = sum(it.numel() * it.element_size() for it in student.parameters())
    assert bytes_of_weights(path) < 1.05 * own


def test_half_is_about_the_same_in_half_of_the_bytes(tmp_path, ensemble):
    student, path = ensemble
    half = exported(tmp_path, "half.onnx", student, precision="float16")
    assert bytes_of_weights(half) < 0.55 * bytes_of_weights(path)
    ours, right = (open_student(it)(IMAGES).probabilities for it in (half, path))
    assert 0 < np.abs(ours - right).max() < 0.01


def test_half_of_pytorch(tmp_path):
    student = student_of("gaussian_logits")
    predictor = open_student(exported(tmp_path, "half.pt2", student, precision="float16"))
    right = expected(logits_of(student, IMAGES))[0]
    assert 0 < np.abs(predictor(IMAGES).probabilities - right).max() < 0.01


def test_int8_by_the_command(tmp_path, study, capsys, monkeypatch):
    output = tmp_path / "int8.onnx"
    command = ["ensdistill", "export", str(study), "--to", "onnx", "-o", str(output)]
    monkeypatch.setattr(sys, "argv", [*command, "--int8", "--json"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    report = json.loads(capsys.readouterr().out)
    model = onnx.load(output)
    kinds = [it.op_type for it in model.graph.node]
    assert kinds.count("Conv") > 6
    assert kinds.count("QuantizeLinear") >= kinds.count("Conv")
    predictor, labels = open_student(output), np.arange(30) % K
    assert predictor.deployment.temperature == deployment_of(study).temperature != 1
    probs = predictor(noise(30, 1, *SIZE, seed=7)).probabilities
    assert report["nll"] == pytest.approx(-np.log(probs[np.arange(30), labels]).mean())
    assert report["accuracy"] == pytest.approx(100 * np.mean(probs.argmax(1) == labels))
    assert abs(report["nll"] - report["nll_torch"]) < 0.1
    assert 0 < report["largest_difference"] < 0.2
    assert (report["images"], report["images_of"], report["bytes"]) == (
        30, "test", output.stat().st_size,
    )  # fmt: skip


# --- what a file says of itself -----------------------------------------------------------------


def test_a_file_says_how_it_is_used(ensemble):
    student, path = ensemble
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    kept = {it.key: it.value for it in model.metadata_props}
    known = Deployment.from_json(kept["ensdistill"])
    assert known.origin.pop("precision") == "float32"
    assert known.origin.pop("exported_by").startswith("ensdistill ")
    assert known == known_of(student)
    assert known.classes == CLASSES
    assert known.temperature == 1.7
    for name in ("images", *OUTPUTS, "(B, 1, 8, 8)", "temperature"):
        assert name in model.doc_string
    assert str(REPOSITORY).encode() not in path.read_bytes()
    assert [it.name for it in model.graph.output] == list(OUTPUTS)
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param


def test_samples_are_members(tmp_path):
    path = tmp_path / "weights.safetensors"
    save_student(path, student_of("gaussian_logits"), {"digest": "d"})
    assert deployment_of(path).members == 3


def test_asking_an_onnx_file_needs_little(ensemble):
    _, path = ensemble
    code = f"""
import sys, numpy
from ensdistill.deployment import open_student
student = open_student({str(path)!r})
print(student(numpy.zeros((2, 1, 8, 8), numpy.uint8)).probabilities.shape)
print(sorted({{it.partition(".")[0] for it in sys.modules}}))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPOSITORY
    )
    shape, loaded = done.stdout.splitlines()
    assert shape == str((2, K))
    heavy = {"torch", "pandas", "sklearn", "matplotlib", "onnx", "snakemake", "torchvision"}
    assert not heavy & {*json.loads(loaded.replace("'", '"'))}


# --- what is refused ----------------------------------------------------------------------------


def test_damaged_and_foreign_files(tmp_path, ensemble):
    for ending in ("onnx", "pt2"):
        path = tmp_path / f"student.{ending}"
        assert message(open_student, path) == f"{path}: no such file"
        path.write_bytes(ensemble[1].read_bytes()[:5000])
        assert message(open_student, path).startswith(f"{path}: is damaged, or no exported student")
    info = onnx.helper.make_tensor_value_info("images", onnx.TensorProto.FLOAT, [1])
    out = onnx.helper.make_tensor_value_info("out", onnx.TensorProto.FLOAT, [1])
    node = onnx.helper.make_node("Relu", ["images"], ["out"])
    graph = onnx.helper.make_graph([node], "other", [info], [out])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)])
    model.ir_version = 10
    for metadata in ({}, {"ensdistill": "[1]"}, {"ensdistill": '{"size": null, "odd": 1}'}):
        onnx.helper.set_model_props(model, metadata)
        onnx.save(model, tmp_path / "student.onnx")
        said = message(open_student, tmp_path / "student.onnx")
        assert said.endswith("student.onnx: says nothing of a student of this package")


def test_what_cannot_be_made_leaves_nothing(tmp_path, study, monkeypatch):
    alone = tmp_path / "weights.safetensors"
    alone.write_bytes(study.read_bytes())
    folder = tmp_path / "made"
    folder.mkdir()
    for said, arguments in {
        "makes a file whose name ends in .onnx": (study, folder / "student.pt2", "onnx"),
        "--int8 is for --to onnx alone": (study, folder / "student.pt2", "torch", "int8"),
        "lie in no study's folder": (alone, folder / "student.onnx", "onnx", "int8"),
        "no such file": (tmp_path / "none.safetensors", folder / "student.onnx", "onnx"),
    }.items():
        assert said in message(export_student, *arguments)
    monkeypatch.setattr(parity, "MOST_DIFFERENCE", 0.0)
    said = message(export_student, study, folder / "student.pt2", "torch")
    assert "differs from PyTorch by" in said
    assert not [*folder.iterdir()]
