from __future__ import annotations

import os
import random
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import layouts
from crossx.data.index import Record, hold_out_test
from crossx.data.readers.folder import read_folder
from crossx.errors import CrossXError, UsageError


def touch(root: Path, *names: str) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return root


def test_classes_are_the_sorted_folders_and_every_image_has_its_own(tmp_path: Path) -> None:
    root = layouts.write_folder(tmp_path, classes=3, images_per_class=5)
    index = read_folder(root)
    assert index.name == "folder"
    assert index.classes == tuple(sorted(os.listdir(root)))
    assert sorted(record.path for record in index.records) == sorted(root.glob("*/*.jpg"))
    for record in index.records:
        assert index.classes[record.label] == record.path.parent.name


def test_split_folders_are_obeyed(tmp_path: Path) -> None:
    root = layouts.write_folder(tmp_path, classes=3, images_per_class=8, split_folders=True)
    index = read_folder(root, test_fraction=0.5)
    assert {split: len(index.split(split)) for split in ("train", "val", "test")} == {
        "train": 12,
        "val": 6,
        "test": 6,
    }
    for record in index.records:
        assert record.path.parent.parent.name == record.split


@pytest.mark.parametrize("name", ["val", "valid", "validation", "Validation"])
def test_names_of_the_validation_folder(tmp_path: Path, name: str) -> None:
    touch(tmp_path, "train/a/1.jpg", "train/b/1.jpg", f"{name}/a/2.jpg", "test/b/3.jpg")
    index = read_folder(tmp_path)
    assert [record.path.name for record in index.split("val")] == ["2.jpg"]
    assert index.with_validation(0.5) is index


def test_train_alone_has_no_test_split(tmp_path: Path) -> None:
    touch(tmp_path, "train/a/1.jpg", "train/a/2.jpg", "train/b/1.jpg")
    assert {record.split for record in read_folder(tmp_path).records} == {"train"}


def test_nested_linked_hidden_and_other_files(tmp_path: Path) -> None:
    elsewhere = touch(tmp_path / "elsewhere", "x.png")
    root = touch(
        tmp_path / "root", "a/deep/er/1.JPEG", "b/1.jpg", "b/.2.jpg", "b/readme.txt", ".git/c/1.jpg", "x.csv"
    )
    (root / "linked").symlink_to(elsewhere, target_is_directory=True)
    (root / "b" / "3.jpg").symlink_to(elsewhere / "x.png")
    index = read_folder(root, test_fraction=0)
    assert index.classes == ("a", "b", "linked")
    assert [record.path.relative_to(root).as_posix() for record in index.records] == [
        "a/deep/er/1.JPEG",
        "b/1.jpg",
        "b/3.jpg",
        "linked/x.png",
    ]


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    touch(tmp_path, "train/1.jpg", "bus/1.jpg")
    assert read_folder(tmp_path).classes == ("bus", "train")


def test_held_out_share_of_each_class(tmp_path: Path) -> None:
    touch(tmp_path, *(f"a/{i}.jpg" for i in range(20)), *(f"b/{i}.jpg" for i in range(3)), "c/0.jpg")
    index = read_folder(tmp_path, test_fraction=0.25)
    assert Counter(record.label for record in index.split("test")) == {0: 5, 1: 1}
    assert Counter(record.label for record in index.split("train")) == {0: 15, 1: 2, 2: 1}


def test_held_out_images_are_the_same_everywhere(tmp_path: Path) -> None:
    """Not moved by the root, the order of listing or another class; and pinned, so that no version moves them."""
    names = [f"{c}/{i}.jpg" for c in "ab" for i in range(10)]
    here = touch(tmp_path / "here", *names)
    there = touch(tmp_path / "there", *reversed(names), *(f"aa/{i}.jpg" for i in range(10)))

    def chosen(root: Path, seed: int = 0) -> set[str]:
        records = read_folder(root, split_seed=seed).split("test")
        return {str(record.path.relative_to(root)) for record in records}

    assert chosen(here) == {name for name in chosen(there) if not name.startswith("aa/")}
    assert chosen(here) != chosen(here, seed=1)
    assert chosen(here) == {"a/3.jpg", "a/9.jpg", "b/2.jpg", "b/3.jpg"}


