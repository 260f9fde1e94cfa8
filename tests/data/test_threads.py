"""Work in threads keeps few items in flight, whatever their number."""

import itertools
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import layouts
from crossx.audit.images import read_images
from crossx.data import check, datamodule
from crossx.data.catalog import read_dataset
from crossx.data.check import check_dataset
from crossx.data.config import DataConfig
from crossx.data.datamodule import DataModule
from crossx.data.threads import AHEAD, map_ahead
from crossx.runs import Preprocessing


def test_results_are_in_order_and_items_consumed_as_they_are_taken() -> None:
    consumed: list[int] = []

    def slow_first(item: int) -> int:
        time.sleep(0.01 if item % 3 == 0 else 0)
        return item * item

    def items() -> Iterator[int]:
        for item in itertools.count():
            consumed.append(item)
            yield item

    results = map_ahead(slow_first, items(), 3, ahead=5)
    assert not consumed
    assert [next(results) for _ in range(20)] == [item * item for item in range(20)]
    assert len(consumed) <= 20 + 5
    results.close()
    assert list(map_ahead(str, range(3), 2)) == ["0", "1", "2"]
    assert list(map_ahead(str, [], 2)) == []


def test_the_first_error_ends_the_work() -> None:
    started: list[int] = []

    def fail(item: int) -> int:
        started.append(item)
        if item == 4:
            raise ValueError("four")
        return item

    results = map_ahead(fail, itertools.count(), 2, ahead=4)
    assert [next(results) for _ in range(4)] == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="four"):
        next(results)
    assert list(results) == []
    assert max(started) <= 4 + 4


@pytest.fixture
def in_flight(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of tasks that were submitted and not done, at each submission."""
    seen: list[int] = []
    lock, submitted = threading.Lock(), 0
    submit = ThreadPoolExecutor.submit

    def counted(pool: ThreadPoolExecutor, function: Callable[..., object], *arguments: object) -> object:
        nonlocal submitted
        with lock:
            submitted += 1
            seen.append(submitted)
        future = submit(pool, function, *arguments)

        def done(_: object) -> None:
            nonlocal submitted
            with lock:
                submitted -= 1

        future.add_done_callback(done)
        return future

    monkeypatch.setattr(ThreadPoolExecutor, "submit", counted)
    return seen


@pytest.mark.parametrize("who", ["check", "training", "audit"])
def test_every_check_of_images_has_few_in_flight(
    who: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_flight: list[int]
) -> None:
    threads = 1
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    root = layouts.write_folder(tmp_path / "images", classes=2, images_per_class=3 * AHEAD)
    index = read_dataset("folder", root)
    if who == "check":
        inspect = check._inspect
        monkeypatch.setattr(check, "_inspect", lambda path: (time.sleep(0.005), inspect(path))[1])
        assert not check_dataset("folder", root).problems
    elif who == "training":
        inspect_image = datamodule.inspect_image
        monkeypatch.setattr(
            datamodule, "inspect_image", lambda path: (time.sleep(0.005), inspect_image(path))[1]
        )
        data = DataModule(
            index,
            Preprocessing(32, 32, "bilinear", (0.5,) * 3, (0.5,) * 3),
            DataConfig(root=str(root), num_workers=threads),
            seed=0,
        )
        data.check_images()
        assert not data.skipped
    else:
        images = read_images(index, root, lambda *_: time.sleep(0.001))
        assert len(images.records) == 6 * AHEAD
    assert len(in_flight) == 6 * AHEAD
    assert max(in_flight) <= AHEAD * threads
