"""What every reader returns: class names and a list of labelled image files."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeAlias

from crossx.class_names import naming_problem
from crossx.errors import CrossXError, UsageError

SPLITS = ("train", "val", "test")

Box: TypeAlias = tuple[float, float, float, float]
"""x, y (top left corner), width, height, in pixels of the stored image."""


@dataclass(frozen=True, slots=True)
class Record:
    """One labelled image.

    Attributes:
        path: The image file.
        label: Class index, 0 to K - 1, in the official label order.
        split: ``train``, ``val`` or ``test``.
        box: The object's bounding box, where the dataset has one.
        parts: Part name to its box (synthetic) or to a box of size 0 at its keypoint (CUB, NABirds); visible parts
            only.
    """

    path: Path
    label: int
    split: str
    box: Box | None = None
    parts: Mapping[str, Box] | None = None


@dataclass(frozen=True)
class DatasetIndex:
    """A dataset as read from disk.

    Attributes:
        name: The dataset's name on the command line.
        classes: The K class names in label order.
        records: Every labelled image of every split.
        levels: Level name (``order``, ``family``, ...) to the K names of the classes' groups on that level; empty
            for a dataset without a hierarchy.
        notes: What the reader assumed or skipped, each a sentence without a full stop.
        excluded: What ``--data.exclude`` left out of ``records``.
    """

    name: str
    classes: tuple[str, ...]
    records: tuple[Record, ...]
    levels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    notes: tuple[str, ...] = field(default=(), compare=False)
    excluded: tuple[Record, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        if not self.classes:
            raise CrossXError(f"dataset {self.name!r} has no classes: check that --data.root points at it.")
        if (problem := naming_problem(self.classes)) is not None:
            raise CrossXError(f"dataset {self.name!r} has classes that cannot be told apart: {problem}.")
        for record in self.records:
            if not 0 <= record.label < len(self.classes):
                raise CrossXError(
                    f"{record.path}: label {record.label} is outside the {len(self.classes)} classes."
                )
            if record.split not in SPLITS:
                raise CrossXError(f"{record.path}: split {record.split!r} is not one of {', '.join(SPLITS)}.")

    def split(self, name: str) -> tuple[Record, ...]:
        """Return the records of one split; an unknown name raises ``UsageError``."""
        if name not in SPLITS:
            raise UsageError(f"unknown split {name!r}. Choose from: {', '.join(SPLITS)}.")
        return tuple(record for record in self.records if record.split == name)

    def with_validation(self, fraction: float = 0.1, seed: int = 0) -> DatasetIndex:
        """Move ``fraction`` of each class's training images to ``val``, unless a ``val`` split exists.

        The choice depends on the seed and the file names only, not on the machine, the folder or the order of the
        records. The number per class is rounded (at 10%, five training images give none and six give one), and one
        image always stays. Section 4.2 of the paper: "10% out of the training samples from each category".
        """
        if fraction == 0 or any(record.split == "val" for record in self.records):
            return self
        if not 0 < fraction < 1:
            raise UsageError(f"data.val_fraction must be in [0, 1), not {fraction}.")
        training = self.split("train")
        chosen = _choose(training, fraction, 0, lambda path: path.name, lambda label: f"{seed}/{label}")
        records = tuple(
            replace(record, split="val") if record.split == "train" and record.path in chosen else record
            for record in self.records
        )
        return replace(self, records=records)


class UntrainedClassError(CrossXError):
    """A class without training images, so that nothing can be trained on a dataset.

    Attributes:
        index: The dataset, for whatever only looks at it.
    """

    def __init__(self, message: str, index: DatasetIndex) -> None:
        super().__init__(message)
        self.index = index


def relative_path(path: Path, base: Path) -> str:
    """Return a path that identifies an image wherever the data is: relative to ``base``, if it is below it."""
    return (path.relative_to(base) if path.is_relative_to(base) else path).as_posix()


def part_names(records: Iterable[Record]) -> tuple[str, ...]:
    """Return the names of all parts, in the order of their first occurrence."""
    return tuple(dict.fromkeys(name for record in records for name in record.parts or ()))


def hold_out_test(
    records: Sequence[Record], classes: Sequence[str], root: Path, fraction: float, seed: int
) -> list[Record]:
    """Move ``fraction`` of each class's records to the test split.

    The choice depends on the seed, the class's name and its images' paths relative to ``root`` only, so it is the
    same on every machine and stays the same for the other classes when one is added. A class with two or more images
    gives at least one and keeps at least one for training; a class with one image keeps it.

    Raises:
        UsageError: If ``fraction`` is outside [0, 1).
    """
    if not 0 <= fraction < 1:
        raise UsageError(f"data.test_fraction must be in [0, 1), not {fraction}.")
    if fraction == 0:
        return list(records)

    def relative(path: Path) -> str:
        return path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)

    chosen = _choose(records, fraction, 1, relative, lambda label: f"{seed}/test/{classes[label]}")
    return [replace(record, split="test") if record.path in chosen else record for record in records]


def _choose(
    records: Iterable[Record],
    fraction: float,
    least: int,
    order: Callable[[Path], str],
    seed: Callable[[int], str],
) -> set[Path]:
    """Choose ``fraction`` of each class's images, at least ``least`` and never all of them."""
    by_class: dict[int, list[Path]] = defaultdict(list)
    for record in records:
        by_class[record.label].append(record.path)
    chosen: set[Path] = set()
    for label, paths in by_class.items():
        paths.sort(key=order)
        random.Random(seed(label)).shuffle(paths)
        chosen.update(paths[: min(len(paths) - 1, max(least, round(fraction * len(paths))))])
    return chosen
