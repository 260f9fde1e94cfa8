import struct
import zlib
from pathlib import Path
from subprocess import run

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.io import savemat

from crossx.data.readers import mat
from crossx.data.readers.parsing import (
    Row,
    archive_root,
    as_list,
    distinct_names,
    keyed,
    load_mat,
    mat_rows,
    read_rows,
    require_folder,
)
from layouts import mat_cells, write_lines
from refusals import refusal

# Any text that a list can hold: no line breaks, no blanks at the ends, no surrogates (not UTF-8).
NAMES = st.text(
    st.characters(exclude_characters="\n\r\0\ufeff", exclude_categories=("Cs",)), min_size=1, max_size=30
).filter(lambda text: text.strip(" \t\r") == text)
WORDS = NAMES.filter(lambda text: " " not in text and "\t" not in text)
BLANKS = st.text(" \t", min_size=1, max_size=3)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("lists") / "list.txt"


@given(
    names=st.lists(NAMES, min_size=1, max_size=8), blank=BLANKS, end=st.sampled_from(["\n", "\r\n", " \n"])
)
def test_names_with_blanks_unicode_and_slashes_are_read_whole(
    file: Path, names: list[str], blank: str, end: str
) -> None:
    file.write_bytes("".join(f"{i}{blank}{name}{end}" for i, name in enumerate(names)).encode())
    assert [row.fields for row in read_rows(file, ("id", "name"), text=True)] == [
        (str(i), name) for i, name in enumerate(names)
    ]


@given(names=st.lists(NAMES, min_size=1, max_size=8))
def test_a_single_text_column_is_the_whole_line(file: Path, names: list[str]) -> None:
    file.write_bytes("\n".join(names).encode())
    assert [row.fields for row in read_rows(file, ("name",), text=True)] == [(name,) for name in names]


@given(table=st.lists(st.tuples(WORDS, WORDS, WORDS), min_size=1, max_size=8), blank=BLANKS)
def test_columns_and_line_numbers(file: Path, table: list[tuple[str, ...]], blank: str) -> None:
    file.write_bytes("\n\n".join(blank.join(line) for line in table).encode())
    rows = read_rows(file, ("a", "b", "c"))
    assert [row.fields for row in rows] == table
    assert [row.number for row in rows] == list(range(1, 2 * len(table), 2))


@given(line=st.lists(WORDS, min_size=1, max_size=6).filter(lambda words: len(words) != 3))
def test_a_wrong_number_of_columns_names_the_line(file: Path, line: list[str]) -> None:
    file.write_bytes(("1 2 3\n" + " ".join(line)).encode())
    message = refusal(read_rows, file, ("a", "b", "c"))
    assert message.startswith(f"{file}, line 2: expected a, b, c, found ")


@given(text=NAMES)
def test_integers_are_plain_digits_or_refused(text: str) -> None:
    row = Row(Path("list.txt"), 7, (text,))
    if all(character in "0123456789" for character in text):
        assert row.integer(0, "the id") == int(text)
    else:
        assert "list.txt, line 7: the id must be a whole number" in refusal(row.integer, 0, "the id")


@pytest.mark.parametrize("text", ["", "-1", "1.0", "1_0", "１", "²", "one"])
def test_what_is_no_whole_number(text: str) -> None:
    assert "must be a whole number" in refusal(Row(Path("f"), 1, (text,)).integer, 0, "the id")


@given(values=st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=2, max_size=2))
def test_numbers_are_read_exactly(values: list[float]) -> None:
    row = Row(Path("f"), 1, ("id", *map(repr, values)))
    assert row.numbers(1, 3, "x, y") == tuple(values)


@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "1e999", "x", ""])
def test_what_is_no_number(text: str) -> None:
    assert "f, line 3: x, y must be numbers" in refusal(Row(Path("f"), 3, ("0", text)).numbers, 0, 2, "x, y")


def test_flags() -> None:
    assert Row(Path("f"), 1, ("1",)).flag(0, "visible") is True
    assert Row(Path("f"), 1, ("0",)).flag(0, "visible") is False
    assert "visible must be 0 or 1, not '2'" in refusal(Row(Path("f"), 1, ("2",)).flag, 0, "visible")


@given(
    left=st.integers(1, 500), top=st.integers(1, 500), width=st.integers(1, 300), height=st.integers(1, 300)
)
def test_corners_cover_the_pixels_from_first_to_last(left: int, top: int, width: int, height: int) -> None:
    columns = range(left, left + width)
    rows = range(top, top + height)
    row = Row(Path("f"), 1, tuple(str(value) for value in (columns[0], rows[0], columns[-1], rows[-1])))
    assert row.corners(0) == (left - 1, top - 1, len(columns), len(rows))


def test_corners_the_wrong_way_round() -> None:
    assert "ends before it begins" in refusal(Row(Path("f"), 1, ("5", "1", "4", "9")).corners, 0)


