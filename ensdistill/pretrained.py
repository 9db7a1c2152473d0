"""Weights to begin with, in a network that may be of other classes or for other images."""

import logging
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ensdistill import InputError
from ensdistill.batch_ensemble import BatchEnsembleConv2d, BatchEnsembleLinear
from ensdistill.state_dicts import fitted

logger = logging.getLogger(__name__)

NEW_LAST = "%s: the last layer (%s) is new: it was of other classes"
"""What the log says of it."""


@torch.no_grad()
def fill(network: nn.Module, state: Mapping[str, Tensor], what: str) -> None:
    """Fill a network with weights that may be of other classes, or of images with other channels.

    A last layer of other classes keeps its new weights, which is told. A first convolution of other
    channels gets the sum of the given ones, in equal parts.

    Args:
        network: all its other tensors must be there.
        state: its tensors by name.
        what: the weights, in messages.

    Raises:
        InputError: a name or a shape differs.
    """
    try:
        state = fitted(state, network)[0]
    except ValueError as error:
        raise InputError(f"{what}: is not of this network: {error}") from None
    own = network.state_dict()
    differing = [key for key in own if own[key].shape != state[key].shape]
    first, last = first_convolution(network), last_layer(network)
    new = set()
    for key in differing:
        place, given = key.rpartition(".")[0], state[key]
        if place == last or _of_classes(own[key], given, own, state, last):
            state[key] = own[key]
            new.add(place)
        elif place == first and own[key][:, :1].shape == given[:, :1].shape:
            channels = own[key].shape[1]
            state[key] = given.sum(1, keepdim=True).expand_as(own[key]) / channels
        else:
            shapes = f"{tuple(given.shape)}, not {tuple(own[key].shape)}"
            raise InputError(f"{what}: is not of this network: {key} has the shape {shapes}")
    for place in sorted(new):
        logger.info(NEW_LAST, what, place)
    network.load_state_dict(state)


def _of_classes(
    own: Tensor,
    given: Tensor,
    network: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    last: str | None,
) -> bool:
    """Whether a tensor has a row for each class, as the last layer has: some have two last layers.

    Args:
        own, given: the tensor, and the one in its place.
        network, state: where they are.
        last: the last layer.
    """
    classes = [it.get(f"{last}.weight", own).shape[0] for it in (network, state)]
    same = own.shape[1:] == given.shape[1:]
    return same and own.ndim > 0 and [own.shape[0], given.shape[0]] == classes


def first_convolution(network: nn.Module) -> str | None:
    """The name of the first convolution, which sees the pixels; None if there is none."""
    return next(iter(_names(network, nn.Conv2d, BatchEnsembleConv2d)), None)


def last_layer(network: nn.Module) -> str | None:
    """The name of the last linear layer, or else of the last convolution; None if there is none."""
    linear = _names(network, nn.Linear, BatchEnsembleLinear)
    return [None, *_names(network, nn.Conv2d, BatchEnsembleConv2d), *linear][-1]


def _names(network: nn.Module, *kinds: type[nn.Module]) -> list[str]:
    return [name for name, module in network.named_modules() if isinstance(module, kinds)]
