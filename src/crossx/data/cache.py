"""Decoded or resized images in one memory-mapped file, in memory or on disk, shared by all loading processes."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import PIL
import simplejpeg
import torch
from torch import Tensor

from crossx.caches import cache_folder
from crossx.data.images import ImageError, printable
from crossx.data.transforms import CachedForm, Transform
from crossx.errors import UsageError, counted

MAX_GROWTH = 2
"""Resized images are kept if they take at most this many times the space of decoded ones."""
_WORD = 8
_VERSION = 2
_ADVICE = {
    "ram": "use --data.cache disk or none",
    "disk": "free some room, name another folder with --data.cache_folder, or use --data.cache none",
}


class PixelCache:
    """Stores each image when it is first read.

    The file starts with a checksum per image, written after its pixels, so an image left incomplete by a kill or a
    power cut, or damaged since, is prepared again. There is no lock: processes that store the same image write the same
    bytes. Each process checks an image only once.

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
        self._checked = bytearray(len(sizes))

    def read(self, path: Path, prepare: Callable[[Path], Tensor]) -> Tensor:
        """Return an image, uint8 (3, H, W), channels last in memory and read-only by contract; prepare it if needed."""
        number, start, height, width = self._entries[path]
        words = self._words[start : start + _words(height, width)]
        flat = words.view(torch.uint8)[: 3 * height * width]
        pixels = flat.view(height, width, 3).permute(2, 0, 1)  # (H*W*3,) -> (H, W, 3) -> (3, H, W)
        if not self.holds(path):
            image = prepare(path)
            if image.shape != pixels.shape:
                return image  # the header does not match the image
            pixels.copy_(image)
            self._words[number] = _checksum(words)
            self._checked[number] = True
        return pixels

    def holds(self, path: Path) -> bool:
        """Return whether an image is stored, and intact."""
        number, start, height, width = self._entries[path]
        if not self._checked[number]:
            words = self._words[start : start + _words(height, width)]
            self._checked[number] = self._words[number] == _checksum(words)
        return bool(self._checked[number])

    def _map(self) -> Tensor:
        return torch.from_file(self._path, shared=True, size=self._length, dtype=torch.int64)

    def __getstate__(self) -> dict[str, Any]:
        # a spawned process opens the file itself
        return {name: value for name, value in vars(self).items() if name not in ("_file", "_words")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._words = self._map()


def open_cache(
    kind: Literal["ram", "disk"],
    name: str,
    paths: Iterable[Path],
    transform: Transform,
    *,
    folder: Path | None = None,
    decoded_only: bool = False,
) -> tuple[PixelCache, CachedForm, str]:
    """Reserve space for images.

    They are kept resized if the transform resizes whole images, unless that takes more than ``MAX_GROWTH`` times the
    space of decoded ones, or there is only room for those.

    Args:
        kind: Where to keep them, see ``DataConfig``.
        name: Name of the images in messages.
        paths: The images.
        transform: Prepares them.
        folder: Folder of the file on disk; by default ``default_folder``.
        decoded_only: Keep them decoded, and do not resize them before.

    Returns:
        The cache, the form of the images in it, and one line about its size.

    Raises:
        ImageError: If an image's header cannot be read, or ``crop_bottom`` leaves nothing of it.
        UsageError: If there is not enough space or no permission to write.
    """
    folder = default_folder() if folder is None else folder
    where = "memory" if kind == "ram" else str(folder)
    for form, sizes in _possible(paths, transform, decoded_only=decoded_only):
        needed = _bytes(sizes)
        count = counted(len(sizes), f"{form.name} {name} image")
        summary = f"data.cache {kind}: {count} take{'s' * (len(sizes) == 1)} {_shown(needed)}"
        try:
            file = _file(folder, sizes, form) if kind == "disk" else None
            free = _free_memory() if file is None else _free_disk(file)
            if needed <= free:
                return _open(sizes, file), form, f"{summary} in {file or where}."
        except OSError as error:
            raise UsageError(
                f"{summary}, and {where} cannot hold them ({error.strerror}): {_ADVICE[kind]}."
            ) from error
    raise UsageError(
        f"{summary}, and {where} has room for {_shown(free)}{_others(kind, folder)}: {_ADVICE[kind]}."
    )


def stored_images(
    paths: Iterable[Path], transform: Transform, *, folder: Path | None = None, decoded_only: bool = False
) -> set[Path]:
    """Return the images that an earlier run has stored on disk, and which can therefore be read.

    Takes the arguments of ``open_cache``, and reserves nothing.

    Raises:
        ImageError: As ``open_cache``.
    """
    for form, sizes in _possible(paths, transform, decoded_only=decoded_only):
        file = _file(default_folder() if folder is None else folder, sizes, form)
        with suppress(OSError):
            if file.stat().st_size == _bytes(sizes):
                cache = PixelCache(sizes, file)
                return {path for path in sizes if cache.holds(path)}
    return set()


def default_folder() -> Path:
    """Return the folder of caches on disk."""
    return cache_folder() / "crossx" / "decoded"


def _open(sizes: Mapping[Path, tuple[int, int]], file: Path | None) -> PixelCache:
    is_new = file is not None and not file.exists()
    try:
        return PixelCache(sizes, file)
    except OSError:
        if file is not None and is_new:
            # reserved in part
            with suppress(OSError):
                file.unlink(missing_ok=True)
        raise


def _possible(
    paths: Iterable[Path], transform: Transform, *, decoded_only: bool
) -> list[tuple[CachedForm, dict[Path, tuple[int, int]]]]:
    """Return the forms that are worth their space, the best first, with the sizes of the images."""
    decoded = {path: transform.size(path) for path in paths}
    forms = [(form, _sizes(form, decoded)) for form in transform.forms(decoded_only=decoded_only)]
    limit = MAX_GROWTH * _bytes(decoded)
    return [(form, sizes) for form, sizes in forms if _bytes(sizes) <= limit]


def _file(folder: Path, sizes: Mapping[Path, tuple[int, int]], form: CachedForm) -> Path:
    return folder / f"{_key(sizes, form)}.bin"


def _sizes(form: CachedForm, decoded: Mapping[Path, tuple[int, int]]) -> dict[Path, tuple[int, int]]:
    sizes = {}
    for path, size in decoded.items():
        try:
            sizes[path] = form.size(size)
        except ImageError as error:
            raise ImageError(f"{printable(path)}: {error.reason}", error.reason) from error
    return sizes


def _words(height: int, width: int) -> int:
    return -(-3 * height * width // _WORD)


def _bytes(sizes: Mapping[Path, tuple[int, int]]) -> int:
    return _WORD * (len(sizes) + sum(_words(*size) for size in sizes.values()))


def _checksum(words: Tensor) -> int:
    # 0 means "not written"; a real checksum is 0 only once in 2**64
    return int(words.sum()) + 1


def _key(sizes: Mapping[Path, tuple[int, int]], form: CachedForm) -> str:
    # what may decode or resize to other pixels: another version, or another kind of processor
    versions = (
        simplejpeg.__version__,
        PIL.__version__,
        torch.__version__,
        torch.backends.cpu.get_cpu_capability(),
    )
    parts: list[object] = [_VERSION, versions, form.key]
    for path, size in sizes.items():
        status = path.stat()
        parts.append((str(path.absolute()), status.st_size, status.st_mtime_ns, size))
    return hashlib.sha256(repr(parts).encode("utf-8", "surrogateescape")).hexdigest()[:32]


def _free_disk(file: Path) -> int:
    """Return the bytes that a file may have, with those that it has already; its folder is made."""
    file.parent.mkdir(parents=True, exist_ok=True)
    held = os.stat(file).st_blocks * 512 if file.exists() else 0
    return shutil.disk_usage(file.parent).free + held


def _others(kind: str, folder: Path) -> str:
    """Return how much earlier caches take, which may be deleted."""
    if kind == "ram":
        return ""
    held = sum(file.stat().st_blocks * 512 for file in folder.glob("*.bin") if file.is_file())
    return f", next to {_shown(held)} of earlier caches, which may be deleted" if held else ""


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
