"""Collections of images split into shards, the units of prediction, writing and resuming."""

from __future__ import annotations

import hashlib
import io
import os
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, tee
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from crossx.data.image_files import find_images
from crossx.data.readers.embedded import is_encoded_image
from crossx.data.readers.parquet_bounds import read_columns, read_footer, require_bounded
from crossx.errors import CrossXError, UsageError, first_line
from crossx.predict.outputs import TableRow, table_rows, to_table, utf8
from crossx.predict.predictor import Predictor

if TYPE_CHECKING:
    import pyarrow as pa

MAX_SHARDS_PER_GROUP = 16
"""Shards per row group above which it is split, although each of its shards then reads past the rows before it."""

_READ_ROWS = 64
_ALWAYS_IMAGE = 16 << 20
"""Bytes that an image may have in a Parquet file of any size."""


class Entry(NamedTuple):
    """One image of a collection: its name in the table, the image, and why it cannot be read."""

    name: str
    image: Path | bytes
    problem: str | None = None


class Shard(Protocol):
    """A fixed part of a collection."""

    @property
    def size(self) -> int:
        """Number of images."""

    def read(self) -> Iterator[Entry]:
        """Yield its images in order."""


@dataclass(frozen=True)
class FileShard:
    """Image files, by their paths below ``root``."""

    root: Path
    names: tuple[str, ...]

    @property
    def size(self) -> int:
        """Number of images."""
        return len(self.names)

    def read(self) -> Iterator[Entry]:
        """Yield its images in order."""
        for name in self.names:
            yield Entry(utf8(name), self.root / name)

    def __str__(self) -> str:
        return f"{self.names[0]} to {self.names[-1]}"


@dataclass(frozen=True)
class RowShard:
    """Encoded images in rows of a Parquet file.

    Attributes:
        file: The Parquet file.
        name: Its path below the collection, for rows without a name.
        start: First row.
        stop: Row after the last.
        image: Column of bytes, or of structs with a field ``bytes``.
        label: Column of the images' names, if any.
    """

    file: Path
    name: str
    start: int
    stop: int
    image: str
    label: str | None

    @property
    def size(self) -> int:
        """Number of images."""
        return self.stop - self.start

    def read(self) -> Iterator[Entry]:
        """Yield its images in order; unreadable rows are entries with a problem."""
        row = self.start
        try:
            for entry in self._entries():
                yield entry
                row += 1
        # on damaged files pyarrow raises whatever its decoders raise
        except Exception as error:
            for lost in range(row, self.stop):
                problem = f"the row cannot be read from the Parquet file ({first_line(error)})"
                yield Entry(f"{self.name}:{lost}", b"", problem)

    def _entries(self) -> Iterator[Entry]:
        import pyarrow.parquet as pq

        with pq.ParquetFile(self.file) as table:
            sizes = read_footer(self.file).rows
            ends = list(accumulate(sizes))
            first, last = bisect_right(ends, self.start), bisect_left(ends, self.stop)
            row = ends[first] - sizes[first]
            columns = [self.image] if self.label is None else [self.image, self.label]
            for group in range(first, last + 1):
                rows_at_a_time = require_bounded(self.file, columns, [group]).rows(_READ_ROWS)
                for batch in table.iter_batches(rows_at_a_time, [group], columns):
                    begin, end = max(self.start - row, 0), min(self.stop - row, batch.num_rows)
                    if begin < end:
                        rows = batch.slice(begin, end - begin).to_pylist()
                        yield from (
                            self._entry(number, values) for number, values in enumerate(rows, row + begin)
                        )
                    row += batch.num_rows

    def _entry(self, row: int, values: dict[str, Any]) -> Entry:
        image = values[self.image]
        inner = None
        if isinstance(image, dict):
            image, inner = image["bytes"], image.get("path")
        name = inner if self.label is None else values[self.label]
        name = f"{self.name}:{row}" if name in (None, "") else str(name)
        if image is None:
            return Entry(name, b"", "the row holds no image")
        # several are in memory, and a dictionary repeats a value at no cost
        if len(image) > max(_ALWAYS_IMAGE, self.file.stat().st_size):
            return Entry(name, b"", "the row's image is larger than the Parquet file")
        return Entry(name, image)

    def __str__(self) -> str:
        return f"{self.name}:{self.start} to {self.name}:{self.stop - 1}"


@dataclass(frozen=True)
class Collection:
    """All images of a folder or of Parquet files.

    Attributes:
        source: The folder or file, absolute.
        shards: Its parts, the same for the same collection and shard size.
        fingerprint: SHA-256 of the paths of image files, or of name, bytes and rows of each Parquet file with encoded
            images.
    """

    source: Path
    shards: tuple[Shard, ...]
    fingerprint: str

    @property
    def size(self) -> int:
        """Number of images."""
        return sum(shard.size for shard in self.shards)


