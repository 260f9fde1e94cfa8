"""What every reader returns: class names and a list of labelled image files."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeAlias

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
        box: The object's bounding box, where the dataset gives one.
        parts: Part name to its box (synthetic) or to a box of width and height 0 at its keypoint (CUB),
            visible parts only.
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
        levels: Level name (``order``, ``family``, ...) to the K names of each class's group on that level;
            empty where the dataset has no hierarchy.
    """

    name: str
    classes: tuple[str, ...]
    records: tuple[Record, ...]
    levels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.classes:
            raise CrossXError(f"dataset {self.name!r} has no classes: check that --data.root points at it.")
        for record in self.records:
            if not 0 <= record.label < len(self.classes):
                raise CrossXError(
                    f"{record.path}: label {record.label} is outside the {len(self.classes)} classes."
                )
            if record.split not in SPLITS:
                raise CrossXError(f"{record.path}: split {record.split!r} is not one of {', '.join(SPLITS)}.")

    def split(self, name: str) -> tuple[Record, ...]:
        """Return the records of one split.

        Raises:
            UsageError: If ``name`` is no split.
        """
        if name not in SPLITS:
            raise UsageError(f"unknown split {name!r}. Choose from: {', '.join(SPLITS)}.")
        return tuple(record for record in self.records if record.split == name)

    def with_validation(self, fraction: float = 0.1, seed: int = 0) -> DatasetIndex:
        """Move ``fraction`` of each class's training images to ``val``, unless a ``val`` split exists.

        The choice depends on the seed and on the file names alone (not on the machine, the folder or the order
        of records). The number is rounded: of 10% a class with five training images gives none, one with six gives
        one; each keeps at least one. Section 4.2 of the paper: "10% out of the training samples from each category".
        """
        if fraction == 0 or any(record.split == "val" for record in self.records):
            return self
        if not 0 < fraction < 1:
            raise UsageError(f"data.val_fraction must lie in [0, 1), not {fraction}.")
        by_class: dict[int, list[Record]] = defaultdict(list)
        for record in self.split("train"):
            by_class[record.label].append(record)
        chosen: set[Path] = set()
        for label in sorted(by_class):
            members = sorted(by_class[label], key=lambda record: record.path.name)
            random.Random(f"{seed}/{label}").shuffle(members)
            count = min(len(members) - 1, round(fraction * len(members)))
            chosen.update(record.path for record in members[:count])
        records = tuple(
            replace(record, split="val") if record.split == "train" and record.path in chosen else record
            for record in self.records
        )
        return replace(self, records=records)
