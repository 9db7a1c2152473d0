"""BatchEnsemble layers that become one ordinary network after training.

Nam et al., "Improving Ensemble Distillation With Weight Averaging and Diversifying Perturbation"
(ICML 2022), §3. Member j of a layer computes

    y = s_j ∘ (W (x ∘ r_j) + b)

with r_j = s_j = 1 at the start and one bias b, where a plain network has one. The mean factors
r̄ = mean_j r_j and s̄ = mean_j s_j give an ordinary layer of weight W ∘ (s̄ r̄ᵀ) and bias s̄ ∘ b.

The parameters are the deviations dr = r − 1 and ds = s − 1, so weight decay pulls r and s to 1.
"""

from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from ensdistill.batch_ensemble import (
    BatchEnsembleConv2d,
    BatchEnsembleLayer,
    BatchEnsembleLinear,
    Plain,
    outer,
)
from ensdistill.convert import to_batch_ensemble
from ensdistill.layers import Layers


class LatentLayer(BatchEnsembleLayer):
    """What both layers share: weight, dr (M, in), ds (M, out) and, if there is one, bias (out)."""

    def _make_factors(self, in_features: int, out_features: int, bias: bool) -> None:
        self.dr = nn.Parameter(torch.empty(self.ensemble_size, in_features))
        self.ds = nn.Parameter(torch.empty(self.ensemble_size, out_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None

    def _reset_factors(self) -> None:
        nn.init.zeros_(self.dr)
        nn.init.zeros_(self.ds)

    def take_over(self, plain: Plain, *_: object) -> None:
        """As of `BatchEnsembleLayer`; all members begin as the ordinary layer."""
        members, (out_features, in_features) = self.ensemble_size, plain.weight.shape[:2]
        self.weight = cast(nn.Parameter, plain.weight)
        self.bias = cast(nn.Parameter | None, plain.bias)
        self.dr = nn.Parameter(plain.weight.new_zeros(members, self.groups * in_features))
        self.ds = nn.Parameter(plain.weight.new_zeros(members, out_features))

    # Parameters of other layers are computed here.
    @property
    def r(self) -> Tensor:  # type: ignore[override]
        return 1 + self.dr

    @property
    def s(self) -> Tensor:  # type: ignore[override]
        return 1 + self.ds

    def _biases(self) -> Tensor | None:
        return None if self.bias is None else self.s * self.bias

    def merged(self) -> dict[str, Tensor]:
        """Weight, and bias if there is one, of the ordinary layer W ∘ (s̄ r̄ᵀ), s̄ ∘ b."""
        r, s = self.r.mean(0), self.s.mean(0)
        factors = outer(s, r, self.groups, self.weight.ndim)
        bias = {} if self.bias is None else {"bias": s * self.bias}
        return {"weight": self.weight * factors, **bias}


class LatentConv2d(LatentLayer, BatchEnsembleConv2d):
    """A 2-D convolution with members y = s_j ∘ (W (x ∘ r_j) + b); see `BatchEnsembleConv2d`."""


class LatentLinear(LatentLayer, BatchEnsembleLinear):
    """A linear layer with members y = s_j ∘ (W (x ∘ r_j) + b); see `BatchEnsembleLinear`."""


def latent_layers(ensemble_size: int) -> Layers:
    """Of M members; convolutions have no bias, as those of an ordinary network."""
    return Layers(
        partial(LatentConv2d, ensemble_size=ensemble_size, bias=False),
        partial(LatentLinear, ensemble_size=ensemble_size),
        convert=partial(
            to_batch_ensemble, ensemble_size=ensemble_size, conv=LatentConv2d, linear=LatentLinear
        ),
    )


@torch.no_grad()
def merged_state(network: nn.Module) -> dict[str, Tensor]:
    """The state of the ordinary network with the mean factors; it shares no memory."""
    state = {key: value.clone() for key, value in network.state_dict().items()}
    for name, layer in network.named_modules():
        if isinstance(layer, LatentLayer):
            state |= {f"{name}.{key}": value for key, value in layer.merged().items()}
            del state[f"{name}.dr"], state[f"{name}.ds"]
    return state
