"""From an image file to the network's input: bytes in the worker, normalised floats on the device.

A worker hands on uint8 (3, S, S), a quarter of the floats' bytes; ``Normalize`` turns batches into floats where the
network is. Only what the crop keeps is resized, on bytes with antialiasing. Images lie in (H, W, 3) order in memory,
as they are decoded: torch resizes them in half the time, and nothing has to be reordered. Every random choice is
drawn from torch's CPU generator, which ``ImageDataset`` seeds for each image.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.data import default_collate
from torchvision.transforms import v2

from crossx.data.config import Augmentation, DataConfig
from crossx.data.images import ImageError, ImageSource, read_image, read_size
from crossx.runs import Preprocessing

Step: TypeAlias = Callable[[Tensor], Tensor]

CROP_FRACTION = 0.875
"""Crop over resized size where no ``resize_size`` is given: the 224 of 256 of ImageNet evaluation."""

MAX_ASPECT = 8
"""Longer images are cut to this aspect ratio about their centre before resizing: enlarging the shorter side of a
scan line of 1 x 5000 pixels to 512 would fill the memory."""

DECODE_MARGIN = 2
"""JPEGs are decoded at 1/2, 1/4 or 1/8 of their size while their sides stay this many times what they are resized to.
Pillow's thumbnails keep the same margin (``reducing_gap`` of ``Image.thumbnail``)."""


@dataclass(frozen=True)
class Transform:
    """What happens to an image before it joins a batch.

    Attributes:
        steps: What is done with the decoded image, in order.
        min_side: Length that the shorter side of a JPEG must keep in decoding; None decodes it at full size.
        strict: Whether Pillow alone decodes.
    """

    steps: tuple[Step, ...]
    min_side: int | None
    strict: bool

    def read(self, source: ImageSource) -> Tensor:
        """Decode an image as large as the steps need it, see ``read_image``."""
        return read_image(source, min_side=self.min_side, pillow=self.strict)

    def size(self, source: ImageSource) -> tuple[int, int]:
        """Return height and width of what ``read`` gives, see ``read_size``."""
        return read_size(source, min_side=self.min_side, pillow=self.strict)

    def __call__(self, image: Tensor) -> Tensor:
        """Take the decoded image, uint8 (3, H, W), to uint8 (3, S, S); the input is left as it is."""
        for step in self.steps:
            image = step(image)
        return image


class Normalize:
    """Bytes to floats, (x / 255 - mean) / std, on the device where they are.

    Args:
        preprocessing: Mean and standard deviation.
    """

    def __init__(self, preprocessing: Preprocessing) -> None:
        self._scale, self._offset = self.constants(preprocessing)

    @staticmethod
    def constants(preprocessing: Preprocessing) -> tuple[Tensor, Tensor]:
        """Return scale and offset, (3,) each, that carry a byte x to scale * x + offset."""
        mean, std = torch.tensor(preprocessing.mean), torch.tensor(preprocessing.std)
        return 1 / (255 * std), -mean / std

    def __call__(self, images: Tensor) -> Tensor:
        """Return float32 (B, 3, H, W), channels last in memory, of uint8 (B, 3, H, W)."""
        if self._scale.device != images.device:
            self._scale, self._offset = self._scale.to(images.device), self._offset.to(images.device)
        width = images.shape[-1]
        # row by row: broadcasting along a dimension of 3 takes a CPU three times as long
        rows = images.permute(0, 2, 3, 1).flatten(2).to(torch.float32)
        rows.mul_(self._scale.repeat(width)).add_(self._offset.repeat(width))
        return rows.view(*rows.shape[:2], width, 3).permute(0, 3, 1, 2)


def batch_images(images: Sequence[Tensor]) -> Tensor:
    """Join images (3, S, S) to a batch (B, 3, S, S), channels last in memory as they lie; shared in a worker."""
    joined: Tensor = default_collate([image.permute(1, 2, 0) for image in images])
    return joined.permute(0, 3, 1, 2)


def preprocessing_for(config: DataConfig, data_config: Mapping[str, Any]) -> Preprocessing:
    """Join the options with what the backbone was pretrained with.

    Args:
        config: The ``--data.*`` options.
        data_config: timm's resolved data config of the backbone: ``mean``, ``std``, ``interpolation``.
    """
    mean, std = (tuple(float(value) for value in data_config[name]) for name in ("mean", "std"))
    return Preprocessing(
        image_size=config.image_size,
        resize_size=config.resize_size,
        interpolation=config.interpolation or data_config["interpolation"],
        mean=(mean[0], mean[1], mean[2]),
        std=(std[0], std[1], std[2]),
        crop_bottom=config.crop_bottom,
        pipeline=config.pipeline,
    )


