"""Networks as they predict fastest: the same functions, without what training alone needs.

A *form* is a frozen module that maps images (B, C, H, W) in [0, 1] to logits of every member
(M, B, K), as its student does in eval mode but for rounding. Which form of a student is fastest
differs by processor, network and batch, so it is measured (`fastest`). What the rules store is
computed by the students themselves, not by forms.
"""

import copy
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from ensdistill.batch_ensemble import BatchEnsembleConv2d, BatchEnsembleLayer, outer, subsample
from ensdistill.convert import BatchEnsembleMap, member
from ensdistill.gaussian_logits import GaussianLogits, LatentFactorNetwork
from ensdistill.graphs import replace
from ensdistill.hydra import Hydra, HydraNetwork, split
from ensdistill.layers import WithoutRandomNumbers
from ensdistill.networks import (
    ResidualNetwork,
    build_network,
    fold_batch_norms,
    norms_to_fold,
    without_norm,
)
from ensdistill.packed import packed_layers
from ensdistill.students import BatchEnsemble, Student

REPEATS = 3
"""How often `fastest` times a form, after a warm-up."""


class Separate(nn.Module):
    """M networks (B, C, H, W) → (B, K), one after the other."""

    def __init__(self, networks: Sequence[nn.Module]):
        super().__init__()
        self.networks = nn.ModuleList(networks)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([network(x) for network in self.networks])


class SideBySide(nn.Module):
    """M networks of one architecture in grouped convolutions, with one stem for the image.

    Args:
        networks: plain, with folded batch normalisations.
        architecture: of each.
    """

    def __init__(self, networks: Sequence[nn.Module], architecture: Mapping[str, Any]):
        super().__init__()
        self.members = len(networks)
        self.network = _filled_beside(_wide(architecture, self.members), networks)

    def forward(self, x: Tensor) -> Tensor:
        return _by_member(self.network(x), self.members)


class SharedWeights(nn.Module):
    """A BatchEnsemble whose normalisations are in its factors, with one stem for the image.

    With s' = s·γ/√(σ² + ε) and b' = β + (b − μ)·γ/√(σ² + ε) no normalisation follows a layer.
    The members' rows part behind the stem; where they are few, all pass through one weight.

    Args:
        network: of a `BatchEnsemble`, in eval mode; it is changed.
        members: M.
        stem: the convolution C → M·out of all members; None to repeat the images instead.
    """

    def __init__(self, network: nn.Module, members: int, stem: nn.Module | None):
        super().__init__()
        for module, layer, norm in norms_to_fold(network):
            statistics = cast(nn.BatchNorm2d, module.get_submodule(norm))
            _fold_into_factors(cast(BatchEnsembleLayer, module.get_submodule(layer)), statistics)
            replace(module, norm, without_norm(statistics))
        self.members, self.network = members, network
        self.repeats = members if stem is None else 1
        if stem is not None:
            network.stem = _StemOfRows(stem, members)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.repeat(self.repeats, 1, 1, 1) if self.repeats > 1 else x
        return self.network(rows).unflatten(0, (self.members, len(x)))


class MemberByMember(nn.Module):
    """A BatchEnsemble of one weight whose members are computed one after the other.

    Whoever can multiply constants before the first image, such as ONNX Runtime, has M plain
    networks; normalisations are in the factors, as in `SharedWeights`.

    Args:
        network: of a `BatchEnsemble`, in eval mode; it is changed.
        members: M.
    """

    def __init__(self, network: nn.Module, members: int):
        super().__init__()
        self.network = SharedWeights(network, members, None).network
        self.members = members
        made: dict[nn.Module, _OfMember] = {}
        for name, layer in list(network.named_modules(remove_duplicate=False)):
            if isinstance(layer, BatchEnsembleLayer | BatchEnsembleMap):
                replace(network, name, made.setdefault(layer, _OfMember(layer)))
        self.layers = list(made.values())

    def forward(self, x: Tensor) -> Tensor:
        logits = []
        for j in range(self.members):
            for layer in self.layers:
                layer.member = j
            logits.append(self.network(x))
        return torch.stack(logits)


