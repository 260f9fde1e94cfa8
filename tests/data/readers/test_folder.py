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


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("training", "testing"),
        ("Training_Set", "Test_Set"),
        ("trn", "tst"),
        ("TRAIN", "Test"),
        ("train2017", "test2017"),
        ("train-images", "test-images"),
        ("trainset", "testset"),
        ("birds_train", "birds_test"),
        ("tr", "te"),
    ],
)
def test_other_usual_names_of_split_folders(tmp_path: Path, train: str, test: str) -> None:
    touch(tmp_path, *(f"{split}/{c}/1.jpg" for split in (train, test) for c in "ab"))
    index = read_folder(tmp_path)
    assert index.classes == ("a", "b")
    for split, folder in (("train", train), ("test", test)):
        assert {record.path.parent.parent.name for record in index.split(split)} == {folder}


def test_renamed_split_folders_are_noted(tmp_path: Path) -> None:
    touch(tmp_path, *(f"{split}/{c}/1.jpg" for split in ("training", "dev", "test") for c in "ab"))
    assert read_folder(tmp_path).notes == (
        "split folders with other names: read 'training' as train, 'dev' as val",
    )


def test_folders_without_images_next_to_split_folders(tmp_path: Path) -> None:
    touch(tmp_path, "train/a/1.jpg", "train/b/1.jpg", "test/a/2.jpg", "annotations/a.xml", "labels/a.txt")
    index = read_folder(tmp_path)
    assert len(index.records) == 3
    assert index.notes == ("no images in 'annotations', 'labels', next to the split folders: not read",)


@pytest.mark.parametrize("name", ["train", "test", "dev", "valid", "eval", "holdout"])
def test_a_class_with_the_name_of_a_split(tmp_path: Path, name: str) -> None:
    touch(tmp_path, f"{name}/1.jpg", "car/1.jpg", "bus/1.jpg")
    index = read_folder(tmp_path)
    assert index.classes == tuple(sorted(("bus", "car", name)))
    assert index.notes == (f"{name!r} read as a class, not as a split, next to 'bus', 'car'",)


def test_splits_with_unknown_names_are_noted(tmp_path: Path) -> None:
    touch(tmp_path, *(f"{split}/{c}/1.jpg" for split in ("treino", "teste") for c in ("red", "blue")))
    assert read_folder(tmp_path).notes == (
        "'teste', 'treino' all hold the folders 'blue', 'red': if those are the classes, rename the outer ones to "
        "train, val and test",
    )


def test_splits_with_unknown_names_and_different_classes_are_noted(tmp_path: Path) -> None:
    touch(tmp_path, "learn/a/1.jpg", "learn/b/1.jpg", "learn/c/1.jpg", "check/a/1.jpg", "check/b/1.jpg")
    (note,) = read_folder(tmp_path).notes
    assert note.startswith("'check', 'learn' all hold the folders 'a', 'b'")
    touch(tmp_path, "x/small/1.jpg", "learn/small/1.jpg", "check/small/1.jpg")
    assert read_folder(tmp_path).notes == ()


def test_a_class_without_images_in_test_is_noted(tmp_path: Path) -> None:
    touch(tmp_path, *(f"{s}/{c}/1.jpg" for s in ("train", "test") for c in "ab"), "test/c/readme.txt")
    index = read_folder(tmp_path)
    assert index.classes == ("a", "b")
    assert index.notes == ("no images in class 'c' of the test split",)


def test_runs_next_to_the_classes_are_skipped(tmp_path: Path) -> None:
    touch(tmp_path, "a/1.jpg", "b/1.jpg", "runs/one/run.json", "runs/one/maps/1.png", "mine/run.json")
    index = read_folder(tmp_path)
    assert index.classes == ("a", "b")
    assert index.notes == ("skipped 2 hidden or system files and folders: 'mine', 'runs'",)
    touch(tmp_path / "other", "a/1.jpg", "runs/1.jpg")
    assert read_folder(tmp_path / "other").classes == ("a", "runs")


def test_classes_with_other_words_of_splits(tmp_path: Path) -> None:
    touch(tmp_path, "test tube/1.jpg", "train station/1.jpg", "eval board/1.jpg")
    index = read_folder(tmp_path)
    assert index.classes == ("eval board", "test tube", "train station")
    assert index.notes == ()


