"""Check a dataset on disk before training: missing, broken, duplicated or mislabelled images."""

from __future__ import annotations

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from crossx.data.catalog import DatasetInfo, dataset_info, dataset_root, read_existing
from crossx.data.image_files import find_images, is_image_name
from crossx.data.images import inspect_image, printable, scaled_note
from crossx.data.index import SPLITS, DatasetIndex, Record
from crossx.data.threads import map_ahead
from crossx.errors import counted

Progress = Callable[[int, int], None]
"""Called with the number of images checked so far and the total."""

_NOTED = 10  # names shown per note; the files of a problem are all shown


@dataclass(frozen=True)
class Finding:
    """Something found in a dataset.

    Attributes:
        kind: ``missing``, ``unreadable``, ``mislabelled``, ``leaked``, ``untrained`` (problems) or ``duplicate``,
            ``unlisted``, ``unvalidated``, ``untested``, ``counts``, ``reader``, ``scaled`` (notes).
        message: What was found, in one line.
        items: The files or classes concerned, one line each.
    """

    kind: str
    message: str
    items: tuple[str, ...] = ()


@dataclass(frozen=True)
class SplitCount:
    """Number of images in a split, and of classes that have some."""

    classes: int
    images: int


@dataclass(frozen=True)
class Report:
    """What ``check_dataset`` found.

    Attributes:
        dataset: The dataset's name.
        root: Where it was read from.
        classes: Number of classes.
        splits: Split to its counts, without empty splits.
        problems: What to fix before training: missing and unreadable images, the same image in two splits or under
            two labels, labels that contradict an archive's folders, classes without training images.
        notes: What is good to know: what the reader assumed or skipped, 16-bit images of which few bits are used,
            duplicates within one class and split, image files that are not listed, classes without validation
            or test images, counts that differ from Table 1 of the paper.
    """

    dataset: str
    root: str
    classes: int
    splits: Mapping[str, SplitCount]
    problems: tuple[Finding, ...]
    notes: tuple[Finding, ...]

    @property
    def exit_code(self) -> int:
        """1 if there are problems, else 0."""
        return 1 if self.problems else 0

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain values."""
        return asdict(self)

    def summary(self) -> str:
        """Format the report for a terminal: every file of a problem, the first ten of a note."""
        lines = [f"{self.dataset} in {self.root}: {counted(self.classes, 'class')}"]
        lines += [
            f"  {split:<5}  {count.images:>7,} image{'s' * (count.images != 1)} of {counted(count.classes, 'class')}"
            for split, count in self.splits.items()
        ]
        for finding in self.problems:
            lines += [f"problem: {finding.message}", *(f"  {item}" for item in finding.items)]
        for finding in self.notes:
            lines += [f"note: {finding.message}", *(f"  {item}" for item in finding.items[:_NOTED])]
            if len(finding.items) > _NOTED:
                lines.append(f"  and {len(finding.items) - _NOTED:,} more")
        lines.append(counted(len(self.problems), "problem") if self.problems else "no problems")
        return "\n".join(lines)


def check_dataset(
    name: str, root: str | Path | None, *, progress: Progress | None = None, **options: Any
) -> Report:
    """Read a dataset's lists, decode and compare every listed image, and count.

    Args:
        name: A name in ``catalog.DATASETS``.
        root: Its folder or table, as for ``read_dataset``.
        progress: Called after every image.
        **options: Options of the dataset's reader.

    Raises:
        UsageError: As ``read_dataset``.
        CrossXError: If the lists cannot be read.
    """
    info = dataset_info(name)
    index = read_existing(name, root, **options)
    place = dataset_root(name, root, options)
    broken, digests, bits = _decode(list(dict.fromkeys(record.path for record in index.records)), progress)
    mislabelled, leaked, duplicates = _identical(index, digests)
    problems = [*_missing_and_unreadable(broken), *mislabelled, *leaked, *_without_images(index, "train")]
    notes = [
        *(Finding("reader", note) for note in index.notes),
        *([Finding("scaled", note)] if (note := scaled_note(bits)) else []),
        *_counts(info, index, options.get("level")),
        *duplicates,
        *_unlisted(index, place),
        *(_without_images(index, "val") if index.split("val") else []),
        *_without_images(index, "test"),
    ]
    # the labels of a table may differ from its folders for good reason, those of an official archive may not
    (problems if info.table1 else notes).extend(_in_folder_of_another_class(index))
    splits = {split: records for split in SPLITS if (records := index.split(split))}
    counts = {
        split: SplitCount(len({record.label for record in records}), len(records))
        for split, records in splits.items()
    }
    return Report(name, str(place), len(index.classes), counts, tuple(problems), tuple(notes))


def _decode(
    paths: Sequence[Path], progress: Progress | None
) -> tuple[dict[Path, str], dict[Path, bytes], list[int | None]]:
    """Return the problem of each broken image, the digest of every other image, and the bits in use of 16."""
    bits: list[int | None] = []
    broken: dict[Path, str] = {}
    digests: dict[Path, bytes] = {}
    # Pillow and hashlib release the interpreter lock
    found = map_ahead(_inspect, paths, len(os.sched_getaffinity(0)))
    for number, (path, (problem, digest, used)) in enumerate(zip(paths, found, strict=True), start=1):
        bits.append(used)
        if problem is None:
            digests[path] = digest
        else:
            broken[path] = problem
        if progress is not None:
            progress(number, len(paths))
    return broken, digests, bits


def _inspect(path: Path) -> tuple[str | None, bytes, int | None]:
    problem, bits = inspect_image(path)
    if problem is not None:
        return problem, b"", None
    with path.open("rb") as file:
        return None, hashlib.file_digest(file, "sha256").digest(), bits


def _missing_and_unreadable(broken: Mapping[Path, str]) -> Iterable[Finding]:
    missing = [printable(path) for path in broken if not os.path.lexists(path)]
    unreadable = [
        f"{printable(path)}: {problem}" for path, problem in broken.items() if os.path.lexists(path)
    ]
    yield from _finding("missing", missing, "image", "listed but missing")
    yield from _finding("unreadable", unreadable, "image", "cannot be read")


def _identical(index: DatasetIndex, digests: Mapping[Path, bytes]) -> tuple[list[Finding], ...]:
    """Find identical files: under two labels, in two splits, and within one class and split."""
    groups: dict[bytes, list[Record]] = defaultdict(list)
    for record in index.records:
        if record.path in digests:
            groups[digests[record.path]].append(record)
    mislabelled, leaked, duplicates = [], [], []
    for group in groups.values():
        if len({record.label for record in group}) > 1:
            mislabelled.append(_describe(group, lambda record: f" ({index.classes[record.label]!r})"))
        elif len({record.split for record in group}) > 1:
            leaked.append(_describe(group, lambda record: f" ({record.split})"))
        elif len(group) > 1:
            duplicates.append(_describe(group, lambda _: ""))
    same = "(identical files)"
    return (
        _finding("mislabelled", mislabelled, "image", f"under two or more labels {same}"),
        _finding("leaked", leaked, "image", f"in two or more splits {same}"),
        _finding("duplicate", duplicates, "image", f"duplicated in a class and split {same}"),
    )


def _describe(group: Sequence[Record], detail: Callable[[Record], str]) -> str:
    return " = ".join(f"{printable(record.path)}{detail(record)}" for record in group)


def _in_folder_of_another_class(index: DatasetIndex) -> list[Finding]:
    """Find labels that differ from those of the other images in the same folder, if each folder is a class.

    If labels do not follow folders (all images in one, or more than a tenth of the labels differ) nothing is reported.
    """
    folders: dict[Path, Counter[int]] = defaultdict(Counter)
    for record in index.records:
        folders[record.path.parent][record.label] += 1
    usual = {folder: labels.most_common(1)[0][0] for folder, labels in folders.items()}
    if set(usual.values()) != {record.label for record in index.records}:
        return []
    different = [
        f"{printable(record.path)} ({index.classes[record.label]!r}, its folder {index.classes[label]!r})"
        for record in index.records
        if record.label != (label := usual[record.path.parent])
    ]
    if 10 * len(different) > len(index.records):
        return []
    return _finding("mislabelled", different, "image", "labelled differently from the rest of their folder")


def _without_images(index: DatasetIndex, split: str) -> list[Finding]:
    present = {record.label for record in index.split(split)}
    if split == "test" and not present:
        return [Finding("untested", "there is no test split")]
    items = [name for label, name in enumerate(index.classes) if label not in present]
    kind, name = {
        "train": ("untrained", "training"),
        "val": ("unvalidated", "validation"),
        "test": ("untested", "test"),
    }[split]
    return _finding(kind, items, "class", f"without {name} images")


def _unlisted(index: DatasetIndex, root: Path) -> list[Finding]:
    folders = {record.path.parent for record in index.records if record.path.parent.is_dir()}
    if not folders:
        return []
    if (
        root.is_file()
    ):  # the folder of a table may hold many unrelated images: only folders of listed ones count
        on_disk = [path for folder in folders for path in folder.iterdir() if is_image_name(path.name)]
    else:
        on_disk = find_images(Path(os.path.commonpath(folders)))
    listed = {os.path.abspath(record.path) for record in index.records}
    items = [printable(path) for path in sorted(on_disk) if os.path.abspath(path) not in listed]
    return _finding("unlisted", items, "image", "on disk that the dataset does not list")


def _counts(info: DatasetInfo, index: DatasetIndex, level: str | None) -> list[Finding]:
    """Compare with Table 1, which counts classes at the finest level and official validation as training images."""
    if info.table1 is None:
        return []
    train = len(index.split("train")) + len(index.split("val"))
    found = {"classes": len(index.classes), "training images": train, "test images": len(index.split("test"))}
    expected = dict(zip(found, info.table1, strict=True))
    if level not in (None, "variant"):
        del found["classes"]
    different = [
        f"{count:,} {what} ({expected[what]:,} in the paper)"
        for what, count in found.items()
        if count != expected[what]
    ]
    if not different:
        return []
    return [Finding("counts", f"not all of {info.title} as in Table 1 of the paper: {', '.join(different)}")]


def _finding(kind: str, items: Sequence[str], noun: str, message: str) -> list[Finding]:
    """Return a finding about ``items``, none if there are no items."""
    return [Finding(kind, f"{counted(len(items), noun)} {message}", tuple(items))] if items else []
