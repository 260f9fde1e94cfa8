"""Checksums in the description of an exported file, which find damage that the runtimes do not see.

They are no signature: whoever changes a file can change them, too.
"""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from crossx.errors import CrossXError
from crossx.runs import EXPORT_SUFFIXES, file_checksum

CHECKSUMS = "sha256"
"""Key of the checksums in the description: suffix of a file -> its SHA-256.

That of the file with the description is computed without its own 64 digits. Archives of torch.export have none: they
hold a CRC-32 for each of their entries.
"""


def exported_files(file: Path) -> list[Path]:
    """Return an exported file and its weights file, if it has one."""
    return [file, file.with_suffix(".bin")] if _is(file, "openvino") else [file]


def reserve_checksums(file: Path) -> dict[str, Any]:
    """Return the entry of a description that ``fill_checksums`` fills once the files are written."""
    if _is(file, "torch-export"):
        return {}
    return {CHECKSUMS: {part.suffix.lower(): _reserved(n) for n, part in enumerate(exported_files(file))}}


def fill_checksums(file: Path) -> None:
    """Compute the checksums of written files, and write them in place into the first, which has the description."""
    if _is(file, "torch-export"):
        return
    for number, part in reversed(list(enumerate(exported_files(file)))):
        reserved = _reserved(number)
        checksum = _own_checksum(file, reserved) if part == file else file_checksum(part)
        with file.open("r+b") as opened, mmap.mmap(opened.fileno(), 0) as content:
            start = content.find(reserved.encode())
            content[start : start + len(reserved)] = checksum.encode()


def check_checksums(file: Path, stored: object) -> None:
    """Check that files have the checksums of their description; those of earlier versions have none.

    Raises:
        CrossXError: If one is damaged.
    """
    if stored is None:
        return
    for part in exported_files(file):
        expected = stored.get(part.suffix.lower()) if isinstance(stored, Mapping) else None
        if not isinstance(expected, str):
            raise damaged(part)
        if expected != (_own_checksum(file, expected) if part == file else file_checksum(part)):
            raise damaged(part)


def _own_checksum(file: Path, digits: str) -> str:
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
        start = content.find(digits.encode("ascii", "ignore"))
        checksum = hashlib.sha256()
        with memoryview(content) as view, view[:start] as before, view[start + len(digits) :] as after:
            checksum.update(before)
            checksum.update(after)
    return checksum.hexdigest()


def damaged(file: Path) -> CrossXError:
    """Return the error of a file whose content is not what was written."""
    return CrossXError(
        f"{file}: damaged, its checksum is not that of the export: copy it or export it again."
    )


def _reserved(number: int) -> str:
    """Return 64 digits that nothing else in the files has, such as zeros of weights."""
    return hashlib.sha256(f"checksum {number} of an export of crossx".encode()).hexdigest()


def _is(file: Path, format_: str) -> bool:
    return file.suffix.lower() == EXPORT_SUFFIXES[format_]
