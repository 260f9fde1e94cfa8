"""Load on ``crossx serve``: throughput and latency compared with unbatched handlers, overload, abuse, memory.

All processes run on this machine and communicate over loopback: the service as started by its command, and two simple
handlers on the same FastAPI, uvicorn and predictor that process one image at a time: ``async`` on the event loop, and
``threads`` in FastAPI's thread pool. They are measured in turn. Each answer is compared with that of the predictor for
the same image: name, label, and probability, which is different for every image. No available load generator checks
answers (hey and wrk do not), so the script has its own, on aiohttp. If hey is installed (Debian: ``apt-get install
hey``), it sends one image as a cross-check of the throughput.

    CROSSX_DATA=DIR python benchmarks/serving.py RUN
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import csv
import io
import os
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import uvicorn
from fastapi import FastAPI, UploadFile

import harness

NAIVE = ("async", "threads")
CONCURRENCY = (1, 8, 64)
IMAGES = 64
TOLERANCE = 1e-3
"""Tolerance between a probability in a batch and without; different images differ by more."""


@dataclass(frozen=True)
class Sample:
    """An image and the expected answer."""

    name: str
    content: bytes
    label: str
    probability: float


@dataclass
class Outcome:
    """Results of requests: seconds of the correct ones, and counts of statuses and errors."""

    seconds: list[float] = field(default_factory=list)
    statuses: Counter[str] = field(default_factory=Counter)

    def to_json(self, elapsed: float) -> dict[str, Any]:
        milliseconds = [1000 * value for value in self.seconds] or [float("nan")]
        return {
            "requests_s": len(self.seconds) / elapsed,
            "p50_ms": statistics.median(milliseconds),
            "p99_ms": float(np.percentile(milliseconds, 99)),
            "statuses": dict(self.statuses),
        }


@dataclass(frozen=True)
class Server:
    """A server process."""

    process: subprocess.Popen[str]
    url: str

    @property
    def port(self) -> int:
        return int(self.url.rsplit(":", 1)[1])

    def memory(self) -> float:
        """Return the resident memory in megabytes."""
        status = Path(f"/proc/{self.process.pid}/status").read_text(encoding="utf-8")
        return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1000  # type: ignore[index]


def serve_naively(run: Path, kind: str) -> None:
    """Serve without batching: one image, one forward pass, one answer."""
    from crossx.cli.memory import keep_freed_memory
    from crossx.predict.predictor import Predictor

    keep_freed_memory()  # as in the command
    predictor = Predictor.load(run, device="cpu")
    app = FastAPI()

    def answer(images: UploadFile) -> dict[str, Any]:
        (best,) = predictor.classify([predictor.prepare(images.file.read())], 5)
        return {"predictions": [{"name": images.filename, "label": best[0][0], "probability": best[0][1]}]}

    async def on_the_loop(images: UploadFile) -> dict[str, Any]:
        return answer(images)

    app.add_api_route("/predict", on_the_loop if kind == "async" else answer, methods=["POST"])
    with socket.create_server(("127.0.0.1", 0), backlog=2048) as listening:
        print(f"http://127.0.0.1:{listening.getsockname()[1]}", flush=True)
        uvicorn.Server(uvicorn.Config(app, http="h11", log_level="warning")).run(sockets=[listening])


@contextlib.contextmanager
def serving(words: Sequence[str]) -> Iterator[Server]:
    """Start a process that prints its address, and stop it on exit."""
    with (
        tempfile.TemporaryFile("w") as log,
        subprocess.Popen(
            [sys.executable, *words], stdout=subprocess.PIPE, stderr=log, text=True,
            env={"OMP_WAIT_POLICY": "PASSIVE"} | os.environ,
        ) as process,
    ):  # fmt: skip
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            found = re.search(r"http://\S+", line)
            if found is None:
                raise SystemExit(f"{' '.join(words)} does not start.")
            yield Server(process, found[0])
        finally:
            process.terminate()
            process.wait()


def read_samples(run: Path, data: Path, number: int) -> list[Sample]:
    """Return images with the predictor's answers, all of different probability."""
    from crossx.data.image_files import find_images
    from crossx.predict.predictor import Predictor

    paths = find_images(data)
    chosen = paths[:: max(1, len(paths) // number)][:number]
    predictions = Predictor.load(run, device="cpu").predict(chosen)
    samples: dict[int, Sample] = {}
    for path, prediction in zip(chosen, predictions, strict=True):
        if prediction.rejected:
            continue
        assert prediction.label is not None
        assert prediction.probability is not None
        key = round(prediction.probability / TOLERANCE / 3)
        samples.setdefault(
            key, Sample(path.name, path.read_bytes(), prediction.label, prediction.probability)
        )
    return list(samples.values())


async def ask(session: aiohttp.ClientSession, server: Server, sample: Sample, outcome: Outcome) -> None:
    """Send one image and check its answer."""
    form = aiohttp.FormData()
    form.add_field("images", sample.content, filename=sample.name, content_type="image/jpeg")
    start = time.perf_counter()
    try:
        async with session.post(f"{server.url}/predict", data=form) as response:
            content = await response.json()
    except (aiohttp.ClientError, TimeoutError) as error:
        outcome.statuses[f"lost: {type(error).__name__}"] += 1
        return
    if response.status != 200:
        outcome.statuses[str(response.status)] += 1
        if response.status == 429 and "Retry-After" not in response.headers:
            outcome.statuses["429 without Retry-After"] += 1
        return
    (answer,) = content["predictions"]
    right = (answer["name"], answer["label"]) == (sample.name, sample.label)
    if right and abs(answer["probability"] - sample.probability) < TOLERANCE:
        outcome.statuses["200"] += 1
        outcome.seconds.append(time.perf_counter() - start)
    else:
        outcome.statuses["another image's answer"] += 1


def session(limit: int = 0) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=limit), timeout=aiohttp.ClientTimeout(total=120)
    )


