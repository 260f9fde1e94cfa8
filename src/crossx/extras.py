"""Packages that only an extra of crossx installs (``pip install 'crossx[EXTRA]'``)."""

from __future__ import annotations

import importlib.util

from crossx.errors import UsageError


def is_installed(package: str) -> bool:
    """Whether a package can be imported; it is not imported."""
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):
        return False


def require(what: str, *packages: str, extra: str) -> None:
    """Check that packages are installed, before any work is lost.

    Args:
        what: What needs them, which begins the message.
        *packages: Names to import.
        extra: The extra that installs them.

    Raises:
        UsageError: If one is not installed.
    """
    missing = [package for package in packages if not is_installed(package)]
    if missing:
        raise UsageError(f"{what} needs {', '.join(missing)}: pip install 'crossx[{extra}]'.")
