import logging
import multiprocessing
import os
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from crossx.data import cache as module
from crossx.data.cache import PixelCache, open_cache
from crossx.data.config import DataConfig
from crossx.data.datamodule import DataModule
from crossx.data.images import ImageError, read_image
from crossx.data.index import DatasetIndex, Record
from crossx.data.transforms import eval_transform
from crossx.errors import UsageError
from crossx.runs import Preprocessing

PREPROCESSING = Preprocessing(32, None, "bilinear", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
TRANSFORM = eval_transform(PREPROCESSING)


def fail(path):
    raise AssertionError(f"{path} was decoded again")


@pytest.fixture
def paths(tmp_path):
    random = np.random.default_rng(0)
    made = []
    for number in range(9):
        made.append(tmp_path / f"{number}.{'png' if number % 2 else 'jpg'}")
        height, width = random.integers(30, 60, 2)
        Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(made[-1])
    return made


@pytest.fixture(autouse=True)
def cache_home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "crossx" / "decoded"


@pytest.mark.parametrize("kind", ["ram", "disk"])
def test_images_are_decoded_once_and_stay_the_same(kind, paths):
    cache, summary = open_cache(kind, "train", paths, TRANSFORM)
    assert summary.startswith(f"data.cache {kind}: 9 decoded train images take ")
    for decode in (read_image, fail):
        for path in paths:
            assert torch.equal(cache.read(path, decode), read_image(path))
            assert cache.read(path, decode).permute(1, 2, 0).is_contiguous()


@settings(max_examples=30)
@given(st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=6))
def test_round_trip_of_any_sizes(sizes):
    images = {
        f"{number}": torch.randint(0, 256, (3, *size), dtype=torch.uint8) for number, size in enumerate(sizes)
    }
    images["black"] = torch.zeros(3, 5, 5, dtype=torch.uint8)
    cache = PixelCache({path: tuple(image.shape[1:]) for path, image in images.items()})
    for decode in (images.get, fail):
        for path, image in images.items():
            assert torch.equal(cache.read(path, decode), image)


def test_disk_cache_serves_the_next_run_until_an_image_changes(paths, cache_home):
    cache, _ = open_cache("disk", "train", paths, TRANSFORM)
    for path in paths:
        cache.read(path, read_image)
    again, summary = open_cache("disk", "train", paths, TRANSFORM)
    (file,) = cache_home.iterdir()
    assert str(file) in summary
    for path in paths:
        assert torch.equal(again.read(path, fail), read_image(path))
    os.utime(paths[0], (0, 0))
    changed, _ = open_cache("disk", "train", paths, TRANSFORM)
    with pytest.raises(AssertionError, match="decoded again"):
        changed.read(paths[1], fail)


@pytest.mark.parametrize("damage", ["pixels", "checksum"])
def test_half_written_images_are_decoded_again(paths, cache_home, damage):
    cache, _ = open_cache("disk", "train", paths, TRANSFORM)
    for path in paths:
        cache.read(path, read_image)
    (file,) = cache_home.iterdir()
    with file.open("r+b") as opened:
        opened.seek(8 * len(paths) if damage == "pixels" else 0)
        opened.write(bytes(8))
    again, _ = open_cache("disk", "train", paths, TRANSFORM)
    with pytest.raises(AssertionError, match="decoded again"):
        again.read(paths[0], fail)
    assert torch.equal(again.read(paths[0], read_image), read_image(paths[0]))
    assert torch.equal(again.read(paths[0], fail), read_image(paths[0]))


def fill(cache, paths):
    for path in paths:
        cache.read(path, read_image)


@pytest.mark.parametrize("kind", ["ram", "disk"])
def test_what_one_process_decodes_the_others_have(kind, paths):
    cache, _ = open_cache(kind, "train", paths, TRANSFORM)
    worker = multiprocessing.get_context("fork").Process(target=fill, args=(cache, paths))
    worker.start()
    worker.join()
    assert worker.exitcode == 0
    for path in paths:
        assert torch.equal(cache.read(path, fail), read_image(path))


@pytest.mark.parametrize("kind", ["ram", "disk"])
def test_a_process_that_was_not_forked_opens_the_same_file(kind, paths):
    cache, _ = open_cache(kind, "train", paths, TRANSFORM)
    pickled = pickle.dumps(cache)
    assert len(pickled) < 5000
    fill(pickle.loads(pickled), paths)
    assert torch.equal(cache.read(paths[0], fail), read_image(paths[0]))


def test_errors_are_those_of_reading(paths):
    cache, _ = open_cache("ram", "train", paths, TRANSFORM)
    paths[0].unlink()
    with pytest.raises(ImageError, match="no such file"):
        cache.read(paths[0], read_image)


def test_an_image_of_another_size_than_its_header_says_is_not_kept(paths):
    cache, _ = open_cache("ram", "train", paths, TRANSFORM)
    other = torch.zeros(3, 7, 7, dtype=torch.uint8)
    assert cache.read(paths[0], lambda path: other) is other
    assert torch.equal(cache.read(paths[0], read_image), read_image(paths[0]))


def test_too_little_room_is_told_with_sizes(paths, monkeypatch, cache_home):
    monkeypatch.setattr(module, "_free_memory", lambda: 1000)
    with pytest.raises(
        UsageError, match=r"9 decoded train images take .* MB, and memory has room for 0\.0 MB"
    ):
        open_cache("ram", "train", paths, TRANSFORM)
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(module.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(UsageError, match=r"decoded has room for .*XDG_CACHE_HOME"):
        open_cache("disk", "train", paths, TRANSFORM)
    assert list(cache_home.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_told(paths, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(module, "cache_folder", lambda: tmp_path / "file")
    with pytest.raises(UsageError, match=r"cannot hold them \(Not a directory\): .*XDG_CACHE_HOME"):
        open_cache("disk", "train", paths, TRANSFORM)


@pytest.mark.parametrize("kind", ["ram", "disk"])
@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.slow
def test_batches_are_the_same_with_and_without_a_cache(kind, num_workers, paths, caplog):
    records = tuple(Record(path, number % 2, "train") for number, path in enumerate(paths))
    index = DatasetIndex("birds", ("auk", "jay"), records)

    def epochs(cache):
        config = DataConfig(
            image_size=32, batch_size=4, num_workers=num_workers, cache=cache, val_fraction=0.25
        )
        data = DataModule(index, PREPROCESSING, config, seed=3)
        data.open_caches()
        batches = []
        for epoch in range(2):
            loader = data.train_dataloader()
            loader.sampler.set_epoch(epoch)
            batches += [*loader, *data.val_dataloader()]
        return batches

    caplog.set_level(logging.INFO, "crossx")
    expected = epochs("none")
    assert caplog.messages == []
    for (images, targets), (same_images, same_targets) in zip(expected, epochs(kind), strict=True):
        assert torch.equal(images, same_images)
        assert torch.equal(targets, same_targets)
    assert [message.split(" take ")[0].split()[-2] for message in caplog.messages] == ["train", "val"]
