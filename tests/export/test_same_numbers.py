"""Every way to ask a network gives the same labels and probabilities for the same images.

The ways are Python, the command in each of its formats, a collection, the HTTP service, and exported files in each of
these. What they must give is computed here by a plain loop over the images: decode, prepare, network, softmax.
"""

import base64
import csv
import functools
import io
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import layouts
from crossx.cli.main import main
from crossx.data.image_files import find_images
from crossx.data.transforms import eval_transform
from crossx.export.export import export_run
from crossx.methods.weights import load_method
from crossx.predict.predictor import Predictor
from crossx.runs import EXPORT_SUFFIXES, Run, write_json
from slow import slow_except

pytestmark = pytest.mark.usefixtures("one_onnx_export")

CLASSES = ("jay", "owl", "wren")
TEMPERATURE = 0.6
TOLERANCE = {"run": 1e-6, **dict.fromkeys(EXPORT_SUFFIXES, 1e-5)}
"""Largest difference of a probability: batches of other sizes are rounded otherwise, other runtimes a little more."""
PACKAGES = {"onnx": ("onnxscript", "onnxruntime"), "openvino": ("onnxscript", "openvino")}

Answers: TypeAlias = Mapping[str, Mapping[str, float]]
"""File name -> class -> probability, most probable class first."""


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of other sizes and formats, one that lies on its side by EXIF, one with transparency."""
    folder = tmp_path_factory.mktemp("photos")
    for number, size in enumerate([(48, 40), (90, 300), (641, 480), (72, 72)]):
        layouts.write_image(folder / f"{number}.jpg", number % 3, number, size)
    with Image.open(folder / "2.jpg") as image:
        exif = Image.Exif()
        exif[0x0112] = 6
        image.save(folder / "side.jpg", exif=exif)
        image.convert("LA").save(folder / "grey.png")
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A calibrated run of Cross-X."""
    run = Run(layouts.write_run(tmp_path_factory.mktemp("run"), CLASSES))
    write_json(run.spec, replace(run.read_spec(), temperature=TEMPERATURE).to_json())
    return run.path


@pytest.fixture(scope="module")
def expected(run: Path, photos: Path) -> Answers:
    """Decode and classify the images one by one."""
    method, spec = load_method(run)
    preprocessing = spec.preprocessing
    prepare = eval_transform(preprocessing)
    mean, std = (torch.tensor(values)[:, None, None] for values in (preprocessing.mean, preprocessing.std))
    answers = {}
    for path in find_images(photos):
        pixels = prepare(prepare.read(path)).float() / 255
        with torch.inference_mode():
            logits = method(((pixels - mean) / std)[None])[0].double().numpy()
        powers = np.exp((logits - logits.max()) / TEMPERATURE)
        order = np.argsort(-powers)
        answers[path.name] = {CLASSES[k]: float(powers[k] / powers.sum()) for k in order}
    return answers


@pytest.fixture(scope="module")
def network(run: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Give the run, or the file of an export of it, which is written once."""

    @functools.cache
    def network(kind: str) -> Path:
        if kind == "run":
            return run
        for package in PACKAGES.get(kind, ()):
            pytest.importorskip(package, reason="needs crossx[export]")
        file = tmp_path_factory.mktemp("exported") / f"network{EXPORT_SUFFIXES[kind]}"
        return export_run(run, file, images=photos).files[0]

    return network


def by_python(network: Path, photos: Path, place: Path) -> Answers:
    predictions = Predictor.load(network, "cpu", trust=True).predict(photos, top=3, batch_size=4)
    return {one.path.name: dict(one.top) for one in predictions if one.path is not None}


def grouped(rows: list[dict[str, Any]]) -> Answers:
    """Gather the rows of a table with a row a rank."""
    answers: dict[str, dict[str, float]] = {}
    for row in sorted(rows, key=lambda row: int(row["rank"])):
        answers.setdefault(Path(row["path"]).name, {})[row["label"]] = float(row["probability"])
    return answers


def command(network: Path, photos: Path, output: Path) -> Path:
    words = ["predict", str(network), str(photos), "--output", str(output)]
    assert main([*words, "--top", "3", "--device", "cpu", "--trust"]) == 0
    return output


def by_csv(network: Path, photos: Path, place: Path) -> Answers:
    with command(network, photos, place / "x.csv").open(newline="") as file:
        return grouped(list(csv.DictReader(file)))


def by_json_lines(network: Path, photos: Path, place: Path) -> Answers:
    lines = command(network, photos, place / "x.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert all((row["label"], row["probability"]) == tuple(row["top"][0].values()) for row in rows)
    return {Path(row["path"]).name: {one["label"]: one["probability"] for one in row["top"]} for row in rows}


def by_parquet(network: Path, photos: Path, place: Path) -> Answers:
    return grouped(pq.read_table(command(network, photos, place / "x.parquet")).to_pylist())


def by_collection(network: Path, photos: Path, place: Path) -> Answers:
    return grouped(pq.read_table(command(network, photos, place / "x")).to_pylist())


def client(network: Path) -> Any:
    pytest.importorskip("fastapi", reason="needs crossx[serve]")
    from fastapi.testclient import TestClient

    from crossx.serve.app import create_app

    return TestClient(create_app(Predictor.load(network, "cpu", trust=True)))


def ranked(prediction: Mapping[str, Any]) -> Mapping[str, float]:
    best = prediction["top"][0]
    assert (best["label"], best["probability"]) == (prediction["label"], prediction["probability"])
    return {one["label"]: one["probability"] for one in prediction["top"]}


def by_http(network: Path, photos: Path, place: Path) -> Answers:
    files = [("images", (path.name, path.read_bytes())) for path in find_images(photos)]
    with client(network) as service:
        predictions = service.post("/predict", files=files).json()["predictions"]
    return {one["name"]: ranked(one) for one in predictions}


def by_base64(network: Path, photos: Path, place: Path) -> Answers:
    paths = find_images(photos)
    encoded = [base64.b64encode(path.read_bytes()).decode() for path in paths]
    with client(network) as service:
        predictions = service.post("/predict", json={"images": encoded}).json()["predictions"]
    return {path.name: ranked(one) for path, one in zip(paths, predictions, strict=True)}


def by_explanation(network: Path, photos: Path, place: Path) -> Answers:
    answers = {}
    with client(network) as service:
        for path in find_images(photos):
            files = {"images": (path.name, io.BytesIO(path.read_bytes()))}
            content = service.post("/explain?format=json", files=files).json()
            answers[path.name] = ranked(content["prediction"])
    return answers


WAYS = (by_python, by_csv, by_json_lines, by_parquet, by_collection, by_http, by_base64)
OF_RUNS = [("run", way) for way in (*WAYS, by_explanation)]
OF_FILES = {kind: [(kind, way) for way in (by_python, by_collection, by_http)] for kind in EXPORT_SUFFIXES}


@pytest.mark.parametrize(
    ("kind", "way"), slow_except([*OF_RUNS, *chain(*OF_FILES.values())], *OF_RUNS, *OF_FILES["safetensors"])
)
def test_every_way_gives_the_same_numbers(
    kind: str,
    way: Callable[[Path, Path, Path], Answers],
    network: Callable[[str], Path],
    expected: Answers,
    photos: Path,
    tmp_path: Path,
) -> None:
    found = way(network(kind), photos, tmp_path)
    assert found.keys() == expected.keys()
    for name, probabilities in expected.items():
        assert list(found[name]) == list(probabilities)
        assert found[name] == pytest.approx(probabilities, abs=TOLERANCE[kind])
