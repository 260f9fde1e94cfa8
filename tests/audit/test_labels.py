"""Label errors, on features whose classes are known."""

import numpy as np
import pytest

pytest.importorskip("cleanlab")
pytest.importorskip("sklearn")

from crossx.audit.labels import (
    LEAST_POSTERIOR,
    find_label_issues,
    large_enough,
    out_of_fold,
    random_posterior,
)


def clusters(classes: int, each: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    centres = generator.normal(size=(classes, 16))
    labels = np.repeat(np.arange(classes), each)
    vectors = centres[labels] + 0.5 * generator.normal(size=(len(labels), 16))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32), labels


@pytest.mark.parametrize(
    ("least", "missed"),
    [
        (0.05, []),
        # at the default, one of them is more likely a mistake of the classifier
        (LEAST_POSTERIOR, [100]),
    ],
)
def test_flipped_labels_are_found_with_what_they_should_be(
    least: float, missed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("crossx.audit.labels.LEAST_POSTERIOR", least)
    vectors, right = clusters(6, 30)
    labels = right.copy()
    flipped = [4, 40, 77, 100, 130, 170]
    labels[flipped] = (labels[flipped] + 2) % 6
    groups = np.arange(len(labels))
    probabilities = out_of_fold(vectors, labels, groups, 6)
    issues = find_label_issues(labels, probabilities, np.ones(len(labels), dtype=bool))
    found = {issue.image: issue.suggested for issue in issues}
    assert {image: found.get(image) for image in flipped} == {
        image: None if image in missed else right[image] for image in flipped
    }
    assert len(found) <= len(flipped) + 3
    assert [issue.given for issue in issues] == sorted(issue.given for issue in issues)


def test_predictions_are_of_images_that_were_not_fitted() -> None:
    """Labels drawn at random cannot be predicted, except where they were seen."""
    generator = np.random.default_rng(0)
    vectors = generator.normal(size=(120, 64)).astype(np.float32)
    labels = generator.integers(0, 4, 120)
    predicted = out_of_fold(vectors, labels, np.arange(120), 4).argmax(1)
    assert (predicted == labels).mean() < 0.45
    # copies in two folds would be seen
    twice, both = np.concatenate([vectors, vectors]), np.concatenate([labels, labels])
    leaking = out_of_fold(twice, both, np.arange(240), 4).argmax(1)
    grouped = out_of_fold(twice, both, np.tile(np.arange(120), 2), 4).argmax(1)
    assert (leaking == both).mean() > 0.8
    assert (grouped == both).mean() < 0.45


def test_small_classes_are_not_judged() -> None:
    labels = np.array([0] * 6 + [1] * 6 + [2] * 2)
    groups = np.arange(14)
    assert large_enough(labels, groups).tolist() == [True] * 12 + [False] * 2
    groups[6:12] = 6  # one picture six times
    assert large_enough(labels, groups).tolist() == [True] * 6 + [False] * 8


@pytest.mark.parametrize("labels", [[0] * 8, [0, 0, 1, 1], [0], []])
def test_too_few_images_give_no_issue(labels: list[int]) -> None:
    given = np.array(labels, dtype=np.int64)
    vectors = np.random.default_rng(0).normal(size=(len(given), 8)).astype(np.float32)
    probabilities = out_of_fold(vectors, given, np.arange(len(given)), 2)
    assert probabilities.shape == (len(given), 2)
    assert find_label_issues(given, probabilities, large_enough(given, np.arange(len(given)))) == []


def test_the_same_twice() -> None:
    vectors, labels = clusters(4, 10)
    first, second = (out_of_fold(vectors, labels, np.arange(40), 4) for _ in range(2))
    assert np.array_equal(first, second)


def test_labels_drawn_at_random_are_told_from_those_that_follow_the_predictions() -> None:
    """Predictions that are right on average, and a tenth of the labels drawn from the other classes."""
    generator = np.random.default_rng(1)
    probabilities = generator.dirichlet(np.full(10, 0.1), 4000)
    labels = np.array([generator.choice(10, p=row) for row in probabilities])
    drawn = generator.random(4000) < 0.1
    labels[drawn] = (labels[drawn] + generator.integers(1, 10, drawn.sum())) % 10
    posterior = random_posterior(labels, probabilities)
    # the temperature takes up a part of the share
    assert 0.03 < posterior.mean() < 0.12
    assert posterior[drawn].mean() > 10 * posterior[~drawn].mean()
    assert drawn[posterior > 0.5].mean() > 0.5
