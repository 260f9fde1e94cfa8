import csv
import io
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from crossx.report.tables import Table, percent, points
from crossx.runs.spreadsheet import unescape_formula

TEXT = st.text(st.characters(exclude_categories=["Cs", "Cc", "Zl", "Zp"]), max_size=8)
AWKWARD = Table(("a|b", "50%"), [("x_1 & {y}~^\\", "±1"), ("#3 $", "−2 … Δ")], "50% of_it")


@given(
    st.integers(1, 4).flatmap(
        lambda n: st.lists(st.lists(TEXT, min_size=n, max_size=n), min_size=1, max_size=4)
    )
)
def test_csv_gives_every_cell_back(rows: list[list[str]]) -> None:
    text = Table(rows[0], rows[1:]).to_csv()
    read = [[unescape_formula(cell) for cell in row] for row in csv.reader(io.StringIO(text))]
    assert read == rows


@given(
    st.integers(1, 4).flatmap(
        lambda n: st.lists(st.lists(TEXT, min_size=n, max_size=n), min_size=1, max_size=4)
    )
)
@example([["a", "b"]])
def test_markdown_has_a_line_a_row_and_as_many_bars_as_columns_need(rows: list[list[str]]) -> None:
    lines = Table(rows[0], rows[1:]).to_markdown().removesuffix("\n").split("\n")
    assert len(lines) == len(rows) + 1
    for line in lines:
        bars = line.replace("\\\\", "").replace("\\|", "").count("|")
        assert bars == len(rows[0]) + 1


def test_latex_escapes_what_tex_would_read() -> None:
    text = AWKWARD.to_latex()
    assert r"x\_1 \& \{y\}\textasciitilde{}\^{}\textbackslash{} & $\pm$1 \\" in " ".join(text.split())
    assert r"\caption{50\% of\_it}" in text
    assert r"\begin{tabular}{lr}" in text


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="no pdflatex here")
def test_latex_compiles(tmp_path: Path) -> None:
    body = AWKWARD.to_latex()
    document = rf"\documentclass{{article}}\usepackage{{booktabs}}\begin{{document}}{body}\end{{document}}"
    (tmp_path / "table.tex").write_text(document)
    done = subprocess.run(
        ["pdflatex", "-halt-on-error", "table.tex"], cwd=tmp_path, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stdout[-500:]


def test_the_three_files_are_written(tmp_path: Path) -> None:
    AWKWARD.write(tmp_path / "out" / "v1.2")
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["v1.2.csv", "v1.2.md", "v1.2.tex"]
    assert (tmp_path / "out" / "v1.2.md").read_text().startswith("50% of_it\n\n| a\\|b")


def test_numbers() -> None:
    assert percent(0.8881, [0.8753, 0.9005]) == "88.81 (87.53, 90.05)"
    assert points(-0.0026) == "-0.26"
    assert points(0.0256, [0.0141, 0.0376]) == "+2.56 (+1.41, +3.76)"
    assert (percent(None), points(None)) == ("–", "–")


def test_a_table_without_rows_keeps_its_columns() -> None:
    table = Table(("run", "top-1"), [])
    assert r"\begin{tabular}{lr}" in table.to_latex()
    assert "top-1" in table.to_markdown()


def test_no_cell_is_taken_for_a_rule() -> None:
    table = Table(("name", "n"), [("\x01", "1"), ("a", "2")])
    lines = table.to_markdown().splitlines()
    assert ["---" in line for line in lines] == [False, True, False, False]


def test_a_table_that_does_not_fit_continues_each_row_on_indented_lines() -> None:
    table = Table(["run", "method", "a long head"], [["one", "crossx", "1.0"], ["two", "plain", "–"]])
    assert table.to_text(None) == table.to_text(100) == table.to_markdown()
    lines = table.to_text(16).splitlines()
    assert lines == [
        "run  method", "  a long head", "-------------", "one  crossx", "  1.0", "two  plain", "  –",
    ]  # fmt: skip
    assert max(map(len, lines)) <= 16
    # every cell is there once, in its row
    words = " ".join(lines[3:]).split()
    assert words == ["one", "crossx", "1.0", "two", "plain", "–"]
