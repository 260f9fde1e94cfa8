"""The user's own images, a folder a class."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from crossx.data.images import find_images, is_image_name
from crossx.data.index import SPLITS, DatasetIndex, Record
from crossx.errors import CrossXError, UsageError

SPLIT_NAMES = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
"""What the splits are called in folder names and tables, in lower case."""


def read_folder(root: Path, *, test_fraction: float = 0.2, split_seed: int = 0) -> DatasetIndex:
    """Read ``ROOT/CLASS/image.jpg``, or ``ROOT/train/CLASS/image.jpg`` and the same for ``val`` and ``test``.

    Classes are the folder names, in sorted order. Images may lie deeper in a class's folder; links are followed;
    hidden files and files that are no images by name (``images.IMAGE_SUFFIXES``) are passed over. Without split
    folders, ``test_fraction`` of each class is held out for testing.

    Args:
        root: The folder of the class folders or of the split folders.
        test_fraction: Share of each class's images that becomes the test split, in [0, 1).
        split_seed: Seed of that choice.

    Raises:
        CrossXError: If the root is missing, has no class folders, or a class has no training images.
        UsageError: If ``test_fraction`` is out of range.
    """
    if not root.exists():
        raise CrossXError(
            f"{root}: no such folder. --data.root takes the folder that holds one folder a class."
        )
    if not root.is_dir():
        raise CrossXError(f"{root}: is a file. --data.root takes the folder that holds one folder a class.")
    splits = _split_folders(root)
    if splits:
        files = {split: _images_by_class(folder) for split, folder in splits.items()}
    else:
        files = {"train": _images_by_class(root)}
    classes = _classes(root, files, list(splits.values()))
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


def hold_out_test(
    records: Iterable[Record], classes: Sequence[str], root: Path, fraction: float, seed: int
) -> list[Record]:
    """Move ``fraction`` of each class's records to the test split.

    The choice depends on the seed, the class's name and its images' paths below ``root`` alone, so that it is the
    same on every machine and for the other classes when one is added. A class with two or more images keeps at
    least one for training and gives at least one; a class with one keeps it.

    Raises:
        UsageError: If ``fraction`` is outside [0, 1).
    """
    if not 0 <= fraction < 1:
        raise UsageError(f"data.test_fraction must lie in [0, 1), not {fraction}.")
    records = list(records)
    if fraction == 0:
        return records
    by_class: dict[int, list[Path]] = defaultdict(list)
    for record in records:
        by_class[record.label].append(record.path)
    chosen: set[Path] = set()
    for label, paths in by_class.items():
        paths.sort(
            key=lambda path: path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)
        )
        random.Random(f"{seed}/test/{classes[label]}").shuffle(paths)
        chosen.update(paths[: min(len(paths) - 1, max(1, round(fraction * len(paths))))])
    return [replace(record, split="test") if record.path in chosen else record for record in records]


def _split_folders(root: Path) -> dict[str, Path]:
    """Return split to folder, empty where ``root`` holds classes."""
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
            f"{root}: {others[0].name!r} lies beside the split folder {next(iter(found.values())).name!r}. "
            "Keep either the splits there (train, val, test) or the classes."
        )
    if "train" not in found:
        raise CrossXError(f"{root}: there is no folder 'train' beside {', '.join(map(repr, sorted(found)))}.")
    return {split: found[split] for split in SPLITS if split in found}


def _holds_images(*folders: Path) -> bool:
    return any(is_image_name(path.name) for folder in folders for path in folder.iterdir())


def _images_by_class(folder: Path) -> dict[str, list[Path]]:
    return {child.name: find_images(child) for child in _subfolders(folder)}


def _subfolders(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    except OSError as error:
        raise CrossXError(f"{folder}: the folder cannot be listed ({error.strerror}).") from error


def _classes(
    root: Path, files: Mapping[str, Mapping[str, Sequence[Path]]], split_folders: Sequence[Path]
) -> list[str]:
    """Return the sorted class names, each with at least one training image."""
    train = files["train"]
    where = split_folders[0] if split_folders else root
    if not train:
        loose = " The images in it need one folder a class." if _holds_images(where) else ""
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
            "does --data.root point one folder too high?"
        )
    return sorted(train)


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:10])
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return f"class{'es' if len(names) > 1 else ''} {shown}{more}"
