"""Similar training images in the answers of the service."""

import base64
import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from PIL import Image

import layouts
from crossx.cli.main import main
from crossx.errors import UsageError
from crossx.predict.neighbors import NeighborIndex
from crossx.predict.predictor import Predictor
from crossx.serve.app import create_app
from crossx.serve.limits import Limits
from crossx.serve.neighbors import SIDE, SimilarImages


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("served")
    root = layouts.write_folder(place / "images", classes=2, images_per_class=8, split_folders=True)
    layouts.write_image(root / "train/wren/large.jpg", 1, 30, size=(400, 300))
    run = layouts.write_run(place / "run", classes=("robin", "wren"), method="plain")
    (run / "run.json").write_text(json.dumps({"data_root": str(root), "data": {"dataset": "folder"}}))
    return place


def test_answers_have_the_nearest_training_images_with_small_pictures(place: Path) -> None:
    predictor = Predictor.load(place / "run", "cpu")
    files = [place / "images/train/wren/large.jpg", place / "images/test/robin/003.jpg"]
    expected = predictor.neighbors(files, top=3)
    similar = SimilarImages(NeighborIndex.open(predictor), 3)
    with TestClient(create_app(predictor, Limits(timeout=300), similar=similar)) as client:
        broken = ("images", ("broken.jpg", b"nothing"))
        sent = [("images", (file.name, file.read_bytes())) for file in files]
        answer = client.post("/predict", files=[*sent, broken]).json()["predictions"]
    for prediction, found in zip(answer, expected, strict=False):
        assert [near["path"] for near in prediction["neighbors"]] == [near.name for near in found.neighbors]
        for near, neighbor in zip(prediction["neighbors"], found.neighbors, strict=True):
            assert near["label"] == neighbor.label
            assert near["similarity"] == pytest.approx(neighbor.similarity, abs=1e-3)
            with Image.open(io.BytesIO(base64.b64decode(near["webp"]))) as picture:
                assert max(picture.size) <= SIDE
    assert answer[0]["neighbors"][0]["path"] == "train/wren/large.jpg"
    assert answer[2]["error"] is not None
    assert answer[2]["neighbors"] == []


def test_no_folder_of_the_server_is_in_an_answer(place: Path) -> None:
    predictor = Predictor.load(place / "run", "cpu")
    index = NeighborIndex.open(predictor)
    # as of a table that lists images elsewhere
    names = [str(index.base / name) for name in index.names]
    names[0] = f"../images/{index.names[0]}"
    similar = SimilarImages(replace(index, names=names), 3)
    described = similar.describe([index._neighbor(number, 1.0) for number in range(2)])
    assert [one.path for one in described] == index.names[:2]
    elsewhere = replace(index, names=names)
    described = similar.describe([elsewhere._neighbor(number, 1.0) for number in range(2)])
    assert [one.path for one in described] == [Path(name).name for name in names[:2]]
    assert all(one.webp for one in described)


def test_a_number_that_is_too_large_is_refused(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    index = NeighborIndex.open(Predictor.load(place / "run", "cpu"))
    with pytest.raises(UsageError, match="neighbors must be from 1 to 10, not 11"):
        SimilarImages(index, 11)
    assert main(["serve", str(place / "run"), "--port", "0", "--neighbors", "11"]) == 2
    assert "neighbors must be from 1 to 10" in capsys.readouterr().err
