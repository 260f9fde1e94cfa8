"""Image inputs: files, folders, patterns, tables of paths, bytes, Pillow images and tensors."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TypeAlias

import torch
from PIL import Image
from torch import Tensor

from crossx.data.images import ImageError, find_images, is_image_name, read_picture
from crossx.data.readers.table import is_table, read_paths
from crossx.errors import CrossXError

OneImage: TypeAlias = Path | bytes | Image.Image | Tensor
"""An image file, the bytes of one, an opened image, or a uint8 RGB tensor (3, H, W)."""
ImageInput: TypeAlias = str | OneImage
"""One image, or several by a path: a folder, a pattern, or a table, see ``expand_paths``."""


def expand_paths(paths: Iterable[str | Path]) -> list[Path]:
    """Expand paths to image files.

    A folder gives every image below it, sorted; a pattern (``*``, ``?``, ``[...]``, and ``**`` for any depth) the image
    files that it matches, sorted; a ``.csv`` or ``.parquet`` table the files in its column ``path``, relative to the
    table's folder, whether or not they exist. An existing path is never a pattern.

    Raises:
        CrossXError: If a path does not exist, a folder holds no image, a pattern matches none, or a table cannot be
            read.
    """
    return [file for path in paths for file in _files(Path(path))]


def expand(images: ImageInput | Iterable[ImageInput]) -> list[OneImage]:
    """Return a list of single images, with each path replaced by its files; see ``expand_paths``."""
    if isinstance(images, str | bytes | Path | Image.Image | Tensor):
        images = [images]
    items: list[OneImage] = []
    for image in images:
        items.extend(_files(Path(image)) if isinstance(image, str | Path) else [image])
    return items


def decode(item: Image.Image | Tensor) -> Tensor:
    """Return an image in memory as uint8 RGB (3, H, W), as ``read_image`` reads it from a file.

    Raises:
        CrossXError: If the tensor has another type or shape, or the Pillow image cannot be decoded.
    """
    if isinstance(item, Tensor):
        if item.dtype != torch.uint8 or item.dim() != 3 or item.shape[0] != 3 or item.numel() == 0:
            raise CrossXError(
                f"an image tensor must be uint8 RGB of shape (3, H, W), not {item.dtype} {tuple(item.shape)}."
            )
        return item
    try:
        return read_picture(item)
    except ImageError as error:
        raise CrossXError(f"the image {error.reason}.") from error


def _files(path: Path) -> list[Path]:
    # unlike Path.exists, false for names that are too long and for folders without permission
    if not os.path.exists(path):
        if glob.has_magic(str(path)):
            return _matches(path)
        raise CrossXError(f"{path}: no such file or folder.")
    if path.is_dir():
        files = find_images(path)
        if not files:
            raise CrossXError(f"{path}: there is no image in this folder or below it.")
        return files
    return read_paths(path) if is_table(path) else [path]


def _matches(pattern: Path) -> list[Path]:
    files = sorted(Path(name) for name in glob.iglob(str(pattern), recursive=True))
    images = [file for file in files if is_image_name(file.name) and not file.is_dir()]
    if not images:
        raise CrossXError(f"{pattern}: no such file, and as a pattern it matches no image.")
    return images
