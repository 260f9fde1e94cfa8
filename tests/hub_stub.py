"""A Hugging Face Hub on the loopback interface: as much of its HTTP interface as one model needs.

What the real client (huggingface_hub) asks for is answered as https://huggingface.co/docs/hub/api describes it. A
repository is a mapping of branches to files; the commit of a branch is the SHA-1 of its content.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import unquote, urlsplit

import huggingface_hub.constants
import pytest

Files = dict[str, bytes]


@dataclass
class Hub:
    """The content of the hub, and what was asked of it.

    Attributes:
        repositories: ``user/name`` -> branch -> files.
        gated: Repositories that refuse everyone.
        private: Repositories that were made private.
        writers: Tokens that may write.
        requests: ``METHOD path`` of every request.
    """

    repositories: dict[str, dict[str, Files]] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    private: set[str] = field(default_factory=set)
    writers: set[str] = field(default_factory=set)
    requests: list[str] = field(default_factory=list)

    def resolve(self, repository: str, revision: str) -> tuple[str, Files] | None:
        """Return the commit and the files of a branch or commit."""
        for branch, files in self.repositories[repository].items():
            commit = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
            if revision in (branch, commit):
                return commit, files
        return None


@contextmanager
def serve() -> Iterator[tuple[Hub, str]]:
    """Serve an empty hub until the block ends; give it and its address."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub, f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def use(monkeypatch: pytest.MonkeyPatch, address: str, cache: str, token: str | None = None) -> None:
    """Send huggingface_hub to ``address``, with a cache of its own."""
    for name, value in {
        "ENDPOINT": address,
        "HUGGINGFACE_CO_URL_TEMPLATE": address + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": cache,
        "HF_HUB_OFFLINE": False,
        "HF_TOKEN_PATH": f"{cache}/no-token",
    }.items():
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    if token:
        monkeypatch.setenv("HF_TOKEN", token)


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def do_GET(self) -> None:
        words = self._words()
        match words:
            case ["api", "models", user, name, "revision", revision]:
                if found := self._find(f"{user}/{name}", revision):
                    siblings = [{"rfilename": path} for path in found[1]]
                    self._answer({"id": f"{user}/{name}", "sha": found[0], "siblings": siblings})
            case ["api", "models", user, name, "tree", revision]:
                if found := self._find(f"{user}/{name}", revision):
                    tree = [
                        {
                            "type": "file",
                            "path": path,
                            "size": len(content),
                            "oid": hashlib.sha1(content).hexdigest(),
                        }
                        for path, content in found[1].items()
                    ]
                    self._answer(tree)
            case [user, name, "resolve", revision, *path]:
                if not (found := self._find(f"{user}/{name}", revision)):
                    return
                content = found[1].get("/".join(path))
                if content is None:
                    self._refuse(404, "EntryNotFound")
                    return
                etag = hashlib.sha1(content).hexdigest()
                self._answer(content, {"ETag": f'"{etag}"', "X-Repo-Commit": found[0]})
            case _:
                self._refuse(404)

    do_HEAD = do_GET  # noqa: N815  the name that http.server calls

    def do_POST(self) -> None:
        words = self._words()
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Authorization", "").removeprefix("Bearer ") not in self.hub.writers:
            self._refuse(401)
            return
        match words:
            case ["api", "repos", "create"]:
                wanted = json.loads(body)
                repository = "/".join(filter(None, (wanted.get("organization"), wanted["name"])))
                address = f"{huggingface_hub.constants.ENDPOINT}/{repository}"
                if repository in self.hub.repositories:
                    self._answer({"url": address}, status=409)
                    return
                self.hub.repositories[repository] = {"main": {}}
                if wanted.get("private") or wanted.get("visibility") == "private":
                    self.hub.private.add(repository)
                self._answer({"url": address, "name": repository})
            case ["api", "models", user, name, "branch", branch]:
                branches = self.hub.repositories[f"{user}/{name}"]
                branches.setdefault(branch, dict(branches["main"]))
                self._answer({})
            case ["api", "models", user, name, "preupload", _]:
                files = [
                    {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                    for file in json.loads(body)["files"]
                ]
                self._answer({"files": files})
            case ["api", "models", user, name, "commit", branch]:
                repository = f"{user}/{name}"
                files = self.hub.repositories[repository][branch]
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "file":
                        files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                commit = self.hub.resolve(repository, branch)
                assert commit is not None
                address = f"{huggingface_hub.constants.ENDPOINT}/{repository}/commit/{commit[0]}"
                self._answer({"commitUrl": address, "commitOid": commit[0], "success": True})
            case ["api", "validate-yaml"]:
                self._answer({"warnings": [], "errors": []})
            case _:
                self._refuse(404)

    def _words(self) -> list[str]:
        path = urlsplit(self.path).path
        self.hub.requests.append(f"{self.command} {path}")
        return [unquote(word) for word in path.strip("/").split("/")]

    def _find(self, repository: str, revision: str) -> tuple[str, Files] | None:
        if repository in self.hub.gated:
            self._refuse(403, "GatedRepo")
        elif repository not in self.hub.repositories:
            self._refuse(401, "RepoNotFound")
        elif found := self.hub.resolve(repository, revision):
            return found
        else:
            self._refuse(404, "RevisionNotFound")
        return None

    def _refuse(self, status: int, code: str = "") -> None:
        self._answer({"error": code or "refused"}, {"X-Error-Code": code} if code else {}, status)

    def _answer(self, content: object, headers: dict[str, str] | None = None, status: int = 200) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None:
        """Say nothing."""
