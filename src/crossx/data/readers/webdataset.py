"""The user's own images in WebDataset shards: tar files of samples, ``KEY.jpg`` next to ``KEY.cls``.

https://github.com/webdataset/webdataset. The shards are read as data of unknown origin: only regular members with names
inside the archive, each within the file's bounds, are accepted. The images are unpacked into the cache once.
"""

from __future__ import annotations

import json
import posixpath
import re
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import Any

from crossx.data.image_files import IMAGE_SUFFIXES
from crossx.data.images import printable
from crossx.data.index import DatasetIndex
from crossx.data.leftovers import is_leftover, is_system_path
from crossx.data.names import split_name
from crossx.data.readers.embedded import EncodedImage, unpack_images
from crossx.data.readers.rows import LabelTable, index_rows
from crossx.errors import CrossXError, UsageError, counted, first_few, first_line
from crossx.suggestions import nearest

LABELS = ("cls", "json", "txt")
"""Extensions of labels, the first that a sample has."""
FIELDS = ("label", "cls", "class", "class_name", "category", "species", "labels", "classes")
"""Fields of a label in JSON, the first that is there."""
CLASS_LISTS = ("classnames.txt", "classes.txt")
"""Files with the names of numbered classes, one per line."""
MAX_IMAGE, MAX_LABEL = 512 << 20, 1 << 20
"""Bytes of the largest image and of the largest label that are read."""
_COMPRESSED = (".tar.gz", ".tgz", ".tar.zst", ".tar.bz2", ".tar.xz")
_BLOCK = 512
_NUMBER = re.compile(r"-?[0-9]{1,9}")
_SHOWN = 5


@dataclass
class _Sample:
    """One sample: where its image is, and its label as stored."""

    shard: Path
    key: str
    image: tuple[str, int, int] | None = None  # name, offset, size
    labels: dict[str, bytes] = field(default_factory=dict)

    @property
    def place(self) -> str:
        return f"{self.shard.name}, sample {printable(self.key)}"


def read_webdataset(
    root: Path, *, label_column: str | None = None, test_fraction: float = 0.2, split_seed: int = 0
) -> DatasetIndex:
    """Read the ``.tar`` files in a folder and its subfolders, or a single one.

    The files of a sample have the same name up to its first dot: an image (``IMAGE_SUFFIXES``) and its label in
    ``.cls`` or ``.txt`` (text or a number) or ``.json`` (in a field, see ``FIELDS``). Shards are of the split that they
    or their folders are named after (``train-000.tar``, ``val/000.tar``); if none is, ``test_fraction`` of each class
    is held out for testing. ``classnames.txt`` next to the shards names classes that are numbers.

    Args:
        root: The folder, or a shard.
        label_column: The field of the label in ``.json``.
        test_fraction: Share of each class's images that becomes the test split, in [0, 1).
        split_seed: Seed of that choice.

    Raises:
        CrossXError: If there are no shards, one is damaged or hostile, or samples are wrong (as rows of a table).
        UsageError: If ``test_fraction`` is out of range.
    """
    shards = _shards(root)
    splits = {shard: _split(root, shard) for shard in shards}
    named = [split for split in splits.values() if split]
    if named and len(named) < len(shards):
        unnamed = next(shard for shard, split in splits.items() if not split)
        raise CrossXError(
            f"{root}: some shards are named after a split, and {unnamed.name!r} is not. Name all of them, as "
            "train-000.tar, val-000.tar and test-000.tar, or none."
        )
    notes: list[str] = []
    samples = [sample for shard in shards for sample in _samples(shard, notes)]
    problems = [f"{sample.place}: no image" for sample in samples if sample.image is None]
    problems += [f"{sample.place}: no label" for sample in samples if not sample.labels]
    if problems:
        found = first_few(problems, _SHOWN, "; ")
        raise CrossXError(
            f"{root}: {'; '.join([found, *notes])}. A sample is an image and a label of the same name: 01.jpg and "
            "01.cls, 01.txt or 01.json."
        )
    if not samples:
        raise CrossXError(f"{root}: no images in {counted(len(shards), 'shard')}.")
    folder = root if root.is_dir() else root.parent
    names = _class_names(folder)
    key = repr(
        (1, *((str(path.absolute()), path.stat().st_size, path.stat().st_mtime_ns) for path in shards))
    )
    files = unpack_images(root, key, lambda: _images(samples), folder)
    rows = [
        (
            sample.place,
            {"path": file, "label": _label(sample, label_column, names), "split": splits[sample.shard]},
        )
        for sample, file in zip(samples, files, strict=True)
    ]
    columns = ("path", "label", *(("split",) if named else ()))
    table = LabelTable(columns, rows, embedded=True, notes=notes)
    return index_rows("webdataset", root, table, test_fraction, split_seed)


