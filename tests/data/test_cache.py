import errno
import io
import logging
import math
import multiprocessing
import os
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from crossx.data import cache as module
from crossx.data import datamodule
from crossx.data.cache import PixelCache, open_cache, stored_images
from crossx.data.config import DataConfig
from crossx.data.datamodule import DataModule
from crossx.data.images import ImageError, read_image
from crossx.data.index import DatasetIndex, Record
from crossx.data.transforms import eval_transform, square_transform, train_transform
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


def opened(kind, paths):
    return open_cache(kind, "train", paths, TRANSFORM, decoded_only=True)


@pytest.mark.parametrize("kind", ["ram", "disk"])
def test_images_are_decoded_once_and_stay_the_same(kind, paths):
    cache, _, summary = opened(kind, paths)
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
    cache, _, _ = opened("disk", paths)
    for path in paths:
        cache.read(path, read_image)
    again, _, summary = opened("disk", paths)
    (file,) = cache_home.iterdir()
    assert str(file) in summary
    for path in paths:
        assert torch.equal(again.read(path, fail), read_image(path))
    os.utime(paths[0], (0, 0))
    changed, _, _ = opened("disk", paths)
    with pytest.raises(AssertionError, match="decoded again"):
        changed.read(paths[1], fail)


@pytest.mark.parametrize("damage", ["pixels", "checksum"])
def test_half_written_images_are_decoded_again(paths, cache_home, damage):
    cache, _, _ = opened("disk", paths)
    for path in paths:
        cache.read(path, read_image)
    (file,) = cache_home.iterdir()
    with file.open("r+b") as damaged:
        damaged.seek(8 * len(paths) if damage == "pixels" else 0)
        damaged.write(bytes(8))
    again, _, _ = opened("disk", paths)
    with pytest.raises(AssertionError, match="decoded again"):
        again.read(paths[0], fail)
    assert torch.equal(again.read(paths[0], read_image), read_image(paths[0]))
    assert torch.equal(again.read(paths[0], fail), read_image(paths[0]))


def fill(cache, paths):
    for path in paths:
        cache.read(path, read_image)


@pytest.mark.parametrize("kind", ["ram", "disk"])
def test_what_one_process_decodes_the_others_have(kind, paths):
    cache, _, _ = opened(kind, paths)
    worker = multiprocessing.get_context("fork").Process(target=fill, args=(cache, paths))
    worker.start()
    worker.join()
    assert worker.exitcode == 0
    for path in paths:
        assert torch.equal(cache.read(path, fail), read_image(path))


@pytest.mark.parametrize("kind", ["ram", "disk"])
def test_a_process_that_was_not_forked_opens_the_same_file(kind, paths):
    cache, _, _ = opened(kind, paths)
    pickled = pickle.dumps(cache)
    assert len(pickled) < 5000
    fill(pickle.loads(pickled), paths)
    assert torch.equal(cache.read(paths[0], fail), read_image(paths[0]))


def test_errors_are_those_of_reading(paths):
    cache, _, _ = opened("ram", paths)
    paths[0].unlink()
    with pytest.raises(ImageError, match="no such file"):
        cache.read(paths[0], read_image)


def test_an_image_of_another_size_than_its_header_says_is_not_kept(paths):
    cache, _, _ = opened("ram", paths)
    other = torch.zeros(3, 7, 7, dtype=torch.uint8)
    assert cache.read(paths[0], lambda path: other) is other
    assert torch.equal(cache.read(paths[0], read_image), read_image(paths[0]))


