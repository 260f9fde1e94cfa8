"""The comparison of two pictures, on changes whose result is known."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance

from crossx.audit.alignment import SIDE, detail_correlation
from photographs import photograph


def grey(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("L").resize((SIDE, SIDE), Image.Resampling.BILINEAR))


def compare(first: Image.Image, second: Image.Image) -> float:
    pair = (torch.from_numpy(grey(image)[None].copy()) for image in (first, second))
    return float(detail_correlation(*pair)[0])


CHANGES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "none": lambda image: image,
    "mirrored": lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
    "resized": lambda image: image.resize((80, 110), Image.Resampling.BICUBIC),
    "cropped at a corner": lambda image: image.crop((0, 0, 138, 140)),
    "cropped and mirrored": lambda image: image.crop((12, 8, 152, 155)).transpose(
        Image.Transpose.FLIP_LEFT_RIGHT
    ),
    "darker": lambda image: ImageEnhance.Brightness(image).enhance(0.6),
    "more contrast": lambda image: ImageEnhance.Contrast(image).enhance(1.3),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_changed_copy_agrees(change: Callable[[Image.Image], Image.Image]) -> None:
    original = photograph(1, side=160)
    assert compare(original, change(original)) > 0.9
    assert compare(change(original), original) > 0.9


def test_other_pictures_do_not_agree() -> None:
    images = [photograph(seed, side=160) for seed in range(12)]
    assert max(compare(images[0], other) for other in images[1:]) < 0.6


def test_a_correlation_without_alignment_is_that_of_numpy() -> None:
    """Where nothing has to be moved, the result is the correlation of the band-passed images."""
    from scipy.ndimage import gaussian_filter

    first = grey(photograph(3, side=160)).astype(float)
    noise = np.random.default_rng(0).normal(size=first.shape) * 25
    second = (first + noise).clip(0, 255).astype(np.uint8)
    bands = [
        image - gaussian_filter(image, 4.0, mode="nearest", truncate=3.0)
        for image in (first, second.astype(float))
    ]
    expected = np.corrcoef(bands[0].ravel(), bands[1].ravel())[0, 1]
    pair = (torch.from_numpy(image[None]) for image in (first.astype(np.uint8), second))
    assert float(detail_correlation(*pair)[0]) == pytest.approx(expected, abs=0.03)


def test_images_without_detail_never_agree() -> None:
    flat = torch.full((2, SIDE, SIDE), 90, dtype=torch.uint8)
    assert detail_correlation(flat, flat).tolist() == [0, 0]
