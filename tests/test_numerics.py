"""Wrong kernels are found, right ones are not; precision follows the processor."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from ensdistill import InputError, numerics
from ensdistill.batch_ensemble import BatchEnsembleConv2d
from ensdistill.networks import build_network
from ensdistill.numerics import check_gradients, choose_precision, set_float32
from ensdistill.perturbations import ods_direction

CPU = torch.device("cpu")


class Mode(TorchDispatchMode):
    @classmethod
    def _should_skip_dynamo(cls):
        return False  # or PyTorch would import its compiler, which takes seconds


class BrokenKernel(Mode):
    """One operation gives a wrong result, but not in float64, as a faulty kernel of a library.

    Args:
        name: of the operation.
        shape: of one of its arguments; other calls are right.
        index: which of the operation's results is wrong.
        wrong: what the result becomes.
    """

    def __init__(self, name, shape, index, wrong):
        super().__init__()
        self.name, self.shape, self.index, self.wrong = name, shape, index, wrong
        self.calls = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
        single = any(tensor.dtype != torch.float64 for tensor in tensors)
        named = operation.name().partition(".")[0] == f"aten::{self.name}"
        if named and single and any(tensor.shape == self.shape for tensor in tensors):
            self.calls += 1
            if self.index is None:
                return self.wrong(result)
            changed = list(result)
            changed[self.index] = self.wrong(changed[self.index])
            return tuple(changed)
        return result


def member_logits(model, x):
    sizes = (getattr(module, "ensemble_size", None) for module in model.modules())
    members = next(filter(None, sizes), 1)
    return model(x.repeat(members, 1, 1, 1)).float().unflatten(0, (members, len(x)))


def loss(model, x, y):
    logits = member_logits(model, x)
    return F.cross_entropy(logits.flatten(0, 1), y.repeat(len(logits)))


def batch(size=6, channels=1, side=8):
    generator = torch.Generator().manual_seed(3)
    x = torch.rand(size, channels, side, side, generator=generator)
    return x, torch.arange(size) % 4


def network(members=1, name="resnet8"):
    torch.manual_seed(0)
    return build_network(name, 4, in_channels=1, width=4, ensemble_size=members)


def one_filter(gradient):
    changed = gradient.clone()
    changed[0] = 81 * changed[0]
    return changed


FAULTS = {
    "81 times": lambda tensor: 81 * tensor,
    "sign": lambda tensor: -tensor,
    "zero": torch.zeros_like,
    "NaN": lambda tensor: tensor * float("nan"),
    "one filter": one_filter,
}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("fault", FAULTS)
def test_one_wrong_weight_gradient_among_all_layers_is_refused_by_name(fault, precision):
    x, y = batch()
    broken = BrokenKernel("convolution_backward", (8, 4, 3, 3), 1, FAULTS[fault])
    with broken, pytest.raises(InputError, match=r"at blocks\.1\.conv1\.weight: ") as caught:
        check_gradients(network(), x, y, loss, precision)
    assert broken.calls == 1
    assert "\n" not in str(caught.value)
    if fault == "81 times":
        assert "off by 80 times" in str(caught.value)


@pytest.mark.parametrize(
    ("members", "operation", "shape", "index", "layer"),
    [
        (3, "convolution_backward", (8, 4, 3, 3), 1, "at blocks.1.conv1.weight"),
        (3, "convolution_backward", (16, 8, 3, 3), 0, "at blocks.2.conv1.weight"),
        (1, "convolution", (16, 8, 3, 3), None, "at blocks.2.conv1.weight"),
        (1, "mm", (4, 6), None, "next to head.weight"),
        (1, "addmm", (16, 4), None, "at head.weight"),
        (1, "native_batch_norm_backward", (6, 16, 2, 2), 1, "at blocks.2.norm2.weight"),
        (1, "threshold_backward", (6, 16, 2, 2), None, "next to head.weight"),
    ],
)
@pytest.mark.parametrize("wrong", [FAULTS["sign"], FAULTS["zero"]])
def test_wrong_operations_of_every_kind_are_refused(
    members, operation, shape, index, layer, wrong, form
):
    x, y = batch()
    broken = BrokenKernel(operation, shape, index, wrong)
    with broken, pytest.raises(InputError, match=f"gradients {layer}: "):
        check_gradients(network(members), x, y, loss, "fp32")
    assert broken.calls


class Transformer(nn.Module):
    """Patches, attention, dropout, and a parameter of its own beside its layers."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(1, 8, 4, stride=4)
        self.position = nn.Parameter(torch.randn(4, 8))
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.3, batch_first=True)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2) + self.position
        return self.head(self.layer(x).mean(1))


