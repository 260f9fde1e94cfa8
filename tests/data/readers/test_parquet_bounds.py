"""Bounds on what a Parquet file unpacks to, compared with what pyarrow writes and reads."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import fuzzing
from crossx.data.readers.parquet_bounds import read_columns, read_footer, require_bounded
from crossx.data.readers.table import read_paths, read_table
from crossx.errors import CrossXError
from crossx.predict.shards import find_collection

MIB = 1 << 20
MANY = 50_000


def repeated(value: object, rows: int, kind: pa.DataType | None = None) -> pa.DictionaryArray:
    """A column that names one value in its dictionary again and again."""
    return pa.DictionaryArray.from_arrays(pa.repeat(pa.scalar(0, pa.int32()), rows), pa.array([value], kind))


def plain(path: Path, unit: int) -> None:
    """Text, compressed."""
    names = pa.array([f"{n}{'a' * unit}" for n in range(300)])
    table = pa.table({"path": names, "label": ["wren", "robin"] * 150})
    pq.write_table(table, path, compression="zstd", use_dictionary=False, write_statistics=False)


def plain_with_a_lie(path: Path, unit: int) -> None:
    """The same, and a footer that says that it is small."""
    plain(path, unit)
    chunk = pq.read_metadata(path).row_group(0).column(0)
    content = bytearray(path.read_bytes())
    footer = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    true = varint(2 * chunk.total_uncompressed_size)
    small = bytes([0x80 | 2] + [0x80] * (len(true) - 2) + [0])
    content[footer:] = content[footer:].replace(true, small)
    path.write_bytes(content)
    assert pq.read_metadata(path).row_group(0).column(0).total_uncompressed_size == 1


def dictionary(path: Path, unit: int) -> None:
    """Text in a dictionary of one value."""
    table = pa.table({"path": repeated("a" * unit, MANY), "label": repeated("wren", MANY)})
    pq.write_table(table, path, compression="zstd", write_statistics=False, store_schema=False)


def dictionary_of_labels(path: Path, unit: int) -> None:
    paths = [f"{n}.jpg" for n in range(MANY)]
    table = pa.table({"path": paths, "label": repeated("a" * unit, MANY)})
    pq.write_table(table, path, compression="zstd", write_statistics=False)


def rows(path: Path, unit: int) -> None:
    """Many rows."""
    table = pa.table({"path": repeated("a.jpg", 20_000_000), "label": repeated("wren", 20_000_000)})
    pq.write_table(table, path)


def images(path: Path, unit: int) -> None:
    """Images in a dictionary of one."""
    table = pa.table(
        {"bytes": repeated(b"\xff\xd8\xff" * (unit // 3), MANY), "label": ["wren", "robin"] * (MANY // 2)}
    )
    pq.write_table(table, path, compression="zstd", write_statistics=False, store_schema=False)


def another_column(path: Path, unit: int) -> None:
    """A column that is only searched for splits."""
    columns = {"path": [f"{n}.jpg" for n in range(300)], "label": ["wren", "robin"] * 150}
    more = pa.array(["a" * unit] * 300)
    table = pa.table({**columns, "fold": more})
    pq.write_table(table, path, compression="zstd", use_dictionary=False, write_statistics=False)


BOMBS = [plain, plain_with_a_lie, dictionary, dictionary_of_labels, rows, images, another_column]


def varint(value: int) -> bytes:
    found = bytearray()
    while value > 127:
        found.append(value & 127 | 128)
        value >>= 7
    return bytes([*found, value])


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write_bombs(folder: Path, unit: int) -> dict[str, Path]:
    """Write files that unpack to 300 or ``MANY`` times ``unit`` bytes."""
    paths = {bomb.__name__: folder / f"{bomb.__name__}.parquet" for bomb in BOMBS}
    for bomb in BOMBS:
        bomb(paths[bomb.__name__], unit)
    return paths


@pytest.fixture(scope="module")
def bombs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Small ones, for a small limit."""
    return write_bombs(tmp_path_factory.mktemp("bombs"), MIB // 32)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("crossx.data.readers.parquet_bounds.ALWAYS_BYTES", 8 * MIB)
    monkeypatch.setattr("crossx.predict.shards._ALWAYS_IMAGE", MIB)


@pytest.mark.usefixtures("small")
def test_a_column_that_is_not_needed_may_be_of_any_size(tmp_path: Path) -> None:
    masks = pa.array([bytes(MIB // 32)] * 300)
    table = pa.table(
        {"path": [f"{n}.jpg" for n in range(300)], "label": ["wren", "robin"] * 150, "mask": masks}
    )
    file = tmp_path / "table.parquet"
    pq.write_table(table, file, compression="zstd", use_dictionary=False)
    with pytest.raises(CrossXError, match="unpacks to more than"):
        require_bounded(file, ["mask"])
    assert len(read_paths(file)) == 300


@pytest.mark.slow
def test_small_files_may_have_millions_of_rows(tmp_path: Path) -> None:
    file = tmp_path / "table.parquet"
    table = pa.table({"path": [f"{n:07}" for n in range(2_000_000)]})
    pq.write_table(table, file, compression="zstd", use_dictionary=False, column_encoding="DELTA_BYTE_ARRAY")
    assert sum(read_footer(file).rows) == 2_000_000
    assert file.stat().st_size < 200_000


@pytest.mark.usefixtures("small")
# a column that is only searched for splits is left out instead
@pytest.mark.parametrize("bomb", [bomb.__name__ for bomb in BOMBS if bomb is not another_column])
def test_small_files_that_become_large_are_refused_in_one_line(
    bombs: dict[str, Path], bomb: str, cache: Path
) -> None:
    path = bombs[bomb]
    assert path.stat().st_size < MIB // 4
    with pytest.raises(
        CrossXError, match=r"(unpacks to more than (8|11) MiB|claims 20,000,000 rows in)"
    ) as error:
        read_table(path)
    assert str(error.value).startswith(f"{path}: ")
    assert len(str(error.value).splitlines()) == 1
    assert not [file for file in cache.rglob("*") if file.is_file()]


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("read", [read_paths, lambda path: find_collection(path, 8)])
def test_they_are_refused_by_predict(bombs: dict[str, Path], read: Callable[[Path], object]) -> None:
    for name in ("plain", "plain_with_a_lie", "dictionary", "rows"):
        with pytest.raises(CrossXError, match=r"unpacks to more than|claims"):
            read(bombs[name])


@pytest.mark.usefixtures("small")
def test_an_image_that_repeats_is_read_and_one_larger_than_its_file_is_not(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    table = pa.table({"bytes": repeated(b"a" * 2 * MIB, 20)})
    pq.write_table(table, path, compression="zstd", store_schema=False)
    entries = [entry for shard in find_collection(path, 8).shards for entry in shard.read()]
    assert [entry.problem for entry in entries] == ["the row's image is larger than the Parquet file"] * 20
    pq.write_table(pa.table({"bytes": repeated(b"a" * MIB, 20)}), path, store_schema=False)
    entries = [entry for shard in find_collection(path, 8).shards for entry in shard.read()]
    assert [(entry.image, entry.problem) for entry in entries] == [(b"a" * MIB, None)] * 20


@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("options", [
    {"compression": "none"}, {"compression": "snappy"}, {"compression": "gzip"}, {"compression": "zstd"},
    {"compression": "brotli"}, {"compression": "lz4"}, {"use_dictionary": False},
    {"use_dictionary": False, "column_encoding": "DELTA_BYTE_ARRAY"}, {"write_page_checksum": True},
    {"row_group_size": 700, "data_page_size": 500, "write_page_index": True},
], ids=lambda options: "-".join(map(str, options.values())))  # fmt: skip
def test_pages_have_the_sizes_that_pyarrow_writes(tmp_path: Path, options: dict, version: str) -> None:
    path = tmp_path / "a.parquet"
    names = [f"{n}.jpg" if n % 7 else None for n in range(3000)]
    structs = [{"bytes": b"x" * (n % 50), "path": str(n)} for n in range(3000)]
    table = pa.table({"path": names, "label": ["a" * (n % 90) for n in range(3000)]})
    if "column_encoding" not in options:
        table = table.append_column("image", pa.array(structs))
    pq.write_table(table, path, data_page_version=version, **options)
    with pq.ParquetFile(path) as file:
        for name in table.column_names:
            bounds = require_bounded(path, [name])
            chunks = [
                chunk
                for number in range(file.num_row_groups)
                for leaf in range(file.metadata.num_columns)
                if (chunk := file.metadata.row_group(number).column(leaf)).path_in_schema.split(".")[0]
                == name
            ]
            with_headers = sum(chunk.total_uncompressed_size for chunk in chunks)
            assert with_headers > bounds.size
            assert with_headers - bounds.size < 400 * bounds.pages
            assert bounds.largest <= bounds.size
            if "data_page_size" in options:
                assert bounds.pages >= 10
        read = read_columns(path, file, {"one": "path", "two": "label"})
        assert read == {"one": names, "two": table["label"].to_pylist()}


def test_honest_tables_that_compress_well_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    names = [f"birds/images/of/all/of/them/{n:09d}.jpg" for n in range(200_000)]
    labels = [f"class number {n // 1000}" for n in range(200_000)]
    table = pa.table({"path": names, "label": labels})
    pq.write_table(
        table, path, compression="zstd", compression_level=19, use_dictionary=["label"],
        column_encoding={"path": "DELTA_BYTE_ARRAY"},
    )  # fmt: skip
    with pq.ParquetFile(path) as file:
        assert read_columns(path, file, {"path": "path", "label": "label"}) == table.to_pydict()


@pytest.mark.parametrize("place", [0, 1, 2, 5, 9])
def test_a_damaged_page_is_one_line(tmp_path: Path, place: int) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"path": ["a", "b"], "label": ["x", "y"]}), path)
    content = bytearray(path.read_bytes())
    for value in (0, 0x0F, 0x1C, 0x7F, 0x99, 0xFF):
        content[4 + place] = value
        path.write_bytes(content)
        assert fuzzing.problem_of(read_table, path) == "", value


@pytest.mark.slow
def test_bombs_need_little_memory(tmp_path: Path) -> None:
    """In 1.5 GiB more than the imports take: with dictionaries the files unpack to 50 GB."""
    bombs = write_bombs(tmp_path, MIB)
    program = """
import os, resource, sys
from itertools import islice
from pathlib import Path
import pyarrow.parquet
from crossx.data.readers.table import read_paths, read_table
from crossx.errors import CrossXError
from crossx.predict.shards import find_collection

def rows(path):
    list(islice(find_collection(path, 8).shards[0].read(), 100))

used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
for path in map(Path, sys.argv[1:]):
    for read in (read_table, read_paths, rows):
        if (child := os.fork()) == 0:
            resource.setrlimit(resource.RLIMIT_AS, (used + (3 << 29), used + (3 << 29)))
            try:
                read(path)
            except CrossXError as error:
                print(error, flush=True)
            except BaseException as error:
                print(repr(error), flush=True)
            os._exit(0)
        print("", end="" if os.waitpid(child, 0)[1] == 0 else "stopped", flush=True)
"""
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, bombs.values())],
        capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    refused = done.stdout.splitlines()
    assert sum("unpacks to more" in line or "claims" in line for line in refused) == 14, refused
    # images without paths, for `read_paths`
    assert sum("no column 'path'" in line for line in refused) == 1
    assert len(refused) == 15
