"""The software a run was made with."""

from __future__ import annotations

import contextlib
import platform
import subprocess
from collections.abc import Mapping
from importlib import metadata
from typing import Any

PACKAGES = ("crossx", "torch", "torchvision", "timm", "lightning", "numpy", "pillow")


def environment(packages: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Return Python version, platform, package versions and the git state of the working folder.

    Args:
        packages: Name -> version of further packages.
    """
    versions = dict(packages or {})
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions,
        "git": _git_state(),
    }


def _git_state() -> dict[str, Any] | None:
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()
        changes = subprocess.run(
            ["git", "status", "--porcelain"], capture_output=True, text=True, check=True, timeout=10
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit, "dirty": bool(changes.strip())}