@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=5),
    fraction=st.floats(0, 1, exclude_max=True),
    seed=st.integers(0, 5),
)
def test_hold_out_keeps_and_gives_at_least_one(sizes: list[int], fraction: float, seed: int) -> None:
    root = Path("/data")
    records = [Record(root / f"{c}/{i}.jpg", c, "train") for c, size in enumerate(sizes) for i in range(size)]
    classes = [str(c) for c in range(len(sizes))]
    split = hold_out_test(records, classes, root, fraction, seed)
    assert [(record.path, record.label) for record in split] == [(r.path, r.label) for r in records]
    shuffled = random.Random(1).sample(records, len(records))
    assert set(hold_out_test(shuffled, classes, root, fraction, seed)) == set(split)
    for c, size in enumerate(sizes):
        test = sum(record.label == c and record.split == "test" for record in split)
        assert test < size
        assert abs(test - fraction * size) <= 1
        assert test >= (size > 1 and fraction > 0)


@pytest.mark.parametrize("fraction", [-0.1, 1.0, 1.5])
def test_impossible_fraction(tmp_path: Path, fraction: float) -> None:
    touch(tmp_path, "a/1.jpg", "b/1.jpg")
    with pytest.raises(UsageError, match=r"data\.test_fraction"):
        read_folder(tmp_path, test_fraction=fraction)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "holds no class folders"),
        (["1.jpg", "2.jpg"], "need one folder per class"),
        (["train/1.jpg", "test/2.jpg"], "train: holds no class folders. The images in it"),
        (["a/readme.txt", "b/notes.md"], "no images in any of its 2 folders"),
        (["a/1.jpg", "b/readme.txt", "c/x.txt"], "no images in classes 'b', 'c'"),
        (["train/a/1.jpg", "train/b/x.txt", "test/b/1.jpg"], "no images in class 'b'"),
        (["train/a/1.jpg", "train/b/1.jpg", "test/c/1.jpg"], "class 'c' only in the test split"),
        (["train/a/1.jpg", "train/b/1.jpg", "valid/c/1.jpg"], "class 'c' only in the val split"),
        (["train/a/1.jpg", "train/b/1.jpg", "val/a/1.jpg", "valid/a/1.jpg"], "both 'val' and 'valid'"),
        (["train/a/1.jpg", "train/b/1.jpg", "extra/1.jpg"], "'extra' is next to the split folder 'train'"),
        (["val/a/1.jpg", "test/b/1.jpg"], "no folder 'train' next to 'test', 'val'"),
        (["birds/a/1.jpg", "birds/b/1.jpg"], "only one class folder, 'birds'"),
    ],
)
def test_wrong_layouts_are_one_clear_line(tmp_path: Path, files: list[str], message: str) -> None:
    root = touch(tmp_path, *files)
    with pytest.raises(CrossXError) as caught:
        read_folder(root)
    assert message in str(caught.value)
    assert str(root) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 1


def test_root_missing_or_a_file(tmp_path: Path) -> None:
    with pytest.raises(CrossXError, match="no such folder"):
        read_folder(tmp_path / "missing")
    with pytest.raises(CrossXError, match="is a file"):
        read_folder(touch(tmp_path, "archive.zip") / "archive.zip")


def test_a_class_name_that_is_not_utf8_is_escaped(tmp_path: Path) -> None:
    for name in (b"caf\xe9", b"caf\xc3\xa9", b"tea"):
        touch(tmp_path, *(f"{os.fsdecode(name)}/{number}.jpg" for number in range(5)))
    index = read_folder(tmp_path)
    assert index.classes == ("caf\\xe9", "caf\u00e9", "tea")
    assert all(record.path.exists() for record in index.records)
