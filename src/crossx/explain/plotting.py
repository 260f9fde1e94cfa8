"""What all figures share: colours, resolution and saving.

The colours can be told apart with every common colour vision deficiency: Okabe and Ito, "Color Universal Design",
https://jfly.uni-koeln.de/color/.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from crossx.runs import atomic_path

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BLACK = "#000000"
BLUE = "#0072b2"
GREEN = "#009e73"
ORANGE = "#e69f00"
PURPLE = "#cc79a7"
SKY_BLUE = "#56b4e9"
VERMILION = "#d55e00"
YELLOW = "#f0e442"

DARK_BLUE = "#003a5c"
"""Not of that set: a shade of ``BLUE`` that also differs from the others in grey print."""

DPI = 150


def save_png(figure: Figure, target: Path | IO[bytes], **options: Any) -> None:
    """Write a figure as PNG to a path (atomically) or an open file; options as in ``savefig``.

    Raises:
        CrossXError: If the path cannot be written.
    """
    _save(figure, target, {"format": "png", "dpi": DPI, **options})


def save_jpeg(figure: Figure, target: Path, dpi: float) -> None:
    """Write a figure of photos as JPEG, which is smaller than PNG; see ``save_png``."""
    _save(figure, target, {"format": "jpeg", "dpi": dpi, "pil_kwargs": {"quality": 88, "optimize": True}})


def _save(figure: Figure, target: Path | IO[bytes], options: dict[str, Any]) -> None:
    if isinstance(target, Path):
        with atomic_path(target) as temporary, temporary.open("wb") as file:
            return _save(figure, file, options)
    with warnings.catch_warnings():
        # a script that no installed font covers is drawn as boxes
        warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from font")
        figure.savefig(target, **options)


def shorten(name: str, length: int) -> str:
    """Cut a name to ``length`` characters, the last one an ellipsis."""
    return name if len(name) <= length else name[: length - 1] + "…"
