"""Image inputs: files, folders, patterns, tables and lists of paths, bytes, Pillow images and tensors."""

from __future__ import annotations

import codecs
import glob
import io
import itertools
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias
from urllib.parse import unquote_to_bytes, urlsplit

import numpy as np
from PIL import Image

from crossx.data.image_files import IMAGE_SUFFIXES, is_image_name, require_images
from crossx.data.images import ImageError, read_picture
from crossx.data.readers.table import is_table, read_paths
from crossx.errors import CrossXError, UsageError
from crossx.runs import user_path

if TYPE_CHECKING:
    from torch import Tensor

OneImage: TypeAlias = "Path | bytes | Image.Image | Tensor"
"""An image file, the bytes of one, an opened image, or a uint8 RGB tensor (3, H, W)."""
ImageInput: TypeAlias = "str | OneImage"
"""One image, or several by a path: a folder, a pattern, a table or a list, see ``expand_paths``."""

LISTS = (".txt", ".lst", ".list")
"""Suffixes of lists of files."""
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/(?=/)")


def expand_paths(paths: Iterable[str | Path]) -> list[Path]:
    """Expand paths to image files.

    A folder gives every image below it, sorted; a pattern (``*``, ``?``, ``[...]``, ``{a,b}``, and ``**`` for any
    depth) the image files that it matches, sorted (lower-case endings match both cases); a ``.csv`` or ``.parquet``
    table the files in its column ``path``, and a ``.txt`` list those of ``read_list``, relative to the folder of the
    table or list, whether or not they exist. What exists, also as part of a pattern, is never a pattern.
    ``file://``, a leading ``~/`` and backslashes between folders are understood.

    Raises:
        CrossXError: If a path does not exist or is a URL, a folder holds no image, a pattern matches none, or a table
            or list cannot be read or is empty.
    """
    return [file for path in paths for file in _files(path)]


def read_list(content: bytes, source: str, folder: Path | None = None) -> list[Path]:
    """Read a list of files, one per line or separated by NUL bytes (``find -print0``).

    It may be UTF-8, or UTF-16, with or without byte order mark; other bytes are kept as they are. Blank lines and lines
    that begin with ``#`` are skipped, and quotes around a line are removed, unless a file has that name.

    Args:
        content: The list.
        source: Its name in errors.
        folder: Folder that the entries are relative to; by default the working folder.

    Raises:
        CrossXError: If nothing is listed, or a URL.
    """
    text = _decode_list(content)
    lines = text.split("\0") if "\0" in text else _lines(text)
    files = []
    for number, line in enumerate(lines, start=1):
        bare = line.strip()
        quoted = re.fullmatch(r"(['\"])(.+)\1", bare)
        names = [line, bare, quoted[2]] if quoted else [line, bare]
        if "\\" in bare:
            names.insert(-1, names[-1].replace("\\", "/"))
        found = [(folder or Path()) / _local(name, f"{source}: line {number}: ") for name in names if bare]
        path = next(filter(os.path.lexists, found), found[-1] if found else None)
        if path is not None and (os.path.lexists(path) or not bare.startswith("#")):
            files.append(path)
    if not files:
        raise CrossXError(f"{source}: lists no files.")
    return files


def expand(images: ImageInput | Iterable[ImageInput]) -> list[OneImage]:
    """Return a list of single images, with each path replaced by its files; see ``expand_paths``.

    Raises:
        UsageError: If something has another type than an image has.
        CrossXError: As ``expand_paths``.
    """
    from torch import Tensor

    # of the wrong types, an array is one thing, not its rows, and an open file not its lines
    one = (str, bytes, Path, Image.Image, Tensor, np.ndarray, bytearray, memoryview, io.IOBase)
    given: Iterable[object] = (
        [images] if isinstance(images, one) or not isinstance(images, Iterable) else images
    )
    items: list[OneImage] = []
    for image in given:
        if isinstance(image, str | Path):
            items.extend(_files(image))
        elif isinstance(image, bytes | Image.Image | Tensor):
            items.append(image)
        else:
            raise UsageError(_wrong_type(image))
    return items


def decode(item: Image.Image | Tensor) -> Tensor:
    """Return an image in memory as uint8 RGB (3, H, W), as ``read_image`` reads it from a file.

    Raises:
        CrossXError: If the tensor has another type or shape, or the Pillow image cannot be decoded.
    """
    import torch

    if isinstance(item, torch.Tensor):
        if item.dtype != torch.uint8 or item.dim() != 3 or item.shape[0] != 3 or item.numel() == 0:
            raise CrossXError(
                f"an image tensor must be uint8 RGB of shape (3, H, W), not {item.dtype} {tuple(item.shape)}."
            )
        return item
    try:
        return read_picture(item)
    except ImageError as error:
        raise CrossXError(f"the image {error.reason}.") from error


