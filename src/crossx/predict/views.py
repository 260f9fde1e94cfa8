"""Views of an image that a prediction averages over: crops and their mirror images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from torch import Tensor
from torchvision.transforms.v2 import functional as vision

from crossx.data.geometry import resized_side
from crossx.data.transforms import batch_images, eval_transform, square_transform
from crossx.errors import UsageError
from crossx.predict.inputs import OneImage, decode
from crossx.runs import Preprocessing

CROPS = (1, 5)


class Views:
    """Prepare images and split them into views.

    Args:
        preprocessing: Preprocessing of the run.
        flip: Whether to add the mirror image of each view.
        crops: 1, the centre, or 5, the four corners of the resized image's central square and its centre.

    Raises:
        UsageError: If the crops are not possible.
    """

    def __init__(self, preprocessing: Preprocessing, *, flip: bool = False, crops: int = 1) -> None:
        self.flip, self.crops = flip, crops
        self._side = preprocessing.image_size
        if crops not in CROPS:
            raise UsageError(f"crops must be 1 or 5, not {crops}.")
        if crops != 1 and resized_side(preprocessing) <= self._side:
            raise UsageError(
                f"crops: the run resizes images to the {self._side} pixels that it crops, so that 5 crops would be "
                "one. Leave it at 1."
            )
        self._transform = eval_transform(preprocessing) if crops == 1 else square_transform(preprocessing)

    def prepare(self, item: OneImage) -> Tensor:
        """Decode, resize and crop an image; see ``Predictor.prepare``."""
        return self._transform(self.read(item))

    def read(self, item: OneImage) -> Tensor:
        """Decode an image; ``prepare`` takes the result, too."""
        return self._transform.read(item) if isinstance(item, Path | bytes) else decode(item)

    def split(self, images: Sequence[Tensor] | Tensor) -> Iterator[Tensor]:
        """Yield the views of a batch of prepared images, each uint8 (B, 3, S, S)."""
        batch = images if isinstance(images, Tensor) else batch_images(images)
        for crop in [batch] if self.crops == 1 else vision.five_crop(batch, [self._side, self._side]):
            yield crop
            if self.flip:
                yield crop.flip(-1)

    def centres(self, images: Sequence[Tensor] | Tensor) -> Tensor:
        """Return the centre crops, uint8 (B, 3, S, S), of a batch of prepared images."""
        batch = images if isinstance(images, Tensor) else batch_images(images)
        return batch if self.crops == 1 else vision.center_crop(batch, [self._side, self._side])
