"""Predictions and features as files: written as they come, and whole or not at all."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TextIO, TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq

from crossx.errors import UsageError
from crossx.evaluation.tables import write_table
from crossx.predict.results import Features, Prediction
from crossx.runs import atomic_path, check_output_file

TABLE_COLUMNS = ("path", "label", "probability", "error", "rank")
"""Columns of a table of predictions; ``rank`` only where more than one class an image was asked for."""

GROUP_ROWS = 1024
"""Rows of a Parquet file that are gathered in memory, and lie together in the file."""

TableRow: TypeAlias = tuple[object, str | None, float | None, str | None, int | None]

_SCHEMA = pa.schema(
    zip(TABLE_COLUMNS, (pa.string(), pa.string(), pa.float32(), pa.string(), pa.int32()), strict=True)
)


def check_output(path: Path, suffixes: Iterable[str]) -> None:
    """Check that ``path`` can be written, before any work.

    Args:
        path: The file.
        suffixes: What it may end in.

    Raises:
        UsageError: If it ends otherwise, or a folder has its name.
        CrossXError: If its folder cannot be written to.
    """
    if path.suffix.lower() not in suffixes:
        raise UsageError(f"{path}: must end in {' or '.join(suffixes)}.")
    check_output_file(path)


def write_predictions(path: Path, predictions: Iterable[Prediction], top: int = 1) -> None:
    """Write predictions in the format that the file's name asks for, see ``WRITERS``, atomically.

    Args:
        path: The file.
        predictions: What ``predict`` or ``iter_predict`` gave with the same ``top``.
        top: How many classes an image.

    Raises:
        CrossXError: If the file cannot be written.
    """
    WRITERS[path.suffix.lower()](path, predictions, top)


def write_csv(path: Path, predictions: Iterable[Prediction], top: int = 1) -> None:
    """Write a CSV file: columns ``path, label, probability, error``.

    With ``top`` above 1 there is one row a rank with the further column ``rank``, 1 for the best, empty where there is
    an error.
    """
    write_table(path, _columns(top), _rows(predictions, top))


def print_csv(file: TextIO, predictions: Iterable[Prediction], top: int = 1) -> None:
    """Write the lines of ``write_csv`` to an open file."""
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(_columns(top))
    writer.writerows(_rows(predictions, top))


def write_json_lines(path: Path, predictions: Iterable[Prediction], top: int = 1) -> None:
    """Write a JSON object a line and image: ``path, label, probability, error``.

    With ``top`` above 1 there is also ``top``, a list of objects ``label, probability``, best first.
    """
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for prediction in predictions:
            record: dict[str, Any] = {
                "path": _text(prediction.path),
                "label": prediction.label,
                "probability": prediction.probability,
                "error": prediction.error,
            }
            if top > 1:
                record["top"] = [
                    {"label": label, "probability": value} for label, value in prediction.top[:top]
                ]
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def write_parquet(path: Path, predictions: Iterable[Prediction], top: int = 1) -> None:
    """Write a Parquet file with the columns and rows of ``write_csv``."""
    rows = (row for one in predictions for row in table_rows(_text(one.path), one, top))
    _write_groups(path, _schema(top), rows)


def write_features(path: Path, features: Iterable[Features], size: int) -> None:
    """Write a Parquet file atomically: ``path``, ``feature``, ``error``, a row an image.

    One of feature and error is null.

    Args:
        path: The file.
        features: What ``iter_features`` gave.
        size: Numbers of a feature vector, the length of the column's fixed-size lists.

    Raises:
        CrossXError: If the file cannot be written.
    """
    kinds = (pa.string(), pa.list_(pa.float32(), size), pa.string())
    schema = pa.schema(zip(("path", "feature", "error"), kinds, strict=True))
    rows = ((_text(one.path), one.vector, one.error) for one in features)
    _write_groups(path, schema, rows)


def table_rows(name: object, prediction: Prediction, top: int) -> Iterator[TableRow]:
    """Give the rows of a table with ``TABLE_COLUMNS``: one a rank, or one with the error."""
    if prediction.error is not None:
        yield name, None, None, prediction.error, None
    for rank, (label, probability) in enumerate(prediction.top[:top], start=1):
        yield name, label, probability, None, rank


def to_table(rows: Sequence[TableRow], top: int) -> pa.Table:
    """Return rows of ``table_rows`` as an Arrow table."""
    return _table(rows, _schema(top))


WRITERS: Mapping[str, Callable[[Path, Iterable[Prediction], int], None]] = {
    ".csv": write_csv,
    ".jsonl": write_json_lines,
    ".parquet": write_parquet,
}


def _columns(top: int) -> tuple[str, ...]:
    return TABLE_COLUMNS if top > 1 else TABLE_COLUMNS[:4]


def _schema(top: int) -> pa.Schema:
    return pa.schema([_SCHEMA.field(name) for name in _columns(top)])


def _rows(predictions: Iterable[Prediction], top: int) -> Iterator[Sequence[object]]:
    width = len(_columns(top))
    for prediction in predictions:
        for row in table_rows(prediction.path, prediction, top):
            yield row[:width]


def _table(rows: Sequence[Sequence[object]], schema: pa.Schema) -> pa.Table:
    columns = [pa.array([row[place] for row in rows], kind) for place, kind in enumerate(schema.types)]
    return pa.table(columns, schema)


def _write_groups(path: Path, schema: pa.Schema, rows: Iterator[Sequence[object]]) -> None:
    with atomic_path(path) as temporary, pq.ParquetWriter(temporary, schema) as writer:
        while group := list(islice(rows, GROUP_ROWS)):
            writer.write_table(_table(group, schema))


def _text(path: Path | None) -> str | None:
    """Return a file name as text: names may be any bytes, JSON and Parquet hold valid UTF-8 alone."""
    return None if path is None else utf8(str(path))


def utf8(name: str) -> str:
    """Write what is no valid UTF-8 in a file name as backslashes and numbers."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")
