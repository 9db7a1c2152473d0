"""The contract of students: images (B, C, H, W) in [0, 1] → member logits (M, B, K)."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from ensdistill import InputError
from ensdistill.flow_matching import FlowMatching
from ensdistill.mimo import MIMO
from ensdistill.numerics import check_gradients
from ensdistill.students import STUDENTS, Student, build_student, predict
from ensdistill.weights import load_student, save_student

ARCHITECTURE = {
    "name": "resnet8", "num_classes": 5, "in_channels": 3, "width": 4,
    "mean": [0.2, 0.4, 0.6], "std": [0.1, 0.2, 0.3],
}  # fmt: skip
MEMBERS = 3
SAMPLED = ("gaussian_logits", "flow_matching")
"""Whose members are samples, and parts of which learn by their own objectives alone."""


def student_of(
    name: str, members: int = MEMBERS, seed: int = 0, architecture: str = "resnet8"
) -> Student:
    """In eval mode, with members and batch normalisations that are not those at the start."""
    torch.manual_seed(seed)
    student = build_student(name, {**ARCHITECTURE, "name": architecture}, members)
    for key, parameter in student.named_parameters():
        if key.endswith((".dr", ".ds")):
            nn.init.normal_(parameter, 0, 0.3)
    for norm in (it for it in student.modules() if isinstance(it, nn.BatchNorm2d)):
        nn.init.normal_(norm.running_mean, 0, 0.3)
        nn.init.uniform_(norm.running_var, 0.5, 2)
    return student.eval()


@pytest.fixture(params=STUDENTS)
def student(request):
    return student_of(request.param)


@pytest.fixture
def saved(student, tmp_path):
    path = tmp_path / "weights.safetensors"
    save_student(path, student, {})
    return path


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_student_says_how_it_is_built_again(student):
    name = next(name for name, kind in STUDENTS.items() if type(student) is kind)
    assert student.spec == {"name": name, "architecture": ARCHITECTURE, "members": MEMBERS}
    again = build_student(**student.spec)
    assert again.state_dict().keys() == student.state_dict().keys()
    again.load_state_dict(student.state_dict())
    x = torch.rand(2, 3, 8, 8)
    assert torch.equal(again.eval()(x), student(x))
    assert (student.predictor() is student) == (name != "latent_batch_ensemble")
    assert student.members == ({"single": 1} | dict.fromkeys(SAMPLED, 32)).get(name, MEMBERS)


def test_every_image_is_answered_alone_by_every_member(student):
    x = torch.rand(4, 3, 8, 8)
    together = student(x)
    assert together.shape == (student.members, 4, 5)
    assert together.dtype == torch.float32
    assert len(torch.unique(together)) == together.numel()
    for n in range(4):
        close(together[:, n], student(x[n : n + 1])[:, 0])


def test_members_are_asked_at_the_same_images_or_each_at_its_own(student):
    own = torch.rand(student.members, 2, 3, 8, 8)
    each = student(own)
    assert each.shape == (student.members, 2, 5)
    for j, x in enumerate(own):
        # A member of MIMO sees the images of the others beside its own.
        assert torch.allclose(each[j], student(x)[j], 1e-4, 1e-5) != isinstance(student, MIMO)
    close(student(own[0].expand_as(own)), student(own[0]))


def test_a_single_network_is_its_network(tmp_path):
    student, x = student_of("single"), torch.rand(4, 3, 8, 8)
    assert torch.equal(student(x), student.network(x)[None])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_images_that_are_not_in_0_to_1_are_refused(student, dtype):
    for shape in ((2, 3, 8, 8), (student.members, 2, 3, 8, 8)):
        with pytest.raises(TypeError, match=rf"point in \[0, 1\], not {dtype}: convert them"):
            student(torch.ones(shape, dtype=dtype))


def test_an_empty_batch_has_no_logits(student):
    assert student(torch.zeros(0, 3, 8, 8)).shape == (student.members, 0, 5)
    assert student(torch.zeros(student.members, 0, 3, 8, 8)).shape == (student.members, 0, 5)


def test_logits_under_autocast_are_float32_and_rounded(student):
    x = torch.rand(2, 3, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = student(x)
    assert rounded.dtype == torch.float32
    exact = student(x)
    assert not torch.equal(rounded, exact)
    torch.testing.assert_close(rounded, exact, rtol=0.05, atol=0.05)


def test_double_precision_is_kept(student):
    student, x = student.double(), torch.rand(2, 3, 8, 8)
    assert student(x.double()).dtype == torch.float64


def test_a_loaded_student_can_be_copied_and_learn_on(saved, student):
    x = torch.rand(4, 3, 8, 8)
    loaded = load_student(saved)
    mine = copy.deepcopy(loaded).train().requires_grad_(True)
    optimizer = torch.optim.SGD(mine.parameter_groups(0.1, 0.0))
    mine(x).square().mean().backward()
    optimizer.step()
    changed = [
        not torch.equal(a, b) for a, b in zip(mine.parameters(), loaded.parameters(), strict=True)
    ]
    assert all(changed) != (student.spec["name"] in SAMPLED)
    assert any(changed)
    close(loaded(x), student(x))


def test_a_loaded_student_can_be_traced(saved):
    loaded = load_student(saved)
    traced = torch.jit.trace(loaded, torch.rand(2, 3, 8, 8))
    for size in (2, 5):
        x = torch.rand(size, 3, 8, 8)
        close(traced(x), loaded(x))


def test_a_loaded_student_can_be_exported(saved):
    loaded, x = load_student(saved), torch.rand(5, 3, 8, 8)
    shapes = {"x": {0: torch.export.Dim.AUTO}}
    exported = torch.export.export(loaded, (torch.rand(2, 3, 8, 8),), dynamic_shapes=shapes)
    close(exported.module()(x), loaded(x))


@pytest.mark.parametrize("architecture", ["resnet8", "wrn10x2"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", STUDENTS)
def test_gradients_of_every_student_are_right(name, precision, architecture, caplog):
    student = student_of(name, architecture=architecture)
    own = torch.rand(student.members, 4, 3, 8, 8)

    def loss(model, x, y):
        logits = torch.cat([model(x), model(own[:, : len(x)])], 1)
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.repeat(2 * len(own)))

    with caplog.at_level("INFO"):
        check_gradients(student, torch.rand(4, 3, 8, 8), torch.arange(4), loss, precision)
    assert "gradients checked with 4 images" in caplog.text


@pytest.mark.parametrize("architecture", ["resnet8", "wrn10x2"])
def test_a_student_is_read_from_its_file_with_its_options(tmp_path, architecture):
    options = {
        "single": {},
        "batch_ensemble": {},
        "latent_batch_ensemble": {},
        "hydra": {"cut": "linear", "together": 0.25},
        "mimo": {},
        "packed": {"widen": 3.0, "groups": 2},
        "gaussian_logits": {"rank": 2, "samples": 5},
        "flow_matching": {"width": 7, "samples": 5},
    }
    assert options.keys() == STUDENTS.keys()
    x = torch.rand(2, 3, 8, 8)
    for name, chosen in options.items():
        student = build_student(name, {**ARCHITECTURE, "name": architecture}, MEMBERS, **chosen)
        predictor = student.predictor()
        save_student(tmp_path / name, predictor, {})
        loaded = load_student(tmp_path / name)
        assert loaded.spec == predictor.spec
        assert predictor is not student or chosen.items() <= loaded.spec.items()
        assert torch.equal(loaded(x), predictor.eval()(x))


# --- predict ---------------------------------------------------------------------------------


def test_predict_does_not_depend_on_the_batch_size_and_restores_the_mode(student, monkeypatch):
    student.train()
    images = torch.randint(0, 256, (11, 3, 8, 8), dtype=torch.uint8)
    whole = predict(student, images)
    sizes = []
    student.register_forward_hook(lambda _, given, __: sizes.append(len(given[0])))
    monkeypatch.setattr("ensdistill.students.ROWS", 4 * student.rows)
    parts = predict(student, images)
    assert sizes == [4, 4, 3]
    np.testing.assert_allclose(whole, parts, rtol=1e-4, atol=1e-5)
    assert whole.shape == (11, student.members, 5)
    assert whole.dtype == np.float32
    frozen = set(student.network.backbone.modules() if isinstance(student, FlowMatching) else ())
    assert all(module.training != (module in frozen) for module in student.modules())
    with torch.no_grad():
        expected = student.eval()(images.float() / 255).transpose(0, 1)
    np.testing.assert_allclose(whole, expected.numpy(), rtol=1e-4, atol=1e-5)
    predict(student, images)
    assert not student.training


def test_predict_takes_fewer_images_at_once_where_they_are_larger(monkeypatch):
    student, sizes = student_of("batch_ensemble", members=2), []
    student.register_forward_hook(lambda _, given, __: sizes.append(len(given[0])))
    monkeypatch.setattr("ensdistill.students.ROWS", 16)
    predict(student, torch.zeros(9, 3, 32, 32, dtype=torch.uint8))
    predict(student, torch.zeros(3, 3, 64, 64, dtype=torch.uint8))
    assert sizes == [8, 1, 2, 1]


class Full:
    """A network on a GPU with memory for so many images at once."""

    def __init__(self, student, most):
        self.most, self.sizes = most, []
        student.register_forward_pre_hook(self.look)

    def look(self, student, given):
        self.sizes.append(len(given[0]))
        if self.sizes[-1] > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB.")


def test_predict_halves_its_images_until_the_gpu_has_the_memory(monkeypatch, caplog):
    student = student_of("batch_ensemble", members=2)
    images = torch.randint(0, 256, (23, 3, 8, 8), dtype=torch.uint8)
    monkeypatch.setattr("ensdistill.students.ROWS", 20)
    expected = predict(student, images)
    full = Full(student, 3)
    with caplog.at_level("INFO"):
        np.testing.assert_allclose(predict(student, images), expected, rtol=1e-4, atol=1e-5)
    assert full.sizes == [10, 5, *[2] * 5, *[2] * 5, 2, 1]
    assert caplog.messages == [
        f"the GPU's memory is full: now {count} images at once" for count in (5, 2)
    ]


def test_predict_gives_up_where_one_image_is_too_large(monkeypatch):
    student = student_of("single", members=1)
    full = Full(student, 0)
    monkeypatch.setattr("ensdistill.students.ROWS", 3)
    with pytest.raises(InputError, match=r"^the GPU has no memory left for an image of 3×8×8$"):
        predict(student, torch.zeros(5, 3, 8, 8, dtype=torch.uint8))
    assert full.sizes == [3, 1]
