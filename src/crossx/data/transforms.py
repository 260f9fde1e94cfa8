"""From a decoded image to the network's input: uint8 (3, H, W) to normalised float32 (3, S, S).

Images stay uint8 until the last steps: torchvision resizes bytes several times as fast as floats, with the same
antialiasing. Every random choice is drawn from torch's CPU generator, which ``ImageDataset`` seeds for each image.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torchvision.transforms import v2

from crossx.data.config import Augmentation, DataConfig
from crossx.errors import CrossXError
from crossx.runs import Preprocessing

Transform: TypeAlias = Callable[[Tensor], Tensor]

CROP_FRACTION = 0.875
"""Crop over resized size where no ``resize_size`` is given: the 224 of 256 of ImageNet evaluation."""

MAX_ASPECT = 8
"""Longer images are cut to this aspect ratio about their centre before resizing: enlarging the shorter side of a
scan line of 1 x 5000 pixels to 512 would fill the memory."""


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
    )


def eval_transform(preprocessing: Preprocessing) -> Transform:
    """Return the deterministic transform of evaluation: resize, then centre crop."""
    size = preprocessing.image_size
    return _compose(
        _resize(preprocessing), v2.CenterCrop(size), _Normalize(preprocessing), prep=preprocessing
    )


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
    size = preprocessing.image_size
    steps: list[Transform]
    if augmentation == "crop":
        steps = [_resize(preprocessing), v2.RandomCrop(size)]
    else:
        interpolation = v2.InterpolationMode(preprocessing.interpolation)
        steps = [v2.RandomResizedCrop(size, interpolation=interpolation, antialias=True)]
    if hflip:
        steps.append(v2.RandomHorizontalFlip(hflip))
    if augmentation == "trivial":
        # rotation and shear of tensors know no bicubic
        steps.append(v2.TrivialAugmentWide(interpolation=v2.InterpolationMode.BILINEAR))
    steps.append(_Normalize(preprocessing))
    if random_erasing:
        steps.append(v2.RandomErasing(random_erasing, inplace=True))
    return _compose(*steps, prep=preprocessing)


def _compose(*steps: Transform, prep: Preprocessing) -> Transform:
    first: list[Transform] = [partial(_cut_bottom, rows=prep.crop_bottom)] if prep.crop_bottom else []
    composed: Transform = v2.Compose([*first, _limit_aspect, *steps])
    return composed


def _resize(preprocessing: Preprocessing) -> Transform:
    side = preprocessing.resize_size
    size = [int(preprocessing.image_size / CROP_FRACTION)] if side is None else [side, side]
    resize: Transform = v2.Resize(
        size, interpolation=v2.InterpolationMode(preprocessing.interpolation), antialias=True
    )
    return resize


class _Normalize:
    """Bytes to floats, (x / 255 - mean) / std, written as one scale and offset.

    torchvision's ToDtype and Normalize on images in (H, W, 3) memory order, as decoded ones are, take twice as
    long and leave the batch to be reordered.
    """

    def __init__(self, preprocessing: Preprocessing) -> None:
        mean, std = torch.tensor(preprocessing.mean), torch.tensor(preprocessing.std)
        self.scale = (1 / (255 * std))[:, None, None]
        self.offset = (-mean / std)[:, None, None]

    def __call__(self, image: Tensor) -> Tensor:
        return image.contiguous().to(torch.float32).mul_(self.scale).add_(self.offset)


def _cut_bottom(image: Tensor, rows: int) -> Tensor:
    height = image.shape[-2]
    if height <= rows:
        raise CrossXError(f"the image is {height} rows high and data.crop_bottom cuts off {rows}: lower it.")
    return image[..., : height - rows, :]


def _limit_aspect(image: Tensor) -> Tensor:
    longest = MAX_ASPECT * min(image.shape[-2:])
    for dim in (-2, -1):
        excess = image.shape[dim] - longest
        if excess > 0:
            image = image.narrow(dim, excess // 2, longest)
    return image
