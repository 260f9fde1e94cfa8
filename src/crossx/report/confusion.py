"""The most confused classes and pairs of a confusion matrix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from crossx.evaluation.metrics import mutual_confusions


class ConfusionRow(NamedTuple):
    """One row of a selection of the confusion matrix.

    Attributes:
        name: The true class.
        cells: Number of images and fraction of the class, per selected class.
        elsewhere: Number of images predicted as a class outside the selection.
        n: Number of images of the class.
    """

    name: str
    cells: list[tuple[int, float]]
    elsewhere: int
    n: int


def confused_block(confusion: NDArray[np.int64], most: int) -> list[int]:
    """Return the classes to show: all in label order, or the ``most`` of the most confused pairs.

    A selection is ordered by the leaves of an average-linkage tree, which puts confused classes next to each other.
    """
    count = len(confusion)
    if count <= most:
        return list(range(count))
    chosen = dict.fromkeys(label for pair in mutual_confusions(confusion) for label in pair[:2])
    selected = np.array(sorted(list(chosen)[:most]), dtype=np.int64)
    if len(selected) < 3:
        return [int(label) for label in selected]
    from scipy.cluster.hierarchy import leaves_list, linkage
    from scipy.spatial.distance import squareform

    similarity = (confusion + confusion.T)[np.ix_(selected, selected)].astype(float)
    distance = similarity.max() - similarity
    np.fill_diagonal(distance, 0)
    tree = linkage(squareform(distance, checks=False), method="average", optimal_ordering=True)
    return [int(label) for label in selected[leaves_list(tree)]]


def confusion_rows(
    confusion: NDArray[np.int64], classes: Sequence[str], labels: Sequence[int]
) -> list[ConfusionRow]:
    """Return the rows and columns of ``labels`` in the confusion matrix."""
    rows = []
    for label in labels:
        counts = confusion[label, labels].tolist()
        n = int(confusion[label].sum())
        cells = [(count, count / n if n else 0.0) for count in counts]
        rows.append(ConfusionRow(classes[label], cells, n - sum(counts), n))
    return rows
