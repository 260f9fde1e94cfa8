"""The losses of PDiscoNet and PDiscoFormer, by which attention maps become the parts of objects.

PDiscoNet: van der Klis et al., ICCV 2023, https://arxiv.org/abs/2309.03173. PDiscoFormer: Aniraj et al., ECCV 2024,
https://arxiv.org/abs/2407.04538. The maps are shares of each position: they add up to 1 over the parts and the
background. In a process group each loss is the rank's part of that of the whole batch (``crossx.distributed``).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from crossx.distributed import at_least_float32, batch_mean, gather_over_ranks

WINDOW = 3
"""Side of the window, in positions, over which a part must be present."""


def centroid_concentration_loss(maps: Tensor) -> Tensor:
    """Return the spread of each map around its centroid c, averaged over images, maps and positions.

    ``m(x, y) ((x - c_x)^2 / w^2 + (y - c_y)^2 / h^2)``, the concentration loss of PDiscoNet. That of MA-CNN
    (``concentration_loss``) is around the peak instead.

    Args:
        maps: Maps of the parts without the background, (B, P, h, w).
    """
    maps = at_least_float32(maps)
    height, width = maps.shape[2:]
    rows = torch.arange(height, device=maps.device, dtype=maps.dtype) / height
    columns = torch.arange(width, device=maps.device, dtype=maps.dtype) / width
    # the spread is least around the centroid, so that its gradient is zero
    shares = maps.detach()
    total = shares.sum((2, 3)).clamp(min=torch.finfo(maps.dtype).tiny)
    y = (shares.sum(3) * rows).sum(2) / total  # (B, P, h, w) -> (B, P, h) -> (B, P)
    x = (shares.sum(2) * columns).sum(2) / total
    spread = (rows - y[..., None]).square()[..., None] + (columns - x[..., None]).square()[:, :, None]
    return batch_mean((maps * spread).mean(), len(maps))


def orthogonality_loss(features: Tensor) -> Tensor:
    """Return the mean squared cosine between the features of different parts, with zeros for each and itself.

    Args:
        features: Features of the parts and the background, (B, M, D).
    """
    unit = F.normalize(at_least_float32(features), dim=2)
    with torch.autocast(features.device.type, enabled=False):
        cosines = unit @ unit.transpose(1, 2)  # (B, M, D) -> (B, M, M)
    same = torch.eye(cosines.shape[1], dtype=torch.bool, device=cosines.device)
    return batch_mean(cosines.masked_fill(same, 0).square().mean(), len(features))


def equivariance_loss(maps: Tensor, others: Tensor) -> Tensor:
    """Return 1 minus the mean cosine, over positions, between maps of images and maps of their views.

    Args:
        maps: Maps of the parts in the images, (B, P, h, w).
        others: Those in transformed views of the images, turned back (``AffineView.undo``), (B, P, h, w).
    """
    own, other = (
        at_least_float32(tensor).flatten(2) for tensor in (maps, others)
    )  # (B, P, h, w) -> (B, P, h*w)
    return batch_mean(1 - F.cosine_similarity(own, other, dim=2).mean(), len(maps))


def presence_loss(maps: Tensor, border: int = 2) -> Tensor:
    """Return 1 minus the strongest presence of each part in any image of the batch, averaged over the parts.

    The presence at a position is the mean over 3 x 3 positions. In a process group all ranks' images count.

    Args:
        maps: Maps of the parts, with or without the background, (B, M, h, w).
        border: Positions at each edge that do not count: 2 in PDiscoNet, 0 in PDiscoFormer. Fewer on maps that are too
            small for it.
    """
    maps = at_least_float32(maps)
    window = [min(WINDOW, side) for side in maps.shape[2:]]
    inner = _inner(maps, border, window)
    strongest = F.avg_pool2d(inner, window, stride=1).amax((2, 3))  # (B, M, h, w) -> (B, M)
    return 1 - gather_over_ranks(strongest)[0].amax(0).mean()


def _inner(maps: Tensor, border: int, window: Sequence[int]) -> Tensor:
    """Cut positions off each edge of maps (..., h, w), fewer where less than the window would remain."""
    height, width = maps.shape[-2:]
    top, left = (
        max(0, min(border, (side - own) // 2)) for side, own in zip((height, width), window, strict=True)
    )
    return maps[..., top : height - top, left : width - left]


def relative_presence(maps: Tensor, everything: Tensor) -> Tensor:
    """Return activations of parts relative to the strongest presence of anything in the image, (B, P, h, w).

    ``presence_loss`` without a border is then 0 if each part takes all of the most active window of some image.

    Args:
        maps: Activations of the parts, (B, P, h, w).
        everything: Activation of the parts and all else together, (B, h, w).
    """
    window = [min(WINDOW, side) for side in everything.shape[1:]]
    strongest = F.avg_pool2d(everything[:, None], window, stride=1).amax((1, 2, 3))  # (B, h, w) -> (B,)
    return maps / strongest.clamp(min=torch.finfo(maps.dtype).tiny)[:, None, None, None]


def image_presence_loss(shares: Tensor, everything: Tensor, border: int = 1) -> Tensor:
    """Return 1 minus the presence of each part in each image, averaged over parts and images.

    The presence is ``max_i a_p(i) O(i) / max_i O(i)``: 1 if the part has a most active position of the image to itself.
    ``presence_loss`` is over the batch instead, so that a part may be absent from images. An image without activation
    counts as 1.

    Args:
        shares: a, (B, P, h, w).
        everything: O, activation of the whole object, not negative, (B, h, w).
        border: Positions at each edge that do not count, fewer on maps of less than three rows or columns. Networks
            tell a corner from all else by the padding, so that a part could stay there.
    """
    shares, everything = (_inner(maps, border, (1, 1)) for maps in (shares, everything))
    strongest = everything.amax((1, 2)).clamp(min=torch.finfo(everything.dtype).tiny)  # (B, h, w) -> (B,)
    present = (shares * everything[:, None]).amax((2, 3)) / strongest[:, None]  # (B, P, h, w) -> (B, P)
    return batch_mean(1 - present.mean(), len(shares))


def border_loss(background: Tensor) -> Tensor:
    """Return the share of all parts together in the outermost positions, averaged over positions and images.

    Objects are seldom at the border of an image: what looks like the border is background, also elsewhere.
    ``background_presence_loss`` asks for some background near the border only.

    Args:
        background: Share of the background, (B, h, w).
    """
    parts = 1 - at_least_float32(background)
    border = outermost(parts)
    return batch_mean((parts * border).sum((1, 2)).mean() / border.sum(), len(background))


def outermost(maps: Tensor) -> Tensor:
    """Return which positions of maps (..., h, w) are in the outermost rows and columns, bool (h, w)."""
    border = torch.ones(maps.shape[-2:], dtype=torch.bool, device=maps.device)
    border[1:-1, 1:-1] = False
    return border


def background_presence_loss(background: Tensor) -> Tensor:
    """Return the negative logarithm of the strongest presence of the background near the edges, averaged over images.

    The presence, see ``presence_loss``, is weighted by the squared distance from the centre, 1 in the corners: the
    enforced presence loss of PDiscoFormer.

    Args:
        background: Map of the background, (B, h, w).
    """
    maps = at_least_float32(background)
    window = [min(WINDOW, side) for side in maps.shape[1:]]
    pooled = F.avg_pool2d(maps[:, None], window, stride=1)[:, 0]  # (B, h, w) -> (B, 1, h, w) -> (B, h', w')
    height, width = pooled.shape[1:]
    # a single row or column is at the edge
    y, x = (
        (
            torch.linspace(-1, 1, side, device=maps.device, dtype=maps.dtype)
            if side > 1
            else maps.new_ones(1)
        ).square()
        for side in (height, width)
    )
    strongest = (pooled * (y[:, None] + x) / 2).amax((1, 2)).clamp(max=1)
    # finite where there is no background
    logarithm = strongest.clamp(min=torch.finfo(maps.dtype).tiny).log()
    return batch_mean(-logarithm.mean(), len(maps))


def total_variation_loss(maps: Tensor) -> Tensor:
    """Return the absolute differences between neighbouring positions, summed over maps and averaged over positions.

    Args:
        maps: Maps of the parts and the background, (B, M, h, w).
    """
    maps = at_least_float32(maps)
    total = maps.diff(dim=2).abs().sum() + maps.diff(dim=3).abs().sum()
    return batch_mean(total / (len(maps) * maps.shape[2] * maps.shape[3]), len(maps))


def assignment_entropy_loss(maps: Tensor) -> Tensor:
    """Return the entropy of each position's shares, in nats, averaged over positions and images.

    Args:
        maps: Maps of the parts and the background, (B, M, h, w), of sum 1 at each position.
    """
    maps = at_least_float32(maps)
    # finite, with its gradient, for a share of 0
    logarithm = maps.clamp(min=torch.finfo(maps.dtype).tiny).log()
    return batch_mean(-(maps * logarithm).sum(1).mean(), len(maps))
