"""Checkpoints that survive kills and full disks, and hold no pickled objects.

``last.ckpt`` is the newest checkpoint, ``previous.ckpt`` the one before, ``best.ckpt`` that of the best epoch.
``SHA256SUMS`` has the checksums of the newest two, in the format of ``sha256sum --check``.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from crossx.distributed import is_leader
from crossx.errors import CrossXError, UsageError
from crossx.runs import Run, atomic_path, write_text

FORMAT = 2
"""Version of the entries; checkpoints of crossx 0.1, written by Lightning's Trainer, have none."""

log = logging.getLogger(__name__)


def write_checkpoint(run: Run, state: dict[str, Any], *, best: bool) -> None:
    """Write the newest checkpoint and keep the previous one.

    A kill at any moment leaves an intact newest checkpoint. If it is also the best, ``best.ckpt`` is written first: a
    resumed run then trains the same epoch again and writes the same file.

    Args:
        run: The run.
        state: Plain values and tensors.
        best: Whether it is the best so far.

    Raises:
        CrossXError: If the disk is full or the folder not writable; older files stay intact.
    """
    target = run.best if best else run.last
    with atomic_path(target) as temporary:
        _save(state, temporary)
        with temporary.open("rb") as file:
            checksum = hashlib.file_digest(file, "sha256").hexdigest()
        if not best:
            _keep_previous(run, checksum)
    if best:
        _keep_previous(run, checksum)
        _link(run.best, run.last)


def read_newest(run: Run) -> dict[str, Any] | None:
    """Read the newest intact checkpoint of a run onto the CPU; None if none was written.

    Raises:
        CrossXError: If none is intact.
        UsageError: If it was written by crossx 0.1.
    """
    if not run.last.is_file() and not run.previous.is_file():
        return None
    try:
        return _read_checked(run, run.last)
    except UsageError:
        raise
    except CrossXError as error:
        if not run.previous.is_file():
            raise
        log.warning("%s The run continues from the previous checkpoint, %s.", error, run.previous)
        checkpoint = _read_checked(run, run.previous)
        if is_leader():
            checksum = _read_checksums(run).get(run.previous.name, "")
            _link(run.previous, run.last)
            _write_checksums(run, {run.last.name: checksum})
        return checkpoint


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU with ``weights_only=True``.

    Raises:
        CrossXError: If it is missing, damaged, or holds anything but plain values and tensors.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CrossXError(f"{path}: cannot be read ({error.strerror or error}).") from error
    except Exception as error:  # torch raises RuntimeError, UnpicklingError, EOFError, ... for damaged files
        raise _damaged(path) from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise CrossXError(f"{path}: not a training checkpoint of crossx.")
    return checkpoint


def _read_checked(run: Run, path: Path) -> dict[str, Any]:
    checksums = _read_checksums(run)
    if checksums and path.is_file():
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() not in checksums.values():
                raise _damaged(path)
    checkpoint = read_checkpoint(path)
    if checkpoint.get("format") != FORMAT:
        raise UsageError(
            f"{path}: written by another version of crossx, and cannot be resumed. Train again with another --output; "
            "`crossx test` and `crossx predict` still read it."
        )
    return checkpoint


def _save(state: dict[str, Any], path: Path) -> None:
    with path.open("wb") as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:
            # closing the archive after a failed write fails too, and hides the cause
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def _keep_previous(run: Run, checksum: str) -> None:
    """Move ``last.ckpt`` to ``previous.ckpt``, and record the checksum of the new one."""
    names = {run.last.name: checksum}
    if run.last.is_file():
        names[run.previous.name] = _read_checksums(run).get(run.last.name, "")
    _write_checksums(run, names)
    if run.last.is_file():
        _link(run.last, run.previous)


def _write_checksums(run: Run, checksums: Mapping[str, str]) -> None:
    write_text(run.checksums, "".join(f"{value}  {name}\n" for name, value in checksums.items() if value))


def _read_checksums(run: Run) -> dict[str, str]:
    try:
        lines = run.checksums.read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    return {name: value for value, _, name in (line.partition("  ") for line in lines)}


def _link(source: Path, target: Path) -> None:
    """Replace ``target`` by a hard link to ``source``, or by a copy if the file system has no links."""
    temporary = target.with_name(f".{target.name}.link.tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:
        with atomic_path(target) as copy:
            shutil.copyfile(source, copy)
    else:
        temporary.replace(target)


def _damaged(path: Path) -> CrossXError:
    return CrossXError(
        f"{path}: damaged, or not a checkpoint of crossx. `crossx test` and `crossx predict` also read best.ckpt "
        "in the same folder."
    )