def find_collection(source: str | Path, shard_size: int) -> Collection:
    """List a collection and split it into shards.

    A folder is searched recursively for images and, if it has none, for Parquet files. A Parquet file has encoded
    images in a column ``bytes`` or ``image`` (bytes, or structs with a field ``bytes``), named by a column ``path`` or
    ``id``, the struct's field ``path`` or the row number; or image files in a column ``path``, relative to the file's
    folder.

    Args:
        source: A folder or a Parquet file.
        shard_size: Images per shard; shards of encoded images end with a row group and may be larger.

    Raises:
        CrossXError: If ``source`` does not exist or has no image, or a Parquet file is damaged or lacks the columns.
        UsageError: If it is another kind of file.
    """
    given = Path(source)
    if not os.path.exists(given):
        raise CrossXError(f"{given}: no such folder or Parquet file.")
    folder, digest = given.absolute(), hashlib.sha256()
    if given.is_file():
        if not _is_table(given):
            raise UsageError(
                f"{given}: is neither a folder nor a .parquet file. Single images go to --output FILE.csv."
            )
        tables, folder = [folder], folder.parent
    elif images := find_images(folder):
        names = [str(path.relative_to(folder)) for path in images]
        digest.update(_joined(names))
        return Collection(folder, tuple(_file_shards(folder, names, shard_size)), digest.hexdigest())
    else:
        tables = _find_tables(folder)
        if not tables:
            raise CrossXError(f"{given}: there is no image and no Parquet file in this folder or below it.")
    shards: list[Shard] = []
    for table in tables:
        content, cut = _read_table(table, str(table.relative_to(folder)), shard_size)
        digest.update(content)
        shards.extend(cut)
    if not shards:
        raise CrossXError(f"{given}: the Parquet files have no rows.")
    return Collection(given.absolute(), tuple(shards), digest.hexdigest())


def predict_shard(predictor: Predictor, shard: Shard, top: int, batch_size: int) -> bytes:
    """Predict a shard, and return a Parquet file with the columns and rows of ``write_parquet``."""
    import pyarrow.parquet as pq

    columns = predictor.columns(top)
    entries, ahead = tee(shard.read())
    predictions = predictor.iter_images((entry.image for entry in ahead), top, batch_size)
    rows: list[TableRow] = []
    for entry, prediction in zip(entries, predictions, strict=True):
        if entry.problem is not None:
            prediction = replace(prediction, error=entry.problem)
        rows.extend(table_rows(entry.name, prediction, columns))
    file = io.BytesIO()
    pq.write_table(to_table(rows, columns), file)
    return file.getvalue()


def count_failed(part: Path) -> int:
    """Count the images without a prediction in a file of ``predict_shard``."""
    import pyarrow.parquet as pq

    try:
        errors = pq.read_table(part, columns=["error"])["error"]
    except Exception as error:
        raise CrossXError(f"{part}: damaged ({first_line(error)}): delete it, and predict again.") from error
    return len(errors) - int(errors.null_count)


def _file_shards(root: Path, names: Sequence[str], size: int) -> Iterator[FileShard]:
    for start in range(0, len(names), size):
        yield FileShard(root, tuple(names[start : start + size]))


def _find_tables(folder: Path) -> list[Path]:
    """Return the Parquet files below a folder, except hidden ones and those with a leading underscore."""
    return sorted(
        path
        for path in folder.rglob("*")
        if _is_table(path) and not any(p.startswith((".", "_")) for p in path.relative_to(folder).parts)
    )


def _is_table(path: Path) -> bool:
    return path.suffix.lower() == ".parquet" and path.is_file()


def _read_table(file: Path, name: str, size: int) -> tuple[bytes, list[Shard]]:
    """Return the content of a Parquet file to fingerprint, and its shards."""
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file) as table:
            image, label = _columns(file, table.schema_arrow)
            if image is None:
                names = read_columns(file, table, {"path": "path"})["path"]
                if not all(names):
                    row = next(row for row, value in enumerate(names) if not value)
                    raise CrossXError(f"{file}: row {row}: path empty. Fix the table.")
                return _joined([name, *names]), list(_file_shards(file.parent, names, size))
            ranges = list(_ranges(read_footer(file).rows, size))
    except CrossXError:
        raise
    except Exception as error:  # on damaged files pyarrow raises whatever its decoders raise
        raise CrossXError(f"{file}: is not a Parquet file that can be read ({first_line(error)}).") from error
    rows = ranges[-1][1] if ranges else 0
    content = _joined([name, str(file.stat().st_size), str(rows)])
    return content, [RowShard(file, name, start, stop, image, label) for start, stop in ranges]


def _columns(file: Path, schema: pa.Schema) -> tuple[str | None, str | None]:
    """Return the columns of encoded images and of names; (None, ``path``) for a table of image files."""
    kinds = dict(zip(schema.names, schema.types, strict=True))
    image = next(
        (name for name in ("bytes", "image") if name in kinds and is_encoded_image(kinds[name])), None
    )
    if image is not None:
        return image, next((name for name in ("path", "id") if name in kinds), None)
    if "path" in kinds and _is_text(kinds["path"]):
        return None, "path"
    found = ", ".join(f"{name!r} ({kind})" for name, kind in kinds.items())
    raise CrossXError(
        f"{file}: there is no column 'path' of text, nor a column 'bytes' or 'image' of encoded images. "
        f"Columns found: {found or 'none'}."
    )


def _is_text(kind: pa.DataType) -> bool:
    import pyarrow as pa

    if pa.types.is_dictionary(kind):
        return _is_text(kind.value_type)
    return any(
        check(kind) for check in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    )


def _ranges(row_groups: Sequence[int], size: int) -> Iterator[tuple[int, int]]:
    """Yield start and stop of each shard: whole row groups, or parts of a very large one."""
    start = begin = 0
    total = sum(row_groups)
    for rows in row_groups:
        for end in (
            *range(begin + MAX_SHARDS_PER_GROUP * size, begin + rows, MAX_SHARDS_PER_GROUP * size),
            begin + rows,
        ):
            if end - start >= size or (end == total and end > start):
                yield start, end
                start = end
        begin += rows


def _joined(words: Sequence[str]) -> bytes:
    return b"".join(os.fsencode(word) + b"\0" for word in words)
