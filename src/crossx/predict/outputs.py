"""Write predictions and features to files, incrementally and atomically."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, TypeAlias

from crossx.errors import UsageError
from crossx.evaluation.tables import write_table
from crossx.extras import require
from crossx.predict.results import Features, Prediction
from crossx.runs import atomic_path, check_output_file
from crossx.runs.spreadsheet import write_rows

if TYPE_CHECKING:
    import pyarrow as pa

TABLE_COLUMNS = ("path", "label", "probability", "error", "rank")
"""Columns of a table of predictions; ``rank`` only with more than one class per image."""

GROUP_ROWS = 1024
"""Rows per row group of a Parquet file."""

TableRow: TypeAlias = tuple[object, str | None, float | None, str | None, int | None]


def check_output(path: Path, suffixes: Iterable[str]) -> None:
    """Check that ``path`` has one of the suffixes and can be written.

    Raises:
        UsageError: If it has another suffix, is a folder, or needs a package that is not installed.
        CrossXError: If its folder cannot be written to.
    """
    if path.suffix.lower() not in suffixes:
        raise UsageError(f"{path}: must end in {' or '.join(suffixes)}.")
    if path.suffix.lower() == ".parquet":
        require(f"{path}: a Parquet file", "pyarrow", extra="parquet")
    check_output_file(path)


def write_predictions(path: Path, predictions: Iterable[Prediction], top: int = 1) -> None:
    """Write predictions of ``iter_predict`` with the same ``top``, in the format of the file's suffix, see ``WRITERS``.

    Raises:
        CrossXError: If the file cannot be written.
    """
    WRITERS[path.suffix.lower()](path, predictions, top)


def write_csv(path: Path, predictions: Iterable[Prediction], top: int = 1) -> None:
    """Write a CSV file: columns ``path, label, probability, error``.

    With ``top`` above 1 there is one row per rank and a column ``rank``, from 1, empty for an error. Paths and labels
    that a spreadsheet would take for formulas get an apostrophe, see ``crossx.runs.spreadsheet``.
    """
    write_table(path, _columns(top), _rows(predictions, top))


def print_csv(file: TextIO, predictions: Iterable[Prediction], top: int = 1) -> None:
    """Write the lines of ``write_csv`` to an open file."""
    write_rows(file, chain([_columns(top)], _rows(predictions, top)))


def write_json_lines(path: Path, predictions: Iterable[Prediction], top: int = 1) -> None:
    """Write one JSON object per line and image: ``path, label, probability, error``.

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
    """Write features of ``iter_features`` as a Parquet file: ``path``, ``feature``, ``error``, one row per image.

    One of feature and error is null. ``size`` is the length of a feature vector.

    Raises:
        CrossXError: If the file cannot be written.
    """
    import pyarrow as pa

    kinds = (pa.string(), pa.list_(pa.float32(), size), pa.string())
    schema = pa.schema(zip(("path", "feature", "error"), kinds, strict=True))
    rows = ((_text(one.path), one.vector, one.error) for one in features)
    _write_groups(path, schema, rows)


def table_rows(name: object, prediction: Prediction, top: int) -> Iterator[TableRow]:
    """Yield rows with ``TABLE_COLUMNS``: one per rank, or one with the error."""
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
    import pyarrow as pa

    kinds = (pa.string(), pa.string(), pa.float32(), pa.string(), pa.int32())
    types = dict(zip(TABLE_COLUMNS, kinds, strict=True))
    return pa.schema([(name, types[name]) for name in _columns(top)])


def _rows(predictions: Iterable[Prediction], top: int) -> Iterator[Sequence[object]]:
    width = len(_columns(top))
    for prediction in predictions:
        name = None if prediction.path is None else str(prediction.path)
        for row in table_rows(name, prediction, top):
            yield row[:width]


def _table(rows: Sequence[Sequence[object]], schema: pa.Schema) -> pa.Table:
    import pyarrow as pa

    columns = [pa.array([row[i] for row in rows], kind) for i, kind in enumerate(schema.types)]
    return pa.table(columns, schema)


def _write_groups(path: Path, schema: pa.Schema, rows: Iterator[Sequence[object]]) -> None:
    from pyarrow import parquet

    with atomic_path(path) as temporary, parquet.ParquetWriter(temporary, schema) as writer:
        while group := list(islice(rows, GROUP_ROWS)):
            writer.write_table(_table(group, schema))


def _text(path: Path | None) -> str | None:
    return None if path is None else utf8(str(path))


def utf8(name: str) -> str:
    """Return a file name with invalid UTF-8 escaped by backslashes, for JSON and Parquet."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")
