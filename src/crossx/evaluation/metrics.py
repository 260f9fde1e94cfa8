"""Metrics of a classifier: pure functions of logits (N, K) and targets (N,).

The prediction is the class of the largest logit, the lowest index among equal ones, so that the numbers do not depend
on the device. Imports no torch, so that a report needs none.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from crossx.evaluation.intervals import CONFIDENCE, RESAMPLES, accuracy_intervals

if TYPE_CHECKING:
    from torch import Tensor

LISTED_PAIRS = 10
"""Most confused pairs in a test's results."""


class ClassRow(NamedTuple):
    """Accuracy of one class.

    Attributes:
        name: The class.
        n: Number of its test images.
        accuracy: Fraction of them predicted correctly; None without images.
        most_confused_with: The most frequent wrong prediction; None if none is wrong.
    """

    name: str
    n: int
    accuracy: float | None
    most_confused_with: str | None


class ConfusedPair(NamedTuple):
    """A true class and a wrong prediction of its images.

    Attributes:
        target: The true class.
        prediction: The predicted class.
        n: Number of images of ``target`` predicted as ``prediction``.
        fraction: ``n`` divided by the number of images of ``target``.
    """

    target: str
    prediction: str
    n: int
    fraction: float


class MutualConfusion(NamedTuple):
    """Two classes that are confused with each other, the more frequent direction first.

    Attributes:
        target: The class whose images are predicted as the other one.
        prediction: The other class.
        n: Number of images of ``target`` predicted as ``prediction``.
        back: Number of images of ``prediction`` predicted as ``target``.
    """

    target: int
    prediction: int
    n: int
    back: int


