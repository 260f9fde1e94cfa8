"""Keep text in CSV files from being run as a formula by a spreadsheet."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Sequence
from typing import TextIO

_FORMULA = re.compile(r"'*(?:\s*[=+\-@＝＋－＠]|[\t\r\n])")
_NUMBER = re.compile(
    r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?%?"
    r"(?: ± [\d.]+)?(?: \([+-]?[\d.]+, [+-]?[\d.]+\))?",
)


def write_rows(file: TextIO, rows: Iterable[Sequence[object]]) -> None:
    """Write lines of CSV with ``escape_formula`` applied to their texts; None becomes an empty field."""
    csv.writer(file, lineterminator="\n").writerows(
        [escape_formula(cell) if isinstance(cell, str) else cell for cell in row] for row in rows
    )


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
