"""Bound what reading a Parquet file takes, before anything is decoded.

Compression, dictionaries and run lengths make gigabytes of a few kilobytes. The sizes in a file's footer may lie; those
in the headers of its pages may not, since Arrow allocates and decompresses by them. pyarrow does not give them, and a
forged footer makes ``pyarrow.parquet.RowGroupMetaData.column`` end the process (26.0.1).
So both are read here (https://github.com/apache/parquet-format/blob/master/src/main/thrift/parquet.thrift).
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from crossx.errors import CrossXError

if TYPE_CHECKING:
    import pyarrow.parquet as pq

ALWAYS_BYTES, TIMES = 256 << 20, 100
"""What a file may unpack to whatever its size, and how many times its size otherwise."""
ALWAYS_ROWS, ROWS_PER_BYTE = 10_000_000, 100
BATCH_BYTES = 64 << 20
"""What the values of a batch may take, unless a single one is larger."""

_ROWS = 65536
_MAX_HEADER = 16 << 20  # as in Arrow
_TRUE, _FALSE, _I16, _I64 = 1, 2, 4, 6


@dataclass(frozen=True)
class ParquetFooter:
    """Where the columns of a file lie.

    Attributes:
        path: The file.
        size: Its bytes.
        rows: Rows of each row group.
        leaves: Names of its columns; those of a struct's fields begin with the struct's and a dot.
        chunks: First byte and the byte after the last of each column in each row group.
    """

    path: Path
    size: int
    rows: tuple[int, ...]
    leaves: tuple[str, ...]
    chunks: tuple[tuple[tuple[int, int], ...], ...]


@dataclass(frozen=True)
class ParquetBounds:
    """Bounds on reading some columns of a file.

    Attributes:
        path: The file.
        most: Bytes that it may unpack to.
        pages: Number of pages of the columns.
        size: Bytes of these pages together.
        largest: Bytes of the largest one, and so of the largest value.
    """

    path: Path
    most: int
    pages: int
    size: int
    largest: int

    def rows(self, most: int) -> int:
        """Return how many rows may be read at a time, at most ``most``."""
        return max(1, min(most, BATCH_BYTES // max(1, self.largest)))

    def check(self, size: int) -> None:
        """Raise ``CrossXError`` if the file unpacks to more than ``most`` bytes."""
        if size > self.most:
            raise CrossXError(
                f"{self.path}: unpacks to more than {self.most >> 20:,} MiB, which its size does not explain: "
                "it is damaged or made to fill the memory."
            )


def read_footer(path: Path) -> ParquetFooter:
    """Read a file's footer, and check that its size explains the number of rows.

    Raises:
        CrossXError: If it is damaged, or there are more rows than a file of this size has.
    """
    status = path.stat()
    footer = _footer(path, status.st_size, status.st_mtime_ns)
    rows = sum(footer.rows)
    if rows > max(ALWAYS_ROWS, ROWS_PER_BYTE * footer.size):
        raise CrossXError(
            f"{path}: claims {rows:,} rows in {footer.size:,} bytes: it is damaged or made to fill the memory."
        )
    return footer


def require_bounded(
    path: Path, columns: Iterable[str], row_groups: Iterable[int] | None = None
) -> ParquetBounds:
    """Check the number of rows of a file and the sizes of the pages of some columns.

    Args:
        path: The file.
        columns: Names of columns.
        row_groups: The row groups that will be read; by default all.

    Raises:
        CrossXError: If there are more rows or bytes than the file's size explains, or a page's header is damaged.
    """
    footer = read_footer(path)
    groups = range(len(footer.rows)) if row_groups is None else row_groups
    sizes = list(_page_sizes(footer, tuple(columns), groups))
    most = max(ALWAYS_BYTES, TIMES * footer.size)
    bounds = ParquetBounds(path, most, len(sizes), sum(sizes), max(sizes, default=0))
    bounds.check(bounds.size)
    return bounds


def read_columns(path: Path, table: pq.ParquetFile, columns: Mapping[str, str]) -> dict[str, list[Any]]:
    """Return columns, given as key -> name, as lists.

    Raises:
        CrossXError: As ``require_bounded``, also if values that repeat take too many bytes together.
    """
    values: dict[str, list[Any]] = {key: [] for key in columns}
    bounds = require_bounded(path, columns.values())
    size = 0
    for batch in table.iter_batches(bounds.rows(_ROWS), columns=[*columns.values()]):
        for key, name in columns.items():
            read = batch.column(name).to_pylist()
            size += sum(len(value) for value in read if isinstance(value, str | bytes))
            values[key].extend(read)
        bounds.check(size)
    return values


@functools.lru_cache(4)
def _footer(path: Path, size: int, _: int) -> ParquetFooter:
    try:
        with path.open("rb") as file:
            file.seek(max(0, size - 8))
            length = int.from_bytes(file.read(4), "little")
            file.seek(size - 8 - length)
            metadata, _ = _struct(file.read(length), 0)
        leaves = tuple(".".join(names) for names in _leaves(metadata[2]))
        groups = metadata.get(4, [])
        rows = tuple(group[3] for group in groups)
        chunks = tuple(tuple(_extent(chunk[3]) for chunk in group[1]) for group in groups)
        if min(rows, default=0) < 0 or any(len(group) != len(leaves) for group in chunks):
            raise ValueError("wrong numbers of rows or columns")
    except (LookupError, RecursionError, OverflowError, TypeError, ValueError) as error:
        raise CrossXError(
            f"{path}: is not a Parquet file that can be read (its footer is damaged)."
        ) from error
    return ParquetFooter(path, size, rows, leaves, chunks)


def _leaves(elements: Sequence[Mapping[int, Any]]) -> Iterator[list[str]]:
    """Yield the names from the root to each column, from the schema's elements in depth-first order."""
    # name, children left
    open_groups: list[tuple[str, int]] = [("", elements[0][5])]
    for element in elements[1:]:
        while open_groups and open_groups[-1][1] == 0:
            open_groups.pop()
        name, left = open_groups[-1]
        open_groups[-1] = name, left - 1
        name = element[4].decode()
        if element.get(5, 0) > 0:
            open_groups.append((name, element[5]))
        elif 1 in element:
            yield [*(name for name, _ in open_groups[1:]), name]
        else:
            raise ValueError("a group without columns")


