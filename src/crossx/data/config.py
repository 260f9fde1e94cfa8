"""The options of ``--data.*``. Imports no torch, so that ``--help`` answers at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from crossx.errors import UsageError, check_choice

Augmentation = Literal["crop", "resized_crop", "trivial"]
Sampling = Literal["uniform", "balanced", "pairs"]
BadImages = Literal["stop", "skip"]
TrainOn = Literal["train", "trainval"]
Pipeline = Literal["fast", "strict"]
Cache = Literal["none", "ram", "disk"]

MIN_IMAGE_SIZE = 32


@dataclass
class DataConfig:
    """Which images to train and test on, and how they reach the network.

    Attributes:
        dataset: Dataset name, see `crossx datasets list`; `folder` and `table` read your own images.
        root: Folder of the dataset as its site distributes it (`table`: the CSV or Parquet file).
        level: FGVC-Aircraft only: label by `variant` (the default), `family` or `manufacturer`.
        num_classes: Synthetic set only: number of classes to draw.
        images_per_class: Synthetic set only: number of images to draw for each class.
        image_size: Side of the square that the network sees, in pixels.
        resize_size: Size before the crop, in pixels: images are resized to a square of this side (600 in the
            released code, then cropped to 448; equal to image_size resizes without a crop). Left out, the
            shorter side is resized to image_size / 0.875 and the aspect ratio kept.
        interpolation: `bilinear` or `bicubic`; left out, what the backbone was pretrained with.
        crop_bottom: Rows cut off the bottom of each image first (20 removes FGVC-Aircraft's banner).
        val_fraction: Share of each class's training images held out for validation where the dataset has no
            official validation split; 0 holds out none.
        test_fraction: Share of each class's images held out for testing where your own images (`folder`,
            `table`) come without a test split.
        split_seed: Seed of those two choices; not changed by --seed, so that runs stay comparable.
        train_on: `train`, or `trainval` to train on the validation images too (the last epoch is then kept).
        augmentation: `crop` (random crop of the resized image), `resized_crop` (crop of random area and
            aspect ratio) or `trivial` (resized_crop and TrivialAugment).
        hflip: Probability of a horizontal flip in training.
        random_erasing: Probability of erasing a random rectangle in training.
        pipeline: `fast`, or `strict`: decoded and resized by Pillow alone, the pixels of the released code. `fast`
            differs from them by a grey level at most (bicubic: by a few), and by more in large JPEGs, which it
            decodes at half, a quarter or an eighth of their size.
        cache: Keep decoded images: `none`, `ram`, or `disk` (in $XDG_CACHE_HOME/crossx/decoded, for the next run
            too). The room is reserved, and named, before training; an image is stored when it is first read.
        batch_size: Images a training step and device.
        eval_batch_size: Images a step in validation and testing; left out, as batch_size.
        num_workers: Processes that load images; left out, one for each CPU core, at most 8. The images do not
            depend on it.
        sampling: `uniform` (each training image once an epoch), `balanced` (each class equally often) or `pairs`
            (each image beside another of its class, the pairs of a batch of different classes); left out, what the
            method needs, `uniform` where it needs nothing else.
        bad_images: What to do with missing or unreadable images: `stop` before the first step and list them,
            or `skip` them and report which.
    """

    dataset: str = "synthetic"
    root: str | None = None
    level: str | None = None
    num_classes: int | None = None
    images_per_class: int | None = None
    image_size: int = 448
    resize_size: int | None = None
    interpolation: str | None = None
    crop_bottom: int = 0
    val_fraction: float = 0.1
    test_fraction: float = 0.2
    split_seed: int = 0
    train_on: TrainOn = "train"
    augmentation: Augmentation = "crop"
    hflip: float = 0.5
    random_erasing: float = 0.0
    pipeline: Pipeline = "fast"
    cache: Cache = "none"
    batch_size: int = 32
    eval_batch_size: int | None = None
    num_workers: int | None = None
    sampling: Sampling | None = None
    bad_images: BadImages = "stop"

    def __post_init__(self) -> None:
        self.validate()

    def validate(self) -> None:
        """Check what can be checked without looking at the data.

        Raises:
            UsageError: If an option cannot work, naming it and what it takes.
        """
        _at_least("image_size", self.image_size, MIN_IMAGE_SIZE)
        if self.resize_size is not None:
            _at_least("resize_size", self.resize_size, self.image_size, "data.image_size")
        _at_least("crop_bottom", self.crop_bottom, 0)
        _at_least("batch_size", self.batch_size, 1)
        if self.eval_batch_size is not None:
            _at_least("eval_batch_size", self.eval_batch_size, 1)
        if self.num_workers is not None:
            _at_least("num_workers", self.num_workers, 0)
        if self.num_classes is not None:
            _at_least("num_classes", self.num_classes, 2)
        if self.images_per_class is not None:
            _at_least("images_per_class", self.images_per_class, 1)
        _fraction("val_fraction", self.val_fraction, end_allowed=False)
        _fraction("test_fraction", self.test_fraction, end_allowed=False)
        _fraction("hflip", self.hflip)
        _fraction("random_erasing", self.random_erasing)
        if self.interpolation is not None:
            check_choice("data.interpolation", self.interpolation, ("bilinear", "bicubic"))
        check_choice("data.train_on", self.train_on, get_args(TrainOn))
        check_choice("data.augmentation", self.augmentation, get_args(Augmentation))
        check_choice("data.pipeline", self.pipeline, get_args(Pipeline))
        check_choice("data.cache", self.cache, get_args(Cache))
        if self.sampling is not None:
            check_choice("data.sampling", self.sampling, get_args(Sampling))
        if self.sampling == "pairs" and self.batch_size % 2:
            raise UsageError(f"data.batch_size must be even for data.sampling pairs, not {self.batch_size}.")
        check_choice("data.bad_images", self.bad_images, get_args(BadImages))


def _at_least(option: str, value: int, least: int, reason: str = "") -> None:
    if value < least:
        because = f" ({reason})" if reason else ""
        raise UsageError(f"data.{option} must be at least {least}{because}, not {value}.")


def _fraction(option: str, value: float, *, end_allowed: bool = True) -> None:
    if not 0 <= value <= 1 or (value == 1 and not end_allowed):
        raise UsageError(f"data.{option} must lie in [0, 1{']' if end_allowed else ')'}, not {value}.")
