"""Compare an exported file with the original network on real images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias, TypeVar

import numpy as np
import torch
from torch import Tensor

from crossx.data.datamodule import DataModule
from crossx.data.image_files import find_images
from crossx.data.images import image_problem
from crossx.data.index import Record
from crossx.data.transforms import batch_images, eval_transform
from crossx.errors import CrossXError, counted
from crossx.evaluation.comparison import mcnemar_exact
from crossx.evaluation.intervals import Interval, matched_interval, share_interval
from crossx.evaluation.network import Network, check_finite
from crossx.evaluation.open_set import apply_threshold
from crossx.evaluation.progress import track
from crossx.evaluation.unknowns import ViewScores
from crossx.export.options import MIN_QUANTIZED, ROUNDING
from crossx.predict.prefetch import prefetch_batches
from crossx.runs import ModelSpec, Preprocessing

T = TypeVar("T")
Specs: TypeAlias = tuple[ModelSpec, ModelSpec]
"""Descriptions of the run and of the exported file, whose thresholds may differ."""

BATCH = 16
COMPARED_IMAGES = 16
RANDOM_PIXELS = "random pixels"
KEPT_TOLERANCE = 0.02
"""Difference of the share of images that keep their label, above which a note says so."""
KEPT_LEVEL = 0.05
"""Significance level of that note: how often it appears although the shares are equal."""


@dataclass(frozen=True)
class Kept:
    """Images whose score is at least the threshold, so that they keep their label.

    Attributes:
        before: Their share in eager float32.
        after: Their share with the exported file and its threshold.
        lost: Interval of the difference, see ``matched_interval``.
        same: Number of images that both keep or both reject.
        p_value: Of the hypothesis that both keep the same share of images, see ``mcnemar_exact``.
    """

    before: float
    after: float
    lost: Interval
    same: int
    p_value: float

    @property
    def moved(self) -> bool:
        """Whether the shares differ by more than ``KEPT_TOLERANCE``, and by more than chance on so few images."""
        return abs(self.before - self.after) > KEPT_TOLERANCE + ROUNDING / 100 and self.p_value < KEPT_LEVEL

    @classmethod
    def compare(cls, specs: Specs, before: ViewScores, after: ViewScores) -> Kept | None:
        """Compare outputs on the same images; None if the run has no threshold."""
        found = [apply_threshold(spec, outputs) for spec, outputs in zip(specs, (before, after), strict=True)]
        if found[0] is None or found[1] is None:
            return None
        own, other = found[0][1].numpy(), found[1][1].numpy()
        return cls(
            before=float(own.mean()),
            after=float(other.mean()),
            lost=matched_interval(own, other),
            same=int((own == other).sum()),
            p_value=mcnemar_exact(int((own & ~other).sum()), int((other & ~own).sum())),
        )


@dataclass(frozen=True)
class Comparison:
    """An exported file's outputs compared with those of eager float32.

    Attributes:
        images: Number of images.
        source: Their source.
        logits: Largest difference of the logits, relative to the largest logit.
        same_class: Images with the same predicted class.
        similarities: Largest difference of the similarities, which are at most 1; None if the file has none.
        kept: Images that keep their label; None if the run has no threshold.
    """

    images: int
    source: str
    logits: float
    same_class: int
    similarities: float | None = None
    kept: Kept | None = None

    @property
    def difference(self) -> float:
        """The larger one of the differences; NaN if one is."""
        return float(np.maximum(self.logits, self.similarities or 0.0))

    def describe(self) -> str:
        """Say how large the differences are."""
        text = f"logits differ by at most {self.logits:.1e} of the largest"
        return text if self.similarities is None else f"{text}, similarities by {self.similarities:.1e}"


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
        calibration_images: Number of calibration images.
        kept: Images that keep their label; None if the run has no threshold.
    """

    split: str
    images: int
    before: float
    after: float
    lost: Interval
    same_class: int
    agreement: Interval
    calibration_images: int
    kept: Kept | None = None


@dataclass(frozen=True)
class QuantizationData:
    """Images for int8; the graph depends on none of ``measured``.

    Attributes:
        calibration: Images to calibrate on.
        measured: Images to measure accuracy on.
        controlled: Images on which the accuracy must be kept; none without accuracy control.
    """

    calibration: tuple[Record, ...]
    measured: tuple[Record, ...]
    controlled: tuple[Record, ...] = ()


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


