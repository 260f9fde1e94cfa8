"""Recognise image files by their contents, whatever their names and folders. Imports no torch."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from crossx.terminal import step

READ = 64 << 10
"""Bytes that are read of a file, from its middle: one access to the disk, of pixels rather than of headers."""
AT_ONCE = 32
"""Files that are read at the same time: on a network drive, each one is a wait, and other ranks wait for the first."""
PER_TASK = 32
"""Files per task of a thread: with one each, the tasks of a million files would take two gigabytes."""
UNREADABLE = 0
"""The fingerprint of a file that cannot be read."""


def fingerprint(path: Path) -> int:
    """Return 64 bits of a hash of a file's size and of the bytes in its middle; ``UNREADABLE`` if it cannot be read.

    Copies of a file have the same fingerprint, images that were compressed again another one.
    """
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, (size - READ) // 2))
            middle = file.read(READ)
    except OSError:
        return UNREADABLE
    digest = hashlib.blake2b(middle, digest_size=8, salt=size.to_bytes(16, "little")).digest()
    return int.from_bytes(digest, "little") or 1


def fingerprints(paths: Sequence[Path]) -> NDArray[np.uint64]:
    """Return the fingerprint of each of N files, uint64 (N,)."""
    tasks = [paths[first : first + PER_TASK] for first in range(0, len(paths), PER_TASK)]
    with step("Reading fingerprints of the images"), ThreadPoolExecutor(AT_ONCE) as pool:
        found = pool.map(lambda task: [*map(fingerprint, task)], tasks)
        return np.fromiter(chain.from_iterable(found), np.uint64, len(paths))