async def closed_loop(
    server: Server, samples: Sequence[Sample], concurrency: int, going_on: Callable[[], bool]
) -> Outcome:
    """Keep ``concurrency`` requests under way while ``going_on``."""
    outcome = Outcome()

    async def one_client(client: aiohttp.ClientSession, number: int) -> None:
        while going_on():
            number += 1
            await ask(client, server, samples[number % len(samples)], outcome)

    async with session() as client:
        await asyncio.gather(*(one_client(client, 7 * number) for number in range(concurrency)))
    return outcome


async def open_loop(server: Server, samples: Sequence[Sample], rate: float, seconds: float) -> Outcome:
    """Send requests at times of a Poisson process, whatever becomes of those before."""
    outcome = Outcome()
    generator = np.random.default_rng(0)
    async with session() as client, asyncio.TaskGroup() as tasks:
        due = start = time.perf_counter()
        number = 0
        while due < start + seconds:
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            tasks.create_task(ask(client, server, samples[number % len(samples)], outcome))
            number += 1
            due += generator.exponential(1 / rate)
    return outcome


def during(seconds: float) -> Callable[[], bool]:
    end = time.perf_counter() + seconds
    return lambda: time.perf_counter() < end


def measure_load(
    servers: dict[str, Server], samples: Sequence[Sample], seconds: float, rounds: int
) -> dict[str, Any]:
    """Return requests per second and latencies of each server and concurrency: medians over the rounds."""
    found: dict[str, Any] = {}
    for concurrency in CONCURRENCY:
        measured: dict[str, list[dict[str, Any]]] = {name: [] for name in servers}
        for _ in range(rounds):
            for name, server in servers.items():
                start = time.perf_counter()
                outcome = asyncio.run(closed_loop(server, samples, concurrency, during(seconds)))
                measured[name].append(outcome.to_json(time.perf_counter() - start))
        found[str(concurrency)] = {
            name: {
                key: statistics.median(one[key] for one in results)
                for key in ("requests_s", "p50_ms", "p99_ms")
            }
            | {
                "statuses": dict(sum((Counter(one["statuses"]) for one in results), Counter())),
                "ratios": [
                    one["requests_s"] / other["requests_s"]
                    for one, other in zip(results, measured["service"], strict=True)
                ],
            }
            for name, results in measured.items()
        }
    return found


