"""Prepare batches of images in threads, ahead of the network."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

from crossx.errors import UsageError

T = TypeVar("T")
R = TypeVar("R")

MAX_WORKERS = 8


def prefetch_batches(
    items: Iterable[T], prepare: Callable[[T], R], batch_size: int
) -> Iterator[tuple[list[T], list[R]]]:
    """Yield batches of items and their results of ``prepare``; only a few batches are held in memory.

    Args:
        items: Consumed only a few batches ahead.
        prepare: Called by up to ``MAX_WORKERS`` threads at a time.
        batch_size: Items per batch; the last may have fewer.

    Raises:
        UsageError: If ``batch_size`` is below 1.
    """
    if batch_size < 1:
        raise UsageError(f"batch_size must be at least 1, not {batch_size}.")
    workers = min(MAX_WORKERS, os.cpu_count() or 1)
    waiting: deque[tuple[T, Future[R]]] = deque()
    todo = iter(items)
    pool = ThreadPoolExecutor(workers)
    try:
        while True:
            ahead = batch_size + max(batch_size, workers) - len(waiting)
            waiting.extend((item, pool.submit(prepare, item)) for item in islice(todo, ahead))
            if not waiting:
                return
            batch = [waiting.popleft() for _ in range(min(batch_size, len(waiting)))]
            yield [item for item, _ in batch], [prepared.result() for _, prepared in batch]
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
