"""Read a run's files, also after damage; delete what a training that starts over has left."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from crossx.commands import quoted
from crossx.distributed import is_leader
from crossx.errors import CrossXError, UsageError
from crossx.methods.weights import check_weights
from crossx.recipes import SECTIONS
from crossx.runs import Run, RunFileError, check_files, read_config, resume_command, write_text
from crossx.training.checkpoints import read_newest, read_resumable
from crossx.training.config import Config

T = TypeVar("T")
LEFTOVERS = (".*.tmp", ".tmp??????")
"""Temporary files of this package and of safetensors, which a kill leaves."""

log = logging.getLogger(__name__)


def require_files(run: Run) -> None:
    """Refuse a run with folders in the place of its files, or the other way round."""
    files = (run.config, run.spec, run.info, run.weights, run.images)
    checkpoints = (run.last, run.previous, run.best, run.checksums)
    check_files(*files, *checkpoints, *_histories(run))
    if run.checkpoints.exists() and not run.checkpoints.is_dir():
        raise CrossXError(f"{run.checkpoints}: a file where the run has a folder. Move it away.")


def require_unfinished(run: Run) -> None:
    """Refuse a finished run, unless a file of it is damaged: it is made again from the checkpoints."""
    try:
        finished = run.read_info().get("status") == "finished"
    except CrossXError:
        return
    if not finished:
        return
    try:
        run.read_spec()
        check_weights(run.weights)
    except (CrossXError, OSError):
        log.warning("%s: the model is damaged or missing. It is made again from the checkpoints.", run.path)
        return
    try:
        read_whole_config(run)
    except UsageError:
        # of another version, which is no damage
        pass
    except CrossXError:
        # restored with what else the end of a training writes
        return
    raise UsageError(
        f"{run.path}: this run is finished. Train it for longer with --trainer.max_epochs N, or start a new run "
        f"from it with --init {quoted(run.path)}."
    )


def read_saved(run: Run, chosen: Path | None) -> dict[str, Any] | None:
    """Read the chosen checkpoint, by default the newest intact one; None if the run has none."""
    if chosen is None:
        return read_newest(run)
    try:
        checkpoint = read_resumable(chosen)
    except UsageError:
        raise
    except CrossXError as error:
        raise CrossXError(f"{error} `{resume_command(run)}` takes the newest intact one.") from error
    log.info("the run goes back to %s: epoch %d, step %d.", chosen, checkpoint["epoch"], checkpoint["step"])
    return checkpoint


def read_or_restore(
    path: Path, read: Callable[[], T], saved: Mapping[str, Any] | None, default: T | None = None
) -> T:
    """Read a file of the run; if it is damaged or lost, write it again from the checkpoint, or take the default."""
    try:
        return read()
    except UsageError:
        raise
    except CrossXError as error:
        problem = error.problem if isinstance(error, RunFileError) else str(error)
        text = (saved or {}).get("files", {}).get(path.name)
        if text is None and default is not None:
            return default
        if text is None:
            raise CrossXError(
                f"{problem} Put back a copy of the file, or train a new run with another --output."
            ) from error
        if is_leader():
            log.warning("%s It is restored from the checkpoint.", problem)
            write_text(path, text)
        return read()


def read_whole_config(run: Run) -> Config:
    """Read ``config.yaml``, and find out if its end was lost."""
    values = read_config(run.config)
    # those that every version writes; output comes last
    if missing := [name for name in (*SECTIONS, "seed", "output") if name not in values]:
        raise CrossXError(f"{run.config}: cut off, or not of a run (no {', '.join(missing)}).")
    return Config.from_yaml(run.config)


def read_existing_info(run: Run) -> dict[str, Any]:
    """Read ``run.json``, which must exist."""
    if not run.info.is_file():
        raise CrossXError(f"{run.info}: no such file.")
    return run.read_info()


def has_progress(run: Run, info: Mapping[str, Any]) -> bool:
    """Whether a run without an intact checkpoint has had one."""
    written = [path for path in (run.weights, *_histories(run)) if path.exists()]
    if run.checkpoints.is_dir():
        written += [path for path in run.checkpoints.iterdir() if not is_leftover(path)]
    return bool(written) or (info.get("selection") or {}).get("epoch") is not None


def clear(run: Run) -> None:
    """Delete what an earlier training in this folder has written, its TensorBoard events included."""
    for path in (run.checkpoints, run.weights, run.profile, *_histories(run), run.path / "tensorboard"):
        if path.exists():
            # at once, so that a kill leaves no folder with some of its files
            path.rename(path.with_name(f".{path.name}.old.tmp"))
            remove_leftovers(run)


def is_leftover(path: Path) -> bool:
    """Whether a file or folder is a temporary one."""
    return any(path.match(pattern) for pattern in LEFTOVERS)


def remove_leftovers(run: Run) -> None:
    """Remove the temporary files of a process that was killed while writing."""
    for folder in (run.path, run.checkpoints):
        for leftover in filter(is_leftover, folder.iterdir() if folder.is_dir() else ()):
            if leftover.is_dir():
                shutil.rmtree(leftover)
            else:
                leftover.unlink(missing_ok=True)


def _histories(run: Run) -> tuple[Path, ...]:
    return run.path / "metrics.json", run.path / "metrics.csv"
