"""A BatchEnsemble of any network against M explicit ones W∘(s_j r_jᵀ), in float64."""

import math

import pytest
import timm
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd
from torchvision import models

from ensdistill import InputError
from ensdistill.batch_ensemble import SCALED, BatchEnsembleConv2d, BatchEnsembleLinear
from ensdistill.convert import BatchEnsembleMap, check_members, member, to_batch_ensemble
from ensdistill.latent_batch_ensemble import LatentConv2d, LatentLinear
from ensdistill.students import build_student
from ensdistill.weights import load_student, save_student
from tests import small_networks
from tests.project import REPOSITORY

M, B, K = 2, 2, 5

pytestmark = pytest.mark.filterwarnings("ignore:Using padding=.same. with even kernel")

# --- layers -----------------------------------------------------------------------------------


def explicit_weight(weight, r_j, s_j, groups):
    """W_j[o, i] = W[o, i]·s_j[o]·r_j[group(o)·in/g + i], entry by entry."""
    outputs, inputs = weight.shape[:2]
    rows = []
    for o in range(outputs):
        first = o // (outputs // groups) * inputs
        rows.append(torch.stack([weight[o, i] * s_j[o] * r_j[first + i] for i in range(inputs)]))
    return torch.stack(rows)


def test_a_weight_by_hand():
    weight = torch.tensor([[1.0, 2], [3, 4]])
    ours = explicit_weight(weight, torch.tensor([1.0, 10, 100, 1000]), torch.tensor([1.0, 7]), 2)
    assert ours.tolist() == [[1, 20], [2100, 28000]]


