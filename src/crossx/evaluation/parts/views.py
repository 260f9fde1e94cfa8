"""Whether maps move with the image, or stay in place: flipped, turned and zoomed images, and maps of fixed positions.

All maps are (B, P, h, w), as in ``measures``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from crossx.evaluation.parts.measures import correlation, zoom, zoom_maps

TILT = 10.0
"""Angle of the view ``tilt``, in degrees."""

FIXED_SIDE = 14
"""Maps are compared with those of other images at this resolution at most (stride 32 at 448 pixels)."""

POSITION_MAPS = ("rows", "columns", "ring")
"""Distance from the top, from the left, and from the centre of the crop."""


class View(NamedTuple):
    """A geometric change of an image.

    Attributes:
        images: Returns the changed images, (B, 3, H, W).
        maps: Returns what the maps of unchanged images become if they move with the image; takes the maps and the
            height and width of the images.
        kept: Returns which positions (h, w) of the changed maps show something that the image showed.
    """

    images: Callable[[Tensor], Tensor]
    maps: Callable[[Tensor, Sequence[int]], Tensor]
    kept: Callable[[int, int], Tensor]


def tilt(images: Tensor, padding: str = "reflection") -> Tensor:
    """Return images or maps (B, C, H, W), turned by ``TILT`` degrees about their centre."""
    grid = _turned_grid(*images.shape[2:]).to(images)
    return F.grid_sample(
        images,
        grid.expand(len(images), -1, -1, -1),
        mode="bilinear",
        padding_mode=padding,
        align_corners=False,
    )


def _turned_grid(height: int, width: int) -> Tensor:
    angle = math.radians(TILT)
    # normalised coordinates have different units along the two sides
    theta = torch.tensor(
        [
            [math.cos(angle), -math.sin(angle) * height / width, 0.0],
            [math.sin(angle) * width / height, math.cos(angle), 0.0],
        ]
    )
    return F.affine_grid(theta[None], [1, 1, height, width], align_corners=False)


def _all(height: int, width: int) -> Tensor:
    return torch.ones(height, width, dtype=torch.bool)


VIEWS: Mapping[str, View] = {
    "flip": View(lambda images: images.flip(3), lambda maps, _: maps.flip(3), _all),
    "upside_down": View(lambda images: images.flip(2), lambda maps, _: maps.flip(2), _all),
    "quarter_turn": View(lambda images: images.rot90(1, (2, 3)), lambda maps, _: maps.rot90(1, (2, 3)), _all),
    "tilt": View(
        tilt,
        lambda maps, _: tilt(maps, "border"),
        lambda height, width: (_turned_grid(height, width)[0].abs() <= 1).all(-1),
    ),
    "zoom": View(zoom, zoom_maps, _all),
}
"""Name -> view. ``zoom`` is the upper left window of the image, enlarged."""


def measure_views(maps: Tensor, seen: Mapping[str, Tensor], image_size: Sequence[int]) -> dict[str, Tensor]:
    """Compare the maps of images with those of their views.

    Args:
        maps: (B, P, h, w), of one stage.
        seen: View -> the maps of ``VIEWS[view].images(images)``.
        image_size: Height and width of the images, in pixels.

    Returns:
        For each view, Pearson's r with the maps of the view: of the maps moved with the image (``VIEW``, (B, P)), and
        of the maps as they are (``VIEW_frame``); and between these two (``VIEW_symmetry``). ``follows`` is the mean of
        ``VIEW`` - ``VIEW_frame`` over the views: above 0 for maps that move with the image, below 0 for maps that stay
        in place. For P > 1 ``difference_follows`` (B,) is the same for the differences between the maps, see
        ``differences``, averaged over the maps, and ``difference_possible`` (B,) what it would be if they moved exactly
        with the image: a view that changes a map little, as a tilt does, cannot show much.
    """
    measures: dict[str, Tensor] = {}
    for name, of_view in seen.items():
        moved, kept, here = _in_view(name, maps, of_view, image_size)
        measures[name] = correlation(kept, moved)
        measures[f"{name}_frame"] = correlation(kept, here)
        measures[f"{name}_symmetry"] = correlation(moved, here)
    measures["follows"] = torch.stack([measures[name] - measures[f"{name}_frame"] for name in seen]).mean(0)
    if maps.shape[1] > 1:
        between = differences(maps)
        margins, possible = [], []
        for name, of_view in seen.items():
            moved, kept, here = _in_view(name, between, differences(of_view), image_size)
            margins.append((correlation(kept, moved) - correlation(kept, here)).mean(1))
            possible.append(1 - correlation(moved, here).mean(1))
        measures["difference_follows"] = torch.stack(margins).mean(0)
        measures["difference_possible"] = torch.stack(possible).mean(0)
    return measures


def _in_view(
    name: str, maps: Tensor, of_view: Tensor, image_size: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the moved maps, those of the view and the unmoved ones at the positions to compare, (B, P, 1, n)."""
    view = VIEWS[name]
    moved = view.maps(maps, image_size)
    if of_view.shape != moved.shape:
        of_view = F.interpolate(of_view, moved.shape[2:], mode="bilinear", align_corners=False)
    here = maps
    if here.shape != moved.shape:  # a quarter turn of maps that are not square
        here = F.interpolate(here, moved.shape[2:], mode="bilinear", align_corners=False)
    kept = view.kept(moved.shape[2], moved.shape[3]).to(maps.device)
    return moved[..., kept][:, :, None], of_view[..., kept][:, :, None], here[..., kept][:, :, None]


