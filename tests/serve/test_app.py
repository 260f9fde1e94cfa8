"""The HTTP application, called without a network; a real process is tested in test_server.py."""

import base64
import hashlib
import io
import json
import logging
import re
import threading
import time
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import httpx2 as httpx
import numpy as np
import pytest
from PIL import Image

from layouts import FOLDERS, write_image, write_run

pytest.importorskip("fastapi", reason="needs crossx[serve]")

from fastapi import FastAPI
from fastapi.testclient import TestClient
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from crossx.data.images import ImageError, printable
from crossx.errors import UsageError
from crossx.explain.figures import LUMA, overlay
from crossx.export.export import export_run
from crossx.predict.identity import Identity
from crossx.predict.predictor import Predictor
from crossx.runs import write_json
from crossx.serve.app import create_app
from crossx.serve.limits import Limits
from crossx.serve.monitoring import MAX_CLASS_SERIES, Metrics
from crossx.serve.uploads import from_base64, network_of

NOT_AN_IMAGE = b"no image at all"
PATIENCE = 600
"""Seconds after which something hangs."""


@pytest.fixture(scope="module")
def predictor(tmp_path_factory: pytest.TempPathFactory) -> Predictor:
    run = write_run(tmp_path_factory.mktemp("run") / "served")
    write_json(run / "run.json", {"id": "7c0ffee"})
    return Predictor.load(run, device="cpu")


def checksum_of(predictor: Predictor) -> str:
    assert predictor.origin is not None
    return hashlib.sha256(predictor.origin[1].read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("images")
    paths = [folder / f"{number}.jpg" for number in range(5)]
    for number, path in enumerate(paths):
        write_image(path, number % 3, number)
    return paths


@pytest.fixture(scope="module")
def app(predictor: Predictor) -> FastAPI:
    return create_app(predictor, Limits(max_upload_mb=1, max_pixels=5000, timeout=PATIENCE))


@pytest.fixture(scope="module")
def client(app: FastAPI) -> Iterator[TestClient]:
    with TestClient(app, raise_server_exceptions=False) as client:
        yield client


def files(*contents: Path | bytes) -> list[tuple[str, tuple[str, bytes]]]:
    return [
        ("images", (content.name, content.read_bytes()) if isinstance(content, Path) else ("x.jpg", content))
        for content in contents
    ]


def encoded(*paths: Path) -> list[str]:
    return [base64.b64encode(path.read_bytes()).decode() for path in paths]


def problem(response: httpx.Response, status: int) -> str:
    assert response.status_code == status, response.text
    content = response.json()
    assert set(content) == {"detail", "request_id"}
    assert content["request_id"] == response.headers["x-request-id"]
    assert "\n" not in content["detail"]
    return str(content["detail"])


def picture(text: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))))


def test_files_and_base64_are_predicted_as_the_predictor_does(
    client: TestClient, predictor: Predictor, images: list[Path]
) -> None:
    expected = predictor.predict(images, top=2)
    by_file = client.post("/predict?top=2", files=files(*images))
    by_json = client.post("/predict", json={"images": encoded(*images), "top": 2})
    assert by_file.status_code == by_json.status_code == 200
    assert by_file.json()["model"] == {
        "name": "served", "version": "7c0ffee", "checksum": checksum_of(predictor), "method": "crossx",
        "backbone": predictor.spec.backbone, "dataset": "folder",
    }  # fmt: skip
    for response, names in ((by_file, [path.name for path in images]), (by_json, [None] * 5)):
        answers = response.json()["predictions"]
        assert [answer["name"] for answer in answers] == names
        for answer, prediction in zip(answers, expected, strict=True):
            assert answer["error"] is None
            assert answer["label"] == prediction.label
            assert answer["probability"] == pytest.approx(prediction.probability, abs=1e-5)
            assert [(one["label"], one["probability"]) for one in answer["top"]] == [
                (label, pytest.approx(probability, abs=1e-5)) for label, probability in prediction.top
            ]


