"""The images in requests: forms, JSON and bodies, and what is refused of them."""

import base64
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

pytest.importorskip("fastapi", reason="needs crossx[serve]")

from fastapi import FastAPI
from fastapi.testclient import TestClient
from requests_to_app import (
    PATIENCE,
    files,
    png_of,
    problem,
)

from crossx.data.images import ImageError
from crossx.errors import UsageError
from crossx.predict.predictor import Predictor
from crossx.serve.app import create_app
from crossx.serve.limits import Limits
from crossx.serve.uploads import from_base64, network_of


def wrapped(text: str, end: str) -> str:
    return end.join(text[at : at + 76] for at in range(0, len(text), 76))


@pytest.mark.parametrize(
    "form",
    [
        lambda text: f"data:image/jpeg;base64,{text}",
        lambda text: f" DATA:;name=a;Base64 , {text}\n",
        lambda text: f"data:image/jpeg;base64,{text.replace('+', '%2B').replace('=', '%3d')}",
        lambda text: wrapped(text, "\r\n"),
        lambda text: wrapped(text, " ") + "\n",
        lambda text: text.replace("+", "-").replace("/", "_"),
        lambda text: text.rstrip("="),
        lambda text: wrapped(text.replace("+", "-").replace("/", "_").rstrip("="), "\n"),
    ],
)  # fmt: skip
def test_base64_is_read_in_all_its_forms(form: Any) -> None:
    for content in (b"\xff\xd8\xff\xfb\xef\xbe" + bytes(range(256)), b"\xfb", b"ab", b"abc"):
        assert from_base64(form(base64.b64encode(content).decode())) == content


@pytest.mark.parametrize(
    "text", ["%%%", "a", "abcde", "ab=c", "äöü=", "data:image/jpeg;base64,%%", "=ab", "\0abc"]
)
def test_what_is_not_base64_is_told(text: str) -> None:
    with pytest.raises(ImageError, match="is not base64"):
        from_base64(text)


def test_a_data_url_without_base64_is_told() -> None:
    with pytest.raises(ImageError, match="without ;base64"):
        from_base64("data:image/svg+xml,%3Csvg%3E")


def test_a_bomb_is_refused_by_its_header(client: TestClient) -> None:
    response = client.post("/predict", files=files(png_of(100, 51), png_of(60_000, 60_000)))
    small, large = response.json()["predictions"]
    assert response.status_code == 422
    assert small["error"] == "has 100 x 51 pixels, more than the limit of 5,000"
    assert "more than the" in large["error"]


def test_a_jpeg_of_very_many_scans_is_refused(client: TestClient, images: list[Path]) -> None:
    content = images[0].read_bytes()
    scan = content[content.index(b"\xff\xda") : content.rindex(b"\xff\xd9")]
    response = client.post("/predict", files=files(content.replace(scan, 200 * scan)))
    assert response.json()["predictions"][0]["error"] == "is a JPEG of more than 100 scans"


def test_images_that_take_too_long_are_refused(predictor: Predictor, images: list[Path]) -> None:
    picture = io.BytesIO()
    Image.open(images[0]).resize((64, 64)).save(picture, "JPEG", progressive=True)
    content = picture.getvalue()
    last = content.rindex(b"\xff\xda")
    scans = content[:-2] + 30 * content[last:-2] + content[-2:]
    app = create_app(predictor, Limits(max_pixels=64 * 64, timeout=PATIENCE))
    with TestClient(app) as client:
        assert client.post("/predict", files=files(content)).status_code == 200
        answer = client.post("/predict", files=files(scans)).json()["predictions"][0]
        assert answer["error"] == (
            "takes too long to decode (64 x 64 pixels in 40 scans of a JPEG): make it smaller"
        )
        assert "take too long to decode together" in problem(
            client.post("/predict", files=files(*[content] * 3)), 413
        )
        assert "(64 x 64 pixels in 40 scans" in problem(client.post("/explain", files=files(scans)), 422)
        assert client.post("/predict", files=files(scans, images[0])).status_code == 200


def test_formats_for_strangers_are_chosen(
    client: TestClient, predictor: Predictor, images: list[Path]
) -> None:
    picture = io.BytesIO()
    Image.open(images[0]).save(picture, "TIFF")
    (refused,) = client.post("/predict", files=files(picture.getvalue())).json()["predictions"]
    assert (
        refused["error"] == "is a TIFF image, which is not accepted: send JPEG, PNG, WebP, GIF, BMP or AVIF"
    )
    (refused,) = client.post("/predict", files=files(b"no image")).json()["predictions"]
    assert refused["error"] == "is not a JPEG, PNG, WebP, GIF, BMP or AVIF image, or its header is broken"
    with TestClient(create_app(predictor, Limits(formats=("TIFF",)))) as allowing:
        assert allowing.post("/predict", files=files(picture.getvalue())).status_code == 200
    with pytest.raises(UsageError, match="unknown format 'TIF'"):
        Limits(formats=("TIF",))


def test_a_network_of_ipv6_is_one_client() -> None:
    assert network_of("2001:db8::1") == network_of("2001:db8::ffff:2") != network_of("2001:db8:0:1::1")
    assert network_of("10.0.0.1") != network_of("10.0.0.2")
    assert network_of("fe80::1%eth0") == "fe80::"
    assert network_of("::ffff:10.0.0.1") == "10.0.0.1"
    assert network_of("testclient") == "testclient"


def test_names_are_shown_without_folders_on_one_line(client: TestClient, images: list[Path]) -> None:
    content = images[0].read_bytes()
    for given, shown in (
        ("../../etc/wren.jpg", "wren.jpg"),
        ("C:\\birds\\wren.jpg", "wren.jpg"),
        ("ö.jpg", "ö.jpg"),
    ):
        response = client.post("/predict", files=[("images", (given, content))])
        assert response.json()["predictions"][0]["name"] == shown


