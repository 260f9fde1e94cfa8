"""Files of a stranger that try to run code, and a watch over what a call opens and connects to."""

from __future__ import annotations

import io
import os
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.folder,)


class _Answer(torch.nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.float().mean((1, 2, 3))[:, None].expand(-1, 3)


def pickled(folder: Path) -> bytes:
    """Return what torch.save makes of the payload."""
    file = io.BytesIO()
    torch.save({"state_dict": Payload(folder)}, file)
    return file.getvalue()


def write_pt2(path: Path, folder: Path) -> Path:
    """Write a program of torch.export whose example inputs are the payload: loading it falls back to unpickling."""
    program = torch.export.export(_Answer(), (torch.zeros(2, 3, 8, 8, dtype=torch.uint8),))
    file = io.BytesIO()
    torch.export.save(program, file, extra_files={"crossx.json": "{}"})
    with zipfile.ZipFile(file) as good, zipfile.ZipFile(path, "w") as bad:
        for entry in good.infolist():
            content = good.read(entry)
            bad.writestr(entry.filename, pickled(folder) if "sample_inputs" in entry.filename else content)
    return path


_watchers: list[tuple[tuple[str, ...], list[str]]] = []


def _hook(event: str, args: tuple[Any, ...]) -> None:
    if not _watchers:
        return
    allowed, seen = _watchers[-1]
    if event in ("socket.connect", "socket.getaddrinfo", "subprocess.Popen", "os.system"):
        seen.append(f"{event} {args!r}")
    elif event in ("open", "os.listdir", "os.scandir", "os.mkdir", "os.remove", "os.rename"):
        path = args[0]
        if isinstance(path, str | bytes | os.PathLike):
            real = os.path.realpath(os.fsdecode(path))
            if not real.startswith(allowed):
                seen.append(f"{event} {real}")


sys.addaudithook(_hook)


@contextmanager
def watched(*folders: Path) -> Iterator[list[str]]:
    """Give a list of what is opened outside of ``folders`` and of the installed packages, and of every connection."""
    source = Path(__file__).parents[1]
    places = (
        *folders,
        Path(sys.prefix),
        Path(sys.base_prefix),
        source,
        Path("/proc/self"),
        Path("/dev/null"),
    )
    seen: list[str] = []
    _watchers.append((tuple(os.path.realpath(place) for place in places), seen))
    try:
        yield seen
    finally:
        _watchers.pop()
