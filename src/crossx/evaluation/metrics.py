"""Metrics of a classifier from its logits (N, K) and the targets (N,): pure functions.

The prediction is the class of the largest logit; among equal logits the one with the lowest index, so that the
numbers do not depend on the device.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torchmetrics.functional.classification import multiclass_calibration_error, multiclass_confusion_matrix


class ClassRow(NamedTuple):
    """How well one class is recognised.

    Attributes:
        name: The class.
        n: Number of its test images.
        accuracy: Share of them predicted right; None where there are none.
        most_confused_with: The class that most of its wrong predictions name; None where none is wrong.
    """

    name: str
    n: int
    accuracy: float | None
    most_confused_with: str | None


class ConfusedPair(NamedTuple):
    """Two classes, the first taken for the second.

    Attributes:
        target: The true class.
        prediction: The class predicted in its place.
        n: Number of images of ``target`` predicted as ``prediction``.
        fraction: ``n`` divided by the number of images of ``target``.
    """

    target: str
    prediction: str
    n: int
    fraction: float


def target_ranks(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the place of each target in its image's classes ordered by logit, 0 for the first: int64 (N,).

    Args:
        logits: (N, K).
        targets: int64 (N,).
    """
    own = logits.gather(1, targets[:, None])
    earlier = torch.arange(logits.shape[1], device=logits.device) < targets[:, None]
    return ((logits > own) | ((logits == own) & earlier)).sum(dim=1)


def top_k_accuracy(logits: Tensor, targets: Tensor, k: int = 1) -> float:
    """Return the fraction of images (N > 0) whose target is among the ``k`` largest logits.

    With K < k classes every target is.
    """
    return (target_ranks(logits, targets) < k).double().mean().item()


def confusion_matrix(predictions: Tensor, targets: Tensor, num_classes: int) -> Tensor:
    """Count images: int64 (K, K), a row for each true class, a column for each predicted one.

    Args:
        predictions: int64 (N,), class indices.
        targets: int64 (N,).
        num_classes: K.
    """
    # Without validation, which refuses the trivial but legal K = 1.
    return multiclass_confusion_matrix(predictions, targets, num_classes, validate_args=False).long()


def class_mean_accuracy(confusion: Tensor) -> float:
    """Return the mean over classes of each class's accuracy, over the classes that have images.

    This is the "average class-prediction accuracy" of FGVC-Aircraft. torchmetrics' macro average would count a
    class without images as 0 as soon as one image is predicted as it.

    Args:
        confusion: (K, K) as ``confusion_matrix`` returns it, with at least one image.
    """
    counts = confusion.sum(dim=1)
    present = counts > 0
    return (confusion.diagonal()[present].double() / counts[present]).mean().item()


def calibration_error(logits: Tensor, targets: Tensor, num_bins: int = 15) -> float:
    """Return the expected calibration error of the largest softmax probability, in equal bins of [0, 1].

    Guo et al., "On Calibration of Modern Neural Networks", 2017 (https://arxiv.org/abs/1706.04599), Eq. 3.
    """
    # torchmetrics takes values outside [0, 1] for logits, so it is given probabilities that rounding cannot
    # have moved out of it.
    probabilities = logits.double().softmax(dim=1).clamp(max=1)
    error = multiclass_calibration_error(
        probabilities, targets, num_classes=logits.shape[1], n_bins=num_bins, validate_args=False
    )
    return error.item()


def level_accuracy(predictions: Tensor, targets: Tensor, groups: Sequence[str]) -> float:
    """Return the fraction of images whose predicted class lies in the same group as the target.

    Args:
        predictions: int64 (N,), class indices, N > 0.
        targets: int64 (N,).
        groups: The group of each of the K classes, one level of ``DatasetIndex.levels``.
    """
    numbers = {group: number for number, group in enumerate(dict.fromkeys(groups))}
    group_of = torch.tensor([numbers[group] for group in groups], device=targets.device)
    return (group_of[predictions] == group_of[targets]).double().mean().item()


def class_table(confusion: Tensor, classes: Sequence[str]) -> list[ClassRow]:
    """Return a row for each class, in label order; of equally frequent confusions the first class is named."""
    errors = confusion.clone().fill_diagonal_(0)
    most, partners = errors.max(dim=1)
    columns = zip(
        classes,
        confusion.sum(dim=1).tolist(),
        confusion.diagonal().tolist(),
        most.tolist(),
        partners.tolist(),
        strict=True,
    )
    return [
        ClassRow(name, n, right / n if n else None, classes[partner] if wrong else None)
        for name, n, right, wrong, partner in columns
    ]


def worst_first(rows: Iterable[ClassRow]) -> list[ClassRow]:
    """Return the classes that have images, the lowest accuracy first, equal ones as they came."""
    return sorted((row for row in rows if row.n), key=lambda row: row.accuracy or 0.0)


def confused_pairs(confusion: Tensor, classes: Sequence[str]) -> list[ConfusedPair]:
    """Return every pair that occurs, the most frequent first, equal counts in label order."""
    errors = confusion.clone().fill_diagonal_(0)
    totals = confusion.sum(dim=1).tolist()
    found = sorted(
        ((int(errors[i, j]), i, j) for i, j in errors.nonzero().tolist()), key=lambda pair: -pair[0]
    )
    return [ConfusedPair(classes[i], classes[j], n, n / totals[i]) for n, i, j in found]
