"""Measures of what the excitations of a network look at: activation maps compared with annotated object parts.

Every function takes the maps of one stage, (B, P, h, w): B images, P excitations, h x w spatial positions. A position
stands for its rectangle of the crop and is located at its centre. ``docs/parts.md`` explains how to read the numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import hypergeom
from torch import Tensor
from torch.nn import functional as F

from crossx.evaluation.intervals import percentile_interval
from crossx.evaluation.parts.regions import CropRegions

TOP_SHARE = 0.2
"""Share of a map's positions that count as its focus in ``focus_overlap``."""

ZOOM = 0.875
"""Side of the window of ``zoom``, relative to the crop."""

RESAMPLES = 1000
"""Bootstrap resamples of an interval, and permutations of a test."""


def mass(maps: Tensor) -> Tensor:
    """Return the maps as distributions over positions, (B, P, h, w), each with sum 1.

    ``m_i = (a_i - min a) / sum_j (a_j - min a)``. Maps after a ReLU are not negative, those after a batch norm may be.
    Subtracting each map's minimum treats them alike and makes the mass independent of the map's scale and offset. A
    constant map has uniform mass.
    """
    above = maps - maps.amin((2, 3), keepdim=True)
    flat = above.amax((2, 3), keepdim=True) == 0
    above = torch.where(flat, torch.ones_like(above), above)
    # scaled first: the sum of many large values would overflow float32
    above = above / above.amax((2, 3), keepdim=True)
    return above / above.sum((2, 3), keepdim=True)


def peaks(maps: Tensor) -> Tensor:
    """Return where each map is largest, (B, P, h, w): 1 there and 0 elsewhere, divided among equal maxima."""
    largest = (maps == maps.amax((2, 3), keepdim=True)).to(maps.dtype)
    return largest / largest.sum((2, 3), keepdim=True)


def shares(distribution: Tensor, regions: Tensor) -> tuple[Tensor, Tensor]:
    """Return the share of each distribution in each region, and the share by chance (of a uniform distribution).

    ``share_pk = sum_i m_pi r_ki`` and ``chance_k = mean_i r_ki``. With ``mass`` and ``CropRegions.coverage`` these are
    the part's share of the activation and of the crop's area. With ``peaks`` and ``CropRegions.contain`` it is the
    pointing game (Zhang et al., "Top-down neural attention by excitation backprop", IJCV 2018,
    https://arxiv.org/abs/1608.00507): 1 if the maximum is in the part; chance is the share of positions that are.

    Args:
        distribution: (B, P, h, w), each map with sum 1.
        regions: (B, K, h, w), from 0 to 1.

    Returns:
        Shares (B, P, K) and chance (B, K).
    """
    regions = regions.to(distribution)
    # (B, P, h, w), (B, K, h, w) -> (B, P, K)
    return torch.einsum("bphw,bkhw->bpk", distribution, regions), regions.mean((2, 3))


def found_parts(maps: Tensor, parts: CropRegions) -> Tensor:
    """Return the part that each map finds, int64 (B, P); -1 if no part is visible.

    It is the part that contains the map's maximum (the first of equal ones). If several parts do, it is the one of them
    with the nearest centre; if none does, the visible part with the nearest centre.
    """
    height, width = maps.shape[2:]
    if not parts.visible.shape[1]:
        return torch.full(maps.shape[:2], -1)
    peak = maps.flatten(2).argmax(2)  # (B, P, h, w) -> (B, P)
    rows, columns = peak // width, peak % width
    point = torch.stack([(columns + 0.5) / width, (rows + 0.5) / height], -1)  # (B, P, 2)
    distance = torch.cdist(point, parts.centres.to(point))  # (B, P, K)
    contained = parts.contain(height, width).flatten(2)  # (B, K, hw)
    hit = contained.gather(2, peak[:, None].expand(-1, contained.shape[1], -1))  # (B, K, hw) -> (B, K, P)
    hit = hit.transpose(1, 2)  # (B, K, P) -> (B, P, K)
    # distances within the crop are below 2
    ranked = (distance + 2 * ~hit).masked_fill(~parts.visible[:, None], torch.inf)
    return ranked.argmin(2).masked_fill(~parts.visible.any(1)[:, None], -1)


def peaks_inside(maps: Tensor, parts: CropRegions) -> Tensor:
    """Return whether each map's maximum (the first of equal ones) is in a visible part, bool (B, P)."""
    inside = parts.contain(*maps.shape[2:]).any(1).flatten(1)  # (B, K, h, w) -> (B, hw)
    return inside.gather(1, maps.flatten(2).argmax(2))


