"""What is left to ``pytest -m slow``."""

from collections.abc import Iterable
from typing import Any

import pytest


def slow_except(values: Iterable[Any], *quick: Any) -> list[Any]:
    """Return the values of ``parametrize``, or tuples of them, marked as slow except for ``quick``."""
    values = list(values)
    assert set(quick) <= set(values)
    rows = [value if isinstance(value, tuple) else (value,) for value in values]
    marks = [() if value in quick else pytest.mark.slow for value in values]
    return [pytest.param(*row, marks=mark) for row, mark in zip(rows, marks, strict=True)]
