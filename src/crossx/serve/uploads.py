"""Read images from request bodies, with limits on size and time."""

from __future__ import annotations

import asyncio
import base64
import binascii
import os
import re
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from ipaddress import IPv6Address, ip_address
from urllib.parse import unquote

from fastapi import HTTPException, Request
from fastapi.concurrency import run_in_threadpool
from pydantic import ValidationError
from python_multipart.multipart import parse_options_header
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from crossx.data.decoding_cost import decoding_cost
from crossx.data.images import ImageError, printable
from crossx.schema.base import shown
from crossx.serve.fairness import Capacity, ShareError
from crossx.serve.limits import Limits, share
from crossx.serve.schemas import PredictRequest

MAX_SCANS = 100
"""Scans per JPEG, whatever its size. A progressive JPEG has about ten."""
MAX_NAME = 255
_CHARSETS = ("utf-8", "utf8", "us-ascii", "ascii", "iso-8859-1", "latin-1")
_DATA_URL = re.compile(r"\s*data:[^,]*,", re.IGNORECASE)


@dataclass(frozen=True)
class Upload:
    """One image of a request.

    Attributes:
        name: File name as sent by the client.
        data: An image file, or its base64.
    """

    name: str | None
    data: bytes | str

    def check(self, limits: Limits) -> CheckedUpload:
        """Check the image's header.

        Raises:
            ImageError: If it is not valid base64, not an image, or too expensive to decode.
        """
        data = self.data if isinstance(self.data, bytes) else from_base64(self.data)
        cost = decoding_cost(data, tuple(limits.formats))
        if cost.pixels > limits.max_pixels:
            raise ImageError(
                f"has {cost.width} x {cost.height} pixels, more than the limit of {limits.max_pixels:,}"
            )
        if cost.scans > MAX_SCANS:
            raise ImageError(f"is a JPEG of more than {MAX_SCANS} scans")
        if cost.work > limits.max_work:
            kind = f"{cost.scans} scans of a JPEG" if cost.scans else cost.format
            raise ImageError(
                f"takes too long to decode ({cost.width} x {cost.height} pixels in {kind}): make it smaller"
            )
        return CheckedUpload(data, cost.work)


@dataclass(frozen=True)
class CheckedUpload:
    """An image file that may be decoded.

    Attributes:
        data: The file.
        work: See ``DecodingCost.work``.
    """

    data: bytes
    work: int


@dataclass(frozen=True)
class Form:
    """The parsed body of a request.

    Attributes:
        uploads: Its images.
        top: Classes per image, if the body has it.
    """

    uploads: list[Upload]
    top: int | None = None


class _InMemoryParser(MultiPartParser):
    """Keeps files in memory, bounded by the body's limit; writes nothing to disk."""

    spool_max_size = 0
    cut_off = False
    """Whether parts have begun and the closing boundary has not been read."""

    def on_part_begin(self) -> None:
        self.cut_off = True
        super().on_part_begin()

    def on_end(self) -> None:
        self.cut_off = False
        super().on_end()


class BodyReader:
    """Reads request bodies, with limits on each body and on all together."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._bytes = Capacity(limits.max_bodies, share(limits.max_bodies, limits.max_body))

    @asynccontextmanager
    async def form(self, request: Request, max_images: int) -> AsyncIterator[Form]:
        """Read a request's body; its bytes count towards the limit on all bodies until the block ends.

        Raises:
            HTTPException: 400 for a malformed body, 408 on a timeout, 413 for too many bytes or images, 415 for another
                content type, 422 for a body without images, 429 if the bodies of the client, or all together, are too
                large.
            ClientDisconnect: If the client disconnects.
        """
        received = _Count()
        try:
            form = await self._receive(request, received, max_images)
            if not form.uploads:
                raise HTTPException(422, "there is no image: send files in the field `images`.")
            yield form
        finally:
            self._bytes.give(client_of(request), received.bytes)

    async def _receive(self, request: Request, received: _Count, max_images: int) -> Form:
        seconds = self._limits.timeout
        try:
            async with asyncio.timeout(seconds):
                return await self._parse(request, received, max_images)
        except TimeoutError:
            raise HTTPException(
                408, f"the body was not received within {seconds} s.", {"Connection": "close"}
            ) from None

    async def _parse(self, request: Request, received: _Count, max_images: int) -> Form:
        content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if request.headers.get("content-encoding", "identity").strip().lower() != "identity":
            raise HTTPException(415, "the body must not be compressed: images are.")
        async with aclosing(self._chunks(request, received)) as chunks:
            if content_type == "multipart/form-data":
                return await _multipart(request, chunks, max_images)
            if content_type == "application/json":
                body = b"".join([chunk async for chunk in chunks])
                return await run_in_threadpool(_json, body, max_images)
            if content_type.startswith("image/") or content_type == "application/octet-stream":
                body = b"".join([chunk async for chunk in chunks])
                return Form([Upload(None, body)] if body else [])
        raise HTTPException(
            415,
            "the body must be multipart/form-data or application/json, or an image with its type, image/jpeg say.",
        )

    async def _chunks(self, request: Request, received: _Count) -> AsyncGenerator[bytes]:
        too_large = HTTPException(413, f"the body is larger than {self._limits.max_upload_mb} MB.")
        if int(request.headers.get("content-length", 0)) > self._limits.max_body:
            raise too_large
        async for chunk in request.stream():
            if received.bytes + len(chunk) > self._limits.max_body:
                raise too_large
            try:
                self._bytes.take(client_of(request), len(chunk))
            except ShareError:
                raise HTTPException(
                    429, "too many uploads in progress; try again.", {"Retry-After": "1"}
                ) from None
            received.bytes += len(chunk)
            yield chunk


def client_of(request: Request) -> str:
    """Return what identifies a request's client, see ``network_of``."""
    return network_of(request.client.host if request.client else "")


