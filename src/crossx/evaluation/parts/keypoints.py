"""Keypoints and maps as in the evaluation of part discovery: NMI, ARI, and regression of keypoints from centroids.

The measures of PDiscoNet (van der Klis et al., ICCV 2023; https://github.com/robertdvdk/part_detection, eec53f2) and
PDiscoFormer (Aniraj et al., ECCV 2024; https://github.com/ananthu-aniraj/pdiscoformer, f039c15), whose scripts compute
the same. The keypoint of a part with a box is the box's centre.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg import lstsq
from torch import Tensor
from torch.nn import functional as F

from crossx.evaluation.parts.measures import Bootstrap, mass, normalized_mutual_information

ACTIVE = 0.5
"""A share of a position above which a part is there: for an active part in the reference, and for scaled maps."""

SHUFFLES = 100
"""Random permutations whose mean is the level by chance."""


def assignments(maps: Tensor, *, are_shares: bool) -> Tensor:
    """Return a score per excitation and one for the background, (B, P + 1, h, w); the largest is the label.

    Args:
        maps: (B, P, h, w).
        are_shares: Whether the maps are shares of each position, as ``Method.maps_are_shares`` says. The background
            then has the rest, as in the reference. Otherwise each map is scaled to [0, 1] by its minimum and maximum in
            the image (a constant map is 0), and the background has ``ACTIVE`` everywhere.
    """
    if are_shares:
        return torch.cat([maps, 1 - maps.sum(1, keepdim=True)], 1)
    low, high = maps.amin((2, 3), keepdim=True), maps.amax((2, 3), keepdim=True)
    span = high - low
    scaled = (maps - low) / torch.where(span > 0, span, 1)
    return torch.cat([scaled, torch.full_like(maps[:, :1], ACTIVE)], 1)


def label_keypoints(scores: Tensor, points: Tensor, image_size: int) -> Tensor:
    """Return the index of the largest score at each point, int64 (B, K).

    Scores are resized to the image (bilinear) and read at the pixel with the nearest centre.

    Args:
        scores: (B, L, h, w).
        points: (B, K, 2), x and y in shares of the image's side.
        image_size: Side of the images, in pixels.
    """
    pixels = (points * image_size - 0.5).round().clamp(0, image_size - 1)
    at = ((pixels + 0.5) / image_size * 2 - 1).to(scores)
    # (B, L, h, w), (B, K, 1, 2) -> (B, L, K, 1)
    values = F.grid_sample(scores, at[:, :, None], "bilinear", padding_mode="border", align_corners=False)
    return values[..., 0].argmax(1)


def adjusted_rand_index(counts: Tensor) -> Tensor:
    """Return the adjusted Rand index of contingency tables (..., L, K); 1 if the two partitions are the same.

    Hubert and Arabie, "Comparing partitions", Journal of Classification 2, 1985.
    """
    counts = counts.double()

    def pairs(numbers: Tensor) -> Tensor:
        return numbers * (numbers - 1) / 2

    together = pairs(counts).sum((-2, -1))
    of_labels, of_parts = pairs(counts.sum(-1)).sum(-1), pairs(counts.sum(-2)).sum(-1)
    total = pairs(counts.sum((-2, -1)))
    expected = of_labels * of_parts / total.clamp(min=1)
    span = (of_labels + of_parts) / 2 - expected
    same = span.abs() < 1e-9 * total.clamp(min=1)
    return torch.where(same, 1.0, (together - expected) / torch.where(same, 1.0, span))


def keypoint_agreement(
    labels: Tensor, of_frame: Tensor, visible: Tensor, num_labels: int, bootstrap: Bootstrap, seed: int = 0
) -> dict[str, Any]:
    """Return NMI and ARI of the labels at visible keypoints with the parts, over all images.

    ``chance`` is their mean over permutations of the labels among the visible keypoints of each image, and ``frame``
    the value of labels that ignore the image. Both are None if fewer than two keypoints are ever visible.

    Args:
        labels: int64 (N, K), from ``label_keypoints``.
        of_frame: int64 (N, K), labels by the same maps in every image.
        visible: bool (N, K).
        num_labels: L.
        bootstrap: Over the N images.
        seed: Seed of the permutations.
    """

    def tables(chosen: Tensor) -> Tensor:
        # (N, K) -> (N, K, L) -> (N, L, K)
        return (F.one_hot(chosen, num_labels) * visible[..., None]).transpose(1, 2)

    if int(visible.any(0).sum()) < 2:
        return {"nmi": None, "ari": None}
    of_images = tables(labels)
    table, frame = of_images.sum(0), tables(of_frame).sum(0)
    resampled = torch.from_numpy(bootstrap.totals(of_images.double().numpy()))
    generator = torch.Generator().manual_seed(seed)
    permuted = torch.stack([tables(_permuted(labels, visible, generator)).sum(0) for _ in range(SHUFFLES)])
    return {
        name: {
            "value": float(measure(table)),
            "interval": bootstrap.interval(measure(resampled).numpy()),
            "chance": float(measure(permuted).mean()),
            "frame": float(measure(frame)),
        }
        for name, measure in (("nmi", normalized_mutual_information), ("ari", adjusted_rand_index))
    }


def _permuted(labels: Tensor, visible: Tensor, generator: torch.Generator) -> Tensor:
    """Permute the labels of each image's visible keypoints, (N, K)."""
    # the visible ones first, in random order; then back to where the visible ones are
    order = (torch.rand(labels.shape, generator=generator) + 2 * ~visible).argsort(1)
    places = (~visible).to(torch.uint8).argsort(dim=1, stable=True)
    return torch.empty_like(labels).scatter_(1, places, labels.gather(1, order))


