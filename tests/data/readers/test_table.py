from __future__ import annotations

import csv
import gzip
import json
import os
import re
import tempfile
import unicodedata
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import layouts
from crossx.data.leftovers import is_system_path
from crossx.data.readers.table import read_paths, read_table
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
    lambda text: text == text.strip() == text.strip("\u200b\u200c\u200d\u2060\ufeff")
)


file_names = names.filter(
    lambda text: (
        "/" not in text
        and text not in (".", "..")
        and not is_system_path(text)
        and len(os.fsencode(text)) < 256
    )
)
# a name with these may be refused as several labels
labels_of_one = names.filter(lambda text: not set(text) & set(",;|[](){}"))


# names of which only an existing file says that they are not on a Windows drive
on_a_drive = re.compile(r"\\\\|[A-Za-z]:\\")


@given(st.dictionaries(file_names, labels_of_one, min_size=2))
@example({"0": "a", "\\\\": "b", "c:\\d": "c"})
def test_any_names_survive_both_formats(labels: dict[str, str]) -> None:
    if len({unicodedata.normalize("NFC", label) for label in labels.values()}) < 2:
        labels = {path: str(number) + label for number, (path, label) in enumerate(labels.items())}
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder, "birds.csv")
        with table.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["path", "label"])
            writer.writerows(labels.items())
        for path in labels:
            if on_a_drive.match(path):
                Path(folder, path).touch()
        other = parquet(Path(folder), path=list(labels), label=list(labels.values()))
        written = {path: unicodedata.normalize("NFC", label) for path, label in labels.items()}
        for index in (read_table(table, test_fraction=0), read_table(other, test_fraction=0)):
            assert {r.path.name: index.classes[r.label] for r in index.records} == written


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
        ('path,label\na,"x\n', "line 2: not valid CSV"),
        (
            'sep=,\npath,label\na,x\nb,"y\nc,z\nd,z\n',
            "line 4: not valid CSV (unexpected end of data). Check the quotes from there to line 6.",
        ),
        (
            'path,label\n"a,x\nb,"y"\n',
            "line 2: not valid CSV (',' expected after '\"'). Check the quotes from there to line 3.",
        ),
        (
            '"path,label\na,x\n',
            "line 1: not valid CSV (unexpected end of data). Check the quotes from there to line 2.",
        ),
        ("\n\npath,label\na\n", "line 4: 1 field, the header has 2"),
        ("a,x\nb,y\n", "Columns found: 'a', 'x'. The first line names the columns: path, label."),
        ("path label\na x\nb y\n", "the separator of 'path label' is not known: a comma, semicolon, tab or"),
        ("Path:Label:Split\na:x:train\n", "the separator of 'Path:Label:Split' is not known"),
        ("path,label\n" + "a,\n" * 8, "line 6 and 3 more: label empty"),
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
    with pytest.raises(CrossXError, match="row 2, row 3: label empty"):
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


def rows(
    folder: Path, text: str, name: str = "birds.csv", encoding: str = "utf-8"
) -> list[tuple[str, str, str]]:
    path = folder / name
    path.write_bytes(text.encode(encoding))
    index = read_table(path, test_fraction=0)
    return [(record.path.name, index.classes[record.label], record.split) for record in index.records]


PLAIN = "path,label,split\na.jpg,Grünfink,train\nb.jpg,wren,train\nc.jpg,wren,test\n"
READ = [("a.jpg", "Grünfink", "train"), ("b.jpg", "wren", "train"), ("c.jpg", "wren", "test")]


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("ending", ["\n", "\r\n", "\r"])
def test_separators_encodings_and_line_ends(
    tmp_path: Path, separator: str, encoding: str, ending: str
) -> None:
    text = PLAIN.replace(",", separator).replace("\n", ending)
    assert rows(tmp_path, text, encoding=encoding) == READ
    assert rows(tmp_path, f"{ending} {ending}{text}\x1a", encoding=encoding) == READ
    text = f"sep={separator}{ending}{text}"
    assert rows(tmp_path, text, "birds.txt", encoding) == READ


