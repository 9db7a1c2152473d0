"""Weights that other programs stored: what a file holds, and which of a network's tensors."""

import hashlib
import json
import os
import pickle
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import takewhile
from typing import Any, NamedTuple

import torch
from safetensors.torch import load
from torch import Tensor, nn

from ensdistill import DamagedFile, InputError
from ensdistill.attention import Attention
from ensdistill.files import reading
from ensdistill.layers import Normalize

NESTED = ("state_dict", "model_state_dict", "model")
"""Keys of checkpoints under which programs store the state dict."""
WRAPPED = "_orig_mod."
"""What torch.compile puts into keys."""
COUNTERS = "num_batches_tracked"
"""Of batch normalisations; nothing that is computed here depends on them."""
SHOWN = 3
"""Keys that a sentence names."""


class Stored(NamedTuple):
    """What a file of weights holds."""

    tensors: dict[str, Tensor]
    header: dict[str, Any] | None
    """What a file of this package says of itself; None of others."""
    classes: list[str] | None
    """Names of the classes in the order of the outputs, where the file has them."""
    sha256: str


def read_stored(path: str | os.PathLike[str]) -> Stored:
    """The tensors of a safetensors file, or of what torch.save wrote; nothing in it is run.

    Raises:
        InputError: the file is missing, damaged, or holds no state dict. It is no `DamagedFile`,
            as those are set aside: this one is the user's.
    """
    try:
        with reading(path, "a state dict") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            file.seek(0)
            start = file.read(9)
            file.seek(0)
            if start[8:] == b"{":
                content = file.read()
                length = int.from_bytes(content[:8], "little")
                said = json.loads(content[8 : 8 + length]).get("__metadata__", {})
                header = json.loads(said["ensdistill"]) if "ensdistill" in said else None
                return Stored(load(content), header, _classes(said), sha256)
            known = torch.load(file, map_location="cpu", weights_only=True)
    except DamagedFile as error:
        if found := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise InputError(
                f"{path}: holds a Python object, {found[1]}, which is not loaded as it could run "
                "code: store the state dict alone, by torch.save(network.state_dict(), …)"
            ) from None
        if isinstance(error.__cause__, pickle.UnpicklingError):  # says a page of how to trust it
            raise InputError(f"{path}: damaged, or not a state dict") from None
        raise InputError(str(error)) from None
    nested = [known[key] for key in NESTED if isinstance(known, Mapping) and key in known]
    for state in (*nested, known):
        if isinstance(state, Mapping):
            tensors = {str(key): it for key, it in state.items() if isinstance(it, Tensor)}
            if tensors:
                return Stored(tensors, None, _classes(known), sha256)
    keys = f" ({_some(map(str, known))})" if isinstance(known, Mapping) else ""
    raise InputError(f"{path}: no state dict, neither at its top{keys} nor under {_some(NESTED)}")


def _classes(known: Mapping[str, Any]) -> list[str] | None:
    """Names of classes in a checkpoint or in the metadata of safetensors, which are texts."""
    for key in ("classes", "class_to_idx"):
        value = known.get(key)
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except ValueError:
                continue
        if isinstance(value, Mapping):
            value = sorted(value, key=value.__getitem__)
        if isinstance(value, list | tuple) and value and all(isinstance(it, str) for it in value):
            return list(value)
    return None


def renamed(tensors: Mapping[str, Tensor], prefixes: Mapping[str, str | None]) -> dict[str, Tensor]:
    """Tensors whose keys begin as a mapping says; of several beginnings the longest counts.

    Raises:
        ValueError: a beginning is that of no key, or two keys become one.
    """
    found: dict[str, Tensor] = {}
    unused = {*prefixes}
    for key, tensor in tensors.items():
        begins = max(filter(key.startswith, prefixes), key=len, default=None)
        unused.discard(begins)
        start = "" if begins is None else prefixes[begins]
        if start is None:
            continue
        name = start + key.removeprefix(begins or "")
        if name in found:
            raise ValueError(f"'prefixes' makes two keys {name!r}")
        found[name] = tensor
    if unused:
        raise ValueError(
            f"'prefixes' has {min(unused)!r}, but no key begins so; keys are {_some(tensors)}"
        )
    return found


