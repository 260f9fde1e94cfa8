import math
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import entropy

from crossx.losses import (
    assignment_entropy_loss,
    background_presence_loss,
    centroid_concentration_loss,
    equivariance_loss,
    orthogonality_loss,
    presence_loss,
    total_variation_loss,
)

shapes = st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 8), st.integers(1, 9))
LOSSES = [
    assignment_entropy_loss,
    centroid_concentration_loss,
    lambda maps: background_presence_loss(maps[:, -1]),
    lambda maps: equivariance_loss(maps, maps.roll(1, 3)),
    lambda maps: orthogonality_loss(maps.flatten(2)),
    presence_loss,
    total_variation_loss,
]


def maps_of(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    scores = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (2 * scores).softmax(1)


def naive_windows(values: list[list[float]], border: int) -> dict[tuple[int, int], float]:
    """Means of 3 x 3 values by row and column, without the outermost ones as far as a window remains."""
    height, width = len(values), len(values[0])
    tall, wide = min(3, height), min(3, width)
    top, left = min(border, (height - tall) // 2), min(border, (width - wide) // 2)
    return {
        (y, x): sum(values[y + i][x + j] for i, j in product(range(tall), range(wide))) / (tall * wide)
        for y in range(top, height - top - tall + 1)
        for x in range(left, width - left - wide + 1)
    }


def naive(maps: torch.Tensor) -> dict[str, float]:
    """All losses of maps with Python floats, summed one position at a time."""
    b, m, height, width = maps.shape
    spread = variation = uncertainty = background = 0.0
    for image in maps.tolist():
        for own in image:
            spots = list(product(range(height), range(width)))
            total = sum(own[y][x] for y, x in spots)
            cy = sum(y * own[y][x] for y, x in spots) / total
            cx = sum(x * own[y][x] for y, x in spots) / total
            for y, x in spots:
                spread += own[y][x] * (((y - cy) / height) ** 2 + ((x - cx) / width) ** 2)
                variation += abs(own[y][x] - own[y - 1][x]) if y else 0
                variation += abs(own[y][x] - own[y][x - 1]) if x else 0
        uncertainty += sum(
            entropy([own[y][x] for own in image]) for y, x in product(range(height), range(width))
        )
        windows = naive_windows(image[-1], 0)
        rows, columns = ({spot[axis] for spot in windows} for axis in (0, 1))
        edges = [1 if len(side) == 1 else (len(side) - 1) / 2 for side in (rows, columns)]
        nearness = {
            (y, x): sum(
                1 if len(side) == 1 else ((own - edge) / edge) ** 2
                for own, side, edge in ((y, rows, edges[0]), (x, columns, edges[1]))
            )
            for y, x in windows
        }
        background -= math.log(max(windows[spot] * nearness[spot] / 2 for spot in windows))
    presences = {
        border: 1
        - sum(max(max(naive_windows(image[k], border).values()) for image in maps.tolist()) for k in range(m))
        / m
        for border in (0, 2)
    }
    return {
        "concentration": spread / maps.numel(),
        "variation": variation / (b * height * width),
        "entropy": uncertainty / (b * height * width),
        "background": background / b,
        "presence": presences[2],
        "presence everywhere": presences[0],
    }


@settings(max_examples=10, deadline=None)
@given(shape=shapes, seed=st.integers(0, 1000))
def test_losses_of_maps_equal_naive_sums(shape: tuple[int, ...], seed: int) -> None:
    maps = maps_of(shape, seed)
    found = {
        "concentration": centroid_concentration_loss(maps),
        "variation": total_variation_loss(maps),
        "entropy": assignment_entropy_loss(maps),
        "background": background_presence_loss(maps[:, -1]),
        "presence": presence_loss(maps),
        "presence everywhere": presence_loss(maps, border=0),
    }
    assert {name: value.item() for name, value in found.items()} == pytest.approx(naive(maps))


@settings(max_examples=10, deadline=None)
@given(shape=shapes, seed=st.integers(0, 1000))
def test_losses_of_cosines_equal_numpy(shape: tuple[int, ...], seed: int) -> None:
    vectors = maps_of(shape, seed).flatten(2)
    unit = [[v / np.linalg.norm(v) for v in image] for image in vectors.numpy()]
    pairs = [
        0.0 if p == q else float(image[p] @ image[q]) ** 2
        for image in unit
        for p, q in np.ndindex(2 * (shape[1],))
    ]
    assert orthogonality_loss(vectors).item() == pytest.approx(np.mean(pairs))
    others = maps_of(shape, seed + 1)
    cosines = [
        float(v @ (w / np.linalg.norm(w)))
        for image, other in zip(unit, others.flatten(2).numpy(), strict=True)
        for v, w in zip(image, other, strict=True)
    ]
    found = equivariance_loss(maps_of(shape, seed), others)
    assert found.item() == pytest.approx(1 - np.mean(cosines))


@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_are_those_of_finite_differences(loss) -> None:
    maps = maps_of((2, 3, 5, 6), 0).requires_grad_()
    assert torch.autograd.gradcheck(loss, maps)


def test_closed_forms() -> None:
    shares = torch.full((2, 4, 6, 6), 0.25)
    torch.testing.assert_close(assignment_entropy_loss(shares), torch.tensor(math.log(4)))
    torch.testing.assert_close(presence_loss(shares), torch.tensor(0.75))
    assert total_variation_loss(shares) == 0
    # the variance of 0, ..., n - 1 is (n^2 - 1) / 12, along both axes
    torch.testing.assert_close(centroid_concentration_loss(shares), torch.tensor(0.25 * 2 * 35 / 12 / 36))
    torch.testing.assert_close(equivariance_loss(shares, 3 * shares), torch.tensor(0.0))
    torch.testing.assert_close(orthogonality_loss(torch.ones(3, 4, 7)), torch.tensor(12 / 16))
    assert orthogonality_loss(torch.eye(4)[None]) == 0
    halves = torch.zeros(1, 2, 4, 4)
    halves[:, 0, :2] = halves[:, 1, 2:] = 1
    assert total_variation_loss(halves) == 2 * 4 / 16
    assert assignment_entropy_loss(halves) == 0
    # present in the corners
    assert background_presence_loss(torch.ones(2, 7, 9)) == 0


def test_a_part_need_not_be_present_in_every_image() -> None:
    maps = torch.zeros(3, 2, 9, 9)
    maps[1, 0, 3:6, 3:6] = maps[2, 1, 2:5, 4:7] = 1
    assert presence_loss(maps) == 0
    assert presence_loss(maps[:2]) == 0.5
    # at the edge only without a border
    edge = torch.zeros(1, 1, 9, 9)
    edge[..., :3, :3] = 1
    torch.testing.assert_close(presence_loss(edge), torch.tensor(8 / 9))
    assert presence_loss(edge, border=0) == 0


@pytest.mark.parametrize("loss", LOSSES)
def test_absent_parts_have_finite_losses_and_gradients(loss) -> None:
    maps = torch.zeros(2, 3, 7, 7)
    maps[:, 0] = 1
    maps.requires_grad_()
    value = loss(maps)
    value.backward()
    assert value.isfinite()
    assert maps.grad.isfinite().all()


@pytest.mark.parametrize("loss", LOSSES)
def test_half_precision_is_summed_in_float32(loss) -> None:
    maps = maps_of((2, 3, 20, 20), 0)
    value = loss(maps.to(torch.bfloat16))
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), loss(maps), rtol=2e-2, atol=1e-3)
