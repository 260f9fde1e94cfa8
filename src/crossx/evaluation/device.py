"""Select the device to compute on."""

from __future__ import annotations

import torch

from crossx.errors import UsageError
from crossx.suggestions import nearest


def select_device(name: str | torch.device = "auto") -> torch.device:
    """Return the device called ``name``; ``auto`` is the GPU if there is one.

    Args:
        name: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.

    Raises:
        UsageError: If there is no such device.
    """
    if str(name) == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        hint = nearest(str(name), ("auto", "cpu", "cuda"))
        raise UsageError(f"unknown device {name!r}.{hint} Choose from: auto, cpu, cuda, cuda:N.") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(
            f"device {str(device)!r}: torch sees {torch.cuda.device_count()} GPUs. Use --device cpu, or check "
            "`nvidia-smi` and that torch was installed with CUDA."
        )
    return device
