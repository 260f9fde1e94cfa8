"""Stanford Dogs (Khosla et al., 2011), http://vision.stanford.edu/aditya86/ImageNetDogs/."""

from __future__ import annotations

from pathlib import Path

from crossx.data.index import DatasetIndex, Record
from crossx.data.readers.parsing import (
    Row,
    archive_root,
    distinct_names,
    keyed,
    load_mat,
    mat_rows,
    require_folder,
)


def read_dogs(root: Path) -> DatasetIndex:
    """Read Stanford Dogs, or a part of it, from the unpacked ``images.tar`` and ``lists.tar``.

    ``train_list.mat`` and ``test_list.mat`` give each image's file and class id. Labels follow the class ids; a
    class is named after its folder without the WordNet id (``Chihuahua`` for ``n02085620-Chihuahua``). Only classes
    with listed images exist. ``file_list.mat`` (the two lists combined) and the boxes in ``Annotation/`` are not read.

    Args:
        root: The folder that holds ``Images/`` and the lists, which may also be in ``lists/``.

    Raises:
        CrossXError: If a list or ``Images/`` is missing, a list is broken, an entry is malformed, or a class has two
            folders.
    """
    lists = archive_root(root, "train_list.mat", "lists")
    rows = [(split, row) for split in ("train", "test") for row in _read_list(lists / f"{split}_list.mat")]
    keyed(row for _, row in rows)
    folders = _class_folders([row for _, row in rows])
    labels = {class_id: label for label, class_id in enumerate(folders)}
    images = require_folder(root / "Images")
    breeds = [folder.partition("-")[2] or folder for folder in folders.values()]
    return DatasetIndex(
        name="dogs",
        classes=distinct_names(breeds, list(folders)),
        records=tuple(
            Record(path=row.file_in(images, 0), label=labels[int(row.fields[1])], split=split)
            for split, row in rows
        ),
    )


def _read_list(path: Path) -> list[Row]:
    """Return the entries as rows of file and class id."""
    files, class_ids = load_mat(path, "file_list", "labels")
    return mat_rows(path, {"file_list": files, "labels": class_ids})


def _class_folders(rows: list[Row]) -> dict[int, str]:
    """Return class id -> folder name, by ascending id; each class must have exactly one folder."""
    folders: dict[int, str] = {}
    for row in rows:
        folder, _, file = row.fields[0].partition("/")
        if not file:
            raise row.error(f"expected folder/file, found {folder!r}")
        class_id = row.integer(1, "the label")
        if folders.setdefault(class_id, folder) != folder:
            raise row.error(f"class {class_id} is in folder {folder!r}, but earlier in {folders[class_id]!r}")
    return dict(sorted(folders.items()))
