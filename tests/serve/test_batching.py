import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crossx.serve.batching import Batcher, ClosedError, QueueFullError

PATIENCE = 600
"""Seconds after which something hangs."""


class Network:
    """Squares; remembers its batches; waits at the gate while that is shut."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.began = threading.Event()

    def __call__(self, batch: list[int]) -> list[int]:
        self.batches.append(batch)
        self.began.set()
        assert self.gate.wait(PATIENCE)
        if -1 in batch:
            raise ZeroDivisionError
        return [item * item for item in batch]


def items(*values: int) -> list[Callable[[], int]]:
    return [partial(int, value) for value in values]


@contextmanager
def batching(
    max_batch: int = 4, max_wait: float = 0.01, capacity: int = 64, workers: int = 2
) -> Iterator[Batcher]:
    batcher = Batcher(max_batch=max_batch, max_wait=max_wait, capacity=capacity, workers=workers)
    try:
        yield batcher
    finally:
        assert batcher.close(timeout=PATIENCE)
        assert not batcher.alive


def hold(batcher: Batcher, network: Network) -> Future[int]:
    """Keep the batcher's thread in a batch of one until the gate opens."""
    network.gate.clear()
    network.began.clear()
    (held,) = batcher.submit(items(100), network)
    assert network.began.wait(PATIENCE)
    return held


def wait_until_prepared(batcher: Batcher) -> None:
    deadline = time.monotonic() + PATIENCE
    while batcher._preparing:
        assert time.monotonic() < deadline
        time.sleep(0.001)


@settings(max_examples=25)
@given(
    requests=st.lists(st.lists(st.integers(0, 10**6), min_size=1, max_size=5), max_size=12),
    max_batch=st.integers(1, 9),
    clients=st.integers(1, 6),
)
def test_every_request_gets_its_own_answers(requests: list[list[int]], max_batch: int, clients: int) -> None:
    network = Network()

    def ask(request: list[int]) -> list[int]:
        time.sleep(random.random() / 1000)
        return [future.result(PATIENCE) for future in batcher.submit(items(*request), network)]

    with batching(max_batch, 0.001, capacity=100) as batcher, ThreadPoolExecutor(clients) as pool:
        answers = list(pool.map(ask, requests))
    assert answers == [[item**2 for item in request] for request in requests]
    ran = [item for batch in network.batches for item in batch]
    assert sorted(ran) == sorted(item for request in requests for item in request)
    assert all(1 <= len(batch) <= max_batch for batch in network.batches)


def test_what_waits_goes_together() -> None:
    network = Network()
    with batching(max_batch=4) as batcher:
        hold(batcher, network)
        futures = batcher.submit(items(*range(6)), network)
        wait_until_prepared(batcher)
        network.gate.set()
        assert [future.result(PATIENCE) for future in futures] == [0, 1, 4, 9, 16, 25]
    assert [len(batch) for batch in network.batches] == [1, 4, 2]


@contextmanager
def prepared_late(max_wait: float) -> Iterator[tuple[Network, list[Future[int]], threading.Event]]:
    """Submit two items of a batch; the second is prepared once the event is set."""
    network, release = Network(), threading.Event()

    def late() -> int:
        assert release.wait(PATIENCE)
        return 7

    with batching(max_batch=2, max_wait=max_wait) as batcher:
        futures = batcher.submit([*items(3), late], network)
        try:
            yield network, futures, release
        finally:
            release.set()


def test_a_batch_waits_for_what_is_being_prepared() -> None:
    with prepared_late(max_wait=PATIENCE) as (network, futures, release):
        assert not network.began.wait(0.2)  # long enough to begin, if it did not wait
        release.set()
        assert [future.result(PATIENCE) for future in futures] == [9, 49]
    assert network.batches == [[3, 7]]


def test_a_batch_waits_no_longer_than_allowed() -> None:
    with prepared_late(max_wait=0.01) as (network, (first, second), release):
        assert first.result(PATIENCE) == 9
        release.set()
        assert second.result(PATIENCE) == 49
    assert network.batches == [[3], [7]]


def test_a_lone_item_does_not_wait() -> None:
    network = Network()
    with batching(max_batch=2, max_wait=10 * PATIENCE) as batcher:
        assert batcher.submit(items(3), network)[0].result(PATIENCE) == 9