class _OfMember(nn.Module):
    """A layer of a BatchEnsemble as one of its members has it, of B rows."""

    def __init__(self, layer: BatchEnsembleLayer | BatchEnsembleMap):
        super().__init__()
        self.layer, self.member = layer, 0

    def forward(self, x: Tensor) -> Tensor:
        layer, j = self.layer, self.member
        bias = None if layer.bias is None else layer.bias[j]
        if isinstance(layer, BatchEnsembleLayer):
            if isinstance(layer, BatchEnsembleConv2d) and layer.subsamples:
                x = subsample(x, layer.stride[0])
            # Products of float16 are left to every call by ONNX Runtime.
            weight, r, s = (it.float() for it in (layer.weight, layer.r[j], layer.s[j]))
            weight = weight * outer(s, r, layer.groups, weight.ndim)
            return layer._map(x, weight.to(x.dtype), bias)

        def of_channels(factors: Tensor) -> Tensor:
            return factors if layer.channels_last else factors.view(-1, *[1] * (x.ndim - 2))

        out = layer.inner(x * of_channels(layer.r[j])) * of_channels(layer.s[j])
        return out if bias is None else out + of_channels(bias)


class _StemOfRows(nn.Module):
    """One convolution of B images for all members → rows (M·B, out, H, W), channels_last."""

    def __init__(self, conv: nn.Module, members: int):
        super().__init__()
        self.conv, self.members = conv, members

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv(x).permute(0, 2, 3, 1).unflatten(3, (self.members, -1))
        return out.permute(3, 0, 1, 2, 4).flatten(0, 1).permute(0, 3, 1, 2)


class HeadsSideBySide(nn.Module):
    """A `HydraNetwork` whose heads are one network of grouped convolutions.

    Args:
        network: with folded batch normalisations.
        architecture: of the network that it was made of.
    """

    def __init__(self, network: HydraNetwork, architecture: Mapping[str, Any]):
        super().__init__()
        self.members, self.body = len(network.heads), network.body
        first, behind = (len(cast(Any, it).blocks) for it in (network.body, network.heads[0]))
        cut = f"blocks.{first}" if behind else "linear"
        with torch.device("meta"):
            head = split(_wide(architecture, self.members), cut)[1]
        self.heads = _filled_beside(head, [*network.heads])

    def forward(self, x: Tensor) -> Tensor:
        return _by_member(self.heads(self.body(x).repeat(1, self.members, 1, 1)), self.members)


class Sampled(nn.Module):
    """μ + L Z_s φ of a `LatentFactorNetwork` with L Z_s multiplied once: S·K·q multiplications."""

    directions: Tensor

    def __init__(self, network: LatentFactorNetwork):
        super().__init__()
        self.body, self.shape = network.body, network.noise.shape[:2]  # S and K
        self.register_buffer(
            "directions", torch.einsum("kl,slq->qsk", network.lower, network.noise).flatten(1)
        )

    def forward(self, x: Tensor) -> Tensor:
        mean, loadings = self.body(x).split([self.shape[1], len(self.directions)], 1)
        return mean + (loadings @ self.directions).unflatten(1, self.shape).transpose(0, 1)


def inference_forms(student: Student) -> list[nn.Module]:
    """Every form of what a student predicts by; the student stays as it is.

    Normalisations right behind a convolution are folded into it. A BatchEnsemble computes with M
    weights or with its factors, and the image passes one stem for all members.
    """
    student = copy.deepcopy(student.predictor()).eval().requires_grad_(False)
    architecture = student.spec["architecture"]
    if isinstance(student, BatchEnsemble):
        networks = [fold_batch_norms(member(student.network, j)) for j in range(student.members)]
        forms = ensemble_forms(networks, architecture)
        beside = [form.network.stem for form in forms if isinstance(form, SideBySide)]
        stem = cast(nn.Module, copy.deepcopy(beside[0])) if beside else None
        forms.append(SharedWeights(student.network, student.members, stem))
    else:
        fold_batch_norms(student.network)
        forms = [student]
        if isinstance(student, Hydra) and student.network.can_stand_beside:
            forms.append(HeadsSideBySide(student.network, architecture))
        if isinstance(student, GaussianLogits):
            forms = [Sampled(student.network)]
    return [form.eval().requires_grad_(False) for form in forms]


