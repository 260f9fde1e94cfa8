"""The user's own images, one folder per class."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from crossx.data.images import find_images, is_image_name
from crossx.data.index import SPLITS, DatasetIndex, Record, hold_out_test
from crossx.errors import CrossXError, first_few

SPLIT_NAMES = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
"""Names of the splits in folders and tables, in lower case."""


def read_folder(root: Path, *, test_fraction: float = 0.2, split_seed: int = 0) -> DatasetIndex:
    """Read ``ROOT/CLASS/image.jpg``, or ``ROOT/train/CLASS/image.jpg`` and the same for ``val`` and ``test``.

    Classes are the folder names, in sorted order, with escapes for bytes that are not UTF-8. Nested folders are
    searched and links followed; hidden files and files without an image suffix (``images.IMAGE_SUFFIXES``) are skipped.
    Without split folders, ``test_fraction`` of each class is held out for testing.

    Args:
        root: The folder of the class folders or of the split folders.
        test_fraction: Share of each class's images that becomes the test split, in [0, 1).
        split_seed: Seed of that choice.

    Raises:
        CrossXError: If the root is missing, has no class folders, or a class has no training images.
        UsageError: If ``test_fraction`` is out of range.
    """
    if not root.is_dir():
        problem = "is a file" if root.exists() else "no such folder"
        raise CrossXError(f"{root}: {problem}. --data.root takes the folder that holds one folder per class.")
    splits = _split_folders(root)
    files = {split: _images_by_class(folder) for split, folder in (splits or {"train": root}).items()}
    classes = _classes(root, files, splits.get("train", root))
    labels = {name: label for label, name in enumerate(classes)}
    records = [
        Record(path=path, label=labels[name], split=split)
        for split, by_class in files.items()
        for name, paths in by_class.items()
        for path in paths
    ]
    if not splits:
        records = hold_out_test(records, classes, root, test_fraction, split_seed)
    return DatasetIndex(name="folder", classes=tuple(classes), records=tuple(records))


def _split_folders(root: Path) -> dict[str, Path]:
    """Return split -> folder, empty if ``root`` holds classes."""
    folders = _subfolders(root)
    found: dict[str, Path] = {}
    for folder in folders:
        split = SPLIT_NAMES.get(folder.name.lower())
        if split is None:
            continue
        if split in found:
            raise CrossXError(
                f"{root}: both {found[split].name!r} and {folder.name!r} name the {split} split. Keep one."
            )
        found[split] = folder
    others = [folder for folder in folders if folder not in found.values()]
    if not found or (others and _holds_images(*found.values())):
        return {}
    if others:
        raise CrossXError(
            f"{root}: {others[0].name!r} is next to the split folder {next(iter(found.values())).name!r}. "
            "Keep either the splits there (train, val, test) or the classes."
        )
    if "train" not in found:
        raise CrossXError(
            f"{root}: there is no folder 'train' next to {', '.join(map(repr, sorted(found)))}."
        )
    return {split: found[split] for split in SPLITS if split in found}


def _holds_images(*folders: Path) -> bool:
    return any(is_image_name(path.name) for folder in folders for path in folder.iterdir())


def _images_by_class(folder: Path) -> dict[str, list[Path]]:
    # a class name is text, also where the folder's name is not valid UTF-8
    names = {
        child: os.fsencode(child.name).decode("utf-8", "backslashreplace") for child in _subfolders(folder)
    }
    return {name: find_images(child) for child, name in names.items()}


def _subfolders(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    except OSError as error:
        raise CrossXError(f"{folder}: the folder cannot be listed ({error.strerror}).") from error


def _classes(root: Path, files: Mapping[str, Mapping[str, Sequence[Path]]], where: Path) -> list[str]:
    """Return the sorted class names, each with at least one training image (``where``: the training folder)."""
    train = files["train"]
    if not train:
        loose = " The images in it need one folder per class." if _holds_images(where) else ""
        raise CrossXError(f"{where}: holds no class folders.{loose} Check --data.root.")
    if not any(train.values()):
        raise CrossXError(f"{where}: no images in any of its {len(train)} folders. Check --data.root.")
    empty = sorted(name for name, paths in train.items() if not paths)
    if empty:
        raise CrossXError(f"{where}: no images in {_listed(empty)}. Add some, or remove the folder.")
    for split, by_class in files.items():
        unseen = sorted(set(by_class) - set(train))
        if unseen:
            raise CrossXError(
                f"{root}: {_listed(unseen)} only in the {split} split, not in train: a class needs training images."
            )
    if len(train) == 1:
        raise CrossXError(
            f"{where}: only one class folder, {next(iter(train))!r}, and a classifier needs two: "
            "is --data.root one folder too high?"
        )
    return sorted(train)


def _listed(names: Sequence[str]) -> str:
    return f"class{'es' if len(names) > 1 else ''} {first_few([repr(name) for name in names], 10)}"
