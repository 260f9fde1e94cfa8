"""Copies, and different photographs that look alike."""

import hashlib

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from crossx.audit.alignment import SIDE
from crossx.audit.duplicates import Duplicates, find_duplicates
from photographs import photograph, product


def grey(image: Image.Image) -> NDArray[np.uint8]:
    return np.asarray(image.convert("L").resize((SIDE, SIDE), Image.Resampling.BOX))


def search(images: list[Image.Image], labels: list[int]) -> Duplicates:
    thumbnails = np.stack([grey(image) for image in images])
    digests = [hashlib.sha256(image.tobytes()).digest() for image in images]
    vectors = thumbnails.reshape(len(images), -1).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return find_duplicates(digests, thumbnails, vectors, np.array(labels))


def smaller(image: Image.Image) -> Image.Image:
    return image.resize((5 * image.width // 6, 5 * image.height // 6), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("each", [3, 12])
def test_photographs_of_products_in_one_pose_are_no_copies(each: int) -> None:
    kinds = range(5)
    images = [product(kind, shot) for kind in kinds for shot in range(each)]
    labels = [kind for kind in kinds for _ in range(each)]
    found = search(images, labels)
    assert not found.pairs
    of = {number: group for group in found.alike for number in group}
    assert {labels[number] for number in of} == set(kinds)
    assert all(len({labels[number] for number in group}) == 1 for group in found.alike)


def test_copies_among_products_are_found() -> None:
    images = [product(kind, shot) for kind in range(4) for shot in range(12)]
    labels = [number // 12 for number in range(len(images))]
    images += [smaller(images[5]), images[17].copy()]
    labels += [labels[5], labels[17]]
    found = search(images, labels)
    assert found.groups == ((5, 48), (17, 49))
    # identical files count once
    assert all(49 not in group for group in found.alike)


def test_a_class_of_copies_in_pairs_is_one_of_copies() -> None:
    images = [photograph(seed) for seed in range(24)]
    labels = [number // 6 for number in range(24)]
    images += [smaller(image) for image in images[:6]]  # every image of class 0 twice
    labels += [0] * 6
    found = search(images, labels)
    assert found.groups == tuple((number, 24 + number) for number in range(6))
    assert not found.alike


def test_one_picture_under_many_labels_is_a_conflict_and_not_alike() -> None:
    images = [photograph(seed) for seed in range(24)]
    labels = [number // 4 for number in range(24)]
    images += [photograph(0).resize((side, side)) for side in (70, 75, 80, 85, 90)]
    labels += [1, 2, 3, 4, 5]
    found = search(images, labels)
    assert found.groups == ((0, 24, 25, 26, 27, 28),)
    assert not found.alike
