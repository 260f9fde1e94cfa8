"""Protection from other web pages; that browsers obey is tested in test_serve_page_in_browser.py."""

import base64
import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from layouts import write_run

pytest.importorskip("fastapi", reason="needs crossx[serve]")

from fastapi import FastAPI
from fastapi.testclient import TestClient

from crossx.predict.predictor import Predictor
from crossx.serve.app import create_app
from crossx.serve.browsers import allowed_hosts, host_name


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> FastAPI:
    predictor = Predictor.load(write_run(tmp_path_factory.mktemp("run")), device="cpu")
    return create_app(
        predictor, allowed_hosts=["birds.example", "[2001:db8::1]"], cors=["https://other.example"]
    )


@pytest.fixture(scope="module")
def client(app: FastAPI) -> Iterator[TestClient]:
    with TestClient(app, base_url="http://birds.example") as client:
        yield client


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("birds.example", 200), ("BIRDS.example:8000", 200), ("birds.example.", 200), ("localhost:1", 200),
        ("127.0.0.1:8000", 200), ("127.9.9.9", 200), ("[::1]:8000", 200), ("[2001:db8::1]", 200),
        ("x.localhost", 200), ("evil.example", 400), ("birds.example.evil.example", 400), ("", 400),
        ("xbirds.example", 400), ("127.0.0.1.evil.example", 400), ("birds.example@evil.example", 400),
        ("[::1", 400), ("10.0.0.1", 400), ("localhost.evil.example", 400), ("a b", 400), ("*", 400),
    ],
)  # fmt: skip
def test_only_own_names_are_served(client: TestClient, host: str, status: int) -> None:
    response = client.get("/model", headers={"Host": host})
    assert response.status_code == status
    for path in ("/healthz", "/readyz", "/metrics"):
        assert client.get(path, headers={"Host": host}).status_code == 200
    if status == 400:
        assert set(response.json()) == {"detail", "request_id"}
        assert client.get("/", headers={"Host": host}).status_code == 400


def test_any_name_is_served_by_default_except_on_loopback() -> None:
    assert allowed_hosts((), "0.0.0.0", "0.0.0.0") == ["*"]
    assert allowed_hosts((), "127.0.0.1", "127.0.0.1") == ["127.0.0.1"]
    assert allowed_hosts((), "box.example", "127.0.1.1") == ["box.example"]
    assert allowed_hosts(("a",), "0.0.0.0", "0.0.0.0") == ("a",)
    assert host_name("[::1]:80") == "::1"


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 415),  # the body is what is wrong
        ({"Origin": "http://birds.example"}, 415),
        ({"Origin": "https://other.example"}, 415),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Sec-Fetch-Site": "same-origin", "Origin": "https://behind.a.proxy"}, 415),
        ({"Sec-Fetch-Site": "none"}, 415),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Sec-Fetch-Site": "cross-site", "Origin": "https://other.example"}, 415),
    ],
)
def test_forms_of_other_sites_cost_nothing(client: TestClient, headers: dict[str, str], status: int) -> None:
    for path in ("/predict", "/explain"):
        assert client.post(path, content=b"x", headers=headers).status_code == status
    assert client.get("/model", headers=headers).status_code == 200


def test_every_response_has_a_policy(
    app: FastAPI, client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app.state.service._predictor, "_spec", None, raising=False)
    responses = [
        client.get(path) for path in ("/", "/page/page.js", "/docs", "/openapi.json", "/model", "/x")
    ]
    responses += [client.post("/predict"), client.get("/model", headers={"Host": "evil.example"})]
    responses += [client.head(path) for path in ("/", "/docs", "/healthz", "/readyz")]
    assert [response.status_code for response in responses] == [*[200] * 5, 404, 415, 400, *[200] * 4]
    for response in responses:
        policy = response.headers["content-security-policy"]
        assert "frame-ancestors 'none'" in policy
        assert "base-uri 'none'" in policy
        assert "unsafe" not in policy.replace("style-src 'self' 'unsafe-inline'", "")
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["referrer-policy"] == "no-referrer"
        assert response.headers["x-frame-options"] == "DENY"


def test_the_documentation_runs_only_its_own_script(client: TestClient) -> None:
    response = client.get("/docs")
    scripts = re.findall(r"<script>(.*?)</script>", response.text, re.DOTALL)
    assert len(scripts) == 1
    digest = base64.b64encode(hashlib.sha256(scripts[0].encode()).digest()).decode()
    assert f"script-src 'self' 'sha256-{digest}';" in response.headers["content-security-policy"]
    assert " onload=" not in response.text
    assert Path("swagger-ui-bundle.js").name in response.text
