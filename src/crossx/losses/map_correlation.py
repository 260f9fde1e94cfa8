"""Losses of the correlation of maps over positions: of different parts, and of an image and its view."""

from __future__ import annotations

import torch
from torch import Tensor

from crossx.distributed import at_least_float32, batch_mean

FLAT = 1e-8
"""Variance, relative to the map's squared level, at which a map counts as flat: it halves its squared correlations."""
HIDDEN = 1e-3
"""Share of a position below which a view hardly shows it."""


def map_correlations(first: Tensor, second: Tensor, weights: Tensor) -> Tensor:
    """Return Pearson's r over the positions of each map and its counterpart, each position with a weight, (B, M).

    A flat map, or an image without weights, has r = 0. Computed in float32 at least.

    Args:
        first: (B, M, h, w).
        second: (B, M, h, w).
        weights: (B, h, w), not negative.
    """
    shares = at_least_float32(weights).flatten(1)  # (B, h, w) -> (B, h*w)
    tiny = torch.finfo(shares.dtype).tiny
    shares = (shares / shares.sum(1, keepdim=True).clamp(min=tiny))[:, None]  # -> (B, 1, h*w)

    def standardize(maps: Tensor) -> Tensor:
        values = at_least_float32(maps).flatten(2)  # (B, M, h, w) -> (B, M, h*w)
        level = (values.abs() * shares).sum(2, keepdim=True)  # -> (B, M, 1)
        values = values / torch.where(level > tiny, level, 1)
        deviations = values - (values * shares).sum(2, keepdim=True)
        return deviations * ((deviations.square() * shares).sum(2, keepdim=True) + FLAT).rsqrt()

    return (standardize(first) * standardize(second) * shares).sum(2)


def separation_loss(maps: Tensor, weights: Tensor) -> Tensor:
    """Return the mean correlation of the maps of two parts, from -1 to 1, averaged over pairs of parts and images.

    With the activation of the object as weights, maps that are alike on the object are penalised, whatever they are
    elsewhere. With M maps the mean is at least -1 / (M - 1). In a process group this is the rank's part of the mean
    over the whole batch (``crossx.distributed``).

    Args:
        maps: (B, M, h, w), at least two maps.
        weights: (B, h, w), see ``map_correlations``.
    """
    first, second = torch.triu_indices(maps.shape[1], maps.shape[1], 1, device=maps.device)
    correlations = map_correlations(maps[:, first], maps[:, second], weights)  # (B, M * (M - 1) / 2)
    return batch_mean(correlations.mean(), len(maps))


def view_loss(maps: Tensor, others: Tensor, shown: Tensor) -> Tensor:
    """Return 1 minus the correlation of maps of images and of their views, from 0 to 2, averaged over maps and images.

    ``equivariance_loss`` is the same with the cosine, for maps that are shares of a position. That of activations,
    which are not negative, is close to 1 for any two maps. In a process group this is the rank's part of the mean over
    the whole batch (``crossx.distributed``).

    Args:
        maps: (B, P, h, w).
        others: Those of transformed views of the images, turned back (``AffineView.undo``), (B, P, h, w).
        shown: A map of ones of the view, turned back, (B, h, w): how much of each position the view shows.
    """
    correlations = map_correlations(maps, others / shown[:, None].clamp(min=HIDDEN), shown)
    return batch_mean(1 - correlations.mean(), len(maps))
