"""Access log, metrics and error responses.

Metrics use prometheus_client directly, since prometheus-fastapi-instrumentator labels requests with the method as it
was sent, so that each invented method would add a series. Every label has a closed set of values, known at the start.
"""

from __future__ import annotations

import logging
import string
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from urllib.parse import quote

from asgi_correlation_id import correlation_id
from fastapi.responses import JSONResponse
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, ProcessCollector
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from crossx.data.images import printable
from crossx.predict.identity import Identity
from crossx.serve.schemas import Problem

log = logging.getLogger("crossx.serve")

CLIENT_CLOSED_REQUEST = 499
"""nginx's status, in logs and metrics, for a client that disconnected before the response."""
MODEL_HEADERS = {"X-Model-Name": "name", "X-Model-Version": "version", "X-Model-Checksum": "checksum"}
"""Header -> attribute of ``Identity``."""
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
MAX_CLASS_SERIES = 1000
"""Classes with a counter of their own, in label order; predictions of all further ones are counted together."""
MAX_CLASS_NAME = 100
"""Characters of a class name in a label."""
OTHER = "other"
CONFIDENCES = (*(tenths / 10 for tenths in range(1, 10)), 0.95, 0.99, 1.0)
PROBES = ("/healthz", "/readyz", "/metrics")
"""Paths that are not logged and answer under any host name: a cluster probes and scrapes by address."""


class Metrics:
    """The service's Prometheus metrics, in their own registry.

    Args:
        identity: The network.
        classes: Its class names in label order.
        capacity: Limit of the queue.
        queued: Returns the number of images accepted and not answered.
        ready: Returns whether requests are accepted.
    """

    def __init__(
        self,
        identity: Identity,
        classes: Sequence[str],
        capacity: int,
        queued: Callable[[], float],
        ready: Callable[[], bool],
    ) -> None:
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
        limit = Gauge("crossx_queue_limit_images", "Most images accepted and not answered", registry=registry)
        limit.set(capacity)
        Gauge("crossx_ready", "Whether requests are accepted", registry=registry).set_function(ready)
        model = Info("crossx_model", "The served network", registry=registry)
        model.info({"name": identity.name, "version": identity.version, "checksum": identity.checksum or ""})
        Info("crossx_build", "The software", registry=registry).info({"version": version("crossx")})
        self.confidence = Histogram(
            "crossx_confidence", "Probability of the predicted class", buckets=CONFIDENCES, registry=registry
        )
        predictions = Counter("crossx_predictions", "Images by predicted class", ["label"], registry=registry)
        self._by_class = {
            name: predictions.labels(printable(name)[:MAX_CLASS_NAME] if number < MAX_CLASS_SERIES else OTHER)
            for number, name in enumerate(classes)
        }
        # a rate needs the zero before the first failure
        for outcome in ("predicted", "rejected", "unreadable"):
            self.images.labels(outcome)
        for route in ("/predict", "/explain"):
            for status in (200, 429, 500, 503, 504):
                self.requests.labels(route, "POST", status)

    def observe_prediction(self, label: str, probability: float) -> None:
        """Record the predicted class of an image."""
        self.images.labels("predicted").inc()
        self._by_class[label].inc()
        self.confidence.observe(probability)

    def observe_rejection(self, probability: float) -> None:
        """Record an image of none of the classes."""
        self.images.labels("rejected").inc()
        self.confidence.observe(probability)

    def observe_unreadable(self) -> None:
        """Record an image that cannot be read."""
        self.images.labels("unreadable").inc()

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
        label = "any" if route is None else method if method in METHODS else OTHER
        self.requests.labels(route or OTHER, label, status).inc()
        self.seconds.labels(route or OTHER).observe(seconds)


class RequestMonitor:
    """Middleware that logs and counts requests and answers unhandled exceptions with status 500.

    Args:
        app: The application.
        metrics: Where to count.
        headers: Headers of every response.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, headers: Mapping[str, str]) -> None:
        self._app, self._metrics, self._headers = app, metrics, headers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        status, start = 0, time.perf_counter()

        async def send_observed(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message).update(self._headers)
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
        log.log(logging.DEBUG if route in PROBES else logging.INFO, "request", extra=fields)


def model_headers(identity: Identity) -> dict[str, str]:
    """Return the headers that name the network; spaces, ``%`` and all but printable ASCII are percent-encoded."""
    values = {name: getattr(identity, field) for name, field in MODEL_HEADERS.items()}
    plain = string.punctuation.replace("%", "")
    return {name: quote(value, safe=plain) for name, value in values.items() if value is not None}


def problem(status: int, detail: str, headers: dict[str, str] | None = None) -> JSONResponse:
    """Return an error response with the id of the current request."""
    content = Problem(detail=detail, request_id=correlation_id.get() or "")
    return JSONResponse(content.model_dump(), status, headers)
