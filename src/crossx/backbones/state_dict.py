"""Read state dicts from files."""

from __future__ import annotations

import logging
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from crossx.errors import CrossXError, first_line

log = logging.getLogger(__name__)


class WeightsFileError(CrossXError):
    """A file that is damaged, or holds something else."""


def load_trunk_weights(trunk: nn.Module, path: Path) -> list[str]:
    """Load a state dict into a timm model, and log a warning with every key that does not match.

    The state dict may be nested in an entry ``state_dict`` or ``model``, its keys may have the prefix ``module.``.

    Returns:
        One line per key that is missing, unknown or of another shape.

    Raises:
        CrossXError: If the file cannot be read or none of its keys matches.
    """
    state = read_state_dict(path)
    own = trunk.state_dict()
    matching = {key: value for key, value in state.items() if key in own and own[key].shape == value.shape}
    if not matching:
        found = ", ".join(list(state)[:3])
        hint = " To start from a run of crossx, give it as --init." if "backbone.trunk." in found else ""
        raise CrossXError(
            f"{path}: none of its {len(state)} keys ({found}, ...) belongs to this backbone.{hint}"
        )
    trunk.load_state_dict(matching, strict=False)
    problems = [
        f"missing: {key}" for key in own if key not in state and not key.endswith("num_batches_tracked")
    ]
    for key, value in state.items():
        if key not in own:
            problems.append(f"unknown: {key}")
        elif own[key].shape != value.shape:
            problems.append(f"shape {tuple(value.shape)}, the backbone has {tuple(own[key].shape)}: {key}")
    if problems:
        log.warning(
            "%s: %d of the backbone's %d tensors were loaded. Mismatches:\n  %s",
            path, len(matching), len(own), "\n  ".join(problems),
        )  # fmt: skip
    return problems


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Read a state dict from ``.safetensors`` or a PyTorch file (``weights_only=True``), without ``module.``.

    Raises:
        WeightsFileError: If it cannot be read.
        CrossXError: If there is no such file or it is not a plain state dict.
    """
    if not path.is_file():
        hint = " It is a model of crossx: give it as --init." if (path / "model.json").is_file() else ""
        raise CrossXError(f"{path}: no such weights file.{hint}")
    _check_archive(path)
    try:
        state: Any = (
            load_file(path)
            if path.suffix.lower() == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
    except (SafetensorError, OSError, RuntimeError, EOFError, ValueError, KeyError) as error:
        # PyTorch appends advice for developers
        reason = first_line(error).partition(". ")[0]
        raise WeightsFileError(f"{path}: not a weights file ({reason}).") from error
    except Exception as error:
        raise CrossXError(
            f"{path}: not a plain state dict; files with Python objects are not loaded."
        ) from error
    for wrapper in ("state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
    if not isinstance(state, Mapping) or not state or not all(map(_is_plain, state.keys(), state.values())):
        raise CrossXError(f"{path}: not a plain state dict of tensors.")
    return {key.removeprefix("module."): value for key, value in state.items()}


def _is_plain(key: object, value: object) -> bool:
    return (
        isinstance(key, str)
        and isinstance(value, Tensor)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and not value.is_quantized
    )


def _check_archive(path: Path) -> None:
    """Reject an archive that unpacks to more than its own size; ``torch.save`` does not compress."""
    try:
        with zipfile.ZipFile(path) as archive:
            content = sum(entry.file_size for entry in archive.infolist())
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        # not an archive, or damaged: reading it gives the error
        return
    if content > path.stat().st_size:
        raise CrossXError(f"{path}: not a weights file (its content is compressed).")
