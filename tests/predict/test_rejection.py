"""A run with a threshold gives no class to images below it, everywhere alike."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from crossx.cli.main import main
from crossx.errors import CrossXError, UsageError
from crossx.evaluation.conformal import least_probabilities
from crossx.export.export import export_run
from crossx.predict.collection import predict_collection
from crossx.predict.outputs import joined
from crossx.predict.predictor import Predictor
from crossx.runs import PredictionSets, Rejection, Run, read_json, write_json
from layouts import write_folder, write_run

CLASSES = ("auk; or razorbill", "jay", "owl\\")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_folder(tmp_path_factory.mktemp("photos"), classes=2, images_per_class=4)
    (folder / "zero.jpg").touch()
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, photos: Path) -> Run:
    """A run whose threshold is in the middle of the scores of the photos, for each of the views."""
    run = Run(write_run(tmp_path_factory.mktemp("run"), CLASSES))
    spec = run.read_spec()
    thresholds = {}
    for key, options in {"1": {}, "1+flip": {"flip": True}, "5": {"crops": 5}}.items():
        views = Predictor.load(run.path, "cpu", **options)
        images = torch.stack([views.prepare(path) for path in sorted(photos.rglob("*/*.jpg"))])
        scores = [views.network.logits(view).amax(1).tolist() for view in views._views.split(images)]
        means = sorted(sum(row) / len(scores) for row in zip(*scores, strict=True))
        thresholds[key] = (means[2] + means[3]) / 2
    least = tuple(0.4 - 0.001 * number for number in range(50))
    spec = replace(
        spec,
        rejection=Rejection("max_logit", 0.95, 40, thresholds),
        sets=PredictionSets(99, {"1": least, "1+flip": least, "5": least}),
    )
    write_json(run.spec, spec.to_json())
    return run


@pytest.mark.parametrize("options", [{}, {"flip": True}, {"crops": 5}])
def test_images_below_the_threshold_of_the_views_have_no_label(run: Run, photos: Path, options: dict) -> None:
    predictor = Predictor.load(run.path, "cpu", **options)
    everything = Predictor.load(run.path, "cpu", accept="all", **options)
    assert predictor.rejection is not None
    predictions = predictor.predict(photos, top=3)
    labelled = everything.predict(photos, top=3)
    assert sum(one.rejected for one in predictions) == 3
    for one, other in zip(predictions, labelled, strict=True):
        if one.error is not None:
            assert (one.label, one.nearest, one.score, one.rejected) == (None, None, None, False)
            continue
        assert (one.top, one.probability, one.nearest) == (other.top, other.probability, other.label)
        assert one.label == (None if one.score < predictor.rejection[1] else other.label)
        assert (other.score, other.rejected) == (None, False)


def test_a_run_without_thresholds_for_the_views_is_refused(run: Run) -> None:
    with pytest.raises(UsageError, match="no threshold for these views"):
        Predictor.load(run.path, "cpu", flip=True, crops=5)
    Predictor.load(run.path, "cpu", flip=True, crops=5, accept="all")
    with pytest.raises(UsageError, match="accept"):
        Predictor.load(run.path, "cpu", accept="some")


def test_every_file_says_the_same(
    run: Run, photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    predictions = Predictor.load(run.path, "cpu", coverage=0.9).predict(photos, top=2)
    assert "will cover between" in caplog.text
    least = 0.36
    for one in predictions:
        if one.error is None:
            above = [name for name, value in one.top if value >= least] or [one.nearest]
            assert list(one.candidates)[: len(above)] == above
    found = {}
    for suffix in ("csv", "jsonl", "parquet"):
        output = tmp_path / f"out.{suffix}"
        words = ["predict", str(run.path), str(photos), "--output", str(output), "--device", "cpu"]
        assert main([*words, "--coverage", "0.9"]) == 1
        found[suffix] = output
    with found["csv"].open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["path", "label", "probability", "error", "nearest", "score", "candidates"]
    lines = [json.loads(line) for line in found["jsonl"].read_text().splitlines()]
    table = pq.read_table(found["parquet"]).to_pylist()
    for one, row, line, cells in zip(predictions, rows, lines, table, strict=True):
        assert (row["label"] or None, row["nearest"] or None) == (one.label, one.nearest)
        assert row["candidates"] == ("" if one.candidates is None else joined(one.candidates))
        for record in (line, cells):
            assert (record["label"], record["nearest"], record["error"]) == (
                one.label,
                one.nearest,
                one.error,
            )
            assert record["candidates"] == (None if one.candidates is None else list(one.candidates))
            if one.error is None:
                assert record["score"] == pytest.approx(one.score, rel=1e-5)


def test_the_ranks_of_a_rejected_image_have_no_label(run: Run, photos: Path, tmp_path: Path) -> None:
    predict_collection(run.path, photos, tmp_path / "out", device="cpu", top=2)
    rows = pq.read_table(tmp_path / "out").to_pylist()
    names = ["path", "label", "probability", "error", "rank", "nearest", "score"]
    assert list(rows[0]) == names
    assert sum(row["label"] is None and row["error"] is None for row in rows) == 6
    with pytest.raises(UsageError, match="was started with another --accept"):
        predict_collection(run.path, photos, tmp_path / "out", device="cpu", top=2, accept="all")


def test_names_in_a_field_can_be_told_apart() -> None:
    assert joined(CLASSES) == "auk\\; or razorbill; jay; owl\\\\"
    assert joined([]) == ""


def test_an_exported_file_rejects_the_same_images(run: Run, photos: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.safetensors"
    report = export_run(run.path, file)
    assert report.description["rejection"]["score"] == "max_logit"
    assert report.description["schema"] == 2
    expected = Predictor.load(run.path, "cpu", coverage=0.9).predict(photos, top=3)
    found = Predictor.load(file, coverage=0.9).predict(photos, top=3)
    assert [(one.label, one.candidates) for one in found] == [(one.label, one.candidates) for one in expected]


def test_an_exported_file_of_before_gives_every_image_a_class(photos: Path) -> None:
    old = Path(__file__).parents[1] / "assets" / "exported_0_1.safetensors"
    predictor = Predictor.load(old)
    assert predictor.rejection is None
    assert all(one.label for one in predictor.predict(photos) if one.error is None)
    with pytest.raises(UsageError, match="has no prediction sets"):
        Predictor.load(old, coverage=0.9)


def test_the_service_answers_null(run: Run, photos: Path) -> None:
    pytest.importorskip("fastapi", reason="needs crossx[serve]")
    from fastapi.testclient import TestClient

    from crossx.serve.app import create_app

    paths = sorted(photos.rglob("*/*.jpg"))
    predictor = Predictor.load(run.path, "cpu")
    expected = Predictor.load(run.path, "cpu", coverage=0.8).predict(paths)
    with TestClient(create_app(predictor)) as client:
        about = client.get("/model").json()
        assert (about["rejects"], about["coverage"]) == (True, None)
        files = [("images", (path.name, path.read_bytes())) for path in paths]
        answers = client.post("/predict?coverage=0.8", files=files).json()["predictions"]
        for one, answer in zip(expected, answers, strict=True):
            assert (answer["label"], answer["nearest"]) == (one.label, one.nearest)
            assert answer["top"][0]["label"] == one.nearest
            assert answer["candidates"] == list(one.candidates)
        assert client.post("/predict", files=files).json()["predictions"][0]["candidates"] is None
        for wrong in ("0", "1", "nan", "much"):
            assert client.post(f"/predict?coverage={wrong}", files=files[:1]).status_code == 422
        rejected = next(n for n, one in enumerate(expected) if one.rejected)
        explained = client.post("/explain?format=json", files=[files[rejected]]).json()["prediction"]
        assert (explained["label"], explained["nearest"]) == (None, expected[rejected].nearest)
        counted = client.get("/metrics").text
    uncalibrated = Predictor(predictor.network, replace(predictor.spec, sets=None))
    with TestClient(create_app(uncalibrated)) as client:
        refused = client.post("/predict?coverage=0.8", files=files[:1])
        assert (refused.status_code, refused.json()["detail"]) == (
            422,
            "query.coverage: the network was not calibrated for 0.8.",
        )
    assert 'crossx_images_total{outcome="rejected"} 6.0' in counted


@pytest.mark.parametrize(
    "change",
    [
        {"score": "knn"}, {"keep": 0}, {"keep": 1.5}, {"images": -1}, {"thresholds": {}}, {"thresholds": {"2": 1.0}},
        {"thresholds": {"1": "low"}}, {"more": 1},
    ],
)  # fmt: skip
def test_a_rejection_that_cannot_be_is_refused(run: Run, tmp_path: Path, change: dict) -> None:
    values = read_json(run.spec)
    write_json(tmp_path / "model.json", {**values, "rejection": {**values["rejection"], **change}})
    with pytest.raises(Exception, match=r"model.json: not a model description of crossx .rejection"):
        Run(tmp_path).read_spec()


@pytest.mark.parametrize(
    "change",
    [
        {"images": 0}, {"images": 98}, {"least_probability": {"1": [0.1, 0.2]}}, {"least_probability": {"1": [2.0]}},
        {"least_probability": {}},
    ],
)  # fmt: skip
def test_sets_that_cannot_be_are_refused(run: Run, tmp_path: Path, change: dict) -> None:
    values = read_json(run.spec)
    write_json(tmp_path / "model.json", {**values, "sets": {**values["sets"], **change}})
    with pytest.raises(CrossXError, match=r"model.json: not a model description of crossx .sets"):
        Run(tmp_path).read_spec()


@pytest.mark.parametrize("images", [1, 9, 19, 98, 99, 500])
def test_sets_of_any_number_of_images_can_be_read(run: Run, tmp_path: Path, images: int) -> None:
    sets = PredictionSets(images, {"1": least_probabilities(np.linspace(0, 1, images))})
    write_json(tmp_path / "model.json", replace(run.read_spec(), sets=sets).to_json())
    assert Run(tmp_path).read_spec().sets == sets