def test_a_stray_nul_is_not_utf16(tmp_path: Path) -> None:
    assert [path for path, _, _ in rows(tmp_path, "path,label\na.jpg,x\nb.jpg,y\0\n")] == ["a.jpg", "b.jpg"]


@pytest.mark.parametrize("name", ["birds.tsv", "birds.txt", "BIRDS.CSV", "birds.tab"])
def test_names_of_text_tables(tmp_path: Path, name: str) -> None:
    assert rows(tmp_path, PLAIN.replace(",", "\t"), name) == READ


def test_compressed_text(tmp_path: Path) -> None:
    path = tmp_path / "birds.csv.gz"
    path.write_bytes(gzip.compress(PLAIN.encode()))
    assert len(read_table(path).records) == 3
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(CrossXError, match="not a complete gzip file"):
        read_table(path)


def test_what_spreadsheets_add(tmp_path: Path) -> None:
    text = '"Path";"Label";"Split";"Weight";\na.jpg;Grünfink;train;1,5;\n'
    text += "b.jpg;wren;train;;\nc.jpg;wren;test;2,0;\n;;;;\n"
    assert rows(tmp_path, text) == READ


def test_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "birds.jsonl"
    path.write_text(
        '{"label": 10, "path": "a.jpg", "x": [1]}\n\n{"path": "b.jpg", "label": 9.0}\r\n', "utf-8"
    )
    assert read_table(path).classes == ("9", "10")
    for text, message in (
        ("[1]\n", "line 1: is not a JSON object"),
        ('{"path": "a"\n', "line 1: is not valid JSON"),
        (
            '{"path": "a", "label": ["x", "y"]}\n',
            "line 1: column 'label' holds lists: a label is text or a whole number",
        ),
        ('{"path": "a", "label": {"x": 1}}\n', "column 'label' holds objects"),
        ('{"path": "a", "label": "x"}\n{"path": "b"}\n', "line 2: label empty"),
        ("\n", "no column 'path'"),
    ):
        path.write_text(text, "utf-8")
        with pytest.raises(CrossXError) as caught:
            read_table(path)
        assert message in str(caught.value)


@pytest.mark.parametrize(
    ("start", "message"),
    [
        (b"PK\x03\x04", "is a spreadsheet"),
        (b"\xd0\xcf\x11\xe0", "is a spreadsheet"),
        (b"PAR1", "is a Parquet file"),
    ],
)
def test_other_files_with_the_name_of_a_table(tmp_path: Path, start: bytes, message: str) -> None:
    path = tmp_path / "birds.csv"
    path.write_bytes(start + b"\0\xff" * 20)
    with pytest.raises(CrossXError, match=message):
        read_table(path)


@pytest.mark.parametrize("name", ["birds.xlsx", "birds.XLS", "birds.ods"])
def test_spreadsheets_are_refused_with_the_remedy(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="Save it as CSV UTF-8"):
        read_table(tmp_path / name)


