"""Run the frozen layers once per augmented view of each training image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from crossx.backbones import EarlyLayers, can_skip
from crossx.data.datamodule import DataModule
from crossx.data.views import StoredViews
from crossx.errors import UsageError
from crossx.layers import evaluation_mode
from crossx.methods.base import Method
from crossx.training.config import OptimConfig

WITHOUT = "Give --optim.cached_views 0."


def early_layers(method: Method, config: OptimConfig) -> EarlyLayers | None:
    """Return the layers that ``cached_views`` runs only once; None if it is off.

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
    return EarlyLayers(trunks[0], config.freeze_stride)


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
        UsageError: If the network does not compute the same from the maps as from the images.
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
                _check(early, method, images[:2], labels[:2])
                stored = StoredViews(labels, views, maps.shape[1:], folder)
            stored.write(first, maps)
            first += len(maps)
    assert stored is not None
    return stored


def _check(early: EarlyLayers, method: Method, images: Tensor, labels: Sequence[int]) -> None:
    targets = torch.tensor(labels, device=images.device)

    def compute(images: Tensor) -> list[Tensor]:
        # the terms too, some of which are of views of the images
        return [method(images), *method.objective(images, targets).terms.values()]

    if not can_skip(early, method, images, compute):
        raise UsageError(
            f"method {method.name!r} on backbone {method.backbone.name!r} uses the images not only through its first "
            f"layers. {WITHOUT}"
        )
