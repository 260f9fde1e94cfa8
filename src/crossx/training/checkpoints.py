"""Checkpoints that survive kills, damage and full disks, and hold no pickled objects.

``last.ckpt`` is the newest checkpoint, ``previous.ckpt`` the one before, ``best.ckpt`` that of the best epoch. They are
separate files, so that one damage destroys one of them. ``SHA256SUMS`` has their checksums, in the format of
``sha256sum --check``. Where it is lost, the CRC-32 checksums that ``torch.save`` puts into each file take its place.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from crossx.commands import quoted
from crossx.distributed import is_leader
from crossx.errors import CrossXError, UsageError
from crossx.runs import Run, atomic_path, file_checksum, is_intact, resume_command, write_text

FORMAT = 2
"""Version of the entries; checkpoints of crossx 0.1, written by Lightning's Trainer, have none."""

log = logging.getLogger(__name__)


def write_checkpoint(run: Run, state: dict[str, Any], *, best: bool) -> None:
    """Write the newest checkpoint and keep the previous one.

    A kill at any moment leaves an intact newest checkpoint, whose checksum is listed.

    Args:
        run: The run.
        state: Plain values and tensors.
        best: Whether it is the best so far; ``best.ckpt`` is then a copy.

    Raises:
        CrossXError: If the disk is full or the folder not writable; older files stay intact.
    """
    listed = _read_checksums(run)
    with atomic_path(run.last) as temporary:
        _save(state, temporary)
        checksum = file_checksum(temporary)
        names = {**listed, run.last.name: checksum}
        if run.last.is_file():
            names.pop(run.previous.name, None)
            if run.last.name in listed:
                names[run.previous.name] = listed[run.last.name]
            # before the files are moved, so that both are listed at any moment
            _write_checksums(run, names)
            _link(run.last, run.previous)
    if best:
        names[run.best.name] = checksum
    if names != _read_checksums(run):
        _write_checksums(run, names)
    if best:
        _copy(run.last, run.best)


def read_newest(run: Run) -> dict[str, Any] | None:
    """Read the newest intact checkpoint of a run onto the CPU; None if there is no checkpoint at all.

    If the newest is damaged or lost, the first rank replaces it by the newest intact one, and says so.

    Raises:
        CrossXError: If none is intact.
        UsageError: If it was written by crossx 0.1.
    """
    if not any(path.is_file() for path in (run.last, run.previous, run.best)):
        return None
    listed = _read_checksums(run)
    for known in (listed.values(), None) if listed else (None,):
        try:
            path, checkpoint, problem = _read_intact(run, known)
            break
        except UsageError:
            raise
        except CrossXError as error:
            reason = error
    else:
        # starting over deletes the model
        kept = f" Its model can start a new run: --init {quoted(run.path)}." if run.weights.is_file() else ""
        raise CrossXError(
            f"{reason} No other checkpoint is intact: `{resume_command(run, restart=True)}` starts over.{kept}"
        ) from reason
    if is_leader():
        if known is None:
            log.warning("%s: damaged or missing, but %s is intact by its own checksums.", run.checksums, path)
        if problem is not None:
            which = "previous" if path == run.previous else "best"
            log.warning("%s The run continues from the %s checkpoint, %s.", problem, which, path)
            make_newest(run, path)
        _list_intact(run)
    return checkpoint


def make_newest(run: Run, path: Path) -> None:
    """Replace ``last.ckpt`` by a copy of an intact checkpoint, from which the run continues."""
    if path != run.last:
        _write_checksums(run, {**_read_checksums(run), run.last.name: file_checksum(path)})
        _copy(path, run.last)


