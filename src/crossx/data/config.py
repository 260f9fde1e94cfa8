"""The ``--data.*`` options. Imports no torch, so that ``--help`` is fast."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal, get_args

from crossx.errors import UsageError, check_choice

Augmentation = Literal["crop", "resized_crop", "trivial"]
Sampling = Literal["uniform", "balanced", "pairs"]
BadImages = Literal["stop", "skip"]
TrainOn = Literal["train", "trainval"]
Pipeline = Literal["fast", "strict"]
Cache = Literal["none", "ram", "disk"]

MIN_IMAGE_SIZE = 32
_LEAST = {
    "image_size": MIN_IMAGE_SIZE,
    "crop_bottom": 0,
    "batch_size": 1,
    "eval_batch_size": 1,
    "num_workers": 0,
    "num_classes": 2,
    "images_per_class": 1,
    "test_images_per_class": 1,
    "seed": 0,
}
_CHOICES: dict[str, tuple[str, ...]] = {
    "interpolation": ("bilinear", "bicubic"),
    "train_on": get_args(TrainOn),
    "augmentation": get_args(Augmentation),
    "pipeline": get_args(Pipeline),
    "cache": get_args(Cache),
    "sampling": get_args(Sampling),
    "bad_images": get_args(BadImages),
}


@dataclass
class DataConfig:
    """Images to train and test on, and how they are prepared.

    Attributes:
        dataset: Dataset name, see `crossx datasets list`; `folder`, `table`, `huggingface` and `webdataset` read your
            own images.
        root: Folder of the unpacked dataset (`table`: the CSV or Parquet file; `huggingface`: also USER/NAME).
        level: FGVC-Aircraft only: label by `variant` (the default), `family` or `manufacturer`.
        num_classes: Synthetic set only: number of classes to draw.
        images_per_class: Synthetic set only: number of images to draw per class.
        test_images_per_class: Synthetic set only: number of test images to draw per class; by default a third of
            images_per_class. The training images stay the same.
        seed: Synthetic set only: seed of the drawn classes and images, 0 by default; independent of --seed.
        image_column: `huggingface` only: the column of the images, if there are several.
        label_column: `huggingface` and `webdataset` only: the column, or the field of a .json, with the label.
        image_size: Side of the network's square input, in pixels.
        resize_size: Size before the crop, in pixels: images are resized to a square of this side (600 in the
            released code, then cropped to 448; equal to image_size means no crop). By default the shorter side is
            resized to image_size / 0.875 and the aspect ratio kept.
        interpolation: `bilinear` or `bicubic`; by default what the backbone was pretrained with.
        crop_bottom: Rows cut off the bottom of each image first (20 removes FGVC-Aircraft's banner).
        val_fraction: Share of each class's training images held out for validation if the dataset has no official
            validation split; 0 holds out none.
        test_fraction: Share of each class's images held out for testing if your own images have no test split.
        split_seed: Seed of these two choices; independent of --seed, so that runs stay comparable.
        train_on: `train`, or `trainval` to train on the validation images too (the last epoch is then kept).
        augmentation: `crop` (random crop of the resized image), `resized_crop` (crop of random area and
            aspect ratio) or `trivial` (resized_crop and TrivialAugment).
        hflip: Probability of a horizontal flip in training.
        random_erasing: Probability of erasing a random rectangle in training.
        pipeline: `fast`, or `strict` to decode and resize with Pillow only, for the pixels of the released code. `fast`
            differs from them by at most one grey level (bicubic: a few), and by more in large JPEGs, which it decodes
            at half, a quarter or an eighth of their size.
        cache: Keep images as they are before the first random step, resized or decoded: `none`, `ram`, or `disk` (also
            for later runs). The space is reserved and reported before training; an image is stored when it is first
            read.
        cache_folder: Folder of `data.cache disk`; by default $XDG_CACHE_HOME/crossx/decoded.
        batch_size: Images per training step and device.
        eval_batch_size: Images per step in validation and testing; by default batch_size.
        num_workers: Processes that load images; by default one per CPU core, at most 8. They do not affect the images.
        sampling: `uniform` (each training image once per epoch), `balanced` (each class equally often) or `pairs`
            (each image next to another of its class, the pairs of a batch from different classes); by default what the
            method needs, else `uniform`.
        exclude: Table of images to leave out (column `path`, relative to the root), such as the `exclude.csv` of
            `crossx datasets audit`. The images that are held out stay the same.
        bad_images: What to do with missing or unreadable images: `stop` before the first step and list them,
            or `skip` and report them.
    """

    dataset: str = "folder"
    root: str | None = None
    level: str | None = None
    num_classes: int | None = None
    images_per_class: int | None = None
    test_images_per_class: int | None = None
    seed: int | None = None
    image_column: str | None = None
    label_column: str | None = None
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
    cache_folder: str | None = None
    batch_size: int = 32
    eval_batch_size: int | None = None
    num_workers: int | None = None
    sampling: Sampling | None = None
    exclude: str | None = None
    bad_images: BadImages = "stop"

    def __post_init__(self) -> None:
        self.validate()

    def with_absolute_root(self) -> DataConfig:
        """Return the options with an absolute root, unless it is the name of a dataset on the Hub."""
        if not self.root or (self.dataset == "huggingface" and not Path(self.root).exists()):
            return self
        return replace(self, root=str(Path(self.root).absolute()))

    def validate(self) -> None:
        """Check what can be checked without the data.

        Raises:
            UsageError: If an option is invalid, naming it and its valid values.
        """
        given = {
            name: value for name, value in vars(self).items() if value is not None or name not in _OPTIONAL
        }
        for option, least in _LEAST.items():
            if option in given and given[option] < least:
                raise UsageError(f"data.{option} must be at least {least}, not {given[option]}.")
        if self.resize_size is not None and self.resize_size < self.image_size:
            raise UsageError(
                f"data.resize_size must be at least {self.image_size} (data.image_size), not {self.resize_size}."
            )
        for option in ("val_fraction", "test_fraction", "hflip", "random_erasing"):
            value, held_out = getattr(self, option), option.endswith("_fraction")
            if not 0 <= value <= 1 or (value == 1 and held_out):
                raise UsageError(f"data.{option} must be in [0, 1{')' if held_out else ']'}, not {value}.")
        for option, choices in _CHOICES.items():
            if option in given:
                check_choice(f"data.{option}", given[option], choices)
        if self.cache_folder is not None and self.cache != "disk":
            raise UsageError(
                "data.cache_folder is the folder of data.cache disk: give --data.cache disk too, or leave it out."
            )
        if self.sampling == "pairs" and self.batch_size % 2:
            raise UsageError(f"data.batch_size must be even for data.sampling pairs, not {self.batch_size}.")


_OPTIONAL = {field.name for field in fields(DataConfig) if field.default is None}
