"""Values of JSON as texts."""

from __future__ import annotations

from typing import Any

MAX_LISTED = 12


def cell(value: Any) -> str:
    """Write one value of JSON for a reader."""
    if value is None:
        return "—"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        more = len(value) - MAX_LISTED
        return ", ".join(map(cell, value[:MAX_LISTED])) + (f" and {more} more" if more > 0 else "")
    return str(value)
