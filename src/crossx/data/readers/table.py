"""The user's own images, listed in a table: CSV, JSON lines or Parquet."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crossx.data.index import DatasetIndex
from crossx.data.readers.embedded import image_column, unpack
from crossx.data.readers.parquet_bounds import read_columns, read_footer, require_bounded
from crossx.data.readers.parsing import MAX_FILE
from crossx.data.readers.rows import (
    COLUMNS,
    ONE_LABEL,
    WANTED,
    LabelTable,
    Problem,
    described,
    field_text,
    index_rows,
    indicator_columns,
    resolved,
    split_notes,
)
from crossx.errors import CrossXError, UsageError, counted, first_few, first_line
from crossx.extras import require
from crossx.runs.spreadsheet import unescape_formula
from crossx.suggestions import nearest
from crossx.text import read_bytes

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

SUFFIXES = (".csv", ".parquet", ".tsv", ".jsonl", ".ndjson")
"""Names of files that are tables wherever a path is given; text tables may also end in ``.gz``."""
_TEXT_SUFFIXES = (*SUFFIXES, ".txt", ".tab")
_SPREADSHEETS = (".xlsx", ".xls", ".xlsm", ".xlsb", ".ods", ".numbers")
_SEPARATORS = {",": "comma", ";": "semicolon", "\t": "tab", "|": "vertical bar"}
_SAMPLE = 1000
_SHOWN = 5


def read_table(path: Path, *, test_fraction: float = 0.2, split_seed: int = 0) -> DatasetIndex:
    """Read a table with the columns ``path``, ``label`` and, optionally, ``split``; others are ignored.

    Paths are absolute or relative to the table's folder; backslashes separate folders where that names a file. Instead
    of ``path``, a Parquet file may hold encoded images in a column ``image``, ``bytes`` or ``img`` (bytes, or structs
    with a field ``bytes`` as in Hugging Face datasets), which are unpacked into the cache. Labels are text, whole
    numbers or booleans, with the names of Hugging Face's ``ClassLabel``; see ``names.class_name``. Classes are in
    numeric order if all labels are whole numbers, else in sorted order. ``split`` is train, val or test, or another
    usual name (``names.split_name``); without the column, ``test_fraction`` of each class is held out for testing.

    CSV is UTF-8, UTF-16 or UTF-32, with the column names in the first line, separated by commas, semicolons, tabs or
    vertical bars. JSON lines hold one object per line. Both may be compressed by gzip.

    Args:
        path: The table.
        test_fraction: Share of each class's images that becomes the test split, in [0, 1).
        split_seed: Seed of that choice.

    Raises:
        CrossXError: If the table is missing or unreadable, a column is missing or of another type, or rows are wrong:
            empty fields, unknown splits, an image listed twice, a class without training images. Rows are named by
            number.
        UsageError: If it is no table, or ``test_fraction`` is out of range.
    """
    return index_rows("table", path, _read(path, COLUMNS), test_fraction, split_seed)


def read_paths(path: Path) -> list[Path]:
    """Return the files in the column ``path`` of a table; other columns are ignored.

    Raises:
        CrossXError: If the table is missing or unreadable, lacks the column, has no rows, or a field is empty.
        UsageError: If it is no table.
    """
    files, problems = [], list[Problem]()
    for place, fields in _read(path, ("path",)).rows:
        name = field_text(path, place, "path", fields["path"])
        if not name:
            raise CrossXError(f"{path}: {place}: path empty. Fix the table.")
        files.append(resolved(path.parent, name, place, problems))
    if problems:
        raise CrossXError(f"{path}: {described(problems)}. Fix the table.")
    return files


def read_names(path: Path) -> list[tuple[str, str]]:
    """Return the column ``path`` of a table as it is written, each with its place; the table may have no rows.

    Raises:
        CrossXError: If the table is missing or unreadable, or lacks the column.
        UsageError: If it is no table.
    """
    rows = _read(path, ("path",), may_be_empty=True).rows
    return [(place, field_text(path, place, "path", fields["path"])) for place, fields in rows]


def is_table(path: Path) -> bool:
    """Return whether a file's name is that of a table."""
    name = path.with_suffix("") if path.suffix.lower() == ".gz" else path
    return name.suffix.lower() in SUFFIXES


