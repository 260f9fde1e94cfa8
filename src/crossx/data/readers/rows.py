"""Rows of path, label and split, wherever they come from, as a dataset."""

from __future__ import annotations

import math
import os
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

from crossx.data.index import DatasetIndex, Record, UntrainedClassError, hold_out_test
from crossx.data.leftovers import is_system_path
from crossx.data.names import class_name, class_notes, split_name, words_of
from crossx.errors import CrossXError, counted, first_few
from crossx.runs import is_utf8

COLUMNS = ("path", "label")
ONE_LABEL = "crossx classifies one label per image"
WANTED = {
    "path": "a path is text",
    "label": f"a label is text or a whole number, and {ONE_LABEL}",
    "split": "a split is text",
}
"""What a column takes."""
_SPLIT_WORDS = {
    "split", "set", "subset", "fold", "phase", "usage", "partition", "mode", "stage", "dataset", "kfold", "cv",
}  # fmt: skip
_SPLIT_MARKS = {"is", "in", "for", "use", "name", "data", "type", "id", "no", *_SPLIT_WORDS}
_ELSEWHERE = re.compile(r"[A-Za-z]:[\\/]|\\\\|[A-Za-z][A-Za-z0-9+.-]+://")
_SEVERAL = re.compile(r"\s*[;|]\s*")
_COMMA = re.compile(r"\s*,\s*")
_LIST = re.compile(r"[\[({].*[,;|].*[\])}]")
_SHOWN = 5

Problem = tuple[str, str]
"""A row, as ``LabelTable`` calls it, and what is wrong with it."""


@dataclass
class LabelTable:
    """The columns in use, their rows (place, as an editor or viewer calls it, and fields), and notes."""

    columns: Sequence[str]
    rows: Iterable[tuple[str, Mapping[str, Any]]]
    embedded: bool = False
    notes: list[str] = field(default_factory=list)


def index_rows(
    dataset: str, path: Path, table: LabelTable, test_fraction: float, split_seed: int
) -> DatasetIndex:
    """Check the rows of a table, and return them as a dataset.

    Args:
        dataset: Its name on the command line.
        path: The table, for messages and relative paths.
        table: The rows.
        test_fraction: Share of each class's images that becomes the test split if there is no column ``split``.
        split_seed: Seed of that choice.

    Raises:
        CrossXError: If rows are wrong: empty fields, unknown splits, several labels, an image listed twice, a class
            without training images.
        UsageError: If ``test_fraction`` is out of range.
    """
    has_split = "split" in table.columns
    problems: list[Problem] = []
    rows: list[_Row] = []
    skipped: list[str] = []
    for place, fields in table.rows:
        name = (
            fields["path"]
            if isinstance(fields["path"], Path)
            else field_text(path, place, "path", fields["path"])
        )
        if isinstance(name, str) and is_system_path(name):
            skipped.append(repr(name))
            continue
        label = class_name(field_text(path, place, "label", fields["label"]))
        split = field_text(path, place, "split", fields["split"]) if has_split else "train"
        file = resolved(path.parent, name, place, problems) if name else None
        rows.append(_Row(place, file, str(name), label, split, split_name(split)))
    if not rows:
        raise CrossXError(f"{path}: all {len(skipped):,} rows name system files. Fix the table.")
    _check(path, rows, problems, embedded=table.embedded)
    label_notes = require_one_label(path, [row.label for row in rows])
    classes, untrained = _classes(path, rows)
    labels = {name: label for label, name in enumerate(classes)}
    records = [Record(row.file, labels[row.label], row.named[0]) for row in rows if row.file and row.named[0]]
    if not has_split:
        folder = records[0].path.parent if table.embedded else path.parent
        records = hold_out_test(records, classes, folder, test_fraction, split_seed)
    notes = [*table.notes, *label_notes, *class_notes(classes)]
    if skipped:
        notes.append(f"skipped {counted(len(skipped), 'row')} of system files: {first_few(skipped, _SHOWN)}")
    index = DatasetIndex(name=dataset, classes=tuple(classes), records=tuple(records), notes=tuple(notes))
    if untrained:
        raise UntrainedClassError(untrained, index)
    return index


