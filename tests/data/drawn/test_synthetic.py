from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from crossx.data.drawn import picture, synthetic
from crossx.data.drawn.anatomy import PARTS, PLUMAGES
from crossx.data.drawn.picture import draw_picture
from crossx.data.drawn.species import ADJECTIVES
from crossx.data.drawn.synthetic import (
    SyntheticSpec,
    class_attributes,
    class_names,
    draw_dataset,
    read_synthetic,
)
from crossx.errors import CrossXError, UsageError

SMALL = {"num_classes": 4, "images_per_class": 3, "image_size": 32}
BASE = {
    **dict.fromkeys(PARTS, "plain"),
    "family": "bunting",
    "beak": "thick",
    "legs": "black",
}


def draw(seed: int, size: int = 96, **changes: str) -> picture.Picture:
    return draw_picture({**BASE, **changes}, np.random.default_rng([7, seed]), size)


def changed(first: picture.Picture, second: picture.Picture) -> np.ndarray:
    pixels = [np.asarray(drawn.image).astype(int) for drawn in (first, second)]
    return np.abs(pixels[0] - pixels[1]).max(2)


def files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@given(num_classes=st.integers(2, 60), seed=st.integers(0, 1000))
@settings(max_examples=40)
def test_every_class_differs_from_its_nearest_in_one_part(num_classes: int, seed: int) -> None:
    classes = class_attributes(num_classes, seed)
    assert len(classes) == num_classes
    for i, one in enumerate(classes):
        assert set(one) == {"family", *PARTS}
        assert one["family"] in PLUMAGES
        assert all(one[part] in ADJECTIVES[part] for part in PARTS)
        others = [other for j, other in enumerate(classes) if j != i]
        differing = [{part for part in one if one[part] != other[part]} for other in others]
        assert min(map(len, differing)) == 1
        assert any(len(parts) == 1 and parts <= set(PARTS) for parts in differing)


@pytest.mark.parametrize("num_classes", [2, 3, 12, 200])
def test_names_are_unique_and_true(num_classes: int) -> None:
    classes = class_attributes(num_classes, seed=3)
    names = class_names(classes)
    assert len(set(names)) == num_classes
    for name, attributes in zip(names, classes, strict=True):
        *adjectives, family = name.split()
        assert family.lower() == attributes["family"]
        assert set(adjectives) <= {ADJECTIVES[part][attributes[part]] for part in PARTS}


def test_same_files_whatever_the_number_of_processes(tmp_path: Path) -> None:
    spec = SyntheticSpec(num_classes=3, images_per_class=3, seed=5, image_size=32)
    draw_dataset(tmp_path / "one", spec, workers=1)
    draw_dataset(tmp_path / "two", spec, workers=2)
    assert files(tmp_path / "one") == files(tmp_path / "two")
    draw_dataset(tmp_path / "other", SyntheticSpec(3, 3, 6, 32), workers=1)
    assert files(tmp_path / "one") != files(tmp_path / "other")


def test_images_do_not_depend_on_how_many_are_drawn(tmp_path: Path) -> None:
    few = read_synthetic(tmp_path / "few", **SMALL)
    more = read_synthetic(tmp_path / "more", **{**SMALL, "images_per_class": 5})
    for record in few.records:
        twin = next(r for r in more.records if (r.label, r.path.name) == (record.label, record.path.name))
        assert record.path.read_bytes() == twin.path.read_bytes()


@pytest.mark.parametrize("number", [1, 4])
def test_the_number_of_test_images_changes_no_other_image(tmp_path: Path, number: int) -> None:
    options = {**SMALL, "num_classes": 2, "images_per_class": 6}
    usual = read_synthetic(tmp_path / "usual", **options)
    asked = read_synthetic(tmp_path / "asked", **options, test_images_per_class=number)
    for label in range(len(asked.classes)):
        before, after = (
            {r.path.name: r for r in index.records if r.label == label} for index in (usual, asked)
        )
        assert [r.split for r in after.values()].count("test") == number
        assert [r.path.name for r in after.values() if r.split == "train"] == [
            r.path.name for r in before.values() if r.split == "train"
        ]
        for name in before.keys() & after.keys():
            assert before[name].split == after[name].split
            assert before[name].path.read_bytes() == after[name].path.read_bytes()
    assert read_synthetic(tmp_path / "asked", **options, test_images_per_class=number) == asked
    with pytest.raises(CrossXError, match=rf"test_images_per_class is {number}, not None"):
        read_synthetic(tmp_path / "asked", **options)


