from __future__ import annotations

import csv
import re
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

import layouts
from crossx.data.readers.table import read_table
from crossx.errors import CrossXError, UsageError


def write(folder: Path, text: str, name: str = "birds.csv", encoding: str = "utf-8") -> Path:
    path = folder / name
    path.write_text(text, encoding=encoding)
    return path


def parquet(folder: Path, **columns: object) -> Path:
    path = folder / "birds.parquet"
    pq.write_table(pa.table(columns), path)
    return path


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_layout_with_splits(tmp_path: Path, suffix: str) -> None:
    index = read_table(layouts.write_table(tmp_path, classes=3, images_per_class=8, suffix=suffix))
    assert index.name == "table"
    assert index.classes == tuple(sorted(layouts.FOLDERS))
    assert [len(index.split(split)) for split in ("train", "val", "test")] == [12, 6, 6]
    for record in index.records:
        assert record.path.is_file()
        written_class = int(record.path.name.split("_")[0])
        assert index.classes[record.label] == layouts.FOLDERS[written_class]


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_layout_without_splits_holds_out_a_share(tmp_path: Path, suffix: str) -> None:
    table = layouts.write_table(tmp_path, classes=3, images_per_class=8, suffix=suffix, splits=False)
    index = read_table(table, test_fraction=0.25)
    assert [len(index.split(split)) for split in ("train", "val", "test")] == [18, 0, 6]
    assert {record.label for record in index.split("test")} == {0, 1, 2}
    assert read_table(table, test_fraction=0.25) == index
    assert read_table(table, test_fraction=0.25, split_seed=1) != index


def test_csv_and_parquet_hold_out_the_same(tmp_path: Path) -> None:
    first, second = (
        read_table(layouts.write_table(tmp_path, suffix=suffix, splits=False))
        for suffix in (".csv", ".parquet")
    )
    assert first == second


def test_byte_order_mark_blank_lines_case_extra_columns_and_quotes(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        'Label,id, PATH ,Split\r\n"Finch, House",1,a b.jpg,TRAIN\r\n\r\n'
        " wren ,2,/abs/ü.jpg,Validation\r\nwren,3,x.jpg,train\r\n",
        encoding="utf-8-sig",
    )
    index = read_table(path)
    assert index.classes == ("Finch, House", "wren")
    assert [(record.path, record.label, record.split) for record in index.records] == [
        (tmp_path / "a b.jpg", 0, "train"),
        (Path("/abs/ü.jpg"), 1, "val"),
        (tmp_path / "x.jpg", 1, "train"),
    ]


def test_whole_numbers_are_in_numeric_order(tmp_path: Path) -> None:
    path = write(tmp_path, "path,label\na,10\nb,9\nc,-1\nd,007\n")
    assert read_table(path).classes == ("-1", "007", "9", "10")
    path = parquet(tmp_path, path=["a", "b", "c"], label=pa.array([10, 9, 100], pa.int64()))
    assert read_table(path).classes == ("9", "10", "100")
    path = parquet(tmp_path, path=["a", "b"], label=[2.0, 10.0])
    assert read_table(path).classes == ("2", "10")
    path = write(tmp_path, "path,label\na,10\nb,9\nc,wren\n")
    assert read_table(path).classes == ("10", "9", "wren")


def test_labels_that_look_like_missing_values_are_labels(tmp_path: Path) -> None:
    assert read_table(write(tmp_path, "path,label\na,NA\nb,null\n")).classes == ("NA", "null")


def test_dictionary_encoded_parquet(tmp_path: Path) -> None:
    path = parquet(tmp_path, path=["a", "b"], label=pa.array(["wren", "finch"]).dictionary_encode())
    assert read_table(path).classes == ("finch", "wren")


names = st.text(st.characters(blacklist_categories=("Cs", "Cc")), min_size=1).filter(
    lambda text: text == text.strip()
)