@dataclass(frozen=True, slots=True)
class _Row:
    place: str
    file: Path | None
    path: str
    label: str
    split: str
    named: tuple[str | None, tuple[str, ...]]


def split_notes(columns: Mapping[str, int], others: Mapping[str, Sequence[Any]]) -> list[str]:
    """Return a note on columns that seem to be the split, if there is no column ``split``."""
    if "split" in columns or "label" not in columns:
        return []
    found = [name for name, values in others.items() if _is_split(str(name), values)]
    if not found:
        return []
    listed = first_few([repr(name) for name in found], _SHOWN)
    return [
        f"the column {listed} seems to be a split and is not read, since it is not called 'split': a random test split "
        "is drawn. To use it, rename it and write train, val or test in it"
        if len(found) == 1
        else f"the columns {listed} seem to be splits and are not read, since none is called 'split': a random test "
        "split is drawn. To use one, rename it and write train, val or test in it"
    ]


def _is_split(name: str, values: Sequence[Any]) -> bool:
    """Return whether a column's name or values are those of a split."""
    different = {
        (value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)).strip()
        for value in values
        if value is not None
    } - {""}
    if different and all(split_name(value)[0] and not split_name(value)[1] for value in different):
        return True
    words = words_of(name)
    splits = [word for word in words if split_name(word)[0]]
    known = splits or any(word in _SPLIT_WORDS or word.removesuffix("split") != word for word in words)
    few = len(different) <= 20
    return bool(
        words and known and few and all(w in _SPLIT_MARKS or split_name(w)[0] or "split" in w for w in words)
    )


def require_one_label(path: Path, labels: Sequence[str]) -> list[str]:
    """Refuse labels of which most are several: ``a;b``, ``a|b``, ``[a, b]``, or ``a, b`` if the parts recur.

    Parts that recur at the same place are those of names: ``car, red`` and ``car, blue``.

    Returns:
        A note on such names, if there are any.

    Raises:
        CrossXError: If they are.
    """
    several = [label for label in labels if _LIST.fullmatch(label) or len(_parts(label, _SEVERAL)) > 1]
    if 2 * len(several) <= len(labels):
        several = [label for label in labels if len(_parts(label, _COMMA)) > 1]
        # `Corvus corax, 1758` is one name: few of its parts are in other names
        of_names = [_parts(label, _COMMA) for label in {*labels}]
        parts = {part for name in of_names for part in name}
        if len(parts) > len(of_names) or len(parts) == sum(map(len, of_names)):
            return []
        places = {(part, place) for name in of_names for place, part in enumerate(name)}
        if len(places) == len(parts) and 2 * len(several) > len(labels):
            return [
                f"labels such as {several[0]!r} are each read as the name of one class. If they are several labels, "
                "keep one"
            ]
    if 2 * len(several) > len(labels):
        raise CrossXError(
            f"{path}: {len(several):,} of {len(labels):,} labels look like several, such as {several[0]!r}: "
            f"{ONE_LABEL}. Keep one; in the name of one class, write another character than , ; and |."
        )
    return []


def _parts(label: str, separator: re.Pattern[str]) -> list[str]:
    return list(filter(None, separator.split(label)))


def indicator_columns(columns: Mapping[str, Sequence[Any]]) -> list[str]:
    """Return the columns that hold only 0 and 1, as one-hot labels do; empty if there are fewer than two.

    Args:
        columns: Name -> its first values.
    """
    found = [name for name, values in columns.items() if values and all(map(_is_indicator, values))]
    return found if len(found) > 1 else []


def _is_indicator(value: Any) -> bool:
    return str(value).strip().lower() in ("0", "1", "0.0", "1.0", "true", "false")


