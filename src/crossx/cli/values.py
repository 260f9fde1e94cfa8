"""Types of the values of options, and what messages call them."""

from __future__ import annotations

import argparse
import dataclasses
import types
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from jsonargparse.typing import (
    ClosedUnitInterval,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    restricted_number_type,
)


@dataclasses.dataclass(frozen=True)
class Help:
    """Help text in ``Annotated``, for parameters that several verbs share."""

    text: str


Folder = Annotated[str, "DIR"]
File = Annotated[str, "FILE"]
Name = Annotated[str, "NAME"]
Natural = Annotated[int, "N", NonNegativeInt]
Positive = Annotated[int, "N", PositiveInt]
Tolerance = Annotated[float, "X", NonNegativeFloat]
Fraction = Annotated[float, "X", ClosedUnitInterval]
CoverageNumber = restricted_number_type("CoverageNumber", float, [(">=", 0.5), ("<=", 0.99)])
Coverage = Annotated[float, "X", CoverageNumber]
KeepNumber = restricted_number_type("KeepNumber", float, [(">", 0), ("<=", 1)])
Keep = Annotated[float, "X", KeepNumber]

IN_WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    type(None): "null",
    NonNegativeInt: "a whole number of at least 0",
    PositiveInt: "a whole number of at least 1",
    NonNegativeFloat: "a number of at least 0",
    ClosedUnitInterval: "a number from 0 to 1",
    CoverageNumber: "a number from 0.5 to 0.99",
    KeepNumber: "a number above 0, at most 1",
}
"""Values of a type, as in "--top takes a whole number"."""
EMPTY = "the value is empty: give one, or leave it out"
_UNIONS = (Union, types.UnionType)


def text(value: object) -> str:
    """Take a word of the command line as it is, whatever YAML would make of it.

    Raises:
        ValueError: If it is empty, or a file gives something else than text.
    """
    if not isinstance(value, str):
        raise ValueError(f"Got value: {value}")
    if not value:
        raise _EmptyError(EMPTY)
    return value


class _EmptyError(argparse.ArgumentTypeError, ValueError):
    """An empty value. argparse shows the message of the first base, jsonargparse that of the second."""


def describe(hint: Any) -> str:
    """Describe in words the values of a type."""
    if hint in IN_WORDS:
        return IN_WORDS[hint]
    origin = get_origin(hint)
    if origin is Literal:
        return ", ".join(map(str, get_args(hint)))
    if origin in _UNIONS:
        names = ", ".join(dict.fromkeys(map(str, _direct_literals(hint))))
        others = [describe(part) for part in get_args(hint) if get_origin(part) is not Literal]
        return " or ".join(dict.fromkeys([names, *others] if names else others))
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return "a mapping such as {name: value}"
    names = ", ".join(map(str, literals(hint)))
    return f"a list of {names}" if names else "a list such as [1, 2]"


def literals(hint: Any) -> list[Any]:
    """Return the values of the ``Literal`` types in a type."""
    if get_origin(hint) is Literal:
        return list(get_args(hint))
    return [item for part in get_args(hint) for item in literals(part)]


def without_none(hint: Any) -> list[Any]:
    """Return the types that a type allows beside None."""
    parts = get_args(hint) if get_origin(hint) in _UNIONS else (hint,)
    return [part for part in parts if part is not type(None)]


def _direct_literals(hint: Any) -> list[Any]:
    return [value for part in get_args(hint) if get_origin(part) is Literal for value in get_args(part)]
