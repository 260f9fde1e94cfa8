"""The page of the service as it is served; in a browser it is tested in test_serve_page_in_browser.py."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from layouts import write_run

pytest.importorskip("fastapi", reason="needs crossx[serve]")

from fastapi.testclient import TestClient

from crossx.predict.predictor import Predictor
from crossx.serve.app import PAGE, create_app

FILES = {
    "": "text/html", "page/page.css": "text/css", "page/page.js": "text/javascript",
    "page/service.js": "text/javascript", "page/icon.svg": "image/svg+xml",
}  # fmt: skip


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    run = write_run(tmp_path_factory.mktemp("run"))
    with TestClient(create_app(Predictor.load(run, device="cpu"))) as client:
        yield client


@pytest.mark.parametrize(("name", "kind"), FILES.items())
def test_files_come_with_headers_that_forbid_other_hosts(client: TestClient, name: str, kind: str) -> None:
    response = client.get(f"/{name}")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith(kind)
    rules = dict(rule.split(" ", 1) for rule in response.headers["content-security-policy"].split("; "))
    assert rules["default-src"] == "'self'"
    assert rules["img-src"] == "'self' data:"
    assert rules["frame-ancestors"] == rules["form-action"] == rules["base-uri"] == "'none'"
    assert not any("unsafe" in rule for rule in rules.values())
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["referrer-policy"] == "no-referrer"
    again = client.get(f"/{name}", headers={"If-None-Match": response.headers["etag"]})
    assert again.status_code == 304
    assert again.headers["cache-control"] == "no-cache"


def test_the_page_refers_to_its_own_files_and_the_documentation_alone(client: TestClient) -> None:
    page = client.get("/").text
    assert set(re.findall(r'(?:src|href)="([^"]+)"', page)) == {
        "page/page.css", "page/page.js", "page/icon.svg", "docs",
    }  # fmt: skip
    assert "style=" not in page
    assert "<style" not in page
    assert re.findall(r'^import .* from "\./(.*)";$', client.get("/page/page.js").text, re.M) == [
        "service.js"
    ]
    for name in ("page.css", "page.js", "service.js"):
        assert not re.search(r"https?://\w|@import|url\(", client.get(f"/page/{name}").text)
    assert client.get("/docs").status_code == 200


def test_it_is_small_and_nothing_else_is_served(client: TestClient) -> None:
    files = [path for path in PAGE.rglob("*") if path.is_file()]
    assert {path.name for path in files} == {Path(name).name or "index.html" for name in FILES}
    assert sum(path.stat().st_size for path in files) < 50_000
    for path in ("/nothing", "/page/nothing", "/page/../server.py", "/page/%2e%2e/server.py"):
        assert client.get(path).status_code == 404
    assert client.post("/", content=b"x").status_code == 405


def test_it_needs_no_key(tmp_path: Path) -> None:
    with TestClient(create_app(Predictor.load(write_run(tmp_path), device="cpu"), api_keys=["k"])) as client:
        assert all(client.get(f"/{name}").status_code == 200 for name in FILES)
        assert client.get("/model").status_code == 401
