import csv
import io
import os
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

import layouts
from crossx.data.image_files import find_images
from crossx.predict import shards as module
from crossx.predict.outputs import Columns, write_csv
from crossx.predict.predictor import Predictor
from crossx.predict.shards import Entry, count_failed, find_collection, predict_shard
from refusals import refusal


@pytest.fixture(scope="module")
def predictor(tmp_path_factory):
    return Predictor.load(layouts.write_run(tmp_path_factory.mktemp("run")), device="cpu")


@pytest.fixture
def photos(tmp_path):
    return layouts.write_folder(tmp_path / "photos", images_per_class=4)


def entries(collection):
    return [entry for shard in collection.shards for entry in shard.read()]


def table(path, columns, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, **options)
    return path


def test_a_folder_is_cut_in_order(photos):
    collection = find_collection(photos, 5)
    paths = find_images(photos)
    assert [shard.size for shard in collection.shards] == [5, 5, 2]
    assert entries(collection) == [Entry(str(path.relative_to(photos)), path) for path in paths]
    assert str(collection.shards[2]) == f"{paths[10].relative_to(photos)} to {paths[11].relative_to(photos)}"


def test_names_that_are_no_text_are_escaped(photos):
    shutil.copy(find_images(photos)[0], os.path.join(os.fsencode(photos), b"z\xff.jpg"))
    last = entries(find_collection(photos, 100))[-1]
    assert last.name == "z\\xff.jpg"
    assert last.image.is_file()


def test_a_table_of_paths_is_relative_to_itself(photos):
    names = [path.name for path in find_images(photos)][:3]
    file = table(photos / "nested" / "list.parquet", {"path": [f"../{name}" for name in names] + ["/x.jpg"]})
    found = entries(find_collection(file, 2))
    assert [entry.name for entry in found] == [*(f"../{name}" for name in names), "/x.jpg"]
    assert [os.path.normpath(entry.image) for entry in found] == [*(str(photos / n) for n in names), "/x.jpg"]


@pytest.mark.parametrize("column", ["bytes", "image", "struct"])
@pytest.mark.parametrize("name", ["path", "id", None])
def test_encoded_images_of_every_column(tmp_path, column, name):
    data = [b"a", b"bc", b"", None]
    columns = {"label": [1, 2, 3, 4]}
    if column == "struct":
        inner = ["one.jpg", "two.jpg", None, ""]
        columns["image"] = [{"bytes": b, "path": p} for b, p in zip(data, inner, strict=True)]
    else:
        columns[column] = data
    if name is not None:
        columns[name] = [7, 8, 9, 10]
    file = table(tmp_path / "some.parquet", columns)
    rows = [f"some.parquet:{number}" for number in range(4)]
    if name is not None:
        expected = ["7", "8", "9", "10"]
    else:
        expected = ["one.jpg", "two.jpg", *rows[2:]] if column == "struct" else rows
    found = entries(find_collection(file, 3))
    assert [entry.name for entry in found] == expected
    assert [entry.image for entry in found] == [b"a", b"bc", b"", b""]
    assert [entry.problem for entry in found] == [None, None, None, "the row holds no image"]


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.binary_view()], ids=str)
def test_every_type_of_bytes_is_an_image(tmp_path, kind):
    file = table(
        tmp_path / "data.parquet", {"image": pa.array([b"1", None], kind), "path": ["a.jpg", "b.jpg"]}
    )
    first, second = entries(find_collection(file, 2))
    assert first == Entry("a.jpg", b"1")
    assert second.problem == "the row holds no image"


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.string_view()], ids=str)
def test_every_type_of_text_is_a_path(tmp_path, kind):
    file = table(tmp_path / "data.parquet", {"path": pa.array(["a.jpg"], kind)})
    assert entries(find_collection(file, 1)) == [Entry("a.jpg", tmp_path / "a.jpg")]


def test_a_folder_without_images_is_searched_for_tables(tmp_path):
    table(tmp_path / "b.parquet", {"bytes": [b"1", b"2"]})
    table(tmp_path / "a" / "c.PARQUET", {"bytes": [b"3"]})
    table(tmp_path / "_old" / "d.parquet", {"bytes": [b"4"]})
    table(tmp_path / ".e.parquet", {"bytes": [b"5"]})
    found = entries(find_collection(tmp_path, 10))
    assert found == [Entry("a/c.PARQUET:0", b"3"), Entry("b.parquet:0", b"1"), Entry("b.parquet:1", b"2")]
    layouts.write_image(tmp_path / "bird.jpg", 0, 0)
    assert entries(find_collection(tmp_path, 10)) == [Entry("bird.jpg", tmp_path / "bird.jpg")]


@given(st.lists(st.integers(0, 40), max_size=8), st.integers(1, 6))
def test_row_ranges_are_whole_and_end_with_row_groups_unless_these_are_large(groups, size):
    ranges = list(module._ranges(groups, size))
    assert [row for start, stop in ranges for row in range(start, stop)] == list(range(sum(groups)))
    ends = {sum(groups[: number + 1]) for number in range(len(groups))}
    largest = module.MAX_SHARDS_PER_GROUP * size
    for start, stop in ranges:
        assert stop - start < size + max([*groups, 1])
        if stop not in ends:
            assert any(
                end - rows < stop < end and rows > largest
                for end, rows in zip(ends_of(groups), groups, strict=True)
            )
    assert all(stop - start >= size for start, stop in ranges[:-1])