def _shards(root: Path) -> list[Path]:
    if not root.exists():
        raise CrossXError(f"{root}: no such folder. --data.root takes the folder of the .tar shards.")
    if root.is_file():
        files = [root]
    else:
        files = [
            path
            for path in sorted(root.rglob("*"))
            if path.is_file() and not any(map(is_leftover, path.relative_to(root).parts))
        ]
    compressed = [path.name for path in files if path.name.lower().endswith(_COMPRESSED)]
    if compressed:
        raise CrossXError(
            f"{root}: {compressed[0]!r} is compressed, and only plain .tar shards are read: decompress it (gunzip)."
        )
    shards = [path for path in files if path.suffix.lower() == ".tar"]
    if not shards:
        raise CrossXError(f"{root}: no .tar shards. Check --data.root, and --data.dataset.")
    return shards


def _split(root: Path, shard: Path) -> str | None:
    """Return the name of a shard's split as it is written: that of a folder, or in the file's name."""
    parts = shard.relative_to(root).parts[:-1] if root.is_dir() else ()
    for name in (*parts, shard.stem):
        if (split := split_name(name)[0]) is not None:
            return "eval" if split == "unclear" else split
    return None


def _samples(shard: Path, notes: list[str]) -> list[_Sample]:
    """Return the samples of a shard, in order; add a note if it may have been cut off."""
    samples: dict[str, _Sample] = {}
    size = shard.stat().st_size
    try:
        with tarfile.open(shard, "r:") as archive:
            for member in archive:
                _check_member(shard, member, size)
                if not member.isdir() and not is_system_path(member.name):
                    _add(shard, archive, member, samples)
            end = archive.offset
    except CrossXError:
        raise
    except OSError as error:
        raise CrossXError(f"{shard}: cannot be read ({error.strerror or error}).") from error
    except Exception as error:  # on damaged headers tarfile raises several kinds of errors
        raise CrossXError(
            f"{shard}: not a complete tar file ({first_line(error)}). Copy it again."
        ) from error
    with shard.open("rb") as file:
        file.seek(end)
        block = file.read(_BLOCK)
    if block.strip(b"\0"):
        raise CrossXError(f"{shard}: damaged at byte {end:,}: not a complete tar file. Copy it again.")
    if not block:
        notes.append(f"{shard.name} has no mark at its end: it may have been cut off")
    return list(samples.values())


def _check_member(shard: Path, member: tarfile.TarInfo, size: int) -> None:
    name = PurePosixPath(member.name.replace("\\", "/"))
    shown = repr(printable(member.name if len(member.name) <= 100 else f"{member.name[:100]}..."))
    problem = ""
    if name.is_absolute() or ".." in name.parts or "\0" in member.name:
        problem = "leads out of the archive"
    elif member.issym() or member.islnk():
        problem = "is a link"
    elif not (member.isreg() or member.isdir()) or member.issparse():
        problem = "is not a plain file"
    elif member.size > MAX_IMAGE:
        problem = f"has {member.size:,} bytes, more than the {MAX_IMAGE >> 20} MiB that are read"
    elif member.size < 0 or member.offset_data + member.size > size:
        problem = "is cut off: the tar file is not complete"
    if problem:
        raise CrossXError(f"{shard}: member {shown} {problem}. Write the shard again.")


