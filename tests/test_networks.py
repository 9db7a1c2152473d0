"""Architectures by their published parameter counts, and by what their layers compute."""

import math

import pytest
import torch
from torch import nn

from ensdistill.networks import build_network
from ensdistill.students import count_parameters


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
