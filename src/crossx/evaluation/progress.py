"""Progress bars on stderr, where that is a terminal; they disappear when the work is done."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

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

T = TypeVar("T")


class RateColumn(ProgressColumn):
    """Images per second, over the last half minute."""

    def render(self, task: Task) -> Text:
        """Show nothing until there is a rate."""
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:.1f} images/s", style="progress.data.speed")


COLUMNS = (
    TextColumn("{task.description}"),
    BarColumn(),
    MofNCompleteColumn(),
    RateColumn(),
    TimeRemainingColumn(),
)


def track(items: Iterable[T], what: str, total: int | None = None) -> Iterable[T]:
    """Show how many items, such as batches, are done.

    Args:
        items: Given as they are.
        what: Written before the bar; empty for no bar.
        total: How many items, where ``items`` has no length.
    """
    console = Console(stderr=True)
    return rich_track(
        items, what, total, console=console, transient=True, disable=not (what and console.is_terminal)
    )


@contextmanager
def images_bar(what: str, total: int | None = None) -> Iterator[tuple[Progress, TaskID]]:
    """Show a bar with rate and remaining time.

    Gives the bar and its task, for ``update`` and ``advance``.
    """
    console = Console(stderr=True)
    with Progress(*COLUMNS, console=console, transient=True, disable=not console.is_terminal) as bar:
        yield bar, bar.add_task(what, total=total)
