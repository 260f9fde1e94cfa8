from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import layouts
from crossx.data.check import check_dataset
from crossx.data.images import read_image
from crossx.data.readers.table import read_table
from crossx.errors import CrossXError

pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture(scope="module", name="images")
def eight_images(images: list[bytes]) -> list[bytes]:
    return images[:8]


def write(folder: Path, metadata: dict[str, Any] | None = None, **columns: Any) -> Path:
    path = folder / "birds.parquet"
    table = pa.table(columns)
    if metadata is not None:
        table = table.replace_schema_metadata({"huggingface": json.dumps(metadata)})
    pq.write_table(table, path, row_group_size=3)
    return path


LABELS = ["wren", "robin"] * 4


@pytest.mark.parametrize("column", ["image", "Bytes", "img"])
@pytest.mark.parametrize("struct", [True, False])
def test_every_row_has_its_image(tmp_path: Path, images: list[bytes], column: str, struct: bool) -> None:
    values = [{"bytes": data, "path": f"a/{i}.jpg"} for i, data in enumerate(images)] if struct else images
    index = read_table(write(tmp_path, **{column: values, "label": LABELS}), test_fraction=0)
    assert index.classes == ("robin", "wren")
    assert [record.path.read_bytes() for record in index.records] == images
    assert [index.classes[record.label] for record in index.records] == LABELS
    assert all(
        read_image(record.path).shape == (3, layouts.HEIGHT, layouts.WIDTH) for record in index.records
    )


def test_hugging_face_class_labels(tmp_path: Path, images: list[bytes]) -> None:
    features = {
        "image": {"_type": "Image"},
        "label": {"names": ["wren", "robin", "auk"], "_type": "ClassLabel"},
    }
    values = [{"bytes": data, "path": None} for data in images]
    labels = [0, 1, 2, 2, 1, 0, 0, 1]
    path = write(tmp_path, {"info": {"features": features}}, image=values, label=labels)
    index = read_table(path, test_fraction=0)
    assert index.classes == ("auk", "robin", "wren")
    assert [index.classes[record.label] for record in index.records] == [
        features["label"]["names"][label] for label in labels
    ]
    path = write(tmp_path, {"info": {"features": features}}, image=values, label=[*labels[:-1], -1])
    with pytest.raises(CrossXError, match="row 8: label empty"):
        read_table(path)


def test_images_are_unpacked_once_and_held_out_the_same_everywhere(
    tmp_path: Path, images: list[bytes], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path, image=images, label=LABELS)
    first = read_table(path)
    times = {file: file.stat().st_mtime_ns for file in cache.rglob("*.jpg")}
    assert len(times) == 8
    assert read_table(path) == first
    assert {file: file.stat().st_mtime_ns for file in cache.rglob("*.jpg")} == times
    assert len(list(cache.iterdir())) == 1
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "elsewhere"))
    again = read_table(path)
    assert [(r.path.name, r.split) for r in again.records] == [(r.path.name, r.split) for r in first.records]
    write(tmp_path, image=images[::-1], label=LABELS)
    assert [record.path.read_bytes() for record in read_table(path).records] == images[::-1]


def test_structs_that_name_a_file(tmp_path: Path, images: list[bytes]) -> None:
    (tmp_path / "0.jpg").write_bytes(images[0])
    values = [{"bytes": None, "path": "0.jpg"}, {"bytes": images[1], "path": "../../etc/x.jpg"}]
    index = read_table(write(tmp_path, image=values, label=["a", "b"]), test_fraction=0)
    assert [record.path.read_bytes() for record in index.records] == images[:2]
    assert index.records[0].path == tmp_path / "0.jpg"
    assert index.records[1].path.name == "0000001_x.jpg"


def test_rows_without_an_image(tmp_path: Path, images: list[bytes]) -> None:
    path = write(tmp_path, image=[*images[:2], None], label=["a", "b", "a"])
    with pytest.raises(CrossXError, match=r"row 3: image empty\. Fix the dataset"):
        read_table(path)


def test_a_full_or_forbidden_cache_is_one_line(tmp_path: Path, images: list[bytes], cache: Path) -> None:
    cache.parent.parent.mkdir()
    cache.parent.touch()
    with pytest.raises(CrossXError, match="embedded") as caught:
        read_table(write(tmp_path, image=images, label=LABELS))
    assert "\n" not in str(caught.value)


def test_a_column_of_text_is_no_image(tmp_path: Path) -> None:
    path = write(tmp_path, path=["a", "b"], image=["x", "y"], label=["a", "b"])
    assert [record.path.name for record in read_table(path).records] == ["a", "b"]


def test_embedded_images_can_be_checked(tmp_path: Path, images: list[bytes]) -> None:
    broken = io.BytesIO(images[0]).read()[:-200]
    report = check_dataset("table", write(tmp_path, image=[*images[:-1], broken], label=LABELS))
    assert [finding.kind for finding in report.problems] == ["unreadable"]
    assert [finding.kind for finding in report.notes] == []
