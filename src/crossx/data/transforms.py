"""From an image file to the network's input: bytes in the worker, normalised floats on the device.

Workers return uint8 (3, S, S), a quarter of the size of floats; ``Normalize`` converts batches to floats on the device.
Only the part that the crop keeps is resized, as bytes and with antialiasing. Images are channels last in memory, as
decoded: torch resizes them in half the time and nothing is reordered. Every random choice comes from torch's CPU
generator, which ``ImageDataset`` seeds per image.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.data import default_collate
from torchvision.transforms import v2

from crossx.data.config import Augmentation, DataConfig
from crossx.data.geometry import DECODE_MARGIN as DECODE_MARGIN
from crossx.data.geometry import MAX_ASPECT as MAX_ASPECT
from crossx.data.geometry import (
    MAX_STRETCH,
    SMALLEST_CROP,
    aspect_limits,
    centred,
    height_without_bottom,
    min_decoded_side,
    resized_side,
    resized_size,
    whole_size,
)
from crossx.data.images import ImageSource, read_image, read_size
from crossx.data.parts import PartPoints
from crossx.runs import Preprocessing

Step: TypeAlias = Callable[[Tensor, PartPoints | None], Tensor]
"""Prepares an image; if it moves pixels, it moves the parts along."""


@dataclass(frozen=True)
class Transform:
    """Decoding and preparation of one image.

    Attributes:
        steps: Applied to the decoded image, in order.
        min_side: Minimum length of a JPEG's shorter side after decoding; None decodes at full size.
        strict: Decode with Pillow only.
        fixed: Steps without random numbers that resize the whole image, for a cache; empty if there are none.
        then: The steps after ``fixed``; together they have the result of ``steps``, bit for bit.
        fixed_size: Maps height and width of the decoded image to those after ``fixed``.
    """

    steps: tuple[Step, ...]
    min_side: int | None
    strict: bool
    fixed: tuple[Step, ...] = ()
    then: tuple[Step, ...] = ()
    fixed_size: Callable[[tuple[int, int]], tuple[int, int]] | None = None

    def read(self, source: ImageSource) -> Tensor:
        """Decode an image at the size that the steps need, see ``read_image``."""
        return read_image(source, min_side=self.min_side, pillow=self.strict)

    def size(self, source: ImageSource) -> tuple[int, int]:
        """Return height and width of what ``read`` returns, see ``read_size``."""
        return read_size(source, min_side=self.min_side, pillow=self.strict)

    def __call__(self, image: Tensor, parts: PartPoints | None = None) -> Tensor:
        """Prepare the decoded image: uint8 (3, H, W) to uint8 (3, S, S); the input is not modified.

        The image is the same with and without ``parts``, which are moved along.
        """
        for step in self.steps:
            image = step(image, parts)
        return image

    def forms(self, *, decoded_only: bool = False) -> tuple[CachedForm, ...]:
        """Return the forms in which a cache may keep the images: ``resized``, if possible, and ``decoded``."""
        reading = (self.min_side, self.strict)
        decoded = CachedForm("decoded", repr(reading), Transform((), *reading), self)
        if decoded_only or self.fixed_size is None:
            return (decoded,)
        fixed, then = Transform(self.fixed, *reading), Transform(self.then, *reading)
        key = repr((reading, [_described(step) for step in self.fixed]))
        return CachedForm("resized", key, fixed, then, self.fixed_size), decoded


@dataclass(frozen=True)
class CachedForm:
    """A form in which a cache keeps images.

    Attributes:
        name: ``decoded`` or ``resized``.
        key: Text that is the same for the same pixels of an image.
        first: What is done before an image is kept.
        then: What is left to do.
        resized: Maps height and width of the decoded image to those in this form; None keeps them.
    """

    name: Literal["decoded", "resized"]
    key: str
    first: Transform
    then: Transform
    resized: Callable[[tuple[int, int]], tuple[int, int]] | None = None

    def read(self, source: ImageSource) -> Tensor:
        """Return an image in this form, uint8 (3, H, W).

        Raises:
            ImageError: As ``read_image``.
        """
        return self.first(self.first.read(source))

    def size(self, decoded: tuple[int, int]) -> tuple[int, int]:
        """Return height and width in this form of an image that is decoded at this height and width."""
        return decoded if self.resized is None else self.resized(decoded)


def _described(step: Any) -> tuple[object, ...]:
    """Return name and arguments of a step, without mean and std, which do not change the pixels."""
    if not isinstance(step, partial):
        return (step.__name__,)
    arguments = [
        replace(value, mean=(0, 0, 0), std=(1, 1, 1)) if isinstance(value, Preprocessing) else value
        for value in step.args
    ]
    return (step.func.__name__, *arguments, sorted(step.keywords.items()))


class Normalize:
    """Convert bytes to floats, (x / 255 - mean) / std, on the device of the images."""

    def __init__(self, preprocessing: Preprocessing) -> None:
        self._scale, self._offset = self.constants(preprocessing)

    @staticmethod
    def constants(preprocessing: Preprocessing) -> tuple[Tensor, Tensor]:
        """Return scale and offset, (3,) each, such that a byte x becomes scale * x + offset."""
        mean, std = torch.tensor(preprocessing.mean), torch.tensor(preprocessing.std)
        return 1 / (255 * std), -mean / std

    def __call__(self, images: Tensor) -> Tensor:
        """Convert uint8 (B, 3, H, W) to float32 (B, 3, H, W), channels last in memory."""
        if self._scale.device != images.device:
            self._scale, self._offset = self._scale.to(images.device), self._offset.to(images.device)
        width = images.shape[-1]
        # by whole rows: broadcasting along a dimension of 3 takes a CPU three times as long
        rows = images.permute(0, 2, 3, 1).flatten(2).to(torch.float32)  # (B, 3, H, W) -> (B, H, W*3)
        rows.mul_(self._scale.repeat(width)).add_(self._offset.repeat(width))
        return rows.view(*rows.shape[:2], width, 3).permute(0, 3, 1, 2)  # (B, H, W*3) -> (B, 3, H, W)


def batch_images(images: Sequence[Tensor]) -> Tensor:
    """Stack images (3, S, S) to (B, 3, S, S), channels last in memory; in shared memory in a worker."""
    batch: Tensor = default_collate([image.permute(1, 2, 0) for image in images])  # (B, S, S, 3)
    return batch.permute(0, 3, 1, 2)  # (B, S, S, 3) -> (B, 3, S, S)


def preprocessing_for(config: DataConfig, data_config: Mapping[str, Any]) -> Preprocessing:
    """Combine the options with the preprocessing that the backbone was pretrained with.

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
    """Map from image coordinates to coordinates of the network's crop: ``scale * x + shift`` along each axis.

    Attributes:
        scale: For x and y, crop pixels per image pixel.
        shift: For x and y, in crop pixels.
    """

    scale: tuple[float, float]
    shift: tuple[float, float]

    def __call__(self, points: Tensor) -> Tensor:
        """Map points (..., 2), x and y, from image pixels to crop pixels.

        Coordinates start at the outer edge of the first pixel, whose centre is at 0.5. Points outside the crop are
        outside [0, image_size].
        """
        return points * points.new_tensor(self.scale) + points.new_tensor(self.shift)