def restore_best(run: Run, checkpoint: dict[str, Any]) -> None:
    """Make sure that ``best.ckpt`` is the best epoch of a checkpoint, which is now ``last.ckpt``.

    If it is damaged or lost, it is copied from the other files. If none has that epoch, ``checkpoint`` forgets it, and
    the log says so.
    """
    best = checkpoint["best"]
    if not best:
        return
    listed = _read_checksums(run)
    for path in (run.best, run.last, run.previous):
        with suppress(CrossXError):
            found = checkpoint if path == run.last else read_resumable(path, listed.values())
            if (found["epoch"], found["batch"]) == (best["epoch"], 0):
                if path != run.best:
                    _write_checksums(run, {**listed, run.best.name: file_checksum(path)})
                    _copy(path, run.best)
                return
    log.warning(
        "%s: damaged or missing, and with it the weights of epoch %d (%.2f%%), the best so far. The best of the epochs "
        "that follow becomes the model; `%s` starts over.",
        run.best, best["epoch"], 100 * best["value"], resume_command(run, restart=True),
    )  # fmt: skip
    checkpoint["best"] = {}


def read_resumable(path: Path, listed: Collection[str] | None = None) -> dict[str, Any]:
    """Read a checkpoint onto the CPU, after checking that it is intact.

    Args:
        path: The checkpoint.
        listed: SHA-256 checksums of which it must have one; without them its own CRC-32 checksums are verified.

    Raises:
        CrossXError: If it is missing or damaged.
        UsageError: If it may not be read, or another version of crossx wrote it.
    """
    if path.exists() and not path.is_file():
        raise CrossXError(f"{path}: not a file.")
    try:
        intact = is_intact(path) if listed is None else file_checksum(path) in listed
    except PermissionError as error:
        raise UsageError(f"{path}: no permission to read it.") from error
    except OSError as error:
        raise CrossXError(f"{path}: cannot be read ({error.strerror or error}).") from error
    if not intact:
        raise _damaged(path)
    checkpoint = read_checkpoint(path)
    if checkpoint.get("format") != FORMAT:
        raise UsageError(
            f"{path}: written by another version of crossx, and cannot be resumed. Train again with another --output; "
            "`crossx test` and `crossx predict` still read it."
        )
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


def _read_intact(run: Run, listed: Collection[str] | None) -> tuple[Path, dict[str, Any], CrossXError | None]:
    """Return the newest intact checkpoint, and why it is not ``last.ckpt``."""
    try:
        return run.last, read_resumable(run.last, listed), None
    except UsageError:
        raise
    except CrossXError as error:
        older = []
        for path in (run.previous, run.best):
            with suppress(CrossXError):
                older.append((path, read_resumable(path, listed)))
        if not older:
            raise
        path, checkpoint = max(older, key=lambda item: (item[1]["epoch"], item[1].get("batch", 0)))
        return path, checkpoint, error


def _list_intact(run: Run) -> None:
    """List the checksums of the intact files under their names; a kill may have left those of files to come."""
    listed, names = _read_checksums(run), {}
    for path in (run.last, run.previous, run.best):
        with suppress(OSError):
            if (checksum := file_checksum(path)) in listed.values() or is_intact(path):
                names[path.name] = checksum
    if names != listed:
        _write_checksums(run, names)


def _save(state: dict[str, Any], path: Path) -> None:
    with path.open("wb") as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:
            # closing the archive after a failed write fails too, and hides the cause
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def _write_checksums(run: Run, checksums: Mapping[str, str]) -> None:
    names = (path.name for path in (run.last, run.previous, run.best) if checksums.get(path.name))
    write_text(run.checksums, "".join(f"{checksums[name]}  {name}\n" for name in names))


def _read_checksums(run: Run) -> dict[str, str]:
    """Return the listed checksums by name, without damaged lines."""
    try:
        lines = run.checksums.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return {}
    found = (re.fullmatch(r"([0-9a-f]{64})  (\w+\.ckpt)", line) for line in lines)
    return {match[2]: match[1] for match in found if match}


def _link(source: Path, target: Path) -> None:
    """Replace ``target`` by a hard link to ``source``, or by a copy if the file system has no links."""
    temporary = target.with_name(f".{target.name}.link.tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:
        _copy(source, target)
    else:
        temporary.replace(target)
        # still there if both were already one file, which a kill between this and the next step leaves
        temporary.unlink(missing_ok=True)


def _copy(source: Path, target: Path) -> None:
    with atomic_path(target) as temporary:
        shutil.copyfile(source, temporary)


def _damaged(path: Path) -> CrossXError:
    return CrossXError(f"{path}: damaged, or not a checkpoint of crossx.")
