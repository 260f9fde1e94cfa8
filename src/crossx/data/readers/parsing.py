"""Text and .mat lists of the archives, with errors that name the file and the line."""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from crossx.data.image_files import is_image_name
from crossx.data.index import Box
from crossx.data.names import split_name
from crossx.data.readers.mat import UnreadableMatError, read_mat
from crossx.errors import CrossXError

MAX_DIGITS = 1000
"""Most digits of a whole number; Python refuses to convert 4,301."""
MAX_FILE = 1 << 30
"""Largest text list that is read, in bytes."""

_BLANKS = re.compile(r"[ \t]+")


class Row(NamedTuple):
    """One line of a text list or one entry of a .mat list. Its methods raise ``CrossXError`` with file and number.

    Attributes:
        path: The file.
        number: Position in the file, counted from 1.
        fields: The columns as text.
        unit: What ``number`` counts: ``line`` or ``entry``.
    """

    path: Path
    number: int
    fields: tuple[str, ...]
    unit: str = "line"

    @property
    def place(self) -> str:
        """File and number, as error messages show them."""
        return f"{self.path}, {self.unit} {self.number}"

    def error(self, problem: str) -> CrossXError:
        """Build the one-line error for this row."""
        return CrossXError(f"{self.place}: {problem}. Fix this {self.unit} or unpack the archive again.")

    def integer(self, column: int, what: str) -> int:
        """Return a column as an integer of at least 0; ``what`` names it in the error."""
        text = self.fields[column]
        if not (text.isascii() and text.isdigit() and len(text) <= MAX_DIGITS):
            raise self.error(f"{what} must be a whole number, not {_shown(text)}")
        return int(text)

    def flag(self, column: int, what: str) -> bool:
        """Return a column that must be 0 or 1 as a bool."""
        text = self.fields[column]
        if text not in ("0", "1"):
            raise self.error(f"{what} must be 0 or 1, not {_shown(text)}")
        return text == "1"

    def numbers(self, start: int, stop: int, what: str) -> tuple[float, ...]:
        """Return columns ``start`` to ``stop - 1`` as finite numbers."""
        try:
            values = tuple(float(text) for text in self.fields[start:stop])
        except ValueError:
            values = (math.nan,)
        if not all(math.isfinite(value) for value in values):
            raise self.error(f"{what} must be numbers, not {_shown(' '.join(self.fields[start:stop]))}")
        return values

    def corners(self, start: int) -> Box:
        """Return the box given by four columns: xmin, ymin, xmax, ymax, counted from 1 and inclusive (MATLAB)."""
        left, top, right, bottom = self.numbers(start, start + 4, "box corners")
        if not (math.isfinite(right - left) and math.isfinite(bottom - top)):
            raise self.error("the box is too large")
        if right < left or bottom < top:
            raise self.error("the box ends before it begins (columns are xmin, ymin, xmax, ymax)")
        return (left - 1, top - 1, right - left + 1, bottom - top + 1)

    def file_in(self, folder: Path, column: int, suffix: str = "") -> Path:
        """Return the file named by a column plus ``suffix``; it must be inside ``folder``."""
        name = PurePosixPath(self.fields[column] + suffix)
        if name.is_absolute() or ".." in name.parts:
            raise self.error(f"{_shown(str(name))} leads out of {folder}")
        if "\0" in str(name) or any(len(part.encode(errors="replace")) > 255 for part in name.parts):
            raise self.error(f"{_shown(str(name))} cannot be the name of a file")
        return folder / name


def _shown(text: str) -> str:
    return repr(text if len(text) <= 80 else f"{text[:80]}...")


def archive_root(root: Path, marker: str, *inner: str) -> Path:
    """Return the first of ``root`` and its subfolders ``inner`` that holds the file ``marker``.

    Without such a file, the first existing subfolder, else ``root``: the error about the missing file then names the
    most likely folder.

    Raises:
        CrossXError: If ``root`` is not a folder.
    """
    if root.is_file():
        raise CrossXError(f"{root} is a file: unpack it and pass the folder as --data.root.")
    if not root.is_dir():
        raise CrossXError(f"{root} does not exist: pass the folder of the unpacked archive as --data.root.")
    subfolders = [root / name for name in inner]
    holding = (folder for folder in (root, *subfolders) if (folder / marker).is_file())
    return next(holding, next((folder for folder in subfolders if folder.is_dir()), root))


def require_file(path: Path) -> Path:
    """Return ``path`` if it is a file, else raise ``CrossXError``."""
    if not path.is_file():
        raise CrossXError(
            f"{path} is missing: check --data.root, or unpack the archive again.{folder_hint(path.parent)}"
        )
    return path


def folder_hint(root: Path) -> str:
    """Name the dataset ``folder`` if at least two subfolders hold images and are not named after a split."""
    try:
        named = (
            folder for folder in root.iterdir() if folder.is_dir() and split_name(folder.name)[0] is None
        )
        with_images = (
            folder for folder in named if any(is_image_name(file.name) for file in folder.iterdir())
        )
        several = len(list(itertools.islice(with_images, 2))) == 2
    except OSError:
        return ""
    return " For a folder per class, as there, the dataset is folder." if several else ""