@dataclass(frozen=True)
class CropPlace:
    """Where the points of an image are in the crop that the network sees: ``scale * x + shift`` along each axis.

    Attributes:
        scale: Of x and of y, crop pixels an image pixel.
        shift: Of x and of y, in crop pixels.
    """

    scale: tuple[float, float]
    shift: tuple[float, float]

    def __call__(self, points: Tensor) -> Tensor:
        """Return points (..., 2), x and y in pixels of the image, in pixels of the crop.

        Coordinates count from the outer edge of the first pixel, whose centre is at 0.5. Points that the crop
        leaves out lie outside [0, image_size].
        """
        return points * points.new_tensor(self.scale) + points.new_tensor(self.shift)


def eval_crop_place(preprocessing: Preprocessing, height: int, width: int) -> CropPlace:
    """Return where ``eval_transform`` puts an image of this size, whether or not it is decoded smaller.

    Raises:
        ImageError: If ``crop_bottom`` leaves nothing.
    """
    height = _height_without_bottom(height, preprocessing.crop_bottom)
    limits = _aspect_limits(height, width)
    size = _resized_size(preprocessing, [length for _, length in limits])
    starts = [_centred(more - preprocessing.image_size) for more in size]
    scale = [after / length for after, (_, length) in zip(size, limits, strict=True)]
    shift = [-start - s * first for start, s, (first, _) in zip(starts, scale, limits, strict=True)]
    return CropPlace((scale[1], scale[0]), (shift[1], shift[0]))


def eval_transform(preprocessing: Preprocessing) -> Transform:
    """Return the deterministic transform of evaluation: resize, then centre crop."""
    return _transform(preprocessing, partial(_resize_and_crop, preprocessing, random=False))


def square_transform(preprocessing: Preprocessing) -> Transform:
    """Return ``eval_transform`` with a larger crop: the central square of the resized image, as large as can be."""
    side = resized_side(preprocessing)
    return _transform(preprocessing, partial(_resize_and_crop, preprocessing, random=False, crop=side))


def resized_side(preprocessing: Preprocessing) -> int:
    """Return the length in pixels of the shorter side after resizing."""
    return preprocessing.resize_size or int(preprocessing.image_size / CROP_FRACTION)


def train_transform(
    preprocessing: Preprocessing,
    augmentation: Augmentation,
    *,
    hflip: float = 0.5,
    random_erasing: float = 0.0,
) -> Transform:
    """Return the random transform of training.

    Args:
        preprocessing: That of evaluation; sizes, interpolation, mean and std are shared.
        augmentation: ``crop``: resize as in evaluation, then a random crop (the released code's). ``resized_crop``:
            a crop of 8% to 100% of the area and an aspect ratio of 3:4 to 4:3, resized (Szegedy et al. 2015,
            https://arxiv.org/abs/1409.4842). ``trivial``: that and one random operation of random strength
            (TrivialAugment wide, https://arxiv.org/abs/2103.10158).
        hflip: Probability of a horizontal flip.
        random_erasing: Probability of replacing a rectangle with the mean colour
            (https://arxiv.org/abs/1708.04896).
    """
    steps: list[Step] = []
    if augmentation == "crop":
        steps.append(partial(_resize_and_crop, preprocessing, random=True))
    else:
        steps.append(partial(_crop_and_resize, preprocessing, v2.RandomResizedCrop(preprocessing.image_size)))
    if hflip:
        steps.append(partial(_flip, probability=hflip))
    if augmentation == "trivial":
        # rotation and shear of tensors know no bicubic
        steps.append(v2.TrivialAugmentWide(interpolation=v2.InterpolationMode.BILINEAR))
    if random_erasing:
        mean_colour = [round(255 * mean) for mean in preprocessing.mean]
        steps.append(v2.RandomErasing(random_erasing, value=mean_colour))
    return _transform(preprocessing, *steps, small_crops=augmentation != "crop")


def _transform(preprocessing: Preprocessing, *steps: Step, small_crops: bool = False) -> Transform:
    strict, rows = preprocessing.pipeline == "strict", preprocessing.crop_bottom
    # small crops need the detail, and a banner need not end on a pixel of the smaller image
    whole = strict or small_crops or rows > 0
    return Transform(
        (partial(_cut_bottom, rows=rows), _limit_aspect, *steps),
        min_side=None if whole else DECODE_MARGIN * resized_side(preprocessing),
        strict=strict,
    )


