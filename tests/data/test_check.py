from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import layouts
from crossx.data.catalog import read_dataset
from crossx.data.check import Report, check_dataset
from crossx.errors import CrossXError, UsageError


def kinds(report: Report) -> tuple[list[str], list[str]]:
    return [finding.kind for finding in report.problems], [finding.kind for finding in report.notes]


def items(report: Report, kind: str) -> tuple[str, ...]:
    (finding,) = [finding for finding in (*report.problems, *report.notes) if finding.kind == kind]
    return finding.items


@pytest.fixture
def birds(tmp_path: Path) -> Path:
    """3 classes of 8 images: per class 4 for training, 2 for validation, 2 for testing."""
    return layouts.write_folder(tmp_path / "birds", classes=3, images_per_class=8, split_folders=True)


def test_nothing_wrong(birds: Path) -> None:
    report = check_dataset("folder", birds)
    assert kinds(report) == ([], [])
    assert report.exit_code == 0
    assert report.classes == 3
    assert {split: (c.classes, c.images) for split, c in report.splits.items()} == {
        "train": (3, 12),
        "val": (3, 6),
        "test": (3, 6),
    }
    assert report.summary().endswith("no problems")


def test_unreadable_images_are_named_with_the_reason(birds: Path) -> None:
    empty, cut, fine = sorted((birds / "train" / "wren").iterdir())[:3]
    empty.write_bytes(b"")
    cut.write_bytes(cut.read_bytes()[:-200])
    report = check_dataset("folder", birds)
    assert kinds(report) == (["unreadable"], [])
    assert report.exit_code == 1
    first, second = items(report, "unreadable")
    assert first == f"{empty}: is empty (0 bytes)"
    assert second.startswith(f"{cut}: ")
    assert "truncated" in second
    assert str(fine) not in report.summary()
    assert "problem: 2 images cannot be read" in report.summary()


def test_two_empty_files_are_not_duplicates(birds: Path) -> None:
    for split in ("train", "test"):
        next((birds / split / "robin").iterdir()).write_bytes(b"")
    assert kinds(check_dataset("folder", birds)) == (["unreadable"], [])


def test_same_bytes_under_two_labels(birds: Path) -> None:
    original = birds / "train" / "robin" / "000.jpg"
    copy = Path(shutil.copy(original, birds / "test" / "wren" / "copy.jpg"))
    report = check_dataset("folder", birds)
    assert kinds(report) == (["mislabelled"], [])
    assert items(report, "mislabelled") == (f"{original} ('robin') = {copy} ('wren')",)


def test_same_bytes_in_train_and_test(birds: Path) -> None:
    original = birds / "train" / "robin" / "000.jpg"
    copy = Path(shutil.copy(original, birds / "test" / "robin" / "copy.jpg"))
    report = check_dataset("folder", birds)
    assert kinds(report) == (["leaked"], [])
    assert items(report, "leaked") == (f"{original} (train) = {copy} (test)",)


def test_same_bytes_in_one_class_and_split_is_a_note(birds: Path) -> None:
    shutil.copy(birds / "train" / "robin" / "000.jpg", birds / "train" / "robin" / "copy.jpg")
    report = check_dataset("folder", birds)
    assert kinds(report) == ([], ["duplicate"])
    assert report.exit_code == 0


def test_images_that_no_list_names(birds: Path) -> None:
    stray = Path(shutil.copy(birds / "train" / "robin" / "000.jpg", birds / "train" / "stray.jpg"))
    assert items(check_dataset("folder", birds), "unlisted") == (str(stray),)


def test_classes_without_validation_images(birds: Path) -> None:
    shutil.rmtree(birds / "val" / "wren")
    assert items(check_dataset("folder", birds), "unvalidated") == ("wren",)


def test_classes_without_test_images(birds: Path) -> None:
    shutil.rmtree(birds / "test" / "wren")
    assert items(check_dataset("folder", birds), "untested") == ("wren",)
    shutil.rmtree(birds / "test")
    report = check_dataset("folder", birds)
    assert [finding.message for finding in report.notes] == ["there is no test split"]


