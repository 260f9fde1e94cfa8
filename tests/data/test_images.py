from __future__ import annotations

import errno
import io
import os
import pickle
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps, features

import orientations
from crossx.data.cache import PixelCache
from crossx.data.images import (
    MAX_PIXELS,
    ImageError,
    image_problem,
    inspect_image,
    read_image,
    read_picture,
    read_size,
)

NOISE = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)
RAMP16 = np.linspace(0, 65535, 24 * 32).reshape(24, 32).astype(np.uint16)


def encoded(image: Image.Image, file_format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def photograph() -> Image.Image:
    """Smooth like a photograph, so that no bit of the JPEG stream is padding."""
    return Image.fromarray(NOISE).resize((96, 64), Image.Resampling.BICUBIC)


def pixels(data: str | Path | bytes) -> np.ndarray:
    return read_image(data).permute(1, 2, 0).numpy()


def png(width: int, height: int, rows: bytes = b"", depth: int = 8, colour: int = 2) -> bytes:
    """Write a PNG, by default RGB, by hand, for what Pillow does not write."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize("file_format", ["PNG", "BMP", "TIFF", "PPM"])
def test_lossless_formats_return_the_pixels(file_format: str) -> None:
    data = encoded(Image.fromarray(NOISE), file_format)
    tensor = read_image(data)
    assert (tensor.dtype, tensor.shape) == (torch.uint8, (3, 24, 32))
    np.testing.assert_array_equal(pixels(data), NOISE)
    assert image_problem(data) is None


@pytest.mark.parametrize("file_format", ["JPEG", "WEBP", "GIF", "JPEG2000"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_other_formats_agree_with_pillow(file_format: str, mode: str) -> None:
    data = encoded(Image.fromarray(NOISE).convert(mode), file_format)
    np.testing.assert_array_equal(pixels(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


def test_jpeg_agrees_with_torchvisions_decoder() -> None:
    decode_jpeg = pytest.importorskip("torchvision.io").decode_jpeg
    data = encoded(photograph(), "JPEG", quality=85)
    theirs = decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode="RGB")
    assert (
        read_image(data).int() - theirs.int()
    ).abs().max() <= 2  # two builds of libjpeg may round differently


@settings(max_examples=60)
@given(
    size=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    options=st.fixed_dictionaries(
        {
            "quality": st.integers(1, 100),
            "progressive": st.booleans(),
            "subsampling": st.sampled_from(["4:4:4", "4:2:2", "4:2:0"]),
            "keep_rgb": st.booleans(),
        }
    ),
    mode=st.sampled_from(["RGB", "L", "CMYK"]),
)
def test_jpegs_have_the_pixels_that_pillow_gives(
    size: tuple[int, int], options: dict[str, object], mode: str
) -> None:
    if options["keep_rgb"]:
        options = {**options, "subsampling": "4:4:4"}
    data = encoded(photograph().resize(size).convert(mode), "JPEG", **options)
    assert torch.equal(read_image(data), read_image(data, pillow=True))
    assert read_size(data) == (size[1], size[0])


@settings(max_examples=40)
@given(
    size=st.tuples(st.integers(1, 130), st.integers(1, 130)),
    min_side=st.integers(1, 70),
    orientation=st.integers(1, 8),
    file_format=st.sampled_from(["JPEG", "PNG", "WEBP"]),
)
def test_decoded_size_is_known_from_the_header(
    size: tuple[int, int], min_side: int, orientation: int, file_format: str
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(photograph().resize(size), file_format, exif=exif)
    shape = read_image(data, min_side=min_side).shape[1:]
    assert read_size(data, min_side=min_side) == tuple(shape)
    scale = next(scale for scale in (1, 2, 4, 8) if sorted(side // scale for side in size) == sorted(shape))
    assert scale == 1 or (file_format == "JPEG" and min(shape) >= min_side)
    assert scale == 8 or file_format != "JPEG" or min(size) // (2 * scale) < min_side
    assert read_size(data, min_side=min_side, pillow=True) == tuple(read_image(data).shape[1:])


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_rotation_is_applied_once(orientation: int, file_format: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(NOISE), file_format, exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    np.testing.assert_array_equal(pixels(data), np.asarray(expected))
    assert pixels(data).shape[0] == (32 if orientation >= 5 else 24)


@pytest.mark.parametrize("source", orientations.SOURCES)
def test_every_decoder_turns_every_source_alike(tmp_path: Path, source: str) -> None:
    if source.startswith("AVIF") and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    stored = None
    for orientation, turn in orientations.TURNS.items():
        data = orientations.SOURCES[source](orientation)
        if stored is None:
            stored = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
        upright = np.ascontiguousarray(turn(stored))
        path = tmp_path / f"{orientation}.jpg"
        path.write_bytes(data)
        opened, loaded = Image.open(path), Image.open(path)
        loaded.load()
        cache = PixelCache({path: read_size(path)})
        for decoded in (
            read_image(data),
            read_image(path),
            read_image(path, pillow=True),
            cache.read(path, read_image),
            cache.read(path, lambda _: torch.zeros(3, 1, 1)),  # never called: the sizes agree
            read_picture(opened),
            read_picture(loaded),
        ):
            np.testing.assert_array_equal(decoded.permute(1, 2, 0), upright)
        assert read_size(data) == read_size(path, pillow=True) == upright.shape[:2]


def test_broken_exif_is_no_reason_to_refuse() -> None:
    data = encoded(Image.fromarray(NOISE), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff" + b"\x07" * 9)
    assert pixels(data).shape == (24, 32, 3)


def test_grey_and_bilevel_have_equal_channels() -> None:
    grey = Image.fromarray(NOISE[..., 0])
    np.testing.assert_array_equal(pixels(encoded(grey, "PNG")), np.repeat(NOISE[..., :1], 3, axis=2))
    assert set(np.unique(pixels(encoded(grey.convert("1"), "PNG")))) == {0, 255}


@pytest.mark.parametrize("file_format", ["JPEG", "TIFF"])
def test_cmyk_agrees_with_pillow(file_format: str) -> None:
    data = encoded(Image.fromarray(NOISE).convert("CMYK"), file_format)
    opened = Image.open(io.BytesIO(data))
    assert opened.mode == "CMYK"
    np.testing.assert_array_equal(pixels(data), np.asarray(opened.convert("RGB")))


def test_palette_becomes_its_colours() -> None:
    palette = Image.fromarray(NOISE).quantize(16)
    np.testing.assert_array_equal(pixels(encoded(palette, "PNG")), np.asarray(palette.convert("RGB")))


def test_alpha_is_laid_on_white() -> None:
    alpha = np.random.default_rng(1).integers(0, 256, (24, 32, 1), dtype=np.uint8)
    data = encoded(Image.fromarray(np.concatenate([NOISE, alpha], axis=2)), "PNG")
    weight = alpha.astype(float) / 255
    expected = weight * NOISE + (1 - weight) * 255
    assert np.abs(pixels(data) - expected).max() <= 1


def test_grey_with_alpha_is_laid_on_white() -> None:
    grey_alpha = np.stack([NOISE[..., 0], np.full((24, 32), 64, np.uint8)], axis=2)
    expected = 64 / 255 * NOISE[..., :1] + 191 / 255 * 255
    assert np.abs(pixels(encoded(Image.fromarray(grey_alpha), "PNG")) - expected).max() <= 1


@pytest.mark.parametrize("file_format", ["PNG", "GIF"])
def test_transparent_palette_entry_is_white(file_format: str) -> None:
    image = Image.new("P", (4, 4), 0)
    image.putpalette([255, 0, 0, 0, 255, 0])
    image.putpixel((1, 2), 1)
    result = pixels(encoded(image, file_format, transparency=0))
    assert result[2, 1].tolist() == [0, 255, 0]
    assert result[0, 0].tolist() == [255, 255, 255]


def tiff16(values: np.ndarray, order: str, deflated: bool = False) -> bytes:
    """Write a TIFF of 16 bits per channel (H, W, 3 or 4) by hand, which Pillow does not."""
    height, width, channels = values.shape
    data = values.astype(f"{order}u2").tobytes()
    data = zlib.compress(data) if deflated else data
    data += b"\0" * (len(data) % 2)
    bits = struct.pack(f"{order}{channels}H", *[16] * channels)
    tags = [(256, width), (257, height), (258, None), (259, 8 if deflated else 1), (262, 2), (273, 8)]
    tags += [(277, channels), (278, height), (279, len(data)), *([(338, 2)] if channels == 4 else [])]
    directory = struct.pack(f"{order}H", len(tags))
    for tag, value in tags:
        count, value = (channels, 8 + len(data)) if value is None else (1, value)
        kind = 4 if tag in (256, 257, 273, 278, 279) else 3
        wide = kind == 4 or count > 1
        directory += struct.pack(f"{order}HHI", tag, kind, count)
        directory += struct.pack(f"{order}{'I' if wide else 'HH'}", *([value] if wide else [value, 0]))
    start = b"II" if order == "<" else b"MM"
    header = start + struct.pack(f"{order}HI", 42, 8 + len(data) + len(bits))
    return header + data + bits + directory + struct.pack(f"{order}I", 0)


DEEP = {
    "grey PNG": lambda v: encoded(Image.fromarray(v[..., 0]), "PNG"),
    "grey TIFF": lambda v: encoded(Image.fromarray(v[..., 0]), "TIFF"),
    "grey PGM": lambda v: encoded(Image.fromarray(v[..., 0]), "PPM"),
    "grey PNG with alpha": lambda v: png(
        30, 20, rows16(np.dstack([v[..., 0], np.full_like(v[..., 0], 65535)])), depth=16, colour=4
    ),
    "RGB PNG": lambda v: png(30, 20, rows16(v), depth=16),
    "RGB PNG with alpha": lambda v: png(
        30, 20, rows16(np.dstack([v, np.full_like(v[..., 0], 65535)])), depth=16, colour=6
    ),
    "RGB TIFF": lambda v: tiff16(v, "<"),
    "RGB TIFF, big-endian": lambda v: tiff16(v, ">"),
    "RGB TIFF, compressed": lambda v: tiff16(v, "<", deflated=True),
    "RGB TIFF, big-endian and compressed": lambda v: tiff16(v, ">", deflated=True),
    "RGBA TIFF": lambda v: tiff16(np.dstack([v, np.full_like(v[..., 0], 65535)]), "<"),
}


def rows16(values: np.ndarray) -> bytes:
    return b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)


@pytest.mark.parametrize("kind", DEEP)
@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
def test_of_16_bits_those_in_use_are_kept(kind: str, bits: int) -> None:
    values = np.random.default_rng(bits).integers(0, 1 << bits, (20, 30, 3)).astype(np.uint16)
    values[0, 0] = (1 << bits) - 1
    data = DEEP[kind](values)
    kept = (values >> (bits - 8)).astype(np.uint8)
    expected = np.repeat(kept[..., :1], 3, axis=2) if "grey" in kind else kept
    np.testing.assert_array_equal(pixels(data), expected)
    np.testing.assert_array_equal(read_image(data, pillow=True).permute(1, 2, 0), expected)
    assert inspect_image(data) == (None, None if bits == 16 else bits)


def test_a_black_image_of_16_bits_stays_black() -> None:
    assert pixels(encoded(Image.fromarray(np.zeros((4, 5), np.uint16)), "PNG")).max() == 0


def test_pictures_of_32_bits_without_a_range_are_refused() -> None:
    for values in (
        np.ones((4, 5), np.float32),
        np.full((4, 5), -1, np.int32),
        np.full((4, 5), 70000, np.int32),
    ):
        with pytest.raises(ImageError, match="without a fixed range"):
            read_picture(Image.fromarray(values))
    assert read_picture(Image.fromarray(np.full((4, 5), 4000, np.int32))).unique().tolist() == [250]


@pytest.mark.parametrize("file_format", ["PNG", "TIFF", "PPM"])
def test_16_bit_grey_keeps_its_upper_8(file_format: str) -> None:
    data = encoded(Image.fromarray(RAMP16), file_format)
    np.testing.assert_array_equal(pixels(data), np.repeat((RAMP16 // 256)[..., None], 3, axis=2))


def test_16_bit_rgb_png_keeps_its_upper_8() -> None:
    deep = np.random.default_rng(2).integers(0, 65536, (5, 7, 3)).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in deep)
    np.testing.assert_array_equal(pixels(png(7, 5, rows, depth=16)), (deep >> 8).astype(np.uint8))


@pytest.mark.parametrize("mode", ["I", "F"])
def test_32_bits_a_channel_are_refused(mode: str) -> None:
    data = encoded(Image.fromarray(NOISE).convert(mode), "TIFF")
    for problem in (image_problem(data), image_problem(data, full=True)):
        assert problem is not None
        assert "32 bits" in problem


@pytest.mark.parametrize("file_format", ["GIF", "WEBP", "PNG", "TIFF", "MPO"])
def test_first_frame_of_several(file_format: str) -> None:
    first, second = Image.new("RGB", (16, 16), "red"), Image.new("RGB", (16, 16), "blue")
    data = encoded(first, file_format, save_all=True, append_images=[second])
    assert np.abs(pixels(data).astype(int) - [255, 0, 0]).max() <= 8
    assert image_problem(data) is None


def test_content_decides_not_the_name(tmp_path: Path) -> None:
    path = tmp_path / "really_a_png.jpg"
    path.write_bytes(encoded(Image.fromarray(NOISE), "PNG"))
    np.testing.assert_array_equal(pixels(path), NOISE)
    np.testing.assert_array_equal(pixels(str(path)), NOISE)
    assert image_problem(path) is None


@pytest.mark.parametrize("name", ["Grünfink 金翅雀 🐦.png", "a b'c\"d&.png", "n" * 251 + ".png"])
def test_unusual_names(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    Image.fromarray(NOISE).save(path)
    np.testing.assert_array_equal(pixels(path), NOISE)


@settings(max_examples=60)
@given(
    fraction=st.floats(0, 1, exclude_max=True), progressive=st.booleans(), quality=st.sampled_from([30, 90])
)
def test_quick_check_finds_every_jpeg_that_reading_refuses(
    fraction: float, progressive: bool, quality: int
) -> None:
    data = encoded(photograph(), "JPEG", progressive=progressive, quality=quality)
    cut = data[: int(fraction * len(data))]
    problem = image_problem(cut)
    assert (problem is None) == (image_problem(cut, full=True) is None)
    if len(cut) < len(data) - 16:
        assert problem is not None
    if problem is not None:
        with pytest.raises(ImageError):
            read_image(cut)


@pytest.mark.parametrize("file_format", ["PNG", "WEBP", "TIFF", "BMP", "PPM", "GIF"])
@settings(max_examples=15)
@given(fraction=st.floats(0, 0.9))
def test_truncation_is_found_in_every_format(file_format: str, fraction: float) -> None:
    data = encoded(photograph(), file_format)
    cut = data[: int(fraction * len(data))]
    assert image_problem(cut) is not None
    with pytest.raises(ImageError):
        read_image(cut)


@settings(max_examples=150)
@given(
    file_format=st.sampled_from(["JPEG", "PNG", "GIF", "TIFF", "WEBP", "BMP"]),
    places=st.lists(
        st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=6
    ),
)
def test_any_damage_is_read_or_refused_in_one_line(file_format: str, places: list[tuple[float, int]]) -> None:
    data = bytearray(encoded(photograph(), file_format))
    for place, value in places:
        data[int(place * len(data))] = value
    problem = image_problem(bytes(data))
    if problem is None:
        assert read_image(bytes(data)).shape[0] == 3
    else:
        with pytest.raises(ImageError) as caught:
            read_image(bytes(data))
        assert str(caught.value).isprintable()


@settings(max_examples=100)
@given(st.binary(max_size=200))
def test_random_bytes_are_refused(data: bytes) -> None:
    assert image_problem(data) is not None


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "0 bytes"),
        (b"\0" * 5000, "only zeros"),
        (b"<!DOCTYPE html><p>404 Not Found</p>", "text file"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC"),
        (b"\0\0\0\x18ftypmsf1\0\0\0\0msf1hevc", "HEIC"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n", "git lfs pull"),
        (b"%PDF-1.7\n%\xe2\xe3", "PDF file"),
        (b'{"error": "not found"}\n', "text file (HTML, XML, SVG or JSON)"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "is not a JPEG"),
        (encoded(photograph(), "JPEG")[:-400], "truncated"),
    ],
)
def test_reasons(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "bird.jpg"
    path.write_bytes(content)
    assert reason in (image_problem(path) or "")
    with pytest.raises(ImageError) as caught:
        read_image(path)
    assert str(caught.value) == f"{path}: {caught.value.reason}"
    assert reason in caught.value.reason


@pytest.mark.parametrize(("width", "height"), [(20_000, 20_000), (2**31 - 1, 2**31 - 1), (13_400, 13_400)])
def test_bombs_are_refused_by_their_header(tmp_path: Path, width: int, height: int) -> None:
    assert width * height > MAX_PIXELS
    path = tmp_path / "bomb.png"
    path.write_bytes(png(width, height))
    assert f"{MAX_PIXELS:,} pixels" in (image_problem(path) or "")


def test_jpeg_bombs_are_refused_by_their_header() -> None:
    data = encoded(photograph(), "JPEG")
    frame = data.index(b"\xff\xc0") + 5
    bomb = data[:frame] + struct.pack(">HH", 65_000, 65_000) + data[frame + 4 :]
    assert f"{MAX_PIXELS:,} pixels" in (image_problem(bomb) or "")
    for read in (read_image, read_size):
        with pytest.raises(ImageError, match="pixels"):
            read(bomb)


def test_missing_folder_and_special_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "dangling.jpg").symlink_to(tmp_path / "nowhere.jpg")
    assert image_problem(tmp_path / "missing.jpg") == "no such file"
    assert image_problem(tmp_path / "dangling.jpg") == "no such file"
    assert "folder" in (image_problem(tmp_path) or "")
    assert "regular file" in (image_problem(tmp_path / "pipe.jpg") or "")
    assert os.strerror(errno.ENAMETOOLONG) in (image_problem(tmp_path / ("n" * 300 + ".jpg")) or "")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_no_permission(tmp_path: Path) -> None:
    path = tmp_path / "secret.png"
    Image.fromarray(NOISE).save(path)
    path.chmod(0)
    assert image_problem(path) == "no permission to read it"


def test_message_is_one_line_for_any_name(tmp_path: Path) -> None:
    with pytest.raises(ImageError) as caught:
        read_image(tmp_path / os.fsdecode(b"two\nlines \xff.jpg"))
    message = str(caught.value)
    assert "two\\nlines" in message
    assert message.isprintable()
    message.encode("utf-8")


def test_error_survives_pickling() -> None:
    with pytest.raises(ImageError) as caught:
        read_image(b"")
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (str(copy), copy.reason) == (str(caught.value), caught.value.reason)


def test_checking_imports_no_torch() -> None:
    code = "import sys, crossx.data.images as i; i.image_problem(b'x'); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