def convolutions():
    """Biases before batch normalisation (gradient 0), one position, pooling, in-place layers."""
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 6, 3, groups=3, bias=False),
        nn.GroupNorm(2, 6),
        nn.GELU(),
        nn.Conv2d(6, 8, 2),
        nn.BatchNorm2d(8),
        nn.SiLU(inplace=True),
        nn.AdaptiveAvgPool2d(1),
        nn.BatchNorm2d(8),
        nn.Dropout(0.5),
        nn.Flatten(),
        nn.Linear(8, 4),
    )


SOUND = {
    "plain": network,
    "BatchEnsemble": lambda: network(3),
    "wide": lambda: network(name="wrn10x1"),
    "convolutions": convolutions,
    "transformer": Transformer,
    "saturated": lambda: nn.Sequential(nn.Flatten(), Scaled(1e4), nn.Linear(64, 4)),
}


class Scaled(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return self.factor * x


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", SOUND)
@pytest.mark.parametrize("size", [2, 6])
def test_sound_networks_pass_and_nothing_of_them_changes(kind, size, precision):
    torch.manual_seed(1)
    model = SOUND[kind]().eval()
    before = copy.deepcopy(model.state_dict())
    x, y = batch(size)
    state = torch.get_rng_state()
    check_gradients(model, x, y, loss, precision)
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module.training for module in model.modules())
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert all(parameter.grad is None for parameter in model.parameters())


def test_check_computes_every_operation_of_both_passes(monkeypatch):
    seen = []
    compare = numerics._EveryOperation._compare

    def spied(self, operation, call, inputs, result, reference):
        assert reference is not NotImplemented, operation
        seen.append(operation.name())
        compare(self, operation, call, inputs, result, reference)

    monkeypatch.setattr(numerics._EveryOperation, "_compare", spied)
    check_gradients(network(), *batch(), loss, "fp32")
    assert seen.count("aten::convolution") == 7
    assert seen.count("aten::convolution_backward") == 7
    assert seen.count("aten::native_batch_norm_backward") == 7


def test_large_networks_are_checked_with_few_images(monkeypatch):
    sizes = []

    def spied(model, x, y):
        sizes.append(len(x))
        return loss(model, x, y)

    monkeypatch.setattr(numerics, "MOST_WORK", 1)
    check_gradients(network(), *batch(6), spied, "fp32")
    assert sizes == [2]


@pytest.mark.parametrize(
    ("machine", "onednn", "avx512", "amx", "expected"),
    [
        ("x86_64", True, True, False, "bf16"),
        ("x86_64", True, False, True, "bf16"),
        ("x86_64", True, False, False, "fp32"),  # AVX-512: oneDNN emulates bfloat16
        ("x86_64", False, False, False, "fp32"),  # AVX2
        ("x86_64", False, True, True, "fp32"),  # without oneDNN, or kept from it
        ("aarch64", True, False, False, "bf16"),
        ("aarch64", False, False, False, "fp32"),
    ],
)
def test_bfloat16_is_used_where_the_cpu_has_it(machine, onednn, avx512, amx, expected, monkeypatch):
    monkeypatch.setattr(numerics.platform, "machine", lambda: machine)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: onednn)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    used, reason = choose_precision("bf16", CPU)
    assert used == expected
    assert ("no instructions for bfloat16" in reason) == (expected == "fp32")


@pytest.mark.parametrize("asked", ["bf16", "tf32"])
@pytest.mark.parametrize("able", [True, False])
def test_a_gpu_is_asked_for_hardware_not_emulation(asked, able, monkeypatch):
    monkeypatch.setattr(
        torch.cuda,
        "is_bf16_supported",
        lambda including_emulation=True: including_emulation or able,
    )
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    used, reason = choose_precision(asked, torch.device("cuda"))
    assert used == (asked if able else "fp32")
    assert "Some GPU" in reason


