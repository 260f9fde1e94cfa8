"""Check and decode image files.

Plain JPEGs are decoded by simplejpeg: the same library as Pillow's (libjpeg-turbo) and the same pixels, but directly to
RGB bytes, in two thirds of the time. Everything else, and every JPEG with a defect, is left to Pillow, which reads it
or says why not. No image is decoded before its size is known from the header.
"""

from __future__ import annotations

import functools
import io
import os
import re
import stat
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import simplejpeg
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError

from crossx.errors import CrossXError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

MAX_PIXELS = 178_956_970
"""Images with more pixels (half a gigabyte of 8-bit RGB) are refused before they are decoded. This is Pillow's limit
for a decompression bomb (https://pillow.readthedocs.io/en/stable/reference/Image.html#PIL.Image.open)."""

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM")
"""Pillow's names of the formats that are read. It also opens EPS, by running another program, and formats without
photographs; these are not tried."""

HEADER_READS, IMAGE_READS = 10_000, 250_000
HEADER_SECONDS, SECONDS_PER_PIXEL = 0.3, 2e-7
"""Limits on Pillow's parsers for an image in memory: reads, and seconds of CPU for the header and for each pixel. A
million empty chunks or fill bytes, or thousands of compressed profiles, would take up to 40 s. A photograph has at most
a few thousand pieces, and needs at most a quarter of the seconds."""

_ORIENTATIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""Inverse of each EXIF orientation (tag 0x0112; https://www.cipa.jp/std/documents/e/DC-X008-Translation-2019-E.pdf)."""

_BITS_PER_SAMPLE = 258  # TIFF tag

_HEIF_BRANDS = frozenset(
    {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"mif2", b"msf1"}
)
"""https://nokiatech.github.io/heif/technical.html"""

_NO_RANGE = (
    "its pixels are signed or have 32 bits, without a fixed range: save it with 8 or 16 bits per channel"
)

_SIDEWAYS = tuple(_ORIENTATIONS[orientation] for orientation in (5, 6, 7, 8))

ImageSource: TypeAlias = str | Path | bytes
"""A file's path, or the bytes of an encoded image."""


class ImageError(CrossXError):
    """An image cannot be read. The message is ``PATH: reason``, on one line.

    Attributes:
        reason: The message without the path.
    """

    def __init__(self, message: str, reason: str = "") -> None:
        super().__init__(message)
        self.reason = reason or message


def read_image(source: ImageSource, *, min_side: int | None = None, pillow: bool = False) -> Tensor:
    """Read an image as a viewer shows it.

    The orientation in EXIF or XMP is applied; grey, palette, CMYK and other modes become RGB; transparency is
    composited on white; of several frames or pages the first is read. The format follows from the content, not the
    name. ICC colour profiles are not applied.

    Of 16 bits per channel the upper 8 of those in use are kept: values are taken as of 8, 10, 12, 14 or 16 bits, the
    fewest that hold the image's largest value, since 12-bit cameras and scanners store 0 to 4095 in files of 16 bits.

    Args:
        source: The file or its bytes.
        min_side: If given, a JPEG is decoded at 1/2, 1/4 or 1/8 of its size (without the highest frequencies), as
            long as its shorter side keeps this many pixels. What is left over at the right and the bottom, less than
            a pixel of the result, is cut off.
        pillow: Decode with Pillow only, at full size.

    Returns:
        uint8 RGB tensor of shape (3, H, W), channels last in memory, the layout that torch resizes fastest.

    Raises:
        ImageError: If it is missing, not fully readable, or larger than ``MAX_PIXELS``.
    """
    import torch

    pixels = read_pixels(source, min_side=min_side, pillow=pillow)
    return torch.from_numpy(pixels).permute(2, 0, 1)  # (H, W, 3) -> (3, H, W)


def read_pixels(
    source: ImageSource, *, min_side: int | None = None, pillow: bool = False
) -> NDArray[np.uint8]:
    """Read an image as ``read_image`` does, as uint8 RGB (H, W, 3), without torch."""
    with _explained(source):
        pixels = (
            None if pillow else _jpeg_pixels(source, lambda width, height: _scale(width, height, min_side))
        )
        if pixels is None:
            with _opened(source) as image:
                pixels = np.array(_upright(_decoded(image, source)[0], _orientation(image)))
    return pixels


def read_picture(image: Image.Image) -> Tensor:
    """Convert an image opened or made with Pillow as ``read_image`` converts a file: uint8 RGB (3, H, W).

    Of 16 bits per channel of colour images Pillow gives the upper 8 only.

    Raises:
        ImageError: If it cannot be decoded.
    """
    import torch

    if 0 in image.size:
        width, height = image.size
        raise _image_error(b"image", f"has no pixels ({width} x {height})")
    with _explained(b"image"):
        pixels = np.array(_upright(_decoded(image)[0], _orientation(image)))
    return torch.from_numpy(pixels).permute(2, 0, 1)  # (H, W, 3) -> (3, H, W)


def read_size(source: ImageSource, *, min_side: int | None = None, pillow: bool = False) -> tuple[int, int]:
    """Return height and width of what ``read_image`` returns, from the header only.

    Raises:
        ImageError: If the header cannot be read.
    """
    with _explained(source), _opened(source, header=True) as image:
        # MPO: several JPEGs in one file, written by phones
        plain = image.format in ("JPEG", "MPO") and image.mode in ("RGB", "L") and not pillow
        scale = _scale(*image.size, min_side) if plain else 1
        width, height = (side // scale for side in image.size)
        # Pillow knows a TIFF's tag before it decodes, but not its XMP
        known = ExifTags.Base.Orientation in getattr(image, "tag_v2", ())
        return (width, height) if not known and _turn(image) in _SIDEWAYS else (height, width)


def read_header(data: bytes, formats: tuple[str, ...] = FORMATS) -> tuple[str, int, int]:
    """Return the format (of ``FORMATS``), height and width, not rotated, of an image in memory, from its header.

    Raises:
        ImageError: If the image has another format than ``formats``, or its header cannot be read.
    """
    with _explained(data, formats):
        other = next((name for name in FORMATS if name not in formats and _begins_as(name, data)), None)
        if other is not None:
            raise _image_error(data, f"is a {other} image, which is not accepted: send {_names(formats)}")
        with _opened(data, formats, header=True) as image:
            width, height = image.size
            # MPO: several JPEGs in one file, written by phones
            return "JPEG" if image.format == "MPO" else str(image.format), height, width


def image_problem(source: ImageSource, *, full: bool = False) -> str | None:
    """Return why an image cannot be read, None if it can, see ``inspect_image``."""
    return inspect_image(source, full=full)[0]


def inspect_image(source: ImageSource, *, full: bool = False) -> tuple[str | None, int | None]:
    """Return why an image cannot be read (None if it can), and how many of 16 bits it uses. Imports no torch.

    Every byte is decoded, so that truncated files are found. By default a JPEG's inverse transform is computed at an
    eighth of the size, which is 3 to 5 times as fast.

    Args:
        source: The file or its bytes.
        full: Compute every pixel, as ``read_image`` does.

    Returns:
        The problem; and 8, 10, 12 or 14 for an image of 16 bits per channel that ``read_image`` scales up, else None.
    """
    bits = None
    try:
        with _explained(source):
            if _jpeg_pixels(source, lambda *_: 1 if full else 8) is None:
                with _opened(source) as image:
                    if not full:
                        image.draft(None, (1, 1))
                    bits = _decoded(image, source)[1]
    except ImageError as error:
        return error.reason, None
    return None, bits if bits != 16 else None


def scaled_note(bits: Iterable[int | None]) -> str | None:
    """Return the note on images that use few of their 16 bits, from what ``inspect_image`` returned; None if none."""
    counts = Counter(number for number in bits if number is not None)
    if not counts:
        return None
    each = ", ".join(f"{count:,} of {number} bits" for number, count in sorted(counts.items()))
    total = counts.total()
    images = "1 image stores" if total == 1 else f"{total:,} images store"
    return (
        f"{images} fewer bits in 16 per channel ({each}), a small part of the range: brightened to the whole range, "
        "each by its own bits"
    )


def printable(text: str | Path) -> str:
    """Escape line breaks, control characters and undecodable bytes, so that the text fits on one line."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


@functools.cache
def _available(formats: tuple[str, ...]) -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in formats if name in Image.OPEN)


def _begins_as(name: str, data: bytes) -> bool:
    accept = Image.OPEN[name][1] if name in _available(FORMATS) else None
    return accept is not None and accept(data[:16]) is True


class _BoundedFile(io.BytesIO):
    """An image in memory that stops a parser after too many reads or too many seconds."""

    def __init__(self, data: bytes, reads: int) -> None:
        super().__init__(data)
        self._left = reads
        self.end = time.thread_time() + HEADER_SECONDS

    def read(self, size: int | None = -1, /) -> bytes:
        self._left -= 1
        if self._left < 0 or (self._left % 16 == 0 and time.thread_time() > self.end):
            raise _image_error(b"", "consists of too many pieces")
        return super().read(size)


@contextmanager
def _explained(source: ImageSource, formats: tuple[str, ...] = FORMATS) -> Iterator[None]:
    """Turn any failure in the block into an ``ImageError``."""
    try:
        _require_content(source)
        yield
    except ImageError:
        raise
    # on a broken file Pillow's plugins raise anything, even struct.error or IndexError
    except Exception as error:
        raise _image_error(source, _reason(source, error, formats)) from error


@contextmanager
def _opened(
    source: ImageSource, formats: tuple[str, ...] = FORMATS, *, header: bool = False
) -> Iterator[Image.Image]:
    """Open the image with Pillow, without decoding it; with ``header`` nothing else is read."""
    file = (
        _BoundedFile(source, HEADER_READS if header else IMAGE_READS) if isinstance(source, bytes) else source
    )
    with Image.open(file, formats=_available(formats)) as image:
        width, height = image.size
        if isinstance(file, _BoundedFile):
            file.end += SECONDS_PER_PIXEL * width * height
        if width * height > MAX_PIXELS:
            raise _image_error(
                source, f"has {width} x {height} pixels, more than the {MAX_PIXELS:,} that are read"
            )
        yield image


def _jpeg_pixels(source: ImageSource, scale: Callable[[int, int], int]) -> NDArray[np.uint8] | None:
    """Decode a plain JPEG to RGB (H, W, 3), upright.

    Args:
        source: Any image.
        scale: Maps width and height to 1, 2, 4 or 8, by which decoding divides them.

    Returns:
        None if Pillow has to decide: not a JPEG, CMYK, too large, or broken.
    """
    data = source if isinstance(source, bytes) else _jpeg_bytes(source)
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        if colours not in ("YCbCr", "RGB", "Gray") or width * height > MAX_PIXELS:
            return None
        factor = scale(width, height)
        pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(
            data, min_height=-(-height // factor), min_width=-(-width // factor), min_factor=factor
        )
    except ValueError:
        return None
    if height % factor or width % factor:
        # the last row and column are partly padding of the JPEG's blocks
        pixels = np.ascontiguousarray(pixels[: max(1, height // factor), : max(1, width // factor)])
    if data.rfind(b"Exif\0\0") < 0 and data.rfind(b"tiff:Orientation") < 0:  # twice as fast as find
        return pixels
    with _opened(data, ("JPEG",), header=True) as image:
        turn = _orientation(image)
    return pixels if turn is None else np.array(_upright(Image.fromarray(pixels), turn))


def _jpeg_bytes(path: str | Path) -> bytes:
    """Read a whole JPEG file, nothing for any other file."""
    with open(path, "rb") as file:
        start = file.read(3)
        return start + file.read() if start == b"\xff\xd8\xff" else b""


def _scale(width: int, height: int, min_side: int | None) -> int:
    """Return the largest scale at which the shorter side keeps ``min_side``."""
    for scale in (8, 4, 2):
        if min_side is not None and min(width, height) // scale >= min_side:
            return scale
    return 1


def _require_content(source: ImageSource) -> None:
    if isinstance(source, bytes):
        size = len(source)
    else:
        status = os.stat(source)
        size = status.st_size
        if stat.S_ISDIR(status.st_mode):
            raise _image_error(source, "is a folder, not an image file")
        if not stat.S_ISREG(status.st_mode):
            raise _image_error(source, "is not a regular file")
    if size == 0:
        raise _image_error(source, "is empty (0 bytes)")


def _reason(source: ImageSource, error: Exception, formats: tuple[str, ...]) -> str:
    match error:
        case FileNotFoundError():
            return "no such file"
        case PermissionError():
            return "no permission to read it"
        case UnidentifiedImageError():
            return _unidentified(source, formats)
        case Image.DecompressionBombError():
            return f"has more than the {MAX_PIXELS:,} pixels that are read"
        case MemoryError():
            return "does not fit in memory"
        case OSError(strerror=str(cause)):
            return f"cannot be read ({cause})"
        case _:
            return f"cannot be decoded ({error or type(error).__name__})"


def _unidentified(source: ImageSource, formats: tuple[str, ...]) -> str:
    if isinstance(source, bytes):
        start = source[:64]
    else:
        with open(source, "rb") as file:
            start = file.read(64)
    if start[4:8] == b"ftyp" and start[8:12] in _HEIF_BRANDS:
        return "is a HEIC image, which is not read: convert it to JPEG"
    if start.startswith(b"version https://git-lfs"):
        return "is a pointer of Git LFS, not the image: run `git lfs pull`"
    if start.startswith(b"%PDF"):
        return "is a PDF file, not an image"
    if start.lstrip().startswith((b"<", b'{"')):
        return "is a text file (HTML, XML, SVG or JSON), not an image"
    if not start.strip(b"\0"):
        return "holds only zeros where an image should start"
    return f"is not a {_names(formats)} image, or its header is broken"


def _names(formats: tuple[str, ...]) -> str:
    """Return formats as people write them: ``JPEG, PNG or WebP``."""
    names = [{"WEBP": "WebP", "JPEG2000": "JPEG 2000", "PPM": "PNM"}.get(name, name) for name in formats]
    return " or ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _orientation(image: Image.Image) -> Image.Transpose | None:
    """Return the turn that makes a decoded image upright."""
    return None if image.format == "TIFF" else _turn(image)  # Pillow turns these itself


def _turn(image: Image.Image) -> Image.Transpose | None:
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # a broken EXIF block does not make the pixels unreadable
        return None
    if orientation is None:
        xmp = image.info.get("xmp") or image.info.get("XML:com.adobe.xmp") or b""
        # Pillow finds the other forms
        found = re.search(rb"tiff:Orientation\s*=\s*'([1-8])'", xmp.encode() if isinstance(xmp, str) else xmp)
        orientation = int(found[1]) if found else None
    return _ORIENTATIONS.get(orientation) if isinstance(orientation, int) else None


def _upright(image: Image.Image, turn: Image.Transpose | None) -> Image.Image:
    return image if turn is None else image.transpose(turn)


def _decoded(image: Image.Image, source: ImageSource | None = None) -> tuple[Image.Image, int | None]:
    """Decode an opened image to RGB, and return how many bits of 16 per channel it uses; None if it has fewer.

    Args:
        image: The image.
        source: Where it comes from, if the lower bits of 16 may be read, too.
    """
    raw = _raw_mode(image)
    image.load()
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM", None)):
        # convert() would clip at 255
        values = np.asarray(image).astype(np.int32)
        if values.size == 0 or not 0 <= values.min() <= values.max() <= 0xFFFF:
            raise ValueError(_NO_RANGE)
        bits = _used_bits(values, image)
        return _to_rgb(Image.fromarray((values >> (bits - 8)).astype(np.uint8))), bits
    if image.mode in ("RGB", "RGBA") and ";16" in raw:
        upper = np.array(image)
        bits = _used_bits(upper[..., :3].astype(np.int32) << 8, image)
        if bits < 16 and source is not None:
            lower = _lower_bytes(source, raw)
            values = (upper[..., :3].astype(np.int32) << 8) + lower
            bits = _used_bits(values, image)
            upper[..., :3] = values >> (bits - 8)
            return _to_rgb(Image.fromarray(upper, image.mode)), bits
        return _to_rgb(image), 16
    return _to_rgb(image), None


def _raw_mode(image: Image.Image) -> str:
    """Return how the pixels lie in the file, in Pillow's words: ``RGB;16B``; empty once they are decoded."""
    for tile in getattr(image, "tile", ()):
        arguments = tile[3]
        return str(arguments if isinstance(arguments, str) else (arguments or ("",))[0])
    return ""


def _lower_bytes(source: ImageSource, raw: str) -> NDArray[np.int32]:
    """Decode the lower bytes of 16 bits per channel, (H, W, 3): Pillow reads the upper ones only.

    With the other byte order it takes the lower ones for the upper; of grey with alpha, four plain bytes per pixel.
    """
    other = {"B": "L", "L": "B", "N": "B" if sys.byteorder == "little" else "L"}
    swapped = "RGBA" if raw.startswith("LA") else raw[:-1] + other[raw[-1]]
    with _opened(source) as image:
        assert isinstance(image, ImageFile.ImageFile)
        image.tile = [
            tile._replace(args=swapped if isinstance(tile.args, str) else (swapped, *(tile.args or ())[1:]))
            for tile in image.tile
        ]
        pixels = np.asarray(image).astype(np.int32)
    return pixels[..., [1, 1, 1]] if raw.startswith("LA") else pixels[..., :3]


def _used_bits(values: NDArray[np.int32], image: Image.Image) -> int:
    """Return the fewest of 8, 10, 12, 14 and 16 bits that hold all values; TIFF may give a number of bits itself."""
    declared = max(getattr(image, "tag_v2", {}).get(_BITS_PER_SAMPLE, (16,)))
    least = declared if 8 < declared < 16 else 8
    return next(bits for bits in (8, 10, 12, 14, 16) if bits >= least and int(values.max()) < 1 << bits)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode in ("I", "F"):
        raise ValueError(_NO_RANGE)
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def _image_error(source: ImageSource, reason: str) -> ImageError:
    reason = printable(reason)
    return ImageError(f"{_shown(source)}: {reason}", reason)


def _shown(source: ImageSource) -> str:
    return "image data" if isinstance(source, bytes) else printable(os.fspath(source))
