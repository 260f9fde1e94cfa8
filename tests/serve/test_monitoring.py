"""Request ids, the access log and metrics."""

import logging
import re
from collections.abc import Iterable
from pathlib import Path

import pytest

from layouts import FOLDERS

pytest.importorskip("fastapi", reason="needs crossx[serve]")

from fastapi.testclient import TestClient
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families
from requests_to_app import (
    NOT_AN_IMAGE,
    files,
    samples,
)

from crossx.data.images import printable
from crossx.predict.identity import Identity
from crossx.predict.predictor import Predictor
from crossx.serve.app import create_app
from crossx.serve.monitoring import MAX_CLASS_SERIES, Metrics


def test_request_ids_are_taken_over_where_they_are_plain(client: TestClient) -> None:
    assert client.get("/healthz", headers={"X-Request-ID": "a-1.B_2"}).headers["x-request-id"] == "a-1.B_2"
    for given in ({}, {"X-Request-ID": "a b"}, {"X-Request-ID": "x" * 65}, {"X-Request-ID": 'a"}'}):
        made = client.get("/healthz", headers=given).headers["x-request-id"]
        assert re.fullmatch("[0-9a-f]{32}", made)


def test_requests_are_logged_with_their_id(
    client: TestClient, images: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    log = logging.getLogger("crossx.serve")
    log.addHandler(caplog.handler)
    try:
        with caplog.at_level(logging.INFO, "crossx.serve"):
            client.get("/healthz")
            client.post("/predict", files=files(*images[:2]), headers={"X-Request-ID": "mine"})
    finally:
        log.removeHandler(caplog.handler)
    fields = vars(caplog.records[0])
    assert {name: fields[name] for name in ("request_id", "method", "path", "status", "images")} == {
        "request_id": "mine", "method": "POST", "path": "/predict", "status": 200, "images": 2,
    }  # fmt: skip


def test_metrics(client: TestClient, images: list[Path]) -> None:
    def value(line: str) -> float:
        return samples(client).get(line, 0.0)

    requests = 'crossx_requests_total{method="POST",route="/predict",status="200"}'
    unknown = 'crossx_requests_total{method="any",route="other",status="404"}'
    before = [value(line) for line in (requests, unknown, 'crossx_images_total{outcome="unreadable"}')]
    client.post("/predict", files=files(images[0], NOT_AN_IMAGE))
    client.get("/x/1")
    client.get("/x/2")
    after = [value(line) for line in (requests, unknown, 'crossx_images_total{outcome="unreadable"}')]
    assert [new - old for new, old in zip(after, before, strict=True)] == [1, 2, 1]
    assert value("crossx_queue_images") == 0
    assert value("crossx_batch_images_count") > 0
    assert (value("crossx_queue_limit_images"), value("crossx_ready")) == (128, 1)


def test_series_that_alerts_need_are_there_from_the_start(predictor: Predictor) -> None:
    with TestClient(create_app(predictor)) as client:
        found = samples(client)
    assert found['crossx_images_total{outcome="unreadable"}'] == 0
    assert {found[f'crossx_predictions_total{{label="{name}"}}'] for name in FOLDERS} == {0}
    for route in ("/predict", "/explain"):
        for status in (200, 429, 500, 503, 504):
            assert found[f'crossx_requests_total{{method="POST",route="{route}",status="{status}"}}'] == 0


def test_predictions_are_counted_by_class_and_confidence(client: TestClient, images: list[Path]) -> None:
    before = samples(client)
    answers = client.post("/predict", files=files(*images, NOT_AN_IMAGE)).json()["predictions"][:-1]
    grown = {name: value - before[name] for name, value in samples(client).items()}
    by_class = {name: grown[f'crossx_predictions_total{{label="{name}"}}'] for name in FOLDERS}
    assert by_class == {name: sum(answer["label"] == name for answer in answers) for name in FOLDERS}
    sure = [answer["probability"] for answer in answers]
    assert grown["crossx_confidence_count"] == len(images)
    assert grown["crossx_confidence_sum"] == pytest.approx(sum(sure))
    for bound in (0.3, 0.5, 0.95, 1.0):
        below = grown[f'crossx_confidence_bucket{{le="{bound}"}}']
        assert below == sum(value <= bound for value in sure)


@pytest.mark.parametrize("number", [MAX_CLASS_SERIES, MAX_CLASS_SERIES + 1, 10_000])
def test_the_series_of_the_classes_are_bounded(number: int) -> None:
    classes = [f"{n:05d}" + "x" * 1000 for n in range(number)]
    metrics = Metrics(Identity("x", "1", None), classes, 1, lambda: 0, lambda: True)

    def series() -> dict[str, float]:
        lines = generate_latest(metrics.registry).decode().splitlines()
        counters = (line for line in lines if line.startswith("crossx_predictions_total"))
        return {label: float(value) for label, value in (line.rsplit(" ", 1) for line in counters)}

    known = series()
    assert len(known) == min(number, MAX_CLASS_SERIES + 1)
    assert max(map(len, known)) < 150
    for name in classes:
        metrics.observe_prediction(name, 0.5)
    assert series().keys() == known.keys()
    assert sum(series().values()) == number
    assert series().get('crossx_predictions_total{label="other"}', 0) == number - min(
        number, MAX_CLASS_SERIES
    )


def test_class_names_are_escaped_in_labels() -> None:
    hostile = ['a"} 1\n# HELP evil', "\\", "tab\there", "\u2028", "Bläßhuhn", "", 'x{le="1"}', "other"]
    metrics = Metrics(Identity("x", "1", None), hostile, 1, lambda: 0, lambda: True)
    for name in hostile:
        metrics.observe_prediction(name, 1.0)
    (family,) = [
        family
        for family in text_string_to_metric_families(generate_latest(metrics.registry).decode())
        if family.name == "crossx_predictions"
    ]
    counted = {s.labels["label"]: s.value for s in family.samples if s.name.endswith("_total")}
    assert counted == {printable(name): 1 for name in hostile}


@pytest.mark.slow
def test_odd_requests_add_no_series(client: TestClient, images: list[Path]) -> None:
    def series() -> set[str]:
        return set(samples(client))

    def invent(names: Iterable[str]) -> None:
        for name in names:
            client.get(f"/{name}")
            client.get(f"/page/{name}")
            client.get(f"/predict/{name}?x={name}")
            client.request(name, "/predict")
            client.request(name, f"/{name}")
            client.get("/healthz", headers={"X-Request-ID": name, "Host": name, "User-Agent": name})
            client.get("/healthz", headers={"X-Forwarded-For": name, "X-Forwarded-Proto": name})
            client.post(f"/predict?top={name}", files=files(NOT_AN_IMAGE))
            client.post("/predict", content=name, headers={"Content-Type": name})
            client.post("/predict", files={"images": (name, NOT_AN_IMAGE)})
            client.post(f"/explain?maps=class&target={name}", files=files(images[0]))

    # once of each kind, for the status that it gets; a request for the metrics is counted after its answer
    invent(["FIRST", "Y" * 5000, "%01", "PUT "])
    series()
    before = series()
    assert 'crossx_requests_total{method="other",route="/predict",status="405"}' in before
    invent([*(f"X{number}" for number in range(40)), "X" * 5000, "%00", "GET "])
    assert series() == before