def test_float32_and_tf32_on_a_cpu_are_float32():
    assert choose_precision("fp32", CPU)[0] == "fp32"
    assert choose_precision("tf32", CPU)[0] == "fp32"


@pytest.mark.parametrize(
    ("precision", "mode"), [("tf32", "tf32"), ("fp32", "ieee"), ("bf16", "ieee")]
)
def test_a_gpu_computes_float32_unless_tf32_is_asked_for(precision, mode):
    flags = torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn
    before = [flag.fp32_precision for flag in flags]
    try:
        set_float32(precision)
        assert [flag.fp32_precision for flag in flags] == [mode] * 3
        assert torch.backends.cudnn.allow_tf32 == (mode == "tf32")  # no contradiction, which raises
        assert torch.backends.cuda.matmul.allow_tf32 == (mode == "tf32")
    finally:
        torch.backends.cudnn.allow_tf32 = True
        torch.backends.cuda.matmul.allow_tf32 = False
        for flag, value in zip(flags, before, strict=True):
            flag.fp32_precision = value


def moved_pixels(model, x, step):
    """What a step of the pixels changes in the stem's input, in units of the pixel range."""
    seen = []
    handle = model.stem.register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0]))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        member_logits(model, x), member_logits(model, x + step)
    handle.remove()
    return (seen[1].double() - seen[0].double()) * model.normalize.std.double()


@pytest.mark.parametrize("name", ["resnet8", "wrn10x1"])
@pytest.mark.parametrize("members", [1, 2])
def test_a_small_step_reaches_the_stem_under_bfloat16(name, members):
    torch.manual_seed(0)
    model = build_network(name, 4, width=4, ensemble_size=members, mean=[0.5] * 3, std=[0.25] * 3)
    x = torch.randint(1, 255, (8, 3, 8, 8)) / 255
    step = torch.randn(x.shape) / 255
    moved = moved_pixels(model.eval(), x, step)
    expected = step.double().repeat(members, 1, 1, 1)
    torch.testing.assert_close(moved, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["resnet8", "wrn10x1"])
@pytest.mark.parametrize("members", [1, 2])
def test_stem_and_head_compute_in_float32_under_bfloat16(name, members, form):
    model, (x, _) = network(members, name).eval(), batch()
    outputs = {"stem": [], "head": []}
    for layer, seen in outputs.items():
        getattr(model, layer).register_forward_hook(lambda _, inputs, out, to=seen: to.append(out))
    rows = x.repeat(members, 1, 1, 1)
    with torch.no_grad():
        model(rows)
        with torch.autocast("cpu", torch.bfloat16):
            model(rows)
    exact, rounded = outputs["stem"]
    assert torch.equal(exact, rounded)
    assert outputs["head"][1].dtype == torch.float32


def test_ods_direction_under_bfloat16_is_a_float32_gradient():
    model, (x, _) = network().eval(), batch()
    with torch.autocast("cpu", torch.bfloat16):
        epsilon = ods_direction(model, x, 1.0)
    assert epsilon.dtype == torch.float32
    # More than the 8 bits of bfloat16 are used.
    assert not torch.equal(epsilon, epsilon.bfloat16().float())


@pytest.mark.parametrize("members", [1, 2])
def test_no_convolution_of_ours_has_one_position_and_a_stride(members):
    # oneDNN computes wrong weight gradients for it on AVX2 with fewer than 8 channels.
    class Seen(Mode):
        calls = 0

        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            if operation.name() == "aten::convolution":
                self.calls += 1
                one, strides = args[1].shape[2:] == (1, 1), args[3]
                assert not (one and max(strides) > 1)
            return operation(*args, **(kwargs or {}))

    with Seen() as seen:
        loss(network(members, "wrn10x1"), *batch())
        BatchEnsembleConv2d(4, 8, 1, ensemble_size=1, stride=2)(torch.rand(2, 4, 5, 5))
    assert seen.calls
