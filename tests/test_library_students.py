"""Every student of networks of timm and own files: files, heads, forms, Jacobians, costs."""

import itertools
import json
import math

import pytest
import torch
from torch.func import jacrev
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ensdistill.analysis import logit_jacobians
from ensdistill.batch_ensemble import SCALED
from ensdistill.inference import inference_forms
from ensdistill.networks import build_network
from ensdistill.operations import pixel_macs, prediction_macs
from ensdistill.packed import packed_layers
from ensdistill.students import STUDENTS, build_student
from ensdistill.weights import load_student, read_header, save_student
from tests.builders import message
from tests.test_convert import Explicit, K, shaken

KINDS = {
    "single": {},
    "batch_ensemble": {},
    "latent_batch_ensemble": {},
    "hydra": {"cut": "linear"},
    "mimo": {},
    "gaussian_logits": {"rank": 3, "samples": 6},
    "flow_matching": {"width": 7, "samples": 6},
}
NETWORKS = {
    "timm:test_resnet": {},
    "timm:vit_tiny_patch16_224": {"img_size": 32, "depth": 2, "embed_dim": 24, "num_heads": 2},
    "file:models/mine.py:build": {},
}
M, B = 3, 2


def student_of(kind, name, **options):
    torch.manual_seed(0)
    architecture = {"name": name, "num_classes": K, "in_channels": 3, "options": NETWORKS[name]}
    architecture |= {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4]}
    return shaken(build_student(kind, architecture, M, **{**KINDS[kind], **options}))


def test_all_kinds_of_students_are_here():
    assert {*KINDS, "packed"} == STUDENTS.keys()


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_student_can_be_made_of_any_network(own_networks, kind, name):
    student = student_of(kind, name)
    x = torch.rand(B, 3, 32, 32)
    student.check(x)
    student.train()
    logits = student(x)
    logits.square().sum().backward()
    gradients = [it.grad for it in student.parameters() if it.grad is not None]
    assert len(gradients) > 3
    assert all(it.isfinite().all() for it in gradients)
    predictor = student.predictor().eval()
    assert logits.shape == (student.members, B, K)
    save_student(own_networks / "weights", predictor, {})
    loaded = load_student(own_networks / "weights")
    with torch.no_grad():
        expected, found = predictor(x), loaded(x)
    assert torch.equal(found, expected)
    assert expected.std() > 1e-4
    assert json.loads(json.dumps(predictor.spec)) == read_header(own_networks / "weights")["spec"]


@pytest.mark.parametrize("name", NETWORKS)
def test_a_packed_ensemble_cannot(own_networks, name):
    architecture = {"name": name, "num_classes": K, "in_channels": 3}
    with pytest.raises(ValueError, match=f"{name!r} cannot be packed; resnet32 can"):
        build_student("packed", architecture, M, widen=2.0)
    found = message(build_network, name, K, layers=packed_layers(2))
    assert found.startswith("a packed ensemble is made of this package's own architectures")


@pytest.mark.parametrize(
    ("name", "cut"),
    [
        ("timm:test_resnet", "layer4"),
        ("timm:vit_tiny_patch16_224", "blocks.1"),
        ("file:models/mine.py:build", "late"),
    ],
)
def test_heads_begin_with_a_named_module(own_networks, name, cut):
    student = student_of("hydra", name, cut=cut).eval()
    for head in student.network.heads[1:]:
        for it in head.parameters():
            it.data += 0.1 * torch.randn_like(it)
    x = torch.rand(B, 3, 32, 32)
    logits = student(x)
    assert all((one - other).abs().max() > 1e-4 for one, other in itertools.combinations(logits, 2))
    whole = build_network(**student.spec["architecture"]).eval()
    for head, expected in zip(student.network.heads, logits, strict=True):
        state = {**student.network.body.state_dict(), **head.state_dict()}
        whole.load_state_dict(state)
        assert torch.equal(whole(x), expected)
    save_student(own_networks / "weights", student, {})
    assert torch.equal(load_student(own_networks / "weights")(x), logits)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_flow_starts_from_a_trained_network(own_networks, name):
    backbone, flow = shaken(student_of("single", name)), student_of("flow_matching", name)
    flow.start_from(backbone)
    x = torch.rand(B, 3, 32, 32)
    features = []
    backbone.eval().network.get_submodule(backbone.network.last).register_forward_hook(
        lambda _, given, __: features.append(given[0])
    )
    backbone(x)
    assert torch.equal(flow.eval().network.features(x), features[0])


# --- what is computed by them -------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_form_predicts_what_the_student_predicts(own_networks, kind, name, monkeypatch):
    student = student_of(kind, name).double().eval()
    before = {key: it.clone() for key, it in student.network.state_dict().items()}
    x = torch.rand(B, 3, 32, 32, dtype=torch.double)
    with torch.no_grad():
        expected = student.predictor().eval()(x)
        for limit in (math.inf, -math.inf):
            monkeypatch.setitem(SCALED, "cpu", limit)
            forms = inference_forms(student)
            assert len(forms) == (2 if kind == "batch_ensemble" else 1)
            for form in forms:
                torch.testing.assert_close(form(x), expected, rtol=1e-8, atol=1e-9)
    assert all(torch.equal(it, before[key]) for key, it in student.network.state_dict().items())


@pytest.mark.parametrize("name", NETWORKS)
def test_multiply_adds_are_those_that_pytorch_counts(own_networks, name):
    architecture = {"name": name, "options": NETWORKS[name]}
    network = build_network(**architecture, num_classes=10).eval()
    # It does not know what attention costs on a CPU, but does know its matrix products.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.rand(1, 3, 32, 32))
    expected = counter.get_total_flops() / 2
    assert prediction_macs(network, torch.rand(2, 3, 32, 32)) == expected
    assert pixel_macs(architecture, 32) * 32**2 == expected
    assert pixel_macs({**architecture, "pretrained": True}, 32) * 32**2 == expected
    ensemble = student_of("batch_ensemble", name).eval()
    plain = student_of("single", name).eval()
    x = torch.rand(2, 3, 32, 32)
    assert prediction_macs(ensemble, x) == M * prediction_macs(plain, x)


@pytest.mark.parametrize("name", NETWORKS)
def test_jacobians_of_members_are_those_of_explicit_networks(own_networks, name):
    student = student_of("batch_ensemble", name).double().eval().requires_grad_(False)
    plain = build_student("single", student.spec["architecture"], 1).double().eval()
    x = torch.rand(B, 3, 32, 32, dtype=torch.double)
    found = logit_jacobians(student, x)
    explicit = Explicit(plain.network, student.network)
    for j in range(M):
        expected = jacrev(lambda one, j=j: explicit.member(j, one[None])[0])
        for n in range(B):
            theirs = expected(x[n]).detach()
            torch.testing.assert_close(found[n, j].view_as(theirs), theirs, rtol=1e-8, atol=1e-10)
