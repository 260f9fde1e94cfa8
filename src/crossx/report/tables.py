"""Tables of text, written as Markdown, CSV and LaTeX."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tabulate import LATEX_ESCAPE_RULES, SEPARATING_LINE, tabulate

from crossx.errors import first_few
from crossx.runs import write_text
from crossx.runs.spreadsheet import write_rows

MAX_LISTED = 12
"""Items of a list that ``cell`` shows."""

_LATEX = str.maketrans({"±": r"$\pm$", "−": "$-$", "–": "--", "…": r"\ldots{}", "Δ": r"$\Delta$"})
"""What tabulate leaves as it is and LaTeX fonts may lack."""


@dataclass(frozen=True)
class Table:
    """Rows of text under a header.

    Attributes:
        columns: The header.
        rows: Each as long as ``columns``; the first cell names the row.
        caption: One line on what the table shows.
        left_out: Number of rows that are not shown.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    left_out: int = 0

    def to_markdown(self) -> str:
        """Return a GitHub-flavoured Markdown table whose columns are aligned in the source too."""
        header, *rows = [[_markdown(cell) for cell in row] for row in (self.columns, *self.rows)]
        return self._format("pipe", header, rows)

    def to_text(self, width: int | None) -> str:
        """Return the table for a terminal: as Markdown if it fits, else with rows that continue on indented lines.

        Args:
            width: Characters per line; None for no limit. A cell that is longer is kept in one piece.
        """
        text = self.to_markdown()
        if width is None or max(map(len, text.split("\n"))) <= width:
            return text
        rows = [tuple(" ".join(cell.split()) for cell in row) for row in (self.columns, *self.rows)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines: list[list[int]] = [[]]
        used = 0
        for column, needed in enumerate(widths):
            if lines[-1] and used + 2 + needed > width:
                lines.append([])
            # a further line is indented
            used = used + 2 + needed if lines[-1] else needed + (2 if len(lines) > 1 else 0)
            lines[-1].append(column)
        formatted = []
        for row in rows:
            for number, line in enumerate(lines):
                cells = [row[column].ljust(widths[column]) for column in line]
                formatted.append(f"{'  ' if number else ''}{'  '.join(cells)}".rstrip())
        heads = len(lines)
        rule = "-" * min(width, max(map(len, formatted)))
        return "\n".join([*formatted[:heads], rule, *formatted[heads:]]) + "\n"

    def to_csv(self) -> str:
        """Return comma-separated values; formulas of spreadsheets get an apostrophe."""
        text = io.StringIO()
        write_rows(text, [self.columns, *self.rows])
        return text.getvalue()

    def to_latex(self) -> str:
        """Return a ``table`` environment with booktabs rules (``\\usepackage{booktabs}``)."""
        body = self._format("latex_booktabs", self.columns, self.rows)
        if not self.rows:  # tabulate then drops the alignment
            body = body.replace(
                r"\begin{tabular}{}", rf"\begin{{tabular}}{{l{'r' * (len(self.columns) - 1)}}}"
            )
        caption = "".join(LATEX_ESCAPE_RULES.get(character, character) for character in self.caption)
        lines = [
            r"\begin{table}",
            r"\centering",
            *([rf"\caption{{{caption}}}"] if caption else []),
            body + r"\end{table}",
        ]
        return "\n".join(lines).translate(_LATEX) + "\n"

    def _format(self, style: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
        alignment = ["left", *["right"] * (len(header) - 1)]
        # tabulate takes such a cell for a rule
        rows = [[cell.replace(SEPARATING_LINE, "\\x01") for cell in row] for row in rows]
        # tabulate 0.9 fails on an alignment without rows
        colalign = alignment if rows else None
        text = tabulate(rows, header, tablefmt=style, colalign=colalign, disable_numparse=True)
        return text + "\n"

    def write(self, stem: Path) -> None:
        """Write ``STEM.md``, ``STEM.csv`` and ``STEM.tex``.

        Raises:
            CrossXError: If one cannot be written.
        """
        caption = f"{_markdown(self.caption)}\n\n" if self.caption else ""
        write_text(stem.with_name(f"{stem.name}.md"), caption + self.to_markdown())
        write_text(stem.with_name(f"{stem.name}.csv"), self.to_csv())
        write_text(stem.with_name(f"{stem.name}.tex"), self.to_latex())


def cell(value: Any) -> str:
    """Format one JSON value for a reader."""
    if value is None:
        return "—"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return first_few([cell(item) for item in value], MAX_LISTED)
    return str(value)


def percent(value: float | None, interval: Sequence[float] | None = None) -> str:
    """Format a fraction as percent with its interval, ``88.81 (87.53, 90.05)``; None as a dash."""
    return _scaled(value, interval, ".2f")


def points(value: float | None, interval: Sequence[float] | None = None) -> str:
    """Format a difference in percentage points with its sign, ``+2.56 (+1.41, +3.76)``; None as a dash."""
    return _scaled(value, interval, "+.2f")


def _scaled(value: float | None, interval: Sequence[float] | None, form: str) -> str:
    if value is None:
        return "–"
    bounds = f" ({100 * interval[0]:{form}}, {100 * interval[1]:{form}})" if interval else ""
    return f"{100 * value:{form}}{bounds}"


def _markdown(cell: str) -> str:
    return cell.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ")
