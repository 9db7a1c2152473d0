"""What all sections of config.yaml have in common: strict types, numbers, choices."""

import math
import re
from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    WithJsonSchema,
    model_serializer,
    model_validator,
)


def _number(value: Any) -> Any:
    """Lets 1e-3 be a number; to YAML 1.1 it is a text, as it wants a point and a sign, 1.0e-3."""
    if isinstance(value, str) and re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+", value):
        number = float(value)
        if math.isfinite(number):
            return int(number) if number.is_integer() else number
    return value


Number = Annotated[float, BeforeValidator(_number)]
Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
Seeds = Annotated[int, Field(ge=1, le=10_000)]
"""So many trainings; more is a slip of the hand, and would fill the memory with names."""


def _fraction(value: Any) -> Any:
    """Lets a step be written as pixels are counted: 1/255."""
    if not isinstance(value, str):
        return value
    try:
        above, _, below = value.partition("/")
        number = float(above) / float(below or 1)
        if not math.isfinite(number):
            raise ValueError
        return number
    except (ValueError, ArithmeticError):
        raise ValueError(f"{value!r} is neither a number nor a fraction such as 1/255") from None


Eta = Annotated[
    float,
    BeforeValidator(_fraction),
    Field(ge=0),
    WithJsonSchema({"anyOf": [{"type": "number", "minimum": 0}, {"type": "string"}]}),
]


class Section(BaseModel):
    """A part of the configuration: no unknown keys, no silent conversions."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )

    later: ClassVar[frozenset[str]] = frozenset()
    """Keys that came with a later version: left out of what is dumped where they have their
    default, so that what was made before them stays up to date."""

    @model_validator(mode="before")
    @classmethod
    def _numbers_in_any_notation(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        return {key: _number(it) if key in _numeric(cls) else it for key, it in value.items()}

    @model_serializer(mode="wrap")
    def _without_later(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        unused = self.unused()
        return {key: value for key, value in dump(self).items() if key not in unused}

    def unused(self) -> set[str]:
        """Keys that are not dumped."""
        fields = type(self).model_fields
        return {key for key in self.later if getattr(self, key) == fields[key].default}


@cache
def _numeric(section: type[Section]) -> set[str]:
    """The keys of a section whose values are numbers and never texts."""
    of_keys = {key: kinds(field.annotation) for key, field in section.model_fields.items()}
    return {key for key, types in of_keys.items() if {int, float} & {*types} and str not in types}


def kinds(annotation: Any) -> list[Any]:
    """All types that a type is made of, in the order in which they are written."""
    return [annotation, *(it for part in get_args(annotation) for it in kinds(part))]


def as_section(value: Any) -> Any:
    """A name alone stands for the section with that name and no options."""
    return {"name": value} if isinstance(value, str) else value


def one_of(*sections: type[Section]) -> Any:
    """The type of an axis: one of several sections, told apart by `name`, or a name alone."""
    union: Any = sections[0]
    for section in sections[1:]:
        union = union | section
    known: Any = tuple(section.model_fields["name"].default for section in sections)
    names: Any = Literal[known]
    one: Any = Annotated[union, Field(discriminator="name")]
    return Annotated[one, BeforeValidator(as_section, json_schema_input_type=names | one)]
