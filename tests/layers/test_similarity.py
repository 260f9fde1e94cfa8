import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial import procrustes
from scipy.spatial.transform import Rotation
from torch.nn import functional as F

from crossx.layers.similarity import Similarity, fit_similarity, warp_regions


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 9), st.floats(0, 0.5))
def test_equals_scipy_on_noisy_points(seed, count, noise) -> None:
    random = np.random.default_rng(seed)
    source, weights = random.normal(size=(count, 2)), random.uniform(0.1, 2, count)
    angle, scale, shift = random.uniform(-3, 3), random.uniform(0.2, 5), random.normal(size=2)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    target = scale * source @ turn.T + shift + noise * random.normal(size=(count, 2))
    (matrix, moved), residual = fit_similarity(*map(torch.tensor, (source, target, weights)))

    # the best rotation as SciPy finds it in space, and the scale that follows from it
    middles = [(weights[:, None] * points).sum(0) / weights.sum() for points in (source, target)]
    flat = [
        np.pad(points - middle, ((0, 0), (0, 1)))
        for points, middle in zip((source, target), middles, strict=True)
    ]
    # a third direction that outweighs the others keeps the rotation in the plane
    best, _ = Rotation.align_vectors(
        np.vstack([flat[1], [0, 0, 1]]), np.vstack([flat[0], [0, 0, 1]]), weights=[*weights, 1e9]
    )
    own_turn = best.as_matrix()[:2, :2]
    turned = flat[0][:, :2] @ own_turn.T
    own_scale = (weights[:, None] * turned * flat[1][:, :2]).sum() / (weights[:, None] * turned**2).sum()
    np.testing.assert_allclose(matrix, own_scale * own_turn, atol=1e-5)
    np.testing.assert_allclose(moved, middles[1] - matrix.numpy() @ middles[0], atol=1e-9)
    left = target - Similarity(matrix, moved)(torch.tensor(source)).numpy()
    assert residual == pytest.approx((weights[:, None] * left**2).sum(), abs=1e-8)


def test_without_noise_the_residual_is_zero_as_in_procrustes_analysis() -> None:
    source = torch.randn(5, 2, dtype=torch.float64)
    warp = Similarity(
        torch.tensor([[0.6, -0.8], [0.8, 0.6]]).double() * 3, torch.tensor([1.0, -2.0]).double()
    )
    found, residual = fit_similarity(source, warp(source), torch.ones(5, dtype=torch.float64))
    torch.testing.assert_close(found.matrix, warp.matrix)
    torch.testing.assert_close(found.shift, warp.shift)
    assert residual == pytest.approx(procrustes(source.numpy(), warp(source).numpy())[2], abs=1e-9)


def test_points_of_weight_zero_do_not_count_and_one_point_has_no_scale() -> None:
    source, target = torch.randn(4, 5, 2), torch.randn(4, 5, 2)
    weights = torch.tensor([1.0, 1, 0, 1, 0]).expand(4, 5)
    part, residual = fit_similarity(source, target, weights)
    same, own = fit_similarity(source[:, [0, 1, 3]], target[:, [0, 1, 3]], torch.ones(4, 3))
    torch.testing.assert_close(part, same)
    torch.testing.assert_close(residual, own)
    for count in (0, 1):
        lone, residual = fit_similarity(source[0], target[0], (torch.arange(5) < count).float())
        assert lone.scale == 0
        assert residual == 0


def test_the_identity_warp_resizes_and_a_mirror_flips() -> None:
    images = torch.rand(2, 3, 16, 16)
    whole = Similarity(torch.eye(2).expand(2, 1, 2, 2) * 8, torch.full((2, 1, 2), 8.0))
    torch.testing.assert_close(warp_regions(images, whole, 16)[:, 0], images)
    expected = F.interpolate(images, 8, mode="bilinear", align_corners=False)
    torch.testing.assert_close(warp_regions(images, whole, 8)[:, 0], expected)
    mirrored = Similarity(whole.matrix * torch.tensor([-1.0, 1]), whole.shift)
    torch.testing.assert_close(warp_regions(images, mirrored, 16)[:, 0], images.flip(3))


def test_regions_are_sampled_where_the_map_says() -> None:
    images = torch.rand(1, 1, 12, 20)
    warps = Similarity(torch.randn(1, 2, 2, 2) * 3, torch.tensor([[[9.0, 6.0], [1.0, 2.0]]]))
    regions = warp_regions(images, warps, 5)
    assert regions.shape == (1, 2, 1, 5, 5)
    padded = F.pad(images[0, 0], (50, 50, 50, 50))
    for region in range(2):
        for row in range(5):
            for column in range(5):
                point = torch.tensor([(column + 0.5) * 0.4 - 1, (row + 0.5) * 0.4 - 1])
                x, y = (warps.matrix[0, region] @ point + warps.shift[0, region] + 49.5).tolist()
                left, top = int(x), int(y)
                a, b = x - left, y - top
                window = padded[top : top + 2, left : left + 2]
                expected = torch.tensor([1 - b, b]) @ window @ torch.tensor([1 - a, a])
                torch.testing.assert_close(regions[0, region, 0, row, column], expected, atol=1e-5, rtol=1e-4)


def test_mixed_precision_moves_no_region() -> None:
    images, source, target = (
        torch.rand(1, 3, 64, 64),
        torch.randn(1, 1, 6, 2),
        10 * torch.randn(1, 1, 6, 2) + 30,
    )
    with torch.autocast("cpu", torch.bfloat16):
        warp, residual = fit_similarity(source, target, torch.ones(1, 1, 6))
        mapped, regions = warp(source), warp_regions(images, warp, 8)
    expected, own = fit_similarity(source, target, torch.ones(1, 1, 6))
    torch.testing.assert_close((warp, residual, mapped), (expected, own, expected(source)))
    torch.testing.assert_close(regions, warp_regions(images, expected, 8))
