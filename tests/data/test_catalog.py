from __future__ import annotations

import importlib
import inspect
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import layouts
from crossx.data.catalog import DATASETS, dataset_root, read_configured, read_dataset, read_existing
from crossx.data.check import check_dataset
from crossx.data.config import DataConfig
from crossx.data.drawn.synthetic import read_synthetic
from crossx.errors import CrossXError, UsageError

ARCHIVES = ("cub", "nabirds", "cars", "dogs", "aircraft")


def test_every_dataset_of_the_paper_with_its_table_1() -> None:
    """Table 1 of the paper: categories, training images, test images."""
    assert {name: info.table1 for name, info in DATASETS.items() if info.table1} == {
        "nabirds": (555, 23929, 24633),
        "cub": (200, 5994, 5794),
        "cars": (196, 8144, 8041),
        "dogs": (120, 12000, 8580),
        "aircraft": (100, 6667, 3333),
    }


@pytest.mark.parametrize("name", DATASETS)
def test_entry_is_whole(name: str) -> None:
    info = DATASETS[name]
    assert info.name == name
    for text in (info.title, info.homepage, info.download, info.licence, info.size, *info.defects):
        assert text
        assert text.isprintable()
    for checksum in info.checksums.values():
        assert re.fullmatch(r"md5:[0-9a-f]{32}( sha256:[0-9a-f]{64})?", checksum)
    module, function = info.reader.split(":")
    first = next(iter(inspect.signature(getattr(importlib.import_module(module), function)).parameters))
    assert first in ("root", "path")


def test_no_checksum_is_given_to_two_files() -> None:
    sums = [part for info in DATASETS.values() for value in info.checksums.values() for part in value.split()]
    assert len(set(sums)) == len(sums)


@pytest.mark.parametrize("name", ARCHIVES)
def test_archives_say_where_and_what_is_wrong(name: str) -> None:
    info = DATASETS[name]
    assert info.homepage.startswith("http")
    assert info.checksums
    assert info.defects


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("cub", layouts.write_cub),
        ("nabirds", layouts.write_nabirds),
        ("cars", layouts.write_cars),
        ("dogs", layouts.write_dogs),
        ("aircraft", layouts.write_aircraft),
        ("folder", layouts.write_folder),
        ("table", layouts.write_table),
    ],
)
def test_every_dataset_reads_with_the_options_of_a_config(
    tmp_path: Path, name: str, write: Callable[[Path], Path]
) -> None:
    root = write(tmp_path / "root")
    index = read_dataset(
        name, str(root), level=None, num_classes=None, images_per_class=None, test_fraction=0.25, split_seed=3
    )
    assert index.name == name
    assert index.split("train")
    assert index.split("test")


def test_options_reach_the_reader(tmp_path: Path) -> None:
    root = layouts.write_folder(tmp_path, classes=2, images_per_class=10)
    assert len(read_dataset("folder", root, test_fraction=0.5).split("test")) == 10
    archive = layouts.write_aircraft(tmp_path / "aircraft", classes=4)
    assert len(read_dataset("aircraft", archive, level="family").classes) == 2


@pytest.mark.slow
def test_options_of_the_drawn_set_reach_it(tmp_path: Path) -> None:
    options = {"num_classes": 2, "images_per_class": 3, "test_images_per_class": 2, "seed": 4}
    config = DataConfig(dataset="synthetic", root=str(tmp_path / "configured"), **options)
    index = read_configured(config)
    same = read_synthetic(tmp_path / "read", **options)
    assert [record.path.read_bytes() for record in index.records] == [
        record.path.read_bytes() for record in same.records
    ]
    assert (
        index.classes == same.classes != read_synthetic(tmp_path / "other", **{**options, "seed": 0}).classes
    )
    with pytest.raises(CrossXError, match=r"seed is 4, not 0"):
        read_configured(replace(config, seed=None))


def test_unknown_dataset_names_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"unknown dataset 'cubs'\. Did you mean 'cub'\?"):
        read_dataset("cubs", "anywhere")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("cub", {"level": "family"}, "dataset 'cub' has no option 'level'. It takes none."),
        ("aircraft", {"levle": "family"}, "Did you mean 'level'? It takes level."),
        ("folder", {"num_classes": 3}, "It takes test_fraction, split_seed."),
    ],
)
def test_option_of_another_dataset(name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        read_dataset(name, "anywhere", **options)
    assert message in str(caught.value)


def test_nothing_is_drawn_where_a_set_is_only_looked_at(tmp_path: Path) -> None:
    sizes = {"num_classes": 2, "images_per_class": 3}
    (tmp_path / "empty").mkdir()
    for root, problem in ((tmp_path / "typo", "no such folder"), (tmp_path / "empty", "is empty")):
        for reader in (read_existing, check_dataset):
            with pytest.raises(CrossXError, match=rf"{root}: {problem}\. `crossx fit` draws"):
                reader("synthetic", root, **sizes)
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]
    drawn = read_dataset("synthetic", tmp_path / "drawn", **sizes)
    assert read_existing("synthetic", tmp_path / "drawn", **sizes) == drawn


@pytest.mark.parametrize("name", [name for name in DATASETS if name != "synthetic"])
def test_root_is_needed(name: str) -> None:
    with pytest.raises(UsageError, match=r"needs --data\.root"):
        read_dataset(name, None)


def test_synthetic_sets_have_a_place_each_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    index = read_dataset("synthetic", None, num_classes=2, images_per_class=3)
    place = dataset_root("synthetic", None, {"num_classes": 2, "images_per_class": 3})
    assert place.is_relative_to(tmp_path / "crossx")
    assert all(record.path.is_relative_to(place) for record in index.records)
    other = read_dataset("synthetic", None, num_classes=3, images_per_class=3)
    assert (len(index.classes), len(other.classes)) == (2, 3)
    assert read_dataset("synthetic", None, num_classes=2, images_per_class=3) == index


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    layouts.write_folder(tmp_path / "birds", classes=2, images_per_class=2)
    assert len(read_dataset("folder", "~/birds").classes) == 2


def test_reading_imports_no_torch(tmp_path: Path) -> None:
    root = layouts.write_cub(tmp_path)
    code = f"import sys; from crossx.data.check import check_dataset; check_dataset('cub', {str(root)!r}); "
    subprocess.run([sys.executable, "-c", code + "sys.exit('torch' in sys.modules)"], check=True)
