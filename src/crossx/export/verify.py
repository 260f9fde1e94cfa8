"""Compare an exported file with the original network on real images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from crossx.data.datamodule import DataModule
from crossx.data.images import find_images, image_problem
from crossx.data.index import Record
from crossx.data.transforms import batch_images, eval_transform
from crossx.errors import CrossXError
from crossx.evaluation.intervals import Interval, matched_interval, share_interval
from crossx.evaluation.network import Network
from crossx.evaluation.progress import track
from crossx.predict.prefetch import prefetch_batches
from crossx.runs import Preprocessing

T = TypeVar("T")

BATCH = 16
COMPARED_IMAGES = 16
MIN_QUANTIZED = 32
"""Least number of images to calibrate int8 on, and to measure its accuracy on."""
RANDOM_PIXELS = "random pixels"


@dataclass(frozen=True)
class Comparison:
    """An exported file's logits compared with those of eager float32.

    Attributes:
        images: Number of images.
        source: Their source.
        difference: Largest difference of the logits, relative to the largest logit.
        same_class: Images with the same predicted class.
    """

    images: int
    source: str
    difference: float
    same_class: int


@dataclass(frozen=True)
class Accuracy:
    """Top-1 accuracy on the same images before and after quantisation.

    Attributes:
        split: Their split.
        images: Number of images.
        before: Accuracy in eager float32.
        after: Accuracy of the exported file.
        lost: Interval of the accuracy lost, see ``matched_interval``.
        same_class: Images with the same predicted class.
        agreement: Interval of the share of such images, see ``share_interval``.
        calibration_images: Number of calibration images, which are different ones.
    """

    split: str
    images: int
    before: float
    after: float
    lost: Interval
    same_class: int
    agreement: Interval
    calibration_images: int


@dataclass(frozen=True)
class QuantizationData:
    """Disjoint images for int8 calibration and for measuring its accuracy.

    Attributes:
        calibration: Images to calibrate on.
        measured: Images to measure accuracy on.
        split: Split of ``measured``.
    """

    calibration: tuple[Record, ...]
    measured: tuple[Record, ...]
    split: str


def images_to_compare(
    read: Callable[[], DataModule], folder: str | Path | None, preprocessing: Preprocessing
) -> tuple[Tensor, str]:
    """Choose images for the comparison, evenly spread over a folder or a split of the dataset.

    Args:
        read: Reads the run's dataset, of which validation images are preferred; if it fails, random pixels are used.
        folder: A folder of images to use instead.
        preprocessing: Preprocessing of the run.

    Returns:
        uint8 (B, 3, S, S), and their source.

    Raises:
        CrossXError: If no image can be read.
    """
    if folder is not None:
        paths, source = find_images(Path(folder)), str(folder)
    else:
        try:
            index = read().index
        except CrossXError as error:
            return _random_pixels(preprocessing.image_size), f"{RANDOM_PIXELS}: {str(error).rstrip('.')}"
        split = next(name for name in ("val", "test", "train") if index.split(name))
        paths, source = [record.path for record in index.split(split)], f"{split} of {index.name}"
    readable = [path for path in spread(paths, COMPARED_IMAGES) if image_problem(path) is None]
    if not readable:
        raise CrossXError(f"{source}: there is no image that can be read. Give --images a folder of images.")
    return torch.cat(list(prepared_batches(readable, preprocessing))), source


def _random_pixels(size: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (COMPARED_IMAGES, 3, size, size), generator=generator, dtype=torch.uint8)


def compare(model: Network, reference: Network, images: Tensor, source: str) -> Comparison:
    """Compare logits on uint8 images (B, 3, S, S), in one batch of a single image and one of all others."""
    batches = [batch for batch in images.split([1, len(images) - 1]) if len(batch)]
    found = torch.cat([model.logits(batch) for batch in batches])
    expected = torch.cat([reference.logits(batch) for batch in images.split(BATCH)])
    difference = (found - expected).abs().max() / expected.abs().max()
    same = int((found.argmax(1) == expected.argmax(1)).sum())
    return Comparison(len(images), source, float(difference), same)


def quantization_data(data: DataModule, calibration: int, measured: int | None) -> QuantizationData:
    """Choose images for int8: calibration on validation images, accuracy on the test split.

    With fewer than ``MIN_QUANTIZED`` validation images, training images are added; without a test split, half of the
    validation images are measured.

    Args:
        data: The dataset.
        calibration: Number of images to calibrate on.
        measured: Number of images to measure accuracy on; None for all.

    Raises:
        CrossXError: If images cannot be read (and the run does not skip them), or there are too few.
    """
    sources = ["val"] if len(data.index.split("val")) >= MIN_QUANTIZED else ["val", "train"]
    data.check_images([*sources, "test"])
    candidates = [record for source in sources for record in data.index.split(source)]
    tested = list(data.index.split("test"))
    if not tested:
        candidates, tested = candidates[::2], candidates[1::2]
    chosen = spread(candidates, calibration)
    measurable = tested if measured is None else spread(tested, measured)
    if min(len(chosen), len(measurable)) < MIN_QUANTIZED:
        raise CrossXError(
            f"dataset {data.index.name!r} has {len(chosen)} images to calibrate int8 on and {len(measurable)} to "
            f"measure its accuracy, and {MIN_QUANTIZED} of each are needed. Give a larger one with --data.root, or use "
            "--precision fp16."
        )
    return QuantizationData(tuple(chosen), tuple(measurable), measurable[0].split)


def measure_accuracy(
    model: Network, reference: Network, images: QuantizationData, preprocessing: Preprocessing
) -> Accuracy:
    """Measure the top-1 accuracy of a quantised file and of the original network."""
    records = images.measured
    answers, references = [], []
    paths = [record.path for record in records]
    for batch in track(prepared_batches(paths, preprocessing), "Measuring", total=-(-len(records) // BATCH)):
        answers.append(model.logits(batch).argmax(1))
        references.append(reference.logits(batch).argmax(1))
    found, expected = torch.cat(answers), torch.cat(references)
    targets = torch.tensor([record.label for record in records])
    right_before, right_after = (expected == targets).numpy(), (found == targets).numpy()
    same = int((found == expected).sum())
    return Accuracy(
        split=images.split,
        images=len(records),
        before=float(right_before.mean()),
        after=float(right_after.mean()),
        lost=matched_interval(right_before, right_after),
        same_class=same,
        agreement=share_interval(same, len(records)),
        calibration_images=len(images.calibration),
    )


def prepared_batches(paths: Sequence[Path], preprocessing: Preprocessing) -> Iterator[Tensor]:
    """Yield batches of images prepared as in evaluation, uint8 (B, 3, S, S)."""
    transform = eval_transform(preprocessing)
    for _, images in prefetch_batches(paths, lambda path: transform(transform.read(path)), BATCH):
        yield batch_images(images)


def spread(items: Sequence[T], count: int) -> list[T]:
    """Return at most ``count`` evenly spaced items."""
    kept = min(count, len(items))
    return [items[index * len(items) // kept] for index in range(kept)]