def test_reads_what_it_drew(tmp_path: Path) -> None:
    root = tmp_path / "not" / "there"
    drawn = read_synthetic(root, num_classes=8, images_per_class=6, image_size=48)
    times = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    assert read_synthetic(root, num_classes=8, images_per_class=6, image_size=48) == drawn
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == times
    assert list(root.parent.iterdir()) == [root]

    assert drawn.name == "synthetic"
    assert list(drawn.classes) == class_names(class_attributes(8))
    assert drawn.levels == {"family": ("Bunting",) * 4 + ("Thrush",) * 4}
    assert len(drawn.records) == 48
    for record in drawn.records:
        with Image.open(record.path) as image:
            assert (image.size, image.mode) == ((48, 48), "RGB")
        assert drawn.classes[record.label].replace(" ", "_") in record.path.parent.name
        assert record.box is not None
        assert record.parts
        assert set(record.parts) <= set(PARTS)


@pytest.mark.parametrize(("images", "train", "test"), [(3, 2, 1), (4, 3, 1), (6, 4, 2), (8, 6, 2)])
def test_a_third_of_each_class_is_for_testing(tmp_path: Path, images: int, train: int, test: int) -> None:
    index = read_synthetic(tmp_path / "set", num_classes=2, images_per_class=images, image_size=32)
    for label in range(2):
        assert [r.label for r in index.split("train")].count(label) == train
        assert [r.label for r in index.split("test")].count(label) == test
    assert not index.split("val")
    # of two to four images a tenth is rounded to none
    assert len(index.with_validation(0.1).split("val")) == (2 if train == 6 else 0)


def test_an_empty_folder_is_drawn_into(tmp_path: Path) -> None:
    assert len(read_synthetic(tmp_path, **SMALL).records) == 12


@pytest.mark.parametrize("seed", range(12))
def test_boxes_lie_within_image_and_bird(seed: int) -> None:
    rng = np.random.default_rng(seed)
    attributes = {part: str(rng.choice(list(ADJECTIVES[part]))) for part in PARTS}
    drawn = draw(seed, **attributes)
    left, top, width, height = drawn.box
    for x, y, w, h in (drawn.box, *drawn.parts.values()):
        assert w > 0
        assert h > 0
        assert left <= x <= x + w <= left + width + 1e-6
        assert top <= y <= y + h <= top + height + 1e-6
        assert 0 <= x <= x + w <= 96 + 1e-6
        assert 0 <= y <= y + h <= 96 + 1e-6


ALTERNATIVES = [(part, value) for part in PARTS for value in ADJECTIVES[part] if value != BASE[part]]


@pytest.mark.parametrize(("part", "value"), ALTERNATIVES)
@pytest.mark.slow
def test_an_attribute_changes_pixels_of_its_part_alone(part: str, value: str) -> None:
    visible = 0
    for seed in range(8):
        plain, marked = draw(seed), draw(seed, **{part: value})
        if part not in plain.parts or part not in marked.parts:
            continue
        difference = changed(plain, marked)
        rows, columns = np.nonzero(difference)
        boxes = [plain.parts[part], marked.parts[part]]
        assert columns.min() >= min(x for x, _, _, _ in boxes) - 2
        assert columns.max() <= max(x + w for x, _, w, _ in boxes) + 1
        assert rows.min() >= min(y for _, y, _, _ in boxes) - 2
        assert rows.max() <= max(y + h for _, y, _, h in boxes) + 1
        visible += difference.max() > 40
    assert visible >= 5


@pytest.mark.parametrize(
    ("part", "one", "other"),
    [
        ("crown", "red", "white"),
        pytest.param("throat", "black", "white", marks=pytest.mark.slow),
        pytest.param("legs", "blue", "orange", marks=pytest.mark.slow),
        pytest.param("beak", "yellow", "red", marks=pytest.mark.slow),
    ],
)
def test_a_box_fits_the_pixels_that_the_parts_colour_fills(part: str, one: str, other: str) -> None:
    compared = 0
    for seed in range(20):
        first, second = draw(seed, **{part: one}), draw(seed, **{part: other})
        if part not in first.parts:
            continue
        rows, columns = np.nonzero(changed(first, second) > 25)
        x, y, w, h = first.parts[part]
        found = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        np.testing.assert_allclose(found, [x, y, x + w, y + h], atol=2.5)
        compared += 1
    assert compared >= 12


