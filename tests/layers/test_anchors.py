import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.ops import nms

from crossx.layers import Navigator, anchor_boxes, select_boxes

BOXES = torch.tensor(
    [[0, 0, 10, 10], [5, 0, 15, 10], [6, 0, 16, 10], [20, 20, 30, 30], [0, 0, 12, 10]], dtype=torch.float32
)


def anchors(size: int) -> torch.Tensor:
    """All anchors of an image of ``size`` pixels on a trunk of stride 32."""
    positions = math.ceil(size / 32)
    return Navigator(4, 32)(torch.zeros(1, 4, positions, positions), (size, size))[0]


def by_hand(size: int) -> list[list[int]]:
    """The anchors as the authors describe them, in Python's floats, image after padding by its half."""
    levels = ((32, 48, (2, 4)), (64, 96, (2, 4)), (128, 192, (1, 2, 4)))
    boxes = []
    for stride, base, cubes in levels:
        positions = math.ceil(size / stride)
        for cube in cubes:
            side = base * cube ** (1 / 3)
            for ratio in (0.667, 1, 1.5):
                width, height = side * ratio**0.5, side / ratio**0.5
                for row in range(positions):
                    for column in range(positions):
                        x, y = stride * (column + 0.5), stride * (row + 0.5)
                        edges = (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
                        boxes.append([int(edge + size / 2) - size // 2 for edge in edges])
    return boxes


def test_at_448_pixels_they_are_the_1614_of_the_paper() -> None:
    boxes = anchors(448)
    assert boxes.shape == (1614, 4)
    assert boxes.tolist() == by_hand(448)
    # a square of 48 * 2 ** (1 / 3) = 60.48 pixels around (16, 16); one of 192 around (64, 64)
    assert boxes[14 * 14].tolist() == [-15, -15, 46, 46]
    assert boxes[6 * 14 * 14 + 6 * 7 * 7 + 4 * 4].tolist() == [-32, -32, 160, 160]
    # 1.5 times as wide as high: 192 * sqrt(1.5) = 235.2 by 156.8
    assert boxes[6 * 14 * 14 + 6 * 7 * 7 + 2 * 4 * 4].tolist() == [-54, -15, 181, 142]


@pytest.mark.parametrize("size", [64, 160, 224, 384, 600])
def test_anchors_grow_with_the_image_and_are_centred_in_it(size: int) -> None:
    boxes = anchors(size)
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    scale = size / 448
    assert areas.max().sqrt() == pytest.approx(192 * 2 ** (2 / 3) * scale, abs=2)
    assert areas.min().sqrt() == pytest.approx(48 * 2 ** (1 / 3) * scale, abs=2)
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    assert centres.min() >= 0
    assert centres.max() <= size


def test_maps_may_be_wider_than_high() -> None:
    boxes = anchor_boxes((1, 2), 10, (8.0,), (10, 20), scale=0.5)
    assert boxes.shape == (6, 4)
    assert boxes[2:4].tolist() == [[3, 3, 7, 7], [13, 3, 17, 7]]


def test_the_best_is_taken_and_what_overlaps_it_put_back() -> None:
    scores = torch.tensor([[0.9, 0.8, 0.7, 0.1, 0.2], [0.1, 0.9, 0.2, 0.8, 0.3]])
    # 0 and 1 share 50 of 150 pixels, 0 and 2 40 of 160, which is the threshold itself; 4 nearly equals 0
    assert select_boxes(BOXES, scores, 2, 0.25).tolist() == [[0, 3], [1, 3]]
    assert select_boxes(BOXES, scores, 3, 0.2501).tolist() == [[0, 2, 3], [1, 3, 4]]


def test_where_too_few_are_left_the_best_of_the_others_follow() -> None:
    scores = torch.tensor([[0.9, 0.8, 0.7, 0.1, 0.2]])
    assert select_boxes(BOXES, scores, 5, 0.25).tolist() == [[0, 3, 1, 2, 4]]


# each whole number in another order: scores without equals
orders = st.integers(0, 2**31).map(lambda seed: np.random.default_rng(seed).permutation(1614))


@settings(max_examples=20)
@given(orders=st.lists(orders, min_size=1, max_size=3), size=st.sampled_from([448, 160]))
def test_it_is_torchvisions_greedy_suppression(orders: list[np.ndarray], size: int) -> None:
    boxes = anchors(size)
    scores = torch.tensor(np.stack(orders)[:, : len(boxes)], dtype=torch.float32)
    chosen = select_boxes(boxes, scores, 6, 0.25)
    for row, own in zip(scores, chosen, strict=True):
        # torchvision keeps a box at the threshold, the authors' code does not
        kept = nms(boxes, row, float(np.nextafter(np.float32(0.25), np.float32(0))))
        assert own[: len(kept)].tolist() == kept[:6].tolist()
        assert len(set(own.tolist())) == 6


@settings(max_examples=20)
@given(order=orders)
def test_it_is_the_authors_hard_nms(order: np.ndarray) -> None:
    """Their loop: a sorted list from whose end boxes are taken."""
    boxes = anchors(448).numpy().astype(np.float64)
    left = list(np.argsort(order))
    taken = []
    while len(taken) < 6:
        best = left.pop()
        taken.append(best)
        first, others = boxes[best], boxes[left]
        sides = np.minimum(others[:, 2:], first[2:]) - np.maximum(others[:, :2], first[:2])
        common = np.where((sides < 0).any(1), 0, sides.prod(1))
        areas = [(b[..., 2] - b[..., 0]) * (b[..., 3] - b[..., 1]) for b in (others, first)]
        left = [one for one, keep in zip(left, common / (sum(areas) - common) < 0.25, strict=True) if keep]
    chosen = select_boxes(anchors(448), torch.tensor(order, dtype=torch.float32)[None], 6, 0.25)
    assert chosen[0].tolist() == taken
