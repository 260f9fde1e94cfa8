"""Progress bar of a training."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack

from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

from crossx.evaluation.progress import progress_bar
from crossx.terminal import paused_steps

DRAWN_PER_SECOND = 4


class Bar:
    """Progress bar of an epoch on stderr, if that is a terminal; a context manager.

    Args:
        enabled: Whether to show anything.
        numbers: Returns the current metrics, name to text; called only to draw.
    """

    def __init__(self, enabled: bool, numbers: Callable[[], Mapping[str, str]]) -> None:
        self._numbers = numbers
        # fits 80 characters with the metrics
        self._progress = progress_bar(
            TextColumn("{task.description}"),
            BarColumn(10),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True),
            TextColumn("left {task.fields[numbers]}"),
            enabled=enabled,
            refresh_per_second=DRAWN_PER_SECOND,
        )
        self._task = self._progress.add_task("", numbers="")
        self._next = 0.0
        self._steps = ExitStack()

    def __enter__(self) -> Bar:
        if not self._progress.disable:
            self._steps.enter_context(paused_steps())
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()
        self._steps.close()

    def start(self, description: str, total: int, done: int = 0) -> None:
        """Restart at ``done`` of ``total`` batches."""
        self._progress.reset(self._task, total=total, completed=done, description=description)

    def update(self, done: int, *, draw: bool = False) -> None:
        """Update the number of batches done; drawn a few times per second, or at once with ``draw``."""
        if not self._progress.disable and (draw or time.monotonic() >= self._next):
            self._next = time.monotonic() + 1 / DRAWN_PER_SECOND
            numbers = " ".join(f"{name}: {value}" for name, value in self._numbers().items())
            self._progress.update(self._task, completed=done, numbers=numbers, refresh=draw)
