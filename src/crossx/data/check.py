"""Look at a dataset on disk before time is spent on training: what is missing, broken, twice there or mislabelled."""

from __future__ import annotations

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from crossx.data.catalog import DatasetInfo, dataset_info, dataset_root, read_dataset
from crossx.data.images import find_images, image_problem, is_image_name, printable
from crossx.data.index import SPLITS, DatasetIndex, Record

Progress = Callable[[int, int], None]
"""Called with the number of images looked at so far, and of all."""

_NOTED = 10  # names shown of a note; the files of a problem are all shown


@dataclass(frozen=True)
class Finding:
    """Something found in a dataset.

    Attributes:
        kind: ``missing``, ``unreadable``, ``mislabelled``, ``leaked``, ``untrained`` (problems) or ``duplicate``,
            ``unlisted``, ``untested``, ``counts`` (notes).
        message: What it is, in one line.
        items: The files or classes it is about, one line each.
    """

    kind: str
    message: str
    items: tuple[str, ...] = ()


@dataclass(frozen=True)
class SplitCount:
    """Classes with images and images of a split."""

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
        problems: What has to be mended before training: missing and unreadable images, the same image in two
            splits or under two labels, labels that contradict an archive's folders, classes without training
            images.
        notes: What is good to know: the same image twice in one class and split, image files that no list names,
            classes without test images, counts that differ from Table 1 of the paper.
    """

    dataset: str
    root: str
    classes: int
    splits: Mapping[str, SplitCount]
    problems: tuple[Finding, ...]
    notes: tuple[Finding, ...]

    @property
    def exit_code(self) -> int:
        """1 where there are problems, else 0."""
        return 1 if self.problems else 0

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain values."""
        return asdict(self)

    def summary(self) -> str:
        """Write the report for a terminal: every file of a problem, the first ten of a note."""
        lines = [f"{self.dataset} in {self.root}: {self.classes:,} classes"]
        lines += [
            f"  {split:<5}  {count.images:>7,} images of {count.classes:,} classes"
            for split, count in self.splits.items()
        ]
        for finding in self.problems:
            lines += [f"problem: {finding.message}", *(f"  {item}" for item in finding.items)]
        for finding in self.notes:
            lines += [f"note: {finding.message}", *(f"  {item}" for item in finding.items[:_NOTED])]
            if len(finding.items) > _NOTED:
                lines.append(f"  and {len(finding.items) - _NOTED:,} more")
        count = len(self.problems)
        lines.append(f"{count or 'no'} problem{'' if count == 1 else 's'}")
        return "\n".join(lines)


def check_dataset(
    name: str, root: str | Path | None, *, progress: Progress | None = None, **options: Any
) -> Report:
    """Read a dataset's lists, decode and compare every image they name, and count.

    Args:
        name: A name in ``catalog.DATASETS``.
        root: Its folder or table, as for ``read_dataset``.
        progress: Called after every image.
        **options: Options of the dataset's reader.

    Raises:
        UsageError: As ``read_dataset``.
        CrossXError: If the lists themselves cannot be read.
    """
    info = dataset_info(name)
    index = read_dataset(name, root, **options)
    place = dataset_root(name, root, {key: value for key, value in options.items() if value is not None})
    paths = list(dict.fromkeys(record.path for record in index.records))
    broken, digests = _look_at(paths, progress)
    problems = [
        *_missing_and_unreadable(broken),
        *_same_bytes_apart(index, digests),
        *_untrained(index),
    ]
    notes = [
        *_counts(info, index, options.get("level")),
        *_duplicates(index, digests),
        *_unlisted(index, place),
        *_untested(index),
    ]
    # A table's labels may rightly differ from its folders, an official archive's may not.
    (problems if info.table1 else notes).extend(_in_folder_of_another_class(index))
    return Report(name, str(place), len(index.classes), _split_counts(index), tuple(problems), tuple(notes))


def _look_at(paths: Sequence[Path], progress: Progress | None) -> tuple[dict[Path, str], dict[Path, bytes]]:
    """Return what is wrong with each broken image, and the digest of every other one."""
    broken: dict[Path, str] = {}
    digests: dict[Path, bytes] = {}
    # Pillow and hashlib work without the interpreter lock
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for number, (path, (problem, digest)) in enumerate(
            zip(paths, pool.map(_inspect, paths), strict=True), start=1
        ):
            if problem is None:
                digests[path] = digest
            else:
                broken[path] = problem
            if progress is not None:
                progress(number, len(paths))
    return broken, digests


def _inspect(path: Path) -> tuple[str | None, bytes]:
    problem = image_problem(path)
    if problem is not None:
        return problem, b""
    with path.open("rb") as file:
        return None, hashlib.file_digest(file, "sha256").digest()


def _missing_and_unreadable(broken: Mapping[Path, str]) -> Iterable[Finding]:
    missing = tuple(printable(path) for path in broken if not os.path.lexists(path))
    if missing:
        yield Finding("missing", f"{_images(missing)} listed but not there", missing)
    unreadable = tuple(
        f"{printable(path)}: {problem}" for path, problem in broken.items() if os.path.lexists(path)
    )
    if unreadable:
        yield Finding("unreadable", f"{_images(unreadable)} cannot be read", unreadable)


