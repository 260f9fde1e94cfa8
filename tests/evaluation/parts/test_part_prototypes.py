import numpy as np
import pytest
import torch
from torch.nn import functional as F

from crossx.evaluation.parts.measures import Bootstrap
from crossx.evaluation.parts.prototypes import (
    LARGEST_NOISE,
    NOISE,
    find_peaks,
    perturb,
    summarize_prototypes,
)
from crossx.evaluation.parts.regions import CropRegions

SIDE = 112


def scene(images=24, parts=3, seed=0):
    """Return keypoints of two parts anywhere and of one near a fixed position, and objects of several sizes."""
    generator = torch.Generator().manual_seed(seed)
    points = torch.rand(images, parts, 2, generator=generator)
    points[:, 0] = 0.3 + 0.1 * points[:, 0]
    seen = torch.rand(images, parts, generator=generator) > 0.2
    boxes = torch.tensor([0.1, 0.1, 0.7, 0.8]) + 0.1 * torch.rand(images, 1, 4, generator=generator)
    has_box = torch.arange(images)[:, None] % 5 > 0
    radii = torch.full((images,), 0.1)
    return CropRegions(points.repeat(1, 1, 2), radii, seen), CropRegions(boxes, radii, has_box)


def near(peak, image, k, parts, objects):
    """Say whether the part is in the region around the peak, in pixels."""
    left, top, right, bottom = objects.boxes[image, 0].tolist() if objects.visible[image] else (0, 0, 1, 1)
    x, y = (int(value) for value in (parts.centres[image, k] * SIDE).tolist())
    half = (36 / 224 * (right - left) * SIDE, 36 / 224 * (bottom - top) * SIDE)
    inside = abs(x - peak[0]) <= half[0] and abs(y - peak[1]) <= half[1]
    return inside and bool(parts.visible[image, k])


def test_consistency_and_stability_against_loops():
    parts, objects = scene()
    generator = torch.Generator().manual_seed(1)
    peaks = torch.randint(0, SIDE, (24, 2, 2), generator=generator)
    peaks[:, 0] = (0.35 * SIDE + torch.randint(-8, 8, (24, 2), generator=generator)).long()
    noisy = (peaks + torch.randint(-12, 12, peaks.shape, generator=generator)).clamp(0, SIDE - 1)
    classes = [number % 3 for number in range(24)]
    result = summarize_prototypes(peaks, noisy, classes, parts, objects, SIDE, Bootstrap(24))
    consistent, stable = [], []
    for label in range(3):
        members = [number for number in range(24) if classes[number] == label]
        for p in range(2):
            hits = [
                [near(peaks[n, p].tolist(), n, k, parts, objects) for n in members if parts.visible[n, k]]
                for k in range(3)
            ]
            consistent.append(any(sum(of_part) >= 0.8 * len(of_part) for of_part in hits if of_part))
            sets = [
                [{k for k in range(3) if near(at[n, p].tolist(), n, k, parts, objects)} for n in members]
                for at in (peaks, noisy)
            ]
            stable.append(np.mean([a == b for a, b in zip(*sets, strict=True)]))
    assert 0 < np.mean(consistent) < 1
    assert result["consistency"]["value"] == pytest.approx(np.mean(consistent))
    assert result["stability"]["value"] == pytest.approx(np.mean(stable))
    for value in result.values():
        assert 0 <= value["interval"][0] <= value["interval"][1] <= 1
        assert 0 <= value["chance"] <= 1


def test_peaks_that_follow_a_part_are_consistent_beyond_chance():
    parts, objects = scene(40, seed=2)
    peaks = (parts.centres[:, 1:2] * SIDE).long()
    result = summarize_prototypes(peaks, peaks, [0] * 40, parts, objects, SIDE, Bootstrap(40))
    assert result["consistency"]["value"] == result["stability"]["value"] == 1
    assert result["consistency"]["chance"] < 0.1
    assert result["stability"]["chance"] < 0.5
    fixed = torch.full((40, 1, 2), SIDE // 2)
    same = summarize_prototypes(fixed, fixed, [0] * 40, parts, objects, SIDE, Bootstrap(40))
    assert same["consistency"]["value"] == same["consistency"]["chance"]


def test_peaks_are_those_of_the_enlarged_map():
    maps = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    large = F.interpolate(maps, (SIDE, SIDE), mode="bicubic").numpy()
    for (image, p), peak in np.ndenumerate(large.max((2, 3))):
        x, y = find_peaks(maps, SIDE)[image, p].tolist()
        assert large[image, p, y, x] == peak
    assert find_peaks(torch.zeros(1, 1, 3, 3), SIDE).tolist() == [[[0, 0]]]


def test_noise_is_bounded_and_does_not_depend_on_the_batch():
    images = torch.zeros(3, 3, 16, 16)
    together = perturb(images, torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(0)
    torch.testing.assert_close(together, torch.cat([perturb(image[None], generator) for image in images]))
    assert together.abs().max() == LARGEST_NOISE
    assert 0.6 * NOISE < together.std() < NOISE
