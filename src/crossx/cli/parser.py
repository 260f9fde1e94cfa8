"""Parsers, help and one-line errors of the verbs, built with jsonargparse from signatures and docstrings.

A verb is one typed function with a Google-style docstring. Parameters before ``*`` are positional arguments, the others
are options, a ``bool`` is a flag, and a dataclass is a group of options. ``Annotated`` adds a metavar, a spelling other
than the parameter's name, or the type to parse with. ``*words`` takes the options of another verb.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import re
import textwrap
import types
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import docstring_parser
import jsonargparse
from jsonargparse.typing import ClosedUnitInterval, NonNegativeFloat, NonNegativeInt, PositiveInt

from crossx.errors import UsageError, nearest

RunPath = Annotated[str, "RUN"]
Folder = Annotated[str, "DIR"]
File = Annotated[str, "FILE"]
Name = Annotated[str, "NAME"]
Natural = Annotated[int, "N", NonNegativeInt]
Positive = Annotated[int, "N", PositiveInt]
Tolerance = Annotated[float, "X", NonNegativeFloat]
Fraction = Annotated[float, "X", ClosedUnitInterval]

SECTIONS = ("model", "data", "optim", "trainer")
"""Groups whose options bear the group's name, as in a recipe: ``--data.root``."""
EPILOG = "An error is one line and exit code 1, or 2 for a wrong command; --debug shows its traceback."
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
}
_NUMBER = re.compile(r"-(\d+|\d*\.\d+)$")
_UNIONS = (Union, types.UnionType)
_LISTS = (list, Sequence)


@dataclasses.dataclass(frozen=True)
class Option:
    """One option, or positional argument, of a parser.

    Attributes:
        name: Where its value goes, such as ``data.root``.
        hint: What jsonargparse parses it as.
        default: Its default; ``dataclasses.MISSING`` where it is required.
        help: What the docstring says.
        spelling: What is typed, such as ``--data.root``; empty for a positional argument.
        metavar: What stands for its value in the help.
        many: Whether it takes several words.
        group: Title of its group in the help; empty for none.
    """

    name: str
    hint: Any
    default: Any
    help: str
    spelling: str
    metavar: str
    many: bool = False
    group: str = ""


class HelpFormatter(jsonargparse.DefaultHelpFormatter):
    """Help in paragraphs as the docstrings have them, with the default of each option."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32, width=110)  # type: ignore[no-untyped-call]

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        paragraphs = text.split("\n\n")
        return "\n\n".join(
            part if "\n  " in part else textwrap.fill(" ".join(part.split()), width) for part in paragraphs
        )

    def _expand_help(self, action: argparse.Action) -> str:
        text, default = action.help or "", action.default
        if default in (None, argparse.SUPPRESS) or "(default" in text or action.nargs == 0:
            return text
        if isinstance(default, (list, tuple)):
            default = list(default) if action.nargs is None else " ".join(map(str, default))
        shown = str(default).lower() if isinstance(default, bool) else default
        return f"{text} (default: {shown})" if shown not in ("", [], {}) else text

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        # jsonargparse adds a spelling with `+` to each list
        metavar = self._format_args(action, action.dest.upper())
        return f"{action.option_strings[0]} {metavar}"


def call(function: Callable[..., int | None], words: Sequence[str], verb: str) -> int:
    """Parse a verb's words, call its function with them, and return the exit code.

    Raises:
        UsageError: For whatever is missing, unknown or of the wrong type.
        SystemExit: After ``--help``.
    """
    parser = build(function, verb)
    own, rest = _split(words, parser)
    passes_on = any(p.kind is p.VAR_POSITIONAL for p in inspect.signature(function).parameters.values())
    positional = [] if passes_on else _positional(rest, parser)
    values = parse(parser, [*own, "--", *positional] if positional else own)
    arguments = {}
    for name, hint in _parameters(function):
        if dataclasses.is_dataclass(hint):
            fields = [field.name for field in dataclasses.fields(hint) if field.init]
            given = values[name] if name in SECTIONS else values
            arguments[name] = hint(**{field: given[field] for field in fields})  # type: ignore[operator]
        else:
            arguments[name] = values[name]
    return function(*(rest if passes_on else ()), **arguments) or 0


def build(function: Callable[..., Any], verb: str) -> jsonargparse.ArgumentParser:
    """Return the parser of a verb's function."""
    text, examples = documentation(function)
    parser = new_parser(f"crossx {verb}", text, examples)
    add_options(parser, function_options(function))
    return parser


def new_parser(
    prog: str, description: str, examples: str, usage: str | None = None
) -> jsonargparse.ArgumentParser:
    """Return a parser without options."""
    return jsonargparse.ArgumentParser(
        prog=prog,
        usage=usage,
        description=description,
        epilog=f"examples:\n{textwrap.indent(examples, '  ')}\n\n{EPILOG}",
        formatter_class=HelpFormatter,
        exit_on_error=False,
        print_config=None,
        allow_abbrev=False,
    )