def measure_hey(
    servers: dict[str, Server], sample: Sample, seconds: float, concurrency: int
) -> dict[str, Any] | None:
    """Return the measurements of hey, another load generator, with one image; None if it is not installed."""
    if shutil.which("hey") is None:
        return None
    boundary = "x" * 30
    body = (
        (
            f'--{boundary}\r\nContent-Disposition: form-data; name="images"; filename="{sample.name}"\r\n'
            "Content-Type: image/jpeg\r\n\r\n"
        ).encode()
        + sample.content
        + f"\r\n--{boundary}--\r\n".encode()
    )
    found: dict[str, Any] = {}
    with tempfile.NamedTemporaryFile() as file:
        file.write(body)
        file.flush()
        for name, server in servers.items():
            command = [
                "hey", "-o", "csv", "-z", f"{seconds}s", "-c", str(concurrency), "-t", "120", "-m", "POST", "-D",
                file.name, "-T", f"multipart/form-data; boundary={boundary}", f"{server.url}/predict",
            ]  # fmt: skip
            told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            rows = list(csv.DictReader(io.StringIO(told)))
            outcome = Outcome(
                [float(row["response-time"]) for row in rows if row["status-code"] == "200"],
                Counter(row["status-code"] for row in rows),
            )
            found[name] = outcome.to_json(seconds)
    return found


def measure_overload(
    server: Server, samples: Sequence[Sample], capacity: float, seconds: float
) -> dict[str, Any]:
    """Send requests at twice the capacity of the service."""
    start = time.perf_counter()
    outcome = asyncio.run(open_loop(server, samples, 2 * capacity, seconds))
    found = outcome.to_json(time.perf_counter() - start)
    after = asyncio.run(closed_loop(server, samples, 8, during(2)))
    return {"sent_s": 2 * capacity, **found, "statuses_after": dict(after.statuses)}


