"""Lines of Python in src/crossx per package: all, and without blank lines, comments and docstrings.

    python tools/code_size.py

The groups and their order are those of the table in docs/architecture.md.
"""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src" / "crossx"
GROUPS = (
    ("layers", "losses", "backbones", "methods"),
    ("data",),
    ("training",),
    ("evaluation", "explain", "report"),
    ("predict", "export", "serve", "share"),
    ("cli",),
)
OTHERS = "the other packages and files"


def count() -> tuple[Counter[str], Counter[str]]:
    """Return the lines of each package and file at the top, all and only those of code."""
    lines: Counter[str] = Counter()
    code: Counter[str] = Counter()
    for file in SOURCE.rglob("*.py"):
        text, package = file.read_text(encoding="utf-8"), file.relative_to(SOURCE).parts[0]
        constants = (
            node
            for node in ast.walk(ast.parse(text))
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        )
        documented = {
            number for node in constants for number in range(node.lineno, (node.end_lineno or 0) + 1)
        }
        for number, line in enumerate(map(str.strip, text.splitlines()), start=1):
            lines[package] += 1
            code[package] += bool(line) and not line.startswith("#") and number not in documented
    return lines, code


def table() -> list[tuple[str, int, int]]:
    """Return the rows of docs/architecture.md: packages, lines and lines of code."""
    lines, code = count()
    rows = []
    for group in GROUPS:
        names = ", ".join(f"`{name}`" for name in group)
        rows.append((names, sum(lines[name] for name in group), sum(code[name] for name in group)))
    grouped = {name for group in GROUPS for name in group}
    rest = [name for name in lines if name not in grouped]
    rows.append((OTHERS, sum(lines[name] for name in rest), sum(code[name] for name in rest)))
    rows.append(("all", lines.total(), code.total()))
    return rows


if __name__ == "__main__":
    for names, lines, code in table():
        print(f"{lines:8,} {code:8,}  {names}")