def test_too_little_room_is_told_with_sizes(paths, monkeypatch, cache_home):
    monkeypatch.setattr(module, "_free_memory", lambda: 1000)
    with pytest.raises(
        UsageError, match=r"9 decoded train images take .* MB, and memory has room for 0\.0 MB"
    ):
        opened("ram", paths)
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(module.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(UsageError, match=r"decoded has room for .*--data\.cache_folder"):
        opened("disk", paths)
    assert list(cache_home.iterdir()) == []
    (cache_home / "earlier.bin").write_bytes(bytes(3_000_000))
    with pytest.raises(
        UsageError, match=r"0\.0 MB, next to 3\.0 MB of earlier caches, which may be deleted: free"
    ):
        opened("disk", paths)


def test_a_file_that_could_be_reserved_only_in_part_is_removed(paths, monkeypatch, cache_home):
    def reserve(descriptor, start, length):
        os.truncate(descriptor, 100)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(module.os, "posix_fallocate", reserve)
    with pytest.raises(UsageError, match=r"cannot hold them \(No space left on device\): free some room"):
        opened("disk", paths)
    assert list(cache_home.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_told(paths, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(module, "cache_folder", lambda: tmp_path / "file")
    with pytest.raises(UsageError, match=r"cannot hold them \(Not a directory\): .*--data\.cache_folder"):
        opened("disk", paths)


TRANSFORMS = {
    "train": lambda preprocessing: train_transform(preprocessing, "crop", hflip=0.5, random_erasing=0.3),
    "no flip": lambda preprocessing: train_transform(preprocessing, "crop", hflip=0),
    "resized_crop": lambda preprocessing: train_transform(preprocessing, "resized_crop"),
    "trivial": lambda preprocessing: train_transform(preprocessing, "trivial"),
    "eval": eval_transform,
    "square": square_transform,
}


@settings(max_examples=40, deadline=None)
@given(
    made=st.sampled_from(sorted(TRANSFORMS)),
    size=st.tuples(st.integers(1, 400), st.integers(1, 400)),
    file_format=st.sampled_from(["JPEG", "PNG"]),
    image_size=st.integers(16, 40),
    more=st.none() | st.integers(0, 20),
    interpolation=st.sampled_from(["bilinear", "bicubic"]),
    pipeline=st.sampled_from(["fast", "strict"]),
    crop_bottom=st.sampled_from([0, 0, 3]),
    seed=st.integers(0, 1000),
)
def test_every_form_leads_to_the_same_pixels(
    made, size, file_format, image_size, more, interpolation, pipeline, crop_bottom, seed
):
    preprocessing = Preprocessing(
        image_size,
        None if more is None else image_size + more,
        interpolation,
        (0.5, 0.5, 0.5),
        (0.5, 0.5, 0.5),
        crop_bottom,
        pipeline,
    )
    assume(size[1] > crop_bottom)
    data = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(data, file_format)
    source, transform = data.getvalue(), TRANSFORMS[made](preprocessing)
    torch.manual_seed(seed)
    expected = transform(transform.read(source))
    forms = transform.forms()
    assert [form.name for form in forms][-1] == "decoded"
    assert (len(forms) == 2) == (made not in ("resized_crop", "trivial", "square"))
    for form in forms:
        kept = form.read(source)
        assert tuple(kept.shape[1:]) == form.size(transform.size(source))
        torch.manual_seed(seed)
        assert torch.equal(form.then(kept), expected)


def test_images_are_kept_resized_if_that_fits(paths, monkeypatch):
    transform = train_transform(replace(PREPROCESSING, resize_size=50), "crop")
    resized, decoded = transform.forms()
    needed = {form: 8 * len(paths) for form in (resized, decoded)}
    for path in paths:
        for form in needed:
            needed[form] += -(-3 * math.prod(form.read(path).shape[1:]) // 8) * 8
    assert needed[decoded] < needed[resized] < 2 * needed[decoded]

    def form(room=1e9):
        monkeypatch.setattr(module, "_free_memory", lambda: room)
        _, kept, summary = open_cache("ram", "train", paths, transform)
        assert f": 9 {kept.name} train images take " in summary
        return kept.name

    assert form() == form(needed[resized]) == "resized"
    assert form(needed[resized] - 1) == form(needed[decoded]) == "decoded"
    with pytest.raises(UsageError, match="9 decoded train images take"):
        form(needed[decoded] - 1)
    transform = train_transform(replace(PREPROCESSING, resize_size=90), "crop")
    assert form() == "decoded"


def test_a_cache_is_that_of_its_pixels(paths):
    def key(made="train", **options):
        return TRANSFORMS[made](replace(PREPROCESSING, **options)).forms()[0].key

    other = [
        key("eval"),
        key(resize_size=36),
        key(resize_size=37),
        key(interpolation="bicubic"),
        key(crop_bottom=1),
        key(pipeline="strict"),
    ]
    assert len({key(), *other}) == 7
    assert key(mean=(0.1, 0.2, 0.3)) == key(std=(0.1, 0.2, 0.3)) == key("no flip") == key()


def test_a_folder_of_ones_own(paths, tmp_path, cache_home):
    folder = tmp_path / "scratch" / "images"
    _, _, summary = open_cache("disk", "train", paths, TRANSFORM, folder=folder)
    (file,) = folder.iterdir()
    assert str(file) in summary
    assert not cache_home.exists()


def test_an_image_of_which_nothing_is_left_is_named(paths):
    transform = eval_transform(replace(PREPROCESSING, crop_bottom=200))
    with pytest.raises(ImageError, match=rf"{paths[0]}: is \d+ rows high and data\.crop_bottom cuts off 200"):
        open_cache("ram", "train", paths, transform)


def test_processes_that_fill_a_cache_at_the_same_time_agree(paths):
    caches = [opened("disk", paths)[0] for _ in range(4)]
    workers = [multiprocessing.get_context("fork").Process(target=fill, args=(one, paths)) for one in caches]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    cache, _, _ = opened("disk", paths)
    for path in paths:
        assert torch.equal(cache.read(path, fail), read_image(path))


def test_what_an_earlier_run_has_stored_is_known(paths, cache_home):
    assert stored_images(paths, TRANSFORM) == set()
    assert not cache_home.exists()
    cache, form, _ = open_cache("disk", "train", paths, TRANSFORM)
    for path in paths[:4]:
        cache.read(path, form.read)
    assert stored_images(paths, TRANSFORM) == set(paths[:4])
    assert stored_images(paths[:4], TRANSFORM) == set()
    assert stored_images(paths, eval_transform(replace(PREPROCESSING, image_size=33))) == set()
    (file,) = cache_home.iterdir()
    with file.open("r+b") as damaged:
        damaged.seek(8 * len(paths) + 5)
        damaged.write(b"?")
    assert stored_images(paths, TRANSFORM) == set(paths[1:4])


def test_images_in_the_cache_of_an_earlier_run_are_not_checked_again(paths, monkeypatch, caplog):
    inspect, seen = datamodule.inspect_image, []

    def recorded(path):
        seen.append(path)
        return inspect(path)

    def check(read):
        records = tuple(Record(path, number % 2, "train") for number, path in enumerate(paths))
        config = DataConfig(
            image_size=32, batch_size=4, num_workers=0, cache="disk", val_fraction=0.25, bad_images="skip"
        )
        data = DataModule(DatasetIndex("birds", ("auk", "jay"), records), PREPROCESSING, config, seed=0)
        seen.clear()
        data.check_images()
        data.open_caches()
        for loader in (data.train_dataloader(), data.val_dataloader()) if read else ():
            list(loader)
        return data

    monkeypatch.setattr(datamodule, "inspect_image", recorded)
    check(read=True)
    assert sorted(seen) == sorted(paths)
    check(read=False)
    assert sorted(seen) == [path for path in sorted(paths) if path.suffix == ".png"]
    paths[0].write_bytes(paths[0].read_bytes()[:-200])
    assert [path for path, _ in check(read=False).skipped] == [paths[0]]
    # those of the other split are still in its cache, and count
    assert len(seen) < len(paths)
    assert any("1 of 9 images cannot be read" in message for message in caplog.messages)
    paths[0].write_bytes(b"")
    assert [path for path, _ in check(read=False).skipped] == [paths[0]]


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