def _extent(chunk: Mapping[int, Any]) -> tuple[int, int]:
    start = chunk[9]
    # without values there are no pages
    if chunk[5] <= 0:
        return start, start
    # as Arrow finds the first page
    if 0 < chunk.get(11, 0) < start:
        start = chunk[11]
    return start, start + chunk[7]


def _page_sizes(footer: ParquetFooter, names: tuple[str, ...], groups: Iterable[int]) -> Iterator[int]:
    """Yield the uncompressed size of every page."""
    prefixes = tuple(f"{name}." for name in names)
    chosen = [
        number
        for number, leaf in enumerate(footer.leaves)
        if leaf in names or (prefixes and leaf.startswith(prefixes))
    ]
    with footer.path.open("rb") as file:
        for group in groups:
            for leaf in chosen:
                start, end = footer.chunks[group][leaf]
                while start < end:
                    try:
                        unpacked, packed, header = _page(file, start)
                    except (LookupError, RecursionError, OverflowError, TypeError, ValueError) as error:
                        raise CrossXError(
                            f"{footer.path}: is not a Parquet file that can be read (a page's header is damaged)."
                        ) from error
                    yield unpacked
                    start += header + packed


def _page(file: BinaryIO, start: int) -> tuple[int, int, int]:
    """Return the size of a page unpacked and packed, and of its header; ``IndexError`` if that is cut short."""
    length = 1 << 10
    while True:
        file.seek(start)
        data = file.read(length)
        try:
            fields, end = _struct(data, 0)
        except IndexError:
            if len(data) < length or length >= _MAX_HEADER:
                raise
            length <<= 4
            continue
        unpacked, packed = fields[2], fields[3]
        if unpacked < 0 or packed < 0:
            raise ValueError("negative size")
        return unpacked, packed, end


def _struct(data: bytes, at: int) -> tuple[dict[int, Any], int]:
    """Return the fields of a struct in Thrift's compact protocol, and where it ends.

    https://github.com/apache/thrift/blob/master/doc/specs/thrift-compact-protocol.md

    Raises:
        IndexError: If the data end before it.
        ValueError: If it is no struct, or has a field twice.
    """
    fields: dict[int, Any] = {}
    field = 0
    while head := data[at]:
        at += 1
        kind = head & 15
        if head >> 4:
            field += head >> 4
        else:
            field, at = _value(data, at, _I16)
        if field in fields:
            raise ValueError("a field twice")
        # the type of a boolean is its value
        fields[field], at = (kind == _TRUE, at) if kind in (_TRUE, _FALSE) else _value(data, at, kind)
    return fields, at + 1


def _value(data: bytes, at: int, kind: int) -> tuple[Any, int]:
    """Return a value and where it ends."""
    match kind:
        case 1 | 2 | 3:
            return data[at], at + 1
        case 4 | 5 | 6:
            value, at = _varint(data, at)
            value &= (1 << 64) - 1 if kind == _I64 else (1 << 32) - 1  # as Thrift's readers do
            return value >> 1 ^ -(value & 1), at
        case 7:
            content, end = data[at : at + 8], at + 8
        case 8:
            size, at = _varint(data, at)
            content, end = data[at : at + size], at + size
        case 9 | 10:
            size, kind = data[at] >> 4, data[at] & 15
            at += 1
            if size == 15:
                size, at = _varint(data, at)
            values = []
            for _ in range(size):
                one, at = _value(data, at, kind)
                values.append(one)
            return values, at
        case 11:
            size, at = _varint(data, at)
            if size:
                kinds = data[at]
                at += 1
                for _ in range(size):
                    _, at = _value(data, at, kinds >> 4)
                    _, at = _value(data, at, kinds & 15)
            return None, at
        case 12:
            return _struct(data, at)
        case _:
            raise ValueError(f"no type {kind}")
    if end > len(data):
        raise IndexError
    return content, end


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        value |= (data[at] & 127) << shift
        at += 1
        if data[at - 1] < 128:
            return value, at
    raise ValueError("an integer of more than 10 bytes")