def target_ranks(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the rank of each target among its image's logits, 0 for the largest: int64 (N,).

    Args:
        logits: (N, K).
        targets: int64 (N,).
    """
    import torch

    own = logits.gather(1, targets[:, None])
    earlier = torch.arange(logits.shape[1], device=logits.device) < targets[:, None]
    return ((logits > own) | ((logits == own) & earlier)).sum(dim=1)


def top_k_accuracy(logits: Tensor, targets: Tensor, k: int = 1) -> float:
    """Return the fraction of images (N > 0) whose target is among the ``k`` largest logits; 1 if K < k."""
    return (target_ranks(logits, targets) < k).double().mean().item()


def confusion_matrix(predictions: Tensor, targets: Tensor, num_classes: int) -> Tensor:
    """Count images: int64 (K, K), true classes in rows, predicted classes in columns.

    Args:
        predictions: int64 (N,), class indices.
        targets: int64 (N,).
        num_classes: K.
    """
    cells = targets * num_classes + predictions
    return cells.bincount(minlength=num_classes**2).view(num_classes, num_classes)


def class_mean_accuracy(confusion: Tensor) -> float:
    """Return the mean accuracy over the classes that have images, of a confusion matrix with at least one image.

    This is the "average class-prediction accuracy" of FGVC-Aircraft. The macro average of torchmetrics would count a
    class without images as 0 as soon as one image is predicted as it.
    """
    counts = confusion.sum(dim=1)
    present = counts > 0
    return (confusion.diagonal()[present].double() / counts[present]).mean().item()


def calibration_error(logits: Tensor, targets: Tensor, num_bins: int = 15) -> float:
    """Return the expected calibration error of the largest softmax probability, in equal bins of [0, 1].

    Guo et al., "On Calibration of Modern Neural Networks", 2017 (https://arxiv.org/abs/1706.04599), Eq. 3.
    """
    import torch

    # not by torchmetrics, which imports scipy.signal and matplotlib
    confidences, predictions = logits.double().softmax(dim=1).max(dim=1)
    correct = (predictions == targets).double()
    edges = torch.linspace(0, 1, num_bins + 1, dtype=torch.float64, device=logits.device)
    # a bin has its lower edge and not its upper one; the last has both
    bins = torch.bucketize(confidences, edges[1:-1], right=True)
    gaps = confidences.new_zeros(num_bins).scatter_add_(0, bins, correct - confidences)
    return (gaps.abs().sum() / len(targets)).item()


def level_accuracy(predictions: Tensor, targets: Tensor, groups: Sequence[str]) -> float:
    """Return the fraction of images whose predicted class is in the same group as the target.

    Args:
        predictions: int64 (N,), class indices, N > 0.
        targets: int64 (N,).
        groups: The group of each of the K classes, one level of ``DatasetIndex.levels``.
    """
    numbers = {group: number for number, group in enumerate(dict.fromkeys(groups))}
    group_of = targets.new_tensor([numbers[group] for group in groups])
    return (group_of[predictions] == group_of[targets]).double().mean().item()


def class_table(confusion: Tensor | NDArray[np.int64], classes: Sequence[str]) -> list[ClassRow]:
    """Return one row per class, in label order; of equally frequent confusions the first class is named."""
    counts = np.asarray(confusion)
    errors = _errors(counts)
    columns = (counts.sum(axis=1), counts.diagonal(), errors.max(axis=1), errors.argmax(axis=1))
    return [
        ClassRow(name, n, right / n if n else None, classes[partner] if wrong else None)
        for name, n, right, wrong, partner in zip(classes, *(c.tolist() for c in columns), strict=True)
    ]


def worst_first(rows: Iterable[ClassRow]) -> list[ClassRow]:
    """Return the classes that have images, lowest accuracy first, equal ones in the given order."""
    return sorted((row for row in rows if row.n), key=lambda row: row.accuracy or 0.0)


def confused_pairs(confusion: Tensor | NDArray[np.int64], classes: Sequence[str]) -> list[ConfusedPair]:
    """Return every confused pair, most frequent first, equal counts in label order."""
    matrix = np.asarray(confusion)
    errors, totals = _errors(matrix), matrix.sum(axis=1).tolist()
    counts = [(int(errors[i, j]), i, j) for i, j in np.argwhere(errors).tolist()]
    counts.sort(key=lambda pair: -pair[0])
    return [ConfusedPair(classes[i], classes[j], n, n / totals[i]) for n, i, j in counts]


def mutual_confusions(confusion: NDArray[np.int64]) -> list[MutualConfusion]:
    """Return every confused pair of classes, most images in both directions first, ties in label order."""
    both = np.triu(confusion + confusion.T, k=1)
    first, second = np.nonzero(both)
    pairs = []
    for index in np.argsort(-both[first, second], kind="stable"):
        a, b = int(first[index]), int(second[index])
        if confusion[a, b] < confusion[b, a]:
            a, b = b, a
        pairs.append(MutualConfusion(a, b, int(confusion[a, b]), int(confusion[b, a])))
    return pairs


def _errors(confusion: NDArray[np.int64]) -> NDArray[np.int64]:
    errors = confusion.copy()
    np.fill_diagonal(errors, 0)
    return errors


def summarize(
    logits: Tensor,
    heads: Mapping[str, Tensor],
    targets: Tensor,
    classes: Sequence[str],
    levels: Mapping[str, Sequence[str]],
    temperature: float = 1.0,
) -> dict[str, Any]:
    """Return every metric as a dictionary for JSON; accuracies and errors are fractions.

    Args:
        logits: (N, K), on the CPU, N > 0.
        heads: Head name -> (N, K).
        targets: int64 (N,).
        classes: The K class names.
        levels: See ``DatasetIndex.levels``.
        temperature: The run's, see ``ModelSpec``.
    """
    predictions = logits.argmax(dim=1)
    confusion = confusion_matrix(predictions, targets, len(classes))
    intervals = accuracy_intervals((predictions == targets).numpy(), targets.numpy())
    return {
        "top1": top_k_accuracy(logits, targets),
        "top5": top_k_accuracy(logits, targets, k=5),
        "class_mean": class_mean_accuracy(confusion),
        "n": len(targets),
        "heads": {name: top_k_accuracy(head, targets) for name, head in heads.items()},
        "levels": {name: level_accuracy(predictions, targets, groups) for name, groups in levels.items()},
        "ece": calibration_error(logits, targets),
        "ece_calibrated": calibration_error(logits / temperature, targets),
        "temperature": temperature,
        "confused_pairs": [pair._asdict() for pair in confused_pairs(confusion, classes)[:LISTED_PAIRS]],
        "intervals": {
            **{name: list(interval) for name, interval in intervals.items()},
            "confidence": CONFIDENCE,
            "resamples": RESAMPLES,
            "seed": 0,
        },
    }