def _resize_and_crop(
    preprocessing: Preprocessing, image: Tensor, *, random: bool, crop: int | None = None
) -> Tensor:
    """Resize, then crop about the centre or at a random place, without resizing what the crop leaves out."""
    crop = preprocessing.image_size if crop is None else crop
    size = _resized_size(preprocessing, image.shape[-2:])
    spare = [length - crop for length in size]
    starts = [int(torch.randint(more + 1, ())) if random and more else _centred(more) for more in spare]
    if preprocessing.pipeline == "fast":
        reach = 2 if preprocessing.interpolation == "bicubic" else 1
        for axis in range(2):
            first, last, size[axis], starts[axis] = _window(
                image.shape[1 + axis], size[axis], starts[axis], crop, reach
            )
            image = image.narrow(1 + axis, first, last - first)
    top, left = starts
    return _resize(preprocessing, image, size)[:, top : top + crop, left : left + crop]


def _resized_size(preprocessing: Preprocessing, size: Sequence[int]) -> list[int]:
    """Return height and width after resizing of those before."""
    side = resized_side(preprocessing)
    if preprocessing.resize_size is not None:
        return [side, side]
    return [int(side * length / min(size)) for length in size]


def _centred(spare: int) -> int:
    return round(spare / 2)


def _window(length: int, resized: int, start: int, crop: int, reach: int) -> tuple[int, int, int, int]:
    """Find the part of an axis whose resizing alone gives the crop's pixels exactly.

    Such a part begins and ends where places before and after resizing coincide: every ``length / gcd`` places
    before, every ``resized / gcd`` after. A filter that reaches over its ends would miss what is beyond them, so
    they keep a distance from the crop.

    Args:
        length: Places before resizing.
        resized: Places after it.
        start: The crop's first place after resizing.
        crop: The crop's places.
        reach: Half the filter's width, in places of the coarser side.

    Returns:
        First place of the part and the one after its last, its places after resizing, and the crop's first place
        among these.
    """
    periods = math.gcd(length, resized)
    before, after = length // periods, resized // periods
    margin = reach * math.ceil(max(1, resized / length)) + 1
    first = max(0, start - margin) // after
    last = min(-(-(start + crop + margin) // after), periods)
    return first * before, last * before, (last - first) * after, start - first * after


def _crop_and_resize(preprocessing: Preprocessing, crop: v2.RandomResizedCrop, image: Tensor) -> Tensor:
    place = crop.make_params([image])
    top, left, height, width = (place[name] for name in ("top", "left", "height", "width"))
    region = image[:, top : top + height, left : left + width]
    return _resize(preprocessing, region, [preprocessing.image_size] * 2)


def _flip(image: Tensor, probability: float) -> Tensor:
    return image.flip(-1) if torch.rand(1) < probability else image


def _resize(preprocessing: Preprocessing, image: Tensor, size: list[int]) -> Tensor:
    pixels = image.permute(1, 2, 0)
    if preprocessing.pipeline == "strict":
        picture = Image.fromarray(pixels.numpy())
        resized = picture.resize((size[1], size[0]), Image.Resampling[preprocessing.interpolation.upper()])
        return torch.from_numpy(np.array(resized)).permute(2, 0, 1)
    # the dimension of the batch goes before the three in memory too, else torch answers channel by channel
    batch = pixels[None].permute(0, 3, 1, 2)
    return interpolate(batch, size=size, mode=preprocessing.interpolation, antialias=True)[0]


def _cut_bottom(image: Tensor, rows: int) -> Tensor:
    return image[..., : _height_without_bottom(image.shape[-2], rows), :]


def _height_without_bottom(height: int, rows: int) -> int:
    if height <= rows:
        reason = f"is {height} rows high and data.crop_bottom cuts off {rows}: lower it"
        raise ImageError(f"the image {reason}.", reason)
    return height - rows


def _limit_aspect(image: Tensor) -> Tensor:
    for dim, (first, length) in zip((-2, -1), _aspect_limits(*image.shape[-2:]), strict=True):
        if length < image.shape[dim]:
            image = image.narrow(dim, first, length)
    return image


def _aspect_limits(height: int, width: int) -> list[tuple[int, int]]:
    """Return the first row and the number of rows to keep, and the same of the columns."""
    longest = MAX_ASPECT * min(height, width)
    return [(max(0, length - longest) // 2, min(length, longest)) for length in (height, width)]
