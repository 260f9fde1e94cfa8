"""Caltech-UCSD Birds-200-2011 (Wah et al., 2011), as https://www.vision.caltech.edu/datasets/cub_200_2011/ has it."""

from __future__ import annotations

from pathlib import Path

from crossx.data.index import DatasetIndex
from crossx.data.parsing import archive_root, distinct_names
from crossx.data.visipedia import read_classes, read_records


def read_cub(root: Path) -> DatasetIndex:
    """Read CUB-200-2011 from the unpacked ``CUB_200_2011.tgz``.

    Labels follow the class ids of ``classes.txt``, names are its own (``001.Black_footed_Albatross``). The split
    is that of ``train_test_split.txt``. Boxes (``bounding_boxes.txt``) and the visible ones of the 15 keypoints
    (``parts/``) are kept with each record where the archive has them. Any part of the archive in this layout, with
    fewer classes or images, is read the same way.

    Args:
        root: The folder ``CUB_200_2011``, or the folder that contains it.

    Raises:
        CrossXError: If a file or ``images/`` is missing, a line is malformed, or the lists disagree.
    """
    root = archive_root(root, "classes.txt", "CUB_200_2011")
    classes = read_classes(root)
    labels = {class_id: label for label, class_id in enumerate(classes)}
    return DatasetIndex(
        name="cub",
        classes=distinct_names(list(classes.values()), list(classes)),
        records=read_records(root, labels, "is not in classes.txt"),
    )
