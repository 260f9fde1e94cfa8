"""Maps of several augmented views per training image, in a memory-mapped temporary file."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from crossx.data.sampler import Draw
from crossx.errors import CrossXError


class StoredViews(Dataset[tuple[Tensor, int]]):
    """Maps (C, h, w) in float16 of V augmented views of N images; the file ends with the process.

    Epoch e sees view e mod V of each image, with the augmentation of epoch e mod V.

    Args:
        labels: Class index of each image.
        views: V.
        shape: C, h, w.
        folder: Where the temporary file is made.

    Raises:
        CrossXError: If there is not enough space, or no permission to write.
    """

    def __init__(self, labels: Sequence[int], views: int, shape: Sequence[int], folder: Path) -> None:
        self.labels = list(labels)
        self.views = views
        channels, height, width = shape
        stored = (views * len(self.labels), height, width, channels)
        size = 2 * math.prod(stored)
        try:
            # a name that is removed with the leftovers of a run, where a file system gives temporary files one
            file = tempfile.TemporaryFile(prefix=".", suffix=".tmp", dir=folder)  # noqa: SIM115
            # without reserved space, writing to the mapped file on a full disk would kill the process
            os.posix_fallocate(file.fileno(), 0, size)
            self._maps = np.memmap(file, dtype=np.float16, mode="r+", shape=stored)
        except OSError as error:
            raise CrossXError(
                f"optim.cached_views {views}: {folder} has no room for {size / 1e9:,.1f} GB ({error.strerror}). Free "
                "some, or give fewer views or a smaller --data.image_size."
            ) from error

    def write(self, first: int, maps: Tensor) -> None:
        """Store maps (B, C, h, w) from position ``first`` of ``order`` on."""
        limit = torch.finfo(torch.float16).max
        stored = maps.float().clamp(-limit, limit).half().permute(0, 2, 3, 1)  # (B, C, h, w) -> (B, h, w, C)
        self._maps[first : first + len(maps)] = stored.cpu().numpy()

    @staticmethod
    def order(images: int, views: int) -> list[Draw]:
        """Return the draws in the order in which they are stored."""
        return [Draw(view, index) for view in range(views) for index in range(images)]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, draw: Draw) -> tuple[Tensor, int]:
        """Return the map, (C, h, w), and the class index."""
        view = (draw.epoch + draw.repeat) % self.views
        stored = self._maps[view * len(self.labels) + draw.index]
        return torch.from_numpy(stored).permute(2, 0, 1), self.labels[draw.index]  # (h, w, C) -> (C, h, w)
