"""Stanford Dogs (Khosla et al., 2011), as http://vision.stanford.edu/aditya86/ImageNetDogs/ distributes it."""

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
    """Read Stanford Dogs from the unpacked ``images.tar`` and ``lists.tar``.

    ``train_list.mat`` and ``test_list.mat`` give each image's file and class id. Labels follow the class ids; a
    class is named as its folder without the WordNet id (``Chihuahua`` for ``n02085620-Chihuahua``). The lists are
    the only place that names the classes, so those of a subset are the ones it has images of. ``file_list.mat``,
    which is the two lists together, and the boxes in ``Annotation/`` are not read.

    Args:
        root: The folder that holds ``Images/`` and the lists, which may also lie in ``lists/``.

    Raises:
        CrossXError: If a list or ``Images/`` is missing, a list is broken, an entry is malformed, or a class has two
            folders.
    """
    lists = archive_root(root, "train_list.mat", "lists")
    rows = {split: _read_list(lists / f"{split}_list.mat") for split in ("train", "test")}
    keyed(row for split_rows in rows.values() for row in split_rows)
    folders = _class_folders([row for split_rows in rows.values() for row in split_rows])
    labels = {class_id: label for label, class_id in enumerate(folders)}
    images = require_folder(root / "Images")
    return DatasetIndex(
        name="dogs",
        classes=distinct_names([_breed(folder) for folder in folders.values()], list(folders)),
        records=tuple(
            Record(path=row.file_in(images, 0), label=labels[int(row.fields[1])], split=split)
            for split, split_rows in rows.items()
            for row in split_rows
        ),
    )


def _read_list(path: Path) -> list[Row]:
    """Return the entries of a list as rows of file and class id."""
    files, class_ids = load_mat(path, "file_list", "labels")
    return mat_rows(path, {"file_list": files, "labels": class_ids})


def _class_folders(rows: list[Row]) -> dict[int, str]:
    """Return class id to folder name, by ascending id, after checking that each class has one folder."""
    folders: dict[int, str] = {}
    for row in rows:
        folder, _, file = row.fields[0].partition("/")
        if not file:
            raise row.error(f"expected folder/file, found {folder!r}")
        class_id = row.integer(1, "the label")
        if folders.setdefault(class_id, folder) != folder:
            raise row.error(
                f"class {class_id} is in folder {folder!r} here and in {folders[class_id]!r} before"
            )
    return dict(sorted(folders.items()))


def _breed(folder: str) -> str:
    """Return the breed in a folder name such as ``n02085620-Chihuahua``."""
    return folder.partition("-")[2] or folder
