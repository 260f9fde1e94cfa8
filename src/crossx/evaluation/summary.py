"""Every metric of one evaluation together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from crossx.evaluation.intervals import CONFIDENCE, RESAMPLES, accuracy_intervals
from crossx.evaluation.metrics import (
    calibration_error,
    class_mean_accuracy,
    confused_pairs,
    confusion_matrix,
    level_accuracy,
    top_k_accuracy,
)

LISTED_PAIRS = 10


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
            **{name: interval.to_json() for name, interval in intervals.items()},
            "confidence": CONFIDENCE,
            "resamples": RESAMPLES,
            "seed": 0,
        },
    }
