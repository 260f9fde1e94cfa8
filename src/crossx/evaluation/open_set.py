"""Test rejection and prediction sets of a run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from crossx.data.datamodule import DataModule
from crossx.data.image_files import require_images
from crossx.data.index import DatasetIndex, Record
from crossx.errors import CrossXError
from crossx.evaluation.conformal import coverage_interval, least_probability, measure_sets, percent_of
from crossx.evaluation.decisions import Threshold
from crossx.evaluation.intervals import share_interval
from crossx.evaluation.subject import Subject
from crossx.evaluation.unknowns import FEATURE_SCORE, SCORE, ViewScores, separation
from crossx.evaluation.views import mean_probabilities, views_key
from crossx.runs import ModelSpec

KEY = views_key(flip=False, crops=1)
"""Tests see one view of each image."""


def describe_rejection(spec: ModelSpec, outputs: ViewScores, targets: Tensor) -> dict[str, Any] | None:
    """Measure how many images of the classes are kept; None if the weights have no threshold.

    Args:
        spec: Description of the run.
        outputs: Of one view of N images of the classes.
        targets: int64 (N,).

    Returns:
        ``score``, ``threshold`` and ``keep`` of the run; ``kept``, the share of the images with at least this score,
        its Clopper-Pearson ``interval``, and ``top1_kept``, the accuracy on them, None if there are none.
    """
    found = apply_threshold(spec, outputs)
    if found is None:
        return None
    assert spec.rejection is not None
    threshold, kept = found
    count = int(kept.sum())
    correct = outputs.logits[0].argmax(1) == targets
    return {
        "score": threshold.score,
        "threshold": threshold.least,
        "keep": spec.rejection.keep,
        "kept": count / len(kept),
        "interval": list(share_interval(count, len(kept))),
        "top1_kept": float(correct[kept].float().mean()) if count else None,
    }


def apply_threshold(spec: ModelSpec, outputs: ViewScores) -> tuple[Threshold, Tensor] | None:
    """Return the run's threshold and whether each image is kept, (N,); None without it, or class means it needs."""
    threshold = Threshold.of(spec.rejection, KEY)
    if threshold is None or threshold.score not in outputs.names(threshold.weight):
        return None
    return threshold, threshold.scores(outputs) >= threshold.least


def describe_sets(
    spec: ModelSpec, logits: Tensor, targets: Tensor, coverage: float, run: Path
) -> dict[str, Any]:
    """Measure the coverage of prediction sets and their sizes.

    Args:
        spec: Description of the run.
        logits: (N, K), on images of the classes.
        targets: int64 (N,).
        coverage: That of the sets.
        run: The run, for errors.

    Returns:
        ``coverage``; ``covered``, the share of the images whose set has their class, and its Clopper-Pearson
        ``interval``; ``mean_size``, and ``sizes``: classes per set, as text -> number of images; ``expected``, see
        ``coverage_interval``, for the number of ``calibration_images``.

    Raises:
        UsageError: As ``least_probability``.
    """
    least = least_probability(spec.sets, KEY, coverage, run)
    assert spec.sets is not None
    probabilities = mean_probabilities([logits.double()], spec.temperature)
    found = measure_sets(probabilities.numpy(), targets.numpy(), least)
    count = int(found.covered.sum())
    sizes, counts = torch.from_numpy(found.sizes).unique(return_counts=True)
    return {
        "coverage": coverage,
        "covered": count / len(targets),
        "interval": list(share_interval(count, len(targets))),
        "mean_size": float(found.sizes.mean()),
        "sizes": {str(size): n for size, n in zip(sizes.tolist(), counts.tolist(), strict=True)},
        "calibration_images": spec.sets.images,
        "expected": list(coverage_interval(spec.sets.images, percent_of(coverage) / 100)),
    }


def unknown_data(subject: Subject, folder: str | Path) -> DataModule:
    """Return a loader of a folder of images of none of the classes; those that cannot be read are left out.

    Raises:
        CrossXError: If there is no such folder, or no image that can be read.
    """
    records = tuple(Record(path, 0, "test") for path in require_images(Path(folder), note=True))
    index = DatasetIndex("unknown", ("unknown",), records)
    config = replace(subject.data.config, bad_images="skip")
    data = DataModule(index, subject.spec.preprocessing, config, seed=0)
    data.check_images(["test"])
    if not data.index.records:
        path, reason = data.skipped[0]
        raise CrossXError(f"{folder}: no image can be read; {path}: {reason}.")
    return data


def describe_unknown(
    spec: ModelSpec, outputs: ViewScores, targets: Tensor, unknown: ViewScores
) -> dict[str, Any]:
    """Measure how well images of the classes and others are separated.

    Args:
        spec: Description of the run.
        outputs: Of one view of N images of the classes.
        targets: int64 (N,).
        unknown: Of one view of M images of none of the classes.

    Returns:
        ``n``, M; ``scores``: name -> ``Separation``; ``score``, the name of the run's, or, without a threshold,
        that which ``crossx calibrate`` takes by default; and, if the run has a threshold, ``rejected``, the share of
        the unknown images below it, with its Clopper-Pearson ``interval``.
    """
    correct = (outputs.logits[0].argmax(1) == targets).numpy()
    known, others = outputs.double(), unknown.double()
    weight = spec.score_weight
    results: dict[str, Any] = {
        "n": len(unknown.logits[0]),
        "scores": {
            name: separation(known.score(name, weight).numpy(), others.score(name, weight).numpy(), correct)
            for name in known.names(weight)
        },
    }
    if (found := apply_threshold(spec, unknown)) is None:
        results["score"] = FEATURE_SCORE if FEATURE_SCORE in results["scores"] else SCORE
    else:
        threshold, kept = found
        below = ~kept
        results["score"] = threshold.score
        results["rejected"] = float(below.float().mean())
        results["interval"] = list(share_interval(int(below.sum()), len(below)))
    return results