def test_five_classes_are_given_by_default_and_all_where_there_are_fewer(
    client: TestClient, images: list[Path]
) -> None:
    for top in ("", "?top=1000"):
        (answer,) = client.post(f"/predict{top}", files=files(images[0])).json()["predictions"]
        assert {one["label"] for one in answer["top"]} == set(FOLDERS)


def test_an_image_that_cannot_be_read_is_told_and_the_others_answered(
    client: TestClient, images: list[Path]
) -> None:
    response = client.post("/predict", files=files(images[0], NOT_AN_IMAGE, b"", images[1]))
    assert response.status_code == 200
    answers = response.json()["predictions"]
    assert [answer["label"] is None for answer in answers] == [False, True, True, False]
    assert answers[1]["error"].startswith("is not a JPEG, PNG")
    assert answers[2]["error"] == "is empty (0 bytes)"
    assert answers[1]["top"] == []


def test_only_images_that_cannot_be_read_are_422_with_the_errors(client: TestClient) -> None:
    response = client.post("/predict", files=files(NOT_AN_IMAGE))
    assert response.status_code == 422
    assert response.json()["predictions"][0]["error"].startswith("is not a JPEG")
    response = client.post("/predict", json={"images": ["%%%"]})
    assert response.status_code == 422
    assert response.json()["predictions"][0]["error"] == "is not base64"


@pytest.mark.parametrize("kind", ["image/jpeg", "Image/PNG; q=1", "image/*", "application/octet-stream"])
def test_a_body_may_be_the_image_itself(client: TestClient, images: list[Path], kind: str) -> None:
    (expected,) = client.post("/predict", files=files(images[0])).json()["predictions"]
    body, headers = images[0].read_bytes(), {"content-type": kind}
    (answer,) = client.post("/predict", content=body, headers=headers).json()["predictions"]
    assert answer == expected | {"name": None}
    assert client.post("/explain", content=body, headers=headers).status_code == 200


def wrapped(text: str, end: str) -> str:
    return end.join(text[at : at + 76] for at in range(0, len(text), 76))


@pytest.mark.parametrize(
    "form",
    [
        lambda text: f"data:image/jpeg;base64,{text}",
        lambda text: f" DATA:;name=a;Base64 , {text}\n",
        lambda text: f"data:image/jpeg;base64,{text.replace('+', '%2B').replace('=', '%3d')}",
        lambda text: wrapped(text, "\r\n"),
        lambda text: wrapped(text, " ") + "\n",
        lambda text: text.replace("+", "-").replace("/", "_"),
        lambda text: text.rstrip("="),
        lambda text: wrapped(text.replace("+", "-").replace("/", "_").rstrip("="), "\n"),
    ],
)  # fmt: skip
def test_base64_is_read_in_all_its_forms(form: Any) -> None:
    for content in (b"\xff\xd8\xff\xfb\xef\xbe" + bytes(range(256)), b"\xfb", b"ab", b"abc"):
        assert from_base64(form(base64.b64encode(content).decode())) == content


@pytest.mark.parametrize(
    "text", ["%%%", "a", "abcde", "ab=c", "äöü=", "data:image/jpeg;base64,%%", "=ab", "\0abc"]
)
def test_what_is_not_base64_is_told(text: str) -> None:
    with pytest.raises(ImageError, match="is not base64"):
        from_base64(text)


def test_a_data_url_without_base64_is_told() -> None:
    with pytest.raises(ImageError, match="without ;base64"):
        from_base64("data:image/svg+xml,%3Csvg%3E")


def test_requests_at_the_same_time_get_their_own_answers(
    client: TestClient, predictor: Predictor, images: list[Path]
) -> None:
    expected = [prediction.label for prediction in predictor.predict(images)]
    matches: list[bool] = []

    def ask(number: int) -> None:
        for turn in range(number, number + 8):
            answer = client.post("/predict", files=files(images[turn % 5])).json()["predictions"][0]
            matches.append((answer["label"], answer["name"]) == (expected[turn % 5], images[turn % 5].name))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert matches == 6 * 8 * [True]


