"""Encoded images whose orientation is stored in every way that is in use."""

from __future__ import annotations

import io
import re
import struct
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin

TURNS: Mapping[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a),
}
"""What makes pixels (H, W, 3) stored with an orientation upright, by the EXIF standard."""

_NOISE = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)
PICTURE = Image.fromarray(_NOISE).resize((96, 64), Image.Resampling.BICUBIC)


def _exif(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def _xmp(orientation: int, form: str = 'tiff:Orientation="{}"/>') -> bytes:
    start = '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    inner = f'<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" {form.format(orientation)}'
    return f"{start}{inner}</rdf:RDF></x:xmpmeta>".encode()


def _saved(file_format: str, image: Image.Image = PICTURE, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def _png_text(orientation: int) -> PngImagePlugin.PngInfo:
    """ImageMagick's way: the EXIF block in hexadecimal digits."""
    data = b"Exif\0\0" + _exif(orientation).tobytes().removeprefix(b"Exif\0\0")
    info = PngImagePlugin.PngInfo()
    info.add_text(
        "Raw profile type exif", f"\nexif\n{len(data):8d}\n" + re.sub("(.{72})", r"\1\n", data.hex()) + "\n"
    )
    return info


def _png_xmp(orientation: int) -> PngImagePlugin.PngInfo:
    info = PngImagePlugin.PngInfo()
    info.add_itxt("XML:com.adobe.xmp", _xmp(orientation).decode())
    return info


def _png_with_late_exif(orientation: int) -> bytes:
    """The eXIf chunk after the pixels, as the standard allows."""
    data = _saved("PNG", exif=_exif(orientation))
    start = data.index(b"eXIf") - 4
    stop = start + struct.unpack(">I", data[start : start + 4])[0] + 12
    chunk, data = data[start:stop], data[:start] + data[stop:]
    end = data.index(b"IEND") - 4
    return data[:end] + chunk + data[end:]


SOURCES: Mapping[str, Callable[[int], bytes]] = {
    "JPEG, EXIF": lambda o: _saved("JPEG", exif=_exif(o)),
    "progressive JPEG, EXIF": lambda o: _saved("JPEG", exif=_exif(o), progressive=True),
    "grey JPEG, EXIF": lambda o: _saved("JPEG", PICTURE.convert("L"), exif=_exif(o)),
    "CMYK JPEG, EXIF": lambda o: _saved("JPEG", PICTURE.convert("CMYK"), exif=_exif(o)),
    "JPEG, XMP attribute": lambda o: _saved("JPEG", xmp=_xmp(o)),
    "JPEG, XMP attribute in single quotes": lambda o: _saved("JPEG", xmp=_xmp(o, "tiff:Orientation='{}'/>")),
    "JPEG, XMP element": lambda o: _saved(
        "JPEG", xmp=_xmp(o, "><tiff:Orientation>{}</tiff:Orientation></rdf:Description>")
    ),
    "JPEG, EXIF before XMP": lambda o: _saved("JPEG", exif=_exif(o), xmp=_xmp(9 - o)),
    "MPO, EXIF": lambda o: _saved("MPO", exif=_exif(o), save_all=True, append_images=[PICTURE]),
    "PNG, eXIf": lambda o: _saved("PNG", exif=_exif(o)),
    "PNG, eXIf after the pixels": _png_with_late_exif,
    "PNG, XMP": lambda o: _saved("PNG", pnginfo=_png_xmp(o)),
    "PNG, text": lambda o: _saved("PNG", pnginfo=_png_text(o)),
    "WebP, EXIF": lambda o: _saved("WEBP", exif=_exif(o)),
    "WebP, XMP": lambda o: _saved("WEBP", xmp=_xmp(o)),
    "TIFF, tag": lambda o: _saved("TIFF", exif=_exif(o)),
    "compressed TIFF, tag": lambda o: _saved("TIFF", exif=_exif(o), compression="tiff_lzw"),
    "TIFF, XMP": lambda o: _saved("TIFF", tiffinfo={700: _xmp(o)}),
    "AVIF, EXIF": lambda o: _saved("AVIF", exif=_exif(o)),
}
"""Name of the source -> the picture, stored with an orientation from 1 to 8."""
