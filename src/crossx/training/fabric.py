"""Set up Lightning's Fabric: devices, processes, precision."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from lightning.fabric import Fabric
from lightning.fabric.strategies.single_device import SingleDeviceStrategy
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.warnings import PossibleUserWarning

from crossx.errors import UsageError
from crossx.terminal import later_rank
from crossx.training.precision import resolve_precision
from crossx.training.sections import TrainerConfig


def build_fabric(options: TrainerConfig) -> Fabric:
    """Build Lightning's Fabric, which manages devices, processes and precision.

    Raises:
        UsageError: If the machine lacks the requested devices or precision, or if this is the only process of the
            training, but the environment says that it is not the first one.
    """
    on_cpu = options.accelerator == "cpu" or not torch.cuda.is_available()
    cores = os.cpu_count() or 1
    # Lightning itself checks the number of GPUs
    if on_cpu and str(options.devices).isdecimal() and int(options.devices) > cores:  # type: ignore[arg-type]
        raise UsageError(
            f"trainer.devices {options.devices}: there is no GPU, and the CPU has {cores} cores."
        )
    if options.benchmark is not None or options.deterministic:
        torch.backends.cudnn.benchmark = bool(options.benchmark)
    if options.deterministic:
        torch.use_deterministic_algorithms(True, warn_only=options.deterministic == "warn")
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    try:
        fabric = Fabric(
            accelerator=options.accelerator,
            strategy=options.strategy,
            devices=options.devices,
            num_nodes=options.num_nodes,
            precision=cast(Any, resolve_precision(options)[0].precision),
        )
    except (ImportError, RuntimeError, TypeError, ValueError, MisconfigurationException) as error:
        raise UsageError(f"trainer: {' '.join(str(error).split())}") from error
    if isinstance(fabric.strategy, SingleDeviceStrategy) and (name := later_rank()):
        # it would write no model
        raise UsageError(
            f"{name} is {os.environ[name]}, as in a later process of a training of several, but this one trains alone: "
            f"give --trainer.devices and --trainer.num_nodes, or unset {name}."
        )
    return fabric


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Silence Lightning's notices and advice."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PossibleUserWarning)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def stop_processes(fabric: Fabric) -> None:
    """Stop the processes started by this one, which would wait for it forever."""
    started = getattr(getattr(fabric.strategy, "launcher", None), "procs", [])
    processes = list(started)
    # otherwise Lightning's observer takes their end for a failure, and kills this process
    started.clear()
    for process in processes:
        process.kill()
