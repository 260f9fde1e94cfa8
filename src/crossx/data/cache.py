"""Decoded images in one memory-mapped file, in memory or on the disk, shared by all processes that load images."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from crossx.data.transforms import Transform
from crossx.errors import UsageError

_WORD = 8
_VERSION = 1
_ADVICE = {
    "ram": "use --data.cache disk or none",
    "disk": "free some room, set XDG_CACHE_HOME to another folder, or use --data.cache none",
}


class PixelCache:
    """Keeps each image as it was decoded, from the first time that it is read.

    The file begins with a checksum for each image, written after its pixels: what a kill or a power cut left half
    written, or not at all, is decoded again. Two processes that decode the same image write the same bytes.

    Args:
        sizes: Height and width of each image.
        place: None for a file in memory, which ends with the processes that use it; a path for one that the next
            run finds filled.

    Raises:
        OSError: If there is no room, or no permission to write.
    """

    def __init__(self, sizes: Mapping[Path, tuple[int, int]], place: Path | None = None) -> None:
        self._entries: dict[Path, tuple[int, int, int, int]] = {}
        end = len(sizes)
        for number, (path, (height, width)) in enumerate(sizes.items()):
            self._entries[path] = (number, end, height, width)
            end += _words(height, width)
        self._length = end
        if place is None:
            self._file = os.fdopen(os.memfd_create("crossx"), "r+b")
            # a path that other processes can open, and which nothing has to remove
            self._path = f"/proc/{os.getpid()}/fd/{self._file.fileno()}"
        else:
            self._file = os.fdopen(os.open(place, os.O_RDWR | os.O_CREAT, 0o644), "r+b")
            self._path = str(place)
        # writing to a mapped file on a full disk would end the process
        os.posix_fallocate(self._file.fileno(), 0, _WORD * end)
        self._words = self._map()

    def read(self, path: Path, decode: Callable[[Path], Tensor]) -> Tensor:
        """Return an image, uint8 (3, H, W), (H, W, 3) in memory: not to be written to. Errors are ``decode``'s."""
        number, start, height, width = self._entries[path]
        words = self._words[start : start + _words(height, width)]
        pixels = words.view(torch.uint8)[: 3 * height * width].view(height, width, 3).permute(2, 0, 1)
        if self._words[number] != _checksum(words):
            image = decode(path)
            if image.shape != pixels.shape:
                return image  # the header says something else than the image
            pixels.copy_(image)
            self._words[number] = _checksum(words)
        return pixels

    def _map(self) -> Tensor:
        return torch.from_file(self._path, shared=True, size=self._length, dtype=torch.int64)

    def __getstate__(self) -> dict[str, Any]:
        # a process that was not forked opens the file itself
        return {name: value for name, value in vars(self).items() if name not in ("_file", "_words")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._words = self._map()


def open_cache(
    kind: Literal["ram", "disk"], name: str, paths: Iterable[Path], transform: Transform
) -> tuple[PixelCache, str]:
    """Make room for decoded images.

    Args:
        kind: Where to keep them, see ``DataConfig``.
        name: What the images are called in messages.
        paths: The images.
        transform: How they are decoded.

    Returns:
        The cache, and one line about its size.

    Raises:
        ImageError: If an image's header cannot be read.
        UsageError: If there is no room, or no permission to write.
    """
    sizes = {path: transform.size(path) for path in paths}
    needed = _WORD * (len(sizes) + sum(_words(*size) for size in sizes.values()))
    summary = f"data.cache {kind}: {len(sizes):,} decoded {name} images take {_shown(needed)}"
    folder = _folder()
    place = folder / f"{_key(sizes, transform)}.bin" if kind == "disk" else None
    where = "memory" if place is None else str(folder)
    try:
        if place is None:
            free = _free_memory()
        else:
            folder.mkdir(parents=True, exist_ok=True)
            held = os.stat(place).st_blocks * 512 if place.exists() else 0
            free = shutil.disk_usage(folder).free + held
        if needed > free:
            raise UsageError(f"{summary}, and {where} has room for {_shown(free)}: {_ADVICE[kind]}.")
        return PixelCache(sizes, place), f"{summary} in {place or where}."
    except OSError as error:
        raise UsageError(
            f"{summary}, and {where} cannot hold them ({error.strerror}): {_ADVICE[kind]}."
        ) from error


def _words(height: int, width: int) -> int:
    return -(-3 * height * width // _WORD)


def _checksum(words: Tensor) -> int:
    # never 0, which stands for an image that was not written, unless one in 2**64 is
    return int(words.sum()) + 1


def _key(sizes: Mapping[Path, tuple[int, int]], transform: Transform) -> str:
    parts: list[object] = [_VERSION, transform.min_side, transform.strict]
    for path, size in sizes.items():
        status = path.stat()
        parts.append((str(path.absolute()), status.st_size, status.st_mtime_ns, size))
    return hashlib.sha256(repr(parts).encode("utf-8", "surrogateescape")).hexdigest()[:32]


def _folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "crossx" / "decoded"


def _free_memory() -> int:
    """Return how many bytes may be taken: nine tenths of what the machine, or the group of processes, has left."""
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.is_file() and (most := limit.read_text(encoding="ascii").strip()).isdecimal():
        available = min(available, int(most))
    return available * 9 // 10


def _shown(count: int) -> str:
    return f"{count / 1e6:,.1f} MB" if count < 1e9 else f"{count / 1e9:,.1f} GB"