def ends_of(groups):
    return [sum(groups[: number + 1]) for number in range(len(groups))]


@pytest.mark.parametrize("row_group_size", [3, 7, 1000])
def test_every_row_is_read_once_whatever_the_row_groups(tmp_path, monkeypatch, row_group_size):
    monkeypatch.setattr(module, "MAX_SHARDS_PER_GROUP", 4)
    data = [str(number).encode() for number in range(500)]
    file = table(tmp_path / "many.parquet", {"bytes": data}, row_group_size=row_group_size)
    collection = find_collection(file, 20)
    assert [entry.image for entry in entries(collection)] == data
    assert max(shard.size for shard in collection.shards) == (80 if row_group_size == 1000 else 21)


def test_rows_that_cannot_be_read_keep_their_places(tmp_path):
    data = [bytes([number]) * 1000 for number in range(30)]
    file = table(tmp_path / "broken.parquet", {"bytes": data}, row_group_size=10, compression="zstd")
    whole = bytearray(file.read_bytes())
    place = pq.read_metadata(file).row_group(1).column(0).data_page_offset
    whole[place : place + 40] = b"\xff" * 40
    file.write_bytes(whole)
    found = entries(find_collection(file, 10))
    assert [entry.image for entry in found] == [*data[:10], *[b""] * 10, *data[20:]]
    assert [entry.name for entry in found] == [f"broken.parquet:{number}" for number in range(30)]
    assert all("cannot be read from the Parquet file" in entry.problem for entry in found[10:20])


def test_the_fingerprint_is_of_what_the_collection_holds(tmp_path, photos):
    before = find_collection(photos, 5)
    moved = shutil.copytree(photos, tmp_path / "moved")
    assert find_collection(moved, 7).fingerprint == before.fingerprint
    shutil.copy(find_images(photos)[0], photos / "one_more.jpg")
    assert find_collection(photos, 5).fingerprint != before.fingerprint
    paths = table(tmp_path / "t" / "x.parquet", {"path": ["a.jpg", "b.jpg"]})
    first = find_collection(paths, 5).fingerprint
    table(paths, {"path": ["a.jpg", "c.jpg"]})
    assert find_collection(paths, 5).fingerprint != first
    encoded = table(tmp_path / "t" / "y.parquet", {"bytes": [b"a"]})
    first = find_collection(encoded, 5).fingerprint
    table(encoded, {"bytes": [b"abc"]})
    assert find_collection(encoded, 5).fingerprint != first


def test_what_is_no_collection_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bird.jpg").touch()
    (tmp_path / "text.parquet").write_text("no table")
    numbers = table(tmp_path / "numbers.parquet", {"path": [1], "image": ["a.jpg"]})
    rowless = table(tmp_path / "rowless.parquet", {"path": pa.array([], pa.string())})
    gap = table(tmp_path / "gap.parquet", {"path": ["a.jpg", None]})
    for path, message in (
        (tmp_path / "missing", "no such folder or Parquet file"),
        (tmp_path / "empty", "no image and no Parquet file"),
        (tmp_path / "bird.jpg", "neither a folder nor a .parquet file"),
        (tmp_path / "text.parquet", "is not a Parquet file that can be read"),
        (numbers, "Columns found: 'path' (int64), 'image' (string)"),
        (rowless, "no row"),
        (gap, "row 1: path empty"),
    ):
        found = refusal(find_collection, path, 5)
        assert found.startswith(str(path))
        assert message in found


@pytest.mark.parametrize("top", [1, 2])
def test_a_part_holds_what_the_csv_file_holds(predictor, tmp_path, photos, top):
    (photos / "bad.jpg").write_bytes(b"no image")
    (shard,) = find_collection(photos, 100).shards
    part = tmp_path / "part.parquet"
    part.write_bytes(predict_shard(predictor, shard, top, 4))
    write_csv(tmp_path / "out.csv", predictor.predict(photos, top=top, batch_size=4), Columns(top))
    with (tmp_path / "out.csv").open(newline="") as file:
        header, *rows = csv.reader(file)
    found = pq.read_table(part)
    assert found.column_names == header
    for row, expected in zip(found.to_pylist(), rows, strict=True):
        wanted = dict(zip(header, expected, strict=True))
        assert str(photos / row["path"]) == wanted["path"]
        assert row["probability"] == (float(wanted["probability"]) if wanted["probability"] else None)
        for name in {"label", "error", "rank"} & set(header):
            assert str(row[name] or "") == wanted[name]
    assert count_failed(part) == 1


def test_paths_and_bytes_of_the_same_images_agree(predictor, tmp_path, photos):
    paths = find_images(photos)
    file = table(
        tmp_path / "encoded.parquet",
        {"bytes": [path.read_bytes() for path in paths], "id": [str(p.relative_to(photos)) for p in paths]},
    )
    by_path, by_bytes = (
        pq.read_table(io.BytesIO(predict_shard(predictor, find_collection(source, 100).shards[0], 1, 8)))
        for source in (photos, file)
    )
    assert by_path.equals(by_bytes)


def test_a_damaged_part_is_named(tmp_path):
    (tmp_path / "part-000000.parquet").write_bytes(b"half")
    assert refusal(count_failed, tmp_path / "part-000000.parquet").endswith("delete it, and predict again.")
