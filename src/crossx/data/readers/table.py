"""The user's own images, listed in a CSV or Parquet table."""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crossx.data.index import DatasetIndex, Record, hold_out_test
from crossx.data.readers.folder import SPLIT_NAMES
from crossx.errors import CrossXError, UsageError, first_few, first_line, nearest

COLUMNS = ("path", "label")
SUFFIXES = (".csv", ".parquet")
_SHOWN = 5


def read_table(path: Path, *, test_fraction: float = 0.2, split_seed: int = 0) -> DatasetIndex:
    """Read a table with the columns ``path``, ``label`` and, optionally, ``split``; others are ignored.

    Paths are absolute or relative to the table's folder. Labels are text or whole numbers; classes are in numeric order
    if all labels are whole numbers, else in sorted order. ``split`` is train, val (or valid, validation) or test;
    without the column, ``test_fraction`` of each class is held out for testing. CSV is UTF-8, comma-separated, with
    the column names in the first line.

    Args:
        path: The table.
        test_fraction: Share of each class's images that becomes the test split, in [0, 1).
        split_seed: Seed of that choice.

    Raises:
        CrossXError: If the table is missing or unreadable, a column is missing, or rows are wrong: empty fields,
            unknown splits, an image listed twice, a class without training images. Rows are named by number.
        UsageError: If it is neither CSV nor Parquet, or ``test_fraction`` is out of range.
    """
    has_split = False
    rows: list[_Row] = []
    for place, fields in _fields(path, COLUMNS):
        has_split = "split" in fields
        split = _text(fields["split"]).lower() if has_split else "train"
        rows.append(_Row(place, _text(fields["path"]), _text(fields["label"]), split))
    _check(path, rows)
    classes = _classes(path, rows)
    labels = {name: label for label, name in enumerate(classes)}
    folder = path.parent
    records = [Record(folder / row.path, labels[row.label], SPLIT_NAMES[row.split]) for row in rows]
    if not has_split:
        records = hold_out_test(records, classes, folder, test_fraction, split_seed)
    return DatasetIndex(name="table", classes=tuple(classes), records=tuple(records))


def read_paths(path: Path) -> list[Path]:
    """Return the files in the column ``path`` of a table; other columns are ignored.

    Raises:
        CrossXError: If the table is missing or unreadable, lacks the column, has no rows, or a field is empty.
        UsageError: If it is neither CSV nor Parquet.
    """
    files = []
    for place, fields in _fields(path, ("path",)):
        name = _text(fields["path"])
        if not name:
            raise CrossXError(f"{path}: {place}: path empty. Fix the table.")
        files.append(path.parent / name)
    return files


@dataclass(frozen=True, slots=True)
class _Row:
    place: str
    path: str
    label: str
    split: str


