"""Residual networks for small images; every kind of layers makes one from the same code."""

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from operator import attrgetter
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ensdistill.architectures import parse_architecture
from ensdistill.batch_ensemble import BatchEnsembleConv2d, subsample
from ensdistill.convert import batch_ensemble_layers
from ensdistill.graphs import norms_behind_convolutions, replace
from ensdistill.layers import Layers, Normalize, autocast_dtype, in_float32, plain_layers
from ensdistill.libraries import (
    LibraryNetwork,
    given_network,
    own_network,
    pretrained_statistics,
    timm_network,
    torchvision_network,
)


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
    last = "head"
    """The name of the last layer."""

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
            x = self.stem_norm(x.to(autocast_dtype(x)))
            x = x if self.pre_activation else F.relu_(x)
        x = self.blocks(x)
        if self.pre_activation and self.final_norm is not None:
            x = F.relu_(self.final_norm(x))
        return x if self.head is None else in_float32(self._head, x)

    def _stem(self, x: Tensor) -> Tensor:
        return self.stem(self.normalize(x).contiguous(memory_format=torch.channels_last))

    def _head(self, x: Tensor) -> Tensor:
        return self.head(x.permute(0, 2, 3, 1).flatten(1, 2).mean(1))


def resnet(depth: int, *, width: int = 16, **options: Any) -> ResidualNetwork:
    """A ResNet for small images, of 6n + 2 layers [He et al. 2016a, §4.2].

    >>> from ensdistill.layers import plain_layers
    >>> sizes = {"num_classes": 10, "in_channels": 1, "mean": [0.0], "std": [1.0]}
    >>> len(resnet(20, layers=plain_layers(), **sizes).blocks)  # of two layers each
    9
    """
    return ResidualNetwork(
        BasicBlock,
        blocks_per_stage=depth // 6,
        stem_channels=width,
        stage_channels=[width, 2 * width, 4 * width],
        **options,
    )


def wrn(depth: int, widen: int, *, width: int = 16, **options: Any) -> ResidualNetwork:
    """A wide residual network of 6n + 4 layers, k = `widen` [Zagoruyko & Komodakis 2016]."""
    return ResidualNetwork(
        PreActivationBlock,
        blocks_per_stage=depth // 6,
        stem_channels=width,
        stage_channels=[width * widen, 2 * width * widen, 4 * width * widen],
        **options,
    )


ARCHITECTURES: dict[str, Callable[..., nn.Module]] = {
    "resnet": resnet,
    "wrn": wrn,
    "timm": timm_network,
    "torchvision": torchvision_network,
    "file": own_network,
    "module": given_network,
}
"""Builders by family; architectures.ARCHITECTURES says how their names are written.

A builder takes what its names say; num_classes, in_channels, mean and std as `build_network`; the
`Layers` that the network is made of; and options of its own, by keyword.
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
        name: `resnet{6n+2}` such as resnet32 [He et al. 2016a, §4.2], `wrn{6n+4}x{k}` such as
            wrn28x10 [Zagoruyko & Komodakis 2016], `timm:<model>`, `torchvision:<model>` or
            `file:<path>:<function>` (see libraries.py).
        num_classes: K.
        in_channels: C.
        ensemble_size: M; above 1 every convolution and linear layer is a BatchEnsemble layer,
            with member biases, and batch normalisation is shared by all members.
        layers: what it is made of, if it is neither plain nor a BatchEnsemble.
        **options: `mean` and `std`, per channel, of the pixels in [0, 1] (default 0 and 1); `width`
            of a resnet or wrn, the channels of the first stage (16 unless told; times k in a WRN);
            of the others `pretrained` and `options`, as of `libraries.timm_network`.

    Raises:
        ValueError: the name or an option is unknown, or no such depth exists.
        InputError: see libraries.py.

    Example:
        >>> network = build_network("resnet32", num_classes=10)
        >>> sum(parameter.numel() for parameter in network.parameters())
        464154
    """
    family, given = parse_architecture(name)
    builder = ARCHITECTURES[family]
    takes = inspect.signature(builder).parameters.values()
    known = {it.name for it in takes if it.kind is it.KEYWORD_ONLY} | {"mean", "std"}
    if unknown := options.keys() - known:
        raise ValueError(f"unknown network option {', '.join(map(repr, sorted(unknown)))}")
    if layers is None:
        layers = plain_layers() if ensemble_size == 1 else batch_ensemble_layers(ensemble_size)
    network = builder(
        **given,
        num_classes=num_classes,
        in_channels=in_channels,
        layers=layers,
        **{"mean": [0.0] * in_channels, "std": [1.0] * in_channels, **options},
    )
    return network.to(memory_format=torch.channels_last)


