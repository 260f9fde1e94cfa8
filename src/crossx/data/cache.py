"""Decoded images in one memory-mapped file, in memory or on disk, shared by all loading processes."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from crossx.caches import cache_folder
from crossx.data.transforms import Transform
from crossx.errors import UsageError, counted

_WORD = 8
_VERSION = 1
_ADVICE = {
    "ram": "use --data.cache disk or none",
    "disk": "free some room, set XDG_CACHE_HOME to another folder, or use --data.cache none",
}


class PixelCache:
    """Stores each decoded image when it is first read.

    The file starts with a checksum per image, written after its pixels, so an image left incomplete by a kill or a
    power cut is decoded again. Two processes that decode the same image write the same bytes.

    Args:
        sizes: Height and width of each image.
        path: A file that the next run can use; None for a file in memory, which ends with the processes that use it.

    Raises:
        OSError: If there is not enough space or no permission to write.
    """

    def __init__(self, sizes: Mapping[Path, tuple[int, int]], path: Path | None = None) -> None:
        self._entries: dict[Path, tuple[int, int, int, int]] = {}
        end = len(sizes)
        for number, (image, (height, width)) in enumerate(sizes.items()):
            self._entries[image] = (number, end, height, width)
            end += _words(height, width)
        self._length = end
        if path is None:
            self._file = os.fdopen(os.memfd_create("crossx"), "r+b")
            # a path that other processes can open and nobody has to remove
            self._path = f"/proc/{os.getpid()}/fd/{self._file.fileno()}"
        else:
            self._file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), "r+b")
            self._path = str(path)
        # without reserved space, writing to the mapped file on a full disk would kill the process
        os.posix_fallocate(self._file.fileno(), 0, _WORD * end)
        self._words = self._map()

    def read(self, path: Path, decode: Callable[[Path], Tensor]) -> Tensor:
        """Return an image, uint8 (3, H, W), channels last in memory and read-only by contract; decode it if needed."""
        number, start, height, width = self._entries[path]
        words = self._words[start : start + _words(height, width)]
        flat = words.view(torch.uint8)[: 3 * height * width]
        pixels = flat.view(height, width, 3).permute(2, 0, 1)  # (H*W*3,) -> (H, W, 3) -> (3, H, W)
        if self._words[number] != _checksum(words):
            image = decode(path)
            if image.shape != pixels.shape:
                return image  # the header does not match the image
            pixels.copy_(image)
            self._words[number] = _checksum(words)
        return pixels

    def _map(self) -> Tensor:
        return torch.from_file(self._path, shared=True, size=self._length, dtype=torch.int64)

    def __getstate__(self) -> dict[str, Any]:
        # a spawned process opens the file itself
        return {name: value for name, value in vars(self).items() if name not in ("_file", "_words")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._words = self._map()


def open_cache(
    kind: Literal["ram", "disk"], name: str, paths: Iterable[Path], transform: Transform
) -> tuple[PixelCache, str]:
    """Reserve space for decoded images.

    Args:
        kind: Where to keep them, see ``DataConfig``.
        name: Name of the images in messages.
        paths: The images.
        transform: Decodes them.

    Returns:
        The cache, and one line about its size.

    Raises:
        ImageError: If an image's header cannot be read.
        UsageError: If there is not enough space or no permission to write.
    """
    sizes = {path: transform.size(path) for path in paths}
    needed = _WORD * (len(sizes) + sum(_words(*size) for size in sizes.values()))
    images = counted(len(sizes), f"decoded {name} image")
    summary = f"data.cache {kind}: {images} take{'s' * (len(sizes) == 1)} {_shown(needed)}"
    folder = _folder()
    file = folder / f"{_key(sizes, transform)}.bin" if kind == "disk" else None
    where = "memory" if file is None else str(folder)
    try:
        if file is None:
            free = _free_memory()
        else:
            folder.mkdir(parents=True, exist_ok=True)
            held = os.stat(file).st_blocks * 512 if file.exists() else 0
            free = shutil.disk_usage(folder).free + held
        if needed > free:
            raise UsageError(f"{summary}, and {where} has room for {_shown(free)}: {_ADVICE[kind]}.")
        return PixelCache(sizes, file), f"{summary} in {file or where}."
    except OSError as error:
        raise UsageError(
            f"{summary}, and {where} cannot hold them ({error.strerror}): {_ADVICE[kind]}."
        ) from error


def _words(height: int, width: int) -> int:
    return -(-3 * height * width // _WORD)


def _checksum(words: Tensor) -> int:
    # 0 means "not written"; a real checksum is 0 only once in 2**64
    return int(words.sum()) + 1


def _key(sizes: Mapping[Path, tuple[int, int]], transform: Transform) -> str:
    parts: list[object] = [_VERSION, transform.min_side, transform.strict]
    for path, size in sizes.items():
        status = path.stat()
        parts.append((str(path.absolute()), status.st_size, status.st_mtime_ns, size))
    return hashlib.sha256(repr(parts).encode("utf-8", "surrogateescape")).hexdigest()[:32]


def _folder() -> Path:
    return cache_folder() / "crossx" / "decoded"


def _free_memory() -> int:
    """Return nine tenths of the available bytes, of the machine or of the control group's limit."""
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.is_file() and (most := limit.read_text(encoding="ascii").strip()).isdecimal():
        available = min(available, int(most))
    return available * 9 // 10


def _shown(count: int) -> str:
    return f"{count / 1e6:,.1f} MB" if count < 1e9 else f"{count / 1e9:,.1f} GB"
