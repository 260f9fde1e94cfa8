"""Views of an image that a prediction averages over: crops and their mirror images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as vision

from crossx.data.geometry import resized_side
from crossx.data.transforms import batch_images, eval_transform, square_transform
from crossx.errors import UsageError, check_flag
from crossx.runs import Preprocessing

CROPS = (1, 5)


def views_key(*, flip: bool, crops: int) -> str:
    """Return the key in ``model.json`` of what was calibrated for these views: ``1``, ``1+flip``, ``5``, ``5+flip``."""
    return f"{crops}+flip" if flip else str(crops)


def has_crops(preprocessing: Preprocessing) -> bool:
    """Whether the resized image is larger than the crop, so that 5 crops differ."""
    return resized_side(preprocessing) > preprocessing.image_size


class Views:
    """Split prepared images into views.

    Args:
        preprocessing: Preprocessing of the run.
        flip: Whether to add the mirror image of each view.
        crops: 1, the centre, or 5, the four corners of the resized image's central square and its centre.

    Attributes:
        transform: Prepares a decoded image, see ``Predictor.prepare``.

    Raises:
        UsageError: If the crops are not possible, or ``flip`` is neither True nor False.
    """

    def __init__(self, preprocessing: Preprocessing, *, flip: bool = False, crops: int = 1) -> None:
        check_flag("flip", flip)
        self.flip, self.crops = flip, crops
        self._side, self._resized = preprocessing.image_size, resized_side(preprocessing)
        if crops not in CROPS:
            raise UsageError(f"crops must be 1 or 5, not {crops}.")
        if crops != 1 and not has_crops(preprocessing):
            raise UsageError(
                f"crops: the run resizes images to the {self._side} pixels that it crops, so that 5 crops would be "
                "one. Leave it at 1."
            )
        self.transform = eval_transform(preprocessing) if crops == 1 else square_transform(preprocessing)

    @property
    def key(self) -> str:
        """See ``views_key``."""
        return views_key(flip=self.flip, crops=self.crops)

    def split(self, images: Sequence[Tensor] | Tensor) -> Iterator[Tensor]:
        """Yield the views of a batch of prepared images, each uint8 (B, 3, S, S)."""
        batch = self._batch(images)
        for crop in [batch] if self.crops == 1 else vision.five_crop(batch, [self._side, self._side]):
            yield crop
            if self.flip:
                yield crop.flip(-1)

    def centres(self, images: Sequence[Tensor] | Tensor) -> Tensor:
        """Return the centre crops, uint8 (B, 3, S, S), of a batch of prepared images."""
        batch = self._batch(images)
        return batch if self.crops == 1 else vision.center_crop(batch, [self._side, self._side])

    def _batch(self, images: Sequence[Tensor] | Tensor) -> Tensor:
        if isinstance(images, Tensor):
            return images
        if isinstance(images, str) or not all(isinstance(image, Tensor) for image in images):
            raise UsageError(
                "prepared images are tensors: prepare files with Predictor.prepare, or use an iter_ method."
            )
        if not images:
            side = self._side if self.crops == 1 else self._resized
            return torch.empty(0, 3, side, side, dtype=torch.uint8)
        return batch_images(images)


def mean_probabilities(views: Sequence[Tensor], temperature: float) -> Tensor:
    """Return the mean over the views of softmax(logits / temperature), (B, K), of their logits (B, K) each."""
    return torch.stack([(logits / temperature).softmax(1) for logits in views]).mean(0)
