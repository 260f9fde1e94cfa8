"""Images stored inside a Parquet file, unpacked once into the cache."""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING

from crossx.caches import cache_folder
from crossx.data.readers.parquet_bounds import require_bounded
from crossx.runs import read_json, storage_error, write_json

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

COLUMNS = ("image", "bytes", "img")
"""Columns of encoded images, the first that is there."""
_ROWS = 64

log = logging.getLogger(__name__)
_LIST = "files.json"


def image_column(schema: pa.Schema) -> int | None:
    """Return the position of the column of encoded images."""
    names = [name.strip().lower() for name in schema.names]
    found = (names.index(name) for name in COLUMNS if name in names)
    return next((index for index in found if is_encoded_image(schema.types[index])), None)


def is_encoded_image(kind: pa.DataType) -> bool:
    """Whether a column of this type may hold encoded images: bytes, or structs with a field ``bytes``."""
    import pyarrow as pa

    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and is_encoded_image(kind.field("bytes").type)
    return any(
        check(kind) for check in (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view)
    )


def unpack(path: Path, table: pq.ParquetFile, column: str) -> list[Path | None]:
    """Return the image file of each row, unpacked into the cache unless they are there already.

    A struct without bytes names a file, relative to the table's folder. A row without an image is None.

    Args:
        path: The Parquet file.
        table: The same, opened.
        column: The column of encoded images.

    Raises:
        CrossXError: If the cache cannot be written or its list of files is damaged, or the images take more space than
            the file's size explains, see ``parquet_bounds``.
    """
    status = path.stat()
    key = repr((1, str(path.absolute()), status.st_size, status.st_mtime_ns, column))
    folder = cache_folder() / "crossx" / "embedded" / hashlib.sha256(os.fsencode(key)).hexdigest()[:32]
    if not folder.is_dir():
        log.info("Unpacking the images of %s into %s", path, folder)
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".", dir=folder.parent) as temporary:
                part = Path(temporary) / folder.name
                part.mkdir()
                names = list(_write(path, table, column, part))
                write_json(part / _LIST, {"files": names})
                if not folder.is_dir():  # else another process was faster
                    part.rename(folder)
        except OSError as error:
            if not folder.is_dir():
                raise storage_error(folder, error) from error
    listed = read_json(folder / _LIST)
    return [
        None if name is None else folder / name[1:] if name[0] == "+" else path.parent / name[1:]
        for name in listed["files"]
    ]


def _write(path: Path, table: pq.ParquetFile, column: str, folder: Path) -> Iterator[str | None]:
    """Write the images and yield, per row, ``+`` and the name in ``folder``, ``-`` and the name elsewhere, or None."""
    bounds = require_bounded(path, [column])
    row = size = 0
    for batch in table.iter_batches(bounds.rows(_ROWS), columns=[column]):
        for value in batch.column(0).to_pylist():
            data, name = (value["bytes"], value.get("path")) if isinstance(value, dict) else (value, None)
            if data is None:
                yield f"-{name}" if name else None
            else:
                size += len(data)
                bounds.check(size)
                plain = PurePosixPath(PureWindowsPath(name or "").name).name
                target = (
                    f"{row:07d}_{plain}"
                    if 0 < len(os.fsencode(plain)) <= 200
                    else f"{row:07d}{_suffix(data)}"
                )
                (folder / target).write_bytes(data)
                yield f"+{target}"
            row += 1


def _suffix(data: bytes) -> str:
    for start, suffix in (
        (b"\xff\xd8\xff", ".jpg"),
        (b"\x89PNG", ".png"),
        (b"RIFF", ".webp"),
        (b"GIF8", ".gif"),
    ):
        if data.startswith(start):
            return suffix
    return ".img"
