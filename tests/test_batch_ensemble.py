"""BatchEnsemble layers and networks against M explicit networks W∘(s_j r_jᵀ), in float64."""

import copy
import inspect

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ensdistill.batch_ensemble import (
    SCALED,
    BatchEnsembleConv2d,
    BatchEnsembleLinear,
    scales_activations,
)
from ensdistill.layers import WithoutRandomNumbers
from ensdistill.networks import build_network
from ensdistill.students import build_student

M, B = 3, 2


def explicit_weight(weight, r_j, s_j):
    """W ∘ (s r ᵀ), element by element."""
    entries = [
        [weight[o, i] * s_j[o] * r_j[i] for i in range(weight.shape[1])]
        for o in range(weight.shape[0])
    ]
    return torch.stack([torch.stack(row) for row in entries])


def explicit_forward(layer, x, rounded=lambda tensor: tensor):
    """The layer as M separate convolutions or linear maps, row by row."""
    rows = []
    for n in range(len(x)):
        j = n // (len(x) // layer.ensemble_size)
        weight = rounded(explicit_weight(layer.weight, layer.r[j], layer.s[j]))
        bias = None if layer.bias is None else rounded(layer.bias[j])
        row = rounded(x[n : n + 1])
        if isinstance(layer, BatchEnsembleConv2d):
            rows.append(F.conv2d(row, weight, bias, layer.stride, layer.padding))
        else:
            rows.append(F.linear(row, weight, bias))
    return torch.cat(rows)


def gradients(output, parameters, seed=0):
    # Numbers that every precision holds exactly.
    direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(seed)).bfloat16()
    return torch.autograd.grad((output * direction).sum(), parameters)


LAYERS = [
    (lambda: BatchEnsembleConv2d(4, 5, 3, ensemble_size=M, padding=1), (4, 6, 6)),
    (lambda: BatchEnsembleConv2d(4, 5, 3, ensemble_size=M, stride=2, bias=False), (4, 7, 7)),
    (lambda: BatchEnsembleConv2d(4, 5, 1, ensemble_size=M, stride=2), (4, 6, 6)),
    (lambda: BatchEnsembleLinear(4, 5, ensemble_size=M), (4,)),
    (lambda: BatchEnsembleLinear(4, 5, ensemble_size=M, bias=False), (4,)),
    (lambda: BatchEnsembleLinear(4, 5, ensemble_size=1), (4,)),
]


@pytest.mark.parametrize(("make", "shape"), LAYERS)
def test_layer_equals_explicit_members_forward_and_backward(make, shape, form):
    torch.manual_seed(0)
    layer = make().double()
    if layer.bias is not None:
        nn.init.normal_(layer.bias)
    x = torch.randn(layer.ensemble_size * B, *shape, dtype=torch.float64, requires_grad=True)
    wanted = [x, *layer.parameters()]
    ours, reference = layer(x), explicit_forward(layer, x)
    torch.testing.assert_close(ours, reference, rtol=1e-10, atol=1e-10)
    for mine, theirs in zip(gradients(ours, wanted), gradients(reference, wanted), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("make", "shape"), LAYERS)
