"""Explanations that the service gives, as a figure and as layers."""

import base64
import hashlib
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from layouts import write_run

pytest.importorskip("fastapi", reason="needs crossx[serve]")

from fastapi.testclient import TestClient
from requests_to_app import (
    NOT_AN_IMAGE,
    encoded,
    files,
    png_of,
    problem,
)

from crossx.explain.figures import LUMA, overlay
from crossx.export.export import export_run
from crossx.predict.predictor import Predictor
from crossx.serve.app import create_app


def picture(text: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))))


def test_explanations_as_a_figure(client: TestClient, images: list[Path]) -> None:
    response = client.post("/explain", files=files(images[0]))
    assert response.status_code == 200
    assert response.headers["content-type"] == "image/png"
    figure = Image.open(io.BytesIO(response.content))
    assert figure.width > 4 * figure.height > 400


def test_explanations_as_layers(client: TestClient, predictor: Predictor, images: list[Path]) -> None:
    content = client.post("/explain?format=json", json={"images": encoded(images[0])}).json()
    (expected,) = predictor.iter_explain(images[0])
    assert expected.pixels is not None
    assert expected.explanation is not None
    image = picture(content["image"])
    assert np.array_equal(image, expected.pixels)
    assert content["size"] == 64
    assert content["boxes"] is None
    (prediction,) = client.post("/predict", files=files(images[0])).json()["predictions"]
    assert content["prediction"]["label"] == prediction["label"] == content["target"]
    assert content["prediction"]["probability"] == pytest.approx(prediction["probability"], abs=1e-5)
    assert len(content["prediction"]["top"]) == 3
    names = [f"{one['stage']} part {one['part']}" for one in content["overlays"]]
    assert names == list(expected.explanation.maps)
    for one, map_ in zip(content["overlays"], expected.explanation.maps.values(), strict=True):
        shown = picture(one["png"]).astype(float)
        assert shown.shape == (64, 64, 4)
        alpha = shown[..., 3:] / 255
        grey = (image @ np.array(LUMA))[..., None]
        laid = alpha * shown[..., :3] + (1 - alpha) * grey
        assert np.abs(laid - overlay(image, map_)).max() <= 2


def test_the_boxes_of_a_network_that_has_them_are_told(tmp_path: Path, images: list[Path]) -> None:
    network = Predictor.load(write_run(tmp_path, method="nts"), device="cpu")
    (expected,) = network.iter_explain(images[0])
    assert expected.explanation is not None
    assert expected.explanation.boxes is not None
    with TestClient(create_app(network)) as client:
        content = client.post("/explain?format=json", files=files(images[0])).json()
    assert np.array_equal(np.array(content["boxes"], np.float32), expected.explanation.boxes)


def test_an_exported_file_is_served_without_explanations(
    predictor: Predictor, images: list[Path], tmp_path: Path
) -> None:
    assert predictor.origin is not None
    file = export_run(predictor.origin[0].path, tmp_path / "x.safetensors", images=images[0].parent).files[0]
    with TestClient(create_app(Predictor.load(file))) as client:
        described = client.get("/model").json()
        assert described["explains"] is False
        checksum = hashlib.sha256(file.read_bytes()).hexdigest()
        assert described["model"]["name"] == "x.safetensors"
        assert (described["model"]["version"], described["model"]["checksum"]) == (checksum[:12], checksum)
        assert client.post("/predict", files=files(images[0])).status_code == 200
        for query in ("", "?format=json", "?maps=class&target=wren"):
            response = client.post(f"/explain{query}", files=files(images[0]))
            assert "only predicts" in problem(response, 501)


def test_explanations_of_a_class(client: TestClient, images: list[Path]) -> None:
    response = client.post("/explain?format=json&maps=class&target=wren", files=files(images[0]))
    content = response.json()
    assert content["target"] == "wren"
    assert all(one["stage"].startswith("CAM ") for one in content["overlays"])


@pytest.mark.parametrize(
    ("query", "contents", "status", "detail"),
    [
        ("", [NOT_AN_IMAGE], 422, "the image is not a JPEG"),
        ("", [png_of(100, 100)], 422, "the image has 100 x 100 pixels"),
        ("", [NOT_AN_IMAGE, NOT_AN_IMAGE], 413, "Too many files"),
        ("maps=class&target=wrren", [NOT_AN_IMAGE], 422, "unknown class 'wrren'. Did you mean 'wren'?"),
        ("maps=class&target=elephant", [NOT_AN_IMAGE], 422, "unknown class 'elephant'. /model lists its"),
        ("target=wren", [NOT_AN_IMAGE], 422, "`target` requires maps=class."),
        ("maps=both", [NOT_AN_IMAGE], 422, "query.maps: Input should be 'activation' or 'class'."),
        ("format=gif", [NOT_AN_IMAGE], 422, "query.format: Input should be 'png' or 'json'."),
    ],
)
def test_wrong_explanations(
    client: TestClient, query: str, contents: list[bytes], status: int, detail: str
) -> None:
    assert detail in problem(client.post(f"/explain?{query}", files=files(*contents)), status)
