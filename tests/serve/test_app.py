"""The HTTP application, called without a network; a real process is tested in test_server.py."""

import json
import re
import threading
import time
from dataclasses import replace
from importlib import resources
from pathlib import Path
from urllib.parse import unquote

import httpx2 as httpx
import pytest

from layouts import FOLDERS

pytest.importorskip("fastapi", reason="needs crossx[serve]")

from fastapi import FastAPI
from fastapi.testclient import TestClient
from requests_to_app import (
    NOT_AN_IMAGE,
    PATIENCE,
    checksum_of,
    encoded,
    files,
    held,
    problem,
    samples,
)

from crossx.data.catalog import OWN_DATA
from crossx.errors import UsageError
from crossx.predict.identity import Identity
from crossx.predict.predictor import Predictor
from crossx.serve.app import create_app
from crossx.serve.limits import Limits


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


def test_the_page_knows_the_formats_of_own_images() -> None:
    script = (resources.files("crossx.serve") / "page" / "page.js").read_text(encoding="utf-8")
    assert f"[{', '.join(json.dumps(name) for name in OWN_DATA)}].includes(model.dataset)" in script


def test_unknown_paths_and_methods(client: TestClient) -> None:
    assert problem(client.get("/nothing"), 404) == "there is no path /nothing: /docs lists the requests."
    assert "no path /page/nothing.js" in problem(client.get("/page/nothing.js"), 404)
    assert problem(client.post("/"), 405) == "/ does not take POST, only GET, HEAD."
    assert problem(client.put("/page/page.js"), 405) == "/page/page.js does not take PUT, only GET, HEAD."
    response = client.get("/predict")
    assert problem(response, 405) == "/predict does not take GET, only POST."
    assert response.headers["allow"] == "POST"


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


@pytest.mark.parametrize(
    ("method", "path", "detail"),
    [
        ("POST", "/predict?tops=3", "query.tops: not known here, /predict takes top, coverage."),
        ("POST", "/predict?top=3&flip=", "query.flip: not known here, /predict takes top, coverage."),
        ("POST", "/explain?top=3", "query.top: not known here, /explain takes maps, target, format."),
        ("GET", "/model?top=3", "query.top: not known here, /model takes none."),
        ("GET", "/metrics?%0A=", "query.?: not known here, /metrics takes none."),
        ("GET", "/healthz?x", "query.x: not known here, /healthz takes none."),
        ("GET", "/readyz?x", "query.x: not known here, /readyz takes none."),
    ],
)
def test_an_unknown_query_is_refused(
    client: TestClient, images: list[Path], method: str, path: str, detail: str
) -> None:
    sent = {"files": files(images[0])} if method == "POST" else {}
    assert problem(client.request(method, path, **sent), 422) == detail


def test_pages_take_any_query(client: TestClient) -> None:
    for path in ("/", "/docs", "/page/page.js", "/openapi.json"):
        assert client.get(f"{path}?source=mail").content == client.get(path).content


def test_every_endpoint_describes_its_problems(client: TestClient) -> None:
    for path, operations in client.get("/openapi.json").json()["paths"].items():
        for operation in operations.values():
            assert "Problem" in str(operation["responses"]["422"]), path


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


@pytest.mark.parametrize("limit", ["max_batch", "queue", "max_upload_mb", "max_pixels", "timeout", "workers"])
def test_limits_must_be_positive(limit: str) -> None:
    with pytest.raises(UsageError, match=f"{limit} must be at least 1, not 0"):
        Limits(**{limit: 0})


def test_json_is_valid_in_every_answer(client: TestClient, images: list[Path]) -> None:
    for response in (client.post("/predict", files=files(images[0])), client.get("/model")):
        json.loads(response.content, parse_constant=lambda name: pytest.fail(name))