def _read(path: Path, required: Sequence[str], *, may_be_empty: bool = False) -> LabelTable:
    suffix = (path.with_suffix("") if path.suffix.lower() == ".gz" else path).suffix.lower()
    if path.is_dir():
        raise UsageError(f"{path}: is a folder. --data.root takes the table itself.{_tables_in(path)}")
    if suffix in _SPREADSHEETS:
        raise UsageError(
            f"{path}: is a spreadsheet; a table is a .csv or .parquet file. Save it as CSV UTF-8 in your program."
        )
    if suffix not in _TEXT_SUFFIXES:
        raise UsageError(
            f"{path}: a table is a .csv or .parquet file (also .tsv, .txt or .jsonl). Save it as one of these."
        )
    if not path.exists():
        raise CrossXError(f"{path}: no such file. --data.root takes the table of path, label and split.")
    if not path.is_file():
        raise CrossXError(f"{path}: is a pipe or device, not a file.")
    try:
        if suffix == ".parquet":
            require(f"{path}: a Parquet file", "pyarrow", extra="parquet")
            table = _parquet(path, required)
        else:
            table = (_json_lines if suffix in (".jsonl", ".ndjson") else _csv)(path, _decoded(path), required)
    except OSError as error:
        raise CrossXError(f"{path}: cannot be read ({error.strerror or error}).") from error
    if not (table.rows or may_be_empty):
        raise CrossXError(f"{path}: the table has no rows.")
    return table


def _decoded(path: Path) -> str:
    """Return a text file's content: UTF-8, or UTF-16 or UTF-32 with or without a byte order mark; also as gzip."""
    content = read_bytes(path, MAX_FILE)
    if content.startswith(b"\x1f\x8b"):
        try:
            with gzip.open(io.BytesIO(content)) as file:
                content = file.read(MAX_FILE + 1)
        except (EOFError, zlib.error) as error:
            raise CrossXError(f"{path}: is not a complete gzip file ({error}).") from error
        if len(content) > MAX_FILE:
            raise CrossXError(f"{path}: becomes larger than {MAX_FILE >> 30} GiB when it is unpacked.")
    for start, kind in (
        (b"PK\x03\x04", "a spreadsheet (or another ZIP archive)"),
        (b"\xd0\xcf\x11\xe0", "a spreadsheet"),
        (b"PAR1", "a Parquet file"),
    ):
        if content.startswith(start):
            ending = "Rename it to .parquet" if kind.endswith("Parquet file") else "Save it as CSV UTF-8"
            raise CrossXError(f"{path}: is {kind}, not text. {ending}.")
    encoding = "utf-8-sig"
    if content.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        encoding = "utf-32"
    elif content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        encoding = "utf-16"
    elif content[:4].count(0) == 3:
        encoding = "utf-32-be" if content[:1] == b"\0" else "utf-32-le"
    elif b"\0" in content[:2] and len(content) > 1:
        encoding = "utf-16-le" if content[1:2] == b"\0" else "utf-16-be"
    try:
        return content.decode(encoding).removesuffix("\x1a")  # the end of a file in DOS
    except UnicodeDecodeError as error:
        line = 1 + len(re.findall(rb"\r\n?|\n", content[: error.start]))
        raise CrossXError(
            f"{path}: line {line}: is not UTF-8 text ({error.reason}). Save it as UTF-8, in Excel as CSV UTF-8."
        ) from error


