"""The user's own images, one folder per class."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from crossx.commands import quoted as quoted_path
from crossx.data.image_files import describe_unread, find_images, is_image_name, leads_up
from crossx.data.images import printable
from crossx.data.index import SPLITS, DatasetIndex, Record, UntrainedClassError, hold_out_test
from crossx.data.leftovers import is_leftover
from crossx.data.names import (
    class_name,
    class_notes,
    lookalikes,
    quoted,
    short_split_name,
    split_name,
)
from crossx.errors import CrossXError, counted, first_few

_FOLD = re.compile(r"(k?fold|split|cv|partition)[\s._-]*[0-9]+", re.IGNORECASE)
_SHOWN = 5


def read_folder(root: Path, *, test_fraction: float = 0.2, split_seed: int = 0) -> DatasetIndex:
    """Read ``ROOT/CLASS/image.jpg``, or ``ROOT/train/CLASS/image.jpg`` and the same for ``val`` and ``test``.

    Classes are the folder names (``names.class_name``), in sorted order; folders whose names are the same text are one
    class. Nested folders are searched and links followed; files without an image suffix (``IMAGE_SUFFIXES``),
    hidden ones and what other programs leave behind (``leftovers.is_leftover``) are skipped. Split folders may have
    other usual names (``Training``, ``test_set``, ``valid``, ``dev``); see ``names.split_name``. Without split folders,
    ``test_fraction`` of each class is held out for testing.

    Args:
        root: The folder of the class folders or of the split folders.
        test_fraction: Share of each class's images that becomes the test split, in [0, 1).
        split_seed: Seed of that choice.

    Raises:
        CrossXError: If the root is missing, has no class folders, names of folders may be splits but are not clear, or
            a class has no training images.
        UsageError: If ``test_fraction`` is out of range.
    """
    if not root.is_dir():
        problem = "is a file" if root.exists() else "no such folder"
        raise CrossXError(
            f"{printable(root)}: {problem}. --data.root takes the folder that holds one folder per class."
        )
    found = _Found(root)
    splits = _split_folders(root, found)
    files = {split: _images_by_class(folder, found) for split, folder in (splits or {"train": root}).items()}
    for split, by_class in files.items():
        if split != "train" and (empty := [name for name, paths in by_class.items() if not paths]):
            found.notes.append(f"no images in {_listed(sorted(empty))} of the {split} split")
            files[split] = {name: paths for name, paths in by_class.items() if paths}
    classes, untrained = _classes(root, files, splits.get("train", root))
    if not splits:
        _require_no_splits_inside(root)
        found.notes.extend(_same_inside_note(root))
    labels = {name: label for label, name in enumerate(classes)}
    records = [
        Record(path=path, label=labels[name], split=split)
        for split, by_class in files.items()
        for name, paths in by_class.items()
        for path in paths
    ]
    if not splits:
        records = hold_out_test(records, classes, root, test_fraction, split_seed)
    notes = (*found.all_notes(), *class_notes(classes))
    index = DatasetIndex(name="folder", classes=tuple(classes), records=tuple(records), notes=notes)
    if untrained:
        raise UntrainedClassError(untrained, index)
    return index


def skipped_note(skipped: Sequence[Path], root: Path) -> str:
    """Return the note that counts skipped files and folders, with paths relative to ``root``."""
    names = sorted(repr(printable(path.relative_to(root))) for path in skipped)
    what = "file or folder" if len(names) == 1 else "files and folders"
    return f"skipped {len(names):,} hidden or system {what}: {first_few(names, _SHOWN)}"


@dataclass
class _Found:
    """What was noticed while the folders were read."""

    root: Path
    skipped: list[Path] = field(default_factory=list)
    unread: list[Path] = field(default_factory=list)
    loose: int = 0
    broken: list[Path] = field(default_factory=list)
    spellings: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    notes: list[str] = field(default_factory=list)

    def all_notes(self) -> list[str]:
        notes = list(self.notes)
        if self.skipped:
            notes.append(skipped_note(self.skipped, self.root))
        if self.unread:
            notes.append(describe_unread(self.unread))
        if self.loose:
            verb = "is" if self.loose == 1 else "are"
            notes.append(f"{counted(self.loose, 'image')} in no class folder {verb} not read")
        if self.broken:
            names = [repr(printable(path.relative_to(self.root))) for path in self.broken]
            what = "a link that leads" if len(names) == 1 else "links that lead"
            notes.append(f"{first_few(names, _SHOWN)}: {what} nowhere, not read")
        merged = [
            f"{', '.join(map(ascii, sorted(spellings)))} (class {name!r})"
            for name, spellings in self.spellings.items()
            if len(spellings) > 1
        ]
        if merged:
            notes.append(
                f"folders whose names are the same text are one class: {first_few(merged, _SHOWN, '; ')}"
            )
        return notes


def _split_folders(root: Path, found: _Found) -> dict[str, Path]:
    """Return split -> folder, empty if ``root`` holds classes."""
    folders = _subfolders(root, found)
    splits, sure = _named_after_splits(folders)
    if not splits:
        numbered = [folder.name for folder in folders if _FOLD.fullmatch(folder.name.strip())]
        if len(numbered) > 1 and len(numbered) == len(folders):
            raise CrossXError(
                f"{printable(root)}: {first_few([repr(name) for name in numbered], _SHOWN)} seem to be parts of the "
                "data, not classes. Put the classes into the folders train, val and test."
            )
        return {}
    chosen = [folder for group in splits.values() for folder in group]
    others = [folder for folder in folders if folder not in chosen]
    names = ", ".join(repr(printable(folder.name)) for folder in chosen)
    is_class = not (sure and len(splits) > 1 and "train" in splits)
    if is_class and others and _holds_images(*chosen):
        if sure:
            found.notes.append(f"{names} read as a class, not as a split, next to {_named(others)}")
        return {}
    if empty := [folder for folder in others if not find_images(folder)]:
        found.notes.append(f"no images in {_named(empty)}, next to the split folders: not read")
        others = [folder for folder in others if folder not in empty]
    for split, group in splits.items():
        if len(group) > 1:
            raise CrossXError(
                f"{printable(root)}: both {_named(group, ' and ')} name the {split} split. Keep one."
            )
    if others:
        raise CrossXError(
            f"{printable(root)}: {_named(others)} {'is' if len(others) == 1 else 'are'} next to the split folder "
            f"{printable(chosen[0].name)!r}. "
            "Keep either the splits there (train, val, test) or the classes."
        )
    if "unclear" in splits:
        raise CrossXError(
            f"{printable(root)}: {_named(splits['unclear'])} may be a validation or a test split. "
            "Rename it to val or test."
        )
    if "train" not in splits:
        raise CrossXError(f"{printable(root)}: there is no folder 'train' next to {names}.")
    read = {split: splits[split][0] for split in SPLITS if split in splits}
    renamed = [
        f"{printable(folder.name)!r} as {split}"
        for split, folder in read.items()
        if folder.name.casefold() != split
    ]
    if renamed:
        found.notes.append(f"split folders with other names: read {', '.join(renamed)}")
    return read


def _named_after_splits(folders: Sequence[Path]) -> tuple[dict[str, list[Path]], bool]:
    """Return split -> folders named after it, and whether they have no other word in their names.

    Names with other words (``birds_train``, ``birds_test``) count if the other words are the same, abbreviations
    (``tr``, ``te``) if all folders have them.
    """
    groups: dict[tuple[str, ...], dict[str, list[Path]]] = defaultdict(lambda: defaultdict(list))
    for folder in folders:
        split, rest = split_name(folder.name)
        if split is not None:
            groups[rest][split].append(folder)
    if () in groups:
        for folder in folders:
            if short := short_split_name(folder.name):
                groups[()][short].append(folder)
        return dict(groups[()]), True
    for group in groups.values():
        if len(group) > 1:
            return dict(group), False
    short_names: dict[str, list[Path]] = defaultdict(list)
    for folder in folders:
        short_names[short_split_name(folder.name) or ""].append(folder)
    if "train" in short_names and "" not in short_names and len(short_names) > 1:
        return dict(short_names), True
    return {}, False


def _require_no_splits_inside(root: Path) -> None:
    """Refuse ``ROOT/CLASS/train`` next to ``ROOT/CLASS/test``, which would be mixed."""
    for folder in _subfolders(root):
        splits, sure = _named_after_splits(_subfolders(folder))
        if sure and "train" in splits and len(splits) > 1:
            inside = _named([inner for group in splits.values() for inner in group])
            raise CrossXError(
                f"{printable(folder)}: holds the split folders {inside}. Put the class folders into the split folders: "
                "train/CLASS, test/CLASS."
            )


def _same_inside_note(root: Path) -> list[str]:
    """Return a note if all folders hold mostly folders of the same names, as splits with unknown names do."""
    folders = _subfolders(root)
    inside = [{inner.name for inner in _subfolders(folder)} for folder in folders]
    names = set.intersection(*inside) if len(inside) > 1 else set()
    if len(names) < 2 or 2 * len(names) < max(map(len, inside)) or _holds_images(*folders):
        return []
    listed = first_few([repr(printable(name)) for name in sorted(names)], _SHOWN)
    return [
        f"{_named(folders)} all hold the folders {listed}: if those are the classes, rename the outer ones to "
        "train, val and test"
    ]


def _holds_images(*folders: Path) -> bool:
    return any(is_image_name(path.name) for folder in folders for path in _children(folder))


def _images_by_class(folder: Path, found: _Found) -> dict[str, list[Path]]:
    by_class: dict[str, list[Path]] = {}
    for child in _subfolders(folder, found if folder != found.root else None):
        name = class_name(child.name)
        if not name:
            raise CrossXError(
                f"{printable(folder)}: the folder {child.name!a} has no visible name. Rename it."
            )
        found.spellings[name].add(child.name)
        by_class.setdefault(name, []).extend(find_images(child, found.skipped, found.unread))
    found.loose += sum(is_image_name(path.name) for path in _children(folder))
    return by_class


def _children(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        raise CrossXError(f"{printable(folder)}: the folder cannot be listed ({error.strerror}).") from error


def _subfolders(folder: Path, found: _Found | None = None) -> list[Path]:
    try:
        children = _children(folder)
        if found is not None:
            found.skipped.extend(path for path in children if _is_skipped(path))
            found.broken.extend(path for path in children if _is_broken_link(path))
        return [path for path in children if not _is_skipped(path) and path.is_dir() and not leads_up(path)]
    except OSError as error:
        raise CrossXError(f"{printable(folder)}: the folder cannot be listed ({error.strerror}).") from error


def _is_broken_link(path: Path) -> bool:
    # a class is missing then; single images are reported when they are read
    return (
        path.is_symlink() and not path.exists() and not (is_leftover(path.name) or is_image_name(path.name))
    )


def _is_skipped(path: Path) -> bool:
    """Return whether something left behind, or a folder of training runs: the default is ``runs`` where one works."""
    return (
        is_leftover(path.name)
        or (path / "run.json").is_file()
        or (path.name == "runs" and any(path.glob("*/run.json")))
    )


def _classes(
    root: Path, files: Mapping[str, Mapping[str, Sequence[Path]]], where: Path
) -> tuple[list[str], str]:
    """Return the sorted class names, and which have no training images (``where``: the training folder)."""
    train = files["train"]
    if not train:
        loose = " The images in it need one folder per class." if _holds_images(where) else ""
        raise CrossXError(f"{printable(where)}: holds no class folders.{loose} Check --data.root.")
    if not any(train.values()):
        raise CrossXError(
            f"{printable(where)}: no images in any of its {len(train)} folders. Check --data.root."
        )
    untrained = []
    empty = sorted(name for name, paths in train.items() if not paths)
    if empty:
        untrained.append(
            f"{printable(where)}: no images in {_listed(empty)}. Add some, or remove the folder."
        )
    for split, by_class in files.items():
        unseen = sorted(set(by_class) - set(train))
        if unseen:
            alike = [group for group in lookalikes([*train, *by_class]) if set(group) & set(unseen)]
            hint = f" ({' and '.join(quoted(alike[0]))} look the same: rename one.)" if alike else ""
            untrained.append(
                f"{printable(root)}: {_listed(unseen)} only in the {split} split, not in train: a class needs training "
                f"images.{hint}"
            )
    if len(train) == 1 and not untrained:
        raise CrossXError(
            f"{printable(where)}: only one class folder, {next(iter(train))!r}, and a classifier needs two. "
            f"{_where_classes_are(where)}"
        )
    return sorted({name for by_class in files.values() for name in by_class}), next(iter(untrained), "")


def _where_classes_are(where: Path) -> str:
    """Return what to do about a folder that holds a single class."""
    folders = _subfolders(where)
    # an archive may have several folders around the classes
    while len(folders) == 1 and not _holds_images(folders[0]) and (inner := _subfolders(folders[0])):
        if len(inner) > 1:
            return f"For the classes inside it, give --data.root {quoted_path(folders[0])}."
        folders = inner
    return "Add a folder for each other class."


def _listed(names: Sequence[str]) -> str:
    return f"class{'es' if len(names) > 1 else ''} {first_few([repr(name) for name in names], 10)}"


def _named(folders: Sequence[Path], separator: str = ", ") -> str:
    return first_few([repr(printable(folder.name)) for folder in folders], _SHOWN, separator)