def network_of(host: str) -> str:
    """Return an IPv4 address itself, of an IPv6 address its network (/64), all of which one client may have."""
    try:
        address = ip_address(host.partition("%")[0])
    except ValueError:
        return host
    if address.version == 4:
        return str(address)
    return str(address.ipv4_mapped or IPv6Address(int(address) >> 64 << 64))


@dataclass
class _Count:
    bytes: int = 0


async def _multipart(request: Request, chunks: AsyncGenerator[bytes], max_images: int) -> Form:
    _, options = parse_options_header(request.headers["content-type"])
    charset = options.get(b"charset", b"utf-8").decode("latin-1")
    if charset.lower().replace("_", "-") not in _CHARSETS:
        raise HTTPException(400, "the charset of multipart/form-data must be utf-8.")
    parser = _InMemoryParser(request.headers, chunks, max_files=max_images, max_fields=max_images)
    try:
        form = await parser.parse()
    except MultiPartException as error:
        code = 413 if error.message.startswith("Too many") else 400
        raise HTTPException(code, f"{printable(error.message).rstrip('.')}.") from error
    try:
        if parser.cut_off:
            raise HTTPException(400, "the body is cut off: it ends before its closing boundary.")
        files = form.getlist("images")
        if not all(isinstance(file, UploadFile) for file in files):
            raise HTTPException(422, "`images` must be files: give each a file name.")
        other = next((name for name in form if name != "images"), None)
        if files and other is not None:
            raise HTTPException(
                422,
                f"{shown(other)}: no field of the form: send files in `images`, and all else in the query.",
            )
        return Form(
            [Upload(_name(file), await file.read()) for file in files if isinstance(file, UploadFile)]
        )
    finally:
        await form.close()


def _json(body: bytes, max_images: int) -> Form:
    try:
        content = PredictRequest.model_validate_json(body)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, problem["loc"]))
        code = 400 if problem["type"] == "json_invalid" else 422
        raise HTTPException(
            code, printable(f"{where}: {problem['msg']}." if where else f"{problem['msg']}.")
        ) from error
    if len(content.images) > max_images:
        raise HTTPException(
            413, f"this request may have at most {max_images} images, not {len(content.images)}."
        )
    return Form([Upload(None, image) for image in content.images], content.top)


def _name(file: UploadFile) -> str | None:
    """Return a file's name without folders, printable on one line."""
    name = os.path.basename((file.filename or "").replace("\\", "/"))
    return printable(name)[:MAX_NAME] or None


def from_base64(text: str) -> bytes:
    """Decode base64 in any of its usual forms.

    A data URL, line breaks and spaces, the URL-safe alphabet (RFC 4648, section 5) and missing padding are accepted.

    Raises:
        ImageError: If it is none of them.
    """
    if (url := _DATA_URL.match(text)) is not None:
        if not url[0].rstrip(", \t").lower().endswith(";base64"):
            raise ImageError("is a data URL without ;base64")
        text = unquote(text[url.end() :])
    plain = text.translate(_TO_PLAIN).rstrip("=")
    try:
        # one character too many is an error, which padding must not hide
        return base64.b64decode(plain + "=" * (-len(plain) % 4 if len(plain) % 4 != 1 else 0), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ImageError("is not base64") from error


_TO_PLAIN = str.maketrans("-_", "+/", " \t\r\n\v\f")