def fitted(
    tensors: Mapping[str, Tensor], network: nn.Module, kept: bool = True
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The state of a network from tensors whose keys may all begin differently.

    The names that `MultiheadAttention` gives become those of `Attention`. Counters of batch
    normalisations, and the mean and standard deviation of `Normalize`, are the network's own where
    the tensors do not have them.

    Args:
        tensors: by key.
        network: that they are of; their shapes are not compared.
        kept: whether the tensors' mean and standard deviation count, if they have them.

    Returns:
        The state, and how the beginning of keys was changed, if it was.

    Raises:
        ValueError: keys are missing or unexpected; one sentence with the first of them.
    """
    state = network.state_dict()
    own = {
        f"{name}.{part}".lstrip(".")
        for name, module in network.named_modules()
        if isinstance(module, Normalize)
        for part in ("mean", "std")
    }
    optional = own | {key for key in state if key.endswith(COUNTERS)}
    theirs = {key.replace(WRAPPED, ""): tensor for key, tensor in tensors.items()}
    if any(isinstance(module, Attention) for module in network.modules()):
        theirs = {key.replace(".in_proj_", ".in_proj."): it for key, it in theirs.items()}
    needed = [key for key in state if key not in optional]
    pairs = [(a, b) for a in _beginnings(theirs) for b in {*_beginnings(needed), ""}]
    matched = {pair: _matches(theirs, state, *pair) for pair in sorted(pairs)}
    begins, becomes = max(matched, key=matched.__getitem__)
    found = {_begun(key, begins, becomes): tensor for key, tensor in theirs.items()}
    missing = [key for key in needed if key not in found]
    unexpected = [key for key in found if key not in state and not key.endswith(COUNTERS)]
    faults = {"missing": missing, "unexpected": unexpected}
    if text := "; ".join(f"{what}: {_some(keys)}" for what, keys in faults.items() if keys):
        raise ValueError(f"{text}{_hint(theirs, state, missing, unexpected)}")
    taken = {key: found[key] for key in state if key in found and (kept or key not in own)}
    return {**state, **taken}, {} if begins == becomes else {begins: becomes}


def _some(keys: Iterable[str]) -> str:
    """The first few of some keys, and how many more there are."""
    keys = list(keys)
    more = f" and {len(keys) - SHOWN} more" if len(keys) > SHOWN else ""
    return f"{', '.join(map(repr, keys[:SHOWN]))}{more}"


def _beginnings(keys: Iterable[str]) -> list[str]:
    """Every beginning up to a dot that all keys share, "" too."""
    places = zip(*(key.split(".")[:-1] for key in keys), strict=False)
    shared = [f"{same[0]}." for same in takewhile(lambda it: len({*it}) == 1, places)]
    return ["".join(shared[:count]) for count in range(len(shared) + 1)]


def _begun(key: str, begins: str, becomes: str) -> str:
    return becomes + key.removeprefix(begins) if key.startswith(begins) else key


def _matches(keys: Iterable[str], known: Mapping[str, Any], begins: str, becomes: str) -> int:
    return sum(_begun(key, begins, becomes) in known for key in keys)


def _hint(
    keys: Iterable[str], known: Mapping[str, Any], missing: Sequence[str], unexpected: Sequence[str]
) -> str:
    """What 'prefixes' would find most keys, if there are such."""
    pairs = [
        (a, b)
        for key in unexpected[:SHOWN]
        for a in _beginnings([key])
        for absent in (*missing[:SHOWN], "")
        for b in _beginnings([absent])
    ]
    if not pairs:
        return ""
    begins, becomes = max(pairs, key=lambda pair: _matches(keys, known, *pair))
    count = _matches(keys, known, begins, becomes)
    if count <= _matches(keys, known, "", ""):
        return ""
    return f"; prefixes: {json.dumps({begins: becomes})} would find {count} of its keys"
