"""Find image files by their names."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from crossx.data.images import printable
from crossx.data.leftovers import is_leftover
from crossx.errors import CrossXError, counted

log = logging.getLogger(__name__)

IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif"}
    | {".jp2", ".ppm", ".pgm", ".pbm", ".heic", ".heif"}
)
"""File names that count as images, in either case. HEIC is included so that it is reported as unreadable and not
silently ignored."""

UNREAD_SUFFIXES = frozenset({
    ".3fr", ".arw", ".cr2", ".cr3", ".crw", ".dng", ".erf", ".iiq", ".kdc", ".mef", ".mos", ".mrw", ".nef",
    ".nrw", ".orf", ".pef", ".raf", ".raw", ".rw2", ".rwl", ".sr2", ".srf", ".srw", ".x3f", ".psd", ".psb",
    ".xcf", ".svg", ".ico", ".tga", ".exr", ".hdr", ".jxl", ".eps", ".dcm",
})  # fmt: skip
"""Those of other images: raw files of cameras, and formats of editors, drawings and scanners. A file of this kind next
to an image of the same name, as cameras write both, is not missed."""


def find_images(
    folder: Path, skipped: list[Path] | None = None, unread: list[Path] | None = None
) -> list[Path]:
    """Return every image file in a folder and its subfolders, sorted by relative path.

    Links are followed, except to folders that were searched before or have ``folder`` in them.

    The file name decides (``IMAGE_SUFFIXES``). What is hidden or what archives, cameras, editors and network drives
    leave behind (``leftovers.is_leftover``) is skipped, folders with everything in them.

    Args:
        folder: Where to search.
        skipped: If given, the files and folders that were skipped as hidden or left behind are appended.
        unread: Likewise for images of formats that are not read (``UNREAD_SUFFIXES``), where no other has their name.

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
        images = [name for name in names if is_image_name(name)]
        found.extend(Path(directory, name) for name in images)
        if unread is not None:
            unread.extend(Path(directory, name) for name in _unread(names, images))
    return sorted(found, key=lambda path: path.relative_to(folder).parts)


def require_images(folder: Path, *, note: bool = False) -> list[Path]:
    """Return the images of ``find_images``.

    Args:
        folder: Where to search.
        note: Whether to log a warning that counts those of formats that are not read.

    Raises:
        CrossXError: If there are none, or a folder cannot be listed.
    """
    unread: list[Path] = []
    if not (found := find_images(folder, unread=unread)):
        others = f", but {describe_unread(unread)}" if unread else ""
        raise CrossXError(f"{folder}: there is no image in this folder or below it{others}.")
    if note and unread:
        log.warning("%s: %s.", printable(str(folder)), describe_unread(unread))
    return found


def describe_unread(files: Sequence[Path]) -> str:
    """Count images of formats that are not read, with their suffixes and what to do."""
    suffixes = ", ".join(sorted({file.suffix.lower() for file in files}))
    verb = "that is" if len(files) == 1 else "that are"
    return f"{counted(len(files), 'image')} {verb} not read ({suffixes}): convert to JPEG or PNG"


def _unread(names: Sequence[str], images: Sequence[str]) -> Iterator[str]:
    read = {os.path.splitext(name)[0].lower() for name in images}
    for name in sorted(names):
        stem, suffix = os.path.splitext(name)
        if suffix.lower() in UNREAD_SUFFIXES and stem.lower() not in read and not is_leftover(name):
            yield name


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
