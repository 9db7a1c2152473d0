"""Architectures by name, such as resnet32: how the names are written, and what config.yaml may say.

The Snakefile reads this module in every process, so it does not import PyTorch; the builders are in
networks.py.
"""

import re
from typing import Annotated, NamedTuple

from pydantic import BeforeValidator, field_validator

from ensdistill.sections import Count, Section, as_section


class Family(NamedTuple):
    """How the names of some architectures are written."""

    pattern: str
    """A regular expression; its groups are the sizes that the builder takes."""
    beside_blocks: int | None = None
    """Where depth is a size: it must be 6n and so many layers, n ≥ 1."""


ARCHITECTURES = {
    "resnet": Family(r"resnet-?(?P<depth>\d+)", beside_blocks=2),
    "wrn": Family(r"wrn-?(?P<depth>\d+)[x_-](?P<widen>\d+)", beside_blocks=4),
}
"""By family; the builders are in networks.ARCHITECTURES."""


def parse_architecture(name: str) -> tuple[str, dict[str, int]]:
    """Family and sizes of a name such as `resnet32` (depth) or `wrn28x10` (depth and widen).

    Raises:
        ValueError: there is no such family, or no such size.
    """
    for family, (pattern, beside) in ARCHITECTURES.items():
        if match := re.fullmatch(pattern, name):
            sizes = {key: int(value) for key, value in match.groupdict().items()}
            if beside is not None and (sizes["depth"] <= beside or (sizes["depth"] - beside) % 6):
                raise ValueError(
                    f"{name!r} does not exist: a {family} has 6n+{beside} layers, n ≥ 1"
                )
            if not all(sizes.values()):
                raise ValueError(f"{name!r} does not exist: its sizes must be at least 1")
            return family, sizes
    raise ValueError(f"unknown architecture {name!r}: try resnet32 or wrn28x10")


class Architecture(Section):
    """The layers of a network."""

    name: str = "resnet32"
    """`resnet{6n+2}`, such as resnet32, or `wrn{6n+4}x{k}`, such as wrn28x10."""
    width: Count = 16
    """Channels of the first stage (of a WRN: before the factor k)."""

    @field_validator("name")
    @classmethod
    def _exists(cls, name: str) -> str:
        parse_architecture(name)
        return name


NamedArchitecture = Annotated[
    Architecture, BeforeValidator(as_section, json_schema_input_type=str | Architecture)
]