def _csv(path: Path, text: str, required: Sequence[str]) -> LabelTable:
    given = re.match(r'"?sep=([^\r\n])"?(\r\n?|\n)', text, re.IGNORECASE)
    body = text[given.end() :] if given else text
    before = int(given is not None)
    if blank := re.match(r"([^\S\r\n,;\t|]*(\r\n?|\n))+", body):
        body = body[blank.end() :]
        before += len(re.findall(r"\r\n?|\n", blank[0]))
    separator = given[1] if given else _separator(body, required)
    reader = csv.reader(io.StringIO(body, newline=""), strict=True, delimiter=separator)
    rows: list[tuple[str, list[str]]] = []
    ended = 0
    try:
        header = next(reader, [])
        ended = reader.line_num
        if len(header) == 1 and all(name in header[0].lower() for name in required) and len(required) > 1:
            *marks, last = _SEPARATORS.values()
            raise CrossXError(
                f"{path}: the separator of {header[0]!r} is not known: a {', '.join(marks)} or {last} is."
            )
        columns = _columns(
            path,
            header,
            required,
            lambda: _csv_columns(header, list(islice(reader, _SAMPLE))),
            f" The first line names the columns: {', '.join(required)}.",
        )
        for fields in reader:
            ended = reader.line_num
            if not any(value.strip() for value in fields[len(header) :]):
                fields = fields[: len(header)]  # spreadsheets write separators of empty columns
            if not any(value.strip() for value in fields):
                continue
            place = f"line {reader.line_num + before}"
            if len(fields) != len(header):
                raise CrossXError(
                    f"{path}: {place}: {counted(len(fields), 'field')}, the header has {len(header)}. "
                    f"A {_SEPARATORS.get(separator, repr(separator))} inside a field needs quotes around the field."
                )
            rows.append((place, fields))
    except csv.Error as error:
        # a row continues below its line until its quotes are closed
        begin, end = ended + 1 + before, reader.line_num + before
        place, hint = f"line {begin}", ""
        if end > begin:
            hint = f" Check the quotes from there to line {end}."
        raise CrossXError(f"{path}: {place}: not valid CSV ({error}).{hint}") from error
    others = {
        name: [fields[index] for _, fields in rows[:_SAMPLE]]
        for index, name in enumerate(header)
        if index not in columns.values()
    }
    # a table of predictions, see predict/outputs.py
    read = unescape_formula if {"probability", "error"} <= {*header} else str
    used = [(place, {name: read(fields[index]) for name, index in columns.items()}) for place, fields in rows]
    return LabelTable(list(columns), used, notes=split_notes(columns, others))


def _csv_columns(header: Sequence[str], rows: Sequence[Sequence[str]]) -> dict[str, list[str]]:
    return {name: [row[index] for row in rows if index < len(row)] for index, name in enumerate(header)}


def _separator(text: str, required: Sequence[str]) -> str:
    """Return the separator with which the header has the required columns, else the one that splits it most."""
    first = re.match(r"[^\r\n]*", text)
    line = first[0] if first else ""
    parts = {mark: [name.strip(' "').lower() for name in line.split(mark)] for mark in _SEPARATORS}
    fitting = [mark for mark, names in parts.items() if all(name in names for name in required)]
    if fitting and len(required) > 1:
        return fitting[0]
    return max(fitting or _SEPARATORS, key=lambda mark: len(parts[mark]))


def _json_lines(path: Path, text: str, required: Sequence[str]) -> LabelTable:
    rows: list[tuple[str, dict[str, Any]]] = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise CrossXError(f"{path}: line {number}: is not valid JSON ({first_line(error)}).") from error
        if not isinstance(values, dict):
            raise CrossXError(f"{path}: line {number}: is not a JSON object, one per line.")
        rows.append((f"line {number}", values))
    header = list(dict.fromkeys(name for _, values in rows for name in values))
    first_values = {name: [values.get(name) for _, values in rows[:_SAMPLE]] for name in header}
    columns = _columns(path, header, required, lambda: first_values)
    used_names = {header[index] for index in columns.values()}
    others = {name: values for name, values in first_values.items() if name not in used_names}
    used = [
        (place, {name: values.get(header[index]) for name, index in columns.items()})
        for place, values in rows
    ]
    return LabelTable(list(columns), used, notes=split_notes(columns, others))


def _parquet(path: Path, required: Sequence[str]) -> LabelTable:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            schema = file.schema_arrow
            image = image_column(schema) if "label" in required else None
            needed = [name for name in required if name != "path" or image is None]
            columns = _columns(path, schema.names, needed, lambda: _plain_columns(path, file, schema))
            kinds = {name: schema.types[index] for name, index in columns.items()}
            for name, index in columns.items():
                require_text(path, name, schema.field(index))
            values = read_columns(path, file, {name: schema.names[index] for name, index in columns.items()})
            if image is not None:
                values["path"] = unpack(path, file, schema.names[image])
            others = {
                name: _first_values(path, file, name)
                for index, name in enumerate(schema.names)
                if "label" in columns
                and index not in (*columns.values(), image)
                and not pa.types.is_nested(schema.types[index])
            }
        if len({len(column) for column in values.values()}) > 1:
            raise CrossXError(
                f"{path}: is not a Parquet file that can be read (its columns differ in length)."
            )
    except (CrossXError, OSError):
        raise
    except Exception as error:  # on damaged files pyarrow raises whatever its decoders raise
        raise CrossXError(f"{path}: is not a Parquet file that can be read ({first_line(error)}).") from error
    names = _class_labels(schema, columns)
    if names and pa.types.is_integer(kinds["label"]):
        values["label"] = [
            names[value] if value is not None and 0 <= value < len(names) else None
            for value in values["label"]
        ]
    used = [
        (f"row {number}", dict(zip(values, fields, strict=True)))
        for number, fields in enumerate(zip(*values.values(), strict=True), start=1)
    ]
    notes = split_notes(columns, others)
    return LabelTable(list(columns), used, embedded=image is not None, notes=notes)


