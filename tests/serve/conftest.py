"""A served network, images, and Chromium with the page of the service; each once per file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from crossx.predict.predictor import Prediction, Predictor
from crossx.runs import write_json
from layouts import write_image, write_run

if TYPE_CHECKING:
    from fastapi import FastAPI
    from fastapi.testclient import TestClient
    from pages import Served


@pytest.fixture(scope="module")
def predictor(tmp_path_factory: pytest.TempPathFactory) -> Predictor:
    run = write_run(tmp_path_factory.mktemp("run") / "served")
    write_json(run / "run.json", {"id": "7c0ffee"})
    return Predictor.load(run, device="cpu")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("images")
    paths = [folder / f"{number}.jpg" for number in range(5)]
    for number, path in enumerate(paths):
        write_image(path, number % 3, number)
    return paths


@pytest.fixture(scope="module")
def app(predictor: Predictor) -> FastAPI:
    from requests_to_app import PATIENCE

    from crossx.serve.app import create_app
    from crossx.serve.limits import Limits

    return create_app(predictor, Limits(max_upload_mb=1, max_pixels=5000, timeout=PATIENCE))


@pytest.fixture(scope="module")
def client(app: FastAPI) -> Iterator[TestClient]:
    from fastapi.testclient import TestClient

    with TestClient(app, raise_server_exceptions=False) as client:
        yield client


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def served(run: Path) -> Iterator[Served]:
    from pages import serving

    from crossx.serve.app import create_app
    from crossx.serve.limits import Limits

    with serving(create_app(Predictor.load(run, device="cpu"), Limits(max_upload_mb=1))) as served:
        yield served


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("images") / "bird.png"
    write_image(path, 1, 0, size=(120, 90))
    return path


@pytest.fixture(scope="module")
def expected(run: Path, image: Path) -> Prediction:
    return Predictor.load(run, device="cpu").predict(image, top=5)[0]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from pages import CHROMIUM
    from playwright import sync_api

    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM,
            # as root there is no sandbox
            args=["--no-sandbox", "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"],
        )
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Any) -> Iterator[Callable[..., Any]]:
    """Opens a page; in the end no script has failed, and nothing was asked of another host."""
    from pages import MILLISECONDS, expect

    contexts, messages, requests = [], [], []
    expect.set_options(timeout=MILLISECONDS)

    def open_(served: Served, **options: Any) -> Any:
        context = browser.new_context(**options)
        context.set_default_timeout(MILLISECONDS)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: messages.append(message.text))
        page.on("pageerror", lambda error: messages.append(str(error)))
        page.on("request", lambda request: requests.append((served.url, request.url)))
        page.goto(served.url)
        return page

    yield open_
    for context in contexts:
        context.close()
    # Chromium itself writes of answers that are errors
    assert [message for message in messages if not message.startswith("Failed to load resource")] == []
    assert [asked for base, asked in requests if not asked.startswith((base, "data:"))] == []
