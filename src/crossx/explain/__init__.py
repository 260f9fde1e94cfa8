"""Where a network looks: activation maps of every part and stage (Fig. 5), class maps, and overlays on images.

Public names are imported on first use, so that torch and matplotlib are loaded only then.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from crossx.explain.figures import figure
    from crossx.explain.maps import explain_images
    from crossx.explain.overlays import overlay

__all__ = ["explain_images", "figure", "overlay"]

_HOMES = {"explain_images": "maps", "figure": "figures", "overlay": "overlays"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'crossx.explain' has no attribute {name!r}")
    return getattr(importlib.import_module(f"crossx.explain.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
