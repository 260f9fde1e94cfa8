"""Dynamic batching: items of concurrent requests run in batches on a single thread.

Each item is first prepared by itself in a pool of threads that clients share fairly; items that are ready at about the
same time then run together in the one thread that may use the network. Independent of images, networks and HTTP.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from crossx.serve.fairness import ALONE, FairPool, Flow

T = TypeVar("T")
R = TypeVar("R")


class QueueFullError(Exception):
    """The queue has no room for the submitted items.

    Attributes:
        retry_after: Estimated seconds until it has, at the rate of the last batches.
    """

    def __init__(self, retry_after: int) -> None:
        super().__init__("the queue is full")
        self.retry_after = retry_after


class ClosedError(Exception):
    """The batcher accepts nothing more."""


@dataclass(eq=False)
class _Job:
    """One item; its data are released as soon as they are no longer needed."""

    prepare: Callable[[], Any] | None
    run: Callable[[list[Any]], Sequence[Any]]
    future: Future[Any] = field(default_factory=Future)
    prepared: Any = None

    def forget(self, _: Future[Any]) -> None:
        self.prepare = self.prepared = None


class Batcher:
    """Runs items in batches, and gives the result of each as a future.

    An item occupies one of ``capacity`` slots from ``submit`` until its future is done. Items run in the order in which
    they became ready; consecutive items with the same ``run`` share a batch, up to ``max_batch``. The thread waits for
    a batch to fill only while other items are being prepared, and at most ``max_wait``. A future that is cancelled
    before its batch starts is left out. An exception in ``prepare`` goes to the item's future, one in ``run`` to all
    futures of the batch.

    Attributes:
        pool: The threads that prepare, for other short work of requests.

    Args:
        max_batch: Items per batch.
        max_wait: Seconds that a prepared item waits for others.
        capacity: Items accepted and not answered.
        workers: Threads that prepare, see ``FairPool``.
        observe: Called with the size and the seconds of each batch, by the thread that runs them.
    """

    def __init__(
        self,
        *,
        max_batch: int,
        max_wait: float,
        capacity: int,
        workers: int,
        observe: Callable[[int, float], None] = lambda size, seconds: None,
    ) -> None:
        self._max_batch, self._max_wait = max_batch, max_wait
        self._capacity, self._observe = capacity, observe
        self._changed = threading.Condition()
        self._ready: deque[_Job] = deque()
        self._accepted = self._preparing = 0
        self._closed = False
        self._pace = 0.0
        self.pool = FairPool(workers, "prepare")
        self._thread = threading.Thread(target=self._work, name="batches", daemon=True)
        self._thread.start()

    @property
    def accepted(self) -> int:
        """Items accepted and not answered."""
        return self._accepted

    @property
    def full(self) -> bool:
        """Whether no more items are accepted."""
        return self._accepted >= self._capacity

    @property
    def alive(self) -> bool:
        """Whether the thread that runs batches is alive."""
        return self._thread.is_alive()

    def submit(
        self,
        prepares: Sequence[Callable[[], T]],
        run: Callable[[list[T]], Sequence[R]],
        flow: Flow = ALONE,
        *,
        heavy: Sequence[bool] = (),
    ) -> list[Future[R]]:
        """Accept all items or none.

        Args:
            prepares: One function per item, called in a thread.
            run: Maps prepared items to their results, in order. Items with an equal ``run`` may share a batch,
                whoever submitted them.
            flow: Client and request, which share the threads that prepare with others.
            heavy: Per item, whether preparing it takes long; by default none does.

        Returns:
            One future per item.

        Raises:
            QueueFullError: If there are not enough free slots.
            ClosedError: After ``close``.
        """
        with self._changed:
            if self._closed:
                raise ClosedError
            if self._accepted + len(prepares) > self._capacity:
                raise QueueFullError(self.retry_after())
            self._accepted += len(prepares)
            self._preparing += len(prepares)
        jobs = [_Job(prepare, run) for prepare in prepares]
        for job, slow in zip(jobs, heavy or [False] * len(jobs), strict=True):
            job.future.add_done_callback(job.forget)
            job.future.add_done_callback(self._leave)
            self.pool.submit(partial(self._prepare, job), flow, heavy=slow)
        return [job.future for job in jobs]

    def retry_after(self) -> int:
        """Return the seconds, at least 1, that the accepted items will take at the rate of the last batches."""
        return max(1, math.ceil(self._accepted * self._pace))

    def close(self, timeout: float | None = None) -> bool:
        """Accept nothing more, wait up to ``timeout`` seconds, and return whether all items were answered."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            finished = self._changed.wait_for(lambda: not self._accepted, timeout)
        self.pool.close(wait=finished)
        if finished:
            self._thread.join()
        return finished

    def _leave(self, _: Future[Any]) -> None:
        with self._changed:
            self._accepted -= 1
            self._changed.notify_all()

    def _prepare(self, job: _Job) -> None:
        prepare, ready = job.prepare, False
        try:
            if prepare is not None:
                job.prepared = prepare()
                ready = True
        except BaseException as error:
            if job.future.set_running_or_notify_cancel():
                job.future.set_exception(error)
        finally:
            with self._changed:
                self._preparing -= 1
                if ready:
                    self._ready.append(job)
                self._changed.notify_all()

    def _work(self) -> None:
        while (batch := self._next_batch()) is not None:
            if batch:
                self._run(batch)

    def _next_batch(self) -> list[_Job] | None:
        """Wait for jobs; return those to run next, or None after ``close``."""
        with self._changed:
            self._changed.wait_for(lambda: self._ready or (self._closed and not self._accepted))
            if not self._ready:
                return None
            self._changed.wait_for(
                lambda: len(self._ready) >= self._max_batch or not self._preparing, self._max_wait
            )
            run = self._ready[0].run
            batch: list[_Job] = []
            while self._ready and self._ready[0].run == run and len(batch) < self._max_batch:
                job = self._ready.popleft()
                if job.future.set_running_or_notify_cancel():
                    batch.append(job)
            return batch

    def _run(self, batch: list[_Job]) -> None:
        start = time.perf_counter()
        try:
            answered = list(zip(batch, batch[0].run([job.prepared for job in batch]), strict=True))
            seconds = time.perf_counter() - start
            self._pace += 0.2 * (seconds / len(batch) - self._pace)
            self._observe(len(batch), seconds)
        except BaseException as error:
            for job in batch:
                job.future.set_exception(error)
            return
        for job, result in answered:
            job.future.set_result(result)
