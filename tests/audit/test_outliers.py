"""Images that are unlike all others."""

import numpy as np
import pytest

pytest.importorskip("cleanvision")

from crossx.audit.quality import find_outliers


def directions(count: int, spread: float) -> np.ndarray:
    """Unit vectors (N, 32) around the first axis."""
    vectors = spread * np.random.default_rng(0).normal(size=(count, 32)) + np.eye(32)[0]
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def test_the_image_unlike_the_others_is_found_with_and_without_copies() -> None:
    vectors = np.concatenate([directions(60, 0.1), -np.eye(32, dtype=np.float32)[:1]])
    found, distance = find_outliers(vectors)
    assert [outlier.image for outlier in found] == [60]
    assert distance is not None
    # more than half of the images have many copies
    copied = np.concatenate([vectors, np.repeat(vectors[:1], 100, axis=0)])
    assert [outlier.image for outlier in find_outliers(copied)[0]] == [60]


def test_copies_of_few_images_give_none() -> None:
    assert find_outliers(np.repeat(directions(3, 0.5), 40, axis=0)) == ([], None)
    assert find_outliers(directions(29, 0.5)) == ([], None)