def normalized_mutual_information(counts: Tensor) -> Tensor:
    """Return ``2 I(p; k) / (H(p) + H(k))`` of contingency tables (..., P, K); 0 if nothing varies.

    Normalised by the mean of the entropies, as in scikit-learn's ``normalized_mutual_info_score``.
    """
    joint = counts.double() / counts.sum((-2, -1), keepdim=True).clamp(min=1)
    of_rows, of_columns = _entropy(joint.sum(-1)), _entropy(joint.sum(-2))
    information = of_rows + of_columns - _entropy(joint.flatten(-2))
    total = of_rows + of_columns
    return torch.where(total > 1e-12, (2 * information / total.clamp(min=1e-12)).clamp(0, 1), 0.0)


def focus_overlap(maps: Tensor, share: float = TOP_SHARE) -> Tensor:
    """Return the mean IoU of the focus of pairs of excitations, (B,); P > 1.

    The focus of an excitation is the fraction ``share`` of positions with the largest values, at least one.
    """
    size = focus_size(maps.shape[2] * maps.shape[3], share)
    order = maps.flatten(2).argsort(stable=True, dim=2, descending=True)  # (B, P, hw)
    focus = torch.zeros_like(maps.flatten(2)).scatter_(2, order[..., :size], 1.0)
    common = focus @ focus.transpose(1, 2)  # (B, P, hw) -> (B, P, P)
    return _mean_over_pairs(common / (2 * size - common))


def focus_size(positions: int, share: float = TOP_SHARE) -> int:
    """Return the number of positions in the focus of a map."""
    return max(1, round(share * positions))


def chance_overlap(positions: int, share: float = TOP_SHARE) -> float:
    """Return the expected ``focus_overlap`` of random positions, whose intersection is hypergeometric."""
    size = focus_size(positions, share)
    common = np.arange(size + 1)
    return float(hypergeom(positions, size, size).pmf(common) @ (common / (2 * size - common)))


def correlation(maps: Tensor, others: Tensor) -> Tensor:
    """Return the Pearson correlation of each map with its counterpart, (B, P); 0 if one is constant."""
    return (_standardized(maps) * _standardized(others)).sum(2)


def mutual_correlation(maps: Tensor) -> Tensor:
    """Return the mean Pearson correlation of pairs of an image's excitations, (B,); P > 1."""
    standardized = _standardized(maps)  # (B, P, hw)
    return _mean_over_pairs(standardized @ standardized.transpose(1, 2))


def zoom(images: Tensor) -> Tensor:
    """Return the upper left window, ``ZOOM`` of the crop's side, resized to the crop's size, (B, C, H, W)."""
    height, width = (round(ZOOM * side) for side in images.shape[2:])
    return F.interpolate(images[..., :height, :width], images.shape[2:], mode="bilinear", align_corners=False)


def zoom_maps(maps: Tensor, image_size: Sequence[int]) -> Tensor:
    """Resample maps of whole crops at the positions of the maps of ``zoom``'s window.

    Args:
        maps: (B, P, h, w), of the crops.
        image_size: Height and width of the crops, in pixels.
    """
    scale_y, scale_x = (round(ZOOM * side) / side for side in image_size)
    theta = maps.new_tensor([[scale_x, 0, scale_x - 1], [0, scale_y, scale_y - 1]])
    grid = F.affine_grid(theta.expand(len(maps), 2, 3), list(maps.shape), align_corners=False)
    return F.grid_sample(maps, grid, mode="bilinear", padding_mode="border", align_corners=False)


