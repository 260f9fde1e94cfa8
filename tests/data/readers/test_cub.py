import os
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from crossx.data.readers.cub import read_cub
from layouts import CUB_CLASSES, write_cub, write_lines
from refusals import refusal

CUB80 = Path(os.environ.get("CROSSX_DATA", Path(__file__).parents[4] / "shared" / "data")) / "cub80"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_cub(tmp_path / "CUB_200_2011")


def edit(path: Path, line: int, text: str | None) -> None:
    """Replace a line, counted from 1, or drop it."""
    lines = path.read_text().splitlines()
    lines[line - 1 : line] = [] if text is None else [text]
    write_lines(path, lines)


def test_what_was_written_is_read(root: Path) -> None:
    index = read_cub(root)
    assert index.name == "cub"
    assert index.classes == CUB_CLASSES
    assert index.levels == {}
    assert [record.label for record in index.records] == [0] * 4 + [1] * 4 + [2] * 4
    assert [record.split for record in index.records] == ["train", "test"] * 6
    assert index.records[5].path == root / "images/002.Laysan_Albatross/Laysan_Albatross_0001.jpg"
    assert index.records[5].box == (6.0, 2.0, 20.5, 30.0)
    assert index.records[5].parts == {"back": (6.0, 5.0, 0.0, 0.0), "left eye": (7.0, 8.0, 0.0, 0.0)}
    for record in index.records:
        with Image.open(record.path) as image:
            assert image.size == (48, 40)


def test_the_containing_folder_serves_as_root(root: Path) -> None:
    assert read_cub(root.parent) == read_cub(root)


def test_boxes_and_parts_are_optional(tmp_path: Path) -> None:
    index = read_cub(write_cub(tmp_path, annotations=False))
    assert {(record.box, record.parts) for record in index.records} == {(None, None)}


def test_an_image_without_box_or_visible_part(root: Path) -> None:
    edit(root / "bounding_boxes.txt", 1, None)
    edit(root / "parts/part_locs.txt", 1, "1 1 0.0 0.0 0")
    edit(root / "parts/part_locs.txt", 3, "1 3 0.0 0.0 0")
    index = read_cub(root)
    assert index.records[0].box is None
    assert index.records[0].parts == {}
    assert index.notes == ("bounding_boxes.txt: no line for 1 of 12 images",)


def test_a_list_of_keypoints_that_ends_early_is_noted(root: Path) -> None:
    path = root / "parts/part_locs.txt"
    lines = path.read_text().splitlines()
    write_lines(path, [line for line in lines if int(line.split()[0]) < 10])
    index = read_cub(root)
    assert index.records[-1].parts == {}
    assert index.notes == ("parts/part_locs.txt: no line for 3 of 12 images",)


def test_a_subset_keeps_the_order_of_class_ids(root: Path) -> None:
    write_lines(root / "classes.txt", ["70 070.Green_Violetear", "5 005.Crested_Auklet"])
    write_lines(root / "images.txt", ["1 a.jpg", "9 b.jpg"])
    write_lines(root / "image_class_labels.txt", ["9 70", "1 5"])
    write_lines(root / "train_test_split.txt", ["9 0", "1 1"])
    index = read_cub(root)
    assert index.classes == ("005.Crested_Auklet", "070.Green_Violetear")
    assert [(record.path.name, record.label, record.split) for record in index.records] == [
        ("a.jpg", 0, "train"),
        ("b.jpg", 1, "test"),
    ]


def test_missing_image_files_are_left_to_the_check(root: Path) -> None:
    before = read_cub(root)
    before.records[0].path.unlink()
    assert read_cub(root) == before


