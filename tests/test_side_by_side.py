"""MIMO's orders are undone; packed ensembles equal M explicit narrow networks."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ensdistill.networks import build_network
from ensdistill.packed import PackedLinear
from ensdistill.students import build_student

M, B, K = 3, 6, 5
ARCHITECTURE = {
    "name": "resnet8", "num_classes": K, "in_channels": 3, "width": 6,
    "mean": [0.25, 0.5, 0.375], "std": [0.125, 0.25, 0.5],
}  # fmt: skip


def student_of(kind, name="resnet8", **options):
    """With batch normalisations that are not the identity."""
    torch.manual_seed(0)
    student = build_student(kind, {**ARCHITECTURE, "name": name}, M, **options).double()
    for norm in (it for it in student.modules() if isinstance(it, nn.BatchNorm2d)):
        for tensor in (norm.weight, norm.running_var):
            nn.init.uniform_(tensor, 0.5, 2)
        for tensor in (norm.bias, norm.running_mean):
            nn.init.normal_(tensor, 0, 0.3)
    return student


def images(*shape):
    return torch.rand(*shape, 3, 8, 8, dtype=torch.float64)


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-11)


# --- MIMO ------------------------------------------------------------------------------------


class Seen:
    """What a MIMO student's network is given, and answers."""

    def __init__(self, student):
        student.network.register_forward_hook(self._keep)

    def _keep(self, network, given, logits):
        self.images, self.logits = given[0], logits

    def orders(self, x):
        """By member, the numbers of its images (M, B, …) in the rows of the network."""
        return [
            [
                next(b for b in range(B) if torch.equal(row[3 * m : 3 * m + 3], x[m, b]))
                for row in self.images
            ]
            for m in range(M)
        ]


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("name", ["resnet8", "wrn10x2"])
def test_every_member_sees_an_order_of_its_own_which_is_undone(name, own):
    student = student_of("mimo", name).train()
    seen, x = Seen(student), images(M, B) if own else images(B)
    each = x if own else torch.stack([x] * M)
    torch.manual_seed(3)
    logits = student(x)
    orders = seen.orders(each)
    assert all(sorted(order) == list(range(B)) for order in orders)
    assert len({tuple(order) for order in orders}) == M
    for m in range(M):
        for row, b in enumerate(orders[m]):
            assert torch.equal(logits[m, b], seen.logits[row, K * m : K * m + K])
    torch.manual_seed(3)
    student(x)
    assert seen.orders(each) == orders
    student(x)
    assert seen.orders(each) != orders


def test_gradients_of_a_member_reach_the_image_that_it_answers():
    """Without batch statistics a row of the network depends on that row alone."""
    student = student_of("mimo").train()
    student.network.eval()
    seen, x = Seen(student), images(M, B).requires_grad_()
    logits = student(x)
    orders = seen.orders(x)
    (gradient,) = torch.autograd.grad(logits[1, 2].sum(), x)
    row = orders[1].index(2)
    touched = {(m, b) for m in range(M) for b in range(B) if gradient[m, b].any()}
    assert touched == {(m, orders[m][row]) for m in range(M)}
    assert (1, 2) in touched


@pytest.mark.parametrize("name", ["resnet8", "wrn10x2"])
def test_in_eval_mode_all_members_see_the_same_image(name):
    student = student_of("mimo", name).eval()
    plain = build_network(name, M * K, 3 * M, width=6).double().eval()
    state = {k: v for k, v in student.network.state_dict().items() if "normalize" not in k}
    plain.load_state_dict(state, strict=False)
    x = images(B)
    normal = torch.stack([(x[:, c] - ARCHITECTURE["mean"][c]) / ARCHITECTURE["std"][c]
                          for c in range(3)], 1)  # fmt: skip
    answers = plain(torch.cat([normal] * M, 1))
    close(student(x), torch.stack([answers[:, K * m : K * m + K] for m in range(M)]))


# --- packed ----------------------------------------------------------------------------------


def dense(weight, groups):
    """Weights of the ordinary convolution that a grouped one is."""
    out, each, *kernel = weight.shape
    full = torch.zeros(out, each * groups, *kernel, dtype=weight.dtype)
    for o in range(out):
        group = o // (out // groups)
        full[o, group * each : (group + 1) * each] = weight[o]
    return full


