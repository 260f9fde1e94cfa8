from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.io import loadmat, savemat
from torchvision.datasets import StanfordCars

from crossx.data.index import DatasetIndex
from crossx.data.readers.cars import read_cars
from layouts import CARS, CARS_BOX, mat_cells, mat_structs, write_cars
from refusals import refusal

pytestmark = pytest.mark.usefixtures("forked_mat")

LAYOUTS = ("joint", "devkit")


def images_of(index: DatasetIndex) -> set[tuple[int, str, bytes]]:
    return {(record.label, record.split, record.path.read_bytes()) for record in index.records}


def change(path: Path, entry: int, **fields: Any) -> None:
    """Change fields of an annotation, counted from 1, ``None`` leaving the field out everywhere."""
    content = loadmat(path, simplify_cells=True)
    annotations = content["annotations"]
    for name, value in fields.items():
        annotations[entry - 1][name] = value
    kept = [
        {key: value for key, value in annotation.items() if fields.get(key, 0) is not None}
        for annotation in annotations
    ]
    names = {"class_names": mat_cells(list(content["class_names"]))} if "class_names" in content else {}
    savemat(path, {"annotations": mat_structs(kept), **names})


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_was_written_is_read(tmp_path: Path, layout: str) -> None:
    index = read_cars(write_cars(tmp_path, layout=layout))
    assert index.name == "cars"
    assert index.classes == CARS
    assert sorted((record.label, record.split) for record in index.records) == sorted(
        (label, split) for label in range(3) for split in ("train", "test") for _ in range(2)
    )
    assert {record.box for record in index.records} == {(2.0, 3.0, 30.0, 30.0)}
    assert all(record.path.is_file() for record in index.records)


def test_both_layouts_hold_the_same_images(tmp_path: Path) -> None:
    joint = read_cars(write_cars(tmp_path / "joint", layout="joint"))
    devkit = read_cars(write_cars(tmp_path / "devkit", layout="devkit"))
    assert images_of(joint) == images_of(devkit)


def test_as_torchvision_reads_it(tmp_path: Path) -> None:
    root = write_cars(tmp_path / "stanford_cars", classes=4, images_per_class=3)
    index = read_cars(root)
    for split in ("train", "test"):
        reference = StanfordCars(str(tmp_path), split=split)
        assert [(str(record.path), record.label) for record in index.split(split)] == reference._samples
        assert list(index.classes) == reference.classes
    assert read_cars(tmp_path) == index


def test_the_labelled_test_list_may_lie_in_the_devkit(tmp_path: Path) -> None:
    beside = read_cars(write_cars(tmp_path / "beside"))
    inside = read_cars(write_cars(tmp_path / "inside", test_list="devkit"))
    assert images_of(beside) == images_of(inside)


def test_no_labelled_test_list_is_said_clearly(tmp_path: Path) -> None:
    message = refusal(read_cars, write_cars(tmp_path, test_list=None))
    assert f"{tmp_path / 'cars_test_annos_withlabels.mat'} is missing" in message
    assert "cars_test_annos.mat has no classes" in message


def test_the_unlabelled_list_under_the_labelled_name(tmp_path: Path) -> None:
    root = write_cars(tmp_path, test_list=None)
    path = root / "cars_test_annos_withlabels.mat"
    (root / "devkit/cars_test_annos.mat").rename(path)
    assert f"{path}: its annotations have no field 'class'" in refusal(read_cars, root)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_class_of_two_images(tmp_path: Path, layout: str) -> None:
    index = read_cars(write_cars(tmp_path, classes=1, images_per_class=2, layout=layout))
    assert index.classes == CARS[:1]
    assert [(record.label, record.split) for record in index.records] == [(0, "train"), (0, "test")]


@pytest.mark.parametrize(("has_images", "expected"), [(False, "cars_train"), (True, "car_ims")])
def test_the_layout_whose_images_are_there_is_read(tmp_path: Path, has_images: bool, expected: str) -> None:
    root = write_cars(write_cars(tmp_path, layout="joint"))
    if not has_images:
        (root / "car_ims").rename(root / "elsewhere")
    assert read_cars(root).records[0].path.parent.name == expected


@pytest.mark.parametrize(
    ("layout", "folder"), [("joint", "car_ims"), ("devkit", "cars_train"), ("devkit", "cars_test")]
)
def test_the_images_folder_is_needed(tmp_path: Path, layout: str, folder: str) -> None:
    root = write_cars(tmp_path, layout=layout)
    (root / folder).rename(root / "elsewhere")
    assert f"{root / folder}/ is missing" in refusal(read_cars, root)


@pytest.mark.parametrize("file", ["devkit/cars_meta.mat", "devkit/cars_train_annos.mat"])
def test_half_a_devkit_names_the_missing_file(tmp_path: Path, file: str) -> None:
    root = write_cars(tmp_path)
    (root / file).unlink()
    assert f"{root / file} is missing" in refusal(read_cars, root)


def test_neither_layout(tmp_path: Path) -> None:
    (tmp_path / "car_ims").mkdir()
    assert f"{tmp_path} holds neither cars_annos.mat" in refusal(read_cars, tmp_path)


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"class": 4}, "class 4 is outside the 3 classes"),
        ({"class": 0}, "class 0 is outside the 3 classes"),
        ({"class": 1.5}, "'class' must be a whole number, not '1.5'"),
        ({"class": np.zeros((0, 0))}, "'class' holds no value"),
        ({"relative_im_path": ""}, "'relative_im_path' holds no value"),
        ({"relative_im_path": "../x.jpg"}, "leads out of"),
        ({"relative_im_path": "car_ims/000001.jpg"}, "was already listed in"),
        ({"test": 2}, "'test' must be 0 or 1, not '2'"),
        ({"bbox_x2": 1}, "the box ends before it begins"),
        ({"bbox_y1": "top"}, "box corners must be numbers"),
    ],
)
def test_a_malformed_entry_is_named(tmp_path: Path, fields: dict[str, Any], problem: str) -> None:
    root = write_cars(tmp_path, layout="joint")
    change(root / "cars_annos.mat", 5, **fields)
    message = refusal(read_cars, root)
    assert message.startswith(f"{root / 'cars_annos.mat'}, entry 5: ")
    assert problem in message


def test_a_missing_field(tmp_path: Path) -> None:
    root = write_cars(tmp_path, layout="joint")
    change(root / "cars_annos.mat", 1, test=None)
    assert "its annotations have no field 'test'" in refusal(read_cars, root)


def test_corners_count_from_one_and_belong_to_the_box(tmp_path: Path) -> None:
    root = write_cars(tmp_path, layout="joint")
    change(root / "cars_annos.mat", 1, bbox_x1=1, bbox_y1=1, bbox_x2=48, bbox_y2=40)
    index = read_cars(root)
    assert index.records[0].box == (0.0, 0.0, 48.0, 40.0)
    assert index.records[1].box == (CARS_BOX["bbox_x1"] - 1, CARS_BOX["bbox_y1"] - 1, 30.0, 30.0)
