"""The dataset that a run is tested on, if it is not that of the training."""

from __future__ import annotations

from pathlib import Path

import pytest

import layouts
from crossx.cli.main import main
from crossx.evaluation.data import read_data
from crossx.methods.registry import create_method
from crossx.methods.weights import describe, save_weights
from crossx.runs import Preprocessing, Run, write_json
from refusals import refusal

CLASSES = ("robin", "wren")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A network that was trained on a folder of images."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    run = Run(tmp_path / "run")
    run.path.mkdir()
    method = create_method("plain", backbone="test_resnet", num_classes=2)
    preprocessing = Preprocessing(64, 72, "bilinear", (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    write_json(
        run.spec, describe(method, classes=CLASSES, preprocessing=preprocessing, dataset="folder").to_json()
    )
    save_weights(method, run.weights)
    data = {"dataset": "folder", "root": str(tmp_path / "images"), "num_workers": 0}
    write_json(run.info, {"schema": 1, "method": "plain", "data_root": data["root"], "data": data})
    return run


@pytest.fixture
def columns(tmp_path: Path) -> Path:
    """A Hugging Face dataset with two columns of images and two of labels."""
    datasets = pytest.importorskip("datasets")
    photos = [tmp_path / f"{i}.jpg" for i in range(6)]
    for i, photo in enumerate(photos):
        layouts.write_image(photo, i % 2, i)
    names = datasets.ClassLabel(names=list(CLASSES))
    features = {"front": datasets.Image(), "back": datasets.Image(), "kind": names, "other": names}
    values = {
        "front": [str(photo) for photo in photos],
        "back": [str(photo) for photo in reversed(photos)],
        "kind": [0, 1] * 3,
        "other": [0, 0, 0, 1, 1, 1],
    }
    rows = datasets.Dataset.from_dict(values, features=datasets.Features(features))
    datasets.DatasetDict({"test": rows, "train": rows}).save_to_disk(str(tmp_path / "columns"))
    return tmp_path / "columns"


def test_columns_are_those_that_are_named(run: Run, columns: Path) -> None:
    options = {"root": columns, "dataset": "huggingface"}
    assert "Name one with --data.image_column" in refusal(read_data, run, run.read_spec(), **options)
    options["image_column"] = "back"
    assert "Name one with --data.label_column" in refusal(read_data, run, run.read_spec(), **options)
    config, index = read_data(run, run.read_spec(), **options, label_column="other")
    assert (config.image_column, config.label_column) == ("back", "other")
    assert [record.label for record in index.split("test")] == [0, 0, 0, 1, 1, 1]
    assert index.split("test")[0].path.read_bytes() == (columns.parent / "5.jpg").read_bytes()


def test_test_takes_the_options_that_its_refusal_names(
    run: Run, columns: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["test", str(run.path), "--data.dataset", "huggingface", "--data.root", str(columns)]
    words += ["--data.image_column", "front"]
    assert main(words) == 2
    assert "Name one with --data.label_column" in capsys.readouterr().err
    assert main([*words, "--data.label_column", "kind"]) == 0
    assert "test: 6 images" in capsys.readouterr().out