@pytest.mark.slow
def test_what_is_in_front_hides_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    covered = [draw(seed) for seed in range(40)]
    monkeypatch.setattr(picture, "foreground", lambda *_: [])
    free = [draw(seed) for seed in range(40)]
    hidden = 0
    for behind, alone in zip(covered, free, strict=True):
        assert set(behind.parts) <= set(alone.parts)
        for part, (x, y, w, h) in alone.parts.items():
            if part not in behind.parts:
                hidden += 1
                continue
            inner_x, inner_y, inner_w, inner_h = behind.parts[part]
            assert x <= inner_x <= inner_x + inner_w <= x + w + 1e-6
            assert y <= inner_y <= inner_y + inner_h <= y + h + 1e-6
    assert hidden > 0


def test_images_of_a_class_vary_more_than_one_part() -> None:
    within = np.mean([changed(draw(seed), draw(seed + 1)).mean() for seed in range(6)])
    between = np.mean([changed(draw(seed), draw(seed, wing="barred")).mean() for seed in range(6)])
    assert within > 5 * between


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("num_classes", 1),
        ("num_classes", 10**9),
        ("images_per_class", 2),
        ("test_images_per_class", 0),
        ("seed", -1),
        ("image_size", 16),
    ],
)
def test_numbers_out_of_range_are_refused(tmp_path: Path, option: str, value: int) -> None:
    with pytest.raises(UsageError, match=rf"data\.{option} .* must be at (least|most) \d+, not {value}\."):
        read_synthetic(tmp_path / "set", **{**SMALL, option: value})
    assert not (tmp_path / "set").exists()


def test_a_set_drawn_with_other_arguments_is_refused(tmp_path: Path) -> None:
    read_synthetic(tmp_path, **SMALL)
    with pytest.raises(
        CrossXError,
        match=r"num_classes is 4, not 5; seed is 0, not 1\): give --data.num_classes 4 --data.seed 0, choose another "
        r"--data.root or delete it\.$",
    ):
        read_synthetic(tmp_path, **{**SMALL, "num_classes": 5, "seed": 1})


def test_a_set_of_another_version_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read_synthetic(tmp_path, **SMALL)
    monkeypatch.setattr(synthetic, "VERSION", synthetic.VERSION + 1)
    with pytest.raises(CrossXError, match=r"version is 1, not 2\): choose another --data\.root or delete it"):
        read_synthetic(tmp_path, **SMALL)


def test_other_files_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "holiday.jpg").write_bytes(b"x")
    with pytest.raises(CrossXError, match="not empty"):
        read_synthetic(tmp_path, **SMALL)
    assert files(tmp_path) == {"holiday.jpg": b"x"}


def test_a_file_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(CrossXError, match="there is a file where"):
        read_synthetic(tmp_path / "file", **SMALL)
    with pytest.raises(CrossXError, match=r"cannot be drawn there \(Not a directory\)"):
        read_synthetic(tmp_path / "file" / "set", **SMALL)


def test_a_damaged_index_is_refused(tmp_path: Path) -> None:
    read_synthetic(tmp_path, **SMALL)
    index = json.loads((tmp_path / "index.json").read_text())
    del index["records"][3]["label"]
    (tmp_path / "index.json").write_text(json.dumps(index))
    with pytest.raises(CrossXError, match=r"damaged \(KeyError\('label'\)\)"):
        read_synthetic(tmp_path, **SMALL)


def test_an_interrupted_drawing_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = iter(range(5))

    def interrupted(*arguments: object) -> picture.Picture:
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return draw_picture(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(synthetic, "draw_picture", interrupted)
    with pytest.raises(KeyboardInterrupt):
        draw_dataset(tmp_path / "set", SyntheticSpec(4, 3, 0, 32))
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(CrossXError, match=r"No space left on device.*free some room"):
        draw_dataset(tmp_path / "set", SyntheticSpec(2, 3, 0, 32))
    assert list(tmp_path.iterdir()) == []


def test_two_processes_may_draw_the_same_set(tmp_path: Path) -> None:
    spec = SyntheticSpec(2, 3, 0, 32)
    draw_dataset(tmp_path / "set", spec)
    before = files(tmp_path)
    draw_dataset(tmp_path / "set", spec)
    assert files(tmp_path) == before
