"""Measuring a run as a user does, on tiny sets with known parts."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import map_coordinates
from torch.nn import functional as F

from crossx.cli.part_results import print_parts
from crossx.data.catalog import read_dataset
from crossx.data.images import read_image, read_size
from crossx.data.transforms import Normalize, eval_crop_place, eval_transform
from crossx.errors import CrossXError
from crossx.evaluation.parts.run import measure_run
from crossx.methods import create_method, list_methods
from crossx.methods.weights import describe, load_method, save_weights
from crossx.report.part_tables import part_tables
from crossx.runs import Preprocessing, Run, read_json, write_json
from layouts import write_cub, write_folder, write_nabirds
from slow import slow_except

PREPROCESSING = Preprocessing(64, 72, "bilinear", (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
DRAWN = {"num_classes": 3, "images_per_class": 6}


@pytest.fixture(scope="module")
def birds(tmp_path_factory):
    root = tmp_path_factory.mktemp("drawn") / "birds"
    read_dataset("synthetic", root, **DRAWN)
    return root


def write_run(folder, dataset, root, method="crossx", **options):
    index = read_dataset(dataset, root, **options)
    torch.manual_seed(0)
    network = create_method(
        method, backbone="test_resnet", num_classes=len(index.classes), image_size=PREPROCESSING.image_size
    )
    spec = describe(network, classes=index.classes, preprocessing=PREPROCESSING, dataset=dataset)
    run = Run(folder)
    write_json(run.spec, spec.to_json())
    save_weights(network, run.weights)
    data = {"dataset": dataset, "root": str(root), "batch_size": 4, "num_workers": 0, **options}
    write_json(run.info, {"schema": 1, "data_root": str(root), "seed": 7, "data": data})
    return run


@torch.inference_mode()
def share_by_pixels(run, record, part, stage, excitation):
    """Share of activation within a part, and of area, pixel by pixel of the crop."""
    method, spec = load_method(run.path)
    crop = eval_transform(spec.preprocessing)(read_image(record.path))
    maps = method.activation_maps(Normalize(spec.preprocessing)(crop[None]))[stage][:, excitation]
    pixels = F.interpolate((maps - maps.min())[:, None], (640, 640), mode="nearest")[0, 0]
    x, y, width, height = record.parts[part]
    place = eval_crop_place(spec.preprocessing, *read_size(record.path))
    corners = place(torch.tensor([[x, y], [x + width, y + height]])) * 10
    (left, top), (right, bottom) = corners.round().int().clamp(0, 640).tolist()
    inside = pixels[top:bottom, left:right]
    return (inside.sum() / pixels.sum()).item(), inside.numel() / 640**2


@pytest.mark.slow
def test_measures_of_drawn_birds(tmp_path, birds):
    run = write_run(tmp_path / "run", "synthetic", birds, **DRAWN)
    results = measure_run(run.path)
    assert read_json(run.path / "test_parts.json") == json.loads(json.dumps(results))
    assert {
        "method": "crossx",
        "dataset": "synthetic",
        "split": "test",
        "n": 6,
        "seed": 7,
    }.items() <= results.items()
    records = read_dataset("synthetic", birds, **DRAWN).split("test")
    place = eval_crop_place(PREPROCESSING, 128, 128)
    for stage, part in (("last", "wing"), ("previous", "breast"), ("merged", "tail")):
        shown = [
            record for record in records if part in record.parts and is_in_crop(place, record.parts[part])
        ]
        assert results["parts"][part] == len(shown)
        for excitation in range(2):
            pairs = [share_by_pixels(run, record, part, stage, excitation) for record in shown]
            expected = np.mean(pairs, axis=0)
            found = results["stages"][stage]["excitations"][excitation]["share"][part]
            assert (found["value"], found["chance"]) == pytest.approx(tuple(expected), abs=0.005)
            assert found["over_chance"] == pytest.approx(expected[0] / expected[1], abs=0.05)
    with Image.open(run.path / "test" / "parts.png") as picture:
        picture.verify()


@pytest.mark.slow
@torch.inference_mode()
def test_stability_of_one_image_at_a_time(tmp_path, birds):
    run = write_run(tmp_path / "run", "synthetic", birds, **DRAWN)
    stages = measure_run(run.path)["stages"]
    method, spec = load_method(run.path)
    flipped, zoomed = [], []
    for record in read_dataset("synthetic", birds, **DRAWN).split("test"):
        crop = eval_transform(spec.preprocessing)(read_image(record.path))
        image = Normalize(spec.preprocessing)(crop[None])
        window = F.interpolate(image[:, :, :56, :56], (64, 64), mode="bilinear")
        maps, mirrored, close = (
            method.activation_maps(view)["previous"][0, 1].numpy() for view in (image, image.flip(3), window)
        )
        flipped.append(np.corrcoef(maps.ravel(), np.fliplr(mirrored).ravel())[0, 1])
        size = maps.shape[0]
        at = np.clip((np.arange(size) + 0.5) * 56 / 64 - 0.5, 0, size - 1)
        region = map_coordinates(maps, np.meshgrid(at, at, indexing="ij"), order=1)
        zoomed.append(np.corrcoef(region.ravel(), close.ravel())[0, 1])
    found = stages["previous"]["excitations"][1]
    assert found["flip"]["value"] == pytest.approx(np.mean(flipped), abs=1e-3)
    assert found["zoom"]["value"] == pytest.approx(np.mean(zoomed), abs=1e-3)


def is_in_crop(place, box):
    x, y, width, height = box
    centre = place(torch.tensor([x + width / 2, y + height / 2]))
    return bool(((centre >= 0) & (centre < 64)).all())


@pytest.mark.parametrize("method", slow_except(list_methods(), "plain"))
def test_every_method_and_number_of_images_a_step(tmp_path, birds, method):
    run = write_run(tmp_path / "run", "synthetic", birds, method, **DRAWN)
    two, six = (measure_run(run.path, batch_size=size, output=tmp_path / str(size)) for size in (2, 6))
    assert not (run.path / "test_parts.json").exists()
    for stage, measured in two["stages"].items():
        assert (measured["consistency"] is None) == (len(measured["excitations"]) == 1)
        for part, numbers in measured["excitations"][0]["share"].items():
            other = six["stages"][stage]["excitations"][0]["share"][part]
            assert numbers["value"] == pytest.approx(other["value"], abs=1e-4)


@pytest.mark.parametrize(
    ("dataset", "write", "parts"),
    [
        ("cub", write_cub, {"back", "left eye"}),
        pytest.param("nabirds", write_nabirds, {"bill"}, marks=pytest.mark.slow),
    ],
)
def test_keypoints(tmp_path, dataset, write, parts):
    root = write(tmp_path / "archive")
    run = write_run(tmp_path / "run", dataset, root)
    results = measure_run(run.path)
    json.dumps(results, allow_nan=False)
    assert results["parts"].keys() == parts
    assert results["stages"]["last"]["keypoints"]["error"]["value"] > 0
    assert results["stages"]["last"]["excitations"][0]["object"] is not None
    chance = [numbers["chance"] for numbers in results["stages"]["last"]["excitations"][0]["share"].values()]
    # a disc, part of which may lie beyond the crop
    longest = max(20.5 * 72 / 48, 30 * 72 / 40) / 64
    assert 0 < max(chance) < 1.05 * np.pi * (0.1 * longest) ** 2


@pytest.mark.slow
def test_validation_images(tmp_path, birds):
    run = write_run(tmp_path / "run", "synthetic", birds, **DRAWN)
    info = run.read_info()
    write_json(run.info, {**info, "data": {**info["data"], "val_fraction": 0.25}})
    assert measure_run(run.path, split="val")["n"] == 3
    assert (run.path / "val_parts.json").is_file()


@pytest.mark.slow
def test_a_regression_on_the_measured_or_on_too_few_images_is_not_measured(tmp_path, birds, capsys):
    run = write_run(tmp_path / "run", "synthetic", birds, "pdisconet", **DRAWN)
    reasons = {}
    for split in ("train", "test"):
        results = measure_run(run.path, split=split)
        json.dumps(results, allow_nan=False)
        assert "part map" in results["verdict"]
        keypoints = results["stages"]["parts"]["keypoints"]
        assert keypoints["error"] is None
        reasons[split] = keypoints["error_not_measured"]
        print_parts(run.path, results)
        assert f"keypoint error       not measured: {reasons[split]}" in capsys.readouterr().out
        assert part_tables(results)
    assert reasons == {
        "train": "the images are those of the regression",
        "test": "12 images for 16 regressors",
    }


def test_images_without_parts(tmp_path, capsys):
    run = write_run(tmp_path / "own", "folder", write_folder(tmp_path / "images", split_folders=True))
    results = measure_run(run.path)
    json.dumps(results, allow_nan=False)
    print_parts(run.path, results)
    (header,) = [line for line in capsys.readouterr().out.splitlines() if "last 1" in line]
    assert "images" not in header
    assert results["parts"] == {}
    assert "excitations" in results["verdict"]
    for stage in results["stages"].values():
        assert stage["consistency"] is stage["keypoints"] is stage["prototypes"] is None
        first = stage["excitations"][0]
        assert (first["share"], first["any_part"], first["object"]) == ({}, None, None)
        assert {"upside_down", "quarter_turn", "rows", "other_images"} <= first.keys()
    with Image.open(run.path / "test" / "parts.png") as picture:
        picture.verify()


def test_parts_that_lie_nowhere_in_the_images_are_refused(tmp_path):
    root = write_cub(tmp_path / "cub")
    places = root / "parts/part_locs.txt"
    places.write_text("".join(f"{i} 1 {1000 + i} 900 1\n" for i in range(1, 13)))
    with pytest.raises(CrossXError, match="no part is in the crops of its test images"):
        measure_run(write_run(tmp_path / "run", "cub", root).path)


def test_maps_that_are_not_finite_are_refused(tmp_path, birds):
    run = write_run(tmp_path / "run", "synthetic", birds, **DRAWN)
    method, _ = load_method(run.path)
    with torch.no_grad():
        method.backbone.trunk.conv1[0].weight.fill_(torch.nan)
    save_weights(method, run.weights)
    with pytest.raises(CrossXError, match="maps of stage 'previous' are not finite"):
        measure_run(run.path)