def ensemble_forms(
    networks: Sequence[nn.Module], architecture: Mapping[str, Any]
) -> list[nn.Module]:
    """Every form of a deep ensemble of plain networks with folded batch normalisations."""
    forms: list[nn.Module] = [Separate(networks)]
    if len(networks) > 1 and isinstance(networks[0], ResidualNetwork):
        forms.append(SideBySide(networks, architecture))
    return forms


@torch.inference_mode()
def fastest(forms: Sequence[nn.Module], x: Tensor) -> nn.Module:
    """The form that takes the least time on images like x; forms take turns."""
    if len(forms) == 1:
        return forms[0]
    rounds = [[seconds(form, x) for form in forms] for _ in range(1 + REPEATS)]
    least = [min(times) for times in zip(*rounds[1:], strict=True)]
    return forms[least.index(min(least))]


def for_inference(student: Student, x: Tensor) -> nn.Module:
    """What predicts as a student does, as fast as it can be for batches like x (B, C, H, W)."""
    return fastest(inference_forms(student), x)


def seconds(form: nn.Module, x: Tensor, calls: int = 1) -> float:
    """What so many calls take; a GPU is waited for."""
    wait = torch.cuda.synchronize if x.is_cuda else lambda: None
    wait()
    started = time.perf_counter()
    for _ in range(calls):
        form(x)
    wait()
    return time.perf_counter() - started


def _by_member(logits: Tensor, members: int) -> Tensor:
    """(B, M·K) → (M, B, K)."""
    return logits.unflatten(1, (members, -1)).transpose(0, 1)


def _wide(architecture: Mapping[str, Any], members: int) -> nn.Module:
    """M networks side by side, with folded batch normalisations; its tensors have no storage."""
    wide = {
        "width": architecture.get("width", 16) * members,
        "num_classes": architecture["num_classes"] * members,
    }
    layers = packed_layers(members)
    layers = layers._replace(conv=partial(layers.conv, bias=True), stem=nn.Conv2d)
    with torch.device("meta"), WithoutRandomNumbers():
        return fold_batch_norms(build_network(**{**architecture, **wide}, layers=layers).eval())


def _filled_beside(wide: nn.Module, networks: Sequence[nn.Module]) -> nn.Module:
    """A network of `_wide`, or a part of it, with the tensors of the networks side by side."""
    states = [network.state_dict() for network in networks]
    filled = {}
    for key, tensor in wide.state_dict().items():
        if key not in states[0]:  # a bias that they do not have
            filled[key] = next(iter(states[0].values())).new_zeros(tensor.shape)
            continue
        each = [state[key] for state in states]
        # Mean and standard deviation of the pixels are the same for all.
        filled[key] = each[0] if each[0].shape == tensor.shape else torch.cat(each).view_as(tensor)
    wide.load_state_dict(filled, assign=True)
    return wide.to(memory_format=torch.channels_last)


@torch.no_grad()
def _fold_into_factors(layer: BatchEnsembleLayer, norm: nn.BatchNorm2d) -> None:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    gain, shift = (1, 0) if norm.weight is None else (norm.weight, norm.bias)
    scale = gain * (norm.running_var + norm.eps).rsqrt()
    bias = 0 if layer.bias is None else layer.bias
    layer.bias = nn.Parameter((bias - norm.running_mean) * scale + shift + 0 * layer.s)
    layer.s *= scale
