"""What a verb prints: lines that fit the terminal, and what it is doing. Imports only the standard library."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sys
import textwrap
import threading
from collections.abc import Iterator
from typing import TextIO

STANDARD_WIDTH = 80
PATIENCE = 1.0
"""Seconds before a step is shown; shorter ones would only flicker."""
SILENT = "CROSSX_PROGRESS"
"""Environment variable that is 0 for no progress bars and steps."""

_PROCESS_RANKS = ("LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")
_NODE_RANKS = ("NODE_RANK", "GROUP_RANK")
_ERASE_LINE = "\r\x1b[2K"
_QUOTED = re.compile(r"\$'(?:\\.|[^\\'])*'|'[^']*'|\"[^\"]*\"")
_SPACE = "\0"


def columns(stream: TextIO | None = None) -> int | None:
    """Return the width of lines: that of COLUMNS, or of the terminal; None for a pipe or file, which has none.

    Args:
        stream: Where the lines are printed; stdout by default.
    """
    given = os.environ.get("COLUMNS", "")
    if given.isdecimal() and int(given) > 1:
        return int(given)
    stream = stream or sys.stdout
    try:
        return os.get_terminal_size(stream.fileno()).columns or None if stream.isatty() else None
    except (OSError, ValueError):
        return None


def page_width() -> int:
    """Return the width for text that is always folded, such as help: also behind a pager in a terminal."""
    return columns() or columns(sys.stderr) or STANDARD_WIDTH


def fold(text: str, *, hanging: str = "", width: int | None = None) -> str:
    """Break the lines of a text between words; those of a pipe or file are left as they are.

    A word that is longer than a line, such as a path, is kept in one piece on a line of its own.

    Args:
        text: Lines, whose indentation is kept.
        hanging: Further indentation of the lines after a break.
        width: By default that of ``columns``.
    """
    width = width or columns()
    return text if width is None else "\n".join(_folded(line, hanging, width) for line in text.split("\n"))


def _folded(line: str, hanging: str, width: int) -> str:
    if len(line) <= width:
        return line
    indent = line[: len(line) - len(line.lstrip())]
    # keep the words of a table aligned
    parts = re.split(r"(?<=\S)( {2,})(?=\S)", line.strip())
    first = "".join(parts[:-1])
    if first and len(first) < width // 2 and not hanging:
        hanging = " " * len(first)
    lines = textwrap.wrap(
        line.strip(), width, initial_indent=indent, subsequent_indent=indent + hanging,
        break_long_words=False, break_on_hyphens=False, replace_whitespace=False,
    )  # fmt: skip
    # a long word is indented as far as it fits
    return "\n".join(
        piece if len(piece) <= width else " " * max(0, width - len(piece.strip())) + piece.strip()
        for piece in lines
    )


def fold_command(line: str, width: int | None = None) -> str:
    """Break a command between its words, with backslashes, so that it can still be copied.

    A comment after two spaces and ``#`` goes to a line before it.
    """
    width = width or columns()
    if width is None or len(line) <= width:
        return line
    indent = line[: len(line) - len(line.lstrip())]
    # no break within quotes
    command, separator, comment = _QUOTED.sub(lambda part: part[0].replace(" ", _SPACE), line).partition(
        "  # "
    )
    if separator:
        command, comment = (part.strip().replace(_SPACE, " ") for part in (command, comment))
        return "\n".join(
            [
                fold(f"{indent}# {comment}", hanging="# ", width=width),
                fold_command(f"{indent}{command}", width),
            ]
        )
    # two of the width are for the backslash
    lines = textwrap.wrap(
        command.strip(), width - 2, initial_indent=indent, subsequent_indent=f"{indent}    ",
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip
    return " \\\n".join(lines).replace(_SPACE, " ")


class _Steps:
    """The steps of the running verb, the innermost last; shown on stderr by a thread of their own."""

    def __init__(self) -> None:
        self.enabled = False
        self._names: list[str] = []
        self._logged: list[bool] = []
        self._paused = 0
        self._shown = ""
        self._lock = threading.RLock()
        self._changed = threading.Event()

    def push(self, name: str) -> None:
        with self._lock:
            self._names.append(name)
            self._logged.append(False)
            self._restart()

    def pop(self) -> None:
        with self._lock:
            self._names.pop()
            self._logged.pop()
            self.erase()
            self._restart()

    def pause(self, by: int) -> None:
        with self._lock:
            self._paused += by
            self.erase()
            self._restart()

    def erase(self) -> None:
        with self._lock:
            if self._shown and _is_terminal():
                self._write(_ERASE_LINE)
            self._shown = ""

    def _restart(self) -> None:
        self._changed.set()
        if not self._names or self._paused:
            return
        self._changed = threading.Event()
        threading.Thread(target=self._show, args=(self._names[-1], self._changed), daemon=True).start()

    def _show(self, name: str, ended: threading.Event) -> None:
        seconds = 0.0
        while not ended.wait(PATIENCE):
            seconds += PATIENCE
            with self._lock:
                if ended.is_set():
                    return
                if not _is_terminal():
                    # as a line of a log, once: not again after an inner step
                    if not self._logged[-1]:
                        self._write(f"{name} …\n")
                    self._logged[-1] = True
                    return
                text = f"{name} … {seconds:.0f} s"
                self._write(f"{_ERASE_LINE}{text[: (columns(sys.stderr) or STANDARD_WIDTH) - 1]}")
                self._shown = text

    def _write(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.write(text)
            sys.stderr.flush()


_steps = _Steps()


def _forget_steps() -> None:
    """Start without steps in a forked process, which has no thread to show them and may hold the lock for ever."""
    global _steps
    _steps = _Steps()


os.register_at_fork(after_in_child=_forget_steps)


def is_first_process() -> bool:
    """Whether this is the first of the processes of a training, by the environment variables of their launcher.

    They are those that Lightning reads: of torchrun, of Lightning itself, of SLURM and of LSF.
    """
    return later_rank() is None


def later_rank() -> str | None:
    """Return the environment variable that says that this is not the first process; None if none does."""
    groups = (("RANK",),) if "RANK" in os.environ else (_PROCESS_RANKS, _NODE_RANKS)
    ranks = (next((name for name in names if name in os.environ), None) for names in groups)
    return next((name for name in ranks if name and os.environ[name] != "0"), None)


@contextlib.contextmanager
def speaking(speaks: bool) -> Iterator[None]:
    """Let one of several processes speak: where ``speaks`` is false, only errors are logged and no step is shown."""
    if speaks:
        yield
        return
    log = logging.getLogger("crossx")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        with paused_steps():
            yield
    finally:
        log.setLevel(before)


@contextlib.contextmanager
def showing_steps() -> Iterator[None]:
    """Show the steps of what runs inside, see ``step``; for the command, not for Python's users."""
    before, _steps.enabled = _steps.enabled, os.environ.get(SILENT) != "0"
    try:
        yield
    finally:
        _steps.enabled = before


@contextlib.contextmanager
def step(name: str) -> Iterator[None]:
    """Show a step on stderr: on a terminal with its seconds until it is done, elsewhere as one line.

    A step of less than a second is not shown, and none outside ``showing_steps``. Steps may be nested.

    Args:
        name: Such as ``Loading the network``.
    """
    if not _steps.enabled:
        yield
        return
    _steps.push(name)
    try:
        yield
    finally:
        _steps.pop()


@contextlib.contextmanager
def paused_steps() -> Iterator[None]:
    """Show no step while something else is drawn on the terminal."""
    _steps.pause(1)
    try:
        yield
    finally:
        _steps.pause(-1)


def erase_step() -> None:
    """Erase the step from the terminal before a line is printed; it comes back after a second."""
    _steps.erase()


def _is_terminal() -> bool:
    try:
        return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
    except ValueError:
        return False
