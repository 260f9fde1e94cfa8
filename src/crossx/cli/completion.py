"""Shell completion with argcomplete, which runs ``crossx`` on every TAB with the line typed so far."""

from __future__ import annotations

import importlib
import os
from collections.abc import Collection
from functools import partial
from typing import Any, Literal

import argcomplete
import jsonargparse

from crossx.cli.parser import build
from crossx.cli.values import literals
from crossx.errors import UsageError


def complete(verbs: Collection[str]) -> None:
    """Write the completions of the line in ``COMP_LINE``, and exit."""
    line = os.environ["COMP_LINE"][: int(os.environ["COMP_POINT"])]
    *_, words, _ = argcomplete.lexers.split_line(line)
    first = int(os.environ["_ARGCOMPLETE"])
    verb, typed = words[first : first + 1], words[first + 1 :]
    if verb and verb[0] in verbs:
        # the verb takes the place of the program
        os.environ["_ARGCOMPLETE"] = str(first + 1)
        parser = _verb_parser(verb[0], typed)
    else:
        parser = jsonargparse.ArgumentParser(print_config=None)
        parser.add_argument("verb", type=Literal[tuple(verbs)])
        for option in ("--version", "--debug"):
            parser.add_argument(option, action="store_true")
    for action in parser._actions:
        if "completer" not in vars(action):
            hint = getattr(action, "_typehint", None)
            choices = ["true", "false"] if hint is bool else [str(value) for value in literals(hint)]
            complete_value: Any = argcomplete.completers.FilesCompleter()
            if choices:
                complete_value = partial(_choices, choices)
            action.completer = complete_value  # type: ignore[attr-defined]
    parser.parse_args([])


def _verb_parser(verb: str, words: list[str]) -> jsonargparse.ArgumentParser:
    name = verb.replace("-", "_")
    module = importlib.import_module(f"crossx.cli.{name}")
    if not hasattr(module, "parser"):
        return build(getattr(module, name), verb)
    parser: jsonargparse.ArgumentParser
    try:
        parser = module.parser(words)
    except UsageError:
        parser = module.parser([])
    return parser


def _choices(choices: list[str], **context: Any) -> list[str]:
    return choices