def test_classes_without_training_images_are_problems_among_others(birds: Path) -> None:
    (birds / "train" / "gull").mkdir()
    layouts.write_image(birds / "test" / "owl" / "1.jpg", 7, 7)
    broken = birds / "train" / "robin" / "000.jpg"
    broken.write_bytes(b"x")
    report = check_dataset("folder", birds)
    assert kinds(report)[0] == ["unreadable", "untrained"]
    assert items(report, "untrained") == ("gull", "owl")
    assert report.splits["test"].classes == 4
    with pytest.raises(CrossXError, match=r"train: no images in class 'gull'\. Add some"):
        read_dataset("folder", birds)


def test_classes_of_a_table_without_training_images_are_problems_among_others(tmp_path: Path) -> None:
    table = layouts.write_table(tmp_path, classes=3, images_per_class=8)
    with table.open("a") as file:
        file.write("images/gone.jpg,owl,test\n")
    report = check_dataset("table", table)
    assert kinds(report)[0] == ["missing", "untrained"]
    assert items(report, "untrained") == ("owl",)
    with pytest.raises(CrossXError, match="no training image of 'owl'"):
        read_dataset("table", table)


def test_missing_images_of_a_table_and_strays_beside_listed_ones(tmp_path: Path) -> None:
    table = layouts.write_table(tmp_path, classes=3, images_per_class=8)
    gone = tmp_path / "images" / "0_000.jpg"
    stray = gone.rename(gone.with_name("stray.jpg"))
    layouts.write_image(tmp_path / "elsewhere" / "private.jpg", 0, 0)
    report = check_dataset("table", table)
    assert kinds(report) == (["missing"], ["unlisted"])
    assert items(report, "missing") == (str(gone),)
    assert items(report, "unlisted") == (str(stray),)


def test_dangling_link_is_unreadable_rather_than_missing(birds: Path) -> None:
    (birds / "train" / "robin" / "link.jpg").symlink_to(birds / "nowhere.jpg")
    assert kinds(check_dataset("folder", birds)) == (["unreadable"], [])


def swap_label(path: Path, line: int, class_id: int) -> None:
    lines = path.read_text().splitlines()
    lines[line] = f"{lines[line].split()[0]} {class_id}"
    layouts.write_lines(path, lines)


def test_archive_label_against_its_folder(tmp_path: Path) -> None:
    root = layouts.write_cub(tmp_path, classes=3, images_per_class=8)
    assert kinds(check_dataset("cub", root)) == ([], ["counts"])
    swap_label(root / "image_class_labels.txt", 5, 3)
    report = check_dataset("cub", root)
    assert kinds(report) == (["mislabelled"], ["counts"])
    (item,) = items(report, "mislabelled")
    assert "_0005.jpg" in item
    assert "'003.Sooty_Albatross', its folder '001.Black_footed_Albatross'" in item


def test_counts_against_table_1(tmp_path: Path) -> None:
    root = layouts.write_cub(tmp_path, classes=3, images_per_class=4)
    (finding,) = check_dataset("cub", root).notes
    assert "3 classes (200 in the paper), 6 training images (5,994 in the paper)" in finding.message


def test_validation_images_count_as_training_images_of_table_1(tmp_path: Path) -> None:
    root = layouts.write_aircraft(tmp_path, classes=4, images_per_class=6)
    (finding,) = check_dataset("aircraft", root).notes
    assert (
        "4 classes (100 in the paper), 16 training images (6,667 in the paper), 8 test images"
        in finding.message
    )
    (finding,) = check_dataset("aircraft", root, level="manufacturer").notes
    assert "classes" not in finding.message.replace("not all", "")


def test_archive_with_an_untrained_class(tmp_path: Path) -> None:
    root = layouts.write_cub(tmp_path, classes=3, images_per_class=4)
    lines = [f"{i} {int(i > 4 and i % 2)}" for i in range(1, 13)]
    layouts.write_lines(root / "train_test_split.txt", lines)
    report = check_dataset("cub", root)
    assert kinds(report)[0] == ["untrained"]
    assert items(report, "untrained") == (layouts.CUB_CLASSES[0],)


