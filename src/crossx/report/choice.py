"""What of a large test set is shown: the same choice for the same answers, whatever the machine."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.cluster.hierarchy import leaves_list, linkage
from scipy.spatial.distance import squareform

from crossx.report.results import Tested

PAIRS = 6
"""Pairs of classes with pictures of both."""
WRONG = 8
"""Wrong predictions with pictures, the most confident ones."""
RIGHT = 8
"""Right predictions with pictures, drawn at random."""
SEED = 0
"""Of that draw."""


class Pair(NamedTuple):
    """Two classes that are taken for each other; of the two directions the more frequent one comes first.

    Attributes:
        target: The class whose images are taken for the other's.
        prediction: That other class.
        n: Number of images of ``target`` predicted as ``prediction``.
        back: Number of images of ``prediction`` predicted as ``target``.
    """

    target: int
    prediction: int
    n: int
    back: int


class Choice(NamedTuple):
    """Which images are shown.

    Attributes:
        pairs: A pair, its most confident image taken for the other class, and the most confident right image of that
            other class (None where no image of it is right).
        wrong: The most confident wrong predictions, most confident first.
        right: Right predictions drawn at random, in the order of the images.
    """

    pairs: list[tuple[Pair, int, int | None]]
    wrong: list[int]
    right: list[int]

    @property
    def images(self) -> list[int]:
        """Every image that is shown, sorted, each once."""
        shown = {image for _, *both in self.pairs for image in both if image is not None}
        return sorted(shown.union(self.wrong, self.right))


def choose_examples(tested: Tested) -> Choice:
    """Choose the images to show, at most ``2 * PAIRS + WRONG + RIGHT``."""
    wrong = np.flatnonzero(~tested.correct)
    right = np.flatnonzero(tested.correct)
    drawn = np.random.default_rng(SEED).choice(right, min(RIGHT, len(right)), replace=False)
    pairs = []
    for pair in confused_pairs(tested.confusion)[:PAIRS]:
        taken = _most_confident(
            tested, (tested.targets == pair.target) & (tested.predictions == pair.prediction)
        )
        other = _most_confident(tested, tested.correct & (tested.targets == pair.prediction))
        pairs.append((pair, taken[0], other[0] if other else None))
    return Choice(
        pairs,
        wrong[np.argsort(-tested.confidences[wrong], kind="stable")][:WRONG].tolist(),
        sorted(drawn.tolist()),
    )


def confused_pairs(confusion: NDArray[np.int64]) -> list[Pair]:
    """Return every pair of classes that are taken for each other, most images first, equal counts in label order."""
    both = np.triu(confusion + confusion.T, k=1)
    first, second = np.nonzero(both)
    order = np.argsort(-both[first, second], kind="stable")
    pairs = []
    for a, b in zip(first[order].tolist(), second[order].tolist(), strict=True):
        there, back = int(confusion[a, b]), int(confusion[b, a])
        pairs.append(Pair(a, b, there, back) if there >= back else Pair(b, a, back, there))
    return pairs


def confused_block(confusion: NDArray[np.int64], most: int) -> list[int]:
    """Return the classes to show of a confusion matrix: all, or the ``most`` that are in the most confused pairs.

    Of a part the classes that are taken for each other stand side by side (the leaves of an average-linkage tree),
    all are in label order.
    """
    count = len(confusion)
    if count <= most:
        return list(range(count))
    chosen: list[int] = []
    for pair in confused_pairs(confusion):
        chosen += [label for label in (pair.target, pair.prediction) if label not in chosen]
    part = np.array(sorted(chosen[:most]), dtype=np.int64)
    if len(part) < 3:
        return [int(label) for label in part]
    likeness = (confusion + confusion.T)[np.ix_(part, part)].astype(float)
    distance = likeness.max() - likeness
    np.fill_diagonal(distance, 0)
    tree = linkage(squareform(distance, checks=False), method="average", optimal_ordering=True)
    return [int(label) for label in part[leaves_list(tree)]]


def _most_confident(tested: Tested, chosen: NDArray[np.bool_]) -> list[int]:
    """Return the one image of a mask that the network was surest about, the first of equal ones; none of none."""
    images = np.flatnonzero(chosen)
    return [int(images[tested.confidences[images].argmax()])] if len(images) else []
