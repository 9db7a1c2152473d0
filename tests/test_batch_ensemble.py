"""BatchEnsemble layers and networks against M explicit networks W∘(s_j r_jᵀ), in float64."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ensdistill.batch_ensemble import SCALED, BatchEnsembleConv2d, BatchEnsembleLinear
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


def test_activations_are_scaled_where_they_are_few(monkeypatch):
    layer = BatchEnsembleLinear(16, 4, ensemble_size=2)
    monkeypatch.setitem(SCALED, "cpu", 64)
    monkeypatch.setattr(layer, "_scaled", lambda x: "scaled")
    monkeypatch.setattr(layer, "_explicit", lambda x: "explicit")
    assert layer(torch.zeros(4, 16)) == "scaled"
    assert layer(torch.zeros(6, 16)) == "explicit"


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
