"""The page of the service in a browser: serving it, giving it pictures, and reading it."""

import base64
import contextlib
import io
import re
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import uvicorn
from fastapi import FastAPI
from PIL import Image
from playwright import sync_api

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
MILLISECONDS = 300_000
STAGES = ["previous", "last", "merged", "combined"]
MAPS = [f"{stage} part {part}" for stage in STAGES for part in (1, 2)]
GIVE = """([event, contents]) => {
  const data = new DataTransfer();
  for (const [name, type, base64] of contents) {
    const bytes = Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
    data.items.add(new File([bytes], name, { type }));
  }
  const init = { bubbles: true, cancelable: true };
  document.body.dispatchEvent(event === "paste"
    ? new ClipboardEvent("paste", { clipboardData: data, ...init })
    : new DragEvent("drop", { dataTransfer: data, ...init }));
}"""
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium or google-chrome on this machine")
expect = sync_api.expect


@dataclass
class Served:
    app: FastAPI
    url: str


@contextlib.contextmanager
def serving(app: FastAPI) -> Iterator[Served]:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=60))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield Served(app, f"http://127.0.0.1:{listening.getsockname()[1]}/")
        server.should_exit = True
        thread.join(600)


def give(page: Any, event: str, *files: Path | tuple[str, str, bytes]) -> None:
    """Paste or drop files."""
    contents = [
        (file.name, "image/png", file.read_bytes()) if isinstance(file, Path) else file for file in files
    ]
    page.evaluate(GIVE, [event, [[n, t, base64.b64encode(data).decode()] for n, t, data in contents]])


def wait_for_result(page: Any) -> None:
    expect(page.locator("#maps")).to_be_visible()
    expect(page.locator("body")).not_to_have_attribute("aria-busy", "true")


def top(page: Any) -> list[tuple[str, str]]:
    rows = page.locator("#top button").all()
    return [(row.locator(".label").inner_text(), row.locator(".number").inner_text()) for row in rows]


def percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def pixels(page: Any, selector: str) -> np.ndarray:
    """The pixels of a data: picture."""
    source = page.locator(selector).get_attribute("src")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(source.split(",", 1)[1]))))


def answer(page: Any, path: str, *answers: dict[str, Any] | None) -> list[str]:
    """Answer the requests to a path in turn, None being the service's own answer; return the list of them."""
    asked: list[str] = []

    def handle(route: Any) -> None:
        asked.append(route.request.url)
        given = answers[min(len(asked), len(answers)) - 1]
        if given is None:
            route.continue_()
        elif "abort" in given:
            route.abort(given["abort"])
        else:
            route.fulfill(**given)

    page.route(re.compile(rf"/{path}\b"), handle)
    return asked


BUSY = {"status": 429, "headers": {"Retry-After": "20"}, "json": {"detail": "the queue is full."}}
