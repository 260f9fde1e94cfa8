"""Lightning's loggers."""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from lightning.fabric.loggers.logger import Logger

from crossx.errors import UsageError
from crossx.extras import require
from crossx.runs import Run

log = logging.getLogger(__name__)


def check_loggers(names: Iterable[str]) -> None:
    """Check that the packages of the loggers are installed, before anything is read or downloaded.

    Raises:
        UsageError: If one is not.
    """
    for name in names:
        if name != "csv":
            require(f"logger {name!r}", name, extra=name)


def build_loggers(names: list[str], run: Run, run_id: str, steps_before: int) -> list[Logger]:
    """Build the loggers.

    Args:
        names: Among tensorboard, wandb and mlflow; others are ignored.
        run: The run.
        run_id: Id of the run, by which loggers continue a resumed run.
        steps_before: Optimiser steps of the checkpoint to resume from.

    Raises:
        UsageError: If one is not installed.
    """
    loggers: list[Logger] = []
    try:
        for name in names:
            if name == "tensorboard":
                from lightning.fabric.loggers.tensorboard import TensorBoardLogger

                _silence_writers()
                # the resumed run writes the events after the checkpoint again
                purge: dict[str, Any] = {"purge_step": steps_before + 1} if steps_before else {}
                loggers.append(TensorBoardLogger(run.path, "tensorboard", "", **purge))
            elif name == "wandb":
                from lightning.pytorch.loggers import WandbLogger

                loggers.append(
                    WandbLogger(
                        project="crossx", name=run.path.name, save_dir=run.path, id=run_id, resume="allow"
                    )
                )
            elif name == "mlflow":
                from lightning.pytorch.loggers import MLFlowLogger

                loggers.append(
                    MLFlowLogger(
                        experiment_name="crossx", run_name=run.path.name, save_dir=str(run.path / "mlruns")
                    )
                )
    except ModuleNotFoundError as error:
        raise UsageError(f"logger {name!r} needs {error.name}: pip install 'crossx[{name}]'.") from error
    return loggers


def log_all(loggers: list[Logger], values: Mapping[str, float], step: int) -> None:
    """Log values with every logger. One that cannot write leaves the list, with a line in the log."""
    for logger in tuple(loggers):
        with _leaving_on_errors(loggers, logger):
            logger.log_metrics(dict(values), step)


def finalize_all(loggers: list[Logger], status: str) -> None:
    """Write what is left, and close the loggers."""
    for logger in tuple(loggers):
        with _leaving_on_errors(loggers, logger):
            logger.finalize(status)


@contextmanager
def _leaving_on_errors(loggers: list[Logger], logger: Logger) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        # Lightning wraps errors of TensorBoard
        cause = error if isinstance(error, OSError) else error.__cause__
        if not isinstance(cause, OSError):
            raise
        loggers.remove(logger)
        name = type(logger).__name__.removesuffix("Logger").lower()
        log.warning(
            "%s: its files cannot be written (%s). The training continues without it; metrics.csv is complete.",
            name, cause.strerror or cause,
        )  # fmt: skip


@functools.cache
def _silence_writers() -> None:
    """Leave disk errors of TensorBoard's writing threads to ``log_all``, which meets them too, without a traceback."""
    report = threading.excepthook

    def hook(args: threading.ExceptHookArgs) -> None:
        of_tensorboard = type(args.thread).__module__.startswith("tensorboard")
        if not (of_tensorboard and isinstance(args.exc_value, OSError)):
            report(args)

    threading.excepthook = hook