@given(
    names=st.lists(
        st.text(st.characters(categories=("L", "N", "P", "Zs"), exclude_characters="\0"), min_size=1)
        .map(lambda text: text.strip(" "))
        .filter(bool),
        min_size=1,
        max_size=5,
    )
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_any_class_names_are_kept_and_told_apart(root: Path, names: list[str]) -> None:
    write_lines(root / "classes.txt", (f"{i} {name}" for i, name in enumerate(names, start=1)))
    write_lines(root / "images.txt", ["1 a b/ü.jpg"])
    write_lines(root / "image_class_labels.txt", ["1 1"])
    write_lines(root / "train_test_split.txt", ["1 1"])
    classes = read_cub(root).classes
    assert len(set(classes)) == len(names)
    assert all(read.startswith(name) for name, read in zip(names, classes, strict=True))
    if len(set(names)) == len(names):
        assert classes == tuple(names)


@pytest.mark.parametrize(
    "file",
    [
        "classes.txt",
        "images.txt",
        "image_class_labels.txt",
        "train_test_split.txt",
        "parts/parts.txt",
        "parts/part_locs.txt",
    ],
)
def test_half_an_archive_names_the_missing_file(root: Path, file: str) -> None:
    (root / file).unlink()
    assert f"{root / file} is missing" in refusal(read_cub, root)
    assert f"{root / file} is missing" in refusal(read_cub, root.parent)


def test_the_images_folder_is_needed(root: Path) -> None:
    (root / "images").rename(root / "elsewhere")
    assert f"{root / 'images'}/ is missing" in refusal(read_cub, root)


def test_a_missing_root(tmp_path: Path) -> None:
    assert "does not exist" in refusal(read_cub, tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("file", "line", "text", "problem"),
    [
        ("classes.txt", 2, "002.Laysan_Albatross", "expected class id, name"),
        ("classes.txt", 2, "two 002.Laysan_Albatross", "the class id must be a whole number, not 'two'"),
        ("classes.txt", 2, "1 002.Laysan_Albatross", "'1' was already listed in"),
        ("images.txt", 3, "3", "expected image id, path"),
        ("images.txt", 3, "2 x.jpg", "'2' was already listed in"),
        ("images.txt", 3, f"3 {CUB_CLASSES[0]}/{CUB_CLASSES[0][4:]}_0000.jpg", "was already listed in"),
        ("images.txt", 3, "3 ../x.jpg", "leads out of"),
        ("image_class_labels.txt", 4, "4 4", "class id 4 is not in classes.txt"),
        ("image_class_labels.txt", 4, "4 0", "class id 0 is not in classes.txt"),
        ("image_class_labels.txt", 4, "4 -1", "the class id must be a whole number"),
        ("image_class_labels.txt", 4, "4 1 1", "expected image id, class id"),
        ("train_test_split.txt", 5, "5 2", "the training column must be 0 or 1, not '2'"),
        ("train_test_split.txt", 5, "5", "expected image id, 1 for training"),
        ("bounding_boxes.txt", 6, "6 1 2 3", "expected image id, x, y, width, height"),
        ("bounding_boxes.txt", 6, "6 1 2 3 nan", "x, y, width, height must be numbers"),
        ("bounding_boxes.txt", 6, "6 1 2 -3 4", "negative width or height"),
        ("parts/parts.txt", 1, "1", "expected part id, name"),
        ("parts/parts.txt", 3, "3 back", "'back' was already listed in"),
        ("parts/part_locs.txt", 2, "1 1 9 9 1", "part id 1 of image id 1 was already listed in"),
        ("parts/part_locs.txt", 2, "1 99 1 1 1", "part id 99 is not in parts.txt"),
        ("parts/part_locs.txt", 2, "1 2 1 1 yes", "the visible column must be 0 or 1"),
        ("parts/part_locs.txt", 2, "1 2 left 1 1", "x, y must be numbers"),
    ],
)
def test_a_malformed_line_is_named(root: Path, file: str, line: int, text: str, problem: str) -> None:
    edit(root / file, line, text)
    message = refusal(read_cub, root)
    assert message.startswith(f"{root / file}, line {line}: ")
    assert problem in message


def test_an_image_that_a_list_leaves_out_or_adds(root: Path) -> None:
    labels = root / "image_class_labels.txt"
    lines = labels.read_text().splitlines()
    write_lines(labels, lines[:-1])
    assert f"{root / 'images.txt'}, line 12: image id 12 has no line in image_class_labels.txt" in refusal(
        read_cub, root
    )
    write_lines(labels, [*lines, "13 1"])
    assert f"{labels}, line 13: image id 13 is not in images.txt" in refusal(read_cub, root)


@pytest.mark.skipif(not CUB80.is_dir(), reason=f"needs {CUB80} (the folder of CROSSX_DATA)")
def test_the_real_subset_of_80_species() -> None:
    index = read_cub(CUB80)
    assert len(index.classes) == 80
    assert index.classes[0] == "001.Black_footed_Albatross"
    assert Counter(record.split for record in index.records) == {"train": 2400, "test": 2341}
    assert all(record.path.is_file() for record in index.records)
    # The folder of an image is its class's name, so the labels can be told from the paths alone.
    assert all(record.path.parent.name[4:] == index.classes[record.label][4:] for record in index.records)
    assert set(Counter(record.label for record in index.split("train")).values()) == {30}