def test_different_work_shares_no_batch_and_keeps_its_order() -> None:
    squares, doubles = Network(), []

    def double(batch: list[int]) -> list[int]:
        doubles.append(len(squares.batches))
        return [2 * item for item in batch]

    with batching(workers=1) as batcher:
        hold(batcher, squares)
        futures = [
            future
            for work in (squares, double, squares)
            for future in batcher.submit(items(5, 6), work)  # type: ignore[arg-type]
        ]
        wait_until_prepared(batcher)
        squares.gate.set()
        assert [future.result(PATIENCE) for future in futures] == [25, 36, 10, 12, 25, 36]
    assert squares.batches == [[100], [5, 6], [5, 6]]
    assert doubles == [2]


def test_a_request_is_taken_whole_or_not_at_all() -> None:
    network = Network()
    with batching(capacity=3) as batcher:
        held = hold(batcher, network)
        with pytest.raises(QueueFullError) as full:
            batcher.submit(items(1, 2, 3), network)
        assert full.value.retry_after >= 1
        futures = batcher.submit(items(1, 2), network)
        assert batcher.full
        assert batcher.accepted == 3
        network.gate.set()
        assert [held.result(PATIENCE), *(future.result(PATIENCE) for future in futures)] == [10000, 1, 4]
        assert batcher.accepted == 0
        assert [future.result(PATIENCE) for future in batcher.submit(items(1, 2, 3), network)] == [1, 4, 9]


def test_a_failed_batch_fails_its_members_alone() -> None:
    network = Network()
    with batching(max_batch=2, workers=1) as batcher:
        hold(batcher, network)
        futures = batcher.submit(items(1, 2, 3, -1, 5), network)
        wait_until_prepared(batcher)
        network.gate.set()
        assert [futures[n].result(PATIENCE) for n in (0, 1, 4)] == [1, 4, 25]
        for number in (2, 3):
            with pytest.raises(ZeroDivisionError):
                futures[number].result(PATIENCE)


def test_an_item_that_cannot_be_prepared_fails_alone() -> None:
    network = Network()
    with batching() as batcher:
        good, bad, other = batcher.submit([*items(2), partial(int, "x"), *items(3)], network)
        assert (good.result(PATIENCE), other.result(PATIENCE)) == (4, 9)
        with pytest.raises(ValueError, match="invalid literal"):
            bad.result(PATIENCE)


def test_a_wrong_number_of_results_is_nobodys_answer() -> None:
    def short(batch: list[int]) -> Sequence[int]:
        return batch[1:]

    with batching() as batcher:
        for future in batcher.submit(items(1, 2), short):
            with pytest.raises(ValueError, match="zip"):
                future.result(PATIENCE)


def test_cancelled_work_is_dropped_and_gives_its_place_back() -> None:
    network = Network()
    with batching(capacity=3, workers=1) as batcher:
        hold(batcher, network)
        one, two = batcher.submit(items(1, 2), network)
        assert one.cancel()
        (three,) = batcher.submit(items(3), network)
        network.gate.set()
        assert (two.result(PATIENCE), three.result(PATIENCE)) == (4, 9)
        with pytest.raises(CancelledError):
            one.result(PATIENCE)
    assert all(1 not in batch for batch in network.batches)


def test_what_was_accepted_is_finished_and_nothing_more_is_taken() -> None:
    network = Network()
    with batching() as batcher:
        held = hold(batcher, network)
        futures = batcher.submit(items(*range(9)), network)
        closing = threading.Thread(target=batcher.close)
        closing.start()
        deadline, closed = time.monotonic() + PATIENCE, False
        while not closed and time.monotonic() < deadline:
            try:
                futures += batcher.submit(items(0), network)
            except QueueFullError:  # the thread that closes has not begun yet
                time.sleep(0.001)
            except ClosedError:
                closed = True
        assert closed
        network.gate.set()
        closing.join(PATIENCE)
        assert held.done()
        assert all(future.done() for future in futures)
        assert [future.result() for future in futures[:9]] == [n * n for n in range(9)]


def test_closing_gives_up_after_its_time() -> None:
    network = Network()
    with batching() as batcher:
        held = hold(batcher, network)
        assert not batcher.close(timeout=0.01)
        assert not held.done()
        network.gate.set()


def test_batches_are_observed() -> None:
    seen: list[tuple[int, float]] = []
    batcher = Batcher(
        max_batch=4, max_wait=0, capacity=9, workers=1, observe=lambda *batch: seen.append(batch)
    )
    batcher.submit(items(1), Network())[0].result(PATIENCE)
    batcher.close()
    assert [size for size, _ in seen] == [1]
    assert seen[0][1] > 0
