"""Leave images out of a dataset: tables with a column ``path``, such as ``exclude.csv`` of an audit."""

from __future__ import annotations

import os
import posixpath
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from crossx.data.index import SPLITS, DatasetIndex, Record, relative_path
from crossx.errors import CrossXError, counted, first_few
from crossx.runs import atomic_path
from crossx.runs.spreadsheet import unescape_formula, write_rows
from crossx.suggestions import nearest

_SHOWN = 5
_COMPARED = 20_000
"""Most paths that an unknown one is compared with, for the nearest."""


def exclude(index: DatasetIndex, file: Path, base: Path, *, strict: bool = True) -> DatasetIndex:
    """Leave the images that a table lists out of a dataset, and say in a note how many.

    Args:
        index: The dataset.
        file: A table as of ``readers.table`` with a column ``path``: absolute, or relative to ``base``.
        base: The dataset's root, or the folder of its table.
        strict: Whether a path that is not an image of the dataset is an error; else it is ignored.

    Raises:
        CrossXError: If the table is missing or unreadable, a path is unknown, or a class would have no training image.
    """
    names = read_excluded(file)
    known: dict[str, list[Record]] = defaultdict(list)
    for record in index.records:
        known[written_path(record.path, base)].append(record)
    unknown: list[tuple[str, str]] = []
    chosen: set[Path] = set()
    for place, name in names:
        records = _find(name, known, base)
        chosen.update(record.path for record in records)
        if not records:
            unknown.append((place, name))
    if strict and unknown:
        raise _unknown_paths(index, file, base, unknown, len(names), list(known))
    kept = tuple(record for record in index.records if record.path not in chosen)
    excluded = tuple(record for record in index.records if record.path in chosen)
    emptied = {split: _emptied_classes(index, kept, split) for split in SPLITS}
    if emptied["train"]:
        raise CrossXError(
            f"{file}: leaves {counted(len(emptied['train']), 'class')} without training images: "
            f"{first_few(emptied['train'], _SHOWN)}. Take some of their images out of the file, or remove these "
            "classes from the dataset."
        )
    notes = [f"{file}: {_describe(excluded)} left out"]
    notes += [
        f"{file}: leaves {counted(len(names), 'class')} without {split} images: {first_few(names, _SHOWN)}"
        for split, names in emptied.items()
        if names
    ]
    return replace(index, records=kept, excluded=excluded, notes=(*index.notes, *notes))


def read_excluded(file: Path) -> list[tuple[str, str]]:
    """Return the paths that a table lists, each with its place in the table.

    Raises:
        CrossXError: If the table is missing or unreadable, or lacks the column ``path``.
    """
    from crossx.data.readers.table import read_names

    if not file.is_file():
        what = "is a folder, not a table" if file.is_dir() else "no such file"
        raise CrossXError(f"{file}: {what}. --data.exclude takes a table with a column 'path'.")
    return read_names(file)


def write_excluded(file: Path, rows: Iterable[Sequence[str]], columns: Sequence[str] = ("path",)) -> None:
    """Write a table that ``exclude`` reads; the first column is of ``written_path``.

    Raises:
        CrossXError: If it cannot be written.
    """
    with atomic_path(file) as temporary, temporary.open("w", encoding="utf-8", newline="") as opened:
        write_rows(opened, [columns, *rows])


def written_path(path: Path, base: Path) -> str:
    """Return how tables name an image: relative to ``base``; bytes that are not UTF-8 as escapes (``caf\\xe9``)."""
    return os.fsencode(relative_path(path, base)).decode("utf-8", "backslashreplace")


def _find(name: str, known: dict[str, list[Record]], base: Path) -> list[Record]:
    for text in (name, unescape_formula(name), name.strip(), name.strip().replace("\\", "/")):
        for form in (text, posixpath.normpath(text), written_path(Path(text), base.absolute())):
            if form in known:
                return known[form]
    return []


def _unknown_paths(
    index: DatasetIndex,
    file: Path,
    base: Path,
    unknown: Sequence[tuple[str, str]],
    listed: int,
    known: Sequence[str],
) -> CrossXError:
    place, name = unknown[0]
    others = f" ({len(unknown):,} of {counted(listed, 'path')} are unknown)" if len(unknown) > 1 else ""
    return CrossXError(
        f"{file}: {place}: {name!r} is not an image of dataset {index.name!r} in {base}{others}."
        f"{nearest(name, known[:_COMPARED])} "
        "Paths are relative to that folder."
    )


def _emptied_classes(index: DatasetIndex, kept: Iterable[Record], split: str) -> list[str]:
    before = {record.label for record in index.records if record.split == split}
    after = {record.label for record in kept if record.split == split}
    return [repr(index.classes[label]) for label in sorted(before - after)]


def _describe(excluded: Sequence[Record]) -> str:
    counts = Counter(record.split for record in excluded)
    splits = ", ".join(f"{counts[split]:,} {split}" for split in SPLITS if counts[split])
    return f"{counted(len(excluded), 'image')}{f' ({splits})' if splits else ''}"
