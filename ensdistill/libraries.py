"""Networks of timm and torchvision, and of your own modules, as architectures.

All map rows (rows, C, H, W) in [0, 1] to logits (rows, K). What a library's network expects of
pixels is done in front of it: they are normalised by the statistics of the images that its weights
were trained on, or else by those of the study's. A module of your own does that itself.

Under bfloat16 autocast the first convolution and the last layer compute in float32: bfloat16 pixels
would lose a sixth of a perturbation with η = 1/255.
"""

import difflib
import importlib.util
import inspect
import logging
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ensdistill import InputError
from ensdistill.convert import with_attention
from ensdistill.graphs import replace
from ensdistill.layers import Layers, Normalize, autocast_dtype, in_float32
from ensdistill.pretrained import NEW_LAST, fill, first_convolution, last_layer
from ensdistill.state_dicts import read_stored

logger = logging.getLogger(__name__)

Pretrained = bool | str
"""Whether weights are those that the library offers; or a file of weights."""

PACKAGE = Path(__file__).parent

RESERVED = {"num_classes", "in_chans", "weights", "pretrained", "features_only", "scriptable"}
RESERVED |= {"checkpoint_path", "cache_dir", "pretrained_cfg", "pretrained_cfg_overlay"}
"""Arguments of the libraries that are decided here: some of them load files."""


