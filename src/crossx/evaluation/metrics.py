"""Metrics of a classifier: pure functions of logits (N, K) and targets (N,).

The prediction is the class of the largest logit, the lowest index among equal ones, so that the numbers do not depend
on the device.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchmetrics.functional.classification import multiclass_calibration_error, multiclass_confusion_matrix

from crossx.evaluation.intervals import CONFIDENCE, RESAMPLES, accuracy_intervals

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


def target_ranks(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the rank of each target among its image's logits, 0 for the largest: int64 (N,).

    Args:
        logits: (N, K).
        targets: int64 (N,).
    """
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
    # validation refuses the trivial but legal K = 1
    return multiclass_confusion_matrix(predictions, targets, num_classes, validate_args=False).long()


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
    # torchmetrics treats values outside [0, 1] as logits, so rounding must not push probabilities out of it
    probabilities = logits.double().softmax(dim=1).clamp(max=1)
    error = multiclass_calibration_error(
        probabilities, targets, num_classes=logits.shape[1], n_bins=num_bins, validate_args=False
    )
    return error.item()


def level_accuracy(predictions: Tensor, targets: Tensor, groups: Sequence[str]) -> float:
    """Return the fraction of images whose predicted class is in the same group as the target.

    Args:
        predictions: int64 (N,), class indices, N > 0.
        targets: int64 (N,).
        groups: The group of each of the K classes, one level of ``DatasetIndex.levels``.
    """
    numbers = {group: number for number, group in enumerate(dict.fromkeys(groups))}
    group_of = torch.tensor([numbers[group] for group in groups], device=targets.device)
    return (group_of[predictions] == group_of[targets]).double().mean().item()


def class_table(confusion: Tensor, classes: Sequence[str]) -> list[ClassRow]:
    """Return one row per class, in label order; of equally frequent confusions the first class is named."""
    errors = confusion.clone().fill_diagonal_(0)
    most, partners = errors.max(dim=1)
    columns = (confusion.sum(dim=1), confusion.diagonal(), most, partners)
    return [
        ClassRow(name, n, right / n if n else None, classes[partner] if wrong else None)
        for name, n, right, wrong, partner in zip(classes, *(c.tolist() for c in columns), strict=True)
    ]


def worst_first(rows: Iterable[ClassRow]) -> list[ClassRow]:
    """Return the classes that have images, lowest accuracy first, equal ones in the given order."""
    return sorted((row for row in rows if row.n), key=lambda row: row.accuracy or 0.0)


def confused_pairs(confusion: Tensor, classes: Sequence[str]) -> list[ConfusedPair]:
    """Return every confused pair, most frequent first, equal counts in label order."""
    errors = confusion.clone().fill_diagonal_(0)
    totals = confusion.sum(dim=1).tolist()
    counts = [(int(errors[i, j]), i, j) for i, j in errors.nonzero().tolist()]
    counts.sort(key=lambda pair: -pair[0])
    return [ConfusedPair(classes[i], classes[j], n, n / totals[i]) for n, i, j in counts]


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
