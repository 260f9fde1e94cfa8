import csv
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from crossx.errors import CrossXError
from crossx.predict.inputs import expand_paths, read_list
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


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("set [1]/*.jpg", ["set [1]/a.jpg", "set [1]/b.JPG"]),
        ("set [1]/[ab].*", ["set [1]/a.jpg", "set [1]/b.JPG"]),
        ("*/a.jpg", ["set [1]/a.jpg", "what?*/a.jpg"]),
        ("s*/../set [1]/a*", ["set [1]/a.jpg"]),
        ("what?*/*.jpg", ["what?*/a.jpg"]),
        ("**/set [1]/*.JPG", ["set [1]/b.JPG"]),
        ("set [1]/{a,b}.{jpg,JPG}", ["set [1]/a.jpg", "set [1]/b.JPG"]),
        ("{x}/*.jpeg", ["{x}/c.JPEG"]),
        ("[{]x[}]/*", ["{x}/c.JPEG"]),
    ],
)
def test_folders_that_exist_are_literal_and_endings_match_either_case(tmp_path, monkeypatch, pattern, names):
    monkeypatch.chdir(tmp_path)
    for name in ("set [1]/a.jpg", "set [1]/b.JPG", "what?*/a.jpg", "{x}/c.JPEG"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).touch()
    assert [os.path.normpath(path) for path in expand_paths([pattern])] == names


@pytest.mark.parametrize(
    "url",
    [
        "https://example.org/a.jpg",
        "HTTP://a/b.png",
        "s3://bucket/a.jpg",
        "hf://me/b",
        Path("https://a/b.jpg"),
    ],
)
def test_an_address_is_refused_with_what_to_do(url):
    with pytest.raises(CrossXError, match="files are read, not addresses: download it first"):
        expand_paths([url])
    with pytest.raises(CrossXError, match="list: line 2: "):
        read_list(f"a.jpg\n{url}\n".encode(), "list")


def test_file_addresses_and_the_home_are_understood(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    image = tmp_path / "a [1] é.jpg"
    image.touch()
    assert expand_paths([f"file://{tmp_path}/a%20%5B1%5D%20%C3%A9.jpg", "~/a [1] é.jpg"]) == [image, image]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "~").mkdir()
    (tmp_path / "~" / "b.jpg").touch()
    assert expand_paths(["~/b.jpg", "~"]) == [Path("~/b.jpg")] * 2


LISTED = "a.jpg\nsub/b c.jpg\n"


@pytest.mark.parametrize(
    "content",
    [
        LISTED.encode(),
        LISTED.rstrip().encode(),
        LISTED.encode("utf-8-sig"),
        LISTED.replace("\n", "\r\n").encode("utf-8-sig"),
        LISTED.encode("utf-16"),
        LISTED.encode("utf-16-le"),
        LISTED.encode("utf-16-be"),
        LISTED.replace("\n", "\0").encode(),
        b"# images\n\n" + LISTED.encode(),
        b'"a.jpg"\n  sub/b c.jpg  \n',
        b"'a.jpg'\r\n\"sub/b c.jpg\"\r\n",
        b"a.jpg\rsub/b c.jpg\r",
        b'.\\a.jpg\r\n"sub\\b c.jpg"\r\n',
    ],
)
def test_lists_of_every_form_name_the_same_files(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    for name in ("a.jpg", "sub/b c.jpg"):
        (tmp_path / name).touch()
    assert read_list(content, "list") == [Path("a.jpg"), Path("sub/b c.jpg")]
    (tmp_path / "list.txt").write_bytes(content)
    monkeypatch.chdir("/")
    assert expand_paths([tmp_path / "list.txt"]) == [tmp_path / "a.jpg", tmp_path / "sub/b c.jpg"]


def test_names_in_lists_are_kept_as_they_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ["#1.jpg", '"q".jpg', "'q'", " blank .jpg", os.fsdecode(b"caf\xe9.jpg"), "a\rb.jpg"]
    for name in names:
        Path(name).touch()
    assert read_list(os.fsencode("\n".join(names)), "list") == [Path(name) for name in names]
    assert read_list(b"gone.jpg\ngone.jpg\n", "list") == [Path("gone.jpg")] * 2


@pytest.mark.parametrize(
    "content", [b"", b"\n\n", b"\r\n", b" \n", b"\0", b"# none\n", b"\xef\xbb\xbf", b"\xff\xfe"]
)
def test_an_empty_list_is_an_error(content, tmp_path):
    with pytest.raises(CrossXError, match=r"^standard input: lists no files\.$"):
        read_list(content, "standard input")