def parse(parser: jsonargparse.ArgumentParser, words: Sequence[str]) -> dict[str, Any]:
    """Parse words, turning jsonargparse's errors into ours."""
    try:
        return parser.parse_args(list(words)).as_dict()
    except argparse.ArgumentError as error:
        raise explain(str(error), parser) from error


def add_options(parser: jsonargparse.ArgumentParser, options: Iterable[Option]) -> None:
    """Add options, each group of them under its title."""
    containers: dict[str, Any] = {"": parser}
    for option in options:
        if option.group not in containers:
            containers[option.group] = parser.add_argument_group(option.group)
        settings: dict[str, Any] = {"help": option.help}
        required = option.default is dataclasses.MISSING
        if option.hint is bool and not option.metavar:
            settings["action"] = "store_true"
        else:
            settings |= {"type": option.hint, "metavar": option.metavar}
            if option.many:
                settings["nargs"] = "+"
            if not required:
                settings["default"] = list(option.default) if option.many else option.default
        if option.spelling:
            settings |= {"dest": option.name, "required": True} if required else {"dest": option.name}
        elif not required:
            settings["nargs"] = "?"
        containers[option.group].add_argument(option.spelling or option.name, **settings)


def function_options(function: Callable[..., Any]) -> Iterator[Option]:
    """Yield the options of a verb's function."""
    signature, helps = inspect.signature(function), option_helps(function)
    for name, hint in _parameters(function):
        if dataclasses.is_dataclass(hint):
            section = f"{name}." if name in SECTIONS else ""
            yield from _group_options(hint, section)
        else:
            parameter = signature.parameters[name]
            missing = parameter.default is inspect.Parameter.empty
            default = dataclasses.MISSING if missing else parameter.default
            prefix = "--" if parameter.kind is inspect.Parameter.KEYWORD_ONLY else ""
            yield _plain_option(name, hint, default, helps.get(name, ""), prefix)


def section_options(cls: type[Any], section: str, skip: Collection[str] = ()) -> Iterator[Option]:
    """Yield the options of a section of a recipe, whose values are YAML, from a config dataclass."""
    hints, helps = get_type_hints(cls), option_helps(cls)
    for field in dataclasses.fields(cls):
        if field.name not in skip:
            yield yaml_option(
                f"{section}.{field.name}",
                hints[field.name],
                _default(field),
                helps[field.name],
                first_line(cls),
            )


def yaml_option(name: str, hint: Any, default: Any, text: str, group: str = "") -> Option:
    """Return an option whose value is YAML."""
    return Option(name, hint, default, text, f"--{name}", _metavar(hint, name), group=group)


def documentation(function: Any) -> tuple[str, str]:
    """Return what a docstring says before ``Args:``, and its ``Examples:``."""
    text, _, examples = (inspect.getdoc(function) or "").partition("\nExamples:\n")
    return text.partition("\nArgs:\n")[0].strip(), textwrap.dedent(examples)


def option_helps(documented: Any) -> dict[str, str]:
    """Return what the ``Args:`` or ``Attributes:`` of a docstring, or of what has one, say: name to text."""
    doc = documented if isinstance(documented, str) else inspect.getdoc(documented) or ""
    params = docstring_parser.parse(doc.partition("\nExamples:\n")[0]).params
    return {
        param.arg_name: " ".join((param.description or "").replace("``", "`").split()) for param in params
    }


def first_line(documented: Any) -> str:
    """Return the first line of a docstring, without its full stop."""
    return (inspect.getdoc(documented) or "").partition("\n")[0].removesuffix(".")


def describe(hint: Any) -> str:
    """Say in words what a type takes."""
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
    """Return the values that a type spells out."""
    if get_origin(hint) is Literal:
        return list(get_args(hint))
    return [item for part in get_args(hint) for item in literals(part)]


def explain(message: str, parser: jsonargparse.ArgumentParser) -> UsageError:
    """Say in one line what jsonargparse found wrong."""
    _, unrecognized, rest = message.partition("unrecognized arguments: ")
    if unrecognized:
        return unknown_argument(rest.split()[0], parser)
    _, required, names = message.partition("arguments are required: ")
    if required:
        shown = [_shown(_action(parser, name)) for name in names.split(", ")]
        return UsageError(
            f"the following arguments are required: {', '.join(shown)}; see `{parser.prog} --help`."
        )
    if match := re.match(r'Parser key "([\w.]+)"', message):
        action = _action(parser, match[1])
        given = re.search(
            r"(?:Given value|Got value|base 10|to float): (.*)|: (\S+) does not conform", message
        )
        value = (given[1] or given[2]).strip("'") if given else "this"
        hint = getattr(action, "_typehint", action.type)
        hint_names = [str(item) for item in literals(hint)]
        return UsageError(
            f"{_shown(action)} takes {describe(hint)}, not {value!r}.{nearest(value, hint_names)}"
        )
    return UsageError(f"{' '.join(message.removeprefix('argument ').split())}; see `{parser.prog} --help`.")


