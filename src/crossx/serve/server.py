"""Run the service: socket, uvicorn with time limits on clients, JSON logs, graceful shutdown."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import ClassVar

import h11
import uvicorn
from fastapi import FastAPI
from pythonjsonlogger.core import RESERVED_ATTRS
from pythonjsonlogger.json import JsonFormatter
from uvicorn.protocols.http.h11_impl import H11Protocol

from crossx.errors import UsageError, first_line
from crossx.serve.service import Service

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


def run(app: FastAPI, listening: socket.socket, *, trusted_proxies: str = "127.0.0.1") -> None:
    """Serve until SIGTERM or SIGINT, then answer all accepted requests. A second SIGINT stops at once.

    Args:
        app: See ``create_app``.
        listening: See ``listen``.
        trusted_proxies: Comma-separated addresses whose ``X-Forwarded-*`` headers are trusted; ``*`` for all.
    """
    service: Service = app.state.service
    timeout = service.limits.timeout

    class Protocol(_TimedProtocol):
        seconds = timeout

    config = uvicorn.Config(
        app, http=Protocol, ws="none", log_config=None, access_log=False, server_header=False,
        forwarded_allow_ips=trusted_proxies, timeout_graceful_shutdown=3 * timeout,
    )  # fmt: skip
    with _ignore_reraised_signals():
        _Server(config, service).run(sockets=[listening])


def log_as_json() -> None:
    """Log to stderr, one JSON object per line."""
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


class _Server(uvicorn.Server):
    """Refuses requests from the signal on, before uvicorn closes the socket."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._service.draining = True
        super().handle_exit(sig, frame)


class _TimedProtocol(H11Protocol):
    """HTTP/1.1 with time limits on slow clients.

    uvicorn's own settings limit the size of a head and the idle time between requests, but not the time that a head
    or the reading of a response takes. This class builds on uvicorn's private API: pyproject.toml bounds its version.

    A head must arrive within ``seconds`` of the connection or of the previous response. The application limits the
    time of the body and the response; a client that does not read the response is disconnected after three times
    ``seconds``.
    """

    seconds: ClassVar[float]

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._timer = self.loop.call_later(self.seconds, self._expire)
        self._timed = self.cycle

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._restart_for_request()

    def on_response_complete(self) -> None:
        self._restart(self.seconds)
        super().on_response_complete()
        self._restart_for_request()  # a pipelined one

    def connection_lost(self, exc: Exception | None) -> None:
        self._timer.cancel()
        super().connection_lost(exc)

    def _restart_for_request(self) -> None:
        if self.cycle is not self._timed:
            self._timed = self.cycle
            self._restart(3 * self.seconds)

    def _restart(self, seconds: float) -> None:
        self._timer.cancel()
        self._timer = self.loop.call_later(seconds, self._expire)

    def _expire(self) -> None:
        head_begun = self.conn.our_state is h11.IDLE and self.conn.trailing_data[0]
        if head_begun and not self.transport.is_closing():
            self.transport.write(_TIMED_OUT)
            self.transport.close()
        else:
            self.transport.abort()


@contextmanager
def _ignore_reraised_signals() -> Iterator[None]:
    """Ignore the signal that uvicorn raises again after its shutdown."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
