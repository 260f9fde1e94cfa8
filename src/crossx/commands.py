"""Commands that crossx prints for the user to run, quoted for the shell."""

from __future__ import annotations

import os
import shlex
from pathlib import Path


def command(*words: str | Path) -> str:
    """Return a command line of crossx that can be pasted into a shell.

    Args:
        *words: Verb, options and values, see ``quoted``.
    """
    return " ".join(("crossx", *map(quoted, words)))


def quoted(word: str | Path) -> str:
    """Quote a word for the shell if it needs it.

    Paths are written as by ``path_word``. Control characters and bytes that are not
    valid UTF-8 are escaped (``$'...'``, of bash and zsh), so that the word fits on one line.
    """
    text = path_word(word) if isinstance(word, Path) else word
    if text.isprintable():
        return shlex.quote(text)
    return "$'" + "".join(map(_escaped, text)) + "'"


def path_word(path: Path) -> str:
    """Return a path as an argument; one that begins with a hyphen gets ``./``, so that it is no option."""
    text = os.fspath(path)
    return f"./{text}" if text.startswith("-") else text


def _escaped(character: str) -> str:
    if character in "\\'":
        return f"\\{character}"
    if character.isprintable():
        return character
    return "".join(f"\\x{byte:02x}" for byte in os.fsencode(character))