def _groups(index: DatasetIndex, digests: Mapping[Path, bytes]) -> list[list[Record]]:
    """Return the records that share their bytes, where there are several."""
    groups: dict[bytes, list[Record]] = defaultdict(list)
    for record in index.records:
        if record.path in digests:
            groups[digests[record.path]].append(record)
    return [group for group in groups.values() if len(group) > 1]


def _same_bytes_apart(index: DatasetIndex, digests: Mapping[Path, bytes]) -> Iterable[Finding]:
    groups = _groups(index, digests)
    mislabelled = [group for group in groups if len({record.label for record in group}) > 1]
    if mislabelled:
        items = tuple(
            _describe(group, lambda record: repr(index.classes[record.label])) for group in mislabelled
        )
        yield Finding("mislabelled", f"{_images(items)} under two or more labels (identical files)", items)
    leaked = [
        group
        for group in groups
        if len({record.label for record in group}) == 1 and len({record.split for record in group}) > 1
    ]
    if leaked:
        items = tuple(_describe(group, lambda record: record.split) for group in leaked)
        yield Finding("leaked", f"{_images(items)} in two or more splits (identical files)", items)


def _duplicates(index: DatasetIndex, digests: Mapping[Path, bytes]) -> Iterable[Finding]:
    items = tuple(
        " = ".join(printable(record.path) for record in group)
        for group in _groups(index, digests)
        if len({(record.label, record.split) for record in group}) == 1
    )
    if items:
        yield Finding(
            "duplicate", f"{_images(items)} more than once in a class and split (identical files)", items
        )


def _describe(group: Sequence[Record], what: Callable[[Record], str]) -> str:
    return " = ".join(f"{printable(record.path)} ({what(record)})" for record in group)


def _in_folder_of_another_class(index: DatasetIndex) -> Iterable[Finding]:
    """Find labels that differ from those of the other images in their folder, where a folder is a class.

    Where labels do not follow folders (all images in one, or more than a tenth of them apart) nothing is said.
    """
    folders: dict[Path, Counter[int]] = defaultdict(Counter)
    for record in index.records:
        folders[record.path.parent][record.label] += 1
    usual = {folder: labels.most_common(1)[0][0] for folder, labels in folders.items()}
    if set(usual.values()) != {record.label for record in index.records}:
        return
    apart = [record for record in index.records if record.label != usual[record.path.parent]]
    if not apart or 10 * len(apart) > len(index.records):
        return
    names = [(record, index.classes[usual[record.path.parent]]) for record in apart]
    items = tuple(
        f"{printable(record.path)} ({index.classes[record.label]!r}, its folder {other!r})"
        for record, other in names
    )
    yield Finding("mislabelled", f"{_images(items)} labelled otherwise than the rest of their folder", items)


def _untrained(index: DatasetIndex) -> Iterable[Finding]:
    trained = {record.label for record in index.split("train")}
    items = tuple(name for label, name in enumerate(index.classes) if label not in trained)
    if items:
        yield Finding("untrained", f"{_classes(items)} without training images", items)


def _untested(index: DatasetIndex) -> Iterable[Finding]:
    tested = {record.label for record in index.split("test")}
    items = tuple(name for label, name in enumerate(index.classes) if label not in tested)
    if len(items) == len(index.classes):
        yield Finding("untested", "there is no test split")
    elif items:
        yield Finding("untested", f"{_classes(items)} without test images", items)


def _unlisted(index: DatasetIndex, root: Path) -> Iterable[Finding]:
    folders = {record.path.parent for record in index.records if record.path.parent.is_dir()}
    if not folders:
        return
    if root.is_file():  # a table may lie anywhere: its folder can hold much that is none of its business
        on_disk = [
            path for folder in sorted(folders) for path in folder.iterdir() if is_image_name(path.name)
        ]
    else:
        on_disk = find_images(Path(os.path.commonpath(folders)))
    listed = {os.path.abspath(record.path) for record in index.records}
    items = tuple(printable(path) for path in sorted(on_disk) if os.path.abspath(path) not in listed)
    if items:
        yield Finding("unlisted", f"{_images(items)} on disk that the dataset does not list", items)


def _counts(info: DatasetInfo, index: DatasetIndex, level: str | None) -> Iterable[Finding]:
    """Compare with Table 1, which counts classes at the finest level and official validation as training images."""
    if info.table1 is None:
        return
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
    if different:
        yield Finding("counts", f"not all of {info.title} as in Table 1 of the paper: {', '.join(different)}")


def _split_counts(index: DatasetIndex) -> dict[str, SplitCount]:
    counts = {}
    for split in SPLITS:
        records = index.split(split)
        if records:
            counts[split] = SplitCount(len({record.label for record in records}), len(records))
    return counts


def _images(items: Sequence[str]) -> str:
    return f"{len(items):,} image{'' if len(items) == 1 else 's'}"


def _classes(items: Sequence[str]) -> str:
    return f"{len(items):,} class{'' if len(items) == 1 else 'es'}"