def _plain_columns(path: Path, file: pq.ParquetFile, schema: pa.Schema) -> dict[str, list[Any]]:
    """Return the first values of the columns that are neither nested nor bytes."""
    import pyarrow as pa

    plain = (pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean, pa.types.is_string)
    return {
        name: _first_values(path, file, name)
        for name, kind in zip(schema.names, schema.types, strict=True)
        if any(check(kind) for check in plain)
    }


def _first_values(path: Path, file: pq.ParquetFile, name: str) -> list[Any]:
    starts = accumulate(read_footer(path).rows, initial=0)
    groups = [number for number, start in enumerate(starts) if start < _SAMPLE][: file.num_row_groups]
    try:
        rows = require_bounded(path, [name], groups).rows(_SAMPLE)
    except CrossXError:  # a column that is not needed may unpack to anything
        return []
    batches = file.iter_batches(rows, groups, [name])
    return [value for batch in islice(batches, _SAMPLE // rows) for value in batch.column(0).to_pylist()]


def _class_labels(schema: pa.Schema, columns: Mapping[str, int]) -> list[str] | None:
    """Return the class names that Hugging Face's datasets store next to the numbers of a ``ClassLabel``."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        names = features[schema.names[columns["label"]]]["names"]
    except (KeyError, TypeError, ValueError):
        return None
    return [str(name) for name in names] if isinstance(names, list) else None


def require_text(path: Path, name: str, field: pa.Field) -> None:
    """Refuse a column whose type is neither text nor whole numbers.

    Args:
        path: The table, for the message.
        name: ``path``, ``label`` or ``split``.
        field: The column.

    Raises:
        CrossXError: If it holds lists, structs, dates or values of an extension type.
    """
    import pyarrow as pa

    kind = field.type
    value = kind.value_type if pa.types.is_dictionary(kind) else kind
    # such as pandas' periods, stored as whole numbers
    extension = (field.metadata or {}).get(b"ARROW:extension:name", b"").decode("utf-8", "replace")
    if isinstance(kind, pa.BaseExtensionType):  # one that is known in this process
        extension = str(kind)
    if pa.types.is_nested(value) or pa.types.is_temporal(value) or pa.types.is_interval(value) or extension:
        raise CrossXError(f"{path}: column {name!r} holds {extension or kind}: {WANTED[name]}.")


def _columns(
    path: Path,
    header: Sequence[Any],
    required: Sequence[str],
    first_values: Callable[[], Mapping[str, Sequence[Any]]],
    hint: str = "",
) -> dict[str, int]:
    """Return column -> position; case and surrounding blanks are ignored."""
    names = [str(name).strip().lower() for name in header]
    found = ", ".join(repr(name) for name in header)
    for name in required:
        if name == "label" and name not in names and (classes := indicator_columns(first_values())):
            raise CrossXError(
                f"{path}: there is no column 'label', and {first_few([repr(found) for found in classes], _SHOWN)} hold "
                f"only 0 and 1, as columns of classes do: {ONE_LABEL}. Write the name of its class into a column label."
            )
        if name not in names:
            raise CrossXError(
                f"{path}: there is no column {name!r}.{nearest(name, [*header])} Columns found: {found or 'none'}."
                f"{hint}"
            )
    columns = [name for name in (*required, "split") if name in names]
    for name in columns:
        if names.count(name) > 1:
            raise CrossXError(f"{path}: two columns are called {name!r}. Columns found: {found}.")
    return {name: names.index(name) for name in columns}


def _tables_in(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir() if is_table(path))
    return f" Did you mean {str(folder / names[0])!r}?" if names else ""