def unknown_argument(argument: str, parser: jsonargparse.ArgumentParser, prog: str = "") -> UsageError:
    """Build the error for an argument that a parser does not take, with the nearest option."""
    known = [name for name in parser._option_string_actions if name[-1] != "+"]
    return unknown_option(argument, known, prog or parser.prog)


def unknown_option(argument: str, known: Sequence[str], prog: str) -> UsageError:
    """Build the error for an argument that the command ``prog`` does not take, with the nearest of its options."""
    name = argument.split("=", 1)[0]
    if not name.startswith("-"):
        return UsageError(f"unexpected argument {argument!r}; see `{prog} --help`.")
    same_end = [option for option in known if option.split(".")[-1] == name.lstrip("-").split(".")[-1]]
    hint = f" Did you mean {same_end[0]!r}?" if len(same_end) == 1 else nearest(name, known)
    return UsageError(f"unknown option {name!r}.{hint} `{prog} --help` lists the options.")


def _split(words: Sequence[str], parser: jsonargparse.ArgumentParser) -> tuple[list[str], list[str]]:
    """Part the options that a parser has, with their values, from the other words."""
    own: list[str] = []
    rest: list[str] = []
    left = list(words)
    while left and left[0] != "--":
        word = left.pop(0)
        action = parser._option_string_actions.get(word.partition("=")[0])
        if action is None:
            rest.append(word)
            continue
        own.append(word)
        if "=" not in word and action.nargs != 0:
            while left and not _is_option(left[0]):
                own.append(left.pop(0))
                if action.nargs != "+":
                    break
    if {"-h", "--help"} & {*own}:
        return ["--help"], []
    return own, rest + left


def _positional(words: Sequence[str], parser: jsonargparse.ArgumentParser) -> list[str]:
    """Return positional arguments, those after ``--`` as they are."""
    if "--" in words:
        end = words.index("--")
        words, verbatim = words[:end], words[end + 1 :]
    else:
        verbatim = []
    for word in words:
        if _is_option(word) or not any(not action.option_strings for action in parser._actions):
            raise unknown_argument(word, parser)
    return [*words, *verbatim]


def _is_option(word: str) -> bool:
    return word.startswith("-") and word != "-" and not _NUMBER.match(word)


def _parameters(function: Callable[..., Any]) -> Iterator[tuple[str, Any]]:
    hints = get_type_hints(function, include_extras=True)
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is not inspect.Parameter.VAR_POSITIONAL:
            yield parameter.name, hints[parameter.name]


def _group_options(cls: Any, section: str) -> Iterator[Option]:
    hints, helps = get_type_hints(cls, include_extras=True), option_helps(cls)
    for field in dataclasses.fields(cls):
        option = _plain_option(
            f"{section}{field.name}", hints[field.name], _default(field), helps[field.name]
        )
        yield dataclasses.replace(option, group=first_line(cls))


def _plain_option(name: str, hint: Any, default: Any, text: str, prefix: str = "--") -> Option:
    """Return an option whose value is one word, or several, without YAML in it."""
    parts = (
        [part for part in get_args(hint) if part is not type(None)] if get_origin(hint) in _UNIONS else [hint]
    )
    hint, extras = _without_annotation(parts[0] if len(parts) == 1 else hint)
    many = get_origin(hint) in _LISTS
    if many:
        hint, inner = _without_annotation(get_args(hint)[0])
        extras = (*inner, *extras)
    spelling = next((extra for extra in extras if isinstance(extra, str) and extra.startswith("--")), None)
    metavar = next((extra for extra in extras if isinstance(extra, str) and extra != spelling), None)
    if metavar is None:
        metavar = "" if hint is bool else _metavar(hint, name)
    hint = next((extra for extra in extras if isinstance(extra, type)), hint)
    return Option(name, hint, default, text, spelling or (prefix and f"{prefix}{name}"), metavar, many)


def _without_annotation(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    return (hint.__origin__, hint.__metadata__) if get_origin(hint) is Annotated else (hint, ())


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _metavar(hint: Any, name: str) -> str:
    parts = (
        [part for part in get_args(hint) if part is not type(None)] if get_origin(hint) in _UNIONS else [hint]
    )
    if all(get_origin(part) is Literal for part in parts):
        return "{" + ",".join(dict.fromkeys(map(str, literals(hint)))) + "}"
    known = {int: "N", float: "X", bool: "{true,false}"}
    if len(parts) == 1 and parts[0] in known:
        return known[parts[0]]
    return name.rpartition(".")[2].upper()


def _direct_literals(hint: Any) -> list[Any]:
    return [value for part in get_args(hint) if get_origin(part) is Literal for value in get_args(part)]


def _action(parser: jsonargparse.ArgumentParser, name: str) -> argparse.Action:
    return next(action for action in parser._actions if action.dest == name)


def _shown(action: argparse.Action) -> str:
    return action.option_strings[0] if action.option_strings else str(action.metavar)
