"""Consistency and stability as in the evaluation of part prototypes, carried over to excitations.

Huang et al., "Evaluation and improvement of interpretability for self-explainable part-prototype networks", ICCV 2023,
https://github.com/hqhQAQ/EvalProtoPNet (commit ab33e5d). A prototype belongs to one class there; here the excitations
in the images of one class take the place of its prototypes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from crossx.evaluation.parts.measures import Bootstrap
from crossx.evaluation.parts.regions import CropRegions

HALF_SIDE = 36 / 224
"""Half the side of the region around a peak, as a share of the object's box: 36 pixels of a box of 224."""

CONSISTENT = 0.8
"""Share of a class's images in whose regions a part must be."""

NOISE, LARGEST_NOISE = 0.2, 0.25
"""Standard deviation and bound of the noise, in units of the normalised images."""

SHUFFLES = 100
"""Random permutations of the images whose mean is the level by chance."""


def perturb(images: Tensor, generator: torch.Generator) -> Tensor:
    """Add bounded Gaussian noise to normalised images (B, 3, H, W), the same for any number of images per batch."""
    noise = torch.stack([torch.randn(images.shape[1:], generator=generator) for _ in images])
    return images + (NOISE * noise).clamp(-LARGEST_NOISE, LARGEST_NOISE).to(images)


def find_peaks(maps: Tensor, image_size: int) -> Tensor:
    """Return the pixel of each map's maximum, int64 (B, P, 2): x and y, the first of equal ones.

    Maps (B, P, h, w) are resized to the image by bicubic interpolation, as in the reference.
    """
    found = []
    for of_image in maps:  # one by one, since enlarged maps are large
        large = F.interpolate(of_image[None], (image_size, image_size), mode="bicubic", align_corners=False)
        found.append(large[0].flatten(1).argmax(1))
    peak = torch.stack(found)
    return torch.stack([peak % image_size, peak // image_size], -1)


def parts_near(peaks: Tensor, parts: CropRegions, objects: CropRegions, image_size: int) -> Tensor:
    """Return which visible parts are in the region around each peak, bool (N, P, K).

    The region reaches ``HALF_SIDE`` of the object's box (of the crop, without one) to each side.

    Args:
        peaks: int64 (N, P, 2), from ``find_peaks``.
        parts: K regions per image, located by their centres.
        objects: One region per image.
        image_size: Side of the images, in pixels.
    """
    size = (objects.boxes[:, 0, 2:] - objects.boxes[:, 0, :2]).double()
    size = torch.where(objects.visible, size, 1.0)
    # in this order, since 36 / 224 * 224 may not be 36
    reach = (36 * (size * image_size).round(decimals=6) / 224)[:, None, None]  # (N, 1, 1, 2)
    pixels = (parts.centres.double() * image_size).round(decimals=4).floor()[:, None]  # (N, 1, K, 2)
    near = ((pixels - peaks[:, :, None]).abs() <= reach).all(-1)
    return near & parts.visible[:, None]


def summarize_prototypes(
    peaks: Tensor,
    perturbed: Tensor,
    classes: Sequence[int],
    parts: CropRegions,
    objects: CropRegions,
    image_size: int,
    bootstrap: Bootstrap,
    seed: int = 0,
) -> dict[str, Any]:
    """Return consistency and stability of the excitations, each with interval and chance.

    ``consistency``: the share of pairs of class and excitation that are consistent: there is a part that is in the
    region in at least ``CONSISTENT`` of the images of the class that show it. ``stability``: the share of images,
    averaged over pairs of class and excitation, in which noise does not change the set of parts in the region.
    ``chance``: the same with the peaks of another image, at random, in place of the image's own (for stability, of
    those with noise).

    Args:
        peaks: int64 (N, P, 2), from ``find_peaks``.
        perturbed: The same for images with noise.
        classes: N class indices.
        parts: K regions per image.
        objects: One region per image.
        image_size: Side of the images, in pixels.
        bootstrap: Over the N images.
        seed: Seed of the permutations.
    """
    near = parts_near(peaks, parts, objects, image_size)
    same = _same_parts(near, parts_near(perturbed, parts, objects, image_size))
    members = [np.flatnonzero(np.equal(classes, label)) for label in np.unique(classes)]
    visible = parts.visible.numpy()
    once = np.ones((1, len(near)))
    by_chance = []
    generator = torch.Generator().manual_seed(seed)
    for _ in range(SHUFFLES):
        order = torch.randperm(len(near), generator=generator)
        other = parts_near(peaks[order], parts, objects, image_size)
        by_chance.append(
            (
                consistent_share(other.numpy(), visible, members, once)[0],
                stable_share(_same_parts(near, other).numpy(), members, once)[0],
            )
        )
    chance = np.mean(by_chance, axis=0)
    values = {
        name: (
            consistent_share(near.numpy(), visible, members, counts),
            stable_share(same.numpy(), members, counts),
        )
        for name, counts in (("once", once), ("resampled", bootstrap.counts))
    }
    return {
        name: {
            "value": float(values["once"][column][0]),
            "interval": bootstrap.interval(values["resampled"][column]),
            "chance": float(chance[column]),
        }
        for column, name in enumerate(("consistency", "stability"))
    }


def consistent_share(
    near: NDArray[np.bool_],
    visible: NDArray[np.bool_],
    members: Sequence[NDArray[np.int64]],
    counts: NDArray[np.float64],
) -> NDArray[np.float64]:
    """Return the share of consistent pairs of class and excitation, (R,).

    Args:
        near: (N, P, K), see ``parts_near``.
        visible: (N, K).
        members: The images of each class that has any.
        counts: (R, N), how often each image is drawn in each of R resamples.
    """
    consistent, pairs = np.zeros(len(counts)), np.zeros(len(counts))
    for images in members:
        drawn = counts[:, images]
        hits = np.tensordot(drawn, near[images].astype(np.float64), 1)  # (R, P, K)
        shown = (drawn @ visible[images])[:, None]  # (R, 1, K)
        found = (hits / np.maximum(shown, 1) >= CONSISTENT).any(2)
        present = drawn.sum(1) > 0
        consistent += found.sum(1) * present
        pairs += near.shape[1] * present
    return consistent / pairs


def stable_share(
    same: NDArray[np.bool_], members: Sequence[NDArray[np.int64]], counts: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return the mean over classes and excitations of the share of images with ``same`` (N, P), (R,)."""
    total, classes = np.zeros(len(counts)), np.zeros(len(counts))
    for images in members:
        drawn = counts[:, images]
        number = drawn.sum(1)
        total += drawn @ same[images].mean(1) / np.maximum(number, 1)
        classes += number > 0
    return total / classes


def _same_parts(near: Tensor, others: Tensor) -> Tensor:
    return (near == others).all(2)