def test_layer_under_autocast_differs_by_rounding_only(make, shape, form):
    torch.manual_seed(0)
    layer = make()
    if layer.bias is not None:
        nn.init.normal_(layer.bias)
    x = torch.randn(layer.ensemble_size * B, *shape)
    wanted = list(layer.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        ours = layer(x)
    assert ours.dtype == torch.bfloat16
    reference = explicit_forward(layer, x, lambda tensor: tensor.bfloat16().double())
    torch.testing.assert_close(ours.double(), reference, rtol=1e-2, atol=1e-2)
    pairs = zip(gradients(ours, wanted), gradients(reference, wanted), strict=True)
    for mine, theirs in pairs:
        assert mine.dtype == torch.float32
        assert (mine - theirs).norm() < 0.01 * theirs.norm()


@pytest.mark.parametrize("name", ["resnet8", "wrn10x2"])
@pytest.mark.parametrize("training", [True, False])
def test_network_equals_explicit_members_forward_and_backward(name, training, form, monkeypatch):
    torch.manual_seed(0)
    network = build_network(name, 5, in_channels=3, ensemble_size=M, width=4).double()
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.running_mean, -1, 1)
            nn.init.uniform_(layer.running_var, 0.5, 2)
    network.train(training)
    twin = copy.deepcopy(network)
    x = torch.rand(M * B, 3, 8, 8, dtype=torch.float64)
    ours = network(x)
    ours_gradients = gradients(ours, list(network.parameters()))
    for layer in (BatchEnsembleConv2d, BatchEnsembleLinear):
        monkeypatch.setattr(layer, "forward", explicit_forward)
    reference = twin(x)
    torch.testing.assert_close(ours, reference, rtol=1e-10, atol=1e-10)
    for mine, theirs in zip(
        ours_gradients, gradients(reference, list(twin.parameters())), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", ["resnet8", "wrn10x2"])
def test_each_member_is_a_plain_network_with_its_own_weights(name):
    torch.manual_seed(0)
    architecture = {"name": name, "num_classes": 5, "width": 4}
    student = build_student("batch_ensemble", architecture, M).double().eval()
    ensemble = student.network
    x = torch.rand(B, 3, 8, 8, dtype=torch.float64)
    own = torch.rand(M, B, 3, 8, 8, dtype=torch.float64)
    together, each = student(x), student(own)
    for j in range(M):
        plain = build_network(name, 5, width=4).double()
        state = plain.state_dict()
        for key, value in ensemble.state_dict().items():
            layer = ensemble.get_submodule(key.rsplit(".", 1)[0])
            if not hasattr(layer, "r"):
                state[key] = value
            elif key.endswith("weight"):
                state[key] = explicit_weight(value, layer.r[j], layer.s[j])
            elif key == "head.bias":
                state[key] = value[j]
        plain.load_state_dict(state)
        plain.eval()
        torch.testing.assert_close(together[j], plain(x), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(each[j], plain(own[j]), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("channels", "side", "images", "form"),
    [
        (16, 8, 64, "scaled"),  # the default study's
        (32, 4, 64, "scaled"),
        (64, 2, 64, "scaled"),
        (16, 32, 64, "explicit"),  # ResNet-32
        (32, 16, 64, "explicit"),
        (64, 8, 64, "explicit"),
        (16, 32, 128, "explicit"),
        (64, 8, 128, "explicit"),
        (16, 32, 4, "scaled"),
        (160, 32, 4, "explicit"),  # WRN-28-10
        (320, 16, 4, "scaled"),
        (640, 8, 4, "scaled"),
        (160, 32, 16, "explicit"),
        (320, 16, 16, "scaled"),
        (640, 8, 16, "scaled"),
        (640, 8, 256, "explicit"),
    ],
)
def test_the_form_of_a_layer_follows_from_its_sizes(channels, side, images, form, monkeypatch):
    with torch.device("meta"), WithoutRandomNumbers():
        layer = BatchEnsembleConv2d(channels, channels, 3, ensemble_size=4, padding=1)
        x = torch.empty(4 * images, channels, side, side)
    for name in ("scaled", "explicit"):
        monkeypatch.setattr(layer, f"_{name}", lambda x, name=name: name)
    monkeypatch.setitem(SCALED, "meta", SCALED["cpu"])
    assert layer(x) == form


def test_no_bit_depends_on_when_a_form_is_chosen():
    """A pure function of sizes: nothing that a training would have to store to be resumed."""
    assert [*inspect.signature(scales_activations).parameters] == ["numbers", "weights", "device"]
    limit = 2**19 + 2 * 1000
    assert scales_activations(limit, 1000, "cpu")
    assert not scales_activations(limit + 1, 1000, "cpu")
    assert scales_activations(2**23, 0, "cuda")
    assert not scales_activations(2**23 + 1, 0, "cuda")


def test_rows_must_be_shared_out_evenly():
    with pytest.raises(ValueError, match="5 rows cannot be shared out evenly among 3 members"):
        BatchEnsembleLinear(2, 2, ensemble_size=3)(torch.zeros(5, 2))


def test_initial_factors_are_normal_around_one():
    torch.manual_seed(0)
    layer = BatchEnsembleConv2d(500, 500, 1, ensemble_size=8)
    for factor in (layer.r, layer.s):
        assert factor.mean().item() == pytest.approx(1, abs=0.03)
        assert factor.std().item() == pytest.approx(0.5, abs=0.02)
    assert not layer.bias.any()
