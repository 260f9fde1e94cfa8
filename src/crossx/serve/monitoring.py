"""Access log, metrics and error responses.

Metrics use prometheus_client directly, since prometheus-fastapi-instrumentator labels requests with the method as it
was sent, so that each invented method would add a series.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from asgi_correlation_id import correlation_id
from fastapi.responses import JSONResponse
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from crossx.serve.schemas import Problem

log = logging.getLogger("crossx.serve")

CLIENT_CLOSED_REQUEST = 499
"""nginx's status, in logs and metrics, for a client that disconnected before the response."""
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
_UNLOGGED = ("/healthz", "/readyz", "/metrics")


class Metrics:
    """The service's Prometheus metrics, in their own registry.

    Args:
        queued: Returns the number of images accepted and not answered.
    """

    def __init__(self, queued: Callable[[], float]) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        labels = ["route", "method", "status"]
        self.requests = Counter("crossx_requests", "Requests answered", labels, registry=registry)
        self.seconds = Histogram(
            "crossx_request_seconds", "Seconds from a request's head to its response", ["route"],
            registry=registry,
        )  # fmt: skip
        self.images = Counter("crossx_images", "Images answered", ["outcome"], registry=registry)
        self.batch_images = Histogram(
            "crossx_batch_images", "Images per batch", buckets=(1, 2, 4, 8, 16, 32, 64), registry=registry
        )
        self.batch_seconds = Histogram("crossx_batch_seconds", "Seconds per batch", registry=registry)
        queue = Gauge("crossx_queue_images", "Images accepted and not answered", registry=registry)
        queue.set_function(queued)

    def observe_batch(self, size: int, seconds: float) -> None:
        """Record a batch that ran through the network."""
        self.batch_images.observe(size)
        self.batch_seconds.observe(seconds)

    def observe_request(self, route: str | None, method: str, status: int, seconds: float) -> None:
        """Record a request; all requests without a route share one series per status.

        Args:
            route: Path of the route; None if no route has the requested path.
            method: HTTP method as sent; the label of one not in ``METHODS`` is ``other``.
            status: Status of the response.
            seconds: Duration.
        """
        label = "any" if route is None else method if method in METHODS else "other"
        self.requests.labels(route or "other", label, status).inc()
        self.seconds.labels(route or "other").observe(seconds)


class RequestMonitor:
    """Middleware that logs and counts requests and answers unhandled exceptions with status 500."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        status, start = 0, time.perf_counter()

        async def send_observed(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Content-Type-Options"] = "nosniff"
            await send(message)

        try:
            await self._app(scope, receive, send_observed)
        except Exception:
            log.exception("the request failed", extra={"request_id": correlation_id.get()})
            if not status:
                response = problem(500, "internal error; see the service's log.")
                await response(scope, receive, send_observed)
        finally:
            self._record(scope, status or CLIENT_CLOSED_REQUEST, time.perf_counter() - start)

    def _record(self, scope: Scope, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", None)
        self._metrics.observe_request(route, scope["method"], status, seconds)
        fields = {
            "request_id": correlation_id.get(),
            "client": scope["client"][0] if scope.get("client") else None,
            "method": scope["method"],
            "path": scope["path"],
            "status": status,
            "images": scope.get("state", {}).get("images"),
            "seconds": round(seconds, 4),
        }
        log.log(logging.DEBUG if route in _UNLOGGED else logging.INFO, "request", extra=fields)


def problem(status: int, detail: str, headers: dict[str, str] | None = None) -> JSONResponse:
    """Return an error response with the id of the current request."""
    content = Problem(detail=detail, request_id=correlation_id.get() or "")
    return JSONResponse(content.model_dump(), status, headers)