def test_leftovers_of_other_programs_are_counted_and_nothing_else(tmp_path: Path) -> None:
    root = touch(tmp_path / "clean", *(f"{c}/{i}.jpg" for c in "ab" for i in range(4)))
    clean = read_folder(root)
    assert clean.notes == ()
    touch(
        root,
        *("__MACOSX/a/._0.jpg", "@eaDir/0.jpg/thumb.jpg", "$RECYCLE.BIN/x.jpg", ".Trash-1000/files/y.jpg"),
        *(
            "a/._0.jpg",
            "a/Thumbs.db",
            "a/@eaDir/0.jpg/SYNOPHOTO_THUMB_M.jpg",
            "b/.ipynb_checkpoints/0-checkpoint.jpg",
        ),
        *("b/0.jpg~", "b/1.jpg.crdownload", "desktop.ini", "b/1.xmp"),
    )
    for name in ("System Volume Information", "lost+found", "#recycle"):
        (root / name).mkdir()
    index = read_folder(root)
    assert index == clean
    (note,) = index.notes
    assert note.startswith("skipped 15 hidden or system files and folders: '#recycle', ")
    split = touch(tmp_path / "split", *(f"{s}/{c}/1.jpg" for s in ("train", "test") for c in "ab"))
    touch(split, "__MACOSX/train/a/._1.jpg", "train/@eaDir/1.jpg", "train/a/._1.jpg", "test/Thumbs.db")
    index = read_folder(split)
    assert index.classes == ("a", "b")
    assert len(index.records) == 4
    assert index.notes[0].startswith("skipped 4 hidden or system files and folders")


def test_images_of_formats_that_are_not_read_are_counted(tmp_path: Path) -> None:
    layouts.write_folder(tmp_path)
    assert read_folder(tmp_path).notes == ()
    folder = next(path for path in sorted(tmp_path.rglob("*")) if path.is_dir() and any(path.glob("*.jpg")))
    image = next(folder.glob("*.jpg"))
    # what a camera writes next to a JPEG, files that are no images, and what a program left
    for name in (f"{image.stem}.CR2", "notes.pdf", "labels.json", "._a.nef"):
        (folder / name).touch()
    assert not any("not read" in note for note in read_folder(tmp_path).notes)
    (folder / "alone.NEF").touch()
    assert "1 image that is not read (.nef): convert to JPEG or PNG" in read_folder(tmp_path).notes
    (folder / "more.svg").touch()
    (folder / "more.nef").touch()
    assert "3 images that are not read (.nef, .svg): convert to JPEG or PNG" in read_folder(tmp_path).notes


def test_images_without_a_class_are_counted(tmp_path: Path) -> None:
    touch(tmp_path, "train/a/1.jpg", "train/b/1.jpg", "test/1.jpg", "test/2.jpg")
    assert read_folder(tmp_path).notes == ("2 images in no class folder are not read",)


def test_one_class_per_text_of_a_name(tmp_path: Path) -> None:
    touch(
        tmp_path,
        "caf\u00e9/1.jpg",
        "cafe\u0301/2.jpg",
        "red/1.jpg",
        "red /2.jpg",
        "red\u00a0/3.jpg",
        "b/1.jpg",
    )
    index = read_folder(tmp_path, test_fraction=0)
    assert index.classes == ("b", "caf\u00e9", "red")
    assert Counter(record.label for record in index.records) == {0: 1, 1: 2, 2: 3}
    (note,) = index.notes
    assert note.isascii() or "\u00e9" in note
    assert "'cafe\\u0301', 'caf\\xe9'" in note


def test_names_that_only_look_the_same_are_kept_apart_with_a_note(tmp_path: Path) -> None:
    touch(tmp_path, "Red/1.jpg", "red/1.jpg", "1/1.jpg", "01/1.jpg", "a/1.jpg")
    index = read_folder(tmp_path)
    assert index.classes == ("01", "1", "Red", "a", "red")
    (note,) = index.notes
    assert "'01' and '1'" in note
    assert "'Red' and 'red'" in note


