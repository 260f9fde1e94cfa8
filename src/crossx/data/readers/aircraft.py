"""FGVC-Aircraft (Maji et al., 2013), https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft/."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from crossx.data.index import SPLITS, Box, DatasetIndex, Record
from crossx.data.readers.parsing import Row, archive_root, keyed, read_rows, require_folder
from crossx.errors import unknown

LEVELS = {"manufacturer": "manufacturers.txt", "family": "families.txt", "variant": "variants.txt"}
"""The three levels of labels, coarse to fine, and the file that lists the classes of each."""


def read_aircraft(root: Path, *, level: str = "variant") -> DatasetIndex:
    """Read FGVC-Aircraft, or a part of it, from the unpacked ``fgvc-aircraft-2013b.tar.gz``.

    Labels follow the order of the level's list (``variants.txt``, ...); names are as written there (``F/A-18``).
    Splits are the official ``train``, ``val`` and ``test``. ``levels`` holds the coarser levels (family and
    manufacturer of a variant), found by comparing the image lists; a class without images gets ``unknown``. Boxes
    (``images_box.txt``) are read where present. The 20-pixel banner at the bottom of each image is kept.

    Args:
        root: The folder ``fgvc-aircraft-2013b``, its ``data``, or the folder that contains it.
        level: ``variant`` (100 classes in the whole archive), ``family`` (70) or ``manufacturer`` (30).

    Raises:
        UsageError: If ``level`` is unknown.
        CrossXError: If a list or ``images/`` is missing, a line is malformed, or the lists disagree.
    """
    if level not in LEVELS:
        raise unknown("level of aircraft", level, LEVELS)
    data = archive_root(root, LEVELS[level], "data", "fgvc-aircraft-2013b/data")
    classes = _read_classes(data, level)
    images = _read_images(data, level, classes)
    folder = require_folder(data / "images")
    boxes = _read_boxes(data)
    names = list(LEVELS)
    return DatasetIndex(
        name="aircraft",
        classes=tuple(classes),
        records=tuple(
            Record(
                path=row.file_in(folder, 0, ".jpg"),
                label=classes[row.fields[1]],
                split=split,
                box=boxes.get(image),
            )
            for image, (split, row) in images.items()
        ),
        levels={coarse: _groups(data, coarse, classes, images) for coarse in names[: names.index(level)]},
    )


def _read_classes(data: Path, level: str) -> dict[str, int]:
    rows = keyed(read_rows(data / LEVELS[level], (f"the name of a {level}",), text=True))
    return {name: label for label, name in enumerate(rows)}


def _read_images(data: Path, level: str, classes: Mapping[str, int]) -> dict[str, tuple[str, Row]]:
    """Return image id -> (split, row of image id and class name)."""
    lists = {
        split: read_rows(data / f"images_{level}_{split}.txt", ("image id", level), text=True)
        for split in SPLITS
    }
    for row in keyed(row for rows in lists.values() for row in rows).values():
        if row.fields[1] not in classes:
            raise row.error(f"{level} {row.fields[1]!r} is not in {LEVELS[level]}")
    return {row.fields[0]: (split, row) for split, rows in lists.items() for row in rows}


def _groups(
    data: Path, coarse: str, classes: Mapping[str, int], images: Mapping[str, tuple[str, Row]]
) -> tuple[str, ...]:
    """Return each class's group on a coarser level, from the images listed on both levels."""
    coarse_images = _read_images(data, coarse, _read_classes(data, coarse))
    groups: dict[str, str] = {}
    for image, (_, row) in images.items():
        if image not in coarse_images:
            raise row.error(f"image {image} is in no images_{coarse}_*.txt")
        coarse_row = coarse_images[image][1]
        group = groups.setdefault(row.fields[1], coarse_row.fields[1])
        if group != coarse_row.fields[1]:
            raise coarse_row.error(
                f"image {image} puts {row.fields[1]!r} in {coarse} {coarse_row.fields[1]!r}, others in {group!r}"
            )
    return tuple(groups.get(name, "unknown") for name in classes)


def _read_boxes(data: Path) -> dict[str, Box]:
    path = data / "images_box.txt"
    if not path.exists():
        return {}
    rows = keyed(read_rows(path, ("image id", "xmin", "ymin", "xmax", "ymax")))
    return {image: row.corners(1) for image, row in rows.items()}
