"""What the service tells of itself: a request id and a line of log for each request, and metrics."""

from __future__ import annotations

import logging
import re
import time
import uuid
from collections.abc import Callable

from fastapi.responses import JSONResponse
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from crossx.serve.schemas import Problem

log = logging.getLogger("crossx.serve")

CLIENT_GONE = 499
"""The status, in logs and metrics alone, of a request whose client went before the answer, as nginx calls it."""
_QUIET = ("/healthz", "/readyz", "/metrics")
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


class Metrics:
    """The service's metrics, in a registry of their own.

    Args:
        queued: Tells the number of images accepted and not answered.
    """

    def __init__(self, queued: Callable[[], float]) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.requests = Counter(
            "crossx_requests", "Requests answered", ["route", "method", "status"], registry=self.registry
        )
        self.seconds = Histogram(
            "crossx_request_seconds", "From a request's head to its answer", ["route"], registry=self.registry
        )
        self.images = Counter("crossx_images", "Images answered", ["outcome"], registry=self.registry)
        self.batch_images = Histogram(
            "crossx_batch_images", "Images a step of the network", buckets=(1, 2, 4, 8, 16, 32, 64),
            registry=self.registry,
        )  # fmt: skip
        self.batch_seconds = Histogram(
            "crossx_batch_seconds", "Seconds a step of the network", registry=self.registry
        )
        queue = Gauge("crossx_queue_images", "Images accepted and not answered", registry=self.registry)
        queue.set_function(queued)

    def observe_batch(self, size: int, seconds: float) -> None:
        """Count one step of the network."""
        self.batch_images.observe(size)
        self.batch_seconds.observe(seconds)


class RequestMonitor:
    """Middleware around all: gives each request its id, logs and counts it, and answers for what nobody caught.

    A client's own ``X-Request-ID`` is taken over where it is 1 to 64 letters, digits, dots, hyphens or underscores.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        status, start = 0, time.perf_counter()

        async def send_marked(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["X-Request-ID"] = request_id
                headers["X-Content-Type-Options"] = "nosniff"
            await send(message)

        try:
            await self._app(scope, receive, send_marked)
        except Exception:
            log.exception("the request failed", extra={"request_id": request_id})
            if not status:
                await problem(request_id, 500, "internal error; the service's log says more.")(
                    scope, receive, send_marked
                )
        finally:
            self._record(scope, request_id, status or CLIENT_GONE, time.perf_counter() - start)

    def _record(self, scope: Scope, request_id: str, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "other")
        self._metrics.requests.labels(route, scope["method"] if route != "other" else "any", status).inc()
        self._metrics.seconds.labels(route).observe(seconds)
        log.log(
            logging.DEBUG if route in _QUIET else logging.INFO,
            "request",
            extra={
                "request_id": request_id,
                "client": scope["client"][0] if scope.get("client") else None,
                "method": scope["method"],
                "path": scope["path"],
                "status": status,
                "images": scope["state"].get("images"),
                "seconds": round(seconds, 4),
            },
        )


def problem(request_id: str, status: int, detail: str, headers: dict[str, str] | None = None) -> JSONResponse:
    """Return the answer to a request that failed."""
    return JSONResponse(Problem(detail=detail, request_id=request_id).model_dump(), status, headers)
