"""Paired test of two runs on the same images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crossx.data.names import class_name, quoted
from crossx.errors import CrossXError, counted
from crossx.evaluation.intervals import CONFIDENCE, RESAMPLES, difference_interval
from crossx.evaluation.predictions import Predictions, predictions_path
from crossx.runs import open_run

SAME_DATA = "Test both with the same data: `crossx test RUN --data.root DIR`."


class OtherImagesError(CrossXError):
    """Two runs were tested on other images, labels or classes, so that they cannot be compared image by image."""


def mcnemar_exact(only_a: int, only_b: int) -> float:
    """Return the two-sided p-value of McNemar's exact test that two classifiers have the same accuracy.

    Under the null hypothesis, an image that only one of them predicts correctly is equally likely to be either's:
    McNemar, "Note on the sampling error of the difference between correlated proportions", 1947.

    Args:
        only_a: Number of images that only the first predicts correctly.
        only_b: Number of images that only the second predicts correctly.
    """
    from scipy.stats import binomtest

    discordant = only_a + only_b
    return float(binomtest(only_a, discordant, 0.5).pvalue) if discordant else 1.0


def compare_runs(a: str | Path, b: str | Path, split: str = "test") -> dict[str, Any]:
    """Compare the top-1 accuracies of two tested runs, image by image.

    Reads the predictions that ``test_run`` wrote; loads no network. Images are matched by their path below the root of
    the data; those of your own, and drawn ones, by their contents, whatever their names and folders.

    Args:
        a: A run folder or a checkpoint file in one.
        b: The run to compare it with.
        split: The split that both were tested on.

    Returns:
        A dictionary for JSON: ``top1`` of both, their ``difference`` (a minus b) with its paired bootstrap
        ``interval``, the numbers of images by who is correct, and McNemar's exact ``p_value``. The test is about these
        two networks on images like these, not about other training seeds.

    Raises:
        OtherImagesError: If images or labels of the two differ.
        CrossXError: If a run is missing or was not tested on ``split``.
    """
    tested = [
        Predictions.load(predictions_path(run.path, split), run.path, split)
        for run in (open_run(a)[0], open_run(b)[0])
    ]
    correct_a, correct_b = paired_correct(tested[0], tested[1], (str(a), str(b)), split)
    both = int(np.count_nonzero(correct_a & correct_b))
    only_a = int(np.count_nonzero(correct_a)) - both
    only_b = int(np.count_nonzero(correct_b)) - both
    n = len(correct_a)
    return {
        "runs": {"a": str(a), "b": str(b)},
        "split": split,
        "n": n,
        "top1": {"a": (both + only_a) / n, "b": (both + only_b) / n},
        "difference": (only_a - only_b) / n,
        "interval": {
            "difference": list(difference_interval(correct_a, correct_b)),
            "confidence": CONFIDENCE,
            "resamples": RESAMPLES,
            "seed": 0,
        },
        "correct": {"both": both, "only_a": only_a, "only_b": only_b, "neither": n - both - only_a - only_b},
        "test": "McNemar, exact, two-sided",
        "p_value": mcnemar_exact(only_a, only_b),
    }


def paired_correct(
    a: Predictions, b: Predictions, names: tuple[str, str], split: str
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Return which images each of two runs predicts correctly, (N,) each, ordered by the first run's paths.

    Args:
        a: Predictions of the first run.
        b: Predictions of the second run.
        names: What errors call them.
        split: The split, named in errors.

    Raises:
        OtherImagesError: If they were not tested on the same images with the same labels and classes.
    """
    ids_a: NDArray[Any] = a.paths
    ids_b: NDArray[Any] = b.paths
    if a.contents is not None and b.contents is not None:
        ids_a, ids_b = a.contents, b.contents
    order_a, order_b = np.lexsort((a.paths, a.labels, ids_a)), np.lexsort((b.paths, b.labels, ids_b))
    if not np.array_equal(ids_a[order_a], ids_b[order_b]):
        only_a, only_b = a.paths[~np.isin(ids_a, ids_b)], b.paths[~np.isin(ids_b, ids_a)]
        example = ""
        if len(replaced := np.intersect1d(only_a, only_b)):
            example = (
                f" Under {counted(len(replaced), 'name')} they have different files, such as {replaced[0]}."
            )
        elif len(only := [*only_a, *only_b]):
            example = f" Only one of them has {only[0]}."
        raise OtherImagesError(
            f"{names[0]} ({len(ids_a)} images) and {names[1]} ({len(ids_b)}) were not tested on the same images of "
            f"{split}.{example} {SAME_DATA}"
        )
    by_path = np.argsort(a.paths[order_a], kind="stable")
    order_a, order_b = order_a[by_path], order_b[by_path]
    classes_a, classes_b = (np.array([class_name(str(name)) for name in each.classes]) for each in (a, b))
    labels_a, labels_b = classes_a[a.targets][order_a], classes_b[b.targets][order_b]
    differing = np.flatnonzero(labels_a != labels_b)
    if len(differing):
        first = differing[0]
        image, shown = a.paths[order_a[first]], quoted([str(labels_a[first]), str(labels_b[first])])
        raise OtherImagesError(
            f"{names[0]} and {names[1]} label {image} differently ({', '.join(shown)}): only runs with the "
            "same labels can be compared."
        )
    if set(classes_a) != set(classes_b):
        raise OtherImagesError(
            f"{names[0]} and {names[1]} have different classes ({len(a.classes)} and {len(b.classes)}): only runs with "
            "the same classes can be compared."
        )
    return a.correct[order_a], b.correct[order_b]
