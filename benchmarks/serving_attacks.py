"""Requests of other clients while one client sends images that are expensive to decode.

The service runs as started by its command. Four well-behaved clients at 127.0.0.1 send one image after another, while
an attacker at 127.0.0.2 keeps two requests under way, each with as many expensive images as one may have. Their
latencies are compared with those without an attacker.

    python benchmarks/serving_attacks.py RUN IMAGE
    python benchmarks/serving_attacks.py --costs         # seconds per pixel of the formats
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import io
import json
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
from PIL import Image, ImageFile

import harness
from serving import Outcome, Server, during, serving

SIDE = 7000
GOOD_CLIENTS, BAD_REQUESTS = 4, 2
ATTACKER = "127.0.0.2"


def progressive(scans: int, side: int = SIDE) -> bytes:
    """Return a JPEG whose last scan, which holds next to nothing, comes again and again."""
    file = io.BytesIO()
    Image.new("RGB", (side, side), (90, 120, 60)).save(file, "JPEG", progressive=True, quality=30)
    content = file.getvalue()
    has = content.count(b"\xff\xda")
    scan = content[content.rindex(b"\xff\xda") : -2]
    return content[:-2] + (scans - has) * scan + content[-2:]


def png_of_profiles(size: int) -> bytes:
    """Return a tiny PNG with thousands of compressed colour profiles of a megabyte each."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    file = io.BytesIO()
    Image.new("RGB", (64, 64)).save(file, "PNG")
    content = file.getvalue()
    profile = chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(1_000_000)))
    at = content.index(b"IDAT") - 4
    return content[:at] + size // len(profile) * profile + content[at:]


def jpeg_of_fill(size: int) -> bytes:
    """Return a tiny JPEG with megabytes of fill bytes before its first segment."""
    file = io.BytesIO()
    Image.new("RGB", (64, 64)).save(file, "JPEG")
    return file.getvalue()[:2] + size * b"\xff" + file.getvalue()[2:]


def flat_png(side: int = SIDE) -> bytes:
    """Return a PNG of few bytes and many pixels."""
    file = io.BytesIO()
    Image.new("L", (side, side)).save(file, "PNG")
    return file.getvalue()


ATTACKS: dict[str, Callable[[], list[bytes]]] = {
    "none": list,
    "98 scans": lambda: 32 * [progressive(98)],
    "12 scans": lambda: 2 * [progressive(12)],
    "49 megapixels": lambda: 32 * [flat_png()],
    "profiles": lambda: [png_of_profiles(15_000_000)],
    "fill bytes": lambda: [jpeg_of_fill(15_000_000)],
}


def measure(server: Server, image: bytes, images: list[bytes], seconds: float) -> dict[str, Any]:
    """Return latencies and statuses of the well-behaved clients, and the attacker's statuses."""
    return asyncio.run(_measure(server, image, images, seconds))


async def _measure(server: Server, image: bytes, images: list[bytes], seconds: float) -> dict[str, Any]:
    good, bad = Outcome(), Counter[str]()

    async def behave(client: aiohttp.ClientSession) -> None:
        while going_on():
            start = time.perf_counter()
            status = await _send(client, server, [image])
            good.statuses[status] += 1
            good.seconds.append(time.perf_counter() - start)
            await asyncio.sleep(0.05)

    async def attack(client: aiohttp.ClientSession) -> None:
        while True:
            bad[await _send(client, server, images)] += 1
            await asyncio.sleep(0.05)

    async with _client() as one, _client(ATTACKER) as other:
        attacks = [asyncio.create_task(attack(other)) for _ in range(BAD_REQUESTS if images else 0)]
        await asyncio.sleep(2 if images else 0)
        going_on = during(seconds)
        start = time.perf_counter()
        await asyncio.gather(*(behave(one) for _ in range(GOOD_CLIENTS)))
        elapsed = time.perf_counter() - start
        for task in attacks:
            task.cancel()
        await asyncio.gather(*attacks, return_exceptions=True)
    return {
        **good.to_json(elapsed),
        "max_ms": 1000 * max(good.seconds),
        "attacker": dict(bad),
        "resident_mb": server.memory(),
    }


