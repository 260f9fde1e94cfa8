"""Share threads and capacities fairly among clients. Independent of images, networks and HTTP."""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

Flow = tuple[Hashable, Hashable]
"""Client and request that a call belongs to."""

ALONE: Flow = (None, None)


class ShareError(Exception):
    """A client holds its share of a capacity, or all clients together hold all of it."""


class Capacity:
    """Amounts that clients hold of a limited capacity. Not thread-safe.

    No client holds more than ``share`` of it, so that there is room for others.

    Args:
        total: Capacity of all clients together; None for no limit.
        share: Capacity of one client.
    """

    def __init__(self, total: int | None, share: int) -> None:
        self._total, self._share = total, share
        self._held: Counter[Hashable] = Counter()

    @property
    def held(self) -> int:
        """What all clients together hold."""
        return self._held.total()

    def take(self, client: Hashable, amount: int) -> None:
        """Add to what a client holds.

        Raises:
            ShareError: If it does not fit; nothing is added then.
        """
        if self._held[client] + amount > self._share or (
            self._total is not None and self.held + amount > self._total
        ):
            raise ShareError
        self._held[client] += amount

    def give(self, client: Hashable, amount: int) -> None:
        """Take off what a client holds."""
        self._held[client] -= amount
        if not self._held[client]:
            del self._held[client]


@dataclass(eq=False)
class _Client:
    """Calls of one client: per request a queue; requests take turns."""

    spent: float
    requests: dict[Hashable, deque[Callable[[], None]]] = field(default_factory=dict)
    running: int = 0

    def pop(self) -> Callable[[], None]:
        request, calls = next(iter(self.requests.items()))
        del self.requests[request]
        call = calls.popleft()
        if calls:
            self.requests[request] = calls
        return call


class FairPool:
    """Threads that run calls of several clients in turn.

    The next call is of the client with the fewest running calls, and among those of the one whose calls have taken the
    least time since it began to compete with others; within a client, requests take turns. A client with many long
    calls thereby delays another one's by at most a call.

    One client has at most ``workers`` threads for light calls; one more is for others. Heavy calls have threads of
    their own, half as many, so that a light one need not wait for any of them.

    Args:
        workers: Threads of one client for light calls.
        name: Prefix of the threads' names.
    """

    def __init__(self, workers: int, name: str) -> None:
        self._changed = threading.Condition()
        self._lanes: dict[bool, dict[Hashable, _Client]] = {False: {}, True: {}}
        self._closed = False
        self._workers = workers
        self._threads = [
            threading.Thread(target=self._work, args=(heavy,), name=f"{name}-{number}", daemon=True)
            for heavy, size in ((False, workers + 1), (True, max(1, workers // 2)))
            for number in range(size)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, call: Callable[[], None], flow: Flow = ALONE, *, heavy: bool = False) -> None:
        """Run a call, which must not raise, in one of the threads."""
        client, request = flow
        with self._changed:
            lane = self._lanes[heavy]
            if client not in lane:
                lane[client] = _Client(min((other.spent for other in lane.values()), default=0.0))
            lane[client].requests.setdefault(request, deque()).append(call)
            self._changed.notify_all()

    def close(self, *, wait: bool) -> None:
        """Drop the calls that have not begun, and with ``wait`` wait for the others."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if wait:
            for thread in self._threads:
                thread.join()

    def _work(self, heavy: bool) -> None:
        lane = self._lanes[heavy]
        while (chosen := self._next(lane)) is not None:
            key, client, call = chosen
            start = time.thread_time()
            call()
            del call, chosen
            with self._changed:
                client.running -= 1
                client.spent += time.thread_time() - start
                if not client.running and not client.requests:
                    del lane[key]

    def _next(self, lane: dict[Hashable, _Client]) -> tuple[Hashable, _Client, Callable[[], None]] | None:
        with self._changed:
            while not self._closed:
                waiting = [
                    (client.running, client.spent, key)
                    for key, client in lane.items()
                    if client.requests and client.running < self._workers
                ]
                if waiting:
                    key = min(waiting, key=lambda one: one[:2])[2]
                    client = lane[key]
                    client.running += 1
                    return key, client, client.pop()
                self._changed.wait()
            return None
