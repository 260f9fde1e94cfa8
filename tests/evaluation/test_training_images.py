import resource
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from crossx.data.catalog import read_dataset
from crossx.data.config import DataConfig
from crossx.errors import CrossXError
from crossx.evaluation.training_images import (
    count_trained,
    has_training_images,
    is_most,
    write_training_images,
)
from crossx.runs import ModelSpec, Preprocessing, Run, write_json
from layouts import write_folder

PREPROCESSING = Preprocessing(64, 72, "bilinear", (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "birds", classes=3, images_per_class=8, split_folders=True)


@pytest.fixture
def run(tmp_path: Path, root: Path) -> Run:
    run = Run(tmp_path / "run")
    index = read_dataset("folder", root)
    images = {split: len(index.split(split)) for split in ("train", "val", "test")}
    write_json(run.info, {"dataset": "folder", "data_root": str(root), "images": images})
    write_training_images(run, DataConfig(dataset="folder", root=str(root)), index)
    return run


def count(run: Run, root: Path, split: str = "train", dataset: str = "folder") -> int:
    index = read_dataset("folder", root)
    spec = ModelSpec("plain", {}, "resnet18", {}, index.classes, PREPROCESSING, dataset)
    return count_trained(run, spec, DataConfig(dataset=dataset, root=str(root)), index, split)


def replace_images(root: Path, split: str, source: Path, number: int) -> None:
    """Replace images of a split by others, with the same names."""
    files = sorted((root / split).rglob("*.*"))[:number]
    others = sorted((source / "train").rglob("*.*"))[:number]
    for file, other in zip(files, others, strict=True):
        shutil.copy(other, file)


def test_images_are_recognised_in_another_folder_and_split(tmp_path: Path, root: Path, run: Run) -> None:
    images = len(read_dataset("folder", root).split("train"))
    assert (count(run, root), count(run, root, "test")) == (images, 0)
    moved = tmp_path / "moved"
    shutil.copytree(root, moved)
    assert count(run, moved) == images
    replace_images(moved, "test", root, 2)
    assert count(run, moved, "test") == 2


def test_a_disk_without_room_is_named(root: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    before = run.images.read_bytes()
    many = np.arange(1, 10_000, dtype=np.uint64)
    monkeypatch.setattr("crossx.evaluation.training_images.fingerprints", lambda paths: many)
    # as a full disk, but for the number of the error
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limit[1]))
    try:
        with pytest.raises(CrossXError, match=r"images\.npy: cannot be written \(File too large\)"):
            write_training_images(
                run, DataConfig(dataset="folder", root=str(root)), read_dataset("folder", root)
            )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert run.images.read_bytes() == before
    assert sorted(file.name for file in run.path.iterdir()) == ["images.npy", "run.json"]


def test_a_file_that_cannot_be_read_is_none_of_the_training_images(root: Path, run: Run) -> None:
    config, index = DataConfig(dataset="folder", root=str(root)), read_dataset("folder", root)
    assert has_training_images(run)
    for split in ("train", "test"):
        index.split(split)[0].path.unlink()
    write_training_images(run, config, index)
    spec = ModelSpec("plain", {}, "resnet18", {}, index.classes, PREPROCESSING, "folder")
    counts = [count_trained(run, spec, config, index, split) for split in ("train", "test")]
    assert counts == [len(index.split("train")) - 1, 0]


def test_other_images_of_the_same_names_were_not_trained_on(tmp_path: Path, root: Path, run: Run) -> None:
    other = tmp_path / "other" / root.name
    shutil.copytree(root, other)
    for file in (other / "train").rglob("*.*"):
        file.write_bytes(file.read_bytes() + b"\0")
    assert count(run, other) == 0
    # a published dataset that was compressed again
    assert count(run, other, dataset="cub") == len(read_dataset("folder", other).split("train"))


@pytest.mark.parametrize("damage", [None, b"", b"no array", "text", "matrix"])
def test_a_run_without_fingerprints_knows_its_own_folder(
    tmp_path: Path, root: Path, run: Run, damage: bytes | str | None, caplog: pytest.LogCaptureFixture
) -> None:
    if damage is None:
        run.images.unlink()
    elif isinstance(damage, bytes):
        run.images.write_bytes(damage)
    else:
        np.save(run.images, np.array(["a"]) if damage == "text" else np.zeros((2, 2), np.uint64))
    images = len(read_dataset("folder", root).split("train"))
    assert (count(run, root), count(run, root, "test")) == (images, 0)
    assert ("images.npy: damaged" in caplog.text) == (damage is not None)
    assert not has_training_images(run)
    moved = tmp_path / "moved"
    shutil.copytree(root, moved)
    assert count(run, moved) == images
    next((moved / "train").rglob("*.*")).unlink()
    assert count(run, moved) == 0


def test_images_that_were_held_out_are_trained_on_with_trainval(root: Path, run: Run) -> None:
    config = DataConfig(dataset="folder", root=str(root))
    index = read_dataset("folder", root).with_validation(0.25, 0)
    spec = ModelSpec("plain", {}, "resnet18", {}, index.classes, PREPROCESSING, "folder")
    for train_on, seen in (("train", 0), ("trainval", len(index.split("val")))):
        trained = replace(config, train_on=train_on)
        write_training_images(run, trained, index)
        assert count_trained(run, spec, trained, index, "val") == seen
    assert index.split("val")


def test_most_is_more_than_half() -> None:
    assert [is_most(seen, 4) for seen in range(5)] == [False, False, False, True, True]
