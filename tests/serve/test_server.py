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

import h11
import httpx2 as httpx
import pytest
from packaging.requirements import Requirement

from crossx.errors import UsageError
from layouts import write_image, write_run
from slow import slow_except

pytest.importorskip("fastapi", reason="needs crossx[serve]")

from crossx.serve.server import MAX_CHUNKS, MAX_HEAD, MAX_HEADERS, _BoundedConnection, listen

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
    answer = service._predictor.answer
    def held(*arguments):
        sys.stdin.read()
        return answer(*arguments)
    service._predictor.answer = held
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
@pytest.mark.slow
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


def head(*lines: bytes) -> bytes:
    return b"\r\n".join([b"POST /predict HTTP/1.1", b"Host: localhost", *lines, b"", b""])


CHUNKED = head(b"Transfer-Encoding: chunked")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("content", "status"),
    [
        (head(b"X: " + bytes(MAX_HEAD - 200).replace(b"\0", b"a")), None),
        (head(*[b"X: a"] * (MAX_HEADERS - 1)), None),
        (head(b"X: " + MAX_HEAD * b"a"), 431),
        (head(*[b"X: a"] * MAX_HEADERS), 431),
        (head(*[b"X-%d: %s" % (number, 200 * b"a") for number in range(90)]), 431),
        (head(b"X: a", *[b" " + 200 * b"a"] * 90), 431),  # one header over many lines
        (head(b"X: " + MAX_HEAD * b"a")[:-2], 431),  # incomplete
        (b"GET /" + 9000 * b"a" + b" HTTP/1.1\r\nHost: localhost\r\n\r\n", 414),
        (b"GET / HTTP/1.1\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 400),
        (head(b"Transfer-Encoding: gzip, chunked"), 501),
        (head(b"Content-Length: 1", b"Content-Length: 2"), 400),
        (head(b"Content-Length: -1"), 400),
        (CHUNKED + 1000 * b"1\r\na\r\n" + b"0\r\nX: a\r\n\r\n", None),
        (CHUNKED + (MAX_CHUNKS + 1) * b"1\r\na\r\n", 400),
        (CHUNKED + b"1;" + 2 * MAX_HEAD * b"a", 400),  # an extension
        (CHUNKED + b"0\r\n" + (MAX_HEADERS + 1) * b"X: a\r\n" + b"\r\n", 400),
        (CHUNKED + b"0\r\nX: " + 2 * MAX_HEAD * b"a", 400),
        (CHUNKED + b"g\r\n", 400),
    ],
)  # fmt: skip
@pytest.mark.parametrize("size", [10**9, 1000])
def test_what_is_too_large_is_refused_in_one_piece_and_in_many(
    content: bytes, status: int | None, size: int
) -> None:
    connection, refused = _BoundedConnection(), None
    try:
        for start in range(0, len(content), size):
            connection.receive_data(content[start : start + size])
            while connection.next_event() not in (h11.NEED_DATA, h11.PAUSED):
                pass
    except h11.RemoteProtocolError:
        refused = connection.refusal[0]
    assert refused == status


