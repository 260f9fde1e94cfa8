"""Tables of any JSON object, for measures whose form this room does not know."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

MAX_ROWS = 60
MAX_LISTED = 12


class Table(NamedTuple):
    """A table of texts.

    Attributes:
        caption: What it holds.
        header: Names of its columns.
        rows: Each as long as the header; the first cell names the row.
        left_out: Number of rows that are not shown.
    """

    caption: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    left_out: int = 0


def tables_of(values: Mapping[str, Any], caption: str = "") -> list[Table]:
    """Lay out a JSON object: plain values as one table, objects and lists of objects as tables of their own."""
    plain = {key: value for key, value in values.items() if _is_plain(value)}
    tables = (
        [_cut(caption, ("measure", "value"), [(key, cell(v)) for key, v in plain.items()])] if plain else []
    )
    for key, value in values.items():
        name = f"{caption}: {key}" if caption else key
        if isinstance(value, Mapping) and value and all(map(_is_row, value.values())):
            tables.append(_grid(name, list(value), list(value.values())))
        elif isinstance(value, Mapping):
            tables += tables_of(value, name)
        elif not _is_plain(value) and all(map(_is_row, value)):
            tables.append(_grid(name, [str(number) for number in range(1, len(value) + 1)], value))
        elif not _is_plain(value):
            tables += tables_of({str(number): item for number, item in enumerate(value, start=1)}, name)
    return tables


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


def _grid(caption: str, names: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> Table:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [
        (name, *(cell(row[key]) if key in row else "" for key in columns))
        for name, row in zip(names, rows, strict=True)
    ]
    return _cut(caption, ("", *columns), lines)


def _cut(caption: str, header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> Table:
    return Table(caption, header, tuple(rows[:MAX_ROWS]), max(0, len(rows) - MAX_ROWS))


def _is_row(value: Any) -> bool:
    return isinstance(value, Mapping) and bool(value) and all(map(_is_plain, value.values()))


def _is_plain(value: Any) -> bool:
    """Tell whether a value fits into one cell."""
    if isinstance(value, list):
        return not any(isinstance(item, Mapping | list) for item in value)
    return not isinstance(value, Mapping)
