"""Options made of signatures and docstrings: the type, the default and the help of each are written once."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import re
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import timedelta
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import docstring_parser
import jsonargparse


@dataclasses.dataclass(frozen=True)
class Option:
    """One option as the parser needs it: dotted name, type, default, and help."""

    name: str
    hint: Any
    default: Any
    help: str


def dataclass_options(cls: type[Any], section: str, skip: Iterable[str] = ()) -> Iterator[Option]:
    """Yield one option for each field of a config dataclass, described by its ``Attributes:``."""
    hints, helps = get_type_hints(cls), option_helps(cls)
    for item in dataclasses.fields(cls):
        if item.name not in skip:
            factory = item.default_factory
            default = item.default if factory is dataclasses.MISSING else factory()
            yield Option(f"{section}.{item.name}", hints[item.name], default, helps[item.name])


def keyword_options(
    function: Callable[..., Any], documented: Any, section: str, skip: Iterable[str] = ()
) -> Iterator[Option]:
    """Yield one option for each keyword-only argument, described by the ``Args:`` of ``documented``."""
    hints, helps = get_type_hints(function), option_helps(documented)
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY and parameter.name not in skip:
            yield Option(
                f"{section}.{parameter.name}",
                _plain(hints[parameter.name]),
                parameter.default,
                helps.get(parameter.name, ""),
            )


def describe(hint: Any) -> str:
    """Say in words what a type takes."""
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
    if hint in words:
        return words[hint]
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        names = [str(value) for value in literals(hint)]
        others = [describe(part) for part in get_args(hint) if get_origin(part) is not Literal]
        return " or ".join(dict.fromkeys([*([", ".join(dict.fromkeys(names))] if names else []), *others]))
    if origin is Literal:
        return ", ".join(map(str, get_args(hint)))
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return "a mapping such as {name: value}"
    return "a list such as [1, 2]"


def literals(hint: Any) -> list[Any]:
    """Return the values that a type spells out."""
    if get_origin(hint) is Literal:
        return list(get_args(hint))
    return [item for part in get_args(hint) for item in literals(part)]


def _plain(hint: Any) -> Any:
    """Leave of a union what can be typed on a command line (no accelerator, strategy or profiler objects)."""
    if get_origin(hint) not in (Union, types.UnionType):
        return hint
    parts = [
        part
        for part in get_args(hint)
        if get_origin(part) or part.__module__ in ("builtins", timedelta.__module__)
    ]
    return Union[tuple(parts)]  # noqa: UP007


def add_option(container: Any, option: Option) -> None:
    """Add one option to a parser or group."""
    container.add_argument(f"--{option.name}", type=option.hint, default=option.default, help=option.help)


def option_helps(documented: Any) -> dict[str, str]:
    """Return what a docstring's ``Args:`` or ``Attributes:`` say, name to text."""
    params = docstring_parser.parse(inspect.getdoc(documented) or "").params
    return {param.arg_name: _without_markup(param.description or "") for param in params}


def first_line(cls: type[Any]) -> str:
    """Return the first line of a class's docstring, without its full stop."""
    return (inspect.getdoc(cls) or "").partition("\n")[0].removesuffix(".")


def _without_markup(text: str) -> str:
    """Drop reStructuredText's roles, double backticks, line breaks and the default, which is shown beside."""
    text = re.sub(r":\w+:`~?([^`]*)`", r"\1", text).replace("``", "`")
    return re.sub(r" Default: `[^`]*`\.$", "", " ".join(text.split()))


class HelpFormatter(jsonargparse.DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Types and values in effect beside each option; the examples keep their lines."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32, width=110)  # type: ignore[no-untyped-call]
