"""Limits of the service."""

from __future__ import annotations

import os
import resource
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated

from crossx.errors import UsageError, check_choice

MEGABYTE = 1_000_000
MAX_WORKERS = 8


@dataclass(frozen=True)
class Limits:
    """Limits of the service, which also bound its memory.

    Attributes:
        max_batch: Images per batch.
        max_wait_ms: Milliseconds that a decoded image waits for others that are being decoded.
        queue: Images accepted and not answered.
        max_upload_mb: Megabytes (10^6 bytes) of a request's body.
        max_pixels: Pixels per image, by its header; larger images are not decoded.
        formats: Formats of images, of JPEG, PNG, WEBP, GIF, BMP, AVIF, TIFF, JPEG2000 and PPM.
        timeout: Seconds for a request's head, its body and the response, each.
        workers: Threads that decode.
    """

    max_batch: int = 16
    max_wait_ms: int = 5
    queue: int = 128
    max_upload_mb: int = 16
    max_pixels: int = 50_000_000
    formats: Sequence[Annotated[str, "FORMAT"]] = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "AVIF")
    timeout: int = 30
    workers: int = field(default_factory=lambda: min(MAX_WORKERS, os.cpu_count() or 1))

    def __post_init__(self) -> None:
        if not self.formats:
            raise UsageError("formats must name at least one format.")
        if self.formats != Limits.formats:
            from crossx.data.images import FORMATS  # slow to import, and `--help` does not need it

            for name in self.formats:
                check_choice("format", name, FORMATS)
        for name, value in vars(self).items():
            if isinstance(value, int) and value < (least := 0 if name == "max_wait_ms" else 1):
                raise UsageError(f"{name} must be at least {least}, not {value}.")

    @property
    def max_images(self) -> int:
        """Images per request."""
        return min(32, self.queue)

    @property
    def max_explanations(self) -> int:
        """Explanations in progress; each takes as long as many predictions."""
        return min(4, self.queue)

    @property
    def max_work(self) -> int:
        """Work (``DecodingCost.work``) of decoding an image."""
        return 16 * self.max_pixels

    @property
    def max_request_work(self) -> int:
        """Work of decoding all images of a request."""
        return 2 * self.max_work

    @property
    def light_work(self) -> int:
        """Work of decoding an image above which it waits in the queue for large images."""
        return self.max_work // 16

    @property
    def max_body(self) -> int:
        """Bytes of a request's body."""
        return self.max_upload_mb * MEGABYTE

    @property
    def max_bodies(self) -> int:
        """Bytes of the bodies of all requests together."""
        return 16 * self.max_body

    @property
    def max_connections(self) -> int:
        """Open connections, within the number of files that the process may open."""
        return min(1000, max(16, resource.getrlimit(resource.RLIMIT_NOFILE)[0] - 64))


def share(total: int, least: int = 1) -> int:
    """Return what one client may hold of a capacity: three quarters, at least ``least``."""
    return max(least, 3 * total // 4)
