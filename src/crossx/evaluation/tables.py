"""CSV files of an evaluation."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from crossx.evaluation.metrics import ConfusedPair, class_table, confused_pairs
from crossx.runs import atomic_path
from crossx.runs.spreadsheet import write_rows

if TYPE_CHECKING:
    from torch import Tensor


def write_table(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Write a CSV file atomically, as UTF-8; None becomes an empty field. Rows may come from a generator.

    Texts that a spreadsheet would take for formulas get an apostrophe, see ``crossx.runs.spreadsheet``.

    Raises:
        CrossXError: If the file cannot be written.
    """
    # surrogateescape keeps the bytes of file names that are not valid UTF-8
    with (
        atomic_path(path) as temporary,
        temporary.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file,
    ):
        write_rows(file, chain([header], rows))


def write_class_table(confusion: Tensor | NDArray[np.int64], classes: Sequence[str], path: Path) -> None:
    """Write ``class, n, accuracy, most_confused_with``, one row per class in label order."""
    write_table(path, ("class", "n", "accuracy", "most_confused_with"), class_table(confusion, classes))


def write_confused_pairs(confusion: Tensor | NDArray[np.int64], classes: Sequence[str], path: Path) -> None:
    """Write ``target, prediction, n, fraction``, the most confused pair first."""
    write_table(path, ConfusedPair._fields, confused_pairs(confusion, classes))


def write_confusion(confusion: Tensor | NDArray[np.int64], classes: Sequence[str], path: Path) -> None:
    """Write the confusion matrix: true classes in rows, predicted classes in columns."""
    rows = ((name, *row) for name, row in zip(classes, confusion.tolist(), strict=True))
    write_table(path, ("class", *classes), rows)
