"""Architectures by name, such as resnet32: how the names are written, and what config.yaml may say.

The Snakefile reads this module in every process, so it does not import PyTorch; the builders are in
networks.py.
"""

import re
from typing import Annotated, Any, ClassVar, NamedTuple, Self

from pydantic import BeforeValidator, field_validator, model_validator

from ensdistill.sections import Count, Section, as_section


class Family(NamedTuple):
    """How the names of some architectures are written."""

    pattern: str
    """A regular expression; its groups are what the builder takes: sizes, and other names."""
    beside_blocks: int | None = None
    """Where depth is a size: it must be 6n and so many layers, n ≥ 1."""


ARCHITECTURES = {
    "resnet": Family(r"resnet-?(?P<depth>\d+)", beside_blocks=2),
    "wrn": Family(r"wrn-?(?P<depth>\d+)[x_-](?P<widen>\d+)", beside_blocks=4),
    "timm": Family(r"timm:(?P<model>[\w.]+)"),
    "torchvision": Family(r"torchvision:(?P<model>\w+)"),
    "file": Family(r"file:(?P<path>[^:]+\.py):(?P<function>[A-Za-z_]\w*)"),
    "module": Family(r"module:(?P<kind>\w+)"),
}
"""By family; the builders are in networks.ARCHITECTURES."""


LIBRARIES = ("timm", "torchvision", "file", "module")
"""Families of networks that were not written for this package."""


def parse_architecture(name: str) -> tuple[str, dict[str, Any]]:
    """Family and sizes of a name such as `resnet32` (depth) or `wrn28x10` (depth and widen).

    Of `timm:resnet18` and `torchvision:resnet18` the model, of `file:models/mine.py:build` path and
    function, of `module:Net`, a network that is given in memory, the name of its class.

    Raises:
        ValueError: there is no such family, or no such size.
    """
    for family, (pattern, beside) in ARCHITECTURES.items():
        if match := re.fullmatch(pattern, name):
            if family in LIBRARIES:
                return family, match.groupdict()
            sizes = {key: int(value) for key, value in match.groupdict().items()}
            if beside is not None and (sizes["depth"] <= beside or (sizes["depth"] - beside) % 6):
                raise ValueError(
                    f"{name!r} does not exist: a {family} has 6n+{beside} layers, n ≥ 1"
                )
            if not all(sizes.values()):
                raise ValueError(f"{name!r} does not exist: its sizes must be at least 1")
            return family, sizes
    raise ValueError(
        f"unknown architecture {name!r}: try resnet32 or wrn28x10, or as in timm:resnet18, "
        "torchvision:resnet18 or file:models/mine.py:build"
    )


class Architecture(Section):
    """The layers of a network."""

    later: ClassVar = frozenset({"pretrained", "options"})

    name: str = "resnet32"
    """`resnet{6n+2}`, such as resnet32; `wrn{6n+4}x{k}`, such as wrn28x10; `timm:<model>` or
    `torchvision:<model>`, such as timm:resnet18; or `file:<path>:<function>`, a function of your
    own that returns a torch.nn.Module, its file in the folder where snakemake runs."""
    width: Count = 16
    """Channels of the first stage of a resnet or wrn (before the factor k)."""
    pretrained: bool | str = False
    """Of a library's: whether training begins with the weights that it offers; or a file of
    weights, safetensors or a state dict. A last layer of other classes is new."""
    options: dict[str, Any] | None = None
    """Of a library's: other arguments of its function, such as img_size or drop_path_rate."""

    @field_validator("name")
    @classmethod
    def _exists(cls, name: str) -> str:
        family, given = parse_architecture(name)
        if family == "module":
            raise ValueError(f"{name!r} is a network in memory: write a function that returns it")
        path = given.get("path", "")
        if path.startswith(("/", "~")) or ".." in path.split("/"):
            raise ValueError(f"{path!r} must lie in the folder where snakemake runs")
        return name

    @property
    def is_of_library(self) -> bool:
        """Whether it was not written for this package."""
        return parse_architecture(self.name)[0] in LIBRARIES

    @model_validator(mode="after")
    def _has_options_of_its_own(self) -> Self:
        allowed = {"name", "pretrained", "options"} if self.is_of_library else {"name", "width"}
        if others := self.model_fields_set - allowed:
            raise ValueError(f"{min(others)!r} is no option of {self.name!r}")
        if self.pretrained is True and self.name.startswith("file:"):
            raise ValueError(f"'pretrained' of {self.name!r} must be a file of weights")
        return self

    def unused(self) -> set[str]:
        return super().unused() | ({"width"} if self.is_of_library else set())


NamedArchitecture = Annotated[
    Architecture, BeforeValidator(as_section, json_schema_input_type=str | Architecture)
]