def _client(address: str = "127.0.0.1") -> aiohttp.ClientSession:
    connector = aiohttp.TCPConnector(limit=0, local_addr=(address, 0))
    return aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=120))


async def _send(client: aiohttp.ClientSession, server: Server, images: list[bytes]) -> str:
    form = aiohttp.FormData()
    for content in images:
        form.add_field("images", content, filename="x", content_type="image/jpeg")
    try:
        async with client.post(f"{server.url}/predict", data=form) as response:
            await response.read()
            return str(response.status)
    except (aiohttp.ClientError, TimeoutError) as error:
        return f"lost: {type(error).__name__}"


def costs(side: int = 1000) -> dict[str, float]:
    """Return nanoseconds of CPU per pixel to read noise in each format, the slowest kind of image."""
    from crossx.data.images import read_image

    ImageFile.MAXBLOCK = 2**26  # the encoder's buffer
    pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    noise = Image.fromarray(pixels)
    kinds: dict[str, tuple[str, dict[str, Any]]] = {
        "JPEG": ("JPEG", {"quality": 95, "subsampling": 0}),
        "progressive JPEG": ("JPEG", {"quality": 95, "subsampling": 0, "progressive": True}),
        "PNG": ("PNG", {}), "WEBP": ("WEBP", {"quality": 90}), "lossless WEBP": ("WEBP", {"lossless": True}),
        "GIF": ("GIF", {}), "BMP": ("BMP", {}), "TIFF": ("TIFF", {"compression": "tiff_lzw"}),
        "AVIF": ("AVIF", {"quality": 90}), "JPEG2000": ("JPEG2000", {}), "PPM": ("PPM", {}),
    }  # fmt: skip
    found = {}
    for name, (kind, options) in kinds.items():
        file = io.BytesIO()
        noise.save(file, kind, **options)
        read_image(file.getvalue())
        start = time.process_time()
        read_image(file.getvalue())
        found[name] = 1e9 * (time.process_time() - start) / side**2
    start = time.process_time()
    few = read_image(progressive(10, 2000))
    middle = time.process_time()
    read_image(progressive(98, 2000))
    found["scan of a JPEG"] = 1e9 * (time.process_time() - 2 * middle + start) / 88 / few[0].numel()
    return found


@contextlib.contextmanager
def started(run: Path) -> Iterator[Server]:
    with serving(["-m", "crossx", "serve", str(run), "--port", "0", "--device", "cpu"]) as server:
        yield server


def main() -> None:
    options = harness.parser(__doc__, "serving_attacks", runs=1)
    options.add_argument("model", type=Path, metavar="RUN", nargs="?", help="run folder")
    options.add_argument("image", type=Path, metavar="IMAGE", nargs="?", help="image that the others send")
    options.add_argument("--seconds", type=float, default=20, help="seconds per attack (default: 20)")
    options.add_argument("--attack", choices=ATTACKS, nargs="*", help="attacks (default: all)")
    options.add_argument(
        "--name", default="now", help="name of the measurement in the JSON file (default: now)"
    )
    options.add_argument("--costs", action="store_true", help="measure the formats instead")
    given: argparse.Namespace = options.parse_args()
    results: dict[str, Any] = {}
    if given.output.exists():
        results = json.loads(given.output.read_text(encoding="utf-8"))
        del results["machine"]
    if given.costs:
        results["nanoseconds_per_pixel"] = costs()
        print(
            harness.table(
                ["format", "ns per pixel"],
                [[k, f"{v:.1f}"] for k, v in results["nanoseconds_per_pixel"].items()],
            )
        )
    else:
        measured: dict[str, Any] = {}
        for name in given.attack or ATTACKS:
            with started(given.model) as server:
                measured[name] = measure(server, given.image.read_bytes(), ATTACKS[name](), given.seconds)
            print(name, measured[name], flush=True)
        results[given.name] = measured
    harness.write(given.output, results)


if __name__ == "__main__":
    main()
