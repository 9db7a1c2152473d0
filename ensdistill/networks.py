"""Residual networks for small images; every kind of layers makes one from the same code."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ensdistill.architectures import parse_architecture
from ensdistill.batch_ensemble import BatchEnsembleConv2d, batch_ensemble_layers, subsample
from ensdistill.layers import Layers, plain_layers


class Normalize(nn.Module):
    """(x − mean) / std per channel, so that everything outside a network is in pixel units."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


def in_float32(module: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """module(x) without autocast where autocast is on; x is converted to float32 then."""
    device = x.device.type
    if not torch.is_autocast_enabled(device):
        return module(x)
    with torch.autocast(device, enabled=False):
        return module(x.float())


class BasicBlock(nn.Module):
    """Two 3×3 convolutions with a zero-padded identity shortcut [He et al. 2016a, option A]."""

    normalized = (("conv1", "norm1"), ("conv2", "norm2"))

    def __init__(self, layers: Layers, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.conv1 = layers.conv(in_channels, out_channels, 3, stride=stride, padding=1)
        self.norm1 = nn.BatchNorm2d(out_channels)
        self.conv2 = layers.conv(out_channels, out_channels, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.stride, self.packed = stride, layers.packed
        self.channels = in_channels // layers.packed
        self.padding = (out_channels - in_channels) // layers.packed

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu_(self.norm1(self.conv1(x)))
        out = self.norm2(self.conv2(out))
        if self.stride != 1 or self.padding:
            x = subsample(x, self.stride).permute(0, 2, 3, 1)  # channels last, for F.pad
            x = F.pad(x.unflatten(3, (self.packed, self.channels)), (0, self.padding))
            x = x.flatten(3).permute(0, 3, 1, 2)
        return F.relu_(out.add_(x))


class PreActivationBlock(nn.Module):
    """BN-ReLU-conv twice, 1×1 projection where the shape changes [Zagoruyko & Komodakis 2016]."""

    normalized = (("conv1", "norm2"),)

    def __init__(self, layers: Layers, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.norm1 = nn.BatchNorm2d(in_channels)
        self.conv1 = layers.conv(in_channels, out_channels, 3, stride=stride, padding=1)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.conv2 = layers.conv(out_channels, out_channels, 3, padding=1)
        changes = stride != 1 or in_channels != out_channels
        self.shortcut = layers.conv(in_channels, out_channels, 1) if changes else None
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu_(self.norm1(x))
        out = self.conv2(F.relu_(self.norm2(self.conv1(active))))
        if self.shortcut is None:
            return out + x
        return out + self.shortcut(active if self.stride == 1 else subsample(active, self.stride))


class ResidualNetwork(nn.Module):
    """Normalisation, a 3×3 stem, three stages of residual blocks, global average, linear layer.

    Under bfloat16 autocast normalisation, stem, average and linear layer compute in float32.

    Shape:
        input (rows, C, H, W) in [0, 1] → logits (rows, K). How rows, C and K belong to members is
        the affair of the layers.
    """

    normalized = (("stem", "stem_norm"),)

    def __init__(
        self,
        block: type[nn.Module],
        blocks_per_stage: int,
        stem_channels: int,
        stage_channels: Sequence[int],
        num_classes: int,
        in_channels: int,
        layers: Layers,
        mean: Sequence[float],
        std: Sequence[float],
    ):
        super().__init__()
        self.normalize = Normalize(mean, std)
        self.stem = (layers.stem or layers.conv)(in_channels, stem_channels, 3, padding=1)
        pre_activation = block is PreActivationBlock
        self.stem_norm = nn.Identity() if pre_activation else nn.BatchNorm2d(stem_channels)
        blocks, channels = [], stem_channels
        for stage, out_channels in enumerate(stage_channels):
            for index in range(blocks_per_stage):
                stride = 2 if stage > 0 and index == 0 else 1
                blocks.append(block(layers, channels, out_channels, stride))
                channels = out_channels
        self.blocks = nn.Sequential(*blocks)
        self.blocks_per_stage = blocks_per_stage
        self.final_norm = nn.BatchNorm2d(channels) if pre_activation else nn.Identity()
        self.pre_activation = pre_activation
        self.head = layers.linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | BatchEnsembleConv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                # PyTorch takes the outputs of all groups for the fan-out of each.
                if (groups := getattr(module, "groups", 1)) > 1:
                    module.weight.data *= math.sqrt(groups)

    def forward(self, x: Tensor) -> Tensor:
        # Parts that `hydra.split` has taken away are None.
        if self.stem is not None:
            # bfloat16 pixels would lose a sixth of a perturbation with η = 1/255.
            x = in_float32(self._stem, x)
            if torch.is_autocast_enabled(x.device.type):
                x = x.to(torch.get_autocast_dtype(x.device.type))
            x = self.stem_norm(x)
            x = x if self.pre_activation else F.relu_(x)
        x = self.blocks(x)
        if self.pre_activation and self.final_norm is not None:
            x = F.relu_(self.final_norm(x))
        return x if self.head is None else in_float32(self._head, x)

    def _stem(self, x: Tensor) -> Tensor:
        return self.stem(self.normalize(x).contiguous(memory_format=torch.channels_last))

    def _head(self, x: Tensor) -> Tensor:
        return self.head(x.permute(0, 2, 3, 1).flatten(1, 2).mean(1))


def resnet(depth: int, width: int, **options: Any) -> ResidualNetwork:
    """A ResNet for small images, of 6n + 2 layers [He et al. 2016a, §4.2]."""
    return ResidualNetwork(
        BasicBlock,
        blocks_per_stage=depth // 6,
        stem_channels=width,
        stage_channels=[width, 2 * width, 4 * width],
        **options,
    )


def wrn(depth: int, widen: int, width: int, **options: Any) -> ResidualNetwork:
    """A wide residual network of 6n + 4 layers, k = `widen` [Zagoruyko & Komodakis 2016]."""
    return ResidualNetwork(
        PreActivationBlock,
        blocks_per_stage=depth // 6,
        stem_channels=width,
        stage_channels=[width * widen, 2 * width * widen, 4 * width * widen],
        **options,
    )


ARCHITECTURES: dict[str, Callable[..., nn.Module]] = {"resnet": resnet, "wrn": wrn}
"""Builders by family; methods.ARCHITECTURES says how their names are written.

A builder takes the sizes in the name, `width`, num_classes, in_channels, mean and std as
`build_network`, and the `Layers` that it is made of.
"""


def build_network(
    name: str,
    num_classes: int,
    in_channels: int = 3,
    ensemble_size: int = 1,
    layers: Layers | None = None,
    **options: Any,
) -> nn.Module:
    """A network by name, in channels_last memory format: (M·B, C, H, W) → (M·B, K).

    Args:
        name: `resnet{6n+2}` such as resnet32 [He et al. 2016a, §4.2], or `wrn{6n+4}x{k}` such as
            wrn28x10 [Zagoruyko & Komodakis 2016].
        num_classes: K.
        in_channels: C.
        ensemble_size: M; above 1 every convolution and linear layer is a BatchEnsemble layer,
            with member biases, and batch normalisation is shared by all members.
        layers: what it is made of, if it is neither plain nor a BatchEnsemble.
        **options: `width`, the channels of the first stage (16 unless told; times k in a WRN);
            `mean` and `std`, per channel, of the pixels in [0, 1] (default 0 and 1).

    Raises:
        ValueError: the name or an option is unknown, or no such depth exists.

    Example:
        >>> network = build_network("resnet32", num_classes=10)
        >>> sum(parameter.numel() for parameter in network.parameters())
        464154
    """
    defaults = {"width": 16, "mean": [0.0] * in_channels, "std": [1.0] * in_channels}
    if unknown := options.keys() - defaults.keys():
        raise ValueError(f"unknown network option {', '.join(map(repr, sorted(unknown)))}")
    if layers is None:
        layers = plain_layers() if ensemble_size == 1 else batch_ensemble_layers(ensemble_size)
    family, sizes = parse_architecture(name)
    network = ARCHITECTURES[family](
        **sizes,
        num_classes=num_classes,
        in_channels=in_channels,
        layers=layers,
        **(defaults | options),
    )
    return network.to(memory_format=torch.channels_last)


def fold_batch_norms(network: nn.Module) -> nn.Module:
    """The same function with fewer operations, for a plain network that is not trained any more.

    A batch normalisation right after a convolution, with fixed statistics, becomes part of it:
    W' = W·γ/√(σ² + ε), b' = β − μ·γ/√(σ² + ε) [Jacob et al. 2018, §3.2]. Logits are the same but
    for rounding.

    Args:
        network: in eval mode; it is changed.
    """
    for module in list(network.modules()):
        for conv, norm in getattr(module, "normalized", ()):
            if isinstance(statistics := getattr(module, norm), nn.BatchNorm2d):
                setattr(module, conv, fuse_conv_bn_eval(getattr(module, conv), statistics))
                setattr(module, norm, nn.Identity())
    return network.to(memory_format=torch.channels_last)
