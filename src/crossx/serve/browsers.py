"""Protect the service from what other web pages make a visitor's browser do."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Collection, Sequence
from ipaddress import ip_address
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from crossx.serve.monitoring import PROBES, problem

HEADERS = {
    # responses to programs are no pages
    "Content-Security-Policy": "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
"""Headers of every response, unless it has its own."""

ANY = "*"
_INLINE_SCRIPT = re.compile(r"<script>(.*?)</script>", re.DOTALL)


class SecureHeaders:
    """Middleware that adds ``HEADERS`` to every response that has no such header of its own."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""

        async def send_secured(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        await self._app(scope, receive, send_secured)


class BrowserGuard:
    """Middleware that checks host names and origins.

    A page of another site whose own name resolves to this machine (DNS rebinding) sends that name as the host, and is
    refused with 400. A page that posts a form across sites, for which browsers ask nobody, is refused with 403:
    ``Sec-Fetch-Site`` says so, or in older browsers ``Origin``
    (https://cheatsheetseries.owasp.org/cheatsheets/Cross-Site_Request_Forgery_Prevention_Cheat_Sheet.html).

    Args:
        app: The application.
        hosts: Host names, without ports, by which the service may be called besides those of loopback; ``*`` for any.
        origins: Origins whose pages may call the service; ``*`` for any.
    """

    def __init__(self, app: ASGIApp, hosts: Collection[str], origins: Collection[str]) -> None:
        self._app = app
        self._hosts = {host.lower().strip("[]") for host in hosts}
        self._origins = {origin.lower().rstrip("/") for origin in origins}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve or refuse one request."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        headers = Headers(scope=scope)
        if not self._is_own(headers.get("host"), scope["path"]):
            refusal = problem(400, "the header Host has a name that is not allowed, see --allowed_hosts.")
        elif scope["method"] not in ("GET", "HEAD", "OPTIONS") and not self._may_post(headers):
            refusal = problem(403, "pages of other sites may not call the service, see --cors.")
        else:
            return await self._app(scope, receive, send)
        await refusal(scope, receive, send)

    def _is_own(self, host: str | None, path: str) -> bool:
        if ANY in self._hosts or host is None or path in PROBES:
            return True
        name = host_name(host)
        return name in self._hosts or is_loopback(name)

    def _may_post(self, headers: Headers) -> bool:
        origin = headers.get("origin", "").lower()
        if ANY in self._origins or origin in self._origins:
            return True
        site = headers.get("sec-fetch-site")
        if site is not None:
            return site in ("same-origin", "none")
        return not origin or urlsplit(origin).netloc == headers.get("host", "").lower()


def host_name(host: str) -> str:
    """Return a Host header's name or address, in lower case, without port, brackets and final dot."""
    try:
        return (urlsplit(f"//{host}").hostname or "").rstrip(".")
    except ValueError:
        return ""


def is_loopback(name: str) -> bool:
    """Return whether a name or an address is this machine's own."""
    try:
        return ip_address(name).is_loopback
    except ValueError:
        return name == "localhost" or name.endswith(".localhost")


def allowed_hosts(given: Sequence[str], host: str, address: str) -> Sequence[str]:
    """Return the host names to allow: those given; by default ``host`` if its address is of loopback, otherwise any."""
    return given or ([host] if is_loopback(address) else [ANY])


def page_policy(page: str) -> str:
    """Return the content security policy of a page of Swagger UI: its own files, and its inline script by hash."""
    hashes = [hashlib.sha256(script.encode()).digest() for script in _INLINE_SCRIPT.findall(page)]
    scripts = " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in hashes)
    return (
        f"default-src 'none'; script-src 'self' {scripts}; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
