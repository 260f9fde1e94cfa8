"""Parsers, help and one-line errors of the verbs, built with jsonargparse from signatures and docstrings.

A verb is one typed function with a Google-style docstring. Parameters before ``*`` are positional arguments, the others
are options, a ``bool`` is a flag, and a dataclass is a group of options. ``Annotated`` adds a metavar, a spelling other
than the parameter's name, the type to parse with, or the help. ``*words`` takes the options of another verb.

Of an option that is given several times, the last value counts, as in other tools; one that takes several values has
those of every time.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import os
import re
import textwrap
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import docstring_parser
import jsonargparse

from crossx.cli.main import IMPORT, IMPORTING
from crossx.cli.values import EMPTY, Help, describe, literals, text, without_none
from crossx.commands import quoted
from crossx.errors import CrossXError, UsageError
from crossx.suggestions import nearest
from crossx.terminal import fold, fold_command, page_width

IMPORT_HELP = (
    "Import a method of your own first, from a file (.py) or a module; may be repeated. A run that was trained with it "
    "remembers it."
)
SECTIONS = ("model", "data", "optim", "trainer")
"""Groups whose options have the group's name as prefix, as in a recipe: ``--data.root``."""
MAX_WIDTH = 110
"""Characters per line of a help in a wide window: longer lines are hard to read."""
EPILOG = "An error is one line and exit code 1, or 2 for a wrong command; --debug shows its traceback."
_IMAGES = {
    "source",
    "input",
    "inputs",
    "image",
    "images",
    "img",
    "i",
    "data",
    "folder",
    "file",
    "files",
    "path",
}
_POSITIONAL = {
    "RUN": {"run", "model", "weights", "checkpoint", "ckpt", "model_path", "resume", "m", "w"},
    "IMAGES": _IMAGES,
    "IMAGE_OR_FOLDER": _IMAGES,
    "NAME": {"dataset", "name"},
    "ROOT": {"root", "dir", "data", "data_root", "data_dir", "folder", "path"},
}
"""Words of other commands and tools for arguments that are given without an option here."""
_SECTION_OPTION = re.compile(r"--[a-z]+\.[a-z_]+")
_NUMBER = re.compile(r"-(\d+|\d*\.\d+)$")
_LISTS = (list, Sequence)


@dataclasses.dataclass(frozen=True)
class Option:
    """One option, or positional argument, of a parser.

    Attributes:
        name: Key of its value, such as ``data.root``.
        hint: Type to parse it as.
        default: Its default; ``inspect.Parameter.empty`` if it is required.
        help: What the docstring says.
        spelling: What is typed, such as ``--data.root``; empty for a positional argument.
        metavar: Placeholder of its value in the help; by default from the type or name.
        group: Title of its group in the help.
        many: Whether it takes several words.
        flag: Whether it takes none.
    """

    name: str
    hint: Any
    default: Any
    help: str
    spelling: str
    metavar: str = ""
    group: str = ""
    many: bool = False
    flag: bool = False


class Extend(argparse.Action):
    """Collect the values of an option that is given several times. argparse's ``extend`` adds them to the default."""

    _given = False

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: Any = None
    ) -> None:
        """Add the values, instead of the default."""
        earlier = getattr(namespace, self.dest) if self._given else []
        setattr(namespace, self.dest, [*earlier, *values])
        self._given = True


