"""One network that takes M images side by side, one for each member.

Havasi et al., "Training Independent Subnetworks for Robust Prediction" (ICLR 2021, arXiv
2010.06610).
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ensdistill.networks import build_network
from ensdistill.student import Student


class SideBySide(Student):
    """One network that takes M images in its M·C channels, and gives M·K logits."""

    rows = 1

    @staticmethod
    def side_by_side(architecture: Mapping[str, Any], members: int) -> dict[str, Any]:
        """The arguments of `build_network` for it."""
        repeated = ("num_classes", "in_channels", "mean", "std")
        return {k: v * members if k in repeated else v for k, v in architecture.items()}

    def member_logits(self, x: Tensor) -> Tensor:
        logits = self.network(self.of_each(x).transpose(0, 1).flatten(1, 2))
        return logits.unflatten(1, (self.members, logits.shape[1] // self.members)).transpose(0, 1)


class MIMO(SideBySide):
    """An ordinary network for M images at once, one for each member [Havasi et al. 2021].

    In training mode each member sees the batch in an order of its own, drawn from PyTorch's global
    generator, and its logits are put back into the order of the images. In eval mode all members
    see the same image at once. Batches are not repeated, as they are in the paper's §4.2.
    """

    mixes_members = True

    def __init__(self, architecture: Mapping[str, Any], members: int):
        super().__init__()
        self.network = build_network(**self.side_by_side(architecture, members))
        self.members = members

    def member_logits(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().member_logits(x)
        x = self.of_each(x)
        order = torch.stack([torch.randperm(x.shape[1], device=x.device) for _ in x])
        member = torch.arange(self.members, device=x.device)[:, None]
        return super().member_logits(x[member, order])[member, order.argsort()]