def measure_images(
    maps: Tensor,
    flipped: Tensor,
    zoomed: Tensor,
    image_size: Sequence[int],
    parts: CropRegions,
    objects: CropRegions,
) -> dict[str, Tensor]:
    """Measure each image of a batch.

    Args:
        maps: (B, P, h, w), of one stage.
        flipped: Maps of the horizontally flipped images.
        zoomed: Maps of ``zoom(images)``.
        image_size: Height and width of the images, in pixels.
        parts: K regions per image.
        objects: One region per image.

    Returns:
        Name -> values: ``share`` and ``pointing`` (B, P, K), ``share_chance`` and ``pointing_chance`` (B, K);
        ``any_part`` (pointing at the union of the parts) and ``object`` (share of the object) (B, P, 1), and their
        ``_chance`` (B, 1); ``found``, ``inside``, ``flip`` and ``zoom`` (B, P); for P > 1, ``overlap`` and
        ``correlation`` (B,).
    """
    maps, flipped, zoomed = maps.float(), flipped.float(), zoomed.float()
    size = maps.shape[2], maps.shape[3]
    measures = {}
    contained = parts.contain(*size)
    for name, distribution, regions in (
        ("share", mass(maps), parts.coverage(*size)),
        ("pointing", peaks(maps), contained),
        ("any_part", peaks(maps), contained.any(1, keepdim=True)),
        ("object", mass(maps), objects.coverage(*size)),
    ):
        measures[name], measures[f"{name}_chance"] = shares(distribution, regions)
    measures["found"] = found_parts(maps, parts)
    measures["inside"] = peaks_inside(maps, parts)
    measures["flip"] = correlation(flipped.flip(3), maps)
    measures["zoom"] = correlation(zoomed, zoom_maps(maps, image_size))
    if maps.shape[1] > 1:
        measures["overlap"] = focus_overlap(maps)
        measures["correlation"] = mutual_correlation(maps)
    return measures


