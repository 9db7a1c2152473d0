"""Architectures by their published parameter counts; weights files round trip and break."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from ensdistill import InputError
from ensdistill.networks import (
    build_network,
    count_parameters,
    load_network,
    member_logits,
    predict,
    read_header,
    save_network,
)


@pytest.mark.parametrize(
    ("name", "classes", "count"),
    [
        ("resnet20", 10, 269_722),  # He et al. 2016, Table 6: 0.27M
        ("resnet32", 10, 464_154),  # 0.46M
        ("resnet110", 10, 1_727_962),  # 1.7M
        ("wrn28x10", 10, 36_479_194),  # Zagoruyko & Komodakis 2016, Table 4: 36.5M
        ("wrn28x10", 100, 36_536_884),
        ("wrn16x8", 10, 10_961_370),  # 11.0M
    ],
)
def test_parameter_counts_of_the_literature(name, classes, count):
    with torch.device("meta"):
        assert count_parameters(build_network(name, classes)) == count


def test_batch_ensemble_adds_only_factors_and_biases():
    plain, ensemble = build_network("resnet32", 10), build_network("resnet32", 10, ensemble_size=4)
    convolutions = [m for m in plain.modules() if isinstance(m, nn.Conv2d)]
    extra = 4 * sum(c.in_channels + 2 * c.out_channels for c in convolutions)
    extra += 4 * (64 + 2 * 10) - 10
    assert len(convolutions) == 31
    assert count_parameters(ensemble) - count_parameters(plain) == extra


@pytest.mark.parametrize("ensemble_size", [1, 2])
def test_convolutions_start_he_normal_fan_out(ensemble_size):
    network = build_network("resnet8", 10, in_channels=8, width=256, ensemble_size=ensemble_size)
    weight = network.stem.weight
    assert weight.std().item() == pytest.approx(math.sqrt(2 / (9 * 256)), rel=0.02)
    assert weight.mean().item() == pytest.approx(0, abs=1e-3)


def test_identity_shortcut_takes_every_second_pixel_and_pads_channels_with_zeros():
    block = build_network("resnet8", 10, width=4).blocks[1].eval()
    nn.init.zeros_(block.conv2.weight)
    x = torch.rand(2, 4, 6, 6)
    expected = torch.zeros(2, 8, 3, 3)
    for row in range(3):
        for column in range(3):
            expected[:, :4, row, column] = x[:, :, 2 * row, 2 * column]
    torch.testing.assert_close(block(x), expected)


def test_projection_shortcut_sees_the_activated_input():
    block = build_network("wrn10x2", 10, width=4).blocks[1].eval()
    nn.init.zeros_(block.conv2.weight)
    nn.init.uniform_(block.norm1.running_mean)
    x = torch.rand(2, 8, 6, 6)
    mean, var = (v.view(-1, 1, 1) for v in (block.norm1.running_mean, block.norm1.running_var))
    active = torch.clamp((x - mean) / torch.sqrt(var + 1e-5), min=0)[:, :, ::2, ::2]
    expected = torch.einsum("oi,nihw->nohw", block.shortcut.weight[:, :, 0, 0], active)
    torch.testing.assert_close(block(x), expected)


@pytest.mark.parametrize("name", ["resnet8", "wrn10x2"])
def test_gradients_come_back_in_the_layout_of_the_activations(name):
    network, gradients = build_network(name, 10), []
    for block in network.blocks:
        block.register_full_backward_hook(lambda *seen: gradients.extend([*seen[1], *seen[2]]))
    network(torch.rand(2, 3, 8, 8)).sum().backward()
    assert len(gradients) == 6
    for gradient in gradients:
        assert gradient.is_contiguous(memory_format=torch.channels_last)
        assert not gradient.is_contiguous()


def test_normalisation_is_inside():
    mean, std = [0.2, 0.4, 0.6], [0.1, 0.2, 0.3]
    torch.manual_seed(0)
    inside = build_network("resnet8", 10, mean=mean, std=std).eval()
    outside = build_network("resnet8", 10).eval()
    state = {k: v for k, v in inside.state_dict().items() if not k.startswith("normalize")}
    outside.load_state_dict(state, strict=False)
    x = torch.rand(2, 3, 16, 16)
    normalised = torch.stack([(x[:, c] - mean[c]) / std[c] for c in range(3)], dim=1)
    torch.testing.assert_close(inside(x), outside(normalised))


@pytest.mark.parametrize("name", ["resnet31", "resnet2", "wrn28", "wrn27x10", "vgg16", "wrn28x0"])
def test_networks_that_do_not_exist_are_refused(name):
    with pytest.raises(ValueError, match=name):
        build_network(name, 10)


def test_unknown_options_are_refused():
    with pytest.raises(ValueError, match="dropout"):
        build_network("resnet8", 10, dropout=0.1)


def test_member_logits_give_every_member_the_same_images():
    torch.manual_seed(0)
    network = build_network("resnet8", 5, ensemble_size=3).eval()
    x = torch.rand(4, 3, 8, 8)
    together = member_logits(network, x)
    assert together.shape == (3, 4, 5)
    for n in range(4):
        alone = network(x[n].expand(3, -1, -1, -1))
        torch.testing.assert_close(together[:, n], alone, rtol=1e-4, atol=1e-5)


def test_predict_does_not_depend_on_the_batch_size_and_restores_the_mode():
    torch.manual_seed(0)
    network = build_network("resnet8", 5, ensemble_size=2)
    images = torch.randint(0, 256, (11, 3, 8, 8), dtype=torch.uint8)
    whole, parts = predict(network, images), predict(network, images, batch_size=4)
    np.testing.assert_allclose(whole, parts, rtol=1e-4, atol=1e-5)
    assert whole.shape == (11, 2, 5)
    assert network.training
    with torch.no_grad():
        expected = member_logits(network.eval(), images.float() / 255).transpose(0, 1)
    np.testing.assert_allclose(whole, expected.numpy(), rtol=1e-4, atol=1e-5)


@pytest.fixture
def saved(tmp_path):
    architecture = {"name": "resnet8", "num_classes": 4, "in_channels": 1, "ensemble_size": 2}
    architecture |= {"width": 4, "mean": [0.3], "std": [0.2]}
    torch.manual_seed(1)
    network = build_network(**architecture)
    path = tmp_path / "weights.safetensors"
    save_network(path, network, architecture, {"study": "s", "seed": 1})
    return path, network


def test_a_weights_file_is_enough_to_get_the_network_back(saved):
    path, network = saved
    loaded = load_network(path)
    for key, value in network.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert read_header(path)["seed"] == 1


def test_the_same_network_gives_the_same_bytes(saved, tmp_path):
    path, network = saved
    header = read_header(path)
    architecture = header.pop("architecture")
    save_network(tmp_path / "again", network, architecture, header)
    assert path.read_bytes() == (tmp_path / "again").read_bytes()


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[: len(data) // 2],
        lambda data: b"",
        lambda data: b"not safetensors at all",
        lambda data: data.replace(b"resnet8", b"resnet9"),
        lambda data: data.replace(b'num_classes\\": 4', b'num_classes\\": 5'),
        lambda data: data.replace(b"ensdistill", b"something!", 1),
    ],
)
def test_damaged_weights_are_named_in_one_sentence(saved, damage):
    path, _ = saved
    data = path.read_bytes()
    assert damage(data) != data
    path.write_bytes(damage(data))
    with pytest.raises(InputError) as caught:
        load_network(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_nothing_that_takes_long_is_imported_for_a_network_or_its_training(saved):
    path, _ = saved
    code = (
        "import sys; from ensdistill.networks import load_network; import ensdistill.training; "
        f"load_network({str(path)!r}); "
        "print({'torch._dynamo', 'torchvision', 'sklearn', 'matplotlib', 'scipy.optimize'}"
        " & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_missing_weights_are_named(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        load_network(tmp_path / "weights.safetensors")
