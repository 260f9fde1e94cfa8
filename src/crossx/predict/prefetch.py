"""Prepare batches of images in threads, ahead of the network."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import TypeVar

from crossx.data.threads import map_ahead
from crossx.errors import check_count

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
        UsageError: If ``batch_size`` is not a whole number of at least 1.
    """
    check_count("batch_size", batch_size)
    workers = min(MAX_WORKERS, os.cpu_count() or 1)
    pairs = map_ahead(lambda item: (item, prepare(item)), items, workers, max(batch_size, workers))
    while batch := list(islice(pairs, batch_size)):
        yield [item for item, _ in batch], [prepared for _, prepared in batch]