def differences(maps: Tensor) -> Tensor:
    """Return what distinguishes each map of an image from the others, (B, P, h, w); P > 1.

    Each map is standardised over its positions, then the mean over the P maps is subtracted. Maps that are equal up to
    1e-3 of their standard deviation have no difference: zeros.
    """
    centred = maps - maps.mean((2, 3), keepdim=True)
    deviation = centred.square().mean((2, 3), keepdim=True).sqrt()
    scale = maps.abs().amax((2, 3), keepdim=True)
    flat = deviation <= 1e-6 * scale
    standardized = torch.where(flat, 0.0, centred / torch.where(flat, 1.0, deviation))
    between = standardized - standardized.mean(1, keepdim=True)
    return torch.where(between.abs().amax((2, 3), keepdim=True) > 1e-3, between, 0.0)


def position_maps(height: int, width: int) -> Tensor:
    """Return the ``POSITION_MAPS``, (3, height, width): centres of the positions in shares of the crop's sides."""
    y = ((torch.arange(height) + 0.5) / height)[:, None].expand(height, width)
    x = ((torch.arange(width) + 0.5) / width)[None].expand(height, width)
    return torch.stack([y, x, torch.hypot(y - 0.5, x - 0.5)])


def measure_positions(maps: Tensor) -> dict[str, Tensor]:
    """Return Pearson's r of each map with each of ``POSITION_MAPS``, name -> (B, P); 0 if one is constant."""
    fixed = position_maps(maps.shape[2], maps.shape[3]).to(maps)
    return {
        name: correlation(maps, of_name.expand_as(maps))
        for name, of_name in zip(POSITION_MAPS, fixed, strict=True)
    }


def thumbnails(maps: Tensor) -> Tensor:
    """Return maps of at most ``FIXED_SIDE`` positions per side, (B, P, h, w), for comparison between images."""
    return F.adaptive_avg_pool2d(maps, (min(maps.shape[2], FIXED_SIDE), min(maps.shape[3], FIXED_SIDE)))


def likeness(maps: Tensor) -> Tensor:
    """Return Pearson's r of each map with the mean of the same excitation's maps of the other images, (N, P).

    Maps are standardised before they are averaged. 1: the map is the same in every image. 0 without other images, or
    for constant maps.
    """
    values = maps.double().flatten(2)  # (N, P, hw)
    centred = values - values.mean(2, keepdim=True)
    length = centred.norm(dim=2, keepdim=True)
    flat = length <= 1e-6 * values.abs().amax(2, keepdim=True)
    unit = torch.where(flat, 0.0, centred / torch.where(flat, 1.0, length))
    total = unit.sum(0)
    of_all = (unit * total).sum(2)
    own = unit.square().sum(2)
    # of total - unit, without storing it
    rest = (total.square().sum(1) - 2 * of_all + own).clamp(min=0).sqrt()
    return torch.where(rest > 1e-6, (of_all - own) / rest.clamp(min=1e-6), 0.0).clamp(-1, 1)