class HelpFormatter(jsonargparse.DefaultHelpFormatter):
    """Keep the paragraphs of the docstrings, and show the default of each option."""

    def __init__(self, prog: str) -> None:
        self._columns = min(MAX_WIDTH, page_width())
        # argparse needs a little room even in the narrowest window
        width = max(self._columns, 24)
        super().__init__(prog, max_help_position=min(32, width // 3), width=width)  # type: ignore[no-untyped-call]

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "\n\n".join(
            "\n".join(fold_command(line, self._columns) for line in part.split("\n"))
            if "\n  " in part
            else textwrap.fill(" ".join(part.split()), self._columns, break_on_hyphens=False)
            for part in text.split("\n\n")
        )

    def start_section(self, heading: str | None) -> None:
        """Begin a group of options; its title fits the width."""
        folded = heading and fold(heading, hanging="  ", width=self._columns - 1)
        super().start_section(folded)

    def _format_usage(self, usage: Any, *rest: Any) -> str:
        text = str(super()._format_usage(usage, *rest))
        if usage is None and max(map(len, text.split("\n"))) > self._columns:
            # argparse breaks no line before a long option
            usage, text = "", " ".join(text.split())
        return text if usage is None else f"{fold(text.rstrip(), hanging='    ', width=self._columns)}\n\n"

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
        text = f"{action.option_strings[0]} {metavar}"
        if len(text) > self._columns - 2:
            # many choices, between which the line may be broken
            return fold(text.replace(",", ", "), hanging="      ", width=self._columns - 2).replace(
                "\n", "\n  "
            )
        return text


IMPORT_OPTION = Option("import", str | None, None, IMPORT_HELP, IMPORT, "FILE_OR_MODULE")
"""``main`` takes its values out of the words, so that it is only shown here."""


def call(function: Callable[..., int | None], words: Sequence[str], verb: str) -> int:
    """Parse a verb's words, call its function with them, and return the exit code.

    Raises:
        UsageError: If something is missing, unknown or of the wrong type.
        SystemExit: After ``--help``.
    """
    parser = build(function, verb)
    own, rest = _split(words, parser)
    passes_on = any(p.kind is p.VAR_POSITIONAL for p in inspect.signature(function).parameters.values())
    positional = [] if passes_on else _positional(rest, parser)
    try:
        values = _plain(parser.parse_args([*own, "--", *positional] if positional else own).as_dict())
    except argparse.ArgumentError as error:
        raise explain(str(error), parser) from error
    arguments = {}
    for name, hint in _parameters(function):
        if dataclasses.is_dataclass(hint):
            fields = [field.name for field in dataclasses.fields(hint) if field.init]
            given = values[name] if name in SECTIONS else values
            arguments[name] = hint(**{field: given[field] for field in fields})  # type: ignore[operator]
        else:
            arguments[name] = values[name]
    try:
        return function(*(rest if passes_on else ()), **arguments) or 0
    except CrossXError as error:
        if not passes_on:
            error.args = (in_words_of(parser, str(error)),)
        raise


def in_words_of(parser: jsonargparse.ArgumentParser, message: str) -> str:
    """Replace the options of `crossx fit` in a message by the arguments of a verb that takes the same ones otherwise.

    What is between backticks stays as it is: a command of another verb.
    """
    arguments = {action.dest: _shown(action) for action in parser._actions}

    def replaced(match: re.Match[str]) -> str:
        option = match[0]
        if option in parser._option_string_actions:
            return option
        return arguments.get(option.rpartition(".")[2], option)

    parts = message.split("`")
    parts[::2] = [_SECTION_OPTION.sub(replaced, part) for part in parts[::2]]
    return "`".join(parts)


def _plain(value: Any) -> Any:
    """Return a value with plain numbers instead of jsonargparse's restricted types, which YAML cannot write."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    kind = next((kind for kind in (bool, int, float) if isinstance(value, kind)), None)
    return kind(value) if kind else value


def build(function: Callable[..., Any], verb: str) -> jsonargparse.ArgumentParser:
    """Return the parser of a verb's function."""
    text, _, examples = (inspect.getdoc(function) or "").partition("\nExamples:\n")
    parser = new_parser(f"crossx {verb}", text.partition("\nArgs:\n")[0].strip(), textwrap.dedent(examples))
    add_options(parser, function_options(function))
    if verb in IMPORTING:
        add_options(parser, [IMPORT_OPTION])
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


def add_options(parser: jsonargparse.ArgumentParser, options: Iterable[Option]) -> None:
    """Add options, each group of them under its title."""
    containers: dict[str, Any] = {"": parser}
    for option in options:
        if option.group not in containers:
            containers[option.group] = parser.add_argument_group(option.group)
        required = option.default is inspect.Parameter.empty
        settings: dict[str, Any] = {"help": option.help}
        if option.flag:
            settings["action"] = "store_true"
        else:
            takes_text = without_none(option.hint) == [str]
            settings |= {"type": text if takes_text else option.hint, "metavar": _metavar(option)}
        if option.many:
            settings["nargs"] = "+" if required or option.spelling else "*"
        elif not (required or option.spelling):
            settings["nargs"] = "?"
        if not (required or option.flag):
            settings["default"] = list(option.default) if option.many else option.default
        if option.spelling:
            settings |= {"dest": option.name, "required": required}
            settings |= {"action": Extend} if option.many else {}
        containers[option.group].add_argument(option.spelling or option.name, **settings)


def function_options(function: Callable[..., Any]) -> Iterator[Option]:
    """Yield the options of a verb's function."""
    signature, helps = inspect.signature(function), option_helps(function)
    for name, hint in _parameters(function):
        if dataclasses.is_dataclass(hint):
            yield from dataclass_options(hint, f"{name}." if name in SECTIONS else "")
        else:
            parameter = signature.parameters[name]
            spelling = f"--{name}" if parameter.kind is parameter.KEYWORD_ONLY else ""
            yield _word_option(Option(name, hint, parameter.default, helps.get(name, ""), spelling))


def dataclass_options(
    cls: Any, prefix: str = "", *, yaml: bool = False, skip: Collection[str] = ()
) -> Iterator[Option]:
    """Yield the options of a dataclass as a group; their values are plain words, or YAML as in a recipe."""
    hints, helps = get_type_hints(cls, include_extras=True), option_helps(cls)
    for field in dataclasses.fields(cls):
        if field.name not in skip:
            name, factory = f"{prefix}{field.name}", field.default_factory
            default = field.default if factory is dataclasses.MISSING else factory()
            option = Option(
                name,
                hints[field.name],
                default,
                helps.get(field.name, ""),
                f"--{name}",
                group=first_line(cls),
            )
            yield option if yaml else _word_option(option)


def option_helps(documented: Any) -> dict[str, str]:
    """Return name -> text of the ``Args:`` or ``Attributes:`` of a docstring, or of an object that has one."""
    doc = documented if isinstance(documented, str) else inspect.getdoc(documented) or ""
    params = docstring_parser.parse(doc.partition("\nExamples:\n")[0]).params
    return {
        param.arg_name: " ".join((param.description or "").replace("``", "`").split()) for param in params
    }


def first_line(documented: Any) -> str:
    """Return the first line of a docstring, without its full stop."""
    return (inspect.getdoc(documented) or "").partition("\n")[0].removesuffix(".")


def explain(message: str, parser: jsonargparse.ArgumentParser) -> UsageError:
    """Turn an error message of jsonargparse into one line."""
    _, unrecognized, rest = message.partition("unrecognized arguments: ")
    if unrecognized:
        return unknown_argument(rest.split()[0], parser)
    _, required, names = message.partition("arguments are required: ")
    if required:
        shown = [_shown(_action(parser, name)) for name in names.split(", ")]
        return UsageError(
            f"the following arguments are required: {', '.join(shown)}; see `{parser.prog} --help`."
        )
    if match := re.match(r'Parser key "([\w.]+)"|argument (\S+): invalid \w+ value', message):
        action = _action(parser, match[1]) if match[1] else parser._option_string_actions[match[2]]
        if EMPTY in message:
            return UsageError(f"{_shown(action)}: {EMPTY}.")
        given = re.search(
            r"(?:Given value|Got value|base 10|to float|invalid \w+ value): (.*)|: (\S+) does not conform",
            message,
        )
        value = (given[1] or given[2] or "").strip("'") if given else "this"
        hint = getattr(action, "_typehint", action.type)
        if hint is text:
            return UsageError(f"{_shown(action)} takes text, not {value}: put it in quotes.")
        hint_names = [str(item) for item in literals(hint)]
        return UsageError(
            f"{_shown(action)} takes {describe(hint)}, not {value!r}.{nearest(value, hint_names)}"
        )
    return UsageError(f"{' '.join(message.removeprefix('argument ').split())}; see `{parser.prog} --help`.")


def unknown_argument(argument: str, parser: jsonargparse.ArgumentParser) -> UsageError:
    """Build the error for an argument that the parser does not take, with the nearest of its options."""
    options, prog = parser._option_string_actions, parser.prog
    positionals = [str(action.metavar) for action in parser._actions if not action.option_strings]
    name, known = argument.split("=", 1)[0], [option for option in options if option[-1] != "+"]
    word = name.lstrip("-").replace("-", "_").lower()
    same_end = [option for option in known if option.split(".")[-1].lstrip("-") == word.split(".")[-1]]
    hint = f" Did you mean {same_end[0]!r}?" if len(same_end) == 1 else nearest(name, known)
    if not name.startswith("-"):
        # the form of other tools: epochs=10
        if "=" in argument and hint:
            hint = hint.replace("'?", f" {argument.partition('=')[2]}'?")
            return UsageError(f"unexpected argument {argument!r}.{hint} `{prog} --help` lists the options.")
        return UsageError(f"unexpected argument {argument!r}; see `{prog} --help`.")
    if os.path.lexists(argument):
        return UsageError(
            f"unknown option {argument!r}. For the file of that name write {quoted(Path(argument))}."
        )
    for place, words in _POSITIONAL.items():
        if word.removeprefix("data.") in words and place in positionals:
            hint = f" {place} is given without an option: `{prog} {' '.join(positionals)}`."
    return UsageError(f"unknown option {name!r}.{hint} `{prog} --help` lists the options.")


def _split(words: Sequence[str], parser: jsonargparse.ArgumentParser) -> tuple[list[str], list[str]]:
    """Separate the parser's own options, with their values, from the other words."""
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


def _positional(words: list[str], parser: jsonargparse.ArgumentParser) -> list[str]:
    """Check that the words are positional arguments, except after ``--``, and return them."""
    end = words.index("--") if "--" in words else len(words)
    takes_some = any(not action.option_strings for action in parser._actions)
    for word in words[:end]:
        if _is_option(word) or not takes_some:
            raise unknown_argument(word, parser)
    return words[:end] + words[end + 1 :]


def _is_option(word: str) -> bool:
    return word.startswith("-") and word != "-" and not _NUMBER.match(word)


def _parameters(function: Callable[..., Any]) -> Iterator[tuple[str, Any]]:
    hints = get_type_hints(function, include_extras=True)
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is not inspect.Parameter.VAR_POSITIONAL:
            yield parameter.name, hints[parameter.name]


def _word_option(option: Option) -> Option:
    """Resolve an option's type and ``Annotated`` for values that are plain words."""
    hint, extras = _without_annotation(without_none(option.hint)[0])
    many = get_origin(hint) in _LISTS
    if many:
        hint, inner = _without_annotation(get_args(hint)[0])
        extras += inner
    words = [extra for extra in reversed(extras) if isinstance(extra, str)]
    texts = [extra.text for extra in extras if isinstance(extra, Help)]
    return dataclasses.replace(
        option,
        help=option.help or "".join(texts),
        hint=next((extra for extra in extras if isinstance(extra, type)), hint),
        spelling=next((word for word in words if word.startswith("--")), option.spelling),
        metavar=next((word for word in words if not word.startswith("--")), ""),
        many=many,
        flag=hint is bool,
    )


def _without_annotation(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    return (hint.__origin__, hint.__metadata__) if get_origin(hint) is Annotated else (hint, ())


def _metavar(option: Option) -> str:
    if option.metavar:
        return option.metavar
    parts = without_none(option.hint)
    if all(get_origin(part) is Literal for part in parts):
        return "{" + ",".join(dict.fromkeys(map(str, literals(option.hint)))) + "}"
    known: dict[Any, str] = {int: "N", float: "X", bool: "{true,false}"}
    return known.get(parts[0] if len(parts) == 1 else None, option.name.rpartition(".")[2].upper())


def _action(parser: jsonargparse.ArgumentParser, name: str) -> argparse.Action:
    return next(action for action in parser._actions if action.dest == name)


def _shown(action: argparse.Action) -> str:
    return action.option_strings[0] if action.option_strings else str(action.metavar)
