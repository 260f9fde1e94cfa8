"""Caltech-UCSD Birds-200-2011 (Wah et al., 2011), https://www.vision.caltech.edu/datasets/cub_200_2011/.

The archive lists numbered classes and images in text files, one entry per line, as NABirds does: ``classes.txt``
(class id, name), ``images.txt`` (image id, path in ``images/``), ``image_class_labels.txt`` (image id, class id),
``train_test_split.txt`` (image id, 1 for training or 0 for test) and, where present, ``bounding_boxes.txt`` (image id,
x, y, width, height), ``parts/parts.txt`` (part id, name) and ``parts/part_locs.txt`` (image id, part id, x, y,
visible). Source: the archive's README.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from crossx.data.index import Box, DatasetIndex, Record
from crossx.data.readers.parsing import Row, archive_root, distinct_names, keyed, read_rows, require_folder
from crossx.errors import counted


def read_cub(root: Path) -> DatasetIndex:
    """Read CUB-200-2011, or a part of it, from the unpacked ``CUB_200_2011.tgz``.

    Labels follow the class ids of ``classes.txt``; names are as written there (``001.Black_footed_Albatross``). Boxes
    and the visible keypoints (of 15) are read where present.

    Args:
        root: The folder ``CUB_200_2011``, or the folder that contains it.

    Raises:
        CrossXError: If a file or ``images/`` is missing, a line is malformed, or the lists disagree.
    """
    root = archive_root(root, "classes.txt", "CUB_200_2011")
    classes = read_classes(root)
    labels = {class_id: label for label, class_id in enumerate(classes)}
    records, notes = read_records(root, labels, "is not in classes.txt")
    return DatasetIndex(
        name="cub",
        classes=distinct_names(list(classes.values()), list(classes)),
        records=records,
        notes=notes,
    )


def read_classes(root: Path) -> dict[int, str]:
    """Return class id -> name of ``classes.txt``, by ascending id."""
    rows = keyed(read_rows(root / "classes.txt", ("class id", "name"), text=True)).values()
    return dict(sorted((row.integer(0, "the class id"), row.fields[1]) for row in rows))


def read_records(
    root: Path, labels: Mapping[int, int], unknown_class: str
) -> tuple[tuple[Record, ...], tuple[str, ...]]:
    """Read the images listed in ``images.txt``, in its order, and notes on those that boxes or keypoints leave out.

    Image files are not opened.

    Args:
        root: The archive's folder.
        labels: Class id -> label, for every class that an image may have.
        unknown_class: What the error message says about a class id outside ``labels``.

    Raises:
        CrossXError: If a file or ``images/`` is missing, a line is malformed, or the lists disagree.
    """
    images = keyed(read_rows(root / "images.txt", ("image id", "path"), text=True))
    keyed(images.values(), column=1)
    class_ids = _of_images(root / "image_class_labels.txt", "class id", images)
    training = _of_images(root / "train_test_split.txt", "1 for training or 0 for test", images)
    folder = require_folder(root / "images")
    boxes, parts = _read_boxes(root), _read_parts(root)
    listed = {"bounding_boxes.txt": boxes, "parts/part_locs.txt": parts}
    notes = tuple(
        f"{name}: no line for {len(images.keys() - found.keys()):,} of {counted(len(images), 'image')}"
        for name, found in listed.items()
        if found is not None and images.keys() - found.keys()
    )
    records = []
    for image, row in images.items():
        class_id = class_ids[image].integer(1, "the class id")
        if class_id not in labels:
            raise class_ids[image].error(f"class id {class_id} {unknown_class}")
        records.append(
            Record(
                path=row.file_in(folder, 1),
                label=labels[class_id],
                split="train" if training[image].flag(1, "the training column") else "test",
                box=None if boxes is None else boxes.get(image),
                parts=None if parts is None else parts.get(image, {}),
            )
        )
    return tuple(records), notes


def _of_images(path: Path, column: str, images: Mapping[str, Row]) -> dict[str, Row]:
    """Read a list that must have exactly one line per image."""
    rows = keyed(read_rows(path, ("image id", column)))
    for image, row in images.items():
        if image not in rows:
            raise row.error(f"image id {image} has no line in {path.name}")
    for image, row in rows.items():
        if image not in images:
            raise row.error(f"image id {image} is not in images.txt")
    return rows


def _read_boxes(root: Path) -> dict[str, Box] | None:
    path = root / "bounding_boxes.txt"
    if not path.exists():
        return None
    boxes: dict[str, Box] = {}
    for image, row in keyed(read_rows(path, ("image id", "x", "y", "width", "height"))).items():
        x, y, width, height = row.numbers(1, 5, "x, y, width, height")
        if width < 0 or height < 0:
            raise row.error("a box cannot have a negative width or height")
        boxes[image] = (x, y, width, height)
    return boxes


def _read_parts(root: Path) -> dict[str, dict[str, Box]] | None:
    """Return image id -> part name -> visible keypoint, for listed images, None without ``parts/``."""
    if not (root / "parts").exists():
        return None
    listed = keyed(read_rows(root / "parts" / "parts.txt", ("part id", "name"), text=True))
    keyed(listed.values(), 1)  # parts are told apart by their names
    first: dict[tuple[str, str], Row] = {}
    parts: dict[str, dict[str, Box]] = {}
    for row in read_rows(root / "parts" / "part_locs.txt", ("image id", "part id", "x", "y", "visible")):
        image, part = row.fields[:2]
        if part not in listed:
            raise row.error(f"part id {part} is not in parts.txt")
        if (earlier := first.setdefault((image, part), row)) is not row:
            raise row.error(f"part id {part} of image id {image} was already listed in {earlier.place}")
        visible = parts.setdefault(image, {})
        if row.flag(4, "the visible column"):
            x, y = row.numbers(2, 4, "x, y")
            visible[listed[part].fields[1]] = (x, y, 0.0, 0.0)
    return parts
