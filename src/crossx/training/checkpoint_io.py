"""Checkpoint files that a kill, a full disk or a stranger's pickle cannot harm."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from crossx.errors import CrossXError
from crossx.runs import atomic_path


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target and renames, reads with ``weights_only=True``.

    Lightning's own writes to the system's temporary folder, which may lie on another file system, where the move
    that follows is not atomic.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any | None = None
    ) -> None:
        """Write a checkpoint.

        Raises:
            CrossXError: If the disk is full or the folder not writable; an older file is untouched.
        """
        with atomic_path(Path(path)) as temporary, temporary.open("wb") as file:
            try:
                torch.save(checkpoint, file)
            except RuntimeError as error:
                # closing the archive after a failed write fails too, and hides why
                if isinstance(error.__context__, OSError):
                    raise error.__context__ from None
                raise

    def load_checkpoint(
        self,
        path: str | os.PathLike[str],
        map_location: Callable[..., Any] | None = lambda storage, location: storage,
        weights_only: bool | None = True,
    ) -> dict[str, Any]:
        """Read a checkpoint of plain values and tensors, onto the CPU.

        Raises:
            CrossXError: If it is missing, damaged or holds anything else.
        """
        return read_checkpoint(Path(path))


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU with ``weights_only=True``.

    Raises:
        CrossXError: If it is missing, damaged or holds anything but plain values and tensors.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CrossXError(f"{path}: cannot be read ({error.strerror or error}).") from error
    except Exception as error:  # torch raises RuntimeError, UnpicklingError, EOFError, ... for damaged files
        raise CrossXError(
            f"{path}: damaged, or no checkpoint of crossx. best.ckpt beside it may be whole; `crossx test` and "
            "`crossx predict` take it."
        ) from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise CrossXError(f"{path}: not a training checkpoint of crossx.")
    return checkpoint
