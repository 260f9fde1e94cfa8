"""Images stored inside a Parquet file, unpacked once into the cache."""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any, NamedTuple

from crossx.caches import cache_folder
from crossx.data.readers.parquet_bounds import require_bounded
from crossx.runs import read_json, storage_error, write_json

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

COLUMNS = ("image", "bytes", "img")
"""Columns of encoded images, the first that is there."""
_ROWS = 64
_LIST = "files.json"

log = logging.getLogger(__name__)


class EncodedImage(NamedTuple):
    """The bytes of an encoded image and its name, or the name of a file elsewhere."""

    data: bytes | None
    name: str | None = None

    @classmethod
    def of(cls, value: Any) -> EncodedImage:
        """Return what a row holds: bytes, or a mapping with ``bytes`` and ``path``."""
        return cls(value["bytes"], value.get("path")) if isinstance(value, Mapping) else cls(value)


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
    """Return the image file of each row of a Parquet file, see ``unpack_images``.

    A struct without bytes names a file, relative to the table's folder.

    Args:
        path: The Parquet file.
        table: The same, opened.
        column: The column of encoded images.

    Raises:
        CrossXError: As ``unpack_images``, or if the images take more space than the file's size explains, see
            ``parquet_bounds``.
    """
    status = path.stat()
    key = repr((1, str(path.absolute()), status.st_size, status.st_mtime_ns, column))
    return unpack_images(path, key, lambda: _read(path, table, column), path.parent)


def unpack_images(
    path: Path, key: str, read: Callable[[], Iterator[EncodedImage]], base: Path
) -> list[Path | None]:
    """Return the image file of each row, unpacked into the cache unless they are there already.

    Args:
        path: Where the images are from, for messages.
        key: Text that changes when the images do.
        read: Yields each row's encoded image, called only if they have to be unpacked.
        base: Folder of images that are only named.

    Returns:
        A file per row; None for a row without an image.

    Raises:
        CrossXError: If the cache cannot be written or its list of files is damaged.
    """
    folder = cache_folder() / "crossx" / "embedded" / hashlib.sha256(os.fsencode(key)).hexdigest()[:32]
    if not folder.is_dir():
        log.info("Unpacking the images of %s into %s", path, folder)
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".", dir=folder.parent) as temporary:
                part = Path(temporary) / folder.name
                part.mkdir()
                names = [_write(number, image, part) for number, image in enumerate(read())]
                write_json(part / _LIST, {"files": names})
                if not folder.is_dir():  # else another process was faster
                    part.rename(folder)
        except OSError as error:
            if not folder.is_dir():
                raise storage_error(folder, error) from error
    listed = read_json(folder / _LIST)
    return [
        None if name is None else folder / name[1:] if name[0] == "+" else base / name[1:]
        for name in listed["files"]
    ]


def _read(path: Path, table: pq.ParquetFile, column: str) -> Iterator[EncodedImage]:
    bounds = require_bounded(path, [column])
    size = 0
    for batch in table.iter_batches(bounds.rows(_ROWS), columns=[column]):
        for value in batch.column(0).to_pylist():
            image = EncodedImage.of(value)
            size += len(image.data or b"")
            bounds.check(size)
            yield image


def _write(row: int, image: EncodedImage, folder: Path) -> str | None:
    """Write an image; return ``+`` and its name in ``folder``, ``-`` and the name of one elsewhere, or None."""
    data, name = image
    if data is None:
        return f"-{name}" if name else None
    plain = PurePosixPath(PureWindowsPath(name or "").name).name
    is_name = 0 < len(os.fsencode(plain)) <= 200 and "\0" not in plain
    target = f"{row:07d}_{plain}" if is_name else f"{row:07d}{_suffix(data)}"
    (folder / target).write_bytes(data)
    return f"+{target}"


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
