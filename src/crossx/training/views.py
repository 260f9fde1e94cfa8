"""Run the frozen layers once per augmented view of each training image."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from crossx.backbones import EarlyLayers, can_skip
from crossx.data.datamodule import DataModule
from crossx.data.views import StoredViews
from crossx.errors import UsageError
from crossx.layers import evaluation_mode
from crossx.methods.base import Method
from crossx.training.sections import OptimConfig

WITHOUT = "Give --optim.cached_views 0."


def early_layers(method: Method, config: OptimConfig) -> EarlyLayers | None:
    """Return the layers that ``cached_views`` runs only once, for a method with frozen layers; None if it is off.

    Raises:
        UsageError: If the method does not support it.
    """
    if not config.cached_views or config.freeze_stride is None:
        return None
    if method.uses_parts:
        raise UsageError(f"method {method.name!r} needs images with parts. {WITHOUT}")
    trunks = method.trunks()
    if len(trunks) != 1:
        raise UsageError(f"method {method.name!r} has {len(trunks)} trunks. {WITHOUT}")
    early = EarlyLayers(trunks[0], config.freeze_stride)
    # such as gates within the last block
    if any(parameter.requires_grad for parameter in early.parameters()):
        raise UsageError(
            f"method {method.name!r} has layers of its own up to the map of optim.freeze_stride "
            f"{config.freeze_stride}, which would not be trained. Give a smaller stride, or "
            "--optim.cached_views 0."
        )
    return early


@torch.no_grad()
def check_early_layers(early: EarlyLayers, method: Method, image_size: int) -> None:
    """Check that a network computes the same from the maps of its early layers as from images.

    Args:
        early: The layers.
        method: The network that they belong to, on the CPU.
        image_size: Side of the images in pixels.

    Raises:
        UsageError: If it does not.
    """
    images = torch.randn(2, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))
    targets = torch.arange(2)

    def compute(images: Tensor) -> list[Tensor]:
        # the terms too, some of which are of views of the images
        return [method(images), *method.objective(images, targets).terms.values()]

    if not can_skip(early, method, images, compute):
        raise UsageError(
            f"method {method.name!r} on backbone {method.backbone.name!r} uses the images not only through its first "
            f"layers. {WITHOUT}"
        )


@torch.no_grad()
def store_views(
    early: EarlyLayers,
    method: Method,
    data: DataModule,
    views: int,
    folder: Path,
    prepare: Callable[[tuple[Tensor, ...]], Tensor],
) -> StoredViews:
    """Run the early layers on the augmented training images of the first epochs, and store their maps.

    Args:
        early: The layers.
        method: The network that they belong to, on its device.
        data: The images.
        views: Number of epochs, each with its own augmentation.
        folder: Where the maps are stored; see ``StoredViews``.
        prepare: Turns a batch into normalised images (B, 3, H, W) on the device.

    Raises:
        CrossXError: If there is no room for the maps, or an image cannot be read.
    """
    labels = [record.label for record in data.train_records()]
    stored, first = None, 0
    draws = StoredViews.order(len(labels), views)
    with evaluation_mode(method):
        for batch in data.views_loader(draws):
            images = prepare(batch)
            maps = early(images)
            if stored is None:
                stored = StoredViews(labels, views, maps.shape[1:], folder)
            stored.write(first, maps)
            first += len(maps)
    assert stored is not None
    return stored