@pytest.mark.slow
def test_refusals_reach_the_client_in_the_form_of_other_errors(service: Service, bird: bytes) -> None:
    for content, status in ((head(b"X: " + 300_000 * b"a"), 431), (CHUNKED + b"g\r\n", 400)):
        with service.connect() as connection:
            with contextlib.suppress(ConnectionError):
                connection.sendall(content)
            answer, _, body = everything(connection).partition(b"\r\n\r\n")
            assert answer.startswith(f"HTTP/1.1 {status} ".encode())
            assert set(json.loads(body)) == {"detail", "request_id"}
    with service.connect() as upgrade:
        upgrade.sendall(
            b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: upgrade, close\r\nUpgrade: websocket\r\n\r\n"
        )
        assert everything(upgrade).startswith(b"HTTP/1.1 200")
    with service.connect() as pipelined:
        one = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"
        pipelined.sendall(20 * one + one.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
        assert everything(pipelined).count(b'{"status":"ok"}') == 21
    with service.connect() as old:
        old.sendall(b"GET /healthz HTTP/1.0\r\n\r\n")
        assert everything(old).startswith(b"HTTP/1.1 200")
    assert predict(service, bird).status_code == 200


@pytest.mark.slow
def test_one_client_cannot_have_all_connections(service: Service, bird: bytes) -> None:
    """An idle client at another address of loopback; the limits follow from the files that a process may open."""
    idle = [
        socket.create_connection(("127.0.0.1", service.port), source_address=("127.0.0.9", 0))
        for _ in range(900)
    ]
    try:
        wait_until(lambda: bool(select.select(idle, [], [], 0)[0]))
        assert predict(service, bird).status_code == 200
    finally:
        for connection in idle:
            connection.close()
    assert predict(service, bird).status_code == 200


@pytest.mark.slow
@pytest.mark.parametrize("when", ["at once", "loading", "address"])
def test_sigterm_ends_it_cleanly_at_any_time(run: Path, tmp_path: Path, when: str) -> None:
    log = tmp_path / "log"
    command = [sys.executable, "-m", "crossx", "serve", str(run), "--port", "0", "--device", "cpu"]
    with (
        log.open("w") as errors,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        ) as process,
    ):  # fmt: skip
        assert process.stdout is not None
        if when == "address":
            assert "http://" in process.stdout.readline()
        elif when == "loading":
            maps = Path(f"/proc/{process.pid}/maps")
            wait_until(lambda: "libtorch" in maps.read_text())
        else:
            status = Path(f"/proc/{process.pid}/status")
            wait_until(lambda: bool(_signals(status) & 1 << signal.SIGTERM - 1))
        process.send_signal(signal.SIGTERM)
        code = process.wait(PATIENCE)
    if when == "at once" and code == 130:
        # as any command that has not begun its work
        assert log.read_text() == "crossx serve: error: stopped by SIGTERM.\n"
        return
    assert code == 0
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert lines[-1]["message"].startswith(
        "Finished server process" if when == "address" else "stopped by SIGTERM before"
    )


def _signals(status: Path) -> int:
    """Return the signals that a process handles."""
    (line,) = (line for line in status.read_text().splitlines() if line.startswith("SigCgt"))
    return int(line.split()[1], 16)


@pytest.mark.slow
def test_a_malformed_head_is_400(service: Service, bird: bytes) -> None:
    for head in (b"\x16\x03\x01\x02\0\r\n\r\n", b"GET / HTTP/1.1\r\nbad header\r\n\r\n", b"X" * 200_000):
        with service.connect() as connection:
            with contextlib.suppress(ConnectionError):
                connection.sendall(head)
            assert everything(connection).startswith(b"HTTP/1.1 400") or len(head) > 65536
    assert predict(service, bird).status_code == 200


@pytest.mark.slow
def test_slow_clients_are_408_and_others_are_served(service: Service, bird: bytes) -> None:
    """A head, a second head and a body that do not end, and a client that says nothing."""
    with service.connect() as first, service.connect() as second, service.connect() as body:
        first.sendall(b"POST /predict HTTP/1.1\r\nHost: localhost\r\n")
        second.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert second.recv(65536).startswith(b"HTTP/1.1 200")
        second.sendall(b"GET /hea")
        body.sendall(head(b"Content-Type: application/json", b"Content-Length: 999") + b"{")
        with service.connect() as silent:
            assert predict(service, bird).status_code == 200
            answered, _, _ = select.select([first, body, silent], [], [], 0)
            assert answered == []  # nobody was cut off at once
            assert everything(first).startswith(b"HTTP/1.1 408")
            assert b"408 Request Timeout" in everything(second)
            answer = everything(body)
            assert answer.startswith(b"HTTP/1.1 408")
            assert f"was not received within {TIMEOUT} s".encode() in answer
            assert everything(silent) == b""


@pytest.mark.slow
def test_an_aborted_upload_disturbs_nobody(service: Service, bird: bytes) -> None:
    for _ in range(20):
        with service.connect() as aborted:
            aborted.sendall(
                b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary=y\r\n"
                b"Content-Length: 9999\r\n\r\n--y\r\n"
            )
    assert predict(service, bird).status_code == 200
    assert 'status="499"' in httpx.get(service.url("/metrics")).text


@pytest.mark.slow
def test_an_upload_after_the_answer_ends(service: Service) -> None:
    with service.connect() as endless, contextlib.suppress(ConnectionError):
        deadline = time.monotonic() + PATIENCE
        endless.sendall(head(b"Content-Type: text/plain", b"Transfer-Encoding: chunked"))
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
