"""Run the service: socket, uvicorn with limits on clients, JSON logs, graceful shutdown."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import sys
import threading
import warnings
from collections.abc import Callable
from http import HTTPStatus
from types import FrameType
from typing import Any, ClassVar
from uuid import uuid4

import h11
import uvicorn
from fastapi import FastAPI
from pythonjsonlogger.core import RESERVED_ATTRS
from pythonjsonlogger.json import JsonFormatter
from uvicorn.protocols.http.h11_impl import H11Protocol

from crossx.errors import UsageError, first_line
from crossx.serve.fairness import Capacity, ShareError
from crossx.serve.limits import share
from crossx.serve.service import Service
from crossx.serve.uploads import network_of

MAX_HEAD = 16 * 1024
MAX_TARGET = 8 * 1024
MAX_HEADERS = 100
MAX_CHUNKS = 20_000
"""Chunks of a body; parsing one takes ten times as long as sending it, if it has one byte."""
LINGER = 2.0
"""Seconds that a refused client has to read the response while it still sends."""

_TIMED_OUT = b"HTTP/1.1 408 Request Timeout\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"


def listen(host: str, port: int) -> socket.socket:
    """Open a listening socket.

    Args:
        host: Address or name.
        port: 0 for any free port.

    Raises:
        UsageError: If the address is not available.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise UsageError(
            f"cannot listen at {host}:{port} ({reason}): give another --host or --port."
        ) from error


def run(
    app: FastAPI,
    listening: socket.socket,
    *,
    trusted_proxies: str = "127.0.0.1",
    ready: Callable[[], None] = lambda: None,
) -> None:
    """Serve until SIGTERM or SIGINT, then answer all accepted requests. A second SIGINT stops at once.

    Args:
        app: See ``create_app``.
        listening: See ``listen``.
        trusted_proxies: Comma-separated addresses whose ``X-Forwarded-*`` headers are trusted; ``*`` for all.
        ready: Called once requests are accepted and signals are handled.
    """
    service: Service = app.state.service
    timeout = service.limits.timeout
    most = service.limits.max_connections

    class Protocol(_BoundedProtocol):
        seconds = timeout
        open_connections = Capacity(most, share(most))

    config = uvicorn.Config(
        app, http=Protocol, ws="none", log_config=None, access_log=False, server_header=False,
        forwarded_allow_ips=trusted_proxies, timeout_graceful_shutdown=3 * timeout,
    )  # fmt: skip
    _Server(config, service, ready).run(sockets=[listening])


