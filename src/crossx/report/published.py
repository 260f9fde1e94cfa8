"""The accuracies that the Cross-X paper prints: Tables 2 to 7 of https://arxiv.org/abs/1909.04412.

``published.csv`` has one line per printed row. The backbone is the one that caption or text name, otherwise ResNet-50
(section 4.1, for everything not said otherwise); ``crops`` is ``multi`` for the first groups of the tables.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from importlib import resources


@dataclass(frozen=True)
class PublishedResult:
    """One row of one table.

    Attributes:
        table: Number of the table.
        row: Number of the row in it, from 1; in Table 2 the row of the dataset's column.
        dataset: Our name of the dataset: ``cub``, ``nabirds``, ``cars``, ``dogs`` or ``aircraft``.
        approach: The paper's name of the method.
        reference: Number in the paper's bibliography; empty for the paper's own.
        backbone: The network that it is based on.
        one_stage: ``yes`` or ``no``: trained end to end after initialisation; empty if unknown.
        separate_initialization: ``yes`` or ``no``.
        crops: ``single`` or ``multi``.
        accuracy: As a fraction; see ``metric``.
        note: What the text adds.
    """

    table: int
    row: int
    dataset: str
    approach: str
    reference: str
    backbone: str
    one_stage: str
    separate_initialization: str
    crops: str
    accuracy: float
    note: str

    @property
    def metric(self) -> str:
        """``top-1``, or ``class mean`` (section 4.4 on Table 7)."""
        return "class mean" if self.table == 7 else "top-1"

    @property
    def origin(self) -> str:
        """Where it is printed: ``Table 4, row 8``."""
        return f"Table {self.table}, row {self.row}"


def read_published() -> list[PublishedResult]:
    """Return every row, in the order of the tables."""
    text = (resources.files("crossx.report") / "published.csv").read_text(encoding="utf-8")
    return [_read(line) for line in csv.DictReader(text.splitlines())]


def _read(line: dict[str, str]) -> PublishedResult:
    table, row, accuracy = int(line.pop("table")), int(line.pop("row")), float(line.pop("accuracy"))
    # 87.7 as a fraction is 0.877, not 0.8770000000000001
    return PublishedResult(table=table, row=row, accuracy=round(accuracy / 100, 4), **line)
