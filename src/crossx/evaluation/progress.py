"""Progress bars on stderr, shown only on a terminal and removed when the work is done; elsewhere there is a line."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.progress import track as rich_track
from rich.text import Text

from crossx.terminal import SILENT, paused_steps, step

T = TypeVar("T")


class RateColumn(ProgressColumn):
    """Images per second, over the last half minute; empty until there is a rate."""

    def render(self, task: Task) -> Text:
        """Return the column's text."""
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:.1f} images/s", style="progress.data.speed")


COLUMNS = (
    TextColumn("{task.description}"),
    BarColumn(10),
    MofNCompleteColumn(),
    RateColumn(),
    TimeRemainingColumn(),
)


def progress_bar(*columns: ProgressColumn, enabled: bool = True, **options: Any) -> Progress:
    """Return a bar of these columns; options as for ``rich.progress.Progress``."""
    console = Console(stderr=True)
    return Progress(
        *columns, console=console, transient=True, disable=not (enabled and _shows(console)), **options
    )


def _shows(console: Console) -> bool:
    return console.is_terminal and os.environ.get(SILENT) != "0"


def track(items: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
    """Show how many items, such as batches, are done.

    Args:
        items: Passed on unchanged.
        what: Title of the bar; empty for no bar.
        total: Number of items, where ``items`` has no length.
    """
    console = Console(stderr=True)
    if not (what and _shows(console)):
        # while a pipe or a log gets a line
        with step(what) if what else nullcontext():
            yield from items
        return
    with paused_steps():
        yield from rich_track(items, what, total, console=console, transient=True)


@contextmanager
def images_bar(what: str, total: int | None = None) -> Iterator[tuple[Progress, TaskID]]:
    """Show a bar with rate and remaining time; yields it and its task, for ``update`` and ``advance``."""
    with progress_bar(*COLUMNS) as bar, step(what) if bar.disable else paused_steps():
        yield bar, bar.add_task(what, total=total)
