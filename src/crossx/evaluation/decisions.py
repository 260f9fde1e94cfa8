"""Decide what images show, as the run was calibrated to: one of the classes, none of them, or a set of them."""

from __future__ import annotations

import logging
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from crossx.errors import UsageError, check_choice
from crossx.evaluation.conformal import least_probability, weakness
from crossx.evaluation.network import require_finite
from crossx.evaluation.unknowns import FEATURE_SCORES, ViewScores
from crossx.evaluation.views import mean_probabilities
from crossx.runs import ModelSpec, Rejection

log = logging.getLogger(__name__)

Accept = Literal["known", "all"]


class Threshold(NamedTuple):
    """The least score of an image that is kept, for some views.

    Attributes:
        score: Name of the score, see ``crossx.evaluation.unknowns``.
        least: The threshold.
        weight: w of the score ``combined``.
    """

    score: str
    least: float
    weight: float | None = None

    @classmethod
    def of(cls, rejection: Rejection | None, views: str) -> Threshold | None:
        """Return the threshold of a run for views (``views_key``); None if it has none for them."""
        if rejection is None or views not in rejection.thresholds:
            return None
        return cls(rejection.score, rejection.thresholds[views], rejection.weight)

    @property
    def needs_similarities(self) -> bool:
        """Whether the score needs class means."""
        return self.score in FEATURE_SCORES

    def scores(self, outputs: ViewScores) -> Tensor:
        """Return the score of each image, (B,)."""
        return outputs.score(self.score, self.weight)


class Decision(NamedTuple):
    """What is decided about B images.

    Attributes:
        probabilities: Calibrated, (B, K).
        rejected: bool (B,), whether the image shows none of the classes.
        scores: (B,), compared with the threshold; None if no image is rejected.
    """

    probabilities: Tensor
    rejected: Tensor
    scores: Tensor | None = None


class Decider:
    """Decides what images show from a network's outputs on their views.

    An image whose score is below the threshold of the views is rejected: it shows none of the classes.

    Args:
        spec: Description of the run.
        views: Key of the views, see ``views_key``.
        has_similarities: Whether the outputs have similarities to class means.
        accept: ``known`` rejects images below the threshold, ``all`` none.
        coverage: Coverage of the prediction sets; None if there are none.
        run: The run, for errors.

    Attributes:
        threshold: None if no image is rejected.
        coverage: As given.

    Raises:
        UsageError: If the run has no threshold for the views, or no prediction sets of that coverage.
    """

    def __init__(
        self,
        spec: ModelSpec,
        views: str,
        *,
        has_similarities: bool,
        accept: Accept = "known",
        coverage: float | None = None,
        run: object = "the network",
    ) -> None:
        check_choice("accept", accept, get_args(Accept))
        self.coverage = coverage
        self._temperature, self._sets, self._views, self._run = spec.temperature, spec.sets, views, run
        self.threshold = None
        if spec.rejection is not None and accept == "known":
            self.threshold = _usable_threshold(spec.rejection, views, has_similarities)
        if coverage is not None:
            self.least_probability(coverage)
            if spec.sets and (warning := weakness(spec.sets.images, coverage)):
                log.warning("%s.", warning)

    @property
    def needs_similarities(self) -> bool:
        """Whether ``decide`` needs similarities to class means."""
        return self.threshold is not None and self.threshold.needs_similarities

    def decide(self, outputs: ViewScores) -> Decision:
        """Decide about images from the outputs on all their views.

        Raises:
            CrossXError: If the outputs are not finite.
        """
        for logits in outputs.logits:
            require_finite(logits)
        probabilities = mean_probabilities(outputs.logits, self._temperature)
        if self.threshold is None:
            return Decision(probabilities, torch.zeros(len(probabilities), dtype=torch.bool))
        scores = require_finite(self.threshold.scores(outputs))
        return Decision(probabilities, scores < self.threshold.least, scores)

    def least_probability(self, coverage: float) -> float:
        """Return the least probability of a class in a prediction set of this coverage.

        Raises:
            UsageError: If ``coverage`` is not from 0.5 to 0.99, or the run was not calibrated for it.
        """
        return least_probability(self._sets, self._views, coverage, self._run)

    def prediction_set(self, probabilities: Tensor, coverage: float) -> list[int]:
        """Return the labels in the prediction set of an image, most probable first; never empty.

        Args:
            probabilities: (K,).
            coverage: See ``least_probability``, as for the errors.
        """
        values, labels = probabilities.sort(descending=True, stable=True)
        count = max(1, int((values >= self.least_probability(coverage)).sum()))
        found: list[int] = labels[:count].tolist()
        return found


def _usable_threshold(rejection: Rejection, views: str, has_similarities: bool) -> Threshold | None:
    if rejection.score in FEATURE_SCORES and not has_similarities:
        log.warning(
            "no image is rejected: the score %s needs class means, which `crossx fit` keeps only with the selected "
            "weights of a run.", rejection.score,
        )  # fmt: skip
        return None
    threshold = Threshold.of(rejection, views)
    if threshold is None:
        raise UsageError(
            f"the run has no threshold for these views ({views}): `crossx calibrate RUN` sets them, or accept all "
            "images."
        )
    return threshold