def log_as_json() -> None:
    """Log to stderr, one JSON object per line: also what libraries log, warnings, and unhandled exceptions."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        JsonFormatter(
            ["levelname", "name", "message"],
            rename_fields={"levelname": "level", "name": "logger"},
            reserved_attrs=[*RESERVED_ATTRS, "color_message"],  # uvicorn's attribute with escape codes
            timestamp="time",
        )
    )
    for name in ("crossx", "uvicorn", "asgi_correlation_id"):
        log = logging.getLogger(name)
        log.handlers, log.propagate = [handler], False
        log.setLevel(logging.INFO)
    root = logging.getLogger()
    root.handlers = [handler]
    # bodies that it warns of are answered with 400
    logging.getLogger("python_multipart").setLevel(logging.ERROR)
    logging.captureWarnings(True)
    # a damaged image may have thousands; what makes it unreadable is in the response
    warnings.filterwarnings("ignore", module=r"PIL\.")

    def log_unhandled(error: Any) -> None:
        exception = error.exc_value or error.exc_type()
        root.error("unhandled exception", exc_info=(error.exc_type, exception, error.exc_traceback))

    sys.excepthook = lambda *error: root.error("unhandled exception", exc_info=error)
    threading.excepthook = sys.unraisablehook = log_unhandled


class _Server(uvicorn.Server):
    """Refuses requests from the signal on, before uvicorn closes the socket."""

    def __init__(self, config: uvicorn.Config, service: Service, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._service, self._ready = service, ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._service.draining = True
        super().handle_exit(sig, frame)
        self._captured_signals.clear()  # or uvicorn raises them again after its shutdown


class _BoundedConnection(h11.Connection):
    """Refuses what is too large, even if it arrives in one piece: h11 only bounds what is incomplete.

    Attributes:
        refusal: Status and reason of the refusal.
    """

    def __init__(self) -> None:
        super().__init__(h11.SERVER, MAX_HEAD)
        self.refusal = (400, "the request is malformed.")
        self._chunks = 0

    def next_event(self) -> Any:
        in_head = self.their_state is h11.IDLE
        try:
            event = super().next_event()
        except h11.RemoteProtocolError as error:
            if error.error_status_hint == 431 and in_head:
                self.refusal = _TOO_LARGE
            elif error.error_status_hint == 501:
                self.refusal = (501, "the Transfer-Encoding is not supported.")
            raise
        if isinstance(event, h11.Request):
            self._chunks = 0
            size = len(event.target) + sum(len(name) + len(value) + 4 for name, value in event.headers)
            if len(event.target) > MAX_TARGET:
                self._refuse(414, f"the URL is longer than {MAX_TARGET} bytes.")
            if size > MAX_HEAD or len(event.headers) > MAX_HEADERS:
                self._refuse(*_TOO_LARGE)
        elif isinstance(event, h11.Data):
            self._chunks += event.chunk_end  # unlike chunk_start also set if its header came before
            if self._chunks > MAX_CHUNKS:
                self._refuse(400, f"the body has more than {MAX_CHUNKS} chunks.")
        elif isinstance(event, h11.EndOfMessage) and len(event.headers) > MAX_HEADERS:
            self._refuse(400, f"the body ends with more than {MAX_HEADERS} trailers.")
        return event

    def _refuse(self, status: int, detail: str) -> None:
        self.refusal = (status, detail)
        raise h11.RemoteProtocolError(detail, error_status_hint=status)


_TOO_LARGE = (431, f"the head is larger than {MAX_HEAD} bytes, or has more than {MAX_HEADERS} headers.")


class _BoundedProtocol(H11Protocol):
    """HTTP/1.1 with limits on clients.

    uvicorn's own settings limit the size of an incomplete head and the idle time between requests, but not the size of
    a complete head, nor the time that a head or the reading of a response takes, nor the connections of one client.
    This class builds on uvicorn's private API: pyproject.toml bounds its version.

    A head must arrive within ``seconds`` of the connection or of the previous response. The application limits the
    time of the body and the response; a client that does not read the response is disconnected after three times
    ``seconds``.
    """

    seconds: ClassVar[float]
    open_connections: ClassVar[Capacity]

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.conn: _BoundedConnection = _BoundedConnection()
        self._refused = False
        self._counted: str | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        address = network_of(self.client[0] if self.client else "")
        try:
            self.open_connections.take(address, 1)
            self._counted = address
        except ShareError:
            self._refused = True
            transport.abort()
        self._timer = self.loop.call_later(self.seconds, self._expire)
        self._timed = self.cycle

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        super().data_received(data)
        self._restart_for_request()

    def on_response_complete(self) -> None:
        self._restart(self.seconds)
        super().on_response_complete()
        self._restart_for_request()  # a pipelined one

    def connection_lost(self, exc: Exception | None) -> None:
        self._timer.cancel()
        if self._counted is not None:
            self.open_connections.give(self._counted, 1)
        super().connection_lost(exc)

    def shutdown(self) -> None:
        if self._refused:
            self.transport.abort()
        else:
            super().shutdown()

    def send_400_response(self, msg: str) -> None:
        """Answer a request that is refused before the application sees it, and go on reading for a moment."""
        answerable = self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE)
        self.conn.send_failed()
        self._refused = True
        if self.cycle is not None:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if not answerable:
            self.transport.abort()
            return
        status, detail = self.conn.refusal
        request_id = uuid4().hex
        body = json.dumps({"detail": detail, "request_id": request_id}).encode()
        head = (
            f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\nX-Request-ID: {request_id}\r\nX-Content-Type-Options: nosniff\r\n"
            "Connection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        # closing at once would reset the connection, and the client could lose the response
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.flow.resume_reading()
        self._restart(LINGER)

    def _unsupported_upgrade_warning(self) -> None:
        """Answer as if no upgrade were asked for, as HTTP says."""

    def _restart_for_request(self) -> None:
        if self.cycle is not self._timed:
            self._timed = self.cycle
            self._restart(3 * self.seconds)

    def _restart(self, seconds: float) -> None:
        self._timer.cancel()
        self._timer = self.loop.call_later(seconds, self._expire)

    def _expire(self) -> None:
        head_begun = not self._refused and self.conn.our_state is h11.IDLE and self.conn.trailing_data[0]
        if head_begun and not self.transport.is_closing():
            self.transport.write(_TIMED_OUT)
            self.transport.close()
        else:
            self.transport.abort()