def _fields(path: Path, required: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each row's place, as an editor or viewer calls it, and the fields of the columns in use."""
    suffix = path.suffix.lower()
    if path.is_dir():
        raise UsageError(f"{path}: is a folder. --data.root takes the table itself.{_tables_in(path)}")
    if suffix not in SUFFIXES:
        raise UsageError(f"{path}: a table is a {' or '.join(SUFFIXES)} file. Save it as one of these.")
    if not path.exists():
        raise CrossXError(f"{path}: no such file. --data.root takes the table of path, label and split.")
    empty = True
    try:
        for row in _csv_fields(path, required) if suffix == ".csv" else _parquet_fields(path, required):
            empty = False
            yield row
    except OSError as error:
        raise CrossXError(f"{path}: cannot be read ({error.strerror or error}).") from error
    if empty:
        raise CrossXError(f"{path}: the table has no rows.")


def _csv_fields(path: Path, required: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        try:
            header = next(reader, [])
            columns = _columns(path, header, required)
            for fields in reader:
                if not fields:
                    continue
                place = f"line {reader.line_num}"
                if len(fields) != len(header):
                    raise CrossXError(
                        f"{path}: {place}: {len(fields)} fields, the header has {len(header)}. "
                        "A comma inside a field needs quotes around the field."
                    )
                yield place, {name: fields[index] for name, index in columns.items()}
        except UnicodeDecodeError as error:
            raise CrossXError(f"{path}: is not UTF-8 text ({error.reason}). Save it as UTF-8.") from error
        except csv.Error as error:
            raise CrossXError(f"{path}: line {reader.line_num}: not valid CSV ({error}).") from error


def _parquet_fields(path: Path, required: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            columns = _columns(path, names, required)
            table = file.read(columns=[names[index] for index in columns.values()])
            values = {name: table.column(names[index]).to_pylist() for name, index in columns.items()}
    except (CrossXError, OSError):
        raise
    except Exception as error:  # on damaged files pyarrow raises whatever its decoders raise
        raise CrossXError(f"{path}: is not a Parquet file that can be read ({first_line(error)}).") from error
    for number, fields in enumerate(zip(*values.values(), strict=True), start=1):
        yield f"row {number}", dict(zip(values, fields, strict=True))


def _columns(path: Path, header: Sequence[str], required: Sequence[str]) -> dict[str, int]:
    """Return column -> position; case and surrounding blanks are ignored."""
    names = [name.strip().lower() for name in header]
    found = ", ".join(repr(name) for name in header)
    for name in required:
        if name not in names:
            raise CrossXError(
                f"{path}: there is no column {name!r}.{nearest(name, [*header])} Columns found: {found or 'none'}."
            )
    columns = [name for name in (*required, "split") if name in names]
    for name in columns:
        if names.count(name) > 1:
            raise CrossXError(f"{path}: two columns are called {name!r}. Columns found: {found}.")
    return {name: names.index(name) for name in columns}


def _text(value: Any) -> str:
    """Write a field as text, a whole number without ``.0`` (pandas stores it as a float next to empty fields)."""
    if value is None or value != value:
        return ""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value).strip()


def _check(path: Path, rows: Sequence[_Row]) -> None:
    problems: list[str] = []
    seen: dict[str, _Row] = {}
    for row in rows:
        empty = [name for name in (*COLUMNS, "split") if not getattr(row, name)]
        if empty:
            problems.append(f"{row.place}: {' and '.join(empty)} empty")
            continue
        if row.split not in SPLIT_NAMES:
            problems.append(f"{row.place}: split {row.split!r} is not one of {', '.join(SPLIT_NAMES)}")
        first = seen.setdefault(os.path.normpath(row.path), row)
        if first is not row:
            other = f" with the label {first.label!r}, here {row.label!r}" if first.label != row.label else ""
            problems.append(f"{row.place}: {row.path!r} is already in {first.place}{other}")
    if problems:
        raise CrossXError(f"{path}: {first_few(problems, _SHOWN, '; ')}. Fix the table.")


def _classes(path: Path, rows: Sequence[_Row]) -> list[str]:
    """Return the class names in label order, each with at least one training image."""
    first: dict[str, _Row] = {}
    for row in rows:
        first.setdefault(row.label, row)
    trained = {row.label for row in rows if SPLIT_NAMES[row.split] == "train"}
    unseen = [f"{label!r} ({row.place}, {row.split})" for label, row in first.items() if label not in trained]
    if unseen:
        raise CrossXError(f"{path}: no training image of {first_few(unseen, _SHOWN)}. Each class needs one.")
    if len(first) == 1:
        raise CrossXError(f"{path}: only one class, {next(iter(first))!r}, and a classifier needs two.")
    # Python refuses to convert thousands of digits
    if all(re.fullmatch(r"-?[0-9]{1,1000}", label) for label in first):
        return sorted(first, key=lambda label: (int(label), label))
    return sorted(first)


def _tables_in(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    return f" Did you mean {str(folder / names[0])!r}?" if names else ""
