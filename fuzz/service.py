"""Ask the application of the service in this process, without a server."""

from __future__ import annotations

import asyncio
import functools
import json
import logging
import os
import re
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from crossx.serve.limits import Limits

EXPECTED = {200, 400, 403, 404, 405, 408, 413, 415, 422, 501}
"""Not 429, 503 and 504: requests come one after another, so one of these would mean that something is not given back."""
_HEADER = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([\x20-\x7e\x80-\xff\t]*?)[ \t]*\r?")


def ask(run: Path, request: bytes) -> None:
    """Send a request, and check the response.

    A request is a line ``POST /predict?top=2``, headers, an empty line and the body. What a server would refuse itself
    (h11: malformed lines and headers, wrong lengths) is left out.

    Args:
        run: The run folder that is served.
        request: The request.

    Raises:
        AssertionError: If the status is unexpected, the response malformed, or asyncio reports an exception.
    """
    status, headers, body = _service(run, os.getpid())(request)
    assert status in EXPECTED, f"status {status}: {body[:300]!r}"
    if headers[b"content-type"] == b"application/json":
        answer = json.loads(body)
        if "detail" in answer:
            assert len(answer["detail"].splitlines()) == 1, answer
    else:
        assert headers[b"content-type"].startswith((b"image/png", b"text/", b"image/svg")), headers


@functools.lru_cache(1)
def _service(run: Path, process: int) -> Callable[[bytes], tuple[int, dict[bytes, bytes], bytes]]:
    """Start the application once per process: its threads do not survive a fork."""
    from crossx.predict.predictor import Predictor
    from crossx.serve.app import create_app

    for name in ("crossx.serve", "python_multipart", "asyncio"):
        logging.getLogger(name).disabled = True
    limits = Limits(max_upload_mb=1, max_pixels=1_000_000, max_wait_ms=0, workers=1, timeout=50)
    app: Any = create_app(Predictor.load(run, device="cpu"), limits)
    loop = asyncio.new_event_loop()
    reported: list[str] = []
    loop.set_exception_handler(
        lambda _, context: reported.append(f"{context['message']} {context.get('exception')!r}")
    )

    def answer(request: bytes) -> tuple[int, dict[bytes, bytes], bytes]:
        sent: list[dict[str, Any]] = []
        scope, body = _parsed(request)
        loop.run_until_complete(app(scope, _receiver(body), _sender(sent)))
        assert not reported, reported.pop()
        start, *rest = sent
        return start["status"], dict(start["headers"]), b"".join(part.get("body", b"") for part in rest)

    return answer


def _parsed(request: bytes) -> tuple[dict[str, Any], bytes]:
    head, _, body = request.partition(b"\n\n")
    line, *lines = head.split(b"\n")
    method, _, target = line.partition(b" ")
    target = re.sub(rb"[^\x21-\x7e]", b"", target) or b"/"
    path, _, query = target.partition(b"?")
    found = [_HEADER.fullmatch(line) for line in lines]
    headers = [(match[1].lower(), match[2]) for match in found if match]
    headers = [pair for pair in headers if pair[0] not in (b"content-length", b"transfer-encoding", b"host")]
    return {
        "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1",
        "method": method.decode("ascii") if re.fullmatch(rb"[A-Z]{1,20}", method) else "POST",
        "scheme": "http", "path": unquote(path.decode("ascii")), "raw_path": path, "query_string": query, "root_path": "",
        "headers": [(b"host", b"localhost"), (b"content-length", b"%d" % len(body)), *headers],
        "client": ("127.0.0.1", 5000), "server": ("127.0.0.1", 8000), "state": {},
    }, body  # fmt: skip


def _receiver(body: bytes) -> Callable[[], Awaitable[dict[str, Any]]]:
    # two pieces, cut at a place that the content chooses
    cut = sum(body[:100]) % (len(body) + 1)
    parts = [body[:cut], body[cut:]]
    end = time.monotonic() + 3600

    async def receive() -> dict[str, Any]:
        if parts:
            return {"type": "http.request", "body": parts.pop(0), "more_body": bool(parts)}
        await asyncio.sleep(end - time.monotonic())
        return {"type": "http.disconnect"}

    return receive


def _sender(sent: list[dict[str, Any]]) -> Callable[[dict[str, Any]], Awaitable[None]]:
    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    return send