def require_folder(path: Path) -> Path:
    """Return ``path`` if it is a folder, else raise ``CrossXError``."""
    if not path.is_dir():
        raise CrossXError(f"{path}/ is missing: unpack the archive's images there, or check --data.root.")
    return path


def read_rows(path: Path, columns: Sequence[str], *, text: bool = False) -> list[Row]:
    """Read a UTF-8 text list of columns separated by blanks; empty lines are skipped.

    Args:
        path: The file.
        columns: What each column is, for error messages; every line must have all of them.
        text: Whether the last column is the rest of the line, blanks included (names, paths).

    Raises:
        CrossXError: If the file is missing, unreadable, empty or not UTF-8, or a line has the wrong number of columns.
    """
    try:
        if require_file(path).stat().st_size > MAX_FILE:
            raise CrossXError(
                f"{path} is larger than {MAX_FILE >> 30} GiB: it is not the archive's own file."
            )
        content = path.read_bytes()
    except OSError as error:
        raise CrossXError(f"{path} cannot be read ({error.strerror}): check its permissions.") from error
    try:
        lines = content.decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        number = content.count(b"\n", 0, error.start) + 1
        raise Row(path, number, ()).error("not UTF-8 text") from error
    rows = []
    most_splits = len(columns) - 1 if text else 0
    for number, line in enumerate(lines, start=1):
        stripped = line.strip(" \t\r")
        if not stripped:
            continue
        # re.split takes a maximum of 0 as "no limit", so a single text column is handled here
        fields = (stripped,) if len(columns) == 1 else tuple(_BLANKS.split(stripped, most_splits))
        row = Row(path, number, fields)
        if len(fields) != len(columns):
            raise row.error(f"expected {', '.join(columns)}, found {_shown(stripped)}")
        rows.append(row)
    if not rows:
        raise CrossXError(f"{path} is empty: unpack the archive again.")
    return rows


def load_mat(path: Path, *variables: str) -> tuple[Any, ...]:
    """Read variables of a MATLAB file in a child process: structs as dicts, arrays and cell arrays as lists.

    Raises:
        CrossXError: If the file is missing, is not a .mat file, lacks a variable, or takes too much memory or time.
    """
    require_file(path)
    try:
        content = read_mat(path, variables)
    except UnreadableMatError as error:
        raise CrossXError(f"{path} cannot be read as a .mat file ({error}): download it again.") from error
    except OSError as error:
        raise CrossXError(f"{path} cannot be read ({error.strerror or error}).") from error
    for variable in variables:
        if variable not in content:
            raise CrossXError(f"{path} has no variable {variable!r}: it is not the archive's own file.")
    return tuple(content[variable] for variable in variables)


def as_list(value: Any) -> list[Any]:
    """Return the elements of a .mat variable; MATLAB stores a list of one as the bare element."""
    return [value] if isinstance(value, str | dict) or not hasattr(value, "__iter__") else list(value)


def mat_rows(path: Path, columns: Mapping[str, Any]) -> list[Row]:
    """Return the columns of a .mat file as rows.

    Args:
        path: The file, for error messages.
        columns: Column name to its values from ``load_mat``: text or single numbers.

    Raises:
        CrossXError: If the columns differ in length or a value is neither text nor a single number.
    """
    values = {name: as_list(column) for name, column in columns.items()}
    if len({len(column) for column in values.values()}) > 1:
        counts = ", ".join(f"{len(column)} {name}" for name, column in values.items())
        raise CrossXError(f"{path}: {counts}, but the numbers should be equal: download it again.")
    if not all(values.values()):
        raise CrossXError(f"{path} lists nothing: download it again.")
    rows = []
    for number, entry in enumerate(zip(*values.values(), strict=True), start=1):
        row = Row(path, number, tuple(_as_text(value) for value in entry), "entry")
        for name, field in zip(values, row.fields, strict=True):
            if not field:
                raise row.error(f"{name!r} holds no value")
        rows.append(row)
    return rows


def _as_text(value: Any) -> str:
    """Write text or a number as text, whole numbers without a decimal point, anything else as an empty string."""
    while isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, str):
        return value
    if not hasattr(value, "__float__") or getattr(value, "size", 1) != 1:
        return ""
    number = float(value)
    return str(int(number)) if number.is_integer() else str(number)


def keyed(rows: Iterable[Row], column: int = 0) -> dict[str, Row]:
    """Index rows by a column; two rows with the same value there raise ``CrossXError``."""
    index: dict[str, Row] = {}
    for row in rows:
        first = index.setdefault(row.fields[column], row)
        if first is not row:
            raise row.error(f"{row.fields[column]!r} was already listed in {first.place}")
    return index


def distinct_names(names: Sequence[str], ids: Sequence[object]) -> tuple[str, ...]:
    """Append the id in parentheses to each name that occurs more than once.

    Args:
        names: Any names.
        ids: One distinct id per name, without parentheses in its text.
    """
    result = list(names)
    while len(set(result)) < len(result):
        counts = Counter(result)
        result = [
            f"{name} ({key})" if counts[name] > 1 else name for name, key in zip(result, ids, strict=True)
        ]
    return tuple(result)
