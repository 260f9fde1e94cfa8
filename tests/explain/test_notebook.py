"""The notebook in ``examples/``: executed, small, without errors, and true to the names it uses."""

import json
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[2] / "examples" / "explain.ipynb"


@pytest.fixture(scope="module")
def cells() -> list[dict]:
    return [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]


def test_it_was_executed_in_order_without_errors(cells: list[dict]) -> None:
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert all(cell["outputs"] for cell in cells)
    kinds = {output["output_type"] for cell in cells for output in cell["outputs"]}
    assert "error" not in kinds


def test_it_shows_pictures_and_is_small(cells: list[dict]) -> None:
    pictures = [o for cell in cells for o in cell["outputs"] if "image/png" in o.get("data", {})]
    assert len(pictures) >= 3
    assert NOTEBOOK.stat().st_size < 1_500_000


def test_its_class_maps_are_the_logits(cells: list[dict]) -> None:
    lines = [
        line.split()
        for cell in cells
        for output in cell["outputs"]
        for line in "".join(output.get("text", "")).splitlines()
        if "logit" in line
    ]
    assert len(lines) == 3
    for _, _, by_map, _, logit in lines:
        assert float(by_map) == pytest.approx(float(logit), abs=2e-3)


def test_it_names_no_place_of_the_machine_that_ran_it() -> None:
    assert "/work" not in NOTEBOOK.read_text()
    assert "/home" not in NOTEBOOK.read_text()


def test_its_code_compiles(cells: list[dict]) -> None:
    for cell in cells:
        compile("".join(cell["source"]), NOTEBOOK.name, "exec")
