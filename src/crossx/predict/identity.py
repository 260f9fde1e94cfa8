"""Which network is loaded: its name, its version and the SHA-256 of its weights."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from crossx.data.images import printable
from crossx.errors import CrossXError, UsageError
from crossx.predict.exported import ExportedModel
from crossx.runs import file_checksum

if TYPE_CHECKING:
    from crossx.predict.predictor import Predictor

MAX_TEXT = 100
"""Characters of a name or version."""


@dataclass(frozen=True)
class Identity:
    """Which network gave an answer.

    Attributes:
        name: Name of the run folder, the model on the Hub or the exported file.
        version: Id of the run, or commit on the Hub; where there is neither, the beginning of the checksum.
        checksum: SHA-256 of the weights file, in hexadecimal; None if the network was not loaded from a file.
    """

    name: str
    version: str
    checksum: str | None


@dataclass(frozen=True)
class WeightsFile:
    """The file that a network is loaded from.

    Attributes:
        path: The file.
    """

    path: Path
    _state: tuple[int, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_state", _state_of(self.path))

    def checksum(self) -> str:
        """Return the file's SHA-256; ``CrossXError`` if it has changed since this object was created."""
        found = file_checksum(self.path)
        if _state_of(self.path) != self._state:
            raise CrossXError(f"{self.path}: was replaced while it was loaded. Start again.")
        return found


def identify(predictor: Predictor, name: str | None = None, version: str | None = None) -> Identity:
    """Return the identity of a network; reads its weights file once more.

    Args:
        predictor: The network.
        name: Takes the place of the name found.
        version: Takes the place of the version found; ``run.json`` is then not read.

    Raises:
        UsageError: If ``name`` or ``version`` is empty, has more than ``MAX_TEXT`` characters or a line break.
        CrossXError: If ``run.json`` is damaged, or the weights file was replaced while it was loaded.
    """
    for option, given in (("model_name", name), ("model_version", version)):
        if given is not None and not (given.isprintable() and 0 < len(given) <= MAX_TEXT):
            raise UsageError(f"{option} must be 1 to {MAX_TEXT} printable characters, not {given!r:.80}.")
    checksum = predictor.weights.checksum() if predictor.weights else None
    found_name, found_version = _read(predictor, version is None)
    return Identity(
        name or printable(found_name)[:MAX_TEXT] or "model",
        version or printable(found_version)[:MAX_TEXT] or (checksum or "unknown")[:12],
        checksum,
    )


def _read(predictor: Predictor, with_version: bool) -> tuple[str, str]:
    if isinstance(predictor.network, ExportedModel):
        return predictor.network.source.name, ""
    if predictor.origin is None:
        return "", ""
    run = predictor.origin[0]
    if run.hub:
        # the Hub's cache has a folder per commit
        return run.hub.partition("@")[0], run.path.name
    name = os.path.basename(os.path.abspath(run.path))
    return name, str(run.read_info().get("id") or "") if with_version else ""


def _state_of(path: Path) -> tuple[int, ...]:
    state = path.stat()
    return state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns
