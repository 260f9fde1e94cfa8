"""Read images from request bodies, with limits on size and time."""

from __future__ import annotations

import asyncio
import base64
import binascii
import os
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass

from fastapi import HTTPException, Request
from fastapi.concurrency import run_in_threadpool
from pydantic import ValidationError
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from crossx.data.images import ImageError, printable, read_size
from crossx.serve.limits import Limits
from crossx.serve.schemas import PredictRequest

MAX_SCANS = 100
"""Scans per JPEG. A progressive JPEG has about ten; each costs a pass over all pixels, so that thousands of empty scans
would keep the decoder busy for hours (https://libjpeg-turbo.org/pmwiki/uploads/About/TwoIssueswiththeJPEGStandard.pdf)."""
MAX_NAME = 255
_START_OF_SCAN = b"\xff\xda"


@dataclass(frozen=True)
class Upload:
    """One image of a request.

    Attributes:
        name: File name as sent by the client.
        data: An image file, or its base64.
    """

    name: str | None
    data: bytes | str

    def content(self, max_pixels: int) -> bytes:
        """Return the image file after checking its header.

        Raises:
            ImageError: If it is not valid base64, not an image, or too expensive to decode.
        """
        if isinstance(self.data, bytes):
            data = self.data
        else:
            try:
                data = base64.b64decode(self.data, validate=True)
            except (binascii.Error, ValueError) as error:
                raise ImageError("is not base64") from error
        height, width = read_size(data)
        if height * width > max_pixels:
            raise ImageError(f"has {width} x {height} pixels, more than the limit of {max_pixels:,}")
        if data.startswith(b"\xff\xd8") and data.count(_START_OF_SCAN) > MAX_SCANS:
            raise ImageError(f"is a JPEG of more than {MAX_SCANS} scans")
        return data


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


class BodyReader:
    """Reads request bodies, with limits on each body and on all together."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._held = 0

    @asynccontextmanager
    async def form(self, request: Request, max_images: int) -> AsyncIterator[Form]:
        """Read a request's body; its bytes count towards the limit on all bodies until the block ends.

        Raises:
            HTTPException: 400 for a malformed body, 408 on a timeout, 413 for too many bytes or images, 415 for another
                content type, 422 for a body without images, 429 if all bodies together are too large.
            ClientDisconnect: If the client disconnects.
        """
        received = _Count()
        try:
            form = await self._receive(request, received, max_images)
            if not form.uploads:
                raise HTTPException(422, "there is no image: send files in the field `images`.")
            yield form
        finally:
            self._held -= received.bytes

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
        async with aclosing(self._chunks(request, received)) as chunks:
            if content_type == "multipart/form-data":
                return await _multipart(request, chunks, max_images)
            if content_type == "application/json":
                body = b"".join([chunk async for chunk in chunks])
                return await run_in_threadpool(_json, body, max_images)
        raise HTTPException(415, "the body must be multipart/form-data or application/json.")

    async def _chunks(self, request: Request, received: _Count) -> AsyncGenerator[bytes]:
        too_large = HTTPException(413, f"the body is larger than {self._limits.max_upload_mb} MB.")
        if int(request.headers.get("content-length", 0)) > self._limits.max_body:
            raise too_large
        async for chunk in request.stream():
            if received.bytes + len(chunk) > self._limits.max_body:
                raise too_large
            if self._held + len(chunk) > self._limits.max_bodies:
                raise HTTPException(429, "too many uploads in progress; try again.", {"Retry-After": "1"})
            self._held += len(chunk)
            received.bytes += len(chunk)
            yield chunk


@dataclass
class _Count:
    bytes: int = 0


async def _multipart(request: Request, chunks: AsyncGenerator[bytes], max_images: int) -> Form:
    parser = _InMemoryParser(request.headers, chunks, max_files=max_images, max_fields=max_images)
    try:
        form = await parser.parse()
    except MultiPartException as error:
        code = 413 if error.message.startswith("Too many") else 400
        raise HTTPException(code, f"{printable(error.message).rstrip('.')}.") from error
    try:
        files = form.getlist("images")
        if not all(isinstance(file, UploadFile) for file in files):
            raise HTTPException(422, "`images` must be files: give each a file name.")
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
