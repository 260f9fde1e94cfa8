"""Write predictions and features to files, incrementally and atomically."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
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

GROUP_ROWS = 1024
"""Rows per row group of a Parquet file."""

TableRow: TypeAlias = tuple[object, ...]


@dataclass(frozen=True)
class Columns:
    """What a table of predictions has besides ``path, label, probability, error``.

    Attributes:
        top: Classes per image; above 1 there is one row per rank and a column ``rank``, from 1, empty for an error.
        nearest: Whether images can be rejected: columns ``nearest``, the class also where ``label`` is empty because
            the image is rejected, and ``score``.
        candidates: Whether there are prediction sets: a column ``candidates``.
    """

    top: int = 1
    nearest: bool = False
    candidates: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all columns."""
        more = (
            *(["rank"] if self.top > 1 else []),
            *(["nearest", "score"] if self.nearest else []),
            *(["candidates"] if self.candidates else []),
        )
        return ("path", "label", "probability", "error", *more)


ONE_CLASS = Columns()
"""One class per image, no rejection and no sets."""


def check_output(path: Path, suffixes: Iterable[str], option: str = "--output") -> None:
    """Check that ``path``, which an option chooses, has one of the suffixes and can be written.

    Raises:
        UsageError: If it has another suffix, is a folder, or needs a package that is not installed.
        CrossXError: If its folder cannot be written to.
    """
    if path.suffix.lower() not in suffixes:
        raise UsageError(f"{path}: must end in {' or '.join(suffixes)}.")
    if path.suffix.lower() == ".parquet":
        require(f"{path}: a Parquet file", "pyarrow", extra="parquet")
    check_output_file(path, option)


def write_predictions(path: Path, predictions: Iterable[Prediction], columns: Columns = ONE_CLASS) -> None:
    """Write predictions with the columns of their predictor, in the format of the file's suffix, see ``WRITERS``.

    Raises:
        CrossXError: If the file cannot be written.
    """
    WRITERS[path.suffix.lower()](path, predictions, columns)


def write_csv(path: Path, predictions: Iterable[Prediction], columns: Columns = ONE_CLASS) -> None:
    """Write a CSV file; candidates are separated by ``"; "``, see ``joined``.

    Paths and labels that a spreadsheet would take for formulas get an apostrophe, see ``crossx.runs.spreadsheet``.
    """
    write_table(path, columns.names, _rows(predictions, columns))


def print_csv(file: TextIO, predictions: Iterable[Prediction], columns: Columns = ONE_CLASS) -> None:
    """Write the lines of ``write_csv`` to an open file."""
    write_rows(file, chain([columns.names], _rows(predictions, columns)))


def write_json_lines(path: Path, predictions: Iterable[Prediction], columns: Columns = ONE_CLASS) -> None:
    """Write one JSON object per line and image, with the columns as keys, of the most probable class.

    With ``top`` above 1 there is ``top`` in place of ``rank``, a list of objects ``label, probability``, best first.
    """
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for prediction in predictions:
            record: dict[str, Any] = {
                "path": _text(prediction.path),
                "label": prediction.label,
                "probability": prediction.probability,
                "error": prediction.error,
            }
            if columns.top > 1:
                record["top"] = [
                    {"label": label, "probability": value} for label, value in prediction.top[: columns.top]
                ]
            if columns.nearest:
                record |= {"nearest": prediction.nearest, "score": prediction.score}
            if columns.candidates:
                record["candidates"] = prediction.candidates
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def write_parquet(path: Path, predictions: Iterable[Prediction], columns: Columns = ONE_CLASS) -> None:
    """Write a Parquet file with the columns and rows of ``write_csv``; candidates are a list."""
    rows = (row for one in predictions for row in table_rows(_text(one.path), one, columns))
    _write_groups(path, _schema(columns), rows)


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


def table_rows(name: object, prediction: Prediction, columns: Columns) -> Iterator[TableRow]:
    """Yield rows with the columns: one per rank, or one with the error."""
    if prediction.error is not None:
        yield (name, None, None, prediction.error, *[None] * (len(columns.names) - 4))
        return
    for rank, (label, probability) in enumerate(prediction.top[: columns.top], start=1):
        yield (
            name,
            None if prediction.rejected else label,
            probability,
            None,
            *([rank] if columns.top > 1 else []),
            *([label, prediction.score] if columns.nearest else []),
            *([prediction.candidates] if columns.candidates else []),
        )


def to_table(rows: Sequence[TableRow], columns: Columns) -> pa.Table:
    """Return rows of ``table_rows`` as an Arrow table."""
    return _table(rows, _schema(columns))


def joined(names: Iterable[str]) -> str:
    r"""Join class names by ``"; "`` for a field of a CSV file; in a name, ``;`` is ``\;`` and ``\`` is ``\\``."""
    return "; ".join(name.replace("\\", r"\\").replace(";", r"\;") for name in names)


WRITERS: Mapping[str, Callable[[Path, Iterable[Prediction], Columns], None]] = {
    ".csv": write_csv,
    ".jsonl": write_json_lines,
    ".parquet": write_parquet,
}


def _schema(columns: Columns) -> pa.Schema:
    import pyarrow as pa

    types = {
        "probability": pa.float32(),
        "rank": pa.int32(),
        "score": pa.float32(),
        "candidates": pa.list_(pa.string()),
    }
    return pa.schema([(name, types.get(name, pa.string())) for name in columns.names])


def _rows(predictions: Iterable[Prediction], columns: Columns) -> Iterator[Sequence[object]]:
    for prediction in predictions:
        name = None if prediction.path is None else str(prediction.path)
        for row in table_rows(name, prediction, columns):
            yield [joined(value) if isinstance(value, tuple) else value for value in row]


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
