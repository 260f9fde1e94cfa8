"""Texts of strangers in CSV files, which spreadsheets open."""

import csv
import io
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crossx.data.readers.table import read_paths
from crossx.evaluation.tables import write_table
from crossx.predict import outputs
from crossx.predict.results import Prediction
from crossx.report.tables import Table
from crossx.runs.spreadsheet import escape_formula, unescape_formula, write_rows

DANGEROUS = (
    "=1+1", '=HYPERLINK("http://evil.example", "click")', "+cmd|' /C calc'!A0", "-2+3", "@SUM(1)", "\t=1+1", "\r=1",
    "\n=1", " =1+1", "＝1+1", "＋1+cmd", "－2", "＠SUM", "-", "=", "-5 birds", "+1 (a, b)",
)  # fmt: skip
HARMLESS = (
    "wren", "a=b", "'quoted'", "", "072.Bohemian_Waxwing", "-5", "+2.56 (+1.41, -3.76)", "-1e-05", '"=1"',
    "+3 ± 0.5",
)  # fmt: skip


@pytest.mark.parametrize("text", DANGEROUS)
def test_formulas_become_text(text: str) -> None:
    assert escape_formula(text) == f"'{text}"
    assert escape_formula(f"'{text}") == f"''{text}"


@pytest.mark.parametrize("text", HARMLESS)
def test_other_text_and_numbers_stay(text: str) -> None:
    assert escape_formula(text) == unescape_formula(text) == text


@given(st.text(alphabet="'=+-@\t\r\n ＝a1.(),\"", max_size=8) | st.text(max_size=20))
def test_every_text_comes_back_and_no_two_become_one(text: str) -> None:
    assert unescape_formula(escape_formula(text)) == text
    assert escape_formula(text) in (text, f"'{text}")


def test_only_texts_of_a_row_change(tmp_path: Path) -> None:
    file = io.StringIO()
    write_rows(file, [("=x", -1, -0.5, None, "y")])
    assert file.getvalue() == "'=x,-1,-0.5,,y\n"


def test_every_csv_file_is_safe_and_read_back(tmp_path: Path) -> None:
    """The writers of predictions, of an evaluation and of reports; the reader of tables."""
    names = ("=1+1", "-2+3", "@SUM", "wren")
    predictions = [Prediction(Path(name), name, 0.5, top=((name, 0.5),)) for name in names]
    outputs.write_csv(tmp_path / "predictions.csv", predictions)
    printed = io.StringIO(newline="")
    outputs.print_csv(printed, predictions)
    write_table(tmp_path / "classes.csv", ("class", *names), [(name, -1) for name in names])
    (tmp_path / "report.csv").write_text(Table(("run", *names), [[name, "+1.00"] for name in names]).to_csv())
    (tmp_path / "printed.csv").write_text(printed.getvalue())
    assert (tmp_path / "predictions.csv").read_text() == printed.getvalue()
    for file in tmp_path.glob("*.csv"):
        with file.open(newline="") as lines:
            cells = [cell for row in csv.reader(lines) for cell in row]
        assert set(names[:3]).isdisjoint(cells)
        assert {f"'{name}" for name in names[:3]} <= set(cells)
    assert read_paths(tmp_path / "predictions.csv") == [tmp_path / name for name in names]
    (tmp_path / "own.csv").write_text("path,label\n'=1+1,x\n")
    assert read_paths(tmp_path / "own.csv") == [tmp_path / "'=1+1"]
