"""A service in a process of its own, over loopback: signals, and clients that do not behave."""

import contextlib
import json
import os
import queue
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import httpx2 as httpx
import pytest
from packaging.requirements import Requirement

from crossx.errors import UsageError
from layouts import write_image, write_run
from slow import slow_except

pytest.importorskip("fastapi", reason="needs crossx[serve]")

from crossx.serve.server import listen

TIMEOUT = 15
"""Seconds that the service gives a client; a prediction on a busy machine takes less."""
PATIENCE = 600
"""Seconds after which something hangs."""

HELD = """
import sys
from crossx.cli.main import main
from crossx.serve.service import Service
warm_up = Service.warm_up
def hold(service):
    warm_up(service)
    classify = service._predictor.classify
    def held(*arguments):
        sys.stdin.read()
        return classify(*arguments)
    service._predictor.classify = held
Service.warm_up = hold
sys.exit(main(sys.argv[1:]))
"""
"""The command, with a network that waits for the end of stdin once it is warm."""


@dataclass
class Service:
    process: subprocess.Popen[str]
    lines: "queue.Queue[str]"
    port: int

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.port}{path}"

    def wait_for(self, text: str) -> str:
        while text not in (line := self.lines.get(timeout=PATIENCE)):
            assert line, f"the process ended before it said {text!r}"
        return line

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE)


@contextlib.contextmanager
def serving(run: Path, log: Path, *, held: bool = False) -> Iterator[Service]:
    start = ["-c", HELD] if held else ["-m", "crossx"]
    timeout = PATIENCE if held else TIMEOUT
    words = ["serve", str(run), "--port", "0", "--device", "cpu", "--timeout", str(timeout)]
    with (
        log.open("w") as errors,
        subprocess.Popen(
            [sys.executable, *start, *words],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        ) as process,
    ):  # fmt: skip
        lines: queue.Queue[str] = queue.Queue()

        def read() -> None:
            assert process.stdout is not None
            for line in process.stdout:
                lines.put(line)
            lines.put("")

        threading.Thread(target=read, daemon=True).start()
        service = Service(process, lines, 0)
        try:
            service.port = int(service.wait_for("http://").rsplit(":", 1)[1])
            yield service
        finally:
            process.kill()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def bird(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("image") / "bird.jpg"
    write_image(path, 0, 0)
    return path.read_bytes()


@pytest.fixture(scope="module")
def service(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with serving(run, tmp_path_factory.mktemp("log") / "log") as service:
        yield service


def predict(service: Service, bird: bytes) -> httpx.Response:
    return httpx.post(service.url("/predict"), files={"images": ("bird.jpg", bird)}, timeout=PATIENCE)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def everything(connection: socket.socket) -> bytes:
    """Read until the other side closes."""
    content = b""
    with contextlib.suppress(ConnectionResetError):
        while part := connection.recv(65536):
            content += part
    return content


@pytest.mark.parametrize("number", slow_except([signal.SIGTERM, signal.SIGINT], signal.SIGTERM))
def test_a_stopped_service_finishes_what_it_accepted(
    run: Path, bird: bytes, tmp_path: Path, number: signal.Signals
) -> None:
    with serving(run, tmp_path / "log", held=True) as service:

        def accepted() -> bool:
            metrics = httpx.get(service.url("/metrics"), timeout=PATIENCE).text
            return "crossx_queue_images 3.0" in metrics.splitlines()

        def refuses() -> bool:
            try:
                service.connect().close()
            except ConnectionRefusedError:
                return True
            return False

        answers: list[int] = []
        threads = [
            threading.Thread(target=lambda: answers.append(predict(service, bird).status_code))
            for _ in range(3)
        ]
        for thread in threads:
            thread.start()
        wait_until(accepted)
        service.process.send_signal(number)
        wait_until(refuses)
        assert answers == []
        assert service.process.stdin is not None
        service.process.stdin.close()
        for thread in threads:
            thread.join(PATIENCE)
        assert answers == [200, 200, 200]
        assert service.process.wait(PATIENCE) == 0
        with pytest.raises(httpx.ConnectError):
            predict(service, bird)
    log = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    told = [line for line in log if line["message"] == "request" and line["path"] == "/predict"]
    assert [(line["status"], line["images"]) for line in told] == 3 * [(200, 1)]
    assert len({line["request_id"] for line in told}) == 3


def test_a_malformed_head_is_400(service: Service, bird: bytes) -> None:
    for head in (b"\x16\x03\x01\x02\0\r\n\r\n", b"GET / HTTP/1.1\r\nbad header\r\n\r\n", b"X" * 200_000):
        with service.connect() as connection:
            with contextlib.suppress(ConnectionError):
                connection.sendall(head)
            assert everything(connection).startswith(b"HTTP/1.1 400") or len(head) > 65536
    assert predict(service, bird).status_code == 200


def test_slow_clients_are_408_and_others_are_served(service: Service, bird: bytes) -> None:
    """A head, a second head and a body that do not end, and a client that says nothing."""
    with service.connect() as head, service.connect() as second, service.connect() as body:
        head.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\n")
        second.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        assert second.recv(65536).startswith(b"HTTP/1.1 200")
        second.sendall(b"GET /hea")
        body.sendall(
            b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 999\r\n\r\n{"
        )
        with service.connect() as silent:
            assert predict(service, bird).status_code == 200
            answered, _, _ = select.select([head, body, silent], [], [], 0)
            assert answered == []  # nobody was cut off at once
            assert everything(head).startswith(b"HTTP/1.1 408")
            assert b"408 Request Timeout" in everything(second)
            answer = everything(body)
            assert answer.startswith(b"HTTP/1.1 408")
            assert f"was not received within {TIMEOUT} s".encode() in answer
            assert everything(silent) == b""


def test_an_aborted_upload_disturbs_nobody(service: Service, bird: bytes) -> None:
    for _ in range(20):
        with service.connect() as aborted:
            aborted.sendall(
                b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: multipart/form-data; boundary=y\r\n"
                b"Content-Length: 9999\r\n\r\n--y\r\n"
            )
    assert predict(service, bird).status_code == 200
    assert 'status="499"' in httpx.get(service.url("/metrics")).text


def test_an_upload_after_the_answer_ends(service: Service) -> None:
    head = (
        b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: text/plain\r\nTransfer-Encoding: chunked\r\n\r\n"
    )
    with service.connect() as endless, contextlib.suppress(ConnectionError):
        deadline = time.monotonic() + PATIENCE
        endless.sendall(head)
        while time.monotonic() < deadline:
            endless.sendall(b"5\r\nhello\r\n")
            time.sleep(0.05)
        pytest.fail("the connection is still there")


def test_the_private_part_of_uvicorn_is_bounded() -> None:
    """The timed protocol subclasses a private class: only versions that these tests ran with may be installed."""
    pyproject = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    extra = map(Requirement, pyproject["project"]["optional-dependencies"]["serve"])
    (uvicorn,) = (requirement for requirement in extra if requirement.name == "uvicorn")
    assert uvicorn.specifier.contains(version("uvicorn"))
    assert not uvicorn.specifier.contains("0.55")
    assert not uvicorn.specifier.contains("1.0")


def test_a_port_that_is_taken_is_told() -> None:
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(
            UsageError, match=f"cannot listen at 127.0.0.1:{port} .*: give another --host or --port"
        ):
            listen("127.0.0.1", port)
    for host, port in (("127.0.0.1", 65536), ("no.such.host.invalid", 0)):
        with pytest.raises(UsageError, match="cannot listen at"):
            listen(host, port)