@torch.no_grad()
def shaken(module, seed=0):
    """With numbers that none begins with, and statistics that are not the identity."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in [*module.parameters(), *module.buffers()]:
        if tensor.is_floating_point() and (tensor.ndim < 2 or not tensor.any()):
            noise = torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype)
            tensor.add_(noise - (0 if tensor.numel() and tensor.min() >= 0.5 else 0.5))
    return module


def same(ours, theirs, tolerance):
    scale = max(theirs.abs().max().item(), 1e-3)  # some gradients are 0 but for rounding
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * scale)


CONVS = [
    {"groups": 2},
    {"groups": 6, "bias": False},
    {"groups": 3, "stride": 2, "padding": 1},
    {"dilation": 2, "padding": (2, 1)},
    {"kernel_size": (1, 3), "dilation": (1, 2), "stride": (2, 1), "padding": (0, 2)},
    {"kernel_size": (2, 4), "padding": "same"},
    {"kernel_size": (3, 2), "padding": "valid", "stride": (1, 2), "bias": False},
    {"kernel_size": 1, "stride": 2},
    {"kernel_size": 1, "stride": (1, 2), "groups": 2},
    *(
        {"padding_mode": mode, **more}
        for mode in ("reflect", "replicate", "circular")
        for more in (
            {"padding": (1, 2), "stride": 2},
            {"kernel_size": (2, 4), "padding": "same", "dilation": (1, 2), "bias": False},
            {"padding": "valid"},
        )
    ),
]


@pytest.mark.parametrize("options", CONVS, ids=str)
def test_a_convolution_equals_explicit_ones_forward_and_backward(options, form):
    torch.manual_seed(0)
    plain = nn.Conv2d(6, 12, **{"kernel_size": 3, **options})
    layer = shaken(to_batch_ensemble(nn.Sequential(plain), M)[0].double())
    assert type(layer) is BatchEnsembleConv2d
    x = torch.randn(M * B, 6, 7, 8, dtype=torch.float64, requires_grad=True)

    def explicit():
        weights = [explicit_weight(layer.weight, *it, plain.groups)
                   for it in zip(layer.r, layer.s, strict=True)]  # fmt: skip
        biases = [None] * M if layer.bias is None else layer.bias
        around = []
        if plain.padding_mode != "zeros":
            around = list(plain._reversed_padding_repeated_twice)
        for rows, weight, bias in zip(x.chunk(M), weights, biases, strict=True):
            if around:
                padded = F.pad(rows, around, mode=plain.padding_mode)
                yield F.conv2d(padded, weight, bias, plain.stride, 0, plain.dilation, plain.groups)
            else:
                how = (plain.stride, plain.padding, plain.dilation, plain.groups)
                yield F.conv2d(rows, weight, bias, *how)

    compare(layer(x), torch.cat([*explicit()]), [x, *layer.parameters()], 1e-10)


def compare(ours, theirs, wanted, tolerance):
    same(ours, theirs, tolerance)
    direction = torch.randn_like(theirs)
    gradients = (torch.autograd.grad((it * direction).sum(), wanted) for it in (ours, theirs))
    for mine, their in zip(*gradients, strict=True):
        same(mine, their, tolerance)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("between", [(), (3,), (2, 3)])
def test_a_linear_layer_takes_dimensions_between_rows_and_features(bias, between, form):
    torch.manual_seed(0)
    layer = to_batch_ensemble(nn.Sequential(nn.Linear(4, 3, bias)), M)[0].double()
    shaken(layer)
    assert type(layer) is BatchEnsembleLinear
    x = torch.randn(M * B, *between, 4, dtype=torch.float64, requires_grad=True)
    theirs = [
        F.linear(rows, explicit_weight(layer.weight, layer.r[j], layer.s[j], 1))
        + (layer.bias[j] if bias else 0)
        for j, rows in enumerate(x.chunk(M))
    ]
    compare(layer(x), torch.cat(theirs), [x, *layer.parameters()], 1e-10)


@pytest.mark.parametrize("options", CONVS, ids=str)
def test_a_member_of_a_convolution_is_an_ordinary_one(options):
    plain = nn.Conv2d(6, 12, **{"kernel_size": 3, **options})
    layer = shaken(to_batch_ensemble(nn.Sequential(plain), M)[0].double())
    x = torch.randn(B, 6, 7, 8, dtype=torch.float64)
    for j in range(M):
        own = layer.member(j)
        assert type(own) is nn.Conv2d
        same(own(x), layer(x.repeat(M, 1, 1, 1))[j * B : (j + 1) * B], 1e-10)


def test_groups_that_do_not_divide_the_channels_are_refused():
    with pytest.raises(ValueError, match="2 groups do not divide 3 channels in and 4 out"):
        BatchEnsembleConv2d(3, 4, 3, ensemble_size=2, groups=2)


# --- networks ---------------------------------------------------------------------------------

OWN = "file:tests/small_networks.py:"
SHORT = {"layers": [1, 1, 1, 1]}
ARCHITECTURES = {
    "timm:resnet18": (SHORT, 32),
    "timm:resnet50": ({**SHORT, "channels": [16, 32, 64, 128]}, 32),
    "timm:wide_resnet50_2": ({**SHORT, "channels": [16, 32, 64, 128]}, 32),
    "timm:regnetx_002": ({}, 32),
    "timm:densenet121": ({"block_config": [2, 2, 2, 2]}, 32),
    "timm:mobilenetv3_small_050": ({}, 32),
    "torchvision:mobilenet_v3_small": ({}, 32),
    "timm:test_efficientnet": ({}, 32),
    "timm:tf_mobilenetv3_small_minimal_100": ({}, 32),
    "timm:test_convnext": ({}, 32),
    "timm:vit_tiny_patch16_224": ({"img_size": 32, "depth": 2}, 32),
    f"{OWN}vit": ({}, 32),
    "timm:deit_tiny_distilled_patch16_224": ({"img_size": 32, "depth": 2}, 32),
    "timm:swin_tiny_patch4_window7_224": (
        {"img_size": 32, "depths": [2, 2], "num_heads": [2, 4], "embed_dim": 16, "window_size": 4},
        32,
    ),
    "timm:maxvit_pico_rw_256": ({"img_size": 32, "depths": [1, 1, 1, 1]}, 32),
    f"{OWN}mixer": ({}, 32),
    f"{OWN}levit": ({}, 64),
    "timm:mobilevit_xxs": ({}, 32),
    "timm:ecaresnet26t": ({**SHORT, "channels": [16, 32, 64, 128]}, 32),
    f"{OWN}resnet_v2": ({}, 32),
    "timm:test_nfnet": ({}, 32),
}
"""By name, as config.yaml has it: options, and the side of images."""

MAPPED = {"Conv2dSame", "StdConv2d", "ScaledStdConv2d", "Conv1d"}
"""Classes of layers that do more than Conv2d and Linear."""


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch):
    """Own files lie in the folder where snakemake runs."""
    monkeypatch.chdir(REPOSITORY)


def original(name, options):
    """The module itself, made past this package."""
    family, _, model = name.partition(":")
    torch.manual_seed(1)
    if family == "timm":
        return timm.create_model(model, num_classes=K, **options)
    if family == "torchvision":
        return models.get_model(model, num_classes=K, **options)
    build = getattr(small_networks, model.rpartition(":")[2])
    return build(K, 3) if "in_channels" in build.__code__.co_varnames else build(K)


def linear_maps(network):
    """(place of the layer in the ensemble, name of its weight and bias in the original, layer)."""
    for name, it in network.named_modules():
        if isinstance(it, nn.MultiheadAttention):
            yield f"{name}.in_proj", (f"{name}.in_proj_weight", f"{name}.in_proj_bias"), it
        elif isinstance(it, _ConvNd | nn.Linear):
            yield name, (f"{name}.weight", f"{name}.bias"), it


class Explicit:
    """M times the original module, with weights made of the tensors of the ensemble."""

    def __init__(self, network, ensemble):
        self.network = network
        self.leaves = {
            name: parameter.detach().clone().requires_grad_()
            for name, parameter in ensemble.named_parameters()
        }
        self.buffers = dict(ensemble.named_buffers())

    def member(self, j, x):
        given = {**self.leaves, **self.buffers}
        hooks = []
        for place, (weight, bias), layer in linear_maps(self.network):
            r, s = given.pop(f"{place}.r"), given.pop(f"{place}.s")
            own = given.pop(f"{place}.bias", None)
            if type(layer).__name__ in MAPPED:
                for key in [key for key in given if key.startswith(f"{place}.inner.")]:
                    given[key.replace(".inner.", ".")] = given.pop(key)
                hooks += self.scaled(layer, r[j], s[j], None if own is None else own[j])
                if own is not None:
                    given[bias] = torch.zeros_like(own[j])
                continue
            shared = given.pop(f"{place}.weight")
            outputs, inputs = shared.shape[:2]
            group = torch.arange(outputs) // (outputs // getattr(layer, "groups", 1))
            places = group[:, None] * inputs + torch.arange(inputs)
            factors = s[j][:, None] * r[j][places]
            given[weight] = shared * factors.view(*factors.shape, *[1] * (shared.ndim - 2))
            if own is not None:
                given[bias] = own[j]
        logits = functional_call(self.network, given, (x,), strict=False)
        for hook in hooks:
            hook.remove()
        return logits

    @staticmethod
    def scaled(layer, r, s, bias):
        def around(x):
            return (-1, *[1] * (x.ndim - 2))

        yield layer.register_forward_pre_hook(lambda _, given: given[0] * r.view(around(given[0])))
        yield layer.register_forward_hook(
            lambda _, given, out: (
                out * s.view(around(out)) + (0 if bias is None else bias.view(around(out)))
            )
        )


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_network_equals_explicit_ones_forward_and_backward(name, monkeypatch):
    options, side = ARCHITECTURES[name]
    network = shaken(original(name, options).eval().double())
    kept = {key: it.clone() for key, it in network.state_dict().items()}
    ensemble = to_batch_ensemble(network, M)
    assert_weights_are_kept(network, kept, ensemble)
    assert_counted(network, ensemble)
    shaken(ensemble, seed=2)
    explicit = Explicit(network, ensemble)
    x = torch.rand(M * B, 3, side, side, dtype=torch.float64, requires_grad=True)
    theirs = torch.cat([explicit.member(j, rows) for j, rows in enumerate(x.chunk(M))])
    assert theirs.std() > 1e-3
    direction = torch.randn_like(theirs)
    wanted = [x, *explicit.leaves.values()]
    how = {"allow_unused": True, "retain_graph": True}  # LeViT keeps tensors from call to call
    gradients = torch.autograd.grad((theirs * direction).sum(), wanted, **how)
    for limit in (math.inf, -math.inf):  # activations are scaled, or M weights made
        monkeypatch.setitem(SCALED, "cpu", limit)
        ours = ensemble(x)
        same(ours, theirs.detach(), 1e-8)
        mine = torch.autograd.grad((ours * direction).sum(), [x, *ensemble.parameters()], **how)
        for key, one, other in zip(["x", *explicit.leaves], mine, gradients, strict=True):
            assert (one is None) == (other is None), key
            if one is not None:
                same(one, other, 1e-8)


def assert_weights_are_kept(network, kept, ensemble):
    """Every one of them, to the bit; the original is as it was, and shares no memory."""
    state = network.state_dict()
    assert all(torch.equal(it, kept[key]) for key, it in state.items())
    weights = {weight: f"{place}.weight" for place, (weight, _), _ in linear_maps(network)}
    biases = {bias: f"{place}.bias" for place, (_, bias), _ in linear_maps(network)}
    made = {key.replace(".inner.", "."): it for key, it in ensemble.state_dict().items()}
    for key, tensor in state.items():
        ours = made[(weights | biases).get(key, key)]
        tensor = tensor.expand(M, -1) if key in biases else tensor
        assert torch.equal(ours, tensor), key
        assert ours.numel() == 0 or ours.data_ptr() != state[key].data_ptr(), key


def assert_counted(network, ensemble):
    """Of each layer M factors of its inputs and outputs, and M − 1 biases more."""
    more = 0
    for _, _, layer in linear_maps(network):
        if isinstance(layer, nn.MultiheadAttention):
            sizes = layer.embed_dim, 3 * layer.embed_dim
            bias = 3 * layer.embed_dim
        elif isinstance(layer, nn.Linear):
            sizes = layer.in_features, layer.out_features
            bias = 0 if layer.bias is None else layer.out_features
        else:
            sizes = layer.in_channels, layer.out_channels
            bias = 0 if layer.bias is None else layer.out_channels
        more += M * sum(sizes) + (M - 1) * bias
    plain, together = (sum(it.numel() for it in m.parameters()) for m in (network, ensemble))
    assert together == plain + more


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_student_comes_back_from_its_file(name, tmp_path):
    options, side = ARCHITECTURES[name]
    architecture = {"name": name, "options": options, "num_classes": K, "in_channels": 3}
    architecture |= {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.25]}
    torch.manual_seed(0)
    student = shaken(build_student("batch_ensemble", architecture, M).eval())
    save_student(tmp_path / "weights", student, {})
    x = torch.rand(B, 3, side, side)
    loaded = load_student(tmp_path / "weights")
    student.requires_grad_(False)  # as what is loaded: PyTorch multiplies otherwise by such
    with torch.no_grad():
        ours, theirs = loaded(x), student(x)
    assert torch.equal(ours, theirs)
    assert (ours[0] - ours[1]).abs().max() > 1e-3


# --- refusals ---------------------------------------------------------------------------------


def parametrized():
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)))


REFUSED = {
    "torchvision's Swin": (
        lambda: small_networks.swin(K),
        "features.1.0.attn.qkv (Linear) cannot be converted: ShiftedWindowAttention reads its",
    ),
    "timm's Swin v2": (
        lambda: timm.create_model(
            "swinv2_tiny_window8_256",
            **{"img_size": 32, "depths": [1, 1], "num_heads": [2, 4], "embed_dim": 16},
            window_size=4,
        ),
        "layers.0.blocks.0.attn.qkv (Linear) cannot be converted: WindowAttention reads its weight",
    ),
    "rows in the second dimension": (
        lambda: nn.TransformerEncoderLayer(4, 2),
        "self_attn (MultiheadAttention) cannot be converted: its rows are in the second dimension",
    ),
    "keys of another width": (
        lambda: nn.Sequential(nn.MultiheadAttention(4, 2, kdim=3, batch_first=True)),
        "0 (MultiheadAttention) cannot be converted: its queries, keys and values differ in width",
    ),
    "biases of keys": (
        lambda: nn.Sequential(nn.MultiheadAttention(4, 2, add_bias_kv=True, batch_first=True)),
        "0 (MultiheadAttention) cannot be converted: it has add_bias_kv or add_zero_attn",
    ),
    "zeros among keys": (
        lambda: nn.Sequential(nn.MultiheadAttention(4, 2, add_zero_attn=True, batch_first=True)),
        "0 (MultiheadAttention) cannot be converted: it has add_bias_kv or add_zero_attn",
    ),
    "recurrence": (
        lambda: nn.ModuleDict({"a": nn.Sequential(nn.GRU(3, 3, batch_first=True))}),
        "a.0 (GRU) cannot be converted: such a layer has no BatchEnsemble form here",
    ),
    "a recurrent cell": (
        lambda: nn.Sequential(nn.LSTMCell(3, 3)),
        "0 (LSTMCell) cannot be converted: such a layer has no BatchEnsemble form here",
    ),
    "two inputs": (
        lambda: nn.Sequential(nn.Bilinear(3, 3, 3)),
        "0 (Bilinear) cannot be converted: such a layer has no BatchEnsemble form here",
    ),
    "a weight that is computed": (
        parametrized,
        "0 (ParametrizedLinear) cannot be converted: its weight is computed (parametrized)",
    ),
    "a weight that a method reads": (
        small_networks.Reads,
        "proj (Linear) cannot be converted: Reads reads its weight or bias past its forward",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_converted_is_named_in_one_sentence(what):
    make, expected = REFUSED[what]
    network = make()
    kinds = [type(it) for it in network.modules()]
    with pytest.raises(ValueError, match="cannot be converted") as caught:
        to_batch_ensemble(network, M)
    assert str(caught.value).startswith(expected)
    assert "\n" not in str(caught.value)
    assert [type(it) for it in network.modules()] == kinds


def test_what_only_describes_a_weight_may_be_asked():
    """The refusal above names the other layer, the first whose weight is asked for its numbers."""

    class Asks(nn.Module):
        def __init__(self):
            super().__init__()
            self.proj = nn.Linear(3, 3)

        def forward(self, x):
            return self.proj(x.to(self.proj.weight.device, self.proj.weight.dtype))

    assert isinstance(to_batch_ensemble(Asks(), M).proj, BatchEnsembleLinear)


def test_members_of_other_convolutions_cannot_be_merged():
    network = timm.create_model("tf_mobilenetv3_small_minimal_100")
    with pytest.raises(
        ValueError, match=r"^conv_stem \(Conv2dSame\) cannot be converted: its memb"
    ):
        to_batch_ensemble(network, M, conv=LatentConv2d, linear=LatentLinear)
    architecture = {"name": "timm:tf_mobilenetv3_small_minimal_100", "num_classes": K}
    with pytest.raises(InputError, match="conv_stem"):
        build_student("latent_batch_ensemble", architecture, M)


def test_an_ensemble_has_at_least_one_member():
    with pytest.raises(ValueError, match="ensemble_size must be at least 1, not 0"):
        to_batch_ensemble(nn.Linear(2, 2), 0)


def test_rows_of_a_map_must_be_shared_out_evenly():
    ensemble = to_batch_ensemble(nn.Conv1d(2, 2, 1), 3)
    with pytest.raises(ValueError, match="5 rows cannot be shared out evenly among 3 members"):
        ensemble(torch.zeros(5, 2, 4))


# --- members ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["timm:resnet18", f"{OWN}vit", f"{OWN}resnet_v2", f"{OWN}levit"])
def test_members_of_good_networks_pass(name):
    options, side = ARCHITECTURES[name]
    ensemble = shaken(to_batch_ensemble(original(name, options), M)).train()
    check_members(ensemble, M, torch.rand(2, 3, side, side))
    assert ensemble.training


@pytest.mark.parametrize("kind", ["batch_ensemble", "latent_batch_ensemble"])
@pytest.mark.parametrize("name", ["tokens_first", "over_rows", "inner"])
def test_a_network_whose_rows_meet_or_whose_factors_are_passed_over_is_found(name, kind):
    """Also where factors are all 1, or logits all 0, at the start."""
    architecture = {"name": f"{OWN}{name}", "num_classes": K}
    student = build_student(kind, architecture, M)
    before = {key: it.clone() for key, it in student.state_dict().items()}
    x = torch.rand(4, 3, 8, 8)
    with pytest.raises(InputError, match=r"cannot be a BatchEnsemble \(member 0 has other logits"):
        student.check(x)
    assert all(torch.equal(it, before[key]) for key, it in student.state_dict().items())
    build_student("single", architecture, 1).check(x)


def test_a_map_is_a_member_alone():
    plain = shaken(original("timm:test_nfnet", {}).eval().double())
    ensemble = shaken(to_batch_ensemble(plain, M), seed=2)
    x = torch.rand(B, 3, 32, 32, dtype=torch.float64)
    explicit = Explicit(plain, ensemble)
    for j in range(M):
        same(member(ensemble, j)(x), explicit.member(j, x).detach(), 1e-8)


# --- factors at the start ---------------------------------------------------------------------

WIDE = [lambda: nn.Conv2d(400, 500, 1), lambda: nn.Linear(400, 500), lambda: nn.Conv1d(400, 500, 1)]


def factors(init, make, **options):
    torch.manual_seed(0)
    layer = to_batch_ensemble(make(), 8, init, **options)
    assert (layer.r.shape, layer.s.shape) == ((8, 400), (8, 500))
    return layer.r, layer.s


@pytest.mark.parametrize("make", WIDE)
@pytest.mark.parametrize("std", [0.5, 0.1])
def test_normal_factors_have_their_standard_deviation(std, make):
    for it in factors("normal", make, std=std):
        assert it.mean().item() == pytest.approx(1, abs=0.05 * std)
        assert it.std().item() == pytest.approx(std, rel=0.05)


@pytest.mark.parametrize("make", WIDE)
def test_signs_are_as_often_minus_as_plus(make):
    for it in factors("signs", make):
        assert it.unique().tolist() == [-1, 1]
        assert it.mean().item() == pytest.approx(0, abs=0.06)
        assert len({tuple(row.tolist()) for row in it}) == 8


@pytest.mark.parametrize("make", WIDE)
def test_an_unknown_start_is_refused(make):
    with pytest.raises(ValueError, match="'normal', 'signs' or 'ones', not 'zeros'"):
        to_batch_ensemble(make(), 2, "zeros")


@pytest.mark.parametrize("name", ["timm:resnet18", f"{OWN}vit", f"{OWN}resnet_v2"])
def test_with_ones_all_members_are_the_network(name):
    options, side = ARCHITECTURES[name]
    network = shaken(original(name, options).eval().double())
    x = torch.rand(B, 3, side, side, dtype=torch.float64)
    logits = to_batch_ensemble(network, M, "ones")(x.repeat(M, 1, 1, 1))
    same(logits, network(x).repeat(M, 1), 1e-10)


@pytest.mark.parametrize(("init", "values"), [("signs", [-1, 1]), ("ones", [1])])
def test_a_student_has_the_factors_that_it_is_told(init, values):
    architecture = {"name": f"{OWN}resnet_v2", "num_classes": K}
    student = build_student("batch_ensemble", architecture, M, init=init)
    found = [
        p.unique().tolist() for name, p in student.named_parameters() if name[-2:] in (".r", ".s")
    ]
    assert len(found) > 10
    assert all(it == values for it in found)
    assert student.spec["init"] == init


@pytest.mark.parametrize("kind", ["batch_ensemble", "latent_batch_ensemble"])
def test_a_parameter_that_is_called_as_a_factor_is_none(kind):
    architecture = {"name": f"{OWN}inner", "num_classes": K}
    options = {"init": "signs"} if kind == "batch_ensemble" else {}
    student = build_student(kind, architecture, M, **options)
    others, factors = (it["params"] for it in student.parameter_groups(0.1, 0.01))
    assert student.network.body.r.tolist() == [3, 4, 5]
    assert any(it is student.network.body.r for it in others)
    assert [tuple(it.shape) for it in factors] == [(M, 3), (M, 3), (M, 3), (M, K)]
    assert len(others) + len(factors) == len([*student.parameters()])


# --- the shape of networks --------------------------------------------------------------------


def test_a_layer_in_two_places_stays_one():
    layer = nn.Linear(4, 4)
    network = nn.Sequential(layer, nn.ReLU(), nn.Sequential(layer, nn.Linear(4, 2)))
    ensemble = to_batch_ensemble(network, M)
    assert ensemble[0] is ensemble[2][0]
    assert isinstance(ensemble[0], BatchEnsembleLinear)
    assert network[0] is layer
    assert len([*ensemble.parameters()]) == 8


def test_a_weight_of_two_layers_stays_one():
    network = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    network[1].weight = network[0].weight
    ensemble = to_batch_ensemble(network, M)
    assert ensemble[0].weight is ensemble[1].weight
    assert ensemble[0].weight is not network[0].weight
    assert ensemble[0].r is not ensemble[1].r


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda: nn.Conv2d(2, 2, 1), BatchEnsembleConv2d),
        (lambda: nn.Linear(2, 2), BatchEnsembleLinear),
        (lambda: nn.Conv1d(2, 2, 1), BatchEnsembleMap),
        (lambda: nn.ConvTranspose2d(2, 2, 2), BatchEnsembleMap),
    ],
)
def test_a_network_can_be_a_layer_alone(make, kind):
    network = make().eval()
    ensemble = to_batch_ensemble(network, M)
    assert type(ensemble) is kind
    assert not ensemble.training
    assert not isinstance(network, kind)


def test_no_random_number_is_drawn_but_for_factors():
    """So that members begin alike whatever is converted before."""
    torch.manual_seed(0)
    to_batch_ensemble(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(4, 2)), M, "ones")
    first = torch.rand(1)
    torch.manual_seed(0)
    nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(4, 2))
    assert torch.equal(first, torch.rand(1))
