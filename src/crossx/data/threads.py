"""Work on many items in threads, with few of them in flight."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")

AHEAD = 8
"""Items per thread in flight by default, so that a slow one does not stop the other threads at once."""


def map_ahead(
    function: Callable[[T], R], items: Iterable[T], threads: int, ahead: int | None = None
) -> Iterator[R]:
    """Yield the result for each item, in order. ``ThreadPoolExecutor.map`` starts with a task for every item.

    Args:
        function: Called by the threads.
        items: Consumed only ``ahead`` items before the results are taken.
        threads: Number of threads.
        ahead: Items in flight at most; by default ``AHEAD`` per thread.
    """
    todo, most = iter(items), ahead or AHEAD * threads
    waiting: deque[Future[R]] = deque()
    pool = ThreadPoolExecutor(threads)
    try:
        while True:
            waiting.extend(pool.submit(function, item) for item in islice(todo, most - len(waiting)))
            if not waiting:
                return
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