@pytest.mark.parametrize("name", ["/etc/passwd", "../x.jpg", "a/../../x.jpg"])
def test_files_stay_in_their_folder(name: str) -> None:
    assert "leads out of images" in refusal(Row(Path("f"), 1, (name,)).file_in, Path("images"), 0)


def test_file_in_a_folder() -> None:
    assert Row(Path("f"), 1, ("a b/ü",)).file_in(Path("images"), 0, ".jpg") == Path("images/a b/ü.jpg")


def test_class_folders_in_place_of_an_archive_are_named(tmp_path: Path) -> None:
    for folder in ("cars_train", "cars_test", "ani"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "1.jpg").touch()
    (tmp_path / "lists").mkdir()
    assert "the dataset is folder" not in refusal(read_rows, tmp_path / "classes.txt", ("id",))
    (tmp_path / "auk").mkdir()
    (tmp_path / "auk" / "2.png").touch()
    assert refusal(read_rows, tmp_path / "classes.txt", ("id",)).endswith(
        "For a folder per class, as there, the dataset is folder."
    )


def test_a_list_that_is_missing_empty_or_not_text(tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    assert f"{path} is missing" in refusal(read_rows, path, ("id",))
    path.write_text("\n \n")
    assert f"{path} is empty" in refusal(read_rows, path, ("id",))
    path.write_bytes(b"1 a\n2 \xff\n")
    assert f"{path}, line 2: not UTF-8 text" in refusal(read_rows, path, ("id", "name"))


def test_an_unreadable_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "list.txt"
    write_lines(path, ["1 a"])

    def deny(self: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    # Made by hand because the tests may run as root, who may read everything.
    monkeypatch.setattr(Path, "read_bytes", deny)
    assert f"{path} cannot be read (Permission denied)" in refusal(read_rows, path, ("id", "name"))


def test_a_byte_order_mark_is_no_part_of_the_first_column(tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    path.write_bytes(b"\xef\xbb\xbf1 a\n")
    assert read_rows(path, ("id", "name"))[0].fields == ("1", "a")


def test_keys_listed_twice_name_both_lines() -> None:
    rows = [Row(Path("f"), number, (key, "x")) for number, key in enumerate("aba", start=1)]
    assert "f, line 3: 'a' was already listed in f, line 1" in refusal(keyed, rows)
    assert list(keyed(rows[:2])) == ["a", "b"]


@given(names=st.lists(st.sampled_from(["wren", "wren (1)", "wren (2)", "wren (1) (1)", "jay"]), max_size=6))
def test_distinct_names_are_distinct_and_leave_unique_ones(names: list[str]) -> None:
    result = distinct_names(names, range(len(names)))
    assert len(set(result)) == len(names)
    assert all(new.startswith(old) for old, new in zip(names, result, strict=True))
    if len(set(names)) == len(names):
        assert list(result) == names


def test_archive_root(tmp_path: Path) -> None:
    assert "does not exist" in refusal(archive_root, tmp_path / "none", "marker.txt", "inner")
    packed = tmp_path / "archive.tgz"
    packed.touch()
    assert "is a file: unpack it" in refusal(archive_root, packed, "marker.txt", "inner")
    assert archive_root(tmp_path, "marker.txt", "inner") == tmp_path
    (tmp_path / "inner").mkdir()
    assert archive_root(tmp_path, "marker.txt", "inner") == tmp_path / "inner"
    (tmp_path / "marker.txt").touch()
    assert archive_root(tmp_path, "marker.txt", "inner") == tmp_path


def test_require_folder(tmp_path: Path) -> None:
    assert require_folder(tmp_path) == tmp_path
    assert "images/ is missing" in refusal(require_folder, tmp_path / "images")


@given(
    names=st.lists(
        st.text(st.characters(codec="latin-1", exclude_categories=("Cc",)), min_size=1), min_size=1
    )
)
@settings(deadline=None, max_examples=15)  # each starts a process
@pytest.mark.slow
def test_cells_survive_a_mat_file(file: Path, names: list[str]) -> None:
    path = file.with_suffix(".mat")
    savemat(path, {"names": mat_cells(names), "ids": np.arange(len(names), dtype=np.float64)[:, None]})
    rows = mat_rows(path, dict(zip(("name", "id"), load_mat(path, "names", "ids"), strict=True)))
    assert [row.fields for row in rows] == [(name, str(i)) for i, name in enumerate(names)]


def test_broken_mat_files(tmp_path: Path) -> None:
    path = tmp_path / "list.mat"
    assert "is missing" in refusal(load_mat, path, "names")
    path.write_bytes(b"<html>404 Not Found</html>" * 20)
    assert f"{path} cannot be read as a .mat file" in refusal(load_mat, path, "names")
    savemat(path, {"other": 1})
    assert f"{path} has no variable 'names'" in refusal(load_mat, path, "names")
    savemat(path, {"names": mat_cells(["a" * 50, "b"])})
    path.write_bytes(path.read_bytes()[:150])
    assert f"{path} cannot be read as a .mat file" in refusal(load_mat, path, "names")


def test_mat_columns_that_do_not_fit() -> None:
    path = Path("list.mat")
    assert "list.mat: 2 file, 1 label" in refusal(mat_rows, path, {"file": ["a", "b"], "label": [1]})
    assert "list.mat lists nothing" in refusal(mat_rows, path, {"file": [], "label": np.array([])})
    broken = {"file": ["a", np.array([])], "label": [1, 2]}
    assert "list.mat, entry 2: 'file' holds no value" in refusal(mat_rows, path, broken)


def test_as_list_puts_back_a_list_of_one() -> None:
    assert as_list("one") == ["one"]
    assert as_list({"fname": "x"}) == [{"fname": "x"}]
    assert as_list(3) == [3]
    assert as_list(np.array([1, 2])) == [1, 2]


def test_mat_values_are_plain(file: Path) -> None:
    values = {
        "text": "a",
        "number": 2.5,
        "numbers": np.array([[1, 2], [3, 4]]),
        "cells": mat_cells(["a", 1]),
        "struct": {"x": 1, "y": "b"},
        "complex": 1j,
        "flag": True,
    }
    savemat(file, values)
    assert load_mat(file, *values) == ("a", 2.5, [[1, 2], [3, 4]], ["a", 1], {"x": 1, "y": "b"}, None, 1)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("os.kill(os.getpid(), signal.SIGSEGV)", "its reader stopped with SIGSEGV"),
        ("os.kill(os.getpid(), 60)", "its reader stopped with signal 60"),
        ("bytearray(1 << 40)", "its reader gave no answer"),
        ("limit(); os.kill(os.getpid(), signal.SIGXCPU)", "it takes more than 60 s"),
        ("time.sleep(100)", "it takes more than 60 s"),
        ("print('{')", "its reader gave no answer"),
        ("print('[' * 100000)", "its reader gave no answer"),
    ],
)
def test_a_reader_that_dies_or_hangs_is_one_line(
    body: str, reason: str, file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file.write_bytes(b"x")
    script = tmp_path / "child.py"
    script.write_text(f"import os, signal, time\ndef limit(): pass\n{body}\n")
    monkeypatch.setattr(mat, "__file__", str(script))
    if "sleep" in body:
        monkeypatch.setattr(
            mat.subprocess, "run", lambda command, **options: run(command, **{**options, "timeout": 0.5})
        )
    assert f"{file} cannot be read as a .mat file ({reason})" in refusal(load_mat, file, "x")


def test_a_small_mat_file_that_unpacks_to_gigabytes_is_one_line(file: Path) -> None:
    matrix = b"".join(
        struct.pack("<II", kind, len(data)) + data.ljust(8, b"\0")
        for kind, data in (
            (6, struct.pack("<II", 6, 0)),
            (5, struct.pack("<ii", 1, 3 << 28)),
            (1, b"x"),
        )
    )
    size = 8 * (3 << 28)
    packer = zlib.compressobj(1)
    head = (
        struct.pack("<II", 14, len(matrix) + 8 + size & 0xFFFFFFFF)
        + matrix
        + struct.pack("<II", 9, size & 0xFFFFFFFF)
    )
    packed = (
        packer.compress(head) + b"".join(packer.compress(bytes(1 << 20)) for _ in range(64)) + packer.flush()
    )
    start = b"MATLAB 5.0 MAT-file".ljust(124) + struct.pack("<H2s", 0x0100, b"IM")
    file.write_bytes(start + struct.pack("<II", 15, len(packed)) + packed)
    assert f"{file} cannot be read as a .mat file (" in refusal(load_mat, file, "x")


@pytest.mark.parametrize("text", ["1" * 1001, "9" * 5000])
def test_numbers_of_thousands_of_digits_are_refused(text: str) -> None:
    row = Row(Path("list.txt"), 7, (text,))
    assert len(refusal(row.integer, 0, "the id")) < 250
    assert len(refusal(row.numbers, 0, 1, "x")) < 250


@pytest.mark.parametrize("text", ["nan", "-inf", "1e999"])
def test_numbers_without_end_are_refused(text: str) -> None:
    assert "x must be numbers" in refusal(Row(Path("f"), 1, (text,)).numbers, 0, 1, "x")


@pytest.mark.parametrize("name", ["a\0b", "x" * 300, "ö" * 200])
def test_names_that_no_file_has_are_refused(name: str) -> None:
    message = refusal(Row(Path("f"), 1, (name,)).file_in, Path("images"), 0)
    assert "cannot be the name of a file" in message


def test_a_box_without_end_is_refused() -> None:
    row = Row(Path("f"), 1, ("-1e308", "0", "1e308", "1"))
    assert "the box is too large" in refusal(row.corners, 0)
