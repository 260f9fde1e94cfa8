import csv
import json
import os
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from crossx.cli.main import main
from crossx.errors import CrossXError, UsageError
from crossx.predict import outputs as module
from crossx.predict.collection import predict_collection
from crossx.predict.outputs import (
    WRITERS,
    Columns,
    check_output,
    write_csv,
    write_features,
    write_predictions,
)
from crossx.predict.predictor import Features, Prediction, Predictor
from layouts import write_folder, write_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def predictor(run):
    return Predictor.load(run, device="cpu")


@pytest.fixture
def photos(tmp_path):
    """Seven images and one that is none."""
    write_folder(tmp_path / "photos", classes=1, images_per_class=7)
    (tmp_path / "photos" / "zero.png").touch()
    return tmp_path / "photos"


@pytest.fixture
def images(photos):
    return sorted(photos.rglob("*.jpg"))


def read_csv(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def test_csv_holds_one_row_an_image(predictor, tmp_path, images):
    empty = tmp_path / "a, b.png"
    empty.touch()
    predictions = predictor.predict([images[0], empty], top=3)
    write_csv(tmp_path / "out.csv", predictions)
    header, first, second = read_csv(tmp_path / "out.csv")
    assert header == ["path", "label", "probability", "error"]
    assert first == [str(images[0]), predictions[0].label, str(predictions[0].probability), ""]
    assert second == [str(empty), "", "", "is empty (0 bytes)"]


def test_csv_holds_one_row_a_rank(predictor, tmp_path, images):
    empty = tmp_path / "empty.png"
    empty.touch()
    predictions = predictor.predict([images[0], empty], top=3)
    write_csv(tmp_path / "out.csv", predictions, Columns(2))
    header, *rows = read_csv(tmp_path / "out.csv")
    assert header == ["path", "label", "probability", "error", "rank"]
    assert [(row[1], float(row[2]), row[4]) for row in rows[:2]] == [
        (label, value, str(rank)) for rank, (label, value) in enumerate(predictions[0].top[:2], start=1)
    ]
    assert rows[2] == [str(empty), "", "", "is empty (0 bytes)", ""]


@pytest.mark.parametrize("suffix", WRITERS)
def test_files_are_whole_or_not_there(tmp_path, suffix):
    def failing():
        yield Prediction(None, "auk", 1.0, top=(("auk", 1.0),))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_predictions(tmp_path / f"out{suffix}", failing())
    assert list(tmp_path.iterdir()) == []


def from_csv(path):
    rows = []
    for row in csv.DictReader(path.read_text(encoding="utf-8").splitlines()):
        values = {name: value or None for name, value in row.items()}
        rows.append(values | {"probability": values["probability"] and float(values["probability"])})
    return rows


def ranked(prediction):
    """The rows that a table holds of one prediction, by hand."""
    path = str(prediction.path)
    if prediction.error:
        return [{"path": path, "label": None, "probability": None, "error": prediction.error}]
    return [
        {"path": path, "label": label, "probability": value, "error": None} for label, value in prediction.top
    ]


@pytest.mark.parametrize("options", [pytest.param([], marks=pytest.mark.slow), ["--flip", "--crops", "5"]])
def test_python_and_every_file_say_the_same(run, tmp_path, photos, monkeypatch, options):
    """One predictor behind all: the numbers are equal, not close, but for other batches."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "GROUP_ROWS", 3)
    settings = {"flip": True, "crops": 5} if options else {}
    predictions = Predictor.load(run, "cpu", **settings).predict("photos", top=2, batch_size=3)
    expected = [row for prediction in predictions for row in ranked(prediction)]
    assert len(expected) == 2 * 7 + 1
    words = [
        "predict",
        str(run),
        "photos",
        "--top",
        "2",
        "--data.batch_size",
        "3",
        "--device",
        "cpu",
        *options,
    ]
    for name in ("out.csv", "out.jsonl", "out.parquet", "folder/"):
        assert main([*words, "--output", name]) == 1
    tables = {
        "csv": from_csv(Path("out.csv")),
        "parquet": pq.read_table("out.parquet").to_pylist(),
        "folder": pq.read_table("folder").to_pylist(),
    }
    for name, table in tables.items():
        for row in table:
            del row["rank"]
            if name == "folder":
                row["path"] = f"photos/{row['path']}"
        assert table == expected, name
    lines = [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]
    for line, prediction in zip(lines, predictions, strict=True):
        assert [(one["label"], one["probability"]) for one in line["top"]] == list(prediction.top)
        assert (line["path"], line["error"]) == (str(prediction.path), prediction.error)
        assert (line["label"], line["probability"]) == (prediction.label, prediction.probability)


def test_the_collection_engine_has_the_predictors_options(run, photos, tmp_path):
    predict_collection(run, photos, tmp_path / "out", device="cpu", flip=True)
    found = pq.read_table(tmp_path / "out").to_pylist()
    expected = Predictor.load(run, "cpu", flip=True).predict(photos)
    assert [row["probability"] for row in found] == [one.probability for one in expected]
    with pytest.raises(UsageError, match="was started with another --flip"):
        predict_collection(run, photos, tmp_path / "out", device="cpu")


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_names_that_are_no_utf8_are_written_as_numbers(tmp_path, suffix):
    name = Path(os.fsdecode(b"\xff.jpg"))
    path = tmp_path / f"out{suffix}"
    write_predictions(
        path, [Prediction(name, "auk", 0.5, top=(("auk", 0.5),)), Prediction(None, error="bad")]
    )
    read = (
        pq.read_table(path).to_pylist()
        if suffix == ".parquet"
        else [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    )
    assert [row["path"] for row in read] == ["\\xff.jpg", None]


def test_features_are_fixed_size_lists_and_null_where_there_is_none(tmp_path):
    pytest.importorskip("pyarrow", "26", reason="older Arrow cannot read null in a list of fixed size")
    vectors = np.eye(4, dtype=np.float32)
    rows = [
        Features(Path("bad.jpg"), error="is empty"),
        *(Features(Path(f"{n}"), v) for n, v in enumerate(vectors)),
    ]
    write_features(tmp_path / "f.parquet", rows, 4)
    table = pq.read_table(tmp_path / "f.parquet")
    assert table.schema.field("feature").type.list_size == 4
    assert table["error"].to_pylist() == ["is empty", None, None, None, None]
    assert table["feature"].to_pylist()[0] is None
    kept = table["feature"].drop_null().combine_chunks()
    assert np.array_equal(kept.flatten().to_numpy().reshape(-1, 4), vectors)


def test_no_images_make_a_table_without_rows(tmp_path):
    for suffix in WRITERS:
        write_predictions(tmp_path / f"out{suffix}", [])
    assert (tmp_path / "out.csv").read_text() == "path,label,probability,error\n"
    assert (tmp_path / "out.jsonl").read_text() == ""
    assert pq.read_table(tmp_path / "out.parquet").num_rows == 0


def test_outputs_are_checked_before_any_work(tmp_path):
    with pytest.raises(UsageError, match=r"f\.npy: must end in \.parquet\.$"):
        check_output(tmp_path / "f.npy", [".parquet"])
    (tmp_path / "file").touch()
    with pytest.raises(CrossXError, match="there is a file where a folder is needed"):
        check_output(tmp_path / "file" / "out.csv", [".csv"])