def centroids(maps: Tensor, image_size: int) -> Tensor:
    """Return the centre of mass of each map, (B, P, 2): x and y in pixels of the image.

    As in the reference, a position counts at its first pixel. Maps must not be negative; one that is 0 everywhere has
    its centre in the middle.
    """
    height, width = maps.shape[2:]
    maps = torch.where(maps.amax((2, 3), keepdim=True) > 0, maps, 1.0)
    total = maps.sum((2, 3))
    y = (maps.sum(3) @ torch.arange(height).to(maps)) / total * (image_size / height)
    x = (maps.sum(2) @ torch.arange(width).to(maps)) / total * (image_size / width)
    return torch.stack([x, y], -1)


def find_centroids(maps: Tensor, image_size: int, *, are_shares: bool) -> tuple[Tensor, Tensor]:
    """Return the centroids of maps (B, P, 2), and which maps are active, bool (B, P).

    Shares are taken as they are and are active where one exceeds ``ACTIVE``, as in the reference. Other maps are taken
    as ``mass`` and are all active.
    """
    if are_shares:
        return centroids(maps, image_size), maps.amax((2, 3)) > ACTIVE
    return centroids(mass(maps), image_size), torch.ones(maps.shape[:2], dtype=torch.bool, device=maps.device)


def exact(images: int, regressors: int) -> bool:
    """Return whether a regression fits that many images exactly: standardising takes one degree of freedom."""
    return images - 1 <= regressors


def regression_errors(
    centres: NDArray[np.float64],
    active: NDArray[np.bool_],
    points: NDArray[np.float64],
    visible: NDArray[np.bool_],
    fitted_on: tuple[NDArray[np.float64], NDArray[np.bool_], NDArray[np.float64], NDArray[np.bool_]],
) -> NDArray[np.float64]:
    """Return the distance of each keypoint from its prediction by the centroids, (N, K); NaN where there is none.

    For each keypoint, a linear regression without intercept from the standardised centroids of all parts to its
    standardised coordinates, fitted on the images of ``fitted_on`` that show it. Centroids of parts that are not active
    are 0 after standardisation. A keypoint that too few images of ``fitted_on`` show has no prediction: the regression
    would fit them exactly.

    Args:
        centres: (N, P, 2) in units of the object's box, from its corner.
        active: (N, P).
        points: (N, K, 2) in the same units.
        visible: (N, K).
        fitted_on: The same four of other images.
    """
    errors = np.full(visible.shape, np.nan)
    fit_centres, fit_active, fit_points, fit_visible = fitted_on
    for k in range(visible.shape[1]):
        chosen, asked = fit_visible[:, k], visible[:, k]
        if exact(int(chosen.sum()), 2 * centres.shape[1]) or not asked.any():
            continue
        inputs, outputs = _flat(fit_centres[chosen]), fit_points[chosen, k]
        mean, scale = _standardization(inputs)
        out_mean, out_scale = _standardization(outputs)
        standardized = (inputs - mean) / scale * _flat_active(fit_active[chosen])
        weights, *_ = lstsq(standardized, (outputs - out_mean) / out_scale)
        predicted = (_flat(centres[asked]) - mean) / scale * _flat_active(active[asked]) @ weights
        errors[asked, k] = np.linalg.norm(predicted * out_scale + out_mean - points[asked, k], axis=1)
    return errors


def _flat(centres: NDArray[np.float64]) -> NDArray[np.float64]:
    return centres.reshape(len(centres), -1)


def _flat_active(active: NDArray[np.bool_]) -> NDArray[np.bool_]:
    return active.repeat(2, axis=1)


def _standardization(values: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return mean and standard deviation of columns (N, D); 1 for a constant column, as in scikit-learn's scaler."""
    mean, variance = values.mean(0), values.var(0)
    rounding = len(values) * np.finfo(values.dtype).eps
    constant = variance <= rounding * variance + (rounding * mean) ** 2
    return mean, np.where(constant, 1.0, np.sqrt(variance))


def summarize_errors(
    errors: NDArray[np.float64],
    by_chance: NDArray[np.float64],
    of_frame: NDArray[np.float64],
    bootstrap: Bootstrap,
) -> dict[str, Any] | None:
    """Return the mean error over all keypoints of all images, in shares of the object's box; None if there is none.

    Args:
        errors: (N, K), see ``regression_errors``.
        by_chance: The same for the mean position of each keypoint in the box.
        of_frame: The same for one centroid in the middle of the crop.
        bootstrap: Over the N images.
    """
    defined = np.isfinite(errors)
    if not defined.any():
        return None
    sums = np.where(defined, errors, 0).sum(1)
    totals = bootstrap.totals(np.stack([sums, defined.sum(1).astype(np.float64)], 1))
    with np.errstate(divide="ignore", invalid="ignore"):
        resampled = totals[:, 0] / totals[:, 1]
    return {
        "value": float(errors[defined].mean()),
        "interval": bootstrap.interval(resampled),
        "chance": float(by_chance[defined].mean()),
        "frame": float(of_frame[defined].mean()),
        "keypoints": int(defined.sum()),
    }