def _wrong_type(image: object) -> str:
    shown = type(image).__name__
    if isinstance(image, np.ndarray):
        return (
            f"an image is not a NumPy array ({image.dtype}, {image.shape}): give PIL.Image.fromarray(array), "
            "of uint8 and RGB (H, W, 3)."
        )
    return f"an image is a path, the bytes of a file, a Pillow image or a uint8 tensor (3, H, W), not of type {shown}."


def _files(given: str | Path) -> list[Path]:
    path = _local(given)
    # unlike Path.exists, false for names that are too long and for folders without permission
    if not os.path.exists(path):
        if "\\" in str(path) and os.path.exists(slashed := Path(str(path).replace("\\", "/"))):
            return _files(slashed)
        if glob.has_magic(str(path)) or "{" in str(path):
            return _matches(path)
        raise CrossXError(f"{path}: no such file or folder.")
    if path.is_dir():
        return require_images(path, note=True)
    if path.suffix.lower() in LISTS:
        return read_list(path.read_bytes(), str(path), path.parent)
    return read_paths(path) if is_table(path) else [path]


def _local(given: str | Path, where: str = "") -> Path:
    """Return the path of a file on this machine."""
    text = str(given)
    if not text:
        raise CrossXError(f"{where}an empty name is not a file.")
    if (_URL.match(text) or re.match(r"https?:/", text)) and not os.path.lexists(text):
        if text.lower().startswith("file:"):
            try:
                return Path(os.fsdecode(unquote_to_bytes(os.fsencode(urlsplit(text).path))))
            except ValueError as error:
                raise CrossXError(f"{where}{text!r}: is not the address of a file ({error}).") from error
        raise CrossXError(
            f"{where}{text}: files are read, not addresses: download it first (curl -O), then give the file."
        )
    return user_path(given)


def _lines(text: str) -> list[str]:
    """Split at line ends, which are only carriage returns in old files of Macs."""
    if "\n" not in text:
        return text.split("\r")
    return [line.removesuffix("\r") for line in text.split("\n")]


def _decode_list(content: bytes) -> str:
    """Return the text of a list; bytes that are not UTF-8 are kept as surrogates, as in names of files."""
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return content.decode("utf-16", "replace")
    # ASCII in UTF-16 without a mark: every second byte is 0
    for first, encoding in ((1, "utf-16-le"), (0, "utf-16-be")):
        if len(content) > 2 and len(content) % 2 == 0 and not any(content[first::2]):
            return content.decode(encoding, "replace")
    return os.fsdecode(content.removeprefix(codecs.BOM_UTF8))


def _matches(pattern: Path) -> list[Path]:
    names = {name for each in _patterns(pattern) for name in glob.iglob(each, recursive=True)}
    files = sorted(Path(name) for name in names)
    images = [file for file in files if is_image_name(file.name) and not file.is_dir()]
    if not images:
        raise CrossXError(f"{pattern}: no such file, and as a pattern it matches no image.")
    return images


def _patterns(pattern: Path) -> Iterator[str]:
    """Yield patterns for ``glob``: folders that exist are literal, and lower-case endings match both cases."""
    folder, parts = Path(), list(pattern.parts)
    while len(parts) > 1 and os.path.lexists(folder / parts[0]):
        folder /= parts.pop(0)
    alternatives = [_alternatives(part) for part in parts]
    for chosen in itertools.product(*alternatives):
        *folders, name = chosen
        stem, dot, ending = name.rpartition(".")
        if f"{dot}{ending}" in IMAGE_SUFFIXES:
            ending = "".join(f"[{letter}{letter.upper()}]" for letter in ending)
        prefix = "" if folder == Path() else glob.escape(str(folder))
        yield os.path.join(prefix, *folders, f"{stem}{dot}{ending}")


def _alternatives(part: str) -> list[str]:
    """Return what a part of a pattern may mean: a choice in braces, and brackets as they are."""
    braces = re.fullmatch(r"(.*?)\{([^{}]*,[^{}]*)\}(.*)", part)
    if braces:
        start, choices, end = braces.groups()
        return [other for choice in choices.split(",") for other in _alternatives(f"{start}{choice}{end}")]
    return [part, part.replace("[", "[[]")] if "[" in part else [part]