def test_a_class_that_differs_in_case_only_from_one_of_another_split(tmp_path: Path) -> None:
    touch(tmp_path, "train/Red/1.jpg", "train/b/1.jpg", "test/red/1.jpg")
    with pytest.raises(CrossXError, match="'Red' and 'red' look the same"):
        read_folder(tmp_path)


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    touch(tmp_path, os.fsdecode(b"caf\xe9/1\xff.jpg"), "b/1.jpg")
    index = read_folder(tmp_path, test_fraction=0)
    assert index.classes == ("b", "caf\\xe9")
    assert index.records[1].path.is_file()


def test_train_alone_has_no_test_split(tmp_path: Path) -> None:
    touch(tmp_path, "train/a/1.jpg", "train/a/2.jpg", "train/b/1.jpg")
    assert {record.split for record in read_folder(tmp_path).records} == {"train"}


def test_links_to_folders_above_add_no_images(tmp_path: Path) -> None:
    root = touch(
        tmp_path / "root", *(f"{name}/{number}.jpg" for name in ("wren", "robin") for number in range(4))
    )
    expected = read_folder(root, test_fraction=0)
    (root / "wren/up").symlink_to("..")
    (root / "loop").symlink_to(".")
    (root / "above").symlink_to(tmp_path)
    assert read_folder(root, test_fraction=0) == expected


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
        (["birds/a/1.jpg", "birds/b/1.jpg"], "For the classes inside it, give --data.root ROOT/birds."),
        (["x/y/a/1.jpg", "x/y/b/1.jpg"], "For the classes inside it, give --data.root ROOT/x/y."),
        (["x/train/a/1.jpg", "x/train/b/1.jpg"], "For the classes inside it, give --data.root ROOT/x/train."),
        (["x/train/a/1.jpg", "x/test/a/1.jpg"], "For the classes inside it, give --data.root ROOT/x."),
        (
            ["birds/1.jpg"],
            "only one class folder, 'birds', and a classifier needs two. Add a folder for each",
        ),
        (["birds/1.jpg", "birds/a/1.jpg"], "Add a folder for each other class."),
        (
            ["train/a/1.jpg", "train/b/1.jpg", "holdout/a/1.jpg"],
            "'holdout' may be a validation or a test split",
        ),
        (["training/a/1.jpg", "query/a/1.jpg"], "'query' is next to the split folder 'training'"),
        (
            ["trainA/a/1.jpg", "testA/a/1.jpg", "trainB/a/1.jpg", "testB/a/1.jpg"],
            "'testB', 'trainB' are next to",
        ),
        (["train/1.jpg", "test/1.jpg", "plane/1.jpg"], "'plane' is next to the split folder"),
        (["train/1.jpg", "tst/1.jpg"], "train: holds no class folders. The images in it"),
        (["fold1/a/1.jpg", "fold2/a/1.jpg"], "'fold1', 'fold2' seem to be parts of the data"),
        (["a/train/1.jpg", "a/test/1.jpg", "b/train/1.jpg"], "a: holds the split folders 'test', 'train'"),
        (["train_1/a/1.jpg", "train_2/a/1.jpg"], "both 'train_1' and 'train_2' name the train split"),
    ],
)
def test_wrong_layouts_are_one_clear_line(tmp_path: Path, files: list[str], message: str) -> None:
    root = touch(tmp_path, *files)
    with pytest.raises(CrossXError) as caught:
        read_folder(root)
    assert message.replace("ROOT", str(root)) in str(caught.value)
    assert str(root) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 1


@pytest.mark.parametrize("inside", ["", "train/"])
def test_a_class_folder_that_is_a_broken_link_is_named(tmp_path: Path, inside: str) -> None:
    root = touch(tmp_path, f"{inside}a/1.jpg", f"{inside}b/1.jpg")
    (root / f"{inside}c").symlink_to(tmp_path / "unplugged")
    (root / f"{inside}.d").symlink_to(tmp_path / "unplugged")
    index = read_folder(root, test_fraction=0)
    assert index.classes == ("a", "b")
    assert f"'{inside}c': a link that leads nowhere, not read" in index.notes


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
