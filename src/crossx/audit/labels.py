"""Probable label errors: confident learning on predictions of images that the classifier was not fitted on."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import cross_entropy

from crossx.methods.linear import PENALTY, fit_centred

FOLDS = 5
MIN_IMAGES = 5
"""Images of a class, near-duplicates counted once, below which its labels are not judged."""
SEED = 0
LEAST_POSTERIOR = 0.1
"""Probability that a label was drawn at random from which it is reported; see ``random_posterior``."""
TEMPERATURES = np.geomspace(0.25, 4, 33)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LabelIssue:
    """A label that is probably wrong.

    Attributes:
        image: Number of the image.
        suggested: The most probable class.
        probability: Of the suggested class.
        given: Probability of the class that the image is labelled with.
    """

    image: int
    suggested: int
    probability: float
    given: float


def out_of_fold(
    vectors: NDArray[np.float32],
    labels: NDArray[np.int64],
    groups: NDArray[np.int64],
    classes: int,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> NDArray[np.float64]:
    """Predict each image by logistic regression that was fitted on the other folds.

    Images of one group (near-duplicates) are in the same fold, and classes are spread over the folds.

    Args:
        vectors: float32 (N, D), embeddings.
        labels: int64 (N,).
        groups: int64 (N,), the group of each image.
        classes: K.
        progress: Called with the number of folds done and their total.

    Returns:
        Probabilities (N, K).
    """
    from sklearn.model_selection import StratifiedGroupKFold

    largest = int(np.bincount(labels).max(initial=0))
    folds = min(FOLDS, len(np.unique(groups)), largest)
    probabilities = np.full((len(labels), classes), 1 / classes)
    if folds < 2:
        return probabilities
    features = torch.from_numpy(vectors)
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=SEED)
    with warnings.catch_warnings():
        # classes with fewer images than folds
        warnings.simplefilter("ignore", UserWarning)
        parts = list(splitter.split(vectors, labels, groups))
    for done, (fitted, held_out) in enumerate(parts, start=1):
        if len(fitted) and len(held_out):
            probabilities[held_out] = _predict(
                features[fitted], torch.from_numpy(labels[fitted]), features[held_out], classes
            )
        if progress is not None:
            progress(done, folds)
    return probabilities


def find_label_issues(
    labels: NDArray[np.int64],
    probabilities: NDArray[np.float64],
    judged: NDArray[np.bool_],
) -> list[LabelIssue]:
    """Find labels that are probably wrong by confident learning (Northcutt et al. 2021, https://arxiv.org/abs/1911.00068).

    cleanlab estimates how many labels are wrong from the predictions that are confident for their class, and takes the
    images with the lowest probability of their label. Of these, an image is left out if its label is still the most
    probable class, or if ``random_posterior`` is below ``LEAST_POSTERIOR``: where classes are hard to tell apart,
    cleanlab takes many mistakes of the classifier for errors of the labels.

    Args:
        labels: int64 (N,).
        probabilities: (N, K), of images that the classifier was not fitted on.
        judged: (N,), images whose label may be reported.

    Returns:
        The issues, least probable label first.
    """
    from cleanlab.filter import find_label_issues as confident_learning

    present = np.unique(labels[judged])
    if len(present) < 2:
        return []
    # without the classes and images that are not judged, whose probabilities are not reliable
    chosen = np.flatnonzero(judged)
    narrowed = probabilities[np.ix_(chosen, present)] + 1e-12
    narrowed /= narrowed.sum(axis=1, keepdims=True)
    given = np.searchsorted(present, labels[chosen])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ranked = confident_learning(
            given,
            narrowed,
            filter_by="low_self_confidence",
            return_indices_ranked_by="self_confidence",
            n_jobs=1,
        )
    posterior = random_posterior(given, narrowed)
    issues = []
    for number in ranked:
        image, suggested = int(chosen[number]), int(probabilities[chosen[number]].argmax())
        if suggested != labels[image] and posterior[number] >= LEAST_POSTERIOR:
            issues.append(
                LabelIssue(
                    image,
                    suggested,
                    round(float(probabilities[image, suggested]), 4),
                    round(float(probabilities[image, labels[image]]), 6),
                )
            )
    return sorted(issues, key=lambda issue: (issue.given, issue.image))


def random_posterior(labels: NDArray[np.int64], probabilities: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return how probable it is that each label (N,) was drawn at random from the other classes.

    The model: a share of the labels was drawn at random, the others follow the predictions (N, K), whose temperature is
    fitted to the labels. The share is estimated by expectation maximisation, rather too low, since the temperature
    takes up a part of it.
    """
    rows, classes = np.arange(len(labels)), probabilities.shape[1]
    logarithms = np.log(probabilities + 1e-12)

    def likely(temperature: float) -> NDArray[np.float64]:
        powers = np.exp(logarithms / temperature)
        chosen: NDArray[np.float64] = powers[rows, labels] / powers.sum(axis=1)
        return chosen

    given = likely(min(TEMPERATURES, key=lambda value: -np.log(likely(value) + 1e-12).mean()))
    share = 0.05
    for _ in range(200):
        random = share * (1 - given) / (classes - 1)
        posterior: NDArray[np.float64] = random / (random + (1 - share) * given + 1e-300)
        share = max(float(posterior.mean()), 1e-3)
    return posterior


def large_enough(labels: NDArray[np.int64], groups: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return which images (N,) are of a class with at least ``MIN_IMAGES`` groups."""
    pairs = np.unique(np.stack([labels, groups]), axis=1)
    counts = np.bincount(pairs[0], minlength=int(labels.max(initial=0)) + 1)
    enough: NDArray[np.bool_] = counts[labels] >= MIN_IMAGES
    return enough


def _predict(
    features: torch.Tensor, targets: torch.Tensor, held_out: torch.Tensor, classes: int
) -> NDArray[np.float64]:
    weight, bias = fit_centred(
        {"head": features}, classes, PENALTY, lambda logits: cross_entropy(logits["head"], targets)
    )["head"]
    found: NDArray[np.float64] = (held_out @ weight.T + bias).double().softmax(1).numpy()
    return found