def described(architecture: Mapping[str, Any], images: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `build_network` for an architecture of config.yaml.

    Mean and std of the pixels are those of the architecture, or else those that its pretrained
    weights were trained with, or else the images'.

    Args:
        architecture: of `studies.Study.parts`.
        images: as `read_description` returns.

    Example:
        >>> images = {"shape": (1, 8, 8), "classes": ["a", "b"], "mean": [0.3], "std": [0.4]}
        >>> made = described({"name": "resnet8", "width": 4}, images)
        >>> made["num_classes"], made["in_channels"], made["mean"]
        (2, 1, [0.3])
    """
    family, given = parse_architecture(architecture["name"])
    channels = images["shape"][0]
    statistics = {key: images[key] for key in ("mean", "std")}
    if architecture.get("pretrained"):
        statistics |= pretrained_statistics(family, given.get("model", ""), channels)
    sizes = {"num_classes": len(images["classes"]), "in_channels": channels}
    return {**architecture, **sizes, **statistics}


def fold_batch_norms(network: nn.Module) -> nn.Module:
    """The same function with fewer operations, for a plain network that is not trained any more.

    A batch normalisation right after a convolution, with fixed statistics, becomes part of it:
    W' = W·γ/√(σ² + ε), b' = β − μ·γ/√(σ² + ε) [Jacob et al. 2018, §3.2]. Logits are the same but
    for rounding.

    Args:
        network: in eval mode; it is changed.

    Example:
        >>> network = build_network("resnet8", 10, in_channels=1, width=4).eval()
        >>> x = torch.rand(2, 1, 8, 8)
        >>> before = network(x)
        >>> folded = fold_batch_norms(network)
        >>> torch.allclose(folded(x), before, atol=1e-4)
        True
        >>> any(isinstance(it, nn.BatchNorm2d) for it in folded.modules())
        False
    """
    for module, conv, norm in norms_to_fold(network):
        statistics: Any = module.get_submodule(norm)
        replace(module, conv, fuse_conv_bn_eval(cast(Any, module.get_submodule(conv)), statistics))
        replace(module, norm, without_norm(statistics))
    return network.to(memory_format=torch.channels_last)


def norms_to_fold(network: nn.Module) -> Iterator[tuple[nn.Module, str, str]]:
    """Modules that have a convolution and a batch normalisation behind it, and their names."""
    others: set[nn.Module] = set()
    for module in list(network.modules()):
        if isinstance(module, LibraryNetwork | GraphModule):
            pairs = norms_behind_convolutions(module)
            others |= {*module.modules()}
        elif module not in others:
            pairs = [*getattr(module, "normalized", ())]
        else:
            continue
        for conv, norm in pairs:
            if isinstance(attrgetter(norm)(module), nn.BatchNorm2d):  # parts of a split are None
                yield module, conv, norm


def without_norm(norm: nn.BatchNorm2d) -> nn.Module:
    """What is left of it once its statistics are elsewhere: timm has some with an activation."""
    rest = [getattr(norm, name) for name in ("drop", "act") if hasattr(norm, name)]
    return nn.Sequential(*rest) if rest else nn.Identity()
