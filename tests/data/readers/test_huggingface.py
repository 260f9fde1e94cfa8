from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any

import pytest

import layouts
from crossx.data.images import read_image
from crossx.data.index import SPLITS
from crossx.data.readers.huggingface import read_huggingface
from crossx.errors import CrossXError, UsageError

datasets = pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def offline(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def files(photos: list[Path]) -> list[Path]:
    return photos


BIRDS = ["wren", "robin"]


def build(files: list[Path], labels: Any = None, feature: Any = None, **more: Any) -> Any:
    labels = [number % 2 for number in range(len(files))] if labels is None else labels
    features = {"image": datasets.Image(), "label": feature or datasets.ClassLabel(names=BIRDS)}
    columns = {"image": [str(file) for file in files], "label": labels}
    for name, (kind, values) in more.items():
        features[name], columns[name] = kind, values
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def save(dataset: Any, folder: Path) -> Path:
    # as bytes, without the paths of this machine
    dataset.save_to_disk(str(folder))
    return folder


def test_every_row_has_its_image_and_the_name_of_its_class(tmp_path: Path, files: list[Path]) -> None:
    root = save(build(files), tmp_path / "saved")
    index = read_huggingface(root, test_fraction=0)
    assert index.classes == ("robin", "wren")
    assert [record.path.read_bytes() for record in index.records] == [file.read_bytes() for file in files]
    assert [index.classes[record.label] for record in index.records] == BIRDS * 6
    assert read_image(index.records[0].path).shape == (3, layouts.HEIGHT, layouts.WIDTH)
    held_out = read_huggingface(root)
    assert [len(held_out.split(split)) for split in ("train", "test")] == [10, 2]


def test_splits_rows_that_were_selected_and_the_cache(
    tmp_path: Path, files: list[Path], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shuffled = build(files).shuffle(seed=1)
    parts = {
        "train": shuffled.select(range(6)),
        "validation": shuffled.select([6, 7]),
        "test": shuffled.select(range(8, 12)),
    }
    root = save(datasets.DatasetDict(parts), tmp_path / "saved")
    index = read_huggingface(root)
    assert [len(index.split(split)) for split in ("train", "val", "test")] == [6, 2, 4]
    by_content = {file.read_bytes(): BIRDS[number % 2] for number, file in enumerate(files)}
    assert all(
        by_content[record.path.read_bytes()] == index.classes[record.label] for record in index.records
    )
    assert read_huggingface(root) == index
    monkeypatch.chdir(tmp_path)
    assert read_huggingface(Path("saved")) == index
    assert len(list(cache.iterdir())) == 1
    with pytest.raises(CrossXError, match="may be val or test"):
        read_huggingface(save(datasets.DatasetDict(train=shuffled, holdout=shuffled), tmp_path / "unclear"))


def test_a_folder_of_parquet_as_on_the_hub(tmp_path: Path, files: list[Path]) -> None:
    (tmp_path / "hub/data").mkdir(parents=True)
    for split, part in (("train", files[:8]), ("test", files[8:])):
        dataset = build(part)
        dataset = dataset.map(lambda row: {"image": row["image"]}, features=dataset.features)
        dataset.to_parquet(str(tmp_path / f"hub/data/{split}-00000-of-00001.parquet"))
    index = read_huggingface(tmp_path / "hub")
    assert (index.classes, len(index.split("train")), len(index.split("test"))) == (("robin", "wren"), 8, 4)


def test_a_folder_named_like_a_loader_and_a_revision_on_the_hub(
    tmp_path: Path, files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, file in enumerate(files):
        folder = tmp_path / "imagefolder" / BIRDS[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.jpg").write_bytes(file.read_bytes())
    (tmp_path / "wren").mkdir()
    (tmp_path / "wren/other.jpg").write_bytes(files[0].read_bytes())
    monkeypatch.chdir(tmp_path)
    assert len(read_huggingface(Path("imagefolder")).records) == len(files)
    asked = []

    def load_dataset(*path: str, **options: str | None) -> datasets.Dataset:
        asked.append((*path, options))
        return build(files)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    read_huggingface(Path("me/birds@v2"))
    assert asked == [("me/birds", {"revision": "v2"})]


def test_columns_are_found_or_named(tmp_path: Path, files: list[Path]) -> None:
    text = datasets.Value("string")
    more = {
        "mask": (datasets.Image(), [str(file) for file in reversed(files)]),
        "genus": (datasets.ClassLabel(names=["a", "b", "c"]), [number % 3 for number in range(12)]),
        "place": (text, ["x", "y", "z"] * 4),
    }
    root = save(build(files, **more), tmp_path / "saved")
    assert read_huggingface(root, test_fraction=0).classes == ("robin", "wren")
    assert read_huggingface(root, label_column="place").classes == ("x", "y", "z")
    named = read_huggingface(root, label_column="genus", image_column="mask", test_fraction=0)
    assert named.records[0].path.read_bytes() == files[-1].read_bytes()
    for column, message in (("plase", "Did you mean 'place'"), ("image", "holds struct")):
        with pytest.raises(CrossXError, match=message):
            read_huggingface(root, label_column=column)
    for column, message in (
        ("place", "'place' holds no images"),
        ("img", r"'img' is not there\..* Columns found"),
    ):
        with pytest.raises(UsageError, match=message):
            read_huggingface(root, image_column=column)
    renamed = build(files, **more).rename_columns({"image": "front", "label": "kind"})
    root = save(renamed, tmp_path / "renamed")
    with pytest.raises(
        UsageError, match=r"several columns hold images: front, mask\. Name one with --data\.image_column"
    ):
        read_huggingface(root)
    with pytest.raises(
        UsageError, match=r"several columns are labels: kind, genus\. Name one with --data\.label_column"
    ):
        read_huggingface(root, image_column="front")


def test_a_test_split_without_labels_is_left_out(tmp_path: Path, files: list[Path]) -> None:
    whole = build(files)
    labelled = read_huggingface(save(datasets.DatasetDict(train=whole), tmp_path / "labelled"))
    hidden = build(files, [-1] * len(files))
    for number, test in enumerate((hidden, build(files, [None] * len(files)), whole.remove_columns("label"))):
        root = save(datasets.DatasetDict(train=whole, test=test), tmp_path / f"hidden{number}")
        index = read_huggingface(root)
        assert index.notes == ("split 'test' has no labels and is left out",)
        assert [record.split for record in index.records] == [record.split for record in labelled.records]
    root = save(datasets.DatasetDict(train=whole, validation=whole, test=hidden), tmp_path / "three")
    index = read_huggingface(root)
    assert [len(index.split(split)) for split in ("train", "val", "test")] == [12, 12, 0]
    for name, parts in (
        ("some", {"train": whole, "test": build(files, [*[-1] * 11, 1])}),
        ("training", {"train": hidden, "test": whole}),
        ("all", {"train": hidden, "test": hidden}),
        ("untrained", {"validation": hidden, "test": hidden}),
    ):
        with pytest.raises(CrossXError, match=r"split .*, row 1, .*: label empty"):
            read_huggingface(save(datasets.DatasetDict(parts), tmp_path / name))
    other = build(files, BIRDS * 6, datasets.Value("string"))
    with pytest.raises(CrossXError, match="split 'test' has other columns 'image' and 'label'"):
        read_huggingface(save(datasets.DatasetDict(train=whole, test=other), tmp_path / "other"))


def test_splits_without_rows(tmp_path: Path, files: list[Path]) -> None:
    whole, empty = build(files), build([], [])
    alone = read_huggingface(save(datasets.DatasetDict(train=whole), tmp_path / "alone"))
    for number, test in enumerate((empty, datasets.Dataset.from_dict({}))):
        index = read_huggingface(
            save(datasets.DatasetDict(train=whole, test=test), tmp_path / f"test{number}")
        )
        assert index.notes == ("split 'test' has no rows and is left out",)
        assert [record.split for record in index.records] == [record.split for record in alone.records]
    parts = datasets.DatasetDict(train=whole, validation=empty, test=whole)
    index = read_huggingface(save(parts, tmp_path / "validation"))
    assert [len(index.split(split)) for split in ("train", "val", "test")] == [12, 0, 12]
    for name, given, message in (
        (
            "train",
            {"train": empty, "test": whole},
            r"split 'train' has no rows, so there is nothing to train on\.",
        ),
        ("all", {"train": empty, "test": empty}, r"the dataset has no rows\."),
    ):
        with pytest.raises(CrossXError, match=message):
            read_huggingface(save(datasets.DatasetDict(given), tmp_path / name))


def test_splits_may_name_the_classes_in_other_orders(tmp_path: Path, files: list[Path]) -> None:
    turned = build(files, [1, 0] * 6, datasets.ClassLabel(names=BIRDS[::-1]))
    fewer = build(files, [0] * 12, datasets.ClassLabel(names=BIRDS[:1]))
    root = save(datasets.DatasetDict(train=build(files), validation=turned, test=fewer), tmp_path / "turned")
    index = read_huggingface(root)
    found = {split: [index.classes[record.label] for record in index.split(split)] for split in SPLITS}
    assert found == {"train": BIRDS * 6, "val": BIRDS * 6, "test": ["wren"] * 12}
    lists = build(files, [[0]] * 12, datasets.Sequence(datasets.Value("int64")))
    with pytest.raises(CrossXError, match="split 'test' has other columns 'image' and 'label'"):
        read_huggingface(save(datasets.DatasetDict(train=build(files), test=lists), tmp_path / "lists"))


def test_what_is_no_dataset_of_images_with_one_label(tmp_path: Path, files: list[Path]) -> None:
    odd = datasets.DatasetDict({"train": build(files), "extra": build(files)})
    odd.save_to_disk(tmp_path / "odd")
    with pytest.raises(
        CrossXError, match=r"split extra, row 1, .*: split 'extra' is not one of train, val, test"
    ):
        read_huggingface(tmp_path / "odd")
    lists = datasets.Sequence(datasets.ClassLabel(names=BIRDS))
    root = save(build(files, [[0, 1]] * 12, lists), tmp_path / "lists")
    with pytest.raises(
        CrossXError, match=r"'label' holds lists of labels: crossx classifies one label per image"
    ):
        read_huggingface(root)
    root = save(build(files, ["wren;robin"] * 12, datasets.Value("string")), tmp_path / "joined")
    with pytest.raises(CrossXError, match=r"12 of 12 labels look like several, such as 'wren;robin'"):
        read_huggingface(root)
    root = save(build(files, [0.5] * 12, datasets.Value("float32")), tmp_path / "floats")
    with pytest.raises(CrossXError, match="numbers with a fraction"):
        read_huggingface(root)
    root = save(build(files, [None, *[1, 0] * 5, 1]), tmp_path / "missing")
    with pytest.raises(CrossXError, match="row 1: label empty"):
        read_huggingface(root)
    root = save(build(files).remove_columns("label"), tmp_path / "unlabelled")
    with pytest.raises(UsageError, match="no column is a label"):
        read_huggingface(root)
    root = save(build(files).remove_columns("image"), tmp_path / "blind")
    with pytest.raises(UsageError, match="no column holds images"):
        read_huggingface(root)
    root = save(build([], []), tmp_path / "empty")
    with pytest.raises(CrossXError, match=r"empty: the dataset has no rows\.$"):
        read_huggingface(root)


def test_what_cannot_be_read_is_one_line(
    tmp_path: Path, files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    root = save(build(files), tmp_path / "saved")
    arrow = next(root.glob("*.arrow"))
    arrow.write_bytes(arrow.read_bytes()[:2000])
    (tmp_path / "hollow").mkdir()
    (tmp_path / "file").touch()
    for path in (root, tmp_path / "hollow", tmp_path / "file", tmp_path / "none", Path("me/no-such-birds")):
        with pytest.raises(CrossXError, match=path.name) as refused:
            read_huggingface(path)
        assert "\n" not in str(refused.value)


def test_an_arrow_file_whose_offsets_lie_is_refused(tmp_path: Path, files: list[Path]) -> None:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")})
    rows = {"image": [{"bytes": file.read_bytes(), "path": "a\0b.jpg"} for file in files], "label": BIRDS * 6}
    root = save(datasets.Dataset.from_dict(rows, features=features), tmp_path / "saved")
    # a name that no file can have is not that of the unpacked image
    assert len(read_huggingface(root).records) == len(files)
    (path,) = root.glob("*.arrow")
    ends = itertools.accumulate(map(len, BIRDS * 6), initial=0)
    offsets = b"".join(end.to_bytes(4, "little") for end in ends)
    for lie in (2**31 - 1, 3):
        content = path.read_bytes()
        assert content.count(offsets) == 1
        path.write_bytes(content.replace(offsets, offsets[:-4] + lie.to_bytes(4, "little")))
        with pytest.raises(CrossXError, match=r"saved: its Arrow file is damaged \(.*\)\. Copy it again\."):
            read_huggingface(root)
        path.write_bytes(content)


def test_without_the_package_the_error_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UsageError, match=r"needs datasets: pip install 'crossx\[datasets\]'"):
        read_huggingface(tmp_path)
