"""What the service takes at most."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from crossx.errors import UsageError

MEGABYTE = 1_000_000
MAX_WORKERS = 8


@dataclass(frozen=True)
class Limits:
    """Bounds of the service; with them its memory is bounded too.

    Attributes:
        max_batch: Most images a step of the network.
        max_wait_ms: Milliseconds that a decoded image waits at most for others that are being decoded.
        queue: Most images accepted and not answered.
        max_upload_mb: Most megabytes (10^6 bytes) of a request's body.
        max_pixels: Most pixels of an image, by its header; larger ones are not decoded.
        timeout: Seconds that a client has for a request's head, and again for its body; and that the answer may take.
        workers: Threads that decode.
    """

    max_batch: int = 16
    max_wait_ms: int = 5
    queue: int = 128
    max_upload_mb: int = 16
    max_pixels: int = 50_000_000
    timeout: int = 30
    workers: int = field(default_factory=lambda: min(MAX_WORKERS, os.cpu_count() or 1))

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < (least := 0 if name == "max_wait_ms" else 1):
                raise UsageError(f"{name} must be at least {least}, not {value}.")

    @property
    def max_images(self) -> int:
        """Most images a request."""
        return min(32, self.queue)

    @property
    def max_explanations(self) -> int:
        """Most explanations accepted and not answered: each takes the time of many predictions."""
        return min(4, self.queue)

    @property
    def max_body(self) -> int:
        """Most bytes of a request's body."""
        return self.max_upload_mb * MEGABYTE

    @property
    def max_bodies(self) -> int:
        """Most bytes of all requests' bodies that are held at once."""
        return 16 * self.max_body