PART = b'--y\r\nContent-Disposition: form-data; name="images"; filename="x"\r\n\r\nx\r\n--y--\r\n'
FORM = {"content-type": "multipart/form-data; boundary=y"}
JSON = {"content-type": "application/json"}


@pytest.mark.parametrize(
    ("request_", "status", "detail"),
    [
        ({"content": b"{", "headers": {"content-type": "application/json"}}, 400, "Invalid JSON"),
        ({"json": {"images": "x"}}, 422, "images: Input should be a valid "),
        ({"json": {"images": []}}, 422, "there is no image"),
        ({"json": {"image": ["x"]}}, 422, "images: Field required"),
        ({"json": {"images": ["x"], "top": 0}}, 422, "top: Input should be greater than"),
        ({"json": {"images": ["x"] * 33}}, 413, "at most 32 images, not 33"),
        ({"files": [("images", ("x", b""))] * 33}, 413, "Too many files"),
        ({"files": [("image", ("x", b"x"))]}, 422, "there is no image: send files in the field `images`."),
        ({"data": {"images": "x"}, "files": [("other", ("x", b""))]}, 422, "`images` must be files"),
        ({"content": b"x", "headers": {"content-type": "multipart/form-data"}}, 400, "Missing boundary"),
        ({"content": b"x", "headers": {"content-type": "multipart/form-data; boundary=y"}}, 400, "multipart"),
        *(({"content": PART, "headers": {"content-type": f"multipart/form-data; {rest}".encode("latin-1")}},
           400, detail) for rest, detail in [
              ("boundary=y; charset=undefined", "charset of multipart/form-data must be utf-8"),
              ("boundary=y; charset=hex", "charset"), ("boundary=y; charset=idna", "charset"),
              ("boundary=y; charset=utf-16", "charset"), ("boundary=y; charset=\0", "charset"),
              (f"boundary={'y' * 300}", "multipart"), ("boundary=", "multipart"), ("boundary", "multipart"),
              ("boundary=\xe9", "multipart"), ("charset=utf-8", "Missing boundary"),
          ]),
        ({"content": PART.replace(b'name="images"; ', b""), "headers": FORM}, 400, '"name" must be provided'),
        *(({"content": PART.replace(b"\r\n\r\n", b"\r\n" + more + b"\r\n", 1), "headers": FORM},
           400, "multipart")
          for more in (b"X: " + 9000 * b"a" + b"\r\n", 20 * b"X: a\r\n", b"no colon\r\n", b": x\r\n", b"\0\r\n")),
        # cut off within the second image, its head, and the last boundary; and in the only image
        *(({"content": PART[:-5] + more, "headers": FORM}, 400, "the body is cut off: it ends before its closing")
          for more in (b"\r\n" + PART[:-9], b"\r\n" + PART[:40], b"", b"-")),
        ({"content": PART[:-9], "headers": FORM}, 400, "the body is cut off"),
        ({"content": b"", "headers": FORM}, 422, "there is no image"),
        ({"content": PART, "headers": FORM | {"content-encoding": "gzip"}}, 415, "must not be compressed"),
        ({"content": b"", "headers": {"content-type": "image/jpeg"}}, 422, "there is no image"),
        ({"content": b'{"images": ' + 9999 * b"[", "headers": JSON}, 400, "JSON"),
        ({"content": b'{"images": ["x"], "top": NaN}', "headers": JSON}, 422, "top: "),
        ({"content": b'{"images": ["x"], "top": 1e999}', "headers": JSON}, 422, "top: "),
        ({"content": b'{"images": ["x"], "top": ' + 5000 * b"9" + b"}", "headers": JSON}, 400, "JSON"),
        ({"content": b'{"images": ["\\ud800"]}', "headers": JSON}, 400, "JSON"),
        ({"content": b"\xff\xfe{}", "headers": JSON}, 400, "JSON"),
        ({"content": b"x", "headers": {"content-type": "text/plain"}}, 415, "multipart/form-data or"),
        ({"content": b"x"}, 415, "multipart/form-data or application/json"),
        ({"content": bytes(1_000_001), "headers": {"content-type": "application/json"}}, 413, "than 1 MB"),
        ({"files": [("images", ("x", bytes(1_000_000)))]}, 413, "larger than 1 MB"),
        ({"params": {"top": "many"}, "json": {"images": ["x"]}}, 422, "query.top: Input should be"),
        ({"params": {"top": [1, 2]}, "json": {"images": ["x"]}}, 422, "query.top: given more than once."),
        ({"data": {"top": "3"}, "files": [("images", ("x", b"x"))]}, 422, "top: no field of the form: send files"),
    ],
)  # fmt: skip
def test_wrong_bodies_are_told_on_one_line(
    client: TestClient, request_: dict[str, Any], status: int, detail: str
) -> None:
    assert detail in problem(client.post("/predict", **request_), status)


def test_a_body_without_a_length_is_bounded_too(client: TestClient, app: FastAPI) -> None:
    sent = 0

    def endless() -> Iterator[bytes]:
        nonlocal sent
        yield b'--y\r\nContent-Disposition: form-data; name="images"; filename="x"\r\n\r\n'
        while sent < 3_000_000:
            sent += 100_000
            yield bytes(100_000)

    response = client.post(
        "/predict", content=endless(), headers={"content-type": "multipart/form-data; boundary=y"}
    )
    assert "larger than 1 MB" in problem(response, 413)
    assert app.state.service._bodies._bytes.held == 0
