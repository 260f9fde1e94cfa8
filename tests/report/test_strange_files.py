"""The JSON files of a run beside ``model.json``: whatever is in them, page, table and card are made, or one line."""

import copy
import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pytest

from answers import make_tested
from crossx.cli.compare import NEEDED
from crossx.errors import CrossXError
from crossx.evaluation.predictions import Predictions, predictions_path
from crossx.methods import Method, create_method
from crossx.report import page as page_module
from crossx.report.comparison import tabulate_runs
from crossx.report.examples import choose_examples
from crossx.report.page import render
from crossx.report.results import RunResults
from crossx.runs import Run, read_config, read_history, read_results, write_json
from crossx.share import model_card
from refusals import refusal

CLASSES, IMAGES = 3, 2
STRANGE: list[Any] = [
    None,
    True,
    -1,
    2,
    10**400,
    1e308,
    "x",
    "\ud800",
    [],
    {},
    [1],
    [[1, 2]],
    {"x": 1},
    {"x": {"y": []}},
]


@pytest.fixture(autouse=True)
def templates_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_module, "page_environment", functools.cache(page_module.page_environment))
    monkeypatch.setattr(jinja2, "Template", functools.cache(jinja2.Template))


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Any]:
    """Write a tested run and return its files, name to content."""
    made = make_tested(CLASSES, IMAGES)
    more = {
        "temperature": 1.5,
        "ece_calibrated": 0.03,
        "calibration": {"n": 9, "split": "val"},
        "pretrained": True,
    }
    more |= {"preprocessing": {"image_size": 64}, "confused_pairs": []}
    content = {
        "run.json": {**made.info, "data": {"dataset": "folder"}, "seed": 3, "dataset": "folder"},
        "test.json": {**made.results, **more},
        "metrics.json": {"schema": 1, "epochs": made.history[:2]},
    }
    write_json(tmp_path / "model.json", made.spec.to_json())
    for name, values in content.items():
        write_json(tmp_path / name, values)
    answers = Predictions(made.logits, made.targets, made.paths, np.array(made.classes))
    answers.save(predictions_path(tmp_path, "test"))
    return content


def page(folder: Path) -> str:
    run = RunResults.read(Run(folder), "test")
    return render(run, choose_examples(run), {})


def table(folder: Path) -> str:
    results = read_results(folder / "test.json", NEEDED)
    return tabulate_runs([{"run": "one", "against": None, **results}]).to_markdown()


def card(folder: Path) -> str:
    run = Run(folder)
    data = model_card.CardData.read(network(), run.read_spec(), run, read_results(folder / "test.json"))
    return model_card.write_card(data)


@functools.cache
def network() -> Method:
    return create_method("plain", backbone="test_resnet", num_classes=CLASSES)


def places(values: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if path:
        yield path
    items: Any = (
        values.items()
        if isinstance(values, dict)
        else enumerate(values[:1])
        if isinstance(values, list)
        else ()
    )
    for key, value in items:
        yield from places(value, (*path, key))


@pytest.mark.parametrize(
    ("name", "makers"),
    [
        ("run.json", (page, card)),
        pytest.param("test.json", (page, table, card), marks=pytest.mark.slow),
        ("metrics.json", (page,)),
    ],
)
@pytest.mark.slow
def test_every_value_replaced_by_every_strange_one(
    name: str, makers: tuple[Callable[[Path], str], ...], files: dict[str, Any], tmp_path: Path
) -> None:
    tried, made = 0, 0
    for path in places(files[name]):
        for value in ("delete", *STRANGE):
            version = copy.deepcopy(files[name])
            holder: Any = version
            for key in path[:-1]:
                holder = holder[key]
            if value == "delete":
                del holder[path[-1]]
            else:
                holder[path[-1]] = value
            (tmp_path / name).write_text(json.dumps(version), encoding="utf-8")
            for make in makers:
                tried += 1
                line = ""
                try:
                    made += len(make(tmp_path)) > 100
                except CrossXError as error:
                    line = str(error)
                if line:
                    assert "\n" not in line
                    assert name in line
    assert tried > 150
    assert 0 < made < tried


@pytest.mark.parametrize("read", [lambda path: Run(path.parent).read_info(), read_results, read_history])
@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"a": NaN}', '{"a": 1, "a": 1}', "[" * 10**5, '{"epochs": 3}']
)
def test_text_that_is_none(read: Callable[[Path], Any], text: str, tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text(text)
    if text == '{"epochs": 3}' and read is not read_history:
        read(path)
    else:
        assert str(path) in refusal(read, path)


@pytest.mark.parametrize(
    "text", ["{" * 400, "a: 2020-13-45", "a: " + "1" * 5000, "!!python/object:os.system {}", "- 1"]
)
def test_a_configuration_that_is_none(text: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    assert str(path) in refusal(read_config, path)


def test_a_file_larger_than_what_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("crossx.runs.files.MAX_TEXT", 1 << 20)
    (tmp_path / "run.json").write_text(json.dumps({"id": "x" * (1 << 20)}))
    assert "larger than the 1 MiB" in refusal(Run(tmp_path).read_info)


def test_what_is_needed_is_asked_for_by_name(files: dict[str, Any], tmp_path: Path) -> None:
    results = files["test.json"]
    write_json(tmp_path / "test.json", {**results, "intervals": {"class_mean": [0.1, 0.2]}})
    assert "has no intervals.top1" in refusal(read_results, tmp_path / "test.json", ("n", "intervals.top1"))


def test_predictions_that_do_not_belong_together(tmp_path: Path) -> None:
    good: dict[str, Any] = {
        "logits": np.zeros((2, 3), np.float32),
        "targets": np.array([0, 2]),
        "paths": np.array(["a", "b"]),
        "classes": np.array(["x", "y", "z"]),
    }
    path = tmp_path / "predictions.npz"
    Predictions(**good).save(path)
    Predictions.load(path, tmp_path, "test")
    for change in (
        {"logits": np.zeros((2, 2), np.float32)},
        {"logits": np.full((2, 3), np.nan, np.float32)},
        {"logits": np.array([["a"] * 3] * 2)},
        {"logits": np.array([[{}] * 3] * 2, dtype=object)},
        {"targets": np.array([0, 3])},
        {"targets": np.array([-1, 0])},
        {"targets": np.array([0.0, 1.0])},
        {"paths": np.array(["a"])},
        {"classes": np.array([1, 2, 3])},
    ):
        np.savez(path, **{**good, **change})
        assert "damaged" in refusal(Predictions.load, path, tmp_path, "test")
    for content in (b"", path.read_bytes()[:99], b"\x80\x04" * 99, b"[1, 2]"):
        path.write_bytes(content)
        # not numpy's advice, which is how to run code of the file
        assert refusal(Predictions.load, path, tmp_path, "val") == (
            f"{path}: damaged (not an .npz file): write it again with `crossx test {tmp_path} --split val`."
        )
    path.unlink()
    path.mkdir()
    assert refusal(Predictions.load, path, tmp_path, "val") == (
        f"{path}: a folder where the run has a file. Move it away."
    )
