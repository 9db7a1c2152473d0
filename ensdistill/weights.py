"""Weights files: safetensors whose header says what made the weights, and how to build the student.

Nothing in a weights file is run: it holds tensors, and a header of JSON.
"""

import json
import os
from collections.abc import Mapping
from typing import Any

import torch
from safetensors.torch import load, save_file
from torch import Tensor, nn

from ensdistill import InputError
from ensdistill.architectures import LIBRARIES, parse_architecture
from ensdistill.files import atomic, reading
from ensdistill.headers import WEIGHTS, header_of
from ensdistill.headers import read_header as read_header
from ensdistill.layers import WithoutRandomNumbers
from ensdistill.students import Student, build_student


def save_student(
    path: str | os.PathLike[str], student: Student, attributes: Mapping[str, Any]
) -> None:
    """Write weights as safetensors.

    Args:
        path: the file, whole or not there at all.
        student: made by `build_student`.
        attributes: what made the weights; the header holds them beside `spec`, the student's own.
    """
    header = json.dumps({**attributes, "spec": student.spec}, default=_in_header)
    with atomic(path) as temporary:
        state = student.network.state_dict()
        tensors = {key: value.contiguous() for key, value in state.items()}
        # One key only: the format does not keep the order of several.
        save_file(tensors, temporary, metadata={"ensdistill": header})


def _in_header(value: Any) -> str | None:
    """What JSON has no form for; of a module in memory nothing."""
    return None if isinstance(value, nn.Module) else str(value)


def load_student(
    path: str | os.PathLike[str],
    device: torch.device | str = "cpu",
    network: nn.Module | None = None,
) -> Student:
    """A trained student (or teacher), frozen and in eval mode, rebuilt from the file alone.

    Args:
        path: the file.
        device: where it is to be.
        network: what its students were made of, if that was a module in memory.

    Raises:
        InputError: the file is missing, damaged, or holds no student of this package.
    """
    header, tensors = _read(path, device)
    try:
        spec = header["spec"]
        if network is not None:
            spec = {**spec, "architecture": {**spec["architecture"], "module": network}}
        student = _unfilled(tensors, **spec)
        if _is_of_library(spec):
            # Its modules may hold tensors that no file has, such as the places of a window.
            # Initialised like a new one: some draw again until all numbers are near enough.
            with torch.random.fork_rng(devices=[]):
                student = build_student(**spec)
        student.network.load_state_dict(tensors, assign=True)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except (KeyError, TypeError, ValueError, RuntimeError, OverflowError) as error:
        # The file is whole: it may be the code that has changed.
        reason = str(error).partition("\n")[0]
        raise InputError(
            f"{path}: its weights fit no network ({reason}); delete it to train it"
        ) from error
    student.to(memory_format=torch.channels_last)
    return student.to(device).eval().requires_grad_(False)


def _is_of_library(spec: Mapping[str, Any]) -> bool:
    return parse_architecture(spec["architecture"]["name"])[0] in LIBRARIES


class _Bounded(WithoutRandomNumbers):
    """Refuses what takes more operations to build than so many tensors can explain."""

    def __init__(self, tensors: int):
        super().__init__()
        self.left = 100 * tensors  # up to 20 for each are needed

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.left -= 1
        if self.left < 0:
            raise ValueError("it has more tensors than are stored")
        return super().__torch_function__(function, types, args, kwargs)


def _unfilled(
    tensors: Mapping[str, Tensor], *, architecture: Mapping[str, Any], **spec: Any
) -> Student:
    """The student of a file, still without storage: it may be another one than the file holds.

    Raises:
        ValueError: it is.
    """
    if "pretrained" in architecture:
        raise ValueError("it has all its weights, and asks for others")
    channels, members = architecture["in_channels"], spec["members"]
    # Even a module without numbers takes memory, and so do mean and std of all members' channels.
    if channels * members > sum(tensor.numel() for tensor in tensors.values()):
        raise ValueError(f"{members} members with {channels} channels are not what is stored")
    # What refuses may do so within a no_grad, at its end: gradients are switched back here.
    gradients = torch.set_grad_enabled(torch.is_grad_enabled())
    with gradients, torch.device("meta"), _Bounded(len(tensors)):
        student = build_student(architecture=architecture, **spec)
    for key, tensor in student.network.state_dict().items():
        found, expected = ((tuple(it.shape), it.dtype) for it in (tensors[key], tensor))
        if found != expected:
            raise ValueError(f"{key}: {found}, not {expected}")
    return student


def origin(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What made a weights file, for the header of a file that is computed from it.

    Without what the training step says of itself alone, such as its device and precision; for all
    that stands `weights`, the digest of the weights' header. Errors as `load_student`.
    """
    header = read_header(path)
    own = {"digest", "ensdistill", "torch", "device", "precision", "precision_reason"}
    kept = {key: value for key, value in header.items() if key not in own}  # in their order
    return {**kept, "weights": header["digest"]}


def _read(
    path: str | os.PathLike[str], device: torch.device | str
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header and tensors of a weights file."""
    with reading(path, WEIGHTS) as file:
        content = file.read()
        tensors = load(content)  # checks the header, too
        header = header_of(content)
    return header, {name: tensor.to(device) for name, tensor in tensors.items()}
