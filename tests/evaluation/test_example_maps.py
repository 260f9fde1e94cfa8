from pathlib import Path

import numpy as np
import pytest
import torch

import layouts
from crossx.data.transforms import Normalize, eval_transform
from crossx.evaluation.examples import ExampleMaps, compute_maps, maps_path
from crossx.evaluation.network import TorchNetwork
from crossx.evaluation.predictions import Predictions
from crossx.methods.weights import load_method

NUMBERS = [1, 4, 5]


def predicted(seed: int = 0) -> Predictions:
    generator = np.random.default_rng(seed)
    logits = generator.normal(size=(6, 3)).astype(np.float32)
    return Predictions(logits, np.arange(6) % 3, np.array(list("abcdef")), np.array(list("xyz")))


def example_maps(boxes: bool = True) -> ExampleMaps:
    generator = np.random.default_rng(1)
    maps = {
        stage: generator.normal(size=(3, 2, side, side)).astype(np.float32)
        for stage, side in (("last", 2), ("previous", 4))
    }
    return ExampleMaps(maps, generator.uniform(0, 9, (3, 2, 4)).astype(np.float32) if boxes else None)


@pytest.mark.parametrize("boxes", [True, False])
def test_maps_survive_their_file(tmp_path: Path, boxes: bool) -> None:
    path, saved = maps_path(tmp_path, "val"), example_maps(boxes)
    saved.save(path, NUMBERS, predicted())
    loaded = ExampleMaps.load(path, NUMBERS, predicted())
    assert loaded is not None
    assert loaded.maps.keys() == saved.maps.keys()
    assert all(np.array_equal(loaded.maps[stage], saved.maps[stage]) for stage in saved.maps)
    assert np.array_equal(loaded.boxes, saved.boxes) if boxes else loaded.boxes is None


def test_maps_of_other_images_or_another_test_are_not_taken(tmp_path: Path) -> None:
    path = tmp_path / "examples.npz"
    assert ExampleMaps.load(path, NUMBERS, predicted()) is None
    example_maps().save(path, NUMBERS, predicted())
    assert ExampleMaps.load(path, NUMBERS[:2], predicted()) is None
    assert ExampleMaps.load(path, [1, 4, 3], predicted()) is None
    assert ExampleMaps.load(path, NUMBERS, predicted(seed=1)) is None


@pytest.mark.parametrize(
    "broken",
    [
        {"map last": np.zeros((3, 2, 2))},  # one dimension too few
        {"map last": np.zeros((2, 2, 2, 2))},  # of fewer images
        {"map last": np.full((3, 2, 2, 2), np.nan)},
        {"map last": np.zeros((3, 0, 2, 2))},
        {"map last": np.zeros((3, 2, 2, 2), int)},
        {"map last": np.array(["a", "b", "c"])},
        {"boxes": np.zeros((3, 2, 5))},
        {"boxes": np.zeros((2, 2, 4))},
        {"key": np.zeros(4, np.int64)},
        {"key": np.array("text")},
        {"key": np.array([{}], dtype=object)},
    ],
    ids=str,
)
def test_a_damaged_file_is_as_good_as_none(tmp_path: Path, broken: dict[str, np.ndarray]) -> None:
    path = tmp_path / "examples.npz"
    example_maps().save(path, NUMBERS, predicted())
    with np.load(path) as arrays:
        values = dict(arrays)
    np.savez(path, **(values | broken))
    assert ExampleMaps.load(path, NUMBERS, predicted()) is None
    whole = path.read_bytes()
    for length in (0, 1, len(whole) // 2):
        path.write_bytes(whole[:length])
        assert ExampleMaps.load(path, NUMBERS, predicted()) is None


def test_maps_are_those_of_the_method_one_image_at_a_time(tmp_path: Path) -> None:
    root = layouts.write_folder(tmp_path / "images", split_folders=True)
    method, spec = load_method(layouts.write_run(tmp_path / "run", sorted(layouts.FOLDERS)))
    files = sorted((tmp_path / "images").rglob("*.jpg"))[:5] or sorted(Path(root).rglob("*.*"))[:5]
    normalize, transform = Normalize(spec.preprocessing), eval_transform(spec.preprocessing)
    found = compute_maps(TorchNetwork(method, normalize, "cpu"), spec, files)
    assert found.boxes is None
    with torch.no_grad():
        for index, file in enumerate(files):
            expected = method.activation_maps(normalize(transform(transform.read(file))[None]))
            assert found.maps.keys() == expected.keys()
            for stage, maps in expected.items():
                assert found.maps[stage][index] == pytest.approx(maps[0].numpy(), abs=1e-5)
