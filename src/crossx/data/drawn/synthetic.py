"""The synthetic dataset: drawn birds whose classes differ from their nearest class in one part.

A class is a family, which fixes the colours of the plumage, and one value for the attribute of every part. Images of a
class vary in pose, size, position, scene, light and occlusion, so the differences between classes are small compared
with those within a class. ``docs/synthetic.md`` describes the set.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import shutil
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from crossx.data.drawn.picture import draw_picture
from crossx.data.drawn.species import Attributes, class_attributes, class_names
from crossx.data.index import Box, DatasetIndex, Record
from crossx.errors import CrossXError, UsageError
from crossx.runs import read_json

FORMAT = "crossx synthetic birds"
VERSION = 1
"""Increase with every change of a pixel, a name or a box."""

MAX_CLASSES = 10_000
"""Up to here names are short and there are plenty of combinations."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SyntheticSpec:
    """Everything that determines the set.

    Attributes:
        num_classes: Number of classes, at least 2.
        images_per_class: Images per class, at least 3; every third one is a test image.
        test_images_per_class: Test images per class, by default every third image. If there are too few, further
            ones are drawn; the training images and the other test images stay the same.
        seed: Seed of the classes and of every image.
        image_size: Side of the square images, in pixels, at least 32.
    """

    num_classes: int = 12
    images_per_class: int = 60
    seed: int = 0
    image_size: int = 128
    test_images_per_class: int | None = None

    def __post_init__(self) -> None:
        for name, least in (
            ("num_classes", 2),
            ("images_per_class", 3),
            ("seed", 0),
            ("image_size", 32),
            ("test_images_per_class", 1),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UsageError(
                    f"data.{name} of the synthetic dataset must be at least {least}, not {value}."
                )
        if self.num_classes > MAX_CLASSES:
            raise UsageError(
                f"data.num_classes of the synthetic dataset must be at most {MAX_CLASSES}, not {self.num_classes}."
            )

    def splits(self) -> list[tuple[int, str]]:
        """Return the number, which determines the image, and the split of each image of a class."""
        numbers = range(self.images_per_class)
        test = [number for number in numbers if number % 3 == 2]
        if self.test_images_per_class is not None:
            further = range(self.images_per_class, self.images_per_class + self.test_images_per_class)
            test = [*test, *further][: self.test_images_per_class]
        train = [(number, "train") for number in numbers if number % 3 != 2]
        return sorted([*train, *((number, "test") for number in test)])

    def recorded(self) -> dict[str, int]:
        """Return the arguments as ``index.json`` holds them: without those that are None."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def read_synthetic(
    root: Path,
    *,
    num_classes: int = 12,
    images_per_class: int = 60,
    seed: int = 0,
    image_size: int = 128,
    test_images_per_class: int | None = None,
) -> DatasetIndex:
    """Read the synthetic set in ``root``; draw it first if the folder is missing or empty.

    The same arguments give the same images on every machine with the same versions of NumPy and Pillow; they are
    described in ``SyntheticSpec``. Families are the level ``family``.

    Raises:
        UsageError: If a number is out of range.
        CrossXError: If ``root`` holds something else or a set drawn with other arguments, or cannot be written.
    """
    spec = SyntheticSpec(num_classes, images_per_class, seed, image_size, test_images_per_class)
    root = Path(root)
    if root.exists() and not root.is_dir():
        raise CrossXError(
            f"{root}: there is a file where the synthetic dataset's folder is needed. Choose another --data.root."
        )
    if not root.exists() or not any(root.iterdir()):
        number = num_classes * len(spec.splits())
        _log.info("Drawing %d images of %d classes into %s", number, num_classes, root)
        draw_dataset(root, spec, workers=len(os.sched_getaffinity(0)))
    return _read(root, spec)


def draw_dataset(root: Path, spec: SyntheticSpec, workers: int = 1) -> None:
    """Draw the set into a temporary folder that is renamed to ``root`` when complete.

    Args:
        root: A folder that is missing or empty.
        spec: What to draw; the files depend on nothing else.
        workers: Number of processes.

    Raises:
        CrossXError: If the set cannot be written.
    """
    target = root.resolve()
    temporary = target.parent / f".{target.name}.{uuid.uuid4().hex}.tmp"
    try:
        temporary.mkdir(parents=True)
        index = _draw(temporary, spec, workers)
        (temporary / "index.json").write_text(
            json.dumps(index, separators=(",", ":")) + "\n", encoding="utf-8"
        )
        temporary.rename(target)
    except OSError as error:
        # another process may have drawn the same set first, which is then read instead
        if not (target / "index.json").is_file():
            raise CrossXError(
                f"{root}: the synthetic dataset cannot be drawn there ({error.strerror or error}): "
                "free some room or choose another --data.root."
            ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _draw(folder: Path, spec: SyntheticSpec, workers: int) -> dict[str, Any]:
    attributes = class_attributes(spec.num_classes, spec.seed)
    names = class_names(attributes)
    folders = [f"images/{label:03d}.{name.replace(' ', '_')}" for label, name in enumerate(names, start=1)]
    tasks = [(folder, spec, *task) for task in zip(folders, attributes, range(spec.num_classes), strict=True)]
    if workers > 1:
        with ProcessPoolExecutor(workers, multiprocessing.get_context("fork")) as pool:
            drawn = list(pool.map(_draw_class, *zip(*tasks, strict=True)))
    else:
        drawn = [_draw_class(*task) for task in tasks]
    return {
        "format": FORMAT,
        "version": VERSION,
        **spec.recorded(),
        "classes": [{"name": name, **values} for name, values in zip(names, attributes, strict=True)],
        "records": [record for records in drawn for record in records],
    }


def _draw_class(
    root: Path, spec: SyntheticSpec, folder: str, attributes: Attributes, label: int
) -> list[dict[str, Any]]:
    (root / folder).mkdir(parents=True)
    records = []
    for image, split in spec.splits():
        picture = draw_picture(attributes, np.random.default_rng([spec.seed, label, image]), spec.image_size)
        path = f"{folder}/{image + 1:04d}.jpg"
        picture.image.save(root / path, quality=95, subsampling=0)
        records.append(
            {
                "path": path,
                "label": label,
                "split": split,
                "box": [round(value, 2) for value in picture.box],
                "parts": {name: [round(value, 2) for value in box] for name, box in picture.parts.items()},
            }
        )
    return records


def _options_of(index: Mapping[str, Any], spec: SyntheticSpec) -> str:
    """Return the options, other than those of ``spec``, that read a set; empty if none do."""
    other = {key: index.get(key) for key, value in asdict(spec).items() if index.get(key) != value}
    same = (index.get("format"), index.get("version")) == (FORMAT, VERSION)
    # no command has the size of the drawn images, nor a value of None
    if not same or "image_size" in other or any(type(value) is not int for value in other.values()):
        return ""
    return " ".join(f"--data.{key} {value}" for key, value in other.items())


def _read(root: Path, spec: SyntheticSpec) -> DatasetIndex:
    path = root / "index.json"
    if not path.is_file():
        raise CrossXError(
            f"{root}: not empty and not a synthetic dataset (no index.json): choose another --data.root to draw it in."
        )
    index = read_json(path)
    expected = {"format": FORMAT, "version": VERSION, **asdict(spec)}
    different = [
        f"{key} is {index.get(key)!r}, not {value!r}"
        for key, value in expected.items()
        if index.get(key) != value
    ]
    if different:
        options = _options_of(index, spec)
        take = f"give {options}, " if options else ""
        raise CrossXError(
            f"{path}: another synthetic dataset ({'; '.join(different)}): {take}choose another --data.root or delete "
            "it."
        )
    try:
        records = tuple(
            Record(
                path=root / values["path"],
                label=values["label"],
                split=values["split"],
                box=_box(values["box"]),
                parts={name: _box(box) for name, box in values["parts"].items()},
            )
            for values in index["records"]
        )
        classes = tuple(values["name"] for values in index["classes"])
        families = tuple(values["family"].capitalize() for values in index["classes"])
    except (KeyError, TypeError, ValueError) as error:
        raise CrossXError(f"{path}: damaged ({error!r}): delete {root} to draw it again.") from error
    levels = {"family": families} if len(set(families)) > 1 else {}
    return DatasetIndex("synthetic", classes, records, levels)


def _box(values: Sequence[float]) -> Box:
    x, y, width, height = values
    return x, y, width, height
