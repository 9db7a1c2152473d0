"""Residual networks for small images, plain or as BatchEnsembles, from the same code."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.overrides import TorchFunctionMode

from ensdistill import DamagedFile, InputError
from ensdistill.batch_ensemble import BatchEnsembleConv2d, BatchEnsembleLinear, subsample
from ensdistill.files import atomic
from ensdistill.studies import parse_network_name

Layer = Callable[..., nn.Module]


class Normalize(nn.Module):
    """(x − mean) / std per channel, so that everything outside a network is in pixel units."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


def in_float32(layers: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """layers(x) without autocast where autocast is on; x is converted to float32 then."""
    device = x.device.type
    if not torch.is_autocast_enabled(device):
        return layers(x)
    with torch.autocast(device, enabled=False):
        return layers(x.float())


class BasicBlock(nn.Module):
    """Two 3×3 convolutions with a zero-padded identity shortcut [He et al. 2016a, option A]."""

    normalized = (("conv1", "norm1"), ("conv2", "norm2"))

    def __init__(self, conv: Layer, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.conv1 = conv(in_channels, out_channels, 3, stride=stride, padding=1)
        self.norm1 = nn.BatchNorm2d(out_channels)
        self.conv2 = conv(out_channels, out_channels, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.stride, self.padding = stride, out_channels - in_channels

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu_(self.norm1(self.conv1(x)))
        out = self.norm2(self.conv2(out))
        if self.stride != 1 or self.padding:
            x = subsample(x, self.stride).permute(0, 2, 3, 1)  # channels last, for F.pad
            x = F.pad(x, (0, self.padding)).permute(0, 3, 1, 2)
        return F.relu_(out.add_(x))


class PreActivationBlock(nn.Module):
    """BN-ReLU-conv twice, 1×1 projection where the shape changes [Zagoruyko & Komodakis 2016]."""

    normalized = (("conv1", "norm2"),)

    def __init__(self, conv: Layer, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.norm1 = nn.BatchNorm2d(in_channels)
        self.conv1 = conv(in_channels, out_channels, 3, stride=stride, padding=1)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.conv2 = conv(out_channels, out_channels, 3, padding=1)
        changes = stride != 1 or in_channels != out_channels
        self.shortcut = conv(in_channels, out_channels, 1) if changes else None
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
        input (M·B, C, H, W) in [0, 1], member-major → logits (M·B, K). M is `ensemble_size`.
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
        ensemble_size: int,
        mean: Sequence[float],
        std: Sequence[float],
    ):
        super().__init__()
        self.ensemble_size = ensemble_size
        conv: Layer
        linear: Layer
        if ensemble_size > 1:
            conv = partial(BatchEnsembleConv2d, ensemble_size=ensemble_size)
            linear = partial(BatchEnsembleLinear, ensemble_size=ensemble_size)
        else:
            conv, linear = partial(nn.Conv2d, bias=False), nn.Linear
        self.normalize = Normalize(mean, std)
        self.stem = conv(in_channels, stem_channels, 3, padding=1)
        pre_activation = block is PreActivationBlock
        self.stem_norm = nn.Identity() if pre_activation else nn.BatchNorm2d(stem_channels)
        blocks, channels = [], stem_channels
        for stage, out_channels in enumerate(stage_channels):
            for index in range(blocks_per_stage):
                stride = 2 if stage > 0 and index == 0 else 1
                blocks.append(block(conv, channels, out_channels, stride))
                channels = out_channels
        self.blocks = nn.Sequential(*blocks)
        self.final_norm = nn.BatchNorm2d(channels) if pre_activation else nn.Identity()
        self.pre_activation = pre_activation
        self.head = linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | BatchEnsembleConv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        # bfloat16 pixels would lose a sixth of a perturbation with η = 1/255.
        x = in_float32(self._stem, x)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        x = self.stem_norm(x)
        x = self.blocks(x if self.pre_activation else F.relu_(x))
        x = F.relu_(self.final_norm(x)) if self.pre_activation else x
        return in_float32(self._head, x)

    def _stem(self, x: Tensor) -> Tensor:
        return self.stem(self.normalize(x).contiguous(memory_format=torch.channels_last))

    def _head(self, x: Tensor) -> Tensor:
        return self.head(x.permute(0, 2, 3, 1).flatten(1, 2).mean(1))


def build_network(
    name: str, num_classes: int, in_channels: int = 3, ensemble_size: int = 1, **options
) -> ResidualNetwork:
    """A network by name, in channels_last memory format.

    Args:
        name: `resnet{6n+2}` such as resnet32 [He et al. 2016a, §4.2], or `wrn{6n+4}x{k}` such as
            wrn28x10 [Zagoruyko & Komodakis 2016].
        num_classes: K.
        in_channels: C.
        ensemble_size: M; above 1 every convolution and linear layer is a BatchEnsemble layer,
            with member biases, and batch normalisation is shared by all members.
        **options: `width`, the channels of the first stage (16 unless told; times k in a WRN);
            `mean` and `std`, per channel, of the pixels in [0, 1] (default 0 and 1).

    Raises:
        ValueError: the name or an option is unknown, or no such depth exists.

    Example:
        >>> count_parameters(build_network("resnet32", num_classes=10))
        464154
    """
    width = options.pop("width", 16)
    mean = options.pop("mean", [0.0] * in_channels)
    std = options.pop("std", [1.0] * in_channels)
    if options:
        raise ValueError(f"unknown network option {', '.join(map(repr, options))}")
    family, depth, widen = parse_network_name(name)
    stages = [width * widen, 2 * width * widen, 4 * width * widen]
    network = ResidualNetwork(
        PreActivationBlock if family == "wrn" else BasicBlock,
        blocks_per_stage=depth // 6,
        stem_channels=width,
        stage_channels=stages,
        num_classes=num_classes,
        in_channels=in_channels,
        ensemble_size=ensemble_size,
        mean=mean,
        std=std,
    )
    return network.to(memory_format=torch.channels_last)


def member_logits(network: nn.Module, x: Tensor) -> Tensor:
    """Logits of every member on the same images: x (B, C, H, W) → (M, B, K).

    A plain network is one member. Under bfloat16 autocast the logits are float32 all the same.
    """
    members = getattr(network, "ensemble_size", 1)
    logits = network(x.repeat(members, 1, 1, 1) if members > 1 else x)
    return logits.to(x.dtype).view(members, x.shape[0], -1)


@torch.inference_mode()
def predict(network: nn.Module, images: Tensor, batch_size: int = 500) -> NDArray[np.float32]:
    """Logits of a network in eval mode; its mode is restored afterwards.

    Args:
        network: on the device of the images.
        images: uint8 (N, C, H, W).
        batch_size: images at a time.

    Returns:
        (N, M, K) float32; M = 1 for a plain network.
    """
    training = network.training
    network.eval()
    logits = [
        member_logits(network, batch.float() / 255).transpose(0, 1)
        for batch in images.split(batch_size)
    ]
    network.train(training)
    return torch.cat(logits).float().cpu().numpy()


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


def count_parameters(network: nn.Module) -> int:
    """The number of parameters; running statistics of batch normalisation are none."""
    return sum(parameter.numel() for parameter in network.parameters())


def save_network(
    path: str | os.PathLike[str],
    network: nn.Module,
    architecture: Mapping[str, Any],
    attributes: Mapping[str, Any],
) -> None:
    """Write weights as safetensors; the header holds the arguments of `build_network` and more.

    Args:
        path: the file, whole or not there at all.
        network: made by `build_network(**architecture)`.
        architecture: those arguments.
        attributes: what made the weights.
    """
    header = json.dumps({**attributes, "architecture": architecture}, default=str)
    with atomic(path) as temporary:
        tensors = {key: value.contiguous() for key, value in network.state_dict().items()}
        # One key only: the format does not keep the order of several.
        save_file(tensors, temporary, metadata={"ensdistill": header})


def load_network(path: str | os.PathLike[str], device: torch.device | str = "cpu") -> nn.Module:
    """A trained network, frozen and in eval mode, rebuilt from the file alone.

    Raises:
        InputError: the file is missing, damaged, or holds no network of this package.
    """
    header, tensors = _read(path, device)
    try:
        network = _unfilled(tensors, **header["architecture"])
        network.load_state_dict(tensors, assign=True)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = _first_line(error)
        raise DamagedFile(path, f"its weights fit no network ({reason})") from error
    network.to(memory_format=torch.channels_last)
    return network.to(device).eval().requires_grad_(False)


class _WithoutRandomNumbers(TorchFunctionMode):
    """Leaves out initialisation, which tensors without storage would answer by a long import."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function.__name__.endswith(("normal_", "uniform_")):  # of tensors and of torch.nn.init
            return args[0] if args else kwargs["tensor"]
        return function(*args, **kwargs)


def _unfilled(
    tensors: Mapping[str, Tensor], name: str, in_channels: int = 3, **architecture: Any
) -> ResidualNetwork:
    """The network of a file, still without storage: it may be another one than the file holds.

    Raises:
        ValueError: it is.
    """
    _, depth, _ = parse_network_name(name)
    # Even a module without numbers takes memory, and so do the default mean and std.
    if depth > len(tensors) or in_channels not in tensors["stem.weight"].shape:
        raise ValueError(f"a {name!r} with {in_channels} channels is not what is stored")
    with torch.device("meta"), _WithoutRandomNumbers():
        network = build_network(name, in_channels=in_channels, **architecture)
    for key, tensor in network.state_dict().items():
        found, expected = ((tuple(it.shape), it.dtype) for it in (tensors[key], tensor))
        if found != expected:
            raise ValueError(f"{key}: {found}, not {expected}")
    return network


def read_header(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What a weights file says of itself; errors as `load_network`."""
    return _read(path, None)[0]


def _read(
    path: str | os.PathLike[str], device: torch.device | str | None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header and, where a device is named, tensors of a weights file."""
    try:
        with safe_open(path, "pt", device=str(device or "cpu")) as file:
            header = json.loads((file.metadata() or {})["ensdistill"])
            names = file.keys() if device else []
            return header, {name: file.get_tensor(name) for name in names}
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except PermissionError:
        raise
    except (SafetensorError, KeyError, ValueError, OSError, RecursionError) as error:
        reason = _first_line(error)
        raise DamagedFile(path, f"damaged, or not weights of this package ({reason})") from error


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
