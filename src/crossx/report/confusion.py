"""What a page shows of a confusion matrix: the most confused classes and pairs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.cluster.hierarchy import leaves_list, linkage
from scipy.spatial.distance import squareform


class MutualConfusion(NamedTuple):
    """Two classes that are confused with each other; of the two directions the more frequent one comes first.

    Attributes:
        target: The class whose images are predicted as the other.
        prediction: That other class.
        n: Number of images of ``target`` predicted as ``prediction``.
        back: Number of images of ``prediction`` predicted as ``target``.
    """

    target: int
    prediction: int
    n: int
    back: int


class ConfusionRow(NamedTuple):
    """One row of some rows and columns of the confusion matrix.

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


def mutual_confusions(confusion: NDArray[np.int64]) -> list[MutualConfusion]:
    """Return every pair of classes that are confused, most images in both directions first, ties in label order."""
    both = np.triu(confusion + confusion.T, k=1)
    first, second = np.nonzero(both)
    order = np.argsort(-both[first, second], kind="stable")
    pairs = []
    for a, b in zip(first[order].tolist(), second[order].tolist(), strict=True):
        there, back = int(confusion[a, b]), int(confusion[b, a])
        pairs.append(
            MutualConfusion(a, b, there, back) if there >= back else MutualConfusion(b, a, back, there)
        )
    return pairs


def confused_block(confusion: NDArray[np.int64], most: int) -> list[int]:
    """Return the classes to show of a confusion matrix: all, or the ``most`` that are in the most confused pairs.

    All classes are in label order. In a selection, those confused with each other are next to each other, as the
    leaves of an average-linkage tree.
    """
    count = len(confusion)
    if count <= most:
        return list(range(count))
    chosen: list[int] = []
    for pair in mutual_confusions(confusion):
        chosen += [label for label in (pair.target, pair.prediction) if label not in chosen]
    selected = np.array(sorted(chosen[:most]), dtype=np.int64)
    if len(selected) < 3:
        return [int(label) for label in selected]
    likeness = (confusion + confusion.T)[np.ix_(selected, selected)].astype(float)
    distance = likeness.max() - likeness
    np.fill_diagonal(distance, 0)
    tree = linkage(squareform(distance, checks=False), method="average", optimal_ordering=True)
    return [int(label) for label in selected[leaves_list(tree)]]


def confusion_rows(
    confusion: NDArray[np.int64], classes: Sequence[str], labels: Sequence[int]
) -> list[ConfusionRow]:
    """Return the rows of ``labels`` in the confusion matrix, with the columns of ``labels``."""
    rows = []
    for label in labels:
        counts = confusion[label, labels].tolist()
        n = int(confusion[label].sum())
        cells = [(count, count / n if n else 0.0) for count in counts]
        rows.append(ConfusionRow(classes[label], cells, n - sum(counts), n))
    return rows
