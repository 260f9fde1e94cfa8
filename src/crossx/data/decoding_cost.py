"""Estimate what decoding an image costs from its bytes, without decoding it.

A file of 300 kB can keep a decoder busy for 16 seconds: each scan of a JPEG is a pass over all of its pixels
(https://libjpeg-turbo.org/pmwiki/uploads/About/TwoIssueswiththeJPEGStandard.pdf).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from crossx.data.images import FORMATS, ImageError, read_header

PASSES = {
    "JPEG": 4, "PNG": 9, "WEBP": 16, "GIF": 4, "BMP": 2, "TIFF": 9, "AVIF": 18, "JPEG2000": 120, "PPM": 2,
}  # fmt: skip
"""What a pixel of noise takes in each format at most, in units of a scan of a progressive JPEG (5 ns); in a JPEG the
scans are added. Measured by ``benchmarks/serving_attacks.py --costs``."""

MAX_SEGMENTS = 5_000
"""Segments of a JPEG; colour profiles and metadata have at most some hundreds."""

_START_OF_SCAN, _END_OF_IMAGE = 0xDA, 0xD9
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_NO_LENGTH = frozenset({0x01, 0xD8, *range(0xD0, 0xD8)})
_MARKER = re.compile(rb"\xff[^\x00\xff]")
_MARKER_IN_SCAN = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")


@dataclass(frozen=True)
class DecodingCost:
    """What decoding an image costs.

    Attributes:
        format: One of ``FORMATS``.
        height: Height in pixels.
        width: Width in pixels.
        scans: Scans of a JPEG; 0 for other formats.
    """

    format: str
    height: int
    width: int
    scans: int = 0

    @property
    def pixels(self) -> int:
        """Width times height."""
        return self.height * self.width

    @property
    def work(self) -> int:
        """Pixels times passes over them; a million take about 5 ms."""
        return self.pixels * (PASSES[self.format] + self.scans)


def decoding_cost(data: bytes, formats: tuple[str, ...] = FORMATS) -> DecodingCost:
    """Return what decoding an image costs, by its header and the markers of a JPEG.

    Raises:
        ImageError: As ``read_header``; if a JPEG has more than ``MAX_SEGMENTS`` segments or contradicts its header.
    """
    kind, height, width = read_header(data, formats)
    if kind != "JPEG":
        return DecodingCost(kind, height, width)
    scans, frames = _jpeg_markers(data)
    if any(frame != (height, width) for frame in frames):
        raise _refused("is a JPEG with several sizes in its header")
    return DecodingCost(kind, height, width, scans)


def _jpeg_markers(data: bytes) -> tuple[int, list[tuple[int, int]]]:
    """Return the number of scans and the sizes (height, width) of the frames up to the end of the first image.

    Reads markers as libjpeg does: what is not a marker is skipped, segments by their length. Markers in metadata, such
    as those of a thumbnail, and behind the image, such as those of a video, do not count.
    """
    frames: list[tuple[int, int]] = []
    scans, position, in_scan = 0, 2, False
    for _ in range(MAX_SEGMENTS):
        found = (_MARKER_IN_SCAN if in_scan else _MARKER).search(data, position)
        if found is None or (marker := found[0][1]) == _END_OF_IMAGE:
            return scans, frames
        position = found.end()
        if marker in _NO_LENGTH:
            continue
        if marker < 0xC0:
            # libjpeg stops at it, or skips it while it looks for a restart marker
            continue
        if marker in _FRAMES:
            size = data[position + 3 : position + 7]
            frames.append((int.from_bytes(size[:2]), int.from_bytes(size[2:])))
        in_scan = marker == _START_OF_SCAN
        scans += in_scan
        position += int.from_bytes(data[position : position + 2])
    raise _refused(f"is a JPEG of more than {MAX_SEGMENTS:,} segments")


def _refused(reason: str) -> ImageError:
    return ImageError(f"image data: {reason}", reason)
