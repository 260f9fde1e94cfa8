"""The synthetic dataset: drawn birds whose classes differ from their nearest class in one part.

A class is a family, which shares its plumage's colours, and one value for the attribute of every part. Images of
a class vary freely in pose, size, position, scene, light and occlusion, so that what separates two classes is
small beside what separates two images of one. ``docs/synthetic.md`` describes the set.
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
"""To be raised with any change that moves a pixel, a name or a box."""

MAX_CLASSES = 10_000
"""Where names still are short and combinations plenty."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SyntheticSpec:
    """What determines the set, pixel by pixel.

    Attributes:
        num_classes: Number of classes, at least 2.
        images_per_class: Images of each class, at least 3; every third one is a test image.
        seed: Seed of the classes and of every image.
        image_size: Side of the square images, in pixels, at least 32.
    """

    num_classes: int = 12
    images_per_class: int = 60
    seed: int = 0
    image_size: int = 128

    def __post_init__(self) -> None:
        for name, least in (("num_classes", 2), ("images_per_class", 3), ("seed", 0), ("image_size", 32)):
            value = getattr(self, name)
            if value < least:
                raise UsageError(
                    f"data.{name} of the synthetic dataset must be at least {least}, not {value}."
                )
        if self.num_classes > MAX_CLASSES:
            raise UsageError(
                f"data.num_classes of the synthetic dataset must be at most {MAX_CLASSES}, not {self.num_classes}."
            )


def read_synthetic(
    root: Path, *, num_classes: int = 12, images_per_class: int = 60, seed: int = 0, image_size: int = 128
) -> DatasetIndex:
    """Read the synthetic set in ``root``, after drawing it there if the folder is missing or empty.

    The same arguments give the same images on every machine with the same versions of NumPy and Pillow. Every
    third image of a class is in ``test``, the others in ``train``. Families are the level ``family``.

    Args:
        root: The set's own folder.
        num_classes: Number of classes, at least 2.
        images_per_class: Images of each class, at least 3.
        seed: Seed of the classes and of every image.
        image_size: Side of the square images, in pixels, at least 32.

    Raises:
        UsageError: If a number is out of range.
        CrossXError: If ``root`` holds something else, a set made with other arguments, or cannot be written.
    """
    spec = SyntheticSpec(num_classes, images_per_class, seed, image_size)
    root = Path(root)
    if root.exists() and not root.is_dir():
        raise CrossXError(
            f"{root}: a file stands where the synthetic dataset's folder is needed: choose another --data.root."
        )
    if not root.exists() or not any(root.iterdir()):
        workers = len(os.sched_getaffinity(0))
        _log.info(
            "Drawing %d images of %d classes into %s", num_classes * images_per_class, num_classes, root
        )
        draw_dataset(root, spec, workers)
    return _read(root, spec)


def draw_dataset(root: Path, spec: SyntheticSpec, workers: int = 1) -> None:
    """Draw the set into a folder beside ``root`` that takes its place when complete.

    Args:
        root: A folder that is missing or empty.
        spec: What to draw; the files depend on nothing else.
        workers: Processes to draw with.

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
        # Another process may have drawn the same set first: what it put there is then read instead.
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
        **asdict(spec),
        "classes": [{"name": name, **values} for name, values in zip(names, attributes, strict=True)],
        "records": [record for records in drawn for record in records],
    }


def _draw_class(
    root: Path, spec: SyntheticSpec, folder: str, attributes: Attributes, label: int
) -> list[dict[str, Any]]:
    (root / folder).mkdir(parents=True)
    records = []
    for image in range(spec.images_per_class):
        picture = draw_picture(attributes, np.random.default_rng([spec.seed, label, image]), spec.image_size)
        path = f"{folder}/{image + 1:04d}.jpg"
        picture.image.save(root / path, quality=95, subsampling=0)
        records.append(
            {
                "path": path,
                "label": label,
                "split": "test" if image % 3 == 2 else "train",
                "box": [round(value, 2) for value in picture.box],
                "parts": {name: [round(value, 2) for value in box] for name, box in picture.parts.items()},
            }
        )
    return records


def _read(root: Path, spec: SyntheticSpec) -> DatasetIndex:
    path = root / "index.json"
    if not path.is_file():
        raise CrossXError(
            f"{root}: not empty, and no synthetic dataset (no index.json): choose another --data.root to draw it in."
        )
    index = read_json(path)
    expected = {"format": FORMAT, "version": VERSION, **asdict(spec)}
    different = [
        f"{key} is {index.get(key)!r}, not {value!r}"
        for key, value in expected.items()
        if index.get(key) != value
    ]
    if different:
        raise CrossXError(
            f"{path}: another synthetic dataset ({'; '.join(different)}): choose another --data.root or delete it."
        )
    try:
        records = tuple(_record(root, values) for values in index["records"])
        classes = tuple(values["name"] for values in index["classes"])
        families = tuple(values["family"].capitalize() for values in index["classes"])
    except (KeyError, TypeError, ValueError) as error:
        raise CrossXError(f"{path}: damaged ({error!r}): delete {root} to draw it again.") from error
    levels = {"family": families} if len(set(families)) > 1 else {}
    return DatasetIndex("synthetic", classes, records, levels)


def _record(root: Path, values: Mapping[str, Any]) -> Record:
    parts = {name: _box(box) for name, box in values["parts"].items()}
    return Record(root / values["path"], values["label"], values["split"], _box(values["box"]), parts)


def _box(values: Sequence[float]) -> Box:
    x, y, width, height = values
    return x, y, width, height
