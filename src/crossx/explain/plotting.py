"""What all figures share: colours, resolution and saving.

The colours can be told apart with every common colour vision deficiency: Okabe and Ito, "Color Universal Design",
https://jfly.uni-koeln.de/color/.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
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

FONT = "DejaVu Sans"
"""Matplotlib's own font, which has no Chinese, Japanese or Korean characters, for example."""

_families: dict[str, str | None] = {}
"""The font of each character looked for so far; None for ``FONT``, and where no installed font has the character."""


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
    _add_fonts(figure)
    with warnings.catch_warnings():
        # a script that no installed font covers is drawn as boxes
        warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from font")
        figure.savefig(target, **options)


def _add_fonts(figure: Figure) -> None:
    """Let texts fall back to installed fonts for the characters that ``FONT`` lacks."""
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        if families := _fallbacks(text.get_text()):
            text.set_fontfamily([FONT, *families])


def _fallbacks(text: str) -> list[str]:
    """Return the families that have the characters of a text that ``FONT`` lacks."""
    characters = dict.fromkeys(character for character in text if not character.isascii())
    if unknown := [character for character in characters if character not in _families]:
        _look_for(unknown)
    return list(dict.fromkeys(family for character in characters if (family := _families[character])))


def _look_for(characters: Iterable[str]) -> None:
    """Find a font for characters, sans serif if possible."""
    from matplotlib.font_manager import findfont, fontManager
    from matplotlib.ft2font import FT2Font

    missing = dict.fromkeys(characters)
    fonts = sorted({(entry.name, entry.fname) for entry in fontManager.ttflist}, key=_font_order)
    # matplotlib's last resort has a box for every character
    fonts = [font for font in fonts if not font[0].startswith("Last Resort")]
    for name, path in [(None, findfont(FONT)), *fonts]:
        if not missing:
            return
        font = FT2Font(path)
        for character in [one for one in missing if font.get_char_index(ord(one))]:
            del missing[character]
            _families[character] = name
    _families.update(missing)


def _font_order(font: tuple[str, str]) -> tuple[bool, str, str]:
    return ("Sans" not in font[0], *font)


def shorten(name: str, length: int) -> str:
    """Cut a name to ``length`` characters, the last one an ellipsis."""
    return name if len(name) <= length else name[: length - 1] + "…"