def test_backslashes_and_other_unicode_forms_name_the_files_that_are_there(tmp_path: Path) -> None:
    for name in ("d/red/1.jpg", "d/blue/1.jpg", "back\\slash.jpg", "cafe\u0301.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    text = "path,label\nd\\red\\1.jpg,red\n.\\d\\blue\\1.jpg,blue\nback\\slash.jpg,red\n"
    text += "caf\u00e9.jpg,red\nno\\file.jpg,red\n"
    index = read_table(write(tmp_path, text), test_fraction=0)
    assert [record.path.is_file() for record in index.records] == [True] * 4 + [False]
    assert index.records[0].path == tmp_path / "d" / "red" / "1.jpg"
    with pytest.raises(CrossXError, match=r"line 3: 'd/red/1.jpg' is already in line 2"):
        read_table(write(tmp_path, "path,label\nd\\red\\1.jpg,red\nd/red/1.jpg,red\n"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("C:\\data\\1.jpg", "is on a Windows drive"),
        ("D:/data/1.jpg", "is on a Windows drive"),
        ("\\\\server\\share\\1.jpg", "is on a Windows drive"),
        ("https://example.org/1.jpg", "is a URL"),
        ("s3://bucket/1.jpg", "is a URL"),
        ("file:///data/1.jpg", "write the path without file://"),
    ],
)
def test_paths_of_other_machines(tmp_path: Path, name: str, message: str) -> None:
    path = write(tmp_path, f"path,label\n{name},red\na.jpg,blue\n")
    for read in (read_table, read_paths):
        with pytest.raises(CrossXError, match=message) as caught:
            read(path)
        assert "line 2" in str(caught.value)


@pytest.mark.parametrize(
    ("values", "classes"),
    [
        (pa.array([b"wren", b"Gr\xc3\xbcnfink"]), ("Grünfink", "wren")),
        (pa.array(["b", "a"], pa.large_string()), ("a", "b")),
        (pa.array([True, False]), ("False", "True")),
        (pa.array([1.0, 10.0], pa.float32()), ("1", "10")),
        (pa.array([Decimal("2"), Decimal("10")]), ("2", "10")),
        (pa.array([2, 10], pa.uint8()).dictionary_encode(), ("2", "10")),
        (pa.array(["cafe\u0301 ", "b"]), ("b", "caf\u00e9")),
    ],
)
def test_types_that_are_labels(tmp_path: Path, values: pa.Array, classes: tuple[str, ...]) -> None:
    assert read_table(parquet(tmp_path, path=["a", "b"], label=values)).classes == classes


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (pa.array([["wren"], ["finch"]]), "column 'label' holds list<"),
        (pa.array([{"name": "wren"}, {"name": "finch"}]), "column 'label' holds struct<"),
        (pa.array([0, 1], pa.date32()), "column 'label' holds date32"),
        (pa.array([0, 1], pa.timestamp("ns")), "column 'label' holds timestamp"),
        (pa.array([0, 1], pa.duration("s")), "column 'label' holds duration"),
        (pa.array([0.5, 1.0]), "row 1: column 'label' holds numbers with a fraction, such as 0.5"),
        (pa.array([Decimal("1.5"), Decimal("2.0")]), "column 'label' holds numbers with a fraction"),
        (pa.array([float("inf"), 1.0]), "column 'label' holds numbers with a fraction"),
        (pa.array([b"caf\xe9", b"b"]), "column 'label' holds bytes that are not UTF-8"),
        (pa.nulls(2), "row 1, row 2: label empty"),
    ],
)
def test_types_that_are_no_labels(tmp_path: Path, values: pa.Array, message: str) -> None:
    path = parquet(tmp_path, path=["a", "b"], label=values)
    with pytest.raises(CrossXError) as caught:
        read_table(path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["pandas.period", "stranger.unit"])
def test_extension_types_are_no_labels(tmp_path: Path, name: str) -> None:
    storage = pa.array([18262, 18263])
    field = pa.field("label", storage.type, metadata={"ARROW:extension:name": name})
    path = tmp_path / "birds.parquet"
    pq.write_table(
        pa.table([pa.array(["a", "b"]), storage], pa.schema([pa.field("path", pa.string()), field])), path
    )
    with pytest.raises(CrossXError, match=f"column 'label' holds .*{name}"):
        read_table(path)


SPLIT_COLUMNS = {
    "subset": ["train", "test"], "set": ["1", "2"], "Set": ["a", "b"], "fold": ["0", "1"], "phase": ["x", "y"],
    "is_valid": ["True", "False"], "is_train": ["1", "0"], "isTest": ["0", "1"], "train": ["1", "0"],
    "partition": ["0", "2"], "usage": ["Public", "Private"], "data_split": ["a", "b"], "datasplit": ["a", "b"],
    "group": ["Training", "val"], "purpose": ["trn", "tst"], "train_test_split": ["0", "1"],
    "cv": ["1", "2"], "part": [b"train", b"test"], "kfold": [0.0, 1.0],
}  # fmt: skip


