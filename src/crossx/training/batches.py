"""The training batches on the device: images, or stored maps of the frozen layers."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sized
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from crossx.data.datamodule import DataModule
from crossx.data.views import StoredViews
from crossx.errors import UsageError
from crossx.training.task import Task
from crossx.training.views import store_views


class TrainBatches:
    """Batches to train on, and to prepare a method with.

    Args:
        data: The images.
        device: Where the batches are needed.

    Attributes:
        stored: Maps of the frozen layers that are trained on in place of images; None for images.
    """

    def __init__(self, data: DataModule, device: torch.device) -> None:
        self.data, self.device = data, device
        self.stored: StoredViews | None = None

    def store(self, task: Task, views: int, folder: Path, *, shows: bool) -> None:
        """Run the frozen layers once per view; from now on the batches are their maps.

        Args:
            task: The network, on its device, with early layers.
            views: Augmented views per image.
            folder: Where the maps are stored.
            shows: Whether to say that this takes long.
        """
        assert task.early is not None
        if shows:
            images = len(self.data.train_records())
            print(f"running the frozen layers once: {images:,} images x {views}", file=sys.stderr)
        self.stored = store_views(
            task.early, task.method, self.data, views, folder,
            lambda batch: self.to_device(batch)[0].to(memory_format=task.memory_format),
        )  # fmt: skip
        task.takes_maps = True

    def loader(self, *, dealt: bool = True) -> Any:
        """Return the loader of this rank's batches, or of all if they are not ``dealt`` to the ranks."""
        if self.stored is not None:
            return self.data.stored_loader(self.stored, dealt=dealt)
        return self.data.train_dataloader() if dealt else self.data.whole_train_loader()

    def to_device(self, batch: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Move a batch to the device: normalised images, or maps in float32, and targets."""
        if self.stored is None:
            return self.data.to_device(batch, self.device)
        maps, targets = (tensor.to(self.device, non_blocking=True) for tensor in batch)
        return maps.float(), targets

    def all(self, *, epochs: int = 1) -> Iterator[Any]:
        """Yield the batches of whole epochs on the device, the same on each rank, so that nothing is gathered."""
        # a generator, so that no worker starts if the method prepares nothing
        loader = self.loader(dealt=False)
        for epoch in range(epochs):
            loader.sampler.set_epoch(epoch)
            for batch in loader:
                yield self.to_device(batch)


def limited(split: str, limit: int | float, loader: Sized) -> int:
    """Return the number of batches to take: a whole number of them, or a fraction.

    Raises:
        UsageError: If a fraction leaves none.
    """
    count = int(len(loader) * limit) if isinstance(limit, float) else min(len(loader), limit)
    if len(loader) and limit and not count:
        raise UsageError(f"trainer.limit_{split}_batches {limit} leaves none of {len(loader)} batches.")
    return count
