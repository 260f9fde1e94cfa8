"""Classes of a tested run as rows of tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from crossx.report.results import Tested


class ClassRow(NamedTuple):
    """How well one class is recognised.

    Attributes:
        name: The class.
        n: Number of its images.
        accuracy: Share of them predicted right.
        confused: The class that most of its wrong predictions name; None where none is wrong.
    """

    name: str
    n: int
    accuracy: float
    confused: str | None


class ConfusionRow(NamedTuple):
    """A row of a part of the confusion matrix.

    Attributes:
        name: The true class.
        cells: For each class that is shown the number of images and their share of the class.
        elsewhere: Number of images predicted as a class that is not shown.
        n: Number of images of the class.
    """

    name: str
    cells: list[tuple[int, float]]
    elsewhere: int
    n: int


def class_rows(tested: Tested) -> list[ClassRow]:
    """Return a row for each class that has images, in label order."""
    errors = tested.confusion.copy()
    np.fill_diagonal(errors, 0)
    rows = []
    for label, name in enumerate(tested.classes):
        n, wrong = int(tested.confusion[label].sum()), int(errors[label].sum())
        if n:
            confused = tested.classes[int(errors[label].argmax())] if wrong else None
            rows.append(ClassRow(name, n, 1 - wrong / n, confused))
    return rows


def confusion_rows(tested: Tested, labels: Sequence[int]) -> list[ConfusionRow]:
    """Return the rows of ``labels`` in the confusion matrix, with the columns of ``labels``."""
    rows = []
    for label in labels:
        counts = tested.confusion[label, labels].tolist()
        n = int(tested.confusion[label].sum())
        cells = [(count, count / n if n else 0.0) for count in counts]
        rows.append(ConfusionRow(tested.classes[label], cells, n - sum(counts), n))
    return rows
