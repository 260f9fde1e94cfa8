"""A loss that separates the maps of different parts."""

from __future__ import annotations

import torch
from torch import Tensor

from crossx.distributed import at_least_float32, batch_mean

FLAT = 1e-8
"""Relative variance at which a map counts as flat: it has half the correlation that it would have without this."""


def separation_loss(maps: Tensor, weights: Tensor) -> Tensor:
    """Return the mean correlation of the maps of two parts, from -1 to 1, averaged over pairs of parts and images.

    Pearson's r over positions, each counted with a weight: with the activation of the object as weights, maps that are
    alike on the object are penalised, whatever they are beside it. With M maps the mean is at least -1 / (M - 1). A
    flat map has r = 0. In a process group this is the rank's part of the mean over the whole batch
    (``crossx.distributed``).

    Args:
        maps: (B, M, h, w), not negative; at least two maps.
        weights: (B, h, w), not negative; weights of an image that are all zero give r = 0.
    """
    maps = at_least_float32(maps).flatten(2)  # (B, M, h, w) -> (B, M, h*w)
    shares = at_least_float32(weights).flatten(1)  # (B, h, w) -> (B, h*w)
    tiny = torch.finfo(maps.dtype).tiny
    shares = (shares / shares.sum(1, keepdim=True).clamp(min=tiny))[:, None]  # -> (B, 1, h*w)
    level = (maps.sum(1, keepdim=True) * shares).sum(2, keepdim=True)  # -> (B, 1, 1)
    maps = maps / torch.where(level > tiny, level, 1)
    deviations = maps - (maps * shares).sum(2, keepdim=True)
    first, second = torch.triu_indices(maps.shape[1], maps.shape[1], 1, device=maps.device)
    covariances = (deviations[:, first] * deviations[:, second] * shares).sum(2)  # -> (B, M * (M-1) / 2)
    variances = (deviations.square() * shares).sum(2) + FLAT  # -> (B, M)
    correlations = covariances * (variances[:, first] * variances[:, second]).rsqrt()
    return batch_mean(correlations.mean(), len(maps))
