"""One body with M heads.

Tran et al., "Hydra: Preserving Ensemble Diversity for Model Distillation" (arXiv 2001.04694).
"""

import copy
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from ensdistill.graphs import cut_at, replace
from ensdistill.libraries import LibraryNetwork
from ensdistill.networks import ResidualNetwork, build_network
from ensdistill.student import Student


def split(network: nn.Module, cut: str) -> tuple[nn.Module, nn.Module]:
    """A network's body and head, with head(body(x)) = network(x) to the bit.

    Args:
        network: its parts become parts of the two.
        cut: of a `ResidualNetwork`: the head is the last stage and all behind it (`stage`), or the
            average and the linear layer alone (`linear`), or a block and all behind it, such as
            `blocks.2`. Of a library's network: the last layer alone (`linear`), or the module of
            that name and all behind it, such as `layer4`.

    Raises:
        ValueError: there is no such cut.
    """
    if isinstance(network, LibraryNetwork):
        return _split_library(network, cut)
    return _split_own(cast(ResidualNetwork, network), cut)


def _split_own(network: ResidualNetwork, cut: str) -> tuple[nn.Module, nn.Module]:
    count = len(network.blocks)
    cuts = {"stage": count - network.blocks_per_stage, "linear": count}
    cuts |= {f"blocks.{place}": place for place in range(1, count)}
    if cut not in cuts:
        raise ValueError(
            f"a network is cut before its last 'stage' or 'linear' layer, not {cut!r}; or before a "
            f"block, blocks.1 … blocks.{count - 1}"
        )
    # Parts of a network that are taken away are None.
    body: Any = network
    head: Any = copy.deepcopy(network)
    blocks = cuts[cut]
    head.normalize = head.stem = head.stem_norm = None
    head.blocks, body.blocks = head.blocks[blocks:], body.blocks[:blocks]
    body.head = None
    (head if cut == "linear" else body).final_norm = None
    return body, head


def _split_library(network: LibraryNetwork, cut: str) -> tuple[nn.Module, nn.Module]:
    if cut == "linear":
        head = network.get_submodule(network.last)
        replace(network, network.last, nn.Identity())
        return network, head
    if cut not in dict(network.body.named_modules()):
        first = ", ".join(name for name, _ in network.body.named_children())
        raise ValueError(f"'cut' must be 'linear' or name a module, such as {first}; not {cut!r}")
    return cut_at(network, f"body.{cut}")


class HydraNetwork(nn.Module):
    """M heads, equal at first, on one body.

    Args:
        network: see `split`.
        members: M.
        cut: see `split`.

    Shape:
        input (B, C, H, W), which the body sees once, or (M, B, C, H, W) → logits (M, B, K).
    """

    def __init__(self, network: nn.Module, members: int, cut: str):
        super().__init__()
        self.body, head = split(network, cut)
        self.heads = nn.ModuleList([head, *(copy.deepcopy(head) for _ in range(members - 1))])

    @property
    def can_stand_beside(self) -> bool:
        """Whether there is a network of grouped convolutions for all heads."""
        return isinstance(self.body, ResidualNetwork)

    def forward(self, x: Tensor, alone: bool = False) -> Tensor:
        """Logits of every member; those of head 0 for all of them where it is `alone`."""
        members, own = len(self.heads), x.ndim == 5
        features = self.body(x.flatten(0, 1) if own else x)
        if alone:
            logits = self.heads[0](features)
            return logits.unflatten(0, x.shape[:2]) if own else logits.expand(members, -1, -1)
        each = features.unflatten(0, x.shape[:2]) if own else [features] * members
        return torch.stack([head(part) for head, part in zip(self.heads, each, strict=True)])

    @torch.no_grad()
    def copy_first_head(self) -> None:
        """Make all heads equal to head 0, the statistics of their batch normalisations too."""
        first = self.heads[0].state_dict()
        for head in self.heads[1:]:
            head.load_state_dict(first)


class Hydra(Student):
    """M heads on one body [Tran et al. 2020].

    In the first part of a training head 0 alone learns, and answers for every member; with that,
    the gradient of mean_j KL(p_j ‖ q) is that of KL(p̄ ‖ q), so the objective is the same in both
    parts. Then head 0 is copied to all heads.

    Args:
        cut: see `split`.
        together: share of the training after which all heads learn, 0 … 1.
    """

    network: HydraNetwork

    def __init__(
        self,
        architecture: Mapping[str, Any],
        members: int,
        cut: str = "stage",
        together: float = 0.5,
    ):
        super().__init__()
        self.network = HydraNetwork(build_network(**architecture), members, cut)
        self.members, self.together = members, together
        self.alone = False
        """Whether head 0 answers for every member; a student that is not in training has M."""

    def member_logits(self, x: Tensor) -> Tensor:
        return self.network(x, self.alone)

    @property
    def phase(self) -> bool:
        return self.alone

    def set_progress(self, progress: float) -> None:
        was_alone, self.alone = self.alone, progress < self.together
        if was_alone and not self.alone:
            self.network.copy_first_head()

    def parameter_groups(self, learning_rate: float, weight_decay: float) -> list[dict[str, Any]]:
        """Heads that wait have a group of their own: PyTorch's fused SGD needs the momentum of all
        parameters of a group, or of none, and theirs begins when they learn.
        """
        learning = [*self.network.body.parameters(), *self.network.heads[0].parameters()]
        waiting = list(self.network.heads[1:].parameters())
        settings = {"lr": learning_rate, "weight_decay": weight_decay}
        return [{"params": group, **settings} for group in (learning, waiting)]

    def predictor(self) -> "Hydra":
        if self.alone:  # the other heads have not learnt, and what is stored has all of them
            self.network.copy_first_head()
        return self

    def get_extra_state(self) -> bool:
        """For a training that goes on."""
        return self.alone

    def set_extra_state(self, state: bool) -> None:
        self.alone = state
