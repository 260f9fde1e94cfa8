"""The channel grouping losses of MA-CNN: compact attention maps that differ between parts."""

from __future__ import annotations

import torch
from torch import Tensor

from crossx.distributed import at_least_float32, batch_mean


def concentration_loss(maps: Tensor) -> Tensor:
    """Return ``sum over p, x, y of m_p(x, y) ((x - t_x)^2 + (y - t_y)^2)``, averaged over images.

    ``Dis`` of Zheng et al. 2017 (https://doi.org/10.1109/ICCV.2017.557): t is the peak of the part's map, so the loss
    is small if the map is concentrated there. Distances are in spatial positions. In a process group this is the rank's
    part of the mean over the whole batch (``crossx.distributed``).

    Args:
        maps: Attention maps of the parts, (B, P, h, w), not negative.
    """
    maps = at_least_float32(maps)
    height, width = maps.shape[2:]
    peaks = maps.flatten(2).argmax(2)[..., None]  # (B, P, h, w) -> (B, P, 1)
    columns = (torch.arange(width, device=maps.device) - peaks % width).square()  # (B, P, w)
    rows = (torch.arange(height, device=maps.device) - peaks // width).square()  # (B, P, h)
    distances = rows[..., None] + columns[:, :, None]  # (B, P, h, 1) and (B, P, 1, w) -> (B, P, h, w)
    return batch_mean((maps * distances).sum((1, 2, 3)).mean(), len(maps))


def diversity_loss(maps: Tensor, margin: float = 0.02) -> Tensor:
    """Return ``sum over p, x, y of m_p(x, y) (max over k != p of m_k(x, y) - margin)``, averaged over images.

    ``Div`` of Zheng et al. 2017 (https://doi.org/10.1109/ICCV.2017.557): it grows where a part attends to what another
    one attends to. For maps that sum to 1 the margin subtracts P times itself, without a gradient. In a process group
    this is the rank's part of the mean over the whole batch (``crossx.distributed``).

    Args:
        maps: Attention maps of the parts, (B, P, h, w), not negative; at least two parts.
        margin: Subtracted from the strongest other map.
    """
    maps = at_least_float32(maps)
    # the strongest map is the strongest other one of all parts but the strongest, whose is the second
    strongest, which = maps.topk(2, dim=1)  # (B, P, h, w) -> 2 x (B, 2, h, w)
    parts = torch.arange(maps.shape[1], device=maps.device)[:, None, None]
    others = torch.where(parts == which[:, :1], strongest[:, 1:], strongest[:, :1])  # -> (B, P, h, w)
    return batch_mean((maps * (others - margin)).sum((1, 2, 3)).mean(), len(maps))
