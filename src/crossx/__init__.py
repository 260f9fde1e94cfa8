"""Fine-grained visual categorization: Cross-X learning and the methods it is compared with, on one contract.

The public names are imported on first use, so ``import crossx`` is fast.
"""

from __future__ import annotations

import importlib
from operator import attrgetter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from crossx.audit.run import audit_dataset
    from crossx.methods import create_method, list_methods
    from crossx.predict.predictor import Predictor
    from crossx.training.config import Config
    from crossx.training.fit import fit
    from crossx.tuning.search import tune

    load = Predictor.load
    __version__: str

__all__ = ["Config", "__version__", "audit_dataset", "create_method", "fit", "list_methods", "load", "tune"]

_HOMES = {
    "Config": ("crossx.training.config", "Config"),
    "audit_dataset": ("crossx.audit.run", "audit_dataset"),
    "create_method": ("crossx.methods", "create_method"),
    "fit": ("crossx.training.fit", "fit"),
    "list_methods": ("crossx.methods", "list_methods"),
    "load": ("crossx.predict.predictor", "Predictor.load"),
    "tune": ("crossx.tuning.search", "tune"),
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        value: Any = version("crossx")
    elif name in _HOMES:
        module, attribute = _HOMES[name]
        value = attrgetter(attribute)(importlib.import_module(module))
    else:
        raise AttributeError(f"module 'crossx' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