def field_text(path: Path, place: str, column: str, value: Any) -> str:
    """Write a field as text, a whole number without ``.0`` (pandas stores it as a float next to empty fields).

    Raises:
        CrossXError: If it is something else than text, a whole number or a boolean.
    """
    kind = type(value).__name__
    match value:
        case None:
            return ""
        case str() if column == "path" and not is_utf8(value):
            kind = "text that is not valid Unicode"
        case str():
            return value.strip()
        case bool() | int():
            return str(value)
        case float() | Decimal():
            if value != value:
                return ""
            if math.isfinite(value) and value == int(value):
                return str(int(value))
            kind = f"numbers with a fraction, such as {value}"
        case bytes():
            try:
                return value.decode("utf-8").strip()
            except UnicodeDecodeError:
                kind = "bytes that are not UTF-8 text"
        case list() | tuple():
            kind = "lists"
        case dict():
            kind = "objects with fields"
    raise CrossXError(f"{path}: {place}: column {column!r} holds {kind}: {WANTED[column]}.")


def resolved(folder: Path, name: str | Path, place: str, problems: list[Problem]) -> Path:
    """Return a row's file: as written, with backslashes as separators, or in another Unicode form.

    Args:
        folder: The table's folder.
        name: The path in the table.
        place: The row, for problems.
        problems: One is added for a URL or a path of a Windows drive.
    """
    file = folder / name
    if (
        isinstance(name, Path)
        or (name.isascii() and "\\" not in name and ":" not in name)
        or os.path.exists(file)
    ):
        return file
    for text in (name, name.replace("\\", "/")):
        for form in (text, unicodedata.normalize("NFC", text), unicodedata.normalize("NFD", text)):
            if os.path.isfile(folder / form):
                return folder / form
    if _ELSEWHERE.match(name):
        what = "on a Windows drive: write paths below the table"
        if "://" in name:
            is_file = name.lower().startswith("file:")
            what = f"a URL: {'write the path without file://' if is_file else 'download the images'}"
        problems.append((place, f"{name!r} is {what}"))
    return file


def described(problems: Iterable[Problem]) -> str:
    """Join the problems of rows; one that several rows have is said once, with the first few of them."""
    places: dict[str, list[str]] = {}
    for place, problem in problems:
        places.setdefault(problem, []).append(place)
    lines = [f"{first_few(rows, _SHOWN)}: {problem}" for problem, rows in places.items()]
    return first_few(lines, _SHOWN, "; ")


def _check(path: Path, rows: Sequence[_Row], problems: list[Problem], *, embedded: bool) -> None:
    seen: dict[str, _Row] = {}
    for row in rows:
        empty = [name for name in (*COLUMNS, "split") if not getattr(row, name)]
        if empty:
            names = ["image" if embedded and name == "path" else name for name in empty]
            problems.append((row.place, f"{' and '.join(names)} empty"))
            continue
        split, rest = row.named
        if split is None or rest:
            problems.append((row.place, f"split {row.split!r} is not one of train, val, test"))
        elif split == "unclear":
            problems.append((row.place, f"split {row.split!r} may be val or test: write one of these"))
        first = seen.setdefault(os.path.normpath(str(row.file)), row)
        if first is not row:
            other = f" with the label {first.label!r}, here {row.label!r}" if first.label != row.label else ""
            problems.append((row.place, f"{row.path!r} is already in {first.place}{other}"))
    if problems:
        raise CrossXError(f"{path}: {described(problems)}. Fix the {'dataset' if embedded else 'table'}.")


def _classes(path: Path, rows: Sequence[_Row]) -> tuple[list[str], str]:
    """Return the class names in label order, and which have no training images."""
    first: dict[str, _Row] = {}
    for row in rows:
        first.setdefault(row.label, row)
    trained = {row.label for row in rows if row.named[0] == "train"}
    unseen = [f"{label!r} ({row.place}, {row.split})" for label, row in first.items() if label not in trained]
    untrained = ""
    if unseen:
        untrained = f"{path}: no training image of {first_few(unseen, _SHOWN)}. Each class needs one."
    elif len(first) == 1:
        raise CrossXError(f"{path}: only one class, {next(iter(first))!r}, and a classifier needs two.")
    # Python refuses to convert thousands of digits
    if all(re.fullmatch(r"-?[0-9]{1,1000}", label) for label in first):
        return sorted(first, key=lambda label: (int(label), label)), untrained
    return sorted(first), untrained
