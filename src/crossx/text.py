"""Read files of unknown origin, bounded. Imports only the standard library."""

from __future__ import annotations

import stat
from pathlib import Path

from crossx.errors import CrossXError


def read_text(path: Path, most: int, hint: str = "") -> str:
    """Read a UTF-8 text file, with or without a byte order mark.

    Args:
        path: The file.
        most: Largest size in bytes.
        hint: What the error of a missing file says after it.

    Raises:
        CrossXError: If it is missing, too large, unreadable, not UTF-8, or no regular file: a pipe or device may have
            no end.
    """
    content = read_bytes(path, most, hint)
    try:
        # as in a file that is opened as text
        return content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise CrossXError(f"{path}: not UTF-8 text (byte {error.start + 1}).") from error


def read_bytes(path: Path, most: int, hint: str = "") -> bytes:
    """Read a file whole; arguments and errors as in ``read_text``, of any content."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            what = "a folder" if path.is_dir() else "a pipe or device"
            raise CrossXError(f"{path}: is {what}, not a file.")
        with path.open("rb") as file:
            content = file.read(most + 1)
    except FileNotFoundError as error:
        raise CrossXError(f"{path}: no such file{hint}.") from error
    except (OSError, ValueError) as error:
        raise CrossXError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error}).") from error
    if len(content) > most:
        raise CrossXError(f"{path}: larger than the {most >> 20} MiB that such a file may have.")
    return content
