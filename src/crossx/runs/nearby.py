"""The run that a wrong path probably means."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path

from crossx.commands import command
from crossx.errors import counted

RUNS = Path("runs")
"""Where ``crossx fit`` creates runs by default."""

MAX_ENTRIES = 2000
"""Entries of a folder that are looked at."""

CLOSE = 0.6
"""Similarity of names from which a slip is likely; ``difflib``'s default."""


def nearest_run(given: Path) -> str:
    """Return `` Did you mean 'runs/mine'?`` for the run, or the checkpoint, closest to a path that does not exist.

    The slip may be in the last name or in that of the folder around it; a single name may be that of a run in
    ``runs``. An empty string if nothing is close.
    """
    folders = [given.parent] if given.parent.is_dir() else _close(given.parent, given.parent.parent)
    if given == Path(given.name) and RUNS.is_dir():
        folders.append(RUNS)
    if given.suffix == ".ckpt":
        folders += [folder / "checkpoints" for folder in folders]
    found = [path for folder in folders for path in _entries(folder) if _may_be_meant(path, given)]
    by_name = {path.name.casefold(): path for path in reversed(found) if path != given}
    close = difflib.get_close_matches(given.name.casefold(), by_name, n=1, cutoff=CLOSE)
    return f" Did you mean {str(by_name[close[0]])!r}?" if close else ""


def run_around(given: Path) -> str:
    """Return what to do about a folder that is no run: the run that it is in, the runs in it, or how to make one."""
    for folder in (given / "..", given / "../.."):
        if os.path.isfile(folder / "model.json"):
            return f" It is in the run {os.path.normpath(folder)}: give that, or a checkpoint in it."
    entries = [*_entries(given)]
    runs = [folder for folder in entries if os.path.isfile(folder / "model.json")]
    if runs:
        which = f"give {runs[0]}" if len(runs) == 1 else f"give one, such as {runs[0]}"
        return f" It holds {counted(len(runs), 'run')}: {which}."
    if entries:
        return " Give a folder that `crossx fit` wrote."
    return f" `{command('fit', '--output', given)}` makes one."


def _may_be_meant(path: Path, given: Path) -> bool:
    if given.suffix == ".ckpt":
        return path.suffix == ".ckpt"
    # not Path.is_file, which raises for what the user may not read
    return any(os.path.isfile(path / name) for name in ("model.json", "config.yaml"))


def _close(given: Path, folder: Path) -> list[Path]:
    """Return the folders in ``folder`` whose names are close to a missing one's, the closest first."""
    by_name = {path.name.casefold(): path for path in _entries(folder) if os.path.isdir(path)}
    names = difflib.get_close_matches(given.name.casefold(), by_name, cutoff=CLOSE)
    return [by_name[name] for name in names]


def _entries(folder: Path) -> Iterator[Path]:
    with suppress(OSError):
        yield from sorted(islice(folder.iterdir(), MAX_ENTRIES))