@given(
    st.dictionaries(names.filter(lambda text: "/" not in text and text not in (".", "..")), names, min_size=2)
)
def test_any_names_survive_both_formats(labels: dict[str, str]) -> None:
    if len(set(labels.values())) < 2:
        labels = {path: str(number) + label for number, (path, label) in enumerate(labels.items())}
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder, "birds.csv")
        with table.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["path", "label"])
            writer.writerows(labels.items())
        other = parquet(Path(folder), path=list(labels), label=list(labels.values()))
        for index in (read_table(table, test_fraction=0), read_table(other, test_fraction=0)):
            assert {r.path.name: index.classes[r.label] for r in index.records} == labels


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "there is no column 'path'. Columns found: none"),
        ("path,label\n", "the table has no rows"),
        (
            "filepath,label\na,x\n",
            "no column 'path'. Did you mean 'filepath'? Columns found: 'filepath', 'label'",
        ),
        ("path,species\na,x\n", "no column 'label'. Columns found: 'path', 'species'"),
        ("path,path,label\na,b,x\n", "two columns are called 'path'"),
        ("path,label\na,x\nb,\n,y\n", "line 3: label empty; line 4: path empty"),
        ("path,label,split\na,x,\nb,y,train\n", "line 2: split empty"),
        ("path,label,split\na,x,trian\nb,y,train\n", "line 2: split 'trian' is not one of train, val"),
        ("path,label\na,x\nb,y\n./a,y\n", "line 4: './a' is already in line 2 with the label 'x', here 'y'"),
        ("path,label\na,x\nb,y\na,x\n", "line 4: 'a' is already in line 2."),
        ("path,label,split\na,x,train\nb,y,train\nc,z,test\n", "no training image of 'z' (line 4, test)"),
        ("path,label\na,x\nb,x\n", "only one class, 'x'"),
        ("path,label\na,x,extra\n", "line 2: 3 fields, the header has 2"),
        ('path,label\na,"x\n', "not valid CSV"),
        ("path,label\n" + "a,\n" * 8, "line 6: label empty; and 3 more"),
    ],
)
def test_wrong_tables_are_one_clear_line(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(CrossXError) as caught:
        read_table(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 1


def test_empty_values_in_parquet_are_named_by_row(tmp_path: Path) -> None:
    path = parquet(tmp_path, path=["a", "b", "c"], label=[1.0, None, float("nan")])
    with pytest.raises(CrossXError, match=r"row 2: label empty; row 3: label empty"):
        read_table(path)


def test_not_utf8(tmp_path: Path) -> None:
    path = write(tmp_path, "path,label\na,Grünfink\n", encoding="latin-1")
    with pytest.raises(CrossXError, match="not UTF-8"):
        read_table(path)


def test_broken_parquet_is_one_line(tmp_path: Path) -> None:
    path = write(tmp_path, "no parquet at all", name="birds.parquet")
    with pytest.raises(CrossXError, match="not a Parquet file") as caught:
        read_table(path)
    assert "\n" not in str(caught.value)


def test_no_table_there(tmp_path: Path) -> None:
    with pytest.raises(CrossXError, match="no such file"):
        read_table(tmp_path / "birds.csv")
    with pytest.raises(UsageError, match=r"\.csv or \.parquet"):
        read_table(tmp_path / "birds.xlsx")
    write(tmp_path, "path,label\n")
    with pytest.raises(UsageError, match=r"is a folder.*Did you mean '.*birds\.csv'"):
        read_table(tmp_path)


@pytest.mark.parametrize(
    "labels",
    [
        pa.array([2**62, 1], pa.timestamp("us")),
        pa.array([2**30, 1], pa.int32()).cast(pa.date32()),
        pa.array([b"\xff\xfe", b"a"]).view(pa.utf8()),
    ],
    ids=["a time beyond year 9999", "a date beyond year 9999", "text that is not UTF-8"],
)
def test_values_that_python_cannot_hold_are_one_line(tmp_path: Path, labels: pa.Array) -> None:
    path = parquet(tmp_path, path=["a", "b"], label=labels)
    with pytest.raises(CrossXError, match=re.escape(f"{path}: ")) as caught:
        read_table(path, test_fraction=0)
    assert "\n" not in str(caught.value)


def test_labels_of_thousands_of_digits_are_text(tmp_path: Path) -> None:
    longest = "1" * 5000
    path = write(tmp_path, f"path,label\na,{longest}\nb,2\nc,10\n")
    assert read_table(path, test_fraction=0).classes == ("10", longest, "2")
