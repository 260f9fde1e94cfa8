"""``run.json`` of a training: its origin, and its status while it trains."""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from crossx.data.datamodule import DataModule
from crossx.data.images import printable
from crossx.data.index import SPLITS
from crossx.distributed import is_leader
from crossx.errors import CrossXError, Stopped, counted
from crossx.methods.registry import method_class, origin
from crossx.methods.start import Transfer
from crossx.runs import SCHEMA, Run, environment, resume_command, write_json
from crossx.training.config import Config
from crossx.training.fabric import stop_processes
from crossx.training.loop import Loop

KEPT = (
    "schema",
    "status",
    "method",
    "backbone",
    "dataset",
    "init",
    "imports",
    "seed",
    "precision",
    "images",
    "skipped",
    "excluded",
    "environment",
)
"""What a checkpoint holds of run.json, in case that is lost."""


def describe_run(
    config: Config, data: DataModule, transfer: Transfer | None, exclude_file: str | None
) -> dict[str, Any]:
    """Return ``run.json`` of a new run.

    Args:
        config: The options.
        data: The images.
        transfer: What the method took from another network, if it starts from one.
        exclude_file: The list of images to leave out that the user gave.
    """
    excluded = Counter(record.split for record in data.index.excluded)
    imports, package = origin(method_class(config.model.method))
    return {
        "schema": SCHEMA,
        "id": uuid.uuid4().hex,
        "status": "running",
        "method": config.model.method,
        "backbone": config.model.backbone,
        "pretrained": config.model.pretrained and config.init is None,
        "backbone_weights": config.model.backbone_weights,
        "init": transfer.record() if transfer else None,
        "tuned": config.tuned,
        "imports": [source.to_json() for source in imports],
        "dataset": data.index.name,
        "data_root": config.data.root,
        "seed": config.seed,
        "precision": config.trainer.precision,
        "selection": None,
        "images": {split: len(data.index.split(split)) for split in SPLITS},
        "skipped": [f"{printable(path)}: {reason}" for path, reason in data.skipped],
        "excluded": {"file": exclude_file, "images": {split: excluded[split] for split in SPLITS}}
        if exclude_file is not None
        else None,
        "data": asdict(config.data),
        "environment": environment(dict([package] if package else ())),
    }


def continue_description(run: Run, info: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``run.json`` of a resumed run.

    Args:
        run: The run.
        info: What ``describe_run`` returns now.
        before: Its ``run.json``.

    Raises:
        CrossXError: If the number of images has changed.
    """
    if before.get("images", info["images"]) != info["images"]:
        raise CrossXError(
            f"{run.path}: trained on {before['images']} images, but there are {info['images']} now. Resume a run on "
            "the same data."
        )
    now = {key: info[key] for key in ("data_root", "data", "imports")}
    return {**info, **before, **now, "status": "running"}


@contextmanager
def recording_status(loop: Loop, info: dict[str, Any]) -> Iterator[None]:
    """Keep ``status`` and ``selection`` in run.json up to date, and turn interruptions into one-line errors."""

    weights = loop.run_folder.weights
    model_before = _modified_at(weights)

    def record(status: str) -> None:
        if is_leader():
            # until a run that is trained for longer has its new model, the selection is that of the present one
            keeps = status != "finished" and model_before and model_before == _modified_at(weights)
            how, rows = loop.config.optim.selection, loop.history.rows
            selection = info["selection"] if keeps else loop.selection.describe(how, rows)
            ended = loop.history.ended if status == "finished" else None
            values = {**info, "status": status, "selection": selection, "ended": ended}
            write_json(loop.run_folder.info, values)

    record("running")
    ended = "failed"
    try:
        yield
        ended = "finished"
        record(ended)
    except (KeyboardInterrupt, SystemExit) as error:
        ended = "stopped"
        done = len(loop.history.rows)
        raise Stopped(
            f"stopped after {counted(done, 'complete epoch')}. "
            f"Continue with `{resume_command(loop.run_folder)}`."
        ) from error
    except torch.OutOfMemoryError as error:
        data = loop.config.data
        raise CrossXError(
            f"out of GPU memory at {data.batch_size} images of {data.image_size} pixels. Lower --data.batch_size "
            "(and raise --trainer.accumulate_grad_batches by the same factor) or --data.image_size, or use "
            "--trainer.precision bf16-mixed."
        ) from error
    finally:
        if ended != "finished":
            with suppress(CrossXError):  # on a full disk this fails too, and must not hide the first error
                record(ended)
            stop_processes(loop.fabric)


def _modified_at(path: Path) -> int | None:
    return path.stat().st_mtime_ns if path.is_file() else None