class LibraryNetwork(nn.Module):
    """Normalisation, and a network that was not written for this package.

    Args:
        body: (rows, C, H, W) → (rows, K).
        mean, std: of each channel, in [0, 1].
    """

    def __init__(self, body: nn.Module, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.normalize = Normalize(mean, std)
        self.body = body

    @property
    def last(self) -> str:
        """The name of the last layer."""
        return f"body.{last_layer(self.body)}"

    def forward(self, x: Tensor) -> Tensor:
        x = self.normalize(x).contiguous(memory_format=torch.channels_last)
        return self.body(x)


def timm_network(
    model: str,
    num_classes: int,
    in_channels: int,
    layers: Layers,
    mean: Sequence[float],
    std: Sequence[float],
    *,
    pretrained: Pretrained = False,
    options: Mapping[str, Any] | None = None,
) -> nn.Module:
    """A network of timm [Wightman 2019], such as `timm:resnet18` or `timm:vit_tiny_patch16_224`.

    Args:
        model: its name there, with a tag of its weights or without.
        num_classes, in_channels: K and C; timm adapts weights of another C.
        layers: of which kind.
        mean, std: of the pixels.
        pretrained: see `Pretrained`.
        options: other arguments of `timm.create_model`, such as `img_size` or `drop_path_rate`.

    Raises:
        InputError: timm is not installed, has no such network or no weights of it, or cannot fetch
            them.
    """
    timm = _timm()
    name = f"timm:{model}"
    known = timm.list_models(pretrained=False)
    if model.partition(".")[0] not in known:
        raise InputError(f"unknown architecture {name!r}{_close(model, known)}")
    sizes = {"num_classes": num_classes, "in_chans": in_channels}
    given = _checked(name, options)
    offered = pretrained is True and not _on_meta()
    if offered:
        cfg = _timm_cfg(model)
        if cfg is None or not cfg.has_weights:
            raise InputError(f"{name}: timm has no weights of it; set pretrained: false")
        if cfg.num_classes != num_classes:
            logger.info(NEW_LAST, name, cfg.classifier)
    try:
        body = timm.create_model(model, pretrained=offered, **sizes, **given)
    except Exception as error:  # of its arguments, of the network
        if offered and isinstance(error, OSError | RuntimeError):
            at = f"{cfg.hf_hub_id or ''} on huggingface.co" if cfg.hf_hub_id else cfg.url
            raise _unfetched(name, f"model.safetensors of {at}", error) from error
        raise InputError(f"{name}: {_first_line(error)}") from error
    if not offered:
        # What timm does to files of other versions, and of networks for images of other sizes.
        adapt = getattr(sys.modules[type(body).__module__], "checkpoint_filter_fn", None)
        _fill_from_file(body, name, pretrained, adapt)
    return _made(body, layers, mean, std)


def torchvision_network(
    model: str,
    num_classes: int,
    in_channels: int,
    layers: Layers,
    mean: Sequence[float],
    std: Sequence[float],
    *,
    pretrained: Pretrained = False,
    options: Mapping[str, Any] | None = None,
) -> nn.Module:
    """A classifier of torchvision, such as `torchvision:resnet50`.

    Args and errors as of `timm_network`; `options` are those of the model's function. For C ≠ 3 the
    first convolution is replaced.
    """
    from torchvision import models

    name, offered = f"torchvision:{model}", _torchvision_weights(model)
    try:
        body = models.get_model(model, num_classes=num_classes, **_checked(name, options))
    except (TypeError, ValueError) as error:
        raise InputError(f"{name}: {_first_line(error)}") from error
    if in_channels != 3:
        _replace_first_convolution(body, in_channels)
    if pretrained is True and not _on_meta():
        try:
            state = offered.get_state_dict(check_hash=True)
        except (OSError, RuntimeError) as error:
            raise _unfetched(name, offered.url, error) from error
        fill(body, state, f"{name}: {offered.url}")
    _fill_from_file(body, name, pretrained)
    return _made(body, layers, mean, std)


def own_network(
    path: str,
    function: str,
    num_classes: int,
    in_channels: int,
    layers: Layers,
    mean: Sequence[float],
    std: Sequence[float],
    *,
    pretrained: Pretrained = False,
    options: Mapping[str, Any] | None = None,
) -> nn.Module:
    """A network that a function of your own returns, such as `file:models/mine.py:build`.

    Args:
        path: of the Python file; it lies in the folder where snakemake runs, from where it imports.
        function: returns a module that maps (rows, C, H, W) in [0, 1] to (rows, K). It is given
            `options`, and of `num_classes` and `in_channels` what it takes.
        num_classes, in_channels: K and C.
        layers: of which kind.
        mean, std: not used; the module normalises by itself.
        pretrained: a file of its weights.
        options: other arguments of the function.

    Raises:
        InputError: there is no such file or function, or it fails.
    """
    name = f"file:{path}:{function}"
    module = _module(path)
    build = getattr(module, function, None)
    # What a file imports may do anything, and headers of weights files name functions too.
    if not callable(build) or getattr(build, "__module__", None) != module.__name__:
        raise InputError(f"{name}: the file has no function {function!r} of its own")
    sizes = {"num_classes": num_classes, "in_channels": in_channels}
    takes = inspect.signature(build).parameters
    takes_all = any(it.kind is it.VAR_KEYWORD for it in takes.values())
    sizes = {key: value for key, value in sizes.items() if takes_all or key in takes}
    try:
        body = build(**sizes, **_checked(name, options))
    except Exception as error:  # it is the user's
        raise InputError(f"{name}: {type(error).__name__}: {_first_line(error)}") from error
    if not isinstance(body, nn.Module):
        raise InputError(f"{name}: returned {type(body).__name__}, not a torch.nn.Module")
    if pretrained is True:
        raise InputError(f"{name}: 'pretrained' must be a file of weights")
    _fill_from_file(body, name, pretrained)
    return _made(body, layers, [0.0] * in_channels, [1.0] * in_channels)


def given_network(
    kind: str,
    num_classes: int,
    in_channels: int,
    layers: Layers,
    mean: Sequence[float],
    std: Sequence[float],
    *,
    module: nn.Module | None = None,
) -> nn.Module:
    """A network that is given in memory, with its weights; it stays as it is.

    Args:
        kind: the name of its class.
        num_classes, in_channels: K and C.
        layers: of which kind.
        mean, std: not used; the module normalises by itself.
        module: maps (rows, C, H, W) in [0, 1] to (rows, K).

    Raises:
        InputError: it is not there.
    """
    if not isinstance(module, nn.Module):  # a header of a weights file may say anything
        raise InputError(
            f"its network is a module of your own ({kind}), which no file of weights holds: give "
            "it too, as in ensdistill.load(path, network=module)"
        )
    return _made(module, layers, [0.0] * in_channels, [1.0] * in_channels)


def pretrained_statistics(family: str, model: str, channels: int) -> dict[str, list[float]]:
    """Mean and std of the pixels that the weights a library offers were trained on.

    Returns:
        `mean` and `std` of each channel, in [0, 1]; those of colour are averaged where there are
        not three channels. Nothing where they are not known.
    """
    if family == "timm":
        cfg = _timm_cfg(model)
        known = None if cfg is None else (cfg.mean, cfg.std)
    elif family == "torchvision":
        transforms = _torchvision_weights(model).transforms()
        known = transforms.mean, transforms.std
    else:
        known = None
    if known is None:
        return {}
    mean, std = ([*it] if channels == 3 else [sum(it) / len(it)] * channels for it in known)
    return {"mean": mean, "std": std}


# --- parts --------------------------------------------------------------------------------------


def _made(
    body: nn.Module, layers: Layers, mean: Sequence[float], std: Sequence[float]
) -> LibraryNetwork:
    """The network of such layers.

    Raises:
        InputError: none can be made of it.
    """
    if layers.convert is None:
        raise InputError(
            "a packed ensemble is made of this package's own architectures, such as resnet32"
        )
    try:
        body = layers.convert(with_attention(body))
    except ValueError as error:
        raise InputError(str(error)) from error
    for find, kind in ((first_convolution, _StemInFloat32), (last_layer, _InFloat32)):
        if name := find(body):
            layer = body.get_submodule(name)
            layer.__class__ = _exact(kind, cast(Any, type(layer)))
    return LibraryNetwork(body, mean, std)


class _InFloat32(nn.Module):
    """Computes in float32 also under autocast."""

    def forward(self, x: Tensor) -> Tensor:
        return in_float32(super().forward, x)


class _StemInFloat32(nn.Module):
    """The same; what it returns is of the type in which autocast goes on."""

    def forward(self, x: Tensor) -> Tensor:
        return in_float32(super().forward, x).to(autocast_dtype(x))


@cache
def _exact(how: Any, kind: Any) -> type[nn.Module]:
    return type(kind.__name__, (how, kind), {"kind": kind})


def _replace_first_convolution(network: nn.Module, channels: int) -> None:
    """By one that takes images of other channels, with new weights."""
    name = first_convolution(network) or ""
    old: Any = network.get_submodule(name)
    how: Any = {"padding_mode": old.padding_mode, "bias": old.bias is not None}
    sizes = (channels, old.out_channels, old.kernel_size, old.stride, old.padding, old.dilation)
    new = nn.Conv2d(*sizes, **how)
    fan_out = old.out_channels * math.prod(old.kernel_size)
    nn.init.normal_(new.weight, 0, math.sqrt(2 / fan_out))
    replace(network, name, new)


def _on_meta() -> bool:
    """Whether tensors have no storage here, so that no weights are wanted."""
    return torch.get_default_device().type == "meta"


def _timm() -> Any:
    try:
        import timm
    except ImportError:
        raise InputError(
            "architectures of timm need the package timm: pip install 'ensdistill[timm]'"
        ) from None
    return timm


def _timm_cfg(model: str) -> Any:
    """What timm knows of a network's weights, if anything."""
    try:
        return _timm().get_pretrained_cfg(model)
    except RuntimeError as error:
        raise InputError(f"timm:{model}: {_first_line(error)}") from error


def _torchvision_weights(model: str) -> Any:
    """The best weights that torchvision offers of a classifier."""
    from torchvision import models

    known = models.list_models(module=models)
    if model not in known:
        raise InputError(f"unknown architecture 'torchvision:{model}'{_close(model, known)}")
    return models.get_model_weights(model).DEFAULT


def _module(path: str) -> Any:
    """The module of a Python file, run once a process."""
    place = Path(path).resolve()
    if not place.is_relative_to(Path.cwd()):
        raise InputError(f"file:{path}: is not in the folder where snakemake runs")
    if not place.is_file():
        raise InputError(f"file:{path}: no such file")
    if not _is_of_user(place):
        raise InputError(f"file:{path}: is a file of an installed package, or hidden")
    name = f"ensdistill_architectures_{place.as_posix().encode().hex()}"
    if name not in sys.modules:
        if (here := str(Path.cwd())) not in sys.path:
            sys.path.append(here)
        spec = importlib.util.spec_from_file_location(name, place)
        assert spec
        assert spec.loader
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except Exception as error:  # it is the user's
            del sys.modules[name]
            raise InputError(
                f"file:{path}: {type(error).__name__}: {_first_line(error)}"
            ) from error
    return sys.modules[name]


def _is_of_user(place: Path) -> bool:
    """Whether a file below the current folder is no installed package's, and not hidden.

    A header of a weights file could otherwise have any of their functions called.
    """
    here = Path.cwd()
    installed = (sys.prefix, sys.base_prefix, PACKAGE)
    parts = place.relative_to(here).parts
    return not any(it.startswith(".") or it == "site-packages" for it in parts) and not any(
        place.is_relative_to(it) for it in installed if Path(it).is_relative_to(here)
    )


def _checked(name: str, options: Mapping[str, Any] | None) -> dict[str, Any]:
    given = dict(options or {})
    if reserved := RESERVED & given.keys():
        raise InputError(f"{name}: {min(reserved)!r} is no option: the study decides it")
    return given


def _fill_from_file(
    body: nn.Module,
    name: str,
    pretrained: Pretrained,
    adapt: Callable[[dict[str, Tensor], nn.Module], dict[str, Tensor]] | None = None,
) -> None:
    """Fill a network from a file of weights, if `pretrained` names one and numbers are wanted."""
    if not isinstance(pretrained, str) or _on_meta():
        return
    if not Path(pretrained).is_file():
        raise InputError(f"{name}: no such file of weights: {pretrained}")
    state, what = read_stored(pretrained).tensors, f"{name}: {pretrained}"
    try:
        state = adapt(state, body) if adapt else state
    except Exception as error:  # it is not of this network
        raise InputError(f"{what}: {_first_line(error)}") from error
    fill(body, state, what)


def _close(model: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(model, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _unfetched(name: str, what: str, error: Exception) -> InputError:
    return InputError(
        f"{name}: its weights cannot be fetched ({_first_line(error)}); fetch {what} elsewhere and "
        "set 'pretrained' to the path of that file"
    )


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