class Bootstrap:
    """Percentile bootstrap intervals over images, all from the same resamples.

    Args:
        n: Number of images.
        seed: Seed of the resampling.
    """

    def __init__(self, n: int, seed: int = 0) -> None:
        drawn = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=RESAMPLES)
        self.counts: NDArray[np.float64] = drawn.astype(np.float64)
        """(RESAMPLES, n): how often each image is drawn."""

    def totals(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the sums of values (n, ...) over each resample, (RESAMPLES, ...)."""
        return np.tensordot(self.counts, values, 1)

    def interval(self, resampled: NDArray[np.float64]) -> list[float] | None:
        """Return ``[low, high]`` of a number's values in the resamples (RESAMPLES,); None if all are undefined."""
        defined = resampled[np.isfinite(resampled)]
        return list(percentile_interval(defined)) if len(defined) else None

    def mean(self, values: NDArray[np.float64]) -> dict[str, Any]:
        """Return the mean of values (n,), n > 0, and its interval."""
        return {
            "value": float(values.mean()),
            "interval": self.interval(self.totals(values) / self.counts.sum(1)),
        }

    def with_chance(
        self, values: NDArray[np.float64], chance: NDArray[np.float64], used: NDArray[np.bool_]
    ) -> dict[str, Any]:
        """Return the means of values (n,) and chance (n,) over the used images.

        ``over_chance`` is their ratio, None if chance is 0.
        """
        columns = np.stack([values * used, chance * used, used], 1)
        value, expected, count = columns.sum(0)
        with np.errstate(divide="ignore", invalid="ignore"):
            values_, expected_, counts_ = self.totals(columns).T
            of_means, of_ratios = values_ / counts_, values_ / expected_
        return {
            "value": float(value / count),
            "interval": self.interval(of_means),
            "chance": float(expected / count),
            "over_chance": float(value / expected) if expected > 0 else None,
            "over_chance_interval": self.interval(of_ratios) if expected > 0 else None,
        }


def consistency(found: Tensor, num_parts: int, bootstrap: Bootstrap, seed: int = 0) -> dict[str, Any]:
    """Return how much the excitation tells about the part that it finds, over images of all classes; P > 1.

    ``nmi`` is the normalised mutual information of excitation and part. 1: each excitation finds its own part in every
    image; 0: all find the parts equally often. It is above 0 by chance in a finite sample, so ``chance`` is its mean
    over permutations of the excitations within each image, and ``p_value`` the share of permutations (the observed one
    included) with at least the same NMI.

    Args:
        found: int64 (N, P), see ``found_parts``; pairs of image and excitation with -1 are ignored.
        num_parts: K.
        bootstrap: Over the N images.
        seed: Seed of the permutations.
    """
    chosen = F.one_hot(found.clamp(min=0), num_parts) * (found >= 0)[..., None]  # (N, P) -> (N, P, K)
    used = (found >= 0).any(1)
    nmi = float(normalized_mutual_information(chosen.sum(0)))
    resampled = normalized_mutual_information(torch.from_numpy(bootstrap.totals(chosen.double().numpy())))
    generator = torch.Generator().manual_seed(seed)
    kept = chosen[used]
    permuted = torch.stack([_permuted_counts(kept, generator) for _ in range(RESAMPLES)])
    by_chance = normalized_mutual_information(permuted)
    # the tolerance covers rounding
    as_large = int((by_chance >= nmi - 1e-12).sum())
    return {
        "nmi": nmi,
        "interval": bootstrap.interval(resampled.numpy()),
        "chance": float(by_chance.mean()),
        "p_value": (1 + as_large) / (1 + RESAMPLES),
        "n": int(used.sum()),
    }


def summarize_parts(
    measures: Mapping[str, Tensor], names: Sequence[str], visible: Tensor, has_object: Tensor, positions: int
) -> dict[str, Any]:
    """Return the measures of one stage as a dictionary for JSON.

    Args:
        measures: The results of ``measure_images`` for all N images.
        names: The K parts.
        visible: bool (N, K), which parts are visible; each at least once.
        has_object: bool (N,), which images have an object box.
        positions: Number of spatial positions of a map.

    Returns:
        ``excitations``, a list over p: ``share`` and ``pointing`` (part -> value and chance, over the images that show
        the part), ``object`` (share of the whole object, None without boxes), ``any_part`` (pointing at any part, over
        the images that show one), ``found`` (part -> share of images in which p finds it), ``flip`` and ``zoom`` (mean
        correlations). For P > 1 ``consistency`` (with ``inside``, the same of peaks in a part only) and ``diversity``
        (``overlap`` with chance, and ``correlation``), else None. Without parts ``consistency`` and ``any_part`` are
        None.
    """
    arrays = {name: values.double().numpy() for name, values in measures.items()}
    seen, with_object = visible.numpy(), has_object.numpy()
    bootstrap = Bootstrap(len(seen))
    found = measures["found"]
    used = found[:, 0] >= 0

    def with_chance(name: str, p: int) -> dict[str, Any]:
        return {
            part: bootstrap.with_chance(arrays[name][:, p, k], arrays[f"{name}_chance"][:, k], seen[:, k])
            for k, part in enumerate(names)
        }

    def of_one_region(name: str, p: int, shown: NDArray[np.bool_]) -> dict[str, Any] | None:
        if not shown.any():
            return None
        return bootstrap.with_chance(arrays[name][:, p, 0], arrays[f"{name}_chance"][:, 0], shown)

    excitations = [
        {
            "share": with_chance("share", p),
            "pointing": with_chance("pointing", p),
            "object": of_one_region("object", p, with_object),
            "any_part": of_one_region("any_part", p, used.numpy()),
            "found": {part: float((found[used, p] == k).double().mean()) for k, part in enumerate(names)},
            **{view: bootstrap.mean(arrays[view][:, p]) for view in ("flip", "zoom")},
        }
        for p in range(found.shape[1])
    ]
    several = len(excitations) > 1
    return {
        "places": positions,
        "excitations": excitations,
        "consistency": {
            **consistency(found, len(names), bootstrap),
            "inside": consistency(torch.where(measures["inside"], found, -1), len(names), bootstrap),
        }
        if several and names
        else None,
        "diversity": {
            "overlap": {**bootstrap.mean(arrays["overlap"]), "chance": chance_overlap(positions)},
            "correlation": bootstrap.mean(arrays["correlation"]),
        }
        if several
        else None,
    }


def _entropy(probabilities: Tensor) -> Tensor:
    return -torch.xlogy(probabilities, probabilities).sum(-1)


def _mean_over_pairs(matrices: Tensor) -> Tensor:
    """Average the entries above the diagonal of matrices, (B, P, P) -> (B,)."""
    parts = matrices.shape[1]
    return matrices.triu(1).sum((1, 2)) / (parts * (parts - 1) / 2)


def _standardized(maps: Tensor) -> Tensor:
    """Return maps (B, P, h, w) as vectors (B, P, hw) of mean 0 and norm 1; constant maps as 0."""
    values = maps.flatten(2)
    values = values / values.abs().amax(2, keepdim=True).clamp(min=torch.finfo(values.dtype).tiny)
    centred = values - values.mean(2, keepdim=True)
    length = centred.norm(dim=2, keepdim=True)
    # a shorter vector is the rounding error of a constant map
    return torch.where(length > 1e-6, centred / length.clamp(min=1e-6), 0.0)


def _permuted_counts(chosen: Tensor, generator: torch.Generator) -> Tensor:
    """Permute the excitations of one-hot choices (N, P, K) within each image and count, (P, K)."""
    order = torch.rand(chosen.shape[:2], generator=generator).argsort(1)
    return chosen.gather(1, order[..., None].expand_as(chosen)).sum(0)
