"""Requests to the HTTP application, and what is expected of its responses."""

import base64
import hashlib
import threading
import zlib
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from crossx.predict.predictor import Predictor

NOT_AN_IMAGE = b"no image at all"
PATIENCE = 600
"""Seconds after which something hangs."""


def checksum_of(predictor: Predictor) -> str:
    assert predictor.origin is not None
    return hashlib.sha256(predictor.origin[1].read_bytes()).hexdigest()


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


def png_of(width: int, height: int) -> bytes:
    """A PNG whose header promises this size, and no pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + b"\x08\x02\0\0\0"
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


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


def samples(client: TestClient) -> dict[str, float]:
    """Return the value of every series."""
    lines = client.get("/metrics").text.splitlines()
    return {
        name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[:1] not in "#")
    }
