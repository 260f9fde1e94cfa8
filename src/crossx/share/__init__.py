"""Share trained networks with a model card, in a folder or on the Hugging Face Hub.

The public names are imported on first use, so that importing the package does not load torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from crossx.share.sharing import push_to_hub, save_pretrained

__all__ = ["push_to_hub", "save_pretrained"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'crossx.share' has no attribute {name!r}")
    return getattr(importlib.import_module("crossx.share.sharing"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