def test_archive_without_some_images_and_with_others(tmp_path: Path) -> None:
    root = layouts.write_cub(tmp_path, classes=3, images_per_class=4)
    gone = next((root / "images" / layouts.CUB_CLASSES[1]).iterdir())
    gone.unlink()
    layouts.write_image(root / "images" / "004.Extra" / "x.jpg", 9, 9)
    report = check_dataset("cub", tmp_path)
    assert items(report, "missing") == (str(gone),)
    assert items(report, "unlisted") == (str(root / "images" / "004.Extra" / "x.jpg"),)


def test_images_all_in_one_folder_are_not_mislabelled(tmp_path: Path) -> None:
    table = layouts.write_table(tmp_path, classes=3, images_per_class=8)
    assert kinds(check_dataset("table", table)) == ([], [])


def test_report_as_json(birds: Path) -> None:
    next((birds / "train" / "wren").iterdir()).write_bytes(b"")
    report = check_dataset("folder", birds)
    values = json.loads(json.dumps(report.to_json()))
    assert values["splits"]["train"] == {"classes": 3, "images": 12}
    assert values["problems"][0]["kind"] == "unreadable"
    assert values["problems"][0]["items"] == list(items(report, "unreadable"))
    assert values["root"] == str(birds)


def test_long_notes_are_cut_and_problems_are_not(birds: Path) -> None:
    for number in range(15):
        (birds / "train" / "wren" / f"empty{number:02d}.jpg").touch()
        layouts.write_image(birds / "train" / f"stray{number:02d}.jpg", 5, number)
    text = check_dataset("folder", birds).summary()
    assert text.count("is empty") == 15
    assert text.count("stray") == 10
    assert "and 5 more" in text


def test_any_file_name_can_be_printed(birds: Path) -> None:
    (birds / "train" / "wren" / os.fsdecode(b"two\nlines \xff.jpg")).touch()
    (item,) = items(check_dataset("folder", birds), "unreadable")
    assert item.isprintable()
    assert "two\\nlines" in item


def test_notes_of_the_reader_and_images_that_use_few_of_16_bits(birds: Path) -> None:
    for number, largest in enumerate((4095, 4000, 900)):
        values = np.random.default_rng(number).integers(0, largest + 1, (20, 30)).astype(np.uint16)
        values[0, 0] = largest
        Image.fromarray(values).save(birds / "train" / "wren" / f"deep{number}.png")
    (birds / "train" / "wren" / "Thumbs.db").touch()
    report = check_dataset("folder", birds)
    assert kinds(report) == ([], ["reader", "scaled"])
    skipped, scaled = (finding.message for finding in report.notes)
    assert skipped == "skipped 1 hidden or system file or folder: 'train/wren/Thumbs.db'"
    assert scaled.startswith("3 images store fewer bits in 16 per channel (1 of 10 bits, 2 of 12 bits)")


def test_progress_counts_every_image(birds: Path) -> None:
    calls: list[tuple[int, int]] = []
    check_dataset("folder", birds, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(done, 24) for done in range(1, 25)]


def test_errors_of_reading_pass_through(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="unknown dataset"):
        check_dataset("cubb", tmp_path)
    with pytest.raises(CrossXError, match="no such folder"):
        check_dataset("folder", tmp_path / "missing")


REAL = Path(os.environ.get("CROSSX_DATA", Path(__file__).parents[3] / "shared" / "data")) / "cub80"


@pytest.mark.skipif(not REAL.is_dir(), reason=f"real photographs are not at {REAL}; set CROSSX_DATA")
@pytest.mark.slow
def test_real_photographs_have_no_problems() -> None:
    report = check_dataset("cub", REAL)
    assert kinds(report) == ([], ["counts"])
    assert {split: count.images for split, count in report.splits.items()} == {"train": 2400, "test": 2341}