def _add(shard: Path, archive: tarfile.TarFile, member: tarfile.TarInfo, samples: dict[str, _Sample]) -> None:
    folder, base = posixpath.split(member.name)
    stem, _, extension = base.partition(".")
    key, extension = posixpath.join(folder, stem), extension.lower()
    if extension not in LABELS and f".{extension}" not in IMAGE_SUFFIXES:
        return
    sample = samples.setdefault(key, _Sample(shard, key))
    if f".{extension}" in IMAGE_SUFFIXES:
        if sample.image is not None:
            raise CrossXError(f"{shard}: sample {printable(key)!r} has two images. A sample has one.")
        sample.image = (base, member.offset_data, member.size)
    else:
        if extension in sample.labels:
            raise CrossXError(f"{shard}: sample {printable(key)!r} has two labels of the kind .{extension}.")
        if member.size > MAX_LABEL:
            raise CrossXError(f"{shard}: {printable(member.name)!r} is too large for a label.")
        file = archive.extractfile(member)
        sample.labels[extension] = file.read() if file is not None else b""


def _images(samples: list[_Sample]) -> Iterator[EncodedImage]:
    """Yield the images of the samples, which are in the order of the shards."""
    for shard, members in groupby(samples, lambda sample: sample.shard):
        with shard.open("rb") as file:
            for sample in members:
                assert sample.image is not None
                name, offset, size = sample.image
                file.seek(offset)
                yield EncodedImage(file.read(size), name)


def _label(sample: _Sample, column: str | None, names: list[str]) -> Any:
    """Return a sample's label: text, or a value of JSON, with the names of numbered classes."""
    kind = next((kind for kind in LABELS if kind in sample.labels), "")
    if column is not None and "json" in sample.labels:
        kind = "json"
    content = sample.labels[kind]
    try:
        text = content.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise CrossXError(
            f"{sample.shard}: {sample.place}: the label in .{kind} is not UTF-8 text."
        ) from error
    value: Any = _json_field(sample, text, column) if kind == "json" else text
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    number = str(value)
    if names and not isinstance(value, bool) and _NUMBER.fullmatch(number):
        if not 0 <= int(number) < len(names):
            raise CrossXError(
                f"{sample.shard}: {sample.place}: class {number}, but only {counted(len(names), 'class')} have names."
            )
        return names[int(number)]
    return value


def _json_field(sample: _Sample, text: str, column: str | None) -> Any:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CrossXError(f"{sample.shard}: {sample.place}: not valid JSON ({first_line(error)}).") from error
    if not isinstance(values, Mapping):
        return values
    name = column or next((name for name in FIELDS if name in values), None)
    if name is None or name not in values:
        found = ", ".join(repr(key) for key in values) or "none"
        what = f"no field {column!r}.{nearest(column, [*values])}" if column else "no field 'label'."
        raise UsageError(
            f"{sample.shard}: {sample.place}: {what} Fields found: {found}. Name one with --data.label_column."
        )
    return values[name]


def _class_names(folder: Path) -> list[str]:
    for name in CLASS_LISTS:
        if (path := folder / name).is_file():
            try:
                lines = path.read_text(encoding="utf-8-sig").splitlines()
            except (OSError, UnicodeDecodeError) as error:
                raise CrossXError(f"{path}: cannot be read ({first_line(error)}).") from error
            names = [line.strip() for line in "\n".join(lines).rstrip().split("\n")]
            _check_names(path, names)
            return names
    return []


def _check_names(path: Path, names: list[str]) -> None:
    """Check that the number of a line is the class of its name, and of no other."""
    first: dict[str, int] = {}
    for number, name in enumerate(names):
        if not name:
            raise CrossXError(f"{path}: line {number + 1} is empty. Each line names the class of its number.")
        if first.setdefault(name, number) != number:
            raise CrossXError(
                f"{path}: {printable(name)!r} names two classes, {first[name]} and {number}, which would become one."
            )
