import threading
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crossx.serve.fairness import Capacity, FairPool, ShareError

PATIENCE = 600
"""Seconds after which something hangs."""


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 5)), max_size=40))
def test_nobody_holds_more_than_a_share_and_all_not_more_than_the_total(steps: list[tuple[str, int]]) -> None:
    capacity, held = Capacity(12, 7), dict.fromkeys("abc", 0)
    for client, amount in steps:
        fits = held[client] + amount <= 7 and sum(held.values()) + amount <= 12
        if fits:
            capacity.take(client, amount)
            held[client] += amount
        else:
            with pytest.raises(ShareError):
                capacity.take(client, amount)
            capacity.give(client, held[client])
            held[client] = 0
        assert capacity.held == sum(held.values())


class Gate:
    """Keeps a pool's thread busy until it is opened, then lets calls say their names in order."""

    def __init__(self, pool: FairPool, *, heavy: bool = False) -> None:
        self.pool, self.heavy = pool, heavy
        self.order: list[str] = []
        self.opened, self.done = threading.Event(), threading.Event()
        threads = 1 if heavy else 2  # one client has one of two
        began = threading.Barrier(threads + 1)
        for number in range(threads):
            pool.submit(partial(self._hold, began), (f"gate {number}", 0), heavy=heavy)
        began.wait(PATIENCE)

    def _hold(self, began: threading.Barrier) -> None:
        began.wait(PATIENCE)
        assert self.opened.wait(PATIENCE)

    def add(self, name: str, client: str, request: int) -> None:
        self.pool.submit(partial(self.order.append, name), (client, request), heavy=self.heavy)

    def finish(self) -> list[str]:
        self.pool.submit(self.done.set, ("last", 0), heavy=self.heavy)
        self.opened.set()
        assert self.done.wait(PATIENCE)
        self.pool.close(wait=True)
        return self.order


def test_a_client_with_many_calls_does_not_delay_another() -> None:
    gate = Gate(FairPool(1, "test"))
    for number in range(100):
        gate.add("many", "many", number)
    gate.add("few", "few", 0)
    order = gate.finish()
    assert order.index("few") <= 2


def test_requests_of_a_client_take_turns() -> None:
    gate = Gate(FairPool(1, "test"))
    for name, request in [("a", 1)] * 3 + [("b", 2)] * 3 + [("c", 3)]:
        gate.add(name, "client", request)
    # the last call may come before them: it is of a client that has spent nothing
    assert gate.finish()[:6] == list("abcaba")[: len(gate.order)]


def test_one_client_leaves_a_thread_to_others() -> None:
    pool, gate, other = FairPool(2, "test"), threading.Event(), threading.Event()
    for number in range(10):
        pool.submit(lambda: gate.wait(PATIENCE) or None, ("many", number))
    pool.submit(other.set, ("other", 0))
    assert other.wait(PATIENCE)
    gate.set()
    pool.close(wait=True)


def test_light_calls_pass_heavy_ones() -> None:
    pool = FairPool(1, "test")
    heavy, light = Gate(pool, heavy=True), threading.Event()
    pool.submit(light.set)
    assert light.wait(PATIENCE)
    assert heavy.finish() == []


def test_clients_that_left_are_forgotten() -> None:
    pool = FairPool(2, "test")
    done = threading.Barrier(3)
    for client in ("a", "b"):
        pool.submit(partial(done.wait, PATIENCE), (client, 0))
    done.wait(PATIENCE)
    pool.close(wait=True)
    assert pool._lanes == {False: {}, True: {}}
