"""Packed ensembles: M narrow networks side by side in the channels of one network.

Laurent et al., "Packed-Ensembles for Efficient Uncertainty Estimation" (ICLR 2023, arXiv
2210.09184), §3. Member j of M has channels j·c … (j+1)·c − 1 of each activation with M·c channels.
"""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ensdistill.architectures import LIBRARIES, parse_architecture
from ensdistill.layers import Layers
from ensdistill.mimo import SideBySide
from ensdistill.networks import build_network


class PackedLinear(nn.Module):
    """M linear layers side by side, each with the initial weights of `torch.nn.Linear`.

    Args:
        in_features, out_features: of all members together, multiples of M.
        members: M.

    Shape:
        input (B, M·in) → output (B, M·out).

    Example:
        >>> PackedLinear(4 * 16, 4 * 10, members=4)(torch.zeros(2, 64)).shape
        torch.Size([2, 40])
    """

    def __init__(self, in_features: int, out_features: int, members: int):
        super().__init__()
        each_in, each_out = in_features // members, out_features // members
        self.weight = nn.Parameter(torch.empty(members, each_out, each_in))
        self.bias = nn.Parameter(torch.empty(members, each_out))
        for parameter in (self.weight, self.bias):
            nn.init.uniform_(parameter, -1 / math.sqrt(each_in), 1 / math.sqrt(each_in))

    def forward(self, x: Tensor) -> Tensor:
        members, _, each_in = self.weight.shape
        x = x.unflatten(1, (members, each_in)).transpose(0, 1)
        return torch.baddbmm(self.bias[:, None], x, self.weight.mT).transpose(0, 1).flatten(1)


def packed_layers(members: int, groups: int = 1) -> Layers:
    """Of M networks side by side, whose inner convolutions have γ groups each.

    Args:
        members: M.
        groups: γ. Neither the stem nor the linear layer is divided further, and between groups
            nothing is exchanged [Laurent et al. 2023, §3.2].
    """
    conv = partial(nn.Conv2d, groups=members * groups, bias=False)
    stem = partial(nn.Conv2d, groups=members, bias=False)
    return Layers(conv, partial(PackedLinear, members=members), packed=members, stem=stem)


def narrow_width(width: int, members: int, widen: float, groups: int) -> int:
    """Channels of the first stage of each member: α·width/M, rounded, at least 1.

    Raises:
        ValueError: γ groups cannot share them out evenly.
    """
    narrow = max(1, round(widen * width / members))
    if groups < 1 or narrow % groups:
        raise ValueError(
            f"each of {members} packed members has {narrow} channels (width {width} × widen "
            f"{widen:g} / {members}), which {groups} groups cannot share out evenly"
        )
    return narrow


class Packed(SideBySide):
    """M narrow networks in grouped convolutions [Laurent et al. 2023].

    Args:
        widen: α; each member has α/M times the channels of the architecture.
        groups: γ, of each convolution of a member but the first; with 1 members are ordinary.

    Raises:
        ValueError: γ does not divide the channels of a member; or the architecture is a library's.
    """

    def __init__(
        self, architecture: Mapping[str, Any], members: int, widen: float = 2.0, groups: int = 1
    ):
        super().__init__()
        if parse_architecture(architecture["name"])[0] in LIBRARIES:
            raise ValueError(f"{architecture['name']!r} cannot be packed; resnet32 can")
        plain = architecture.get("width", 16)
        width = members * narrow_width(plain, members, widen, groups)
        self.network = build_network(
            **{**self.side_by_side(architecture, members), "width": width},
            layers=packed_layers(members, groups),
        )
        self.members = members
