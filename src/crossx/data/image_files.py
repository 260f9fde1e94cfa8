"""Find image files by their names."""

from __future__ import annotations

import os
from pathlib import Path

from crossx.data.images import printable
from crossx.data.leftovers import is_leftover
from crossx.errors import CrossXError

IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif"}
    | {".jp2", ".ppm", ".pgm", ".pbm", ".heic", ".heif"}
)
"""File names that count as images, in either case. HEIC is included so that it is reported as unreadable and not
silently ignored."""


def find_images(folder: Path, skipped: list[Path] | None = None) -> list[Path]:
    """Return every image file in a folder and its subfolders, sorted by relative path.

    Links are followed, except to folders that were searched before or have ``folder`` in them.

    The file name decides (``IMAGE_SUFFIXES``). What is hidden or what archives, cameras, editors and network drives
    leave behind (``leftovers.is_leftover``) is skipped, folders with everything in them.

    Args:
        folder: Where to search.
        skipped: If given, the files and folders that were skipped as hidden or left behind are appended.

    Raises:
        CrossXError: If a folder cannot be listed.
    """
    found: list[Path] = []
    # a link to a folder above would bring in the images of other classes
    above = [path for path in Path(os.path.realpath(folder)).parents if path.exists()]
    visited = {(status.st_dev, status.st_ino) for status in map(os.stat, above)}
    for directory, subfolders, names in os.walk(folder, followlinks=True, onerror=_raise_listing_error):
        status = os.stat(directory)
        if (status.st_dev, status.st_ino) in visited:
            subfolders.clear()
            continue
        visited.add((status.st_dev, status.st_ino))
        if skipped is not None:
            skipped.extend(
                Path(directory, name) for name in sorted([*subfolders, *names]) if is_leftover(name)
            )
        subfolders[:] = sorted(name for name in subfolders if not is_leftover(name))
        found.extend(Path(directory, name) for name in names if is_image_name(name))
    return sorted(found, key=lambda path: path.relative_to(folder).parts)


def require_images(folder: Path) -> list[Path]:
    """Return the images of ``find_images``.

    Raises:
        CrossXError: If there are none, or a folder cannot be listed.
    """
    if not (found := find_images(folder)):
        raise CrossXError(f"{folder}: there is no image in this folder or below it.")
    return found


def leads_up(path: Path) -> bool:
    """Return whether a path is a link to a folder that it is in."""
    if not path.is_symlink():
        return False
    return Path(os.path.realpath(path.parent)).is_relative_to(os.path.realpath(path))


def is_image_name(name: str) -> bool:
    """Return whether a file of this name counts as an image."""
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES and not is_leftover(name)


def _raise_listing_error(error: OSError) -> None:
    raise CrossXError(
        f"{printable(os.fspath(error.filename))}: the folder cannot be listed ({error.strerror})."
    ) from error