def measure_memory(server: Server, samples: Sequence[Sample], requests: int) -> dict[str, Any]:
    """Return resident megabytes after each tenth of many requests."""
    megabytes = [server.memory()]
    outcome = Counter[str]()
    for _ in range(10):
        left = iter(range(requests // 10))
        outcome += asyncio.run(
            closed_loop(server, samples, 8, lambda left=left: next(left, None) is not None)  # type: ignore[misc]
        ).statuses
        megabytes.append(server.memory())
    return {"requests": requests, "statuses": dict(outcome), "resident_mb": megabytes}


def measure_abuse(server: Server, samples: Sequence[Sample], seconds: float) -> dict[str, Any]:
    """Run misbehaving clients of all kinds at once, next to four normal ones."""
    return asyncio.run(_abuse(server, samples, seconds))


async def _abuse(server: Server, samples: Sequence[Sample], seconds: float) -> dict[str, Any]:
    before, going_on = server.memory(), during(seconds)
    bad: dict[str, Counter[str]] = {name: Counter() for name in ATTACKS}

    async def attack(name: str) -> None:
        while going_on():
            bad[name][await _status(server, *ATTACKS[name](samples[0]))] += 1

    async with asyncio.TaskGroup() as tasks:
        for name in ATTACKS:
            for _ in range(20 if name.startswith(("slow", "aborted")) else 2):
                tasks.create_task(attack(name))
        good = await closed_loop(server, samples, 4, going_on)
    after = await closed_loop(server, samples, 4, during(2))
    return {
        "attacks": {name: dict(statuses) for name, statuses in bad.items()},
        "others": good.to_json(seconds),
        "statuses_after": dict(after.statuses),
        "resident_mb": [before, server.memory()],
    }


async def _status(server: Server, parts: Sequence[bytes], pause: float, patience: float) -> str:
    """Send parts with pauses between them, and return the status of what is answered."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    try:
        for part in parts:
            writer.write(part)
            await writer.drain()
            await asyncio.sleep(pause)
        line = await asyncio.wait_for(reader.readline(), patience)
        return line.split()[1].decode() if line else "closed"
    except TimeoutError:
        return "left"
    except ConnectionError:
        return "closed"
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


Attack = Callable[[Sample], tuple[Sequence[bytes], float, float]]


def _post(
    body: bytes, content_type: str = "multipart/form-data; boundary=y", length: int | None = None
) -> bytes:
    size = len(body) if length is None else length
    head = (
        "POST /predict HTTP/1.1\r\nHost: localhost\r\n"
        f"Content-Type: {content_type}\r\nContent-Length: {size}\r\n\r\n"
    )
    return head.encode() + body


def _file(content: bytes) -> bytes:
    return (
        b'--y\r\nContent-Disposition: form-data; name="images"; filename="x"\r\n\r\n'
        + content
        + b"\r\n--y--\r\n"
    )


def _bomb() -> bytes:
    """Return a PNG of 13 kilobytes that decodes to 100 megapixels."""
    from PIL import Image

    packed = io.BytesIO()
    Image.new("1", (10_000, 10_000)).save(packed, "PNG")
    return packed.getvalue()


ATTACKS: dict[str, Attack] = {
    "malformed head": lambda _: ([b"GARBAGE\r\nno colon here\r\n\r\n"], 0, 10),
    "endless head": lambda _: ([b"GET / HTTP/1.1\r\n" + b"X-A: " + 100_000 * b"a"], 0, 10),
    "malformed multipart": lambda _: ([_post(b"--z nonsense")], 0, 10),
    "malformed json": lambda _: ([_post(b'{"images": [', "application/json")], 0, 10),
    "wrong type": lambda sample: ([_post(sample.content, "text/plain")], 0, 10),
    "no image": lambda _: ([_post(_file(b"no image"))], 0, 10),
    "truncated image": lambda sample: ([_post(_file(sample.content[: len(sample.content) // 2]))], 0, 10),
    "bomb": lambda _: ([_post(_file(_BOMB))], 0, 10),
    "too large": lambda _: ([_post(b"", length=10**9)], 0, 10),
    "aborted upload": lambda sample: ([_post(_file(sample.content)[:2000], length=10**6)], 0.05, 0),
    "slow head": lambda _: ([b"POST /predict HTTP/1.1\r\n", *[b"X: y\r\n"] * 9], 0.7, 20),
    "slow body": lambda sample: (
        [_post(_file(sample.content)[:100], length=9999), *[b"x"] * 9],
        0.7,
        20,
    ),
}
_BOMB = _bomb()


def main() -> None:
    options = harness.parser(__doc__, "serving", runs=3)
    options.add_argument("model", type=Path, metavar="RUN", help="run folder")
    options.add_argument("--data", type=Path, help="folder of images (default: cub80 of $CROSSX_DATA)")
    options.add_argument("--seconds", type=float, default=6, help="seconds per measurement (default: 6)")
    options.add_argument(
        "--requests", type=int, default=10_000, help="for the memory measurement (default: 10000)"
    )
    options.add_argument("--naive", choices=NAIVE, help=argparse.SUPPRESS)
    given = options.parse_args()
    if given.naive:
        serve_naively(given.model, given.naive)
        return
    data = given.data or Path(os.environ["CROSSX_DATA"]) / "cub80"
    samples = read_samples(given.model, data, IMAGES)
    script = [str(Path(__file__)), str(given.model), "--naive"]
    service = ["-m", "crossx", "serve", str(given.model), "--port", "0", "--device", "cpu"]
    results: dict[str, Any] = {"run": given.model.name, "images": len(samples)}
    with contextlib.ExitStack() as stack:
        servers = {"service": stack.enter_context(serving(service))}
        servers |= {kind: stack.enter_context(serving([*script, kind])) for kind in NAIVE}
        for server in servers.values():
            asyncio.run(closed_loop(server, samples, 8, during(1)))
        results["load"] = measure_load(servers, samples, given.seconds, given.runs)
        results["hey"] = measure_hey(servers, samples[0], given.seconds, 8)
    with serving(service) as server:
        capacity = results["load"]["64"]["service"]["requests_s"]
        results["overload"] = measure_overload(server, samples, capacity, 2 * given.seconds)
        results["memory"] = measure_memory(server, samples, given.requests)
    with serving([*service, "--timeout", "5"]) as server:
        results["abuse"] = measure_abuse(server, samples, 2 * given.seconds)
        results["alive"] = server.process.poll() is None
    rows = [
        [
            concurrency,
            name,
            *(f"{one[key]:.1f}" for key in ("requests_s", "p50_ms", "p99_ms")),
            one["statuses"],
        ]
        for concurrency, by_name in results["load"].items()
        for name, one in by_name.items()
    ]
    print(harness.table(["concurrency", "server", "requests/s", "p50, ms", "p99, ms", "answers"], rows))
    for name in ("hey", "overload", "memory", "abuse"):
        print(f"\n{name}: {results[name]}")
    harness.write(given.output, results)


if __name__ == "__main__":
    main()