def compare(model: Network, reference: Network, specs: Specs, images: Tensor, source: str) -> Comparison:
    """Compare logits on uint8 images (B, 3, S, S), in one batch of a single image and one of all others.

    Similarities are compared as well if the file has them, and so is the rejection.

    Raises:
        CrossXError: If the outputs of ``reference`` are not finite.
    """
    batches = [batch for batch in images.split([1, len(images) - 1]) if len(batch)]
    after, before = (
        join_batches(
            [ViewScores.compute(network, [part], similarities=model.has_similarities) for part in parts]
        )
        for network, parts in ((model, batches), (reference, images.split(BATCH)))
    )
    (found,), (expected,) = after.logits, before.logits
    check_finite(expected, None if before.similarities is None else before.similarities[0])
    difference = (found - expected).abs().max() / expected.abs().max()
    cosines = None
    if after.similarities is not None and before.similarities is not None:
        cosines = float((after.similarities[0] - before.similarities[0]).abs().max())
    same = int((found.argmax(1) == expected.argmax(1)).sum())
    kept = Kept.compare(specs, before, after)
    return Comparison(len(images), source, float(difference), same, cosines, kept)


def join_batches(batches: Sequence[ViewScores]) -> ViewScores:
    """Join the outputs of one view of each of several batches."""
    logits = torch.cat([batch.logits[0] for batch in batches])
    cosines = [batch.similarities[0] for batch in batches if batch.similarities is not None]
    return ViewScores([logits], [torch.cat(cosines)] if cosines else None)


def quantization_data(
    data: DataModule, calibration: int, measured: int | None, *, controlled: bool = False
) -> QuantizationData:
    """Choose images for int8: calibration on validation images, accuracy on the test split.

    With fewer than ``MIN_QUANTIZED`` validation images, training images are added to calibrate on; without a test
    split, half of the images are measured.

    Args:
        data: The dataset.
        calibration: Number of images to calibrate on.
        measured: Number of images to measure accuracy on; None for all.
        controlled: Whether to control the accuracy, on all validation images that are not measured.

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
    validation = tuple(record for record in candidates if record.split == "val")
    if controlled and len(validation) < MIN_QUANTIZED:
        raise CrossXError(
            f"dataset {data.index.name!r} has {counted(len(validation), 'validation image')} for --max-drop, and "
            f"{MIN_QUANTIZED} are needed. Give a dataset that has them with --data.root, or leave out --max-drop."
        )
    return QuantizationData(tuple(chosen), tuple(measurable), validation if controlled else ())


def measure_accuracy(
    model: Network,
    reference: Network,
    specs: Specs,
    calibration_images: int,
    records: Sequence[Record],
) -> Accuracy:
    """Measure a quantised file and the original network on the images of a split: top-1 accuracy, and rejection."""
    answers: list[ViewScores] = []
    references: list[ViewScores] = []
    labels = []
    for images, targets in track(LabelledBatches(records, specs[0].preprocessing), "Measuring"):
        for outputs, network in ((answers, model), (references, reference)):
            outputs.append(ViewScores.compute(network, [images], similarities=model.has_similarities))
        labels.append(targets)
    after, before, targets = join_batches(answers), join_batches(references), torch.cat(labels)
    found, expected = after.logits[0].argmax(1), before.logits[0].argmax(1)
    right_before, right_after = (expected == targets).numpy(), (found == targets).numpy()
    same = int((found == expected).sum())
    return Accuracy(
        split=records[0].split,
        images=len(records),
        before=float(right_before.mean()),
        after=float(right_after.mean()),
        lost=matched_interval(right_before, right_after),
        same_class=same,
        agreement=share_interval(same, len(records)),
        calibration_images=calibration_images,
        kept=Kept.compare(specs, before, after),
    )


@dataclass(frozen=True)
class LabelledBatches:
    """Batches of images, uint8 (B, 3, S, S), and their class indices, (B,); read again on each iteration."""

    records: Sequence[Record]
    preprocessing: Preprocessing

    def __len__(self) -> int:
        """Return the number of batches."""
        return -(-len(self.records) // BATCH)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches."""
        labels = torch.tensor([record.label for record in self.records]).split(BATCH)
        paths = [record.path for record in self.records]
        yield from zip(prepared_batches(paths, self.preprocessing), labels, strict=True)


def prepared_batches(paths: Sequence[Path], preprocessing: Preprocessing) -> Iterator[Tensor]:
    """Yield batches of images prepared as in evaluation, uint8 (B, 3, S, S)."""
    transform = eval_transform(preprocessing)
    for _, images in prefetch_batches(paths, lambda path: transform(transform.read(path)), BATCH):
        yield batch_images(images)


def spread(items: Sequence[T], count: int) -> list[T]:
    """Return at most ``count`` evenly spaced items."""
    kept = min(count, len(items))
    return [items[index * len(items) // kept] for index in range(kept)]
