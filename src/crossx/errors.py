"""Errors that a user can fix: one line that says what is wrong, where, and what to do."""

from __future__ import annotations

import contextlib
import math
import os
import re
import reprlib
import signal
import threading
from collections.abc import Collection, Iterable, Iterator, Sequence
from numbers import Integral
from types import FrameType

from crossx.suggestions import nearest

MAX_MESSAGE = 4000
"""Characters of an error message; a longer one quotes the content of a file."""
# what ends a line, and what a terminal obeys
_CONTROLS = re.compile("[\\x00-\\x1f\\x7f-\\x9f\\u2028\\u2029]")


class CrossXError(Exception):
    """A failure that is not a bug. Its text is one line, whatever it quotes; the command exits with 1."""

    exit_code = 1

    def __str__(self) -> str:
        return one_line(super().__str__())


class UsageError(CrossXError):
    """A wrong command or call, such as an unknown name or an impossible option. The command exits with 2."""

    exit_code = 2


class Stopped(CrossXError):  # noqa: N818  not an error
    """The work was stopped by a signal (Ctrl-C, SIGTERM) and can be continued."""

    exit_code = 130


class LostWorker(CrossXError):  # noqa: N818
    """A process that loads images was killed."""


def one_line(message: str) -> str:
    """Join the lines of a message, escape control characters, and shorten a very long one in the middle."""
    if len(message) > MAX_MESSAGE:
        message = f"{message[: MAX_MESSAGE // 2]} ... {message[-MAX_MESSAGE // 4 :]}"
    joined = " ".join(line for line in map(str.strip, re.split("[\\r\\n]+", message)) if line)
    return _CONTROLS.sub(lambda match: ascii(match[0])[1:-1], joined)


def unknown(kind: str, name: str, choices: Iterable[str]) -> UsageError:
    """Build the error for a name that is not in ``choices``, with the nearest match and all choices."""
    ordered = sorted(choices)
    return UsageError(f"unknown {kind} {name!r}.{nearest(name, ordered)} Choose from: {', '.join(ordered)}.")


def check_choice(kind: str, value: object, choices: Collection[str]) -> None:
    """Raise ``UsageError`` if an option's value is not one of its choices."""
    if value not in choices:
        raise unknown(kind, str(value), choices)


def check_positive(name: str, value: float) -> None:
    """Raise ``UsageError`` if an option's value is not above 0 and finite."""
    if not 0 < value < math.inf:
        raise UsageError(f"{name} must be above 0 and finite, not {value}.")


def check_count(name: str, value: object) -> None:
    """Refuse what is not a whole number of at least 1, as Python and NumPy have them."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
        raise UsageError(f"{name} must be a whole number of at least 1, not {reprlib.repr(value)}.")


def check_flag(name: str, value: object) -> None:
    """Raise ``UsageError`` if an option is not True or False: any text, even "no", would count as true."""
    if not isinstance(value, bool):
        raise UsageError(f"{name} must be True or False, not {reprlib.repr(value)}.")


def check_type(call: str, value: object, kind: type, remedy: str) -> None:
    """Refuse an argument of another type; ``remedy`` says how to make one of this type."""
    if not isinstance(value, kind):
        shown = (
            reprlib.repr(value) if value is None or isinstance(value, str) else f"a {type(value).__name__}"
        )
        raise UsageError(f"{call} takes a {kind.__name__}, not {shown}: {remedy}.")


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, without a full stop, to quote it in another message."""
    line = one_line(str(error).strip().partition("\n")[0])
    return line.rstrip(".") or type(error).__name__


def first_few(items: Sequence[str], most: int, separator: str = ", ") -> str:
    """Join the first ``most`` items and count the others: ``a, b and 3 more``, or ``a; b; and 3 more``."""
    more = len(items) - most
    end = f"{separator.replace(', ', ' ')}and {more} more" if more > 0 else ""
    return separator.join(items[:most]) + end


def counted(number: int, noun: str) -> str:
    """Return a number with its noun: ``1 image``, ``2,400 images``, ``2 classes``."""
    plural = "" if number == 1 else "es" if noun.endswith("s") else "s"
    return f"{number:,} {noun}{plural}"


@contextlib.contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """Raise ``KeyboardInterrupt`` on SIGTERM, as on Ctrl-C; Python handles signals in the main thread only."""
    process = os.getpid()

    def interrupt(number: int, frame: FrameType | None) -> None:
        if os.getpid() == process:
            raise KeyboardInterrupt("SIGTERM")
        # a forked process, which is to end without a traceback
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def lost_worker(error: BaseException) -> LostWorker | None:
    """Describe torch's error after a process that loads images was killed; None for any other error."""
    if isinstance(error, LostWorker):
        return error
    text = str(error)
    if not (isinstance(error, RuntimeError) and text.startswith("DataLoader worker")):
        return None
    if "shared memory" in text:
        return LostWorker(
            "too little shared memory (/dev/shm) for the processes that load images: give more (docker run --shm-size "
            "2g), or load the images without processes: --data.num_workers 0."
        )
    return LostWorker(
        "a process that loads images was killed, perhaps for lack of memory: lower --data.num_workers or "
        "--data.batch_size."
    )