def eval_crop_place(preprocessing: Preprocessing, height: int, width: int) -> CropPlace:
    """Return where ``eval_transform`` puts an image of this full size, at whatever size it is decoded.

    Raises:
        ImageError: If ``crop_bottom`` leaves nothing.
    """
    height = height_without_bottom(height, preprocessing.crop_bottom)
    limits = aspect_limits(height, width)
    size = resized_size(preprocessing, [length for _, length in limits])
    starts = [centred(more - preprocessing.image_size) for more in size]
    scale = [after / length for after, (_, length) in zip(size, limits, strict=True)]
    shift = [-start - s * first for start, s, (first, _) in zip(starts, scale, limits, strict=True)]
    return CropPlace((scale[1], scale[0]), (shift[1], shift[0]))


def eval_transform(preprocessing: Preprocessing) -> Transform:
    """Return the deterministic transform of evaluation: resize, then centre crop."""
    resize = partial(_resize_and_crop, preprocessing, random=False)
    return _transform(preprocessing, resize, fixed=resize, fixed_size=partial(_crop_size, preprocessing))


def square_transform(preprocessing: Preprocessing) -> Transform:
    """Return ``eval_transform`` with the largest crop: the central square of the resized image."""
    side = resized_side(preprocessing)
    return _transform(preprocessing, partial(_resize_and_crop, preprocessing, random=False, crop=side))


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
        augmentation: ``crop``: resize as in evaluation, then crop at random (the released code). ``resized_crop``: crop
            8% to 100% of the area at an aspect ratio of 3:4 to 4:3, then resize (Szegedy et al. 2015,
            https://arxiv.org/abs/1409.4842). ``trivial``: the same and one random operation of random strength
            (TrivialAugment wide, https://arxiv.org/abs/2103.10158).
        hflip: Probability of a horizontal flip.
        random_erasing: Probability of replacing a rectangle with the mean colour
            (https://arxiv.org/abs/1708.04896).
    """
    steps: list[Step] = []
    if hflip:
        steps.append(partial(_flip, probability=hflip))
    if augmentation == "trivial":
        # tensors cannot be rotated or sheared with bicubic interpolation
        steps.append(partial(_augment, _TrivialAugment(interpolation=v2.InterpolationMode.BILINEAR)))
    if random_erasing:
        mean_colour = [round(255 * mean) for mean in preprocessing.mean]
        steps.append(partial(_erase, v2.RandomErasing(random_erasing, value=mean_colour)))
    if augmentation == "crop":
        return _transform(
            preprocessing,
            partial(_resize_and_crop, preprocessing, random=True),
            *steps,
            fixed=partial(_resize_whole, preprocessing),
            then=(partial(_crop, side=preprocessing.image_size), *steps),
            fixed_size=partial(whole_size, preprocessing),
        )
    crop = v2.RandomResizedCrop(
        preprocessing.image_size, scale=(SMALLEST_CROP, 1), ratio=(1 / MAX_STRETCH, MAX_STRETCH)
    )
    first = partial(_crop_and_resize, preprocessing, crop)
    return _transform(
        preprocessing, first, *steps, min_side=min_decoded_side(preprocessing, small_crops=True)
    )


def _transform(
    preprocessing: Preprocessing, *steps: Step, fixed: Step | None = None, **options: Any
) -> Transform:
    first = (partial(_cut_bottom, rows=preprocessing.crop_bottom), _limit_aspect)
    options = {
        "min_side": min_decoded_side(preprocessing),
        "strict": preprocessing.pipeline == "strict",
        "fixed": () if fixed is None else (*first, fixed),
        **options,
    }
    return Transform((*first, *steps), **options)


def _crop_size(preprocessing: Preprocessing, decoded: tuple[int, int]) -> tuple[int, int]:
    height_without_bottom(decoded[0], preprocessing.crop_bottom)
    return preprocessing.image_size, preprocessing.image_size


def _resize_whole(preprocessing: Preprocessing, image: Tensor, parts: PartPoints | None) -> Tensor:
    return _resize(preprocessing, image, resized_size(preprocessing, image.shape[-2:]))


def _crop(image: Tensor, parts: PartPoints | None, *, side: int) -> Tensor:
    for axis in (1, 2):
        image = image.narrow(axis, _random_start(image.shape[axis] - side), side)
    return image


def _random_start(spare: int) -> int:
    return int(torch.randint(spare + 1, ())) if spare else 0


def _resize_and_crop(
    preprocessing: Preprocessing,
    image: Tensor,
    parts: PartPoints | None,
    *,
    random: bool,
    crop: int | None = None,
) -> Tensor:
    """Resize, then crop at the centre or at random; only the part that the crop keeps is resized."""
    crop = preprocessing.image_size if crop is None else crop
    size = resized_size(preprocessing, image.shape[-2:])
    spare = [length - crop for length in size]
    starts = [_random_start(more) if random else centred(more) for more in spare]
    if parts is not None:
        height, width = (after / before for after, before in zip(size, image.shape[-2:], strict=True))
        parts.move(scale=(width, height), shift=(-starts[1], -starts[0]), size=(crop, crop))
    if preprocessing.pipeline == "fast":
        reach = 2 if preprocessing.interpolation == "bicubic" else 1
        for axis in range(2):
            first, last, size[axis], starts[axis] = _window(
                image.shape[1 + axis], size[axis], starts[axis], crop, reach
            )
            image = image.narrow(1 + axis, first, last - first)
    top, left = starts
    return _resize(preprocessing, image, size)[:, top : top + crop, left : left + crop]


def _window(length: int, resized: int, start: int, crop: int, reach: int) -> tuple[int, int, int, int]:
    """Find the part of an axis that is enough to compute the crop's pixels exactly.

    It starts and ends where pixel borders before and after resizing coincide: every ``length / gcd`` pixels before,
    every ``resized / gcd`` after. A margin around the crop keeps the filter from reaching beyond the part.

    Args:
        length: Pixels before resizing.
        resized: Pixels after resizing.
        start: The crop's first pixel after resizing.
        crop: The crop's length in pixels.
        reach: Half the filter's width, in pixels of the coarser side.

    Returns:
        The part's first pixel and the one after its last, its length after resizing, and the crop's first pixel in it.
    """
    periods = math.gcd(length, resized)
    before, after = length // periods, resized // periods
    margin = reach * math.ceil(max(1, resized / length)) + 1
    first = max(0, start - margin) // after
    last = min(-(-(start + crop + margin) // after), periods)
    return first * before, last * before, (last - first) * after, start - first * after


def _crop_and_resize(
    preprocessing: Preprocessing, crop: v2.RandomResizedCrop, image: Tensor, parts: PartPoints | None
) -> Tensor:
    region = crop.make_params([image])
    top, left, height, width = (region[name] for name in ("top", "left", "height", "width"))
    cropped = image[:, top : top + height, left : left + width]
    side = preprocessing.image_size
    if parts is not None:
        parts.move(shift=(-left, -top), size=(height, width))
        parts.move(scale=(side / width, side / height), size=(side, side))
    return _resize(preprocessing, cropped, [side] * 2)


def _flip(image: Tensor, parts: PartPoints | None, *, probability: float) -> Tensor:
    if not torch.rand(1) < probability:
        return image
    if parts is not None:
        parts.flip(image.shape[-1])
    return image.flip(-1)


class _TrivialAugment(v2.TrivialAugmentWide):  # type: ignore[misc]
    """``TrivialAugmentWide`` whose drawn operation can be applied to keypoints as well."""

    moves = ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate")
    drawn: tuple[str, float] = "Identity", 0.0

    def _apply_image_or_video_transform(
        self, image: Any, transform_id: str, magnitude: float, **options: Any
    ) -> Any:
        self.drawn = transform_id, magnitude
        return super()._apply_image_or_video_transform(image, transform_id, magnitude, **options)

    def moved(self, parts: PartPoints, size: Sequence[int]) -> Tensor | None:
        """Return the points after the operation drawn last; None if it moves nothing."""
        if self.drawn[0] not in self.moves:
            return None
        points = super()._apply_image_or_video_transform(
            parts.keypoints(size), *self.drawn, interpolation=self.interpolation, fill=self._fill
        )
        return torch.as_tensor(points).as_subclass(Tensor)


def _augment(augment: _TrivialAugment, image: Tensor, parts: PartPoints | None) -> Tensor:
    augmented: Tensor = augment(image)
    size = image.shape[-2:]
    if parts is not None and (points := augment.moved(parts, size)) is not None:
        parts.replace(points, size)
    return augmented


def _erase(erasing: v2.RandomErasing, image: Tensor, parts: PartPoints | None) -> Tensor:
    # what is covered stays where it is
    erased: Tensor = erasing(image)
    return erased


def _resize(preprocessing: Preprocessing, image: Tensor, size: list[int]) -> Tensor:
    pixels = image.permute(1, 2, 0)  # (3, H, W) -> (H, W, 3)
    if preprocessing.pipeline == "strict":
        picture = Image.fromarray(pixels.numpy())
        resized = picture.resize((size[1], size[0]), Image.Resampling[preprocessing.interpolation.upper()])
        return torch.from_numpy(np.array(resized)).permute(2, 0, 1)  # (H, W, 3) -> (3, H, W)
    # channels last with the batch dimension too, else torch returns the result channels first
    batch = pixels[None].permute(0, 3, 1, 2)  # (H, W, 3) -> (1, 3, H, W)
    return interpolate(batch, size=size, mode=preprocessing.interpolation, antialias=True)[0]


def _cut_bottom(image: Tensor, parts: PartPoints | None, *, rows: int) -> Tensor:
    image = image[..., : height_without_bottom(image.shape[-2], rows), :]
    if parts is not None:
        parts.move(size=image.shape[-2:])
    return image


def _limit_aspect(image: Tensor, parts: PartPoints | None) -> Tensor:
    limits = aspect_limits(*image.shape[-2:])
    for dim, (first, length) in zip((-2, -1), limits, strict=True):
        if length < image.shape[dim]:
            image = image.narrow(dim, first, length)
    if parts is not None:
        parts.move(shift=(-limits[1][0], -limits[0][0]), size=image.shape[-2:])
    return image
