"""LatentBE: layers, merged network and optimiser against plain re-derivations."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ensdistill.latent_batch_ensemble import LatentConv2d, LatentLayer, LatentLinear
from ensdistill.networks import build_network
from ensdistill.students import build_student, count_parameters

M, B, K = 3, 2, 5
ARCHITECTURE = {"name": "resnet8", "num_classes": K, "in_channels": 3, "width": 4}
LAYERS = [
    (lambda: LatentConv2d(4, 5, 3, ensemble_size=M, padding=1), (4, 6, 6)),
    (lambda: LatentConv2d(4, 5, 3, ensemble_size=M, stride=2, bias=False), (4, 7, 7)),
    (lambda: LatentConv2d(4, 5, 1, ensemble_size=M, stride=2), (4, 6, 6)),
    (lambda: LatentLinear(4, 5, ensemble_size=M), (4,)),
    (lambda: LatentLinear(4, 5, ensemble_size=1), (4,)),
]


def moved(module, size=0.3):
    """With other parameters than those at the start, and statistics that are not the identity."""
    for layer in module.modules():
        if isinstance(layer, LatentLayer):
            for parameter in (layer.dr, layer.ds, layer.bias):
                if parameter is not None:
                    nn.init.normal_(parameter, 0, size)
        if isinstance(layer, nn.BatchNorm2d):
            for tensor in (layer.weight, layer.running_var):
                nn.init.uniform_(tensor, 0.5, 2)
            for tensor in (layer.bias, layer.running_mean):
                nn.init.normal_(tensor)
    return module


def student_of(name="resnet8", members=M):
    torch.manual_seed(0)
    student = build_student("latent_batch_ensemble", {**ARCHITECTURE, "name": name}, members)
    return moved(student.double())


def literal(layer, x):
    """s_j ∘ (W (x ∘ r_j) + b), row by row and channel by channel."""
    rows = []
    for n in range(len(x)):
        j = n // (len(x) // layer.ensemble_size)
        scaled = torch.stack([x[n, i] * (1 + layer.dr[j, i]) for i in range(x.shape[1])])[None]
        if x.ndim == 4:
            out = F.conv2d(scaled, layer.weight, layer.bias, layer.stride, layer.padding)[0]
        else:
            out = F.linear(scaled, layer.weight, layer.bias)[0]
        rows.append(torch.stack([out[o] * (1 + layer.ds[j, o]) for o in range(len(out))]))
    return torch.stack(rows)


@pytest.mark.parametrize(("make", "shape"), LAYERS)
def test_layer_equals_explicit_members_forward_and_backward(make, shape, form):
    torch.manual_seed(0)
    layer = moved(make().double())
    x = torch.randn(layer.ensemble_size * B, *shape, dtype=torch.float64, requires_grad=True)
    wanted = [x, *layer.parameters()]
    ours, reference = layer(x), literal(layer, x)
    torch.testing.assert_close(ours, reference, rtol=1e-10, atol=1e-10)
    direction = torch.randn_like(ours)
    pairs = (torch.autograd.grad((out * direction).sum(), wanted) for out in (ours, reference))
    for mine, theirs in zip(*pairs, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("make", "shape"), LAYERS)
def test_layer_under_autocast_differs_by_rounding_only(make, shape, form):
    torch.manual_seed(0)
    layer = moved(make())
    x = torch.randn(layer.ensemble_size * B, *shape)
    with torch.autocast("cpu", torch.bfloat16):
        ours = layer(x)
    assert ours.dtype == torch.bfloat16
    gradients = torch.autograd.grad(ours.float().square().sum(), list(layer.parameters()))
    layer = layer.double()
    reference = literal(layer, x.double())
    expected = torch.autograd.grad(reference.square().sum(), list(layer.parameters()))
    for mine, theirs in zip((ours, *gradients), (reference, *expected), strict=True):
        assert (mine - theirs).norm() < 0.02 * theirs.norm()


def test_it_starts_as_the_ordinary_network_with_as_many_parameters():
    torch.manual_seed(0)
    student = build_student("latent_batch_ensemble", ARCHITECTURE, M).eval()
    ordinary = student.predictor().eval()
    assert count_parameters(ordinary) == count_parameters(build_network(**ARCHITECTURE))
    x = torch.rand(B, 3, 8, 8)
    for logits in student(x):
        torch.testing.assert_close(logits, ordinary(x)[0], rtol=1e-6, atol=1e-6)
    for layer in (it for it in student.modules() if isinstance(it, LatentLayer)):
        assert layer.r.eq(1).all()
        assert layer.s.eq(1).all()
        if isinstance(layer, LatentConv2d):
            assert layer.bias is None


@pytest.mark.parametrize("name", ["resnet8", "wrn10x2"])
def test_merged_it_equals_each_member_where_members_are_equal(name):
    student = student_of(name).float().eval()
    for layer in (it for it in student.modules() if isinstance(it, LatentLayer)):
        for factors in (layer.dr, layer.ds):
            factors.data[:] = factors[0]
    x = torch.rand(B, 3, 8, 8)
    merged = student.predictor().eval()(x)
    for logits in student(x):
        torch.testing.assert_close(logits, merged[0], rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("members", [1, M])
@pytest.mark.parametrize("name", ["resnet8", "wrn10x2"])
def test_merged_it_is_an_ordinary_network_with_the_mean_factors(name, members):
    student = student_of(name, members)
    plain = build_network(**{**ARCHITECTURE, "name": name}).double()
    for key, value in plain.state_dict().items():
        layer = student.network.get_submodule(key.rpartition(".")[0])
        if not isinstance(layer, LatentLayer):
            value.copy_(student.network.state_dict()[key])
            continue
        r, s = (sum(1 + it[j] for j in range(members)) / members for it in (layer.dr, layer.ds))
        for o in range(len(value)):
            if key.endswith("bias"):
                value[o] = s[o] * layer.bias[o]
            for i in range(len(r) * (value.ndim > 1)):
                value[o, i] = s[o] * r[i] * layer.weight[o, i]
    merged = student.predictor()
    assert merged.spec == build_student("single", student.spec["architecture"], members=1).spec
    assert merged.network.state_dict().keys() == plain.state_dict().keys()
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(merged.network.state_dict()[key], value, rtol=1e-12, atol=1e-12)
    x = torch.rand(B, 3, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(merged.eval()(x)[0], plain.eval()(x), rtol=1e-10, atol=1e-10)


def test_a_predictor_has_memory_of_its_own_and_costs_no_random_number():
    student = student_of()
    torch.manual_seed(5)
    first, number = student.predictor(), torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(number, torch.rand(1))
    kept = copy.deepcopy(first.state_dict())
    with torch.no_grad():
        for tensor in (*student.parameters(), *student.buffers()):
            tensor.add_(1)
    assert all(torch.equal(value, kept[key]) for key, value in first.state_dict().items())
    second = student.predictor().state_dict()
    changed = [key for key in kept if not torch.equal(second[key], kept[key])]
    assert changed == list(kept)
    assert all(parameter.requires_grad for parameter in first.parameters())


@pytest.mark.parametrize("nesterov", [False, True])
def test_steps_of_the_optimiser_are_those_of_the_authors(nesterov):
    """The gradient of loss + λ/2 (‖θ‖² + (‖r − 1‖² + ‖s − 1‖²)/M), that of r and s times M."""
    student, lr, decay, momentum = student_of(), 0.1, 0.05, 0.9
    groups = student.parameter_groups(lr, decay)
    optimizer = torch.optim.SGD(groups, momentum=momentum, nesterov=nesterov, fused=True)
    twin = copy.deepcopy(student)
    velocity = {name: torch.zeros_like(it) for name, it in twin.named_parameters()}
    x = torch.rand(B, 3, 8, 8, dtype=torch.float64)

    def loss_of(model):
        return model(x).square().mean()

    for _ in range(3):
        optimizer.zero_grad()
        loss_of(student).backward()
        optimizer.step()
        penalty = 0.0
        for layer in twin.modules():
            if isinstance(layer, LatentLayer):
                r, s = 1 + layer.dr, 1 + layer.ds
                penalty = penalty + ((r - 1).square().sum() + (s - 1).square().sum()) / M
        for name, parameter in twin.named_parameters():
            if not name.endswith((".dr", ".ds")):
                penalty = penalty + parameter.square().sum()
        total = loss_of(twin) + decay / 2 * penalty
        gradients = torch.autograd.grad(total, list(twin.parameters()))
        with torch.no_grad():
            for (name, parameter), gradient in zip(twin.named_parameters(), gradients, strict=True):
                gradient = gradient * (M if name.endswith((".dr", ".ds")) else 1)
                velocity[name] = momentum * velocity[name] + gradient
                step = gradient + momentum * velocity[name] if nesterov else velocity[name]
                parameter -= lr * step
    for (name, ours), theirs in zip(student.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12, msg=name)


def test_every_parameter_is_in_one_group():
    student = student_of()
    others, deviations = student.parameter_groups(0.1, 0.05)
    layers = [it for it in student.modules() if isinstance(it, LatentLayer)]
    assert {id(p) for p in deviations["params"]} == {id(p) for m in layers for p in (m.dr, m.ds)}
    assert len(others["params"]) + len(deviations["params"]) == len(list(student.parameters()))
