"""What decoding costs, estimated from bytes; compared with what Pillow reads of the same files."""

import io
import zlib

import pytest
from PIL import Image

from crossx.data.decoding_cost import MAX_SEGMENTS, decoding_cost
from crossx.data.images import HEADER_READS, ImageError, read_image


def encoded(kind: str, size: tuple[int, int] = (48, 40), **options: object) -> bytes:
    file = io.BytesIO()
    Image.linear_gradient("L").resize(size).convert("RGB").save(file, kind, **options)
    return file.getvalue()


def segment(marker: int, content: bytes) -> bytes:
    return bytes([0xFF, marker]) + (len(content) + 2).to_bytes(2) + content


def after_start(jpeg: bytes, *segments: bytes) -> bytes:
    return jpeg[:2] + b"".join(segments) + jpeg[2:]


PROGRESSIVE = encoded("JPEG", progressive=True)
SCANS = 10
"""Scans of a progressive colour JPEG of libjpeg (jcparam.c, jpeg_simple_progression)."""


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM"])
def test_size_and_format_are_those_of_the_image(kind: str) -> None:
    cost = decoding_cost(encoded(kind))
    assert (cost.format, cost.width, cost.height) == (kind, 48, 40)
    assert cost.scans == (kind == "JPEG")
    assert cost.work > cost.pixels


@pytest.mark.parametrize(
    "content",
    [
        PROGRESSIVE,
        PROGRESSIVE + b"\xff\xda\0\2" * 500,  # a video behind the image
        after_start(PROGRESSIVE, segment(0xE1, b"Exif\0\0" + PROGRESSIVE)),  # a thumbnail
        after_start(PROGRESSIVE, segment(0xFE, b"\xff\xda" * 500)),
        after_start(PROGRESSIVE, b"\xff" * 500),  # fill bytes
        encoded("JPEG", progressive=True, restart_marker_blocks=1),
    ],
)  # fmt: skip
def test_only_the_scans_of_the_image_count(content: bytes) -> None:
    assert decoding_cost(content).scans == SCANS
    read_image(content)


def test_scans_cannot_be_hidden() -> None:
    """libjpeg finds a scan behind garbage, and behind a marker without a segment."""
    start, end = PROGRESSIVE.rindex(b"\xff\xda"), len(PROGRESSIVE) - 2
    scan = PROGRESSIVE[start:end]
    for before in (
        b"",
        b"garbage",
        b"\xff\xd0",
        b"\xff\x01",
        b"\xff\xff\xff",
        b"\xff\0",
        b"\xff\x02\xff\xff",
    ):
        content = PROGRESSIVE[:end] + 5 * (before + scan) + PROGRESSIVE[end:]
        assert decoding_cost(content).scans == SCANS + 5, before


def test_a_jpeg_with_two_sizes_is_refused() -> None:
    """Pillow takes 00 00 for fill bytes, libjpeg does not, so that they read different frames."""
    small = encoded("JPEG", (16, 16))
    frame = small[small.index(b"\xff\xc0") :][:19]
    with pytest.raises(ImageError, match="several sizes"):
        decoding_cost(after_start(encoded("JPEG", (640, 640)), frame))


def png_with(*chunks: tuple[bytes, bytes]) -> bytes:
    content = encoded("PNG")
    at = content.index(b"IDAT") - 4
    made = b"".join(
        len(data).to_bytes(4) + kind + data + zlib.crc32(kind + data).to_bytes(4) for kind, data in chunks
    )
    return content[:at] + made + content[at:]


@pytest.mark.parametrize(
    "content",
    [
        after_start(encoded("JPEG"), b"\xff" * 2 * HEADER_READS),
        after_start(encoded("JPEG"), *[segment(0xE1, b"")] * HEADER_READS),
        png_with(*[(b"prVt", b"")] * HEADER_READS),
        png_with(*[(b"tEXt", b"a\0b")] * HEADER_READS),
        encoded("GIF")[:13] + b"\1" * 2 * HEADER_READS,
    ],
    ids=["fill", "segments", "chunks", "texts", "junk"],
)  # fmt: skip
def test_a_header_of_very_many_pieces_is_refused(content: bytes) -> None:
    with pytest.raises(ImageError, match="too many pieces"):
        decoding_cost(content)


def test_segments_between_scans_are_bounded() -> None:
    end = len(PROGRESSIVE) - 2
    with pytest.raises(ImageError, match="more than 5,000 segments"):
        decoding_cost(PROGRESSIVE[:end] + MAX_SEGMENTS * segment(0xFE, b"") + PROGRESSIVE[end:])


def test_a_bitmap_of_very_many_runs_is_refused() -> None:
    """Pillow decodes runs of a BMP in Python."""
    side = 1000
    head = bytearray(54 + 1024)
    head[:2], head[10:14], head[14:18] = b"BM", (54 + 1024).to_bytes(4, "little"), (40).to_bytes(4, "little")
    head[18:22] = head[22:26] = side.to_bytes(4, "little")
    head[26], head[28], head[30], head[46:50] = 1, 8, 1, (256).to_bytes(4, "little")
    with pytest.raises(ImageError, match="too many pieces"):
        read_image(bytes(head) + b"\1\5" * side * side)


def test_formats_that_are_not_allowed_are_not_opened() -> None:
    for kind in ("TIFF", "JPEG2000", "PPM"):
        with pytest.raises(ImageError, match=f"is a {kind} image, which is not accepted: send JPEG or PNG"):
            decoding_cost(encoded(kind), ("JPEG", "PNG"))
    for formats, named in ((("WEBP",), "WebP"), (("PPM", "JPEG2000", "GIF"), "PNM, JPEG 2000 or GIF")):
        with pytest.raises(ImageError, match=f"is not a {named} image, or"):
            decoding_cost(b"no image at all", formats)
    with pytest.raises(ImageError, match="is not a JPEG or PNG image, or its header is broken"):
        decoding_cost(b"no image at all", ("JPEG", "PNG"))
