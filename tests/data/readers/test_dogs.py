from pathlib import Path

import pytest
from scipy.io import savemat

from crossx.data.readers.dogs import read_dogs
from layouts import DOGS, write_dogs, write_dogs_list
from refusals import refusal

pytestmark = pytest.mark.usefixtures("forked_mat")


def test_what_was_written_is_read(tmp_path: Path) -> None:
    index = read_dogs(write_dogs(tmp_path))
    assert index.name == "dogs"
    assert index.classes == ("Chihuahua", "Japanese_spaniel", "toy_terrier")
    assert [(record.label, record.split) for record in index.records] == [
        *((label, "train") for label in (0, 0, 1, 1, 2, 2)),
        *((label, "test") for label in (0, 0, 1, 1, 2, 2)),
    ]
    assert index.records[0].path == tmp_path / "Images" / DOGS[0] / "n02085620_0.jpg"
    assert all(record.path.is_file() for record in index.records)
    # The official labels follow the folders' names.
    assert all(record.path.parent.name == DOGS[record.label] for record in index.records)


def test_the_lists_may_lie_in_a_folder(tmp_path: Path) -> None:
    beside = read_dogs(write_dogs(tmp_path))
    for name in ("file", "train", "test"):
        (tmp_path / f"{name}_list.mat").unlink()
    assert read_dogs(write_dogs(tmp_path, lists="lists")) == beside


def test_a_subset_keeps_the_order_of_class_ids(tmp_path: Path) -> None:
    (tmp_path / "Images").mkdir()
    write_dogs_list(tmp_path / "train_list.mat", ["n3-c/1.jpg", "n1-a/1.jpg"], [90, 7])
    write_dogs_list(tmp_path / "test_list.mat", ["n2-b-b/1.jpg"], [11])
    index = read_dogs(tmp_path)
    assert index.classes == ("a", "b-b", "c")
    assert [record.label for record in index.records] == [2, 0, 1]


def test_one_image_a_split(tmp_path: Path) -> None:
    index = read_dogs(write_dogs(tmp_path, classes=1, images_per_class=2))
    assert [(record.label, record.split) for record in index.records] == [(0, "train"), (0, "test")]


def test_breeds_named_alike_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "Images").mkdir()
    write_dogs_list(tmp_path / "train_list.mat", ["n1-husky/1.jpg", "n2-husky/1.jpg"], [1, 2])
    write_dogs_list(tmp_path / "test_list.mat", ["n3/1.jpg"], [3])
    assert read_dogs(tmp_path).classes == ("husky (1)", "husky (2)", "n3")


@pytest.mark.parametrize(
    ("files", "labels", "problem"),
    [
        ([f"{DOGS[0]}/7.jpg"], [2], "class 2 is in folder 'n02085620-Chihuahua', but earlier in"),
        ([f"{DOGS[0]}/7.jpg"], [1.5], "the label must be a whole number, not '1.5'"),
        (["7.jpg"], [1], "expected folder/file, found '7.jpg'"),
        ([f"{DOGS[0]}/../../7.jpg"], [1], "leads out of"),
        ([f"{DOGS[0]}/n02085620_0.jpg"], [1], "was already listed in"),
    ],
)
def test_a_malformed_entry_is_named(
    tmp_path: Path, files: list[str], labels: list[int], problem: str
) -> None:
    root = write_dogs(tmp_path)
    path = root / "test_list.mat"
    write_dogs_list(path, [f"{DOGS[1]}/1.jpg", *files], [2, *labels])
    message = refusal(read_dogs, root)
    assert message.startswith(f"{path}, entry 2: ")
    assert problem in message


def test_labels_that_are_fewer_than_files(tmp_path: Path) -> None:
    root = write_dogs(tmp_path)
    write_dogs_list(root / "test_list.mat", ["a/1.jpg", "a/2.jpg"], [1])
    assert f"{root / 'test_list.mat'}: 2 file_list, 1 labels" in refusal(read_dogs, root)


@pytest.mark.parametrize("name", ["train_list.mat", "test_list.mat"])
@pytest.mark.parametrize("lists", [".", "lists"])
def test_half_an_archive_names_the_missing_file(tmp_path: Path, lists: str, name: str) -> None:
    path = write_dogs(tmp_path, lists=lists) / lists / name
    path.unlink()
    assert f"{path} is missing" in refusal(read_dogs, tmp_path)


def test_a_list_of_something_else(tmp_path: Path) -> None:
    root = write_dogs(tmp_path)
    savemat(root / "train_list.mat", {"train_data": 1})
    assert "has no variable 'file_list'" in refusal(read_dogs, root)


def test_the_images_folder_is_needed(tmp_path: Path) -> None:
    root = write_dogs(tmp_path)
    (root / "Images").rename(root / "elsewhere")
    assert f"{root / 'Images'}/ is missing" in refusal(read_dogs, root)
