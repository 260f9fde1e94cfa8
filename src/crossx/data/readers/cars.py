"""Stanford Cars (Krause et al., 3DRR 2013), in both layouts in which it was distributed.

The site, https://ai.stanford.edu/~jkrause/cars/car_dataset.html, is closed; copies of the archives exist.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from crossx.data.index import DatasetIndex, Record
from crossx.data.readers.parsing import (
    Row,
    archive_root,
    as_list,
    distinct_names,
    folder_hint,
    keyed,
    load_mat,
    mat_rows,
    require_folder,
)
from crossx.errors import CrossXError

_CORNERS = ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2")


def read_cars(root: Path) -> DatasetIndex:
    """Read Stanford Cars, or a part of it, from either layout.

    - ``car_ims/`` with ``cars_annos.mat`` (all 16,185 images in one folder);
    - ``cars_train/`` and ``cars_test/`` with ``devkit/cars_meta.mat``, ``devkit/cars_train_annos.mat`` and
      ``cars_test_annos_withlabels.mat``, inside or next to ``devkit/``.

    Labels are the official class ids, counted from 0; class names are those of the .mat files (``Acura RL Sedan
    2012``). Box corners are inclusive and count from 1, as in MATLAB.

    Args:
        root: The folder with one of the two layouts, or the folder that contains it as ``stanford_cars``.

    Raises:
        CrossXError: If a file or image folder is missing, a .mat file is broken, or an entry is malformed.
    """
    root = archive_root(root, "cars_annos.mat", "stanford_cars")
    has_devkit = (root / "devkit").is_dir()
    if (root / "cars_annos.mat").is_file() and ((root / "car_ims").is_dir() or not has_devkit):
        return _read_joint(root)
    if has_devkit:
        return _read_devkit(root)
    raise CrossXError(
        f"{root} holds neither cars_annos.mat (with car_ims/) nor devkit/ (with cars_train/ and cars_test/): "
        f"pass the folder of one of the two Stanford Cars layouts as --data.root.{folder_hint(root)}"
    )


def _read_joint(root: Path) -> DatasetIndex:
    path = root / "cars_annos.mat"
    names, annotations = load_mat(path, "class_names", "annotations")
    classes = _class_names(path, names)
    require_folder(root / "car_ims")
    rows = _rows(path, annotations, "relative_im_path", "test")
    records = tuple(
        _record(row, root, "test" if row.flag(6, "'test'") else "train", len(classes)) for row in rows
    )
    return DatasetIndex(name="cars", classes=classes, records=records)


def _read_devkit(root: Path) -> DatasetIndex:
    meta = root / "devkit" / "cars_meta.mat"
    classes = _class_names(meta, *load_mat(meta, "class_names"))
    lists = {"train": root / "devkit" / "cars_train_annos.mat", "test": _labelled_test_list(root)}
    records: list[Record] = []
    for split, path in lists.items():
        rows = _rows(path, *load_mat(path, "annotations"), "fname")
        folder = require_folder(root / f"cars_{split}")
        records += [_record(row, folder, split, len(classes)) for row in rows]
    return DatasetIndex(name="cars", classes=classes, records=tuple(records))


def _labelled_test_list(root: Path) -> Path:
    name = "cars_test_annos_withlabels.mat"
    for path in (root / name, root / "devkit" / name):
        if path.is_file():
            return path
    raise CrossXError(
        f"{root / name} is missing, in devkit/ too: the devkit's own cars_test_annos.mat has no classes, so "
        f"download {name}, a separate file, and put it there."
    )


def _class_names(path: Path, names: Any) -> tuple[str, ...]:
    rows = mat_rows(path, {"class_names": names})
    return distinct_names([row.fields[0] for row in rows], [row.number for row in rows])


def _rows(path: Path, annotations: Any, file: str, *more: str) -> list[Row]:
    """Return the entries as rows of file, xmin, ymin, xmax, ymax, class and ``more``, each file once."""
    entries = as_list(annotations)
    fields = (file, *_CORNERS, "class", *more)
    for field in fields:
        if not all(isinstance(entry, dict) and field in entry for entry in entries):
            raise CrossXError(
                f"{path}: its annotations have no field {field!r}: it is not the archive's own file."
            )
    rows = mat_rows(path, {field: [entry[field] for entry in entries] for field in fields})
    return list(keyed(rows).values())


def _record(row: Row, folder: Path, split: str, num_classes: int) -> Record:
    class_id = row.integer(5, "'class'")
    if not 1 <= class_id <= num_classes:
        raise row.error(f"class {class_id} is outside the {num_classes} classes")
    return Record(path=row.file_in(folder, 0), label=class_id - 1, split=split, box=row.corners(1))
