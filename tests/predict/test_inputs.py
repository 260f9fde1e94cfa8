import csv

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from crossx.errors import CrossXError
from crossx.predict.inputs import expand_paths
from layouts import write_image


@pytest.fixture
def images(tmp_path):
    for number in range(5):
        write_image(tmp_path / "birds" / f"{number}.jpg", number % 3, number)
    return sorted((tmp_path / "birds").iterdir())


def test_expand_paths_goes_through_folders_in_order(tmp_path, images):
    write_image(tmp_path / "birds" / "nested" / "0.PNG", 0, 0)
    (tmp_path / "birds" / "notes.txt").touch()
    expected = [*images, tmp_path / "birds" / "nested" / "0.PNG"]
    assert expand_paths([tmp_path / "birds"]) == expected
    assert expand_paths([str(images[3]), images[1]]) == [images[3], images[1]]


def test_expand_paths_refuses_what_is_not_there(tmp_path):
    (tmp_path / "empty").mkdir()
    for path, message in (
        (tmp_path / "no.jpg", "no such file or folder"),
        (tmp_path / ("x" * 400), "no such file or folder"),
        (tmp_path / "empty", "no image in this folder"),
    ):
        with pytest.raises(CrossXError, match=message):
            expand_paths([path])


def test_patterns_match_image_files_at_any_depth(tmp_path, images):
    deep = tmp_path / "birds" / "a" / "b" / "deep.JPG"
    write_image(deep, 0, 0)
    (tmp_path / "birds" / "notes.txt").touch()
    (tmp_path / "birds" / "folder.jpg").mkdir()
    assert expand_paths([tmp_path / "birds" / "[12].*"]) == images[1:3]
    assert expand_paths([str(tmp_path / "birds" / "*")]) == images
    assert expand_paths([tmp_path / "b*" / "**" / "*.JPG"]) == [deep]
    assert expand_paths([tmp_path / "birds" / "**"]) == [*images, deep]


def test_a_file_whose_name_could_be_a_pattern_is_itself(tmp_path, images):
    strange = images[0].rename(tmp_path / "birds" / "bird[1].jpg")
    assert expand_paths([strange]) == [strange]


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_tables_list_files_relative_to_themselves(tmp_path, images, suffix):
    names = ["birds/3.jpg", "birds/gone.jpg", str(images[0])]
    table = tmp_path / f"list{suffix}"
    if suffix == ".csv":
        with table.open("w", newline="") as file:
            csv.writer(file).writerows([["id", "Path"], *enumerate(names)])
    else:
        pq.write_table(pa.table({"path": names}), table)
    assert expand_paths([table, images[1]]) == [
        images[3],
        tmp_path / "birds" / "gone.jpg",
        images[0],
        images[1],
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file\na.jpg\n", r"there is no column 'path'. Columns found: 'file'"),
        ("path\n", "the table has no rows"),
        ("id,path\n1,\n", "line 2: path empty"),
    ],
)
def test_tables_without_paths_are_refused(tmp_path, text, message):
    table = tmp_path / "list.csv"
    table.write_text(text)
    with pytest.raises(CrossXError, match=message):
        expand_paths([table])


def test_a_pattern_without_images_is_refused(tmp_path):
    with pytest.raises(CrossXError, match="as a pattern it matches no image"):
        expand_paths([tmp_path / "*.jpg"])