@pytest.mark.parametrize("column", SPLIT_COLUMNS)
def test_a_split_under_another_name_is_noted(tmp_path: Path, column: str) -> None:
    first, second = SPLIT_COLUMNS[column]
    text = f"path,label,{column}\na,x,{first}\nb,y,{second}\nc,x,{first}\nd,y,{first}\n"
    tables = [write(tmp_path, text)]
    tables.append(
        parquet(tmp_path, path=list("abcd"), label=list("xyxy"), **{column: [first, second, first, first]})
    )
    lines = tmp_path / "birds.jsonl"
    lines.write_text(
        "".join(f'{{"path": "{p}", "label": "{x}", "{column}": "{first}"}}\n' for p, x in ("ax", "by"))
    )
    for table in tables[1:] if isinstance(first, bytes) else (*tables, lines):
        (note,) = read_table(table).notes
        assert note.startswith(f"the column {column!r} seems to be a split and is not read")
    assert read_table(write(tmp_path, f"path,label,split,{column}\na,x,train,1\nb,y,train,1\n")).notes == ()


@pytest.mark.parametrize(
    "column", ["id", "weight", "photographer", "test_tube", "settings", "dataset_url", "mode_of_life"]
)
def test_other_columns_are_not_taken_for_a_split(tmp_path: Path, column: str) -> None:
    assert read_table(write(tmp_path, f"path,label,{column}\na,x,1\nb,y,some text\n")).notes == ()


def test_values_of_the_split_column(tmp_path: Path) -> None:
    text = "path,label,split\na,x,Training\nb,y,train_set\nc,x,dev\nd,y,TST\n"
    assert [split for _, _, split in rows(tmp_path, text)] == ["train", "train", "val", "test"]
    with pytest.raises(CrossXError, match="line 4: split 'holdout' may be val or test"):
        rows(tmp_path, "path,label,split\na,x,train\nb,y,train\nc,x,holdout\n")


def test_a_problem_of_several_rows_is_said_once(tmp_path: Path) -> None:
    text = "path,label,split\na,x,holdout\nb,,train\nc,x,holdout\nd,y,holdout\n"
    with pytest.raises(CrossXError) as caught:
        rows(tmp_path, text)
    assert str(caught.value).endswith(
        ": line 2, line 4, line 5: split 'holdout' may be val or test: write one of these; line 3: label empty. "
        "Fix the table."
    )


def test_rows_of_system_files_are_skipped(tmp_path: Path) -> None:
    index = read_table(write(tmp_path, "path,label\na,x\n__MACOSX/._a,x\nb,y\n._b,y\n"))
    assert [record.path.name for record in index.records] == ["a", "b"]
    assert index.notes == ("skipped 2 rows of system files: '__MACOSX/._a', '._b'",)


def test_labels_that_look_the_same_or_like_several(tmp_path: Path) -> None:
    index = read_table(write(tmp_path, "path,label\na,1\nb,1.0\nc,daisy|white\nd,caf\u00e9\ne,cafe\u0301\n"))
    assert index.classes == ("1", "1.0", "caf\u00e9", "daisy|white")
    alike, several = index.notes
    assert "'1' and '1.0'" in alike
    assert "'daisy|white'" in several


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