def explicit(student, width, groups=1):
    """M narrow networks with the weights of each member."""
    networks = []
    for m in range(M):
        narrow = build_network(**{**student.spec["architecture"], "width": width}).double()
        state = narrow.state_dict()
        for key, value in student.network.state_dict().items():
            if key.startswith("head"):
                state[key] = value[m]
            elif value.ndim:
                size = len(value) // M
                state[key] = value[m * size : (m + 1) * size]
                if value.ndim == 4 and not key.startswith("stem"):
                    state[key] = dense(state[key], groups)
        narrow.load_state_dict(state)
        networks.append(narrow)
    return networks


@pytest.mark.parametrize(("widen", "groups", "width"), [(2.0, 1, 4), (1.0, 1, 2), (2.0, 2, 4)])
@pytest.mark.parametrize("name", ["resnet8", "wrn10x2"])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("own", [False, True])
def test_packed_members_equal_explicit_networks_forward_and_backward(
    name, widen, groups, width, training, own
):
    student = student_of("packed", name, widen=widen, groups=groups).train(training)
    networks = [network.train(training) for network in explicit(student, width, groups)]
    x = images(M, B) if own else images(B)
    each = x if own else [x] * M
    ours = student(x)
    theirs = torch.stack([network(it) for network, it in zip(networks, each, strict=True)])
    close(ours, theirs)
    direction = torch.randn_like(ours)
    (ours * direction).sum().backward()
    (theirs * direction).sum().backward()
    for key, parameter in student.network.named_parameters():
        for m, network in enumerate(networks):
            size = len(parameter) // M
            mine = parameter.grad[m * size : (m + 1) * size]
            expected = network.get_parameter(key).grad
            if parameter.ndim == 4 and not key.startswith("stem"):
                within = dense(torch.ones_like(mine), groups).bool()
                assert within.float().mean() == 1 / groups
                expected = expected[within].view(mine.shape)
            close(mine.reshape(expected.shape), expected)


def test_packed_linear_equals_loops():
    torch.manual_seed(0)
    layer, x = PackedLinear(2 * 3, 2 * 4, members=2), torch.randn(5, 6)
    expected = [F.linear(x[:, 3 * m : 3 * m + 3], layer.weight[m], layer.bias[m]) for m in (0, 1)]
    torch.testing.assert_close(layer(x), torch.cat(expected, 1))


def test_packed_layers_start_as_those_of_a_narrow_network():
    architecture = {"name": "resnet8", "num_classes": 100, "in_channels": 8, "width": 64}
    torch.manual_seed(0)
    network = build_student("packed", architecture, 4, widen=2.0).network
    block = network.blocks[2]
    for weight, fan_out in ((network.stem.weight, 9 * 32), (block.conv2.weight, 9 * 128)):
        assert weight.std().item() == pytest.approx(math.sqrt(2 / fan_out), rel=0.02)
    plain = nn.Linear(128, 100)
    for ours, theirs in ((network.head.weight, plain.weight), (network.head.bias, plain.bias)):
        assert ours.abs().max().item() == pytest.approx(theirs.abs().max().item(), rel=0.05)
        assert ours.std().item() == pytest.approx(theirs.std().item(), rel=0.2)


@pytest.mark.parametrize(
    ("width", "members", "options", "narrow"),
    [
        (16, 4, {}, 8),
        (16, 4, {"widen": 4.0}, 16),
        (16, 3, {"widen": 1.0}, 5),
        (16, 3, {}, 11),
        (4, 8, {"widen": 1.0}, 1),
        (1, 8, {"widen": 1.0}, 1),
        (16, 4, {"groups": 4}, 8),
    ],
)
def test_widths_of_packed_members(width, members, options, narrow):
    student = build_student("packed", {**ARCHITECTURE, "width": width}, members, **options)
    stem = student.network.stem.weight
    assert tuple(stem.shape) == (members * narrow, 3, 3, 3)
    assert student.network.blocks[-1].conv2.weight.shape[0] == members * 4 * narrow
    groups = options.get("groups", 1)
    assert student.network.blocks[0].conv1.weight.shape[1] == narrow // groups


@pytest.mark.parametrize("groups", [3, 16, 0, -1])
def test_groups_that_cannot_share_out_a_members_channels_are_refused(groups):
    with pytest.raises(ValueError, match=rf"4 packed members has 8 channels .* which {groups} gr"):
        build_student("packed", {**ARCHITECTURE, "width": 16}, 4, groups=groups)
