"""Keep text in CSV files from being run as a formula by a spreadsheet."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

_FORMULA = re.compile(r"'*(?:\s*[=+\-@＝＋－＠]|[\t\r\n])")
_NUMBER = re.compile(
    r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?%?"
    r"(?: ± [\d.]+)?(?: \([+-]?[\d.]+, [+-]?[\d.]+\))?",
)


def escaped_rows(rows: Iterable[Sequence[object]]) -> Iterator[list[object]]:
    """Yield rows with ``escape_formula`` applied to their texts."""
    for row in rows:
        yield [escape_formula(cell) if isinstance(cell, str) else cell for cell in row]


def escape_formula(text: str) -> str:
    """Put an apostrophe before a text that a spreadsheet would take for a formula.

    Such a text begins with ``=``, ``+``, ``-``, ``@`` (also full-width or after blanks), a tab or a line break
    (https://owasp.org/www-community/attacks/CSV_Injection). Numbers, also with an interval, stay. A text that already
    has apostrophes before such a character gets one more, so that ``unescape_formula`` returns every text.
    """
    return f"'{text}" if _FORMULA.match(text) and not _NUMBER.fullmatch(text) else text


def unescape_formula(text: str) -> str:
    """Return the text that ``escape_formula`` was given."""
    plain = text[1:]
    return plain if text.startswith("'") and escape_formula(plain) == text else text
