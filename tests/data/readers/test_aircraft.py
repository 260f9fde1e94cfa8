from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torchvision.datasets import FGVCAircraft

from crossx.data.readers.aircraft import LEVELS, read_aircraft
from crossx.errors import UsageError
from layouts import VARIANTS, write_aircraft, write_lines
from refusals import refusal


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_aircraft(tmp_path, classes=5)


def test_what_was_written_is_read(root: Path) -> None:
    index = read_aircraft(root)
    assert index.name == "aircraft"
    assert index.classes == VARIANTS
    assert index.levels == {
        "manufacturer": ("Maker/0",) * 4 + ("Maker/1",),
        "family": ("Family 0", "Family 0", "Family 1", "Family 1", "Family 2"),
    }
    assert list(index.levels) == ["manufacturer", "family"]
    assert {split: len(index.split(split)) for split in ("train", "val", "test")} == dict.fromkeys(
        ("train", "val", "test"), 10
    )
    assert {record.box for record in index.records} == {(2.0, 3.0, 30.0, 30.0)}
    assert all(record.path.is_file() for record in index.records)


@pytest.mark.parametrize("level", LEVELS)
def test_as_torchvision_reads_it(root: Path, level: str) -> None:
    index = read_aircraft(root, level=level)
    for split, splits in {
        "train": ["train"],
        "val": ["val"],
        "trainval": ["train", "val"],
        "test": ["test"],
    }.items():
        reference = FGVCAircraft(root.parent, split=split, annotation_level=level)
        ours = [(str(record.path), record.label) for part in splits for record in index.split(part)]
        assert sorted(ours) == sorted(zip(reference._image_files, reference._labels, strict=True))
        assert list(index.classes) == reference.classes


def test_the_levels_of_the_coarser_labels(root: Path) -> None:
    family = read_aircraft(root, level="family")
    assert family.classes == ("Family 0", "Family 1", "Family 2")
    assert family.levels == {"manufacturer": ("Maker/0", "Maker/0", "Maker/1")}
    assert read_aircraft(root, level="manufacturer").levels == {}


def test_every_folder_of_the_archive_serves_as_root(root: Path) -> None:
    assert read_aircraft(root) == read_aircraft(root.parent) == read_aircraft(root / "data")


def test_boxes_are_optional(root: Path) -> None:
    (root / "data/images_box.txt").unlink()
    assert {record.box for record in read_aircraft(root).records} == {None}


def test_a_variant_without_images_has_no_known_group(root: Path) -> None:
    path = root / "data/variants.txt"
    write_lines(path, ["An-12", *path.read_text().splitlines()])
    index = read_aircraft(root)
    assert index.classes == ("An-12", *VARIANTS)
    assert {level: groups[0] for level, groups in index.levels.items()} == dict.fromkeys(
        ("manufacturer", "family"), "unknown"
    )
    assert {record.label for record in index.records} == {1, 2, 3, 4, 5}


def test_levels_are_joined_by_image_and_not_by_order(root: Path) -> None:
    before = read_aircraft(root)
    for path in (root / "data").glob("images_family_*.txt"):
        write_lines(path, reversed(path.read_text().splitlines()))
    assert read_aircraft(root) == before


@given(
    names=st.lists(
        st.text(st.characters(categories=("L", "N", "P", "Zs"), exclude_characters="\0"), min_size=1)
        .map(lambda text: text.strip(" "))
        .filter(bool),
        min_size=3,
        max_size=3,
        unique=True,
    )
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_any_name_is_read_whole(root: Path, names: list[str]) -> None:
    data = root / "data"
    write_lines(data / "families.txt", names)
    write_lines(data / "manufacturers.txt", ["Maker"])
    for split, name, image in zip(("train", "val", "test"), names, "123", strict=True):
        write_lines(data / f"images_family_{split}.txt", [f"{image} {name}"])
        write_lines(data / f"images_manufacturer_{split}.txt", [f"{image} Maker"])
    index = read_aircraft(root, level="family")
    assert index.classes == tuple(names)
    assert [(record.label, record.split) for record in index.records] == [
        (0, "train"),
        (1, "val"),
        (2, "test"),
    ]


def test_an_unknown_level_is_a_usage_error_with_the_nearest(root: Path) -> None:
    with pytest.raises(UsageError, match=r"'varient'\. Did you mean 'variant'\?"):
        read_aircraft(root, level="varient")


@pytest.mark.parametrize(
    "file",
    [
        "variants.txt",
        "families.txt",
        "manufacturers.txt",
        "images_variant_train.txt",
        "images_variant_val.txt",
        "images_variant_test.txt",
        "images_family_test.txt",
        "images_manufacturer_val.txt",
    ],
)
def test_half_an_archive_names_the_missing_file(root: Path, file: str) -> None:
    (root / "data" / file).unlink()
    assert f"{root / 'data' / file} is missing" in refusal(read_aircraft, root)


def test_the_images_folder_is_needed(root: Path) -> None:
    (root / "data/images").rename(root / "data/elsewhere")
    assert f"{root / 'data/images'}/ is missing" in refusal(read_aircraft, root)


@pytest.mark.parametrize(
    ("file", "line", "text", "problem"),
    [
        ("variants.txt", 3, "F-16A/B", "'F-16A/B' was already listed in"),
        ("images_variant_train.txt", 2, "0034330", "expected image id, variant"),
        ("images_variant_train.txt", 2, "0034330 An-225", "variant 'An-225' is not in variants.txt"),
        ("images_variant_train.txt", 2, "../x 737-800", "leads out of"),
        ("images_variant_val.txt", 2, "0034309 F-16A/B", "'0034309' was already listed in"),
        ("images_variant_test.txt", 1, "9999999 F-16A/B", "image 9999999 is in no images_manufacturer_*.txt"),
        ("images_family_train.txt", 1, "0034309 Airliner", "family 'Airliner' is not in families.txt"),
        ("images_family_train.txt", 2, "0034330 Family 1", "puts 'F-16A/B' in family 'Family 1', others in"),
        ("images_box.txt", 4, "0034330 1 2 3", "expected image id, xmin, ymin, xmax, ymax"),
        ("images_box.txt", 4, "0034330 9 2 3 4", "the box ends before it begins"),
        ("images_box.txt", 4, "0034330 a 2 3 4", "box corners must be numbers"),
    ],
)
def test_a_malformed_line_is_named(root: Path, file: str, line: int, text: str, problem: str) -> None:
    path = root / "data" / file
    lines = path.read_text().splitlines()
    lines[line - 1] = text
    write_lines(path, lines)
    if "../x" in text:
        for coarse in ("family", "manufacturer"):
            others = path.with_name(f"images_{coarse}_train.txt")
            write_lines(others, others.read_text().replace("0034330 ", "../x ").splitlines())
    message = refusal(read_aircraft, root)
    assert message.startswith(f"{path}, line {line}: ")
    assert problem in message