def png_of(width: int, height: int) -> bytes:
    """A PNG whose header promises this size, and no pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + b"\x08\x02\0\0\0"
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def test_a_bomb_is_refused_by_its_header(client: TestClient) -> None:
    response = client.post("/predict", files=files(png_of(100, 51), png_of(60_000, 60_000)))
    small, large = response.json()["predictions"]
    assert response.status_code == 422
    assert small["error"] == "has 100 x 51 pixels, more than the limit of 5,000"
    assert "more than the" in large["error"]


def test_a_jpeg_of_very_many_scans_is_refused(client: TestClient, images: list[Path]) -> None:
    content = images[0].read_bytes()
    scan = content[content.index(b"\xff\xda") : content.rindex(b"\xff\xd9")]
    response = client.post("/predict", files=files(content.replace(scan, 200 * scan)))
    assert response.json()["predictions"][0]["error"] == "is a JPEG of more than 100 scans"


def test_images_that_take_too_long_are_refused(predictor: Predictor, images: list[Path]) -> None:
    picture = io.BytesIO()
    Image.open(images[0]).resize((64, 64)).save(picture, "JPEG", progressive=True)
    content = picture.getvalue()
    last = content.rindex(b"\xff\xda")
    scans = content[:-2] + 30 * content[last:-2] + content[-2:]
    app = create_app(predictor, Limits(max_pixels=64 * 64, timeout=PATIENCE))
    with TestClient(app) as client:
        assert client.post("/predict", files=files(content)).status_code == 200
        answer = client.post("/predict", files=files(scans)).json()["predictions"][0]
        assert answer["error"] == (
            "takes too long to decode (64 x 64 pixels in 40 scans of a JPEG): make it smaller"
        )
        assert "take too long to decode together" in problem(
            client.post("/predict", files=files(*[content] * 3)), 413
        )
        assert "(64 x 64 pixels in 40 scans" in problem(client.post("/explain", files=files(scans)), 422)
        assert client.post("/predict", files=files(scans, images[0])).status_code == 200


def test_formats_for_strangers_are_chosen(
    client: TestClient, predictor: Predictor, images: list[Path]
) -> None:
    picture = io.BytesIO()
    Image.open(images[0]).save(picture, "TIFF")
    (refused,) = client.post("/predict", files=files(picture.getvalue())).json()["predictions"]
    assert refused["error"].startswith("is a TIFF image, which is not accepted: send JPEG or PNG")
    with TestClient(create_app(predictor, Limits(formats=("TIFF",)))) as allowing:
        assert allowing.post("/predict", files=files(picture.getvalue())).status_code == 200
    with pytest.raises(UsageError, match="unknown format 'TIF'"):
        Limits(formats=("TIF",))


def test_one_client_leaves_room_for_others(
    predictor: Predictor, images: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    app = create_app(predictor, Limits(queue=40, timeout=PATIENCE))
    began, gate = held(app, monkeypatch)
    with TestClient(app, client=("10.0.0.1", 1)) as greedy:
        other = TestClient(app, client=("10.0.0.2", 1))
        answers: list[int] = []

        def ask(client: TestClient) -> None:
            answers.append(client.post("/predict", files=files(*[images[0]] * 20)).status_code)

        threads = [threading.Thread(target=ask, args=(greedy,))]
        threads[0].start()
        assert began.wait(PATIENCE)
        assert "queue is full" in problem(greedy.post("/predict", files=files(*[images[0]] * 20)), 429)
        threads.append(threading.Thread(target=ask, args=(other,)))
        threads[1].start()
        gate.set()
        for thread in threads:
            thread.join(PATIENCE)
        assert answers == [200, 200]


def test_a_network_of_ipv6_is_one_client() -> None:
    assert network_of("2001:db8::1") == network_of("2001:db8::ffff:2") != network_of("2001:db8:0:1::1")
    assert network_of("10.0.0.1") != network_of("10.0.0.2")
    assert network_of("fe80::1%eth0") == "fe80::"
    assert network_of("::ffff:10.0.0.1") == "10.0.0.1"
    assert network_of("testclient") == "testclient"


def test_names_are_shown_without_folders_on_one_line(client: TestClient, images: list[Path]) -> None:
    content = images[0].read_bytes()
    for given, shown in (
        ("../../etc/wren.jpg", "wren.jpg"),
        ("C:\\birds\\wren.jpg", "wren.jpg"),
        ("ö.jpg", "ö.jpg"),
    ):
        response = client.post("/predict", files=[("images", (given, content))])
        assert response.json()["predictions"][0]["name"] == shown


PART = b'--y\r\nContent-Disposition: form-data; name="images"; filename="x"\r\n\r\nx\r\n--y--\r\n'
FORM = {"content-type": "multipart/form-data; boundary=y"}
JSON = {"content-type": "application/json"}


@pytest.mark.parametrize(
    ("request_", "status", "detail"),
    [
        ({"content": b"{", "headers": {"content-type": "application/json"}}, 400, "Invalid JSON"),
        ({"json": {"images": "x"}}, 422, "images: Input should be a valid "),
        ({"json": {"images": []}}, 422, "there is no image"),
        ({"json": {"image": ["x"]}}, 422, "images: Field required"),
        ({"json": {"images": ["x"], "top": 0}}, 422, "top: Input should be greater than"),
        ({"json": {"images": ["x"] * 33}}, 413, "at most 32 images, not 33"),
        ({"files": [("images", ("x", b""))] * 33}, 413, "Too many files"),
        ({"files": [("image", ("x", b"x"))]}, 422, "there is no image: send files in the field `images`."),
        ({"data": {"images": "x"}, "files": [("other", ("x", b""))]}, 422, "`images` must be files"),
        ({"content": b"x", "headers": {"content-type": "multipart/form-data"}}, 400, "Missing boundary"),
        ({"content": b"x", "headers": {"content-type": "multipart/form-data; boundary=y"}}, 400, "multipart"),
        *(({"content": PART, "headers": {"content-type": f"multipart/form-data; {rest}".encode("latin-1")}},
           400, detail) for rest, detail in [
              ("boundary=y; charset=undefined", "charset of multipart/form-data must be utf-8"),
              ("boundary=y; charset=hex", "charset"), ("boundary=y; charset=idna", "charset"),
              ("boundary=y; charset=utf-16", "charset"), ("boundary=y; charset=\0", "charset"),
              (f"boundary={'y' * 300}", "multipart"), ("boundary=", "multipart"), ("boundary", "multipart"),
              ("boundary=\xe9", "multipart"), ("charset=utf-8", "Missing boundary"),
          ]),
        ({"content": PART.replace(b'name="images"; ', b""), "headers": FORM}, 400, '"name" must be provided'),
        *(({"content": PART.replace(b"\r\n\r\n", b"\r\n" + more + b"\r\n", 1), "headers": FORM},
           400, "multipart")
          for more in (b"X: " + 9000 * b"a" + b"\r\n", 20 * b"X: a\r\n", b"no colon\r\n", b": x\r\n", b"\0\r\n")),
        ({"content": PART, "headers": FORM | {"content-encoding": "gzip"}}, 415, "must not be compressed"),
        ({"content": b"", "headers": {"content-type": "image/jpeg"}}, 422, "there is no image"),
        ({"content": b'{"images": ' + 9999 * b"[", "headers": JSON}, 400, "JSON"),
        ({"content": b'{"images": ["x"], "top": NaN}', "headers": JSON}, 422, "top: "),
        ({"content": b'{"images": ["x"], "top": 1e999}', "headers": JSON}, 422, "top: "),
        ({"content": b'{"images": ["x"], "top": ' + 5000 * b"9" + b"}", "headers": JSON}, 400, "JSON"),
        ({"content": b'{"images": ["\\ud800"]}', "headers": JSON}, 400, "JSON"),
        ({"content": b"\xff\xfe{}", "headers": JSON}, 400, "JSON"),
        ({"content": b"x", "headers": {"content-type": "text/plain"}}, 415, "multipart/form-data or"),
        ({"content": b"x"}, 415, "multipart/form-data or application/json"),
        ({"content": bytes(1_000_001), "headers": {"content-type": "application/json"}}, 413, "than 1 MB"),
        ({"files": [("images", ("x", bytes(1_000_000)))]}, 413, "larger than 1 MB"),
        ({"params": {"top": "many"}, "json": {"images": ["x"]}}, 422, "query.top: Input should be"),
    ],
)  # fmt: skip
def test_wrong_bodies_are_told_on_one_line(
    client: TestClient, request_: dict[str, Any], status: int, detail: str
) -> None:
    assert detail in problem(client.post("/predict", **request_), status)


def test_a_body_without_a_length_is_bounded_too(client: TestClient, app: FastAPI) -> None:
    sent = 0

    def endless() -> Iterator[bytes]:
        nonlocal sent
        yield b'--y\r\nContent-Disposition: form-data; name="images"; filename="x"\r\n\r\n'
        while sent < 3_000_000:
            sent += 100_000
            yield bytes(100_000)

    response = client.post(
        "/predict", content=endless(), headers={"content-type": "multipart/form-data; boundary=y"}
    )
    assert "larger than 1 MB" in problem(response, 413)
    assert app.state.service._bodies._bytes.held == 0


def test_unknown_paths_and_methods(client: TestClient) -> None:
    assert problem(client.get("/nothing"), 404) == "Not Found"
    response = client.get("/predict")
    assert problem(response, 405) == "Method Not Allowed"
    assert response.headers["allow"] == "POST"


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


def test_every_response_names_the_model(
    app: FastAPI,
    client: TestClient,
    predictor: Predictor,
    images: list[Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as broken:
        broken.setattr(app.state.service._predictor, "answer", lambda *_: 1 / 0)
        failed = client.post("/predict", files=files(images[0]))
    responses = [
        client.post("/predict", files=files(images[0])), client.post("/explain", files=files(images[0])),
        *map(client.get, ("/model", "/healthz", "/readyz", "/metrics", "/", "/docs", "/openapi.json", "/page/page.js")),
        client.get("/nothing"), client.get("/predict"), client.request("BREW", "/"),
        client.post("/predict", content=b"{"), client.post("/predict", files=files(NOT_AN_IMAGE)),
        client.post("/predict", content=b"?" * 1_000_001, headers={"Content-Type": "application/json"}), failed,
    ]  # fmt: skip
    assert {200, 404, 405, 413, 415, 422, 500} == {response.status_code for response in responses}
    expected = {
        "x-model-name": "served", "x-model-version": "7c0ffee", "x-model-checksum": checksum_of(predictor),
    }  # fmt: skip
    for response in responses:
        assert response.headers.items() >= expected.items()
    name = f'crossx_model_info{{checksum="{checksum_of(predictor)}",name="served",version="7c0ffee"}}'
    assert samples(client)[name] == 1


def test_refused_requests_name_the_model_too(predictor: Predictor) -> None:
    identity = Identity("Bläßhuhn 100%\n", "v1 (rc/2)", None)
    app = create_app(predictor, api_keys=["k"], cors=["https://birds.example"], identity=identity)
    with TestClient(app) as client:
        app.state.service.draining = True
        origin = {"Origin": "https://birds.example", "Access-Control-Request-Method": "POST"}
        responses = [
            client.post("/predict"), client.options("/predict", headers=origin), client.get("/readyz"),
            client.post("/predict", headers={"X-API-Key": "k"} | origin),
        ]  # fmt: skip
        assert [response.status_code for response in responses] == [401, 200, 503, 503]
        for response in responses:
            assert unquote(response.headers["x-model-name"]) == identity.name
            assert response.headers["x-model-name"].isascii()
            assert response.headers["x-model-version"] == "v1%20(rc/2)"
            assert "x-model-checksum" not in response.headers
        assert "X-Model-Checksum" in responses[-1].headers["access-control-expose-headers"]


def test_a_failure_of_the_network_is_500_and_passes(
    app: FastAPI, client: TestClient, images: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as broken:
        broken.setattr(app.state.service._predictor, "answer", lambda *_: 1 / 0)
        told = problem(client.post("/predict", files=files(images[0])), 500)
    assert told == "internal error; see the service's log."
    assert client.post("/predict", files=files(images[0])).status_code == 200


def samples(client: TestClient) -> dict[str, float]:
    """Return the value of every series."""
    lines = client.get("/metrics").text.splitlines()
    return {
        name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[:1] not in "#")
    }


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

    invent(["FIRST"])
    before = series()
    assert 'crossx_requests_total{method="other",route="/predict",status="405"}' in before
    invent([*(f"X{number}" for number in range(40)), "X" * 5000, "%00", "GET "])
    assert series() == before


def held(app: FastAPI, monkeypatch: pytest.MonkeyPatch) -> tuple[threading.Event, threading.Event]:
    """Make the network wait; return what says that it began, and what lets it go on."""
    began, gate = threading.Event(), threading.Event()
    answer = app.state.service._predictor.answer

    def waiting(*arguments: Any) -> Any:
        began.set()
        assert gate.wait(PATIENCE)
        return answer(*arguments)

    monkeypatch.setattr(app.state.service._predictor, "answer", waiting)
    return began, gate


def test_a_full_queue_is_429_at_once(
    predictor: Predictor, images: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    app = create_app(predictor, Limits(queue=2, timeout=PATIENCE))
    began, gate = held(app, monkeypatch)
    with TestClient(app) as client:
        answers: list[httpx.Response] = []
        first = threading.Thread(
            target=lambda: answers.append(client.post("/predict", files=files(*images[:2])))
        )
        first.start()
        assert began.wait(PATIENCE)
        for path in ("/predict", "/explain"):
            response = client.post(path, files=files(images[0]))
            assert "queue is full" in problem(response, 429)
            assert int(response.headers["retry-after"]) >= 1
        assert client.get("/readyz").status_code == 200
        gate.set()
        first.join(PATIENCE)
        assert answers[0].status_code == 200
        assert client.post("/predict", files=files(images[0])).status_code == 200


def test_an_answer_that_takes_too_long_is_504(
    predictor: Predictor, images: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    app = create_app(predictor, Limits(timeout=1))
    _, gate = held(app, monkeypatch)
    with TestClient(app) as client:
        assert "longer than 1 s" in problem(client.post("/predict", files=files(images[0])), 504)
        gate.set()
        # a busy machine may take longer for the next ones, too
        deadline = time.monotonic() + PATIENCE
        while client.post("/predict", files=files(images[0])).status_code != 200:
            assert time.monotonic() < deadline


def test_a_stopping_service_takes_nothing(predictor: Predictor, images: list[Path]) -> None:
    app = create_app(predictor)
    with TestClient(app) as client:
        app.state.service.draining = True
        assert client.get("/readyz").status_code == 503
        assert client.get("/healthz").json() == {"status": "ok"}
        assert "stopping" in problem(client.post("/predict", files=files(images[0])), 503)
    assert not app.state.service.alive


def test_keys_are_asked_for_before_the_body(predictor: Predictor, images: list[Path]) -> None:
    with TestClient(create_app(predictor, api_keys=("first", "second"))) as client:
        for headers in ({}, {"X-API-Key": "firs"}, {"X-API-Key": "schön".encode()}):
            response = client.post("/predict", content=b"?", headers=headers)
            assert "X-API-Key is missing or wrong" in problem(response, 401)
        for key in ("first", "second"):
            response = client.post("/predict", files=files(images[0]), headers={"X-API-Key": key})
            assert response.status_code == 200
        assert client.get("/healthz").status_code == client.get("/metrics").status_code == 200
        assert client.get("/model").status_code == client.post("/explain").status_code == 401
        assert "APIKeyHeader" in client.get("/openapi.json").json()["components"]["securitySchemes"]


def test_pages_of_other_origins_are_off_by_default(client: TestClient, predictor: Predictor) -> None:
    origin = {"Origin": "https://birds.example"}
    assert "access-control-allow-origin" not in client.get("/healthz", headers=origin).headers
    with TestClient(create_app(predictor, cors=["https://birds.example"])) as allowing:
        response = allowing.post("/predict", headers=origin)
        assert response.headers["access-control-allow-origin"] == "https://birds.example"
        other = allowing.get("/healthz", headers={"Origin": "https://other.example"})
        assert "access-control-allow-origin" not in other.headers


def test_the_documentation_needs_no_other_host(client: TestClient) -> None:
    page = client.get("/docs").text
    assert "//" not in "".join(re.findall(r'(?:src|href)="([^"]+)"', page))
    for link in re.findall(r'(?:src|href)="([^"]+)"', page):
        assert client.get(link).status_code == 200
    described = client.get("/openapi.json").json()
    assert set(described["paths"]) == {"/predict", "/explain", "/model", "/healthz", "/readyz", "/metrics"}
    assert set(described["paths"]["/predict"]["post"]["requestBody"]["content"]) == {
        "multipart/form-data", "application/json", "image/*", "application/octet-stream",
    }  # fmt: skip


def test_the_model_is_described(client: TestClient, predictor: Predictor) -> None:
    content = client.get("/model").json()
    assert content["classes"] == list(predictor.classes)
    assert content["display_names"] == list(predictor.spec.display_names)
    assert content["explains"] is True
    assert content["temperature"] == predictor.spec.temperature
    assert (content["model"]["version"], content["model"]["checksum"]) == ("7c0ffee", checksum_of(predictor))
    assert (content["max_images"], content["max_upload_mb"], content["max_pixels"]) == (32, 1, 5000)


def test_explanations_as_a_figure(client: TestClient, images: list[Path]) -> None:
    response = client.post("/explain", files=files(images[0]))
    assert response.status_code == 200
    assert response.headers["content-type"] == "image/png"
    figure = Image.open(io.BytesIO(response.content))
    assert figure.width > 4 * figure.height > 400


def test_explanations_as_layers(client: TestClient, predictor: Predictor, images: list[Path]) -> None:
    content = client.post("/explain?format=json", json={"images": encoded(images[0])}).json()
    (expected,) = predictor.iter_explain(images[0])
    assert expected.pixels is not None
    assert expected.explanation is not None
    image = picture(content["image"])
    assert np.array_equal(image, expected.pixels)
    assert content["size"] == 64
    assert content["boxes"] is None
    (prediction,) = client.post("/predict", files=files(images[0])).json()["predictions"]
    assert content["prediction"]["label"] == prediction["label"] == content["target"]
    assert content["prediction"]["probability"] == pytest.approx(prediction["probability"], abs=1e-5)
    assert len(content["prediction"]["top"]) == 3
    names = [f"{one['stage']} part {one['part']}" for one in content["overlays"]]
    assert names == list(expected.explanation.maps)
    for one, map_ in zip(content["overlays"], expected.explanation.maps.values(), strict=True):
        shown = picture(one["png"]).astype(float)
        assert shown.shape == (64, 64, 4)
        alpha = shown[..., 3:] / 255
        grey = (image @ np.array(LUMA))[..., None]
        laid = alpha * shown[..., :3] + (1 - alpha) * grey
        assert np.abs(laid - overlay(image, map_)).max() <= 2


def test_the_boxes_of_a_network_that_has_them_are_told(tmp_path: Path, images: list[Path]) -> None:
    network = Predictor.load(write_run(tmp_path, method="nts"), device="cpu")
    (expected,) = network.iter_explain(images[0])
    assert expected.explanation is not None
    assert expected.explanation.boxes is not None
    with TestClient(create_app(network)) as client:
        content = client.post("/explain?format=json", files=files(images[0])).json()
    assert np.array_equal(np.array(content["boxes"], np.float32), expected.explanation.boxes)


def test_an_exported_file_is_served_without_explanations(
    predictor: Predictor, images: list[Path], tmp_path: Path
) -> None:
    assert predictor.origin is not None
    file = export_run(predictor.origin[0].path, tmp_path / "x.safetensors", images=images[0].parent).files[0]
    with TestClient(create_app(Predictor.load(file))) as client:
        described = client.get("/model").json()
        assert described["explains"] is False
        checksum = hashlib.sha256(file.read_bytes()).hexdigest()
        assert described["model"]["name"] == "x.safetensors"
        assert (described["model"]["version"], described["model"]["checksum"]) == (checksum[:12], checksum)
        assert client.post("/predict", files=files(images[0])).status_code == 200
        for query in ("", "?format=json", "?maps=class&target=wren"):
            response = client.post(f"/explain{query}", files=files(images[0]))
            assert "only predicts" in problem(response, 501)


def test_an_image_that_the_cut_leaves_nothing_of_is_unreadable(
    predictor: Predictor, images: list[Path]
) -> None:
    cut = replace(predictor.spec.preprocessing, crop_bottom=1000)
    network = Predictor.from_method(predictor.method, replace(predictor.spec, preprocessing=cut), "cpu")
    app = create_app(network)
    app.state.service.warm_up()
    with TestClient(app) as client:
        response = client.post("/predict", files=files(images[0]))
        assert response.status_code == 422
        assert "rows high" in response.json()["predictions"][0]["error"]
        assert "the image is " in problem(client.post("/explain", files=files(images[0])), 422)


def test_explanations_of_a_class(client: TestClient, images: list[Path]) -> None:
    response = client.post("/explain?format=json&maps=class&target=wren", files=files(images[0]))
    content = response.json()
    assert content["target"] == "wren"
    assert all(one["stage"].startswith("CAM ") for one in content["overlays"])


@pytest.mark.parametrize(
    ("query", "contents", "status", "detail"),
    [
        ("", [NOT_AN_IMAGE], 422, "the image is not a JPEG"),
        ("", [png_of(100, 100)], 422, "the image has 100 x 100 pixels"),
        ("", [NOT_AN_IMAGE, NOT_AN_IMAGE], 413, "Too many files"),
        ("maps=class&target=wrren", [NOT_AN_IMAGE], 422, "unknown class 'wrren'. Did you mean 'wren'?"),
        ("target=wren", [NOT_AN_IMAGE], 422, "`target` requires maps=class."),
        ("maps=both", [NOT_AN_IMAGE], 422, "query.maps: Input should be 'activation' or 'class'."),
        ("format=gif", [NOT_AN_IMAGE], 422, "query.format: Input should be 'png' or 'json'."),
    ],
)
def test_wrong_explanations(
    client: TestClient, query: str, contents: list[bytes], status: int, detail: str
) -> None:
    assert detail in problem(client.post(f"/explain?{query}", files=files(*contents)), status)


@pytest.mark.parametrize("limit", ["max_batch", "queue", "max_upload_mb", "max_pixels", "timeout", "workers"])
def test_limits_must_be_positive(limit: str) -> None:
    with pytest.raises(UsageError, match=f"{limit} must be at least 1, not 0"):
        Limits(**{limit: 0})


def test_json_is_valid_in_every_answer(client: TestClient, images: list[Path]) -> None:
    for response in (client.post("/predict", files=files(images[0])), client.get("/model")):
        json.loads(response.content, parse_constant=lambda name: pytest.fail(name))
