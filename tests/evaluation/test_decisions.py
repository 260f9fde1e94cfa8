"""Rejection and prediction sets against loops over images and classes."""

import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.special import softmax

from crossx.errors import CrossXError, UsageError
from crossx.evaluation.decisions import Decider, Threshold
from crossx.evaluation.unknowns import ViewScores
from crossx.runs import ModelSpec, PredictionSets, Preprocessing, Rejection

PREPROCESSING = Preprocessing(64, 72, "bilinear", (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
LEAST = tuple(0.4 - 0.001 * number for number in range(50))


def describe(score: str = "max_logit", weight: float | None = None) -> ModelSpec:
    return ModelSpec(
        "plain", {}, "test_resnet", {}, ("auk", "jay", "owl"), PREPROCESSING, "folder",
        temperature=1.5,
        rejection=Rejection(score, 0.95, 40, {"1": 1.0, "1+flip": 0.8}, weight),
        sets=PredictionSets(99, {"1": LEAST, "1+flip": LEAST}),
    )  # fmt: skip


def draw(views: int, images: int = 40) -> ViewScores:
    generator = torch.Generator().manual_seed(views)
    logits = 1.5 * torch.randn(views, images, 3, generator=generator)
    return ViewScores([*logits], [*torch.rand(views, images, generator=generator)])


@pytest.mark.parametrize(("key", "views"), [("1", 1), ("1+flip", 2)])
@pytest.mark.parametrize("score", ["max_logit", "max_probability", "combined"])
def test_images_below_the_threshold_of_their_views_are_rejected(key: str, views: int, score: str) -> None:
    spec, outputs = describe(score, 0.7), draw(views)
    decider = Decider(spec, key, has_similarities=True)
    assert decider.needs_similarities == (score == "combined")
    decision = decider.decide(outputs)
    for image in range(40):
        logits = [view[image].numpy().astype(float) for view in outputs.logits]
        cosines = [float(view[image]) for view in outputs.similarities]
        expected = {
            "max_logit": np.mean([row.max() for row in logits]),
            "max_probability": np.mean([softmax(row).max() for row in logits]),
            "combined": np.mean([row.max() + 0.7 * c for row, c in zip(logits, cosines, strict=True)]),
        }[score]
        assert float(decision.scores[image]) == pytest.approx(expected, rel=1e-5)
        assert bool(decision.rejected[image]) == (expected < spec.rejection.thresholds[key])
        shares = np.mean([softmax(row / 1.5) for row in logits], axis=0)
        np.testing.assert_allclose(decision.probabilities[image].numpy(), shares, rtol=1e-5)
    assert score == "max_probability" or 0 < int(decision.rejected.sum()) < 40


def test_without_a_threshold_no_image_is_rejected() -> None:
    spec, outputs = describe(), draw(1)
    for one, accept in ((spec, "all"), (replace(spec, rejection=None), "known")):
        decider = Decider(one, "5", has_similarities=False, accept=accept)
        decision = decider.decide(outputs)
        assert (decider.threshold, decision.scores, bool(decision.rejected.any())) == (None, None, False)


def test_class_means_that_are_missing_leave_every_image_its_class(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        decider = Decider(describe("similarity"), "1", has_similarities=False)
    assert "no image is rejected: the score similarity needs class means" in caplog.text
    assert not decider.needs_similarities
    assert not decider.decide(ViewScores(draw(1).logits)).rejected.any()


def test_views_without_a_threshold_and_other_words_are_refused() -> None:
    with pytest.raises(UsageError, match=r"no threshold for these views \(5\)"):
        Decider(describe(), "5", has_similarities=False)
    with pytest.raises(UsageError, match="accept"):
        Decider(describe(), "1", has_similarities=False, accept="some")
    with pytest.raises(UsageError, match="RUN: has no prediction sets"):
        Decider(describe(), "5", has_similarities=False, accept="all", coverage=0.9, run="RUN")
    assert Threshold.of(describe().rejection, "5") is None
    assert Threshold.of(None, "1") is None


@pytest.mark.parametrize("coverage", [0.5, 0.9, 0.99])
def test_the_set_of_an_image_has_all_classes_that_are_probable_enough(coverage: float) -> None:
    decider = Decider(describe(), "1", has_similarities=False)
    least = LEAST[round(100 * coverage) - 50]
    assert decider.least_probability(coverage) == least
    for row in decider.decide(draw(1)).probabilities:
        order = sorted(range(3), key=lambda label: -float(row[label]))
        expected = [label for label in order if float(row[label]) >= least] or order[:1]
        assert decider.prediction_set(row, coverage) == expected
    # equally probable classes keep their order, and one is always there
    assert decider.prediction_set(torch.full((5,), 0.2), coverage) == [0]


@pytest.mark.parametrize("where", ["logits", "similarities"])
def test_outputs_that_are_not_finite_are_refused(where: str) -> None:
    outputs = draw(2)
    getattr(outputs, where)[1].view(-1)[5] = torch.nan
    with pytest.raises(CrossXError, match="its weights are damaged"):
        Decider(describe("combined", 0.7), "1+flip", has_similarities=True).decide(outputs)
