"""Sections of the configuration: what is dumped into parameters and headers."""

from typing import ClassVar

from ensdistill.sections import Section


class _Old(Section):
    first: int = 1


class _New(Section):
    later: ClassVar = frozenset({"second"})

    first: int = 1
    second: int | None = None


class _Both(Section):
    parts: tuple[_New, ...] = (_New(), _New(second=2))


def test_a_later_key_is_dumped_only_where_it_is_not_its_default():
    assert _New().model_dump() == _Old().model_dump()
    assert _New(second=2).model_dump() == {"first": 1, "second": 2}
    assert _Both().model_dump() == {"parts": ({"first": 1}, {"first": 1, "second": 2})}
    assert _Both().model_dump(include={"parts": {"__all__": {"second"}}}) == {
        "parts": ({}, {"second": 2})
    }