@pytest.mark.parametrize("name", ["birds.csv", "birds.parquet", "birds.jsonl"])
def test_a_pipe_is_no_table(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(CrossXError, match="is a pipe or device, not a file"):
        read_table(tmp_path / name)


def test_a_compressed_table_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "birds.csv.gz"
    path.write_bytes(gzip.compress(b"path,label\n" + b"a" * 5000))
    monkeypatch.setattr("crossx.data.readers.table.MAX_FILE", 1000)
    with pytest.raises(CrossXError, match="becomes larger than"):
        read_table(path)


def test_whole_numbers_of_many_digits_are_labels(tmp_path: Path) -> None:
    longest = Decimal(10**37)
    path = parquet(tmp_path, path=["a", "b"], label=pa.array([longest, Decimal(2)], pa.decimal128(38, 0)))
    assert read_table(path, test_fraction=0).classes == ("2", str(10**37))


def test_a_path_of_half_a_character_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "birds.jsonl"
    path.write_text('{"path": "\\ud800a.jpg", "label": "x"}\n{"path": "b.jpg", "label": "y"}\n')
    for read in (read_table, read_paths):
        with pytest.raises(CrossXError, match="line 1: column 'path' holds text that is not valid Unicode"):
            read(path)


def test_lines_are_counted_from_the_separators_line(tmp_path: Path) -> None:
    text = 'sep=;\npath;label\n"a"b;x\n'
    with pytest.raises(CrossXError, match="line 3: not valid CSV"):
        read_table(write(tmp_path, text))


def test_a_table_of_nothing_but_system_files(tmp_path: Path) -> None:
    with pytest.raises(CrossXError, match="all 2 rows name system files"):
        read_table(write(tmp_path, "path,label\n__MACOSX/._a,x\n._b,y\n"))


@pytest.mark.parametrize(
    ("labels", "several"),
    [
        (["cat|dog", "dog;bird", "cat"], True),
        (["['cat', 'dog']", "['dog']", "['cat', 'bird']"], True),
        (["cat, dog", "dog, bird", "cat, bird", "cat"], True),
        # a note says that it is one class
        (["cat|dog", "dog", "cat", "cat|dog"], False),
        (["Corvus corax, 1758", "Turdus merula, 1758", "Pica pica, 1758"], False),
        (["Audi A4 (2012, red)", "Audi A5 (2012, red)", "BMW"], False),
        (["cat;", "dog;", "bird;"], False),
        (["car, red", "car, blue", "bus, red", "bus, blue"], False),
        (["wren, male", "wren, female", "wren, juvenile", "robin"], False),
        (["wren, male, adult", "wren, female, adult", "robin, male, adult"], False),
        (["car, red", "car, blue", "red, bus", "bus, blue"], True),
    ],
)
def test_tables_with_several_labels_per_image_are_refused(
    tmp_path: Path, labels: list[str], several: bool
) -> None:
    path = tmp_path / "birds.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(
            [("path", "label"), *((f"{n}.jpg", label) for n, label in enumerate(labels))]
        )
    if several:
        with pytest.raises(CrossXError, match=r"labels look like several, such as .* one label per image"):
            read_table(path, test_fraction=0)
    else:
        assert len(read_table(path, test_fraction=0).classes) == len({*labels})


def test_a_note_on_names_with_recurring_parts(tmp_path: Path) -> None:
    text = 'path,label\n1.jpg,"car, red"\n2.jpg,"car, blue"\n3.jpg,"bus, red"\n4.jpg,"bus, blue"\n'
    (note,) = read_table(write(tmp_path, text), test_fraction=0).notes
    assert note.startswith("labels such as 'car, red' are each read as the name of one class")


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_a_column_per_class_is_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"birds{suffix}"
    columns = {"path": ["a.jpg", "b.jpg"], "cat": [1, 0], "dog": [1, 1], "size": [1, 5]}
    if suffix == ".parquet":
        pq.write_table(pa.table(columns), path)
    elif suffix == ".csv":
        path.write_text("path,cat,dog,size\na.jpg,1,1,1\nb.jpg,0,1,5\n")
    else:
        path.write_text("".join(json.dumps({k: v[n] for k, v in columns.items()}) + "\n" for n in range(2)))
    with pytest.raises(
        CrossXError, match=r"no column 'label', and 'cat', 'dog' hold only 0 and 1, .* one label per"
    ):
        read_table(path)
