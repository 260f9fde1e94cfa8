"""Training from a configuration to a finished run folder, and on from where a run was stopped."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch import Trainer
from torch import Tensor

from crossx.data.datamodule import DataModule
from crossx.errors import CrossXError, Stopped, UsageError
from crossx.evaluation.calibration import describe_calibration, write_temperature
from crossx.evaluation.run import evaluate
from crossx.methods.base import Method
from crossx.methods.checkpoint import load_weights, save_weights
from crossx.runs import SCHEMA, Run, environment, storage_error, write_json, write_text
from crossx.training.callbacks import Checkpoints
from crossx.training.checkpoint_io import read_checkpoint
from crossx.training.config import Config
from crossx.training.heads import fit_heads
from crossx.training.history import History
from crossx.training.session import Session, build_task, build_trainer, open_session, quiet_lightning
from crossx.training.task import Task

SUSPICIOUS_GAP = 0.1
"""Training minus validation top-1 from which on the average of the weights is compared with the weights."""

LAGGING_BY = 0.05
"""Validation top-1 that the average must lose to be warned of."""

log = logging.getLogger(__name__)


def fit(config: Config) -> Run:
    """Train a network and leave a finished run folder.

    Args:
        config: The options; ``config.run_path()`` is the folder to make.

    Returns:
        The run: ``model.safetensors`` holds the weights of the selected epoch.

    Raises:
        UsageError: If an option cannot work or the folder holds something.
        CrossXError: If data, network, disk or GPU memory fail, or the loss is not finite.
        Stopped: After Ctrl-C or SIGTERM.
    """
    run = Run(config.run_path())
    if _is_leader():
        _claim(run.path)
    config = _anchored(config)
    try:
        session = open_session(config, run)
        info = _describe(session)
        parts = _assemble(session, info, resume=False)
        _write(session, info)
    except BaseException:
        with suppress(OSError):
            # only a folder that is still empty: another try may then take the same --output
            run.path.rmdir()
        raise
    return _train(session, info, parts, resume=False)


def resume(path: str | Path, *, root: str | Path | None = None) -> Run:
    """Continue a run that was stopped, from the last complete epoch.

    On the CPU the result is, bit for bit, that of a run that was never stopped. A run that was stopped before its
    first checkpoint starts over with the same seed.

    Args:
        path: The run folder, or a checkpoint in it; it may have been moved.
        root: The data, where they no longer lie where the run found them.

    Raises:
        UsageError: If there is no run, or it is finished.
        CrossXError: As ``fit``, or if the images or classes are others than before.
    """
    run = _find(Path(path))
    config = replace(Config.from_yaml(run.config), output=str(run.path))
    if root is not None:
        config = _anchored(replace(config, data=replace(config.data, root=str(root))))
    before = run.read_info()
    if before.get("status") == "finished":
        raise UsageError(f"{run.path}: this run is finished; train a new one with another --output.")
    goes_on = run.last.is_file()
    if not goes_on:
        session = open_session(config, run)
        info = _describe(session)
    else:
        session = open_session(config, run, run.read_spec())
        if before.get("images", session.images) != session.images:
            raise CrossXError(
                f"{run.path}: trained on {before['images']} images, and now there are {session.images}: a run can "
                "only be resumed on the same data."
            )
        moved = {"data_root": config.data.root, "data": asdict(config.data)}
        info = {**before, **moved, "status": "running"}
    parts = _assemble(session, info, resume=goes_on)
    if _is_leader():
        _remove_leftovers(run)
    _write(session, info)
    return _train(session, info, parts, resume=goes_on)


class _Parts(NamedTuple):
    """What trains a session. All that can be refused is refused while it is assembled."""

    history: History
    checkpoints: Checkpoints
    task: Task
    trainer: Trainer


def _assemble(session: Session, info: dict[str, Any], *, resume: bool) -> _Parts:
    run = session.run
    history = History(run, quiet=session.config.trainer.get("enable_progress_bar") is False)
    checkpoints = Checkpoints(run, history, session.monitor)
    steps = int(read_checkpoint(run.last)["global_step"]) if resume else 0
    with quiet_lightning():
        task = build_task(session)
        trainer = build_trainer(session, history, checkpoints, run_id=info["id"], steps_before=steps)
    return _Parts(history, checkpoints, task, trainer)


def _train(session: Session, info: dict[str, Any], parts: _Parts, *, resume: bool) -> Run:
    run = session.run
    history, checkpoints, task, trainer = parts
    with _recorded(session, info, checkpoints), quiet_lightning():
        if not resume:
            _prepare(session, trainer)
        trainer.fit(task, datamodule=session.data, ckpt_path=run.last if resume else None)
        if trainer.is_global_zero:
            _warn_of_a_lagging_average(session, checkpoints, trainer)
            _finish(session, history, checkpoints)
            info["calibration"] = _calibrate(session, trainer)
    return run


def _warn_of_a_lagging_average(session: Session, checkpoints: Checkpoints, trainer: Trainer) -> None:
    """Warn where the weights themselves are clearly better on validation images than their average.

    They are only looked at where the training accuracy is far above that of the average.
    """
    run, data, decay = session.run, session.data, session.config.optim.ema_decay
    rows = checkpoints.history.rows
    if decay is None or not rows or not data.holds_out:
        return
    best = checkpoints.best
    row = next((row for row in rows if row["epoch"] == best.get("epoch")), rows[-1])
    if "val/top1" not in row or row["train/top1"] - row["val/top1"] < SUSPICIOUS_GAP:
        return
    path = run.best if best else run.last
    state = read_checkpoint(path)["current_model_state"]
    session.method.load_state_dict(
        {name.removeprefix("method."): value for name, value in state.items() if name.startswith("method.")}
    )
    outputs = evaluate(
        session.method,
        data.eval_loader("val", dealt=False),
        trainer.strategy.root_device,
        normalize=data.normalize,
    )
    top1 = float((outputs.logits.argmax(1) == outputs.targets).float().mean())
    if top1 - row["val/top1"] >= LAGGING_BY:
        log.warning(
            "the model is an average of the weights (optim.ema_decay %g) that lags behind: %.1f%% on validation, "
            "the weights themselves %.1f%%. Train longer, lower optim.ema_decay, or set it to null.",
            decay, 100 * row["val/top1"], 100 * top1,
        )  # fmt: skip


def _finish(session: Session, history: History, checkpoints: Checkpoints) -> None:
    run = session.run
    if not run.last.is_file():
        raise CrossXError(
            f"{run.path}: training ended before its first step: give --trainer.max_epochs at least 1."
        )
    history.write()
    load_weights(session.method, run.best if checkpoints.best else run.last)
    save_weights(session.method, run.weights)


def _calibrate(session: Session, trainer: Trainer) -> dict[str, Any] | None:
    """Fit the temperature of the selected weights where images are held out for validation."""
    data = session.data
    if not data.holds_out:
        return None
    outputs = evaluate(
        session.method,
        # the other ranks have left
        data.eval_loader("val", dealt=False),
        trainer.strategy.root_device,
        normalize=data.normalize,
        progress="Calibrating" if session.config.trainer.get("enable_progress_bar") is not False else "",
    )
    described = describe_calibration(outputs.logits, outputs.targets, dataset=data.index.name, split="val")
    write_temperature(session.run, described["temperature"])
    return described


def _prepare(session: Session, trainer: Trainer) -> None:
    # before Lightning copies the weights for an average; each rank has all images, so nothing is to be gathered
    method, data, device = session.method, session.data, trainer.strategy.root_device
    if type(method).prepare is not Method.prepare:
        method.to(device).prepare(_all_batches(data, device))
    views = session.config.optim.fit_heads
    if views and not fit_heads(method.to(device), lambda: _all_batches(data, device, epochs=views)):
        log.warning(
            "optim.fit_heads: method %r has no linear heads to fit; they start at random.", method.name
        )


def _all_batches(
    data: DataModule, device: torch.device, *, epochs: int = 1
) -> Iterator[tuple[Tensor, Tensor]]:
    # a generator: no worker starts for a method whose options leave nothing to prepare
    loader = data.whole_train_loader()
    sampler: Any = loader.sampler
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        for images, targets in loader:
            yield data.normalize(images.to(device)), targets.to(device)


def _selection(session: Session, checkpoints: Checkpoints | None = None) -> dict[str, Any]:
    """Say how the weights of the run are chosen, and, once there is one, which epoch it is."""
    rows = checkpoints.history.rows if checkpoints else []
    best = checkpoints.best if checkpoints else {}
    if session.monitor is None or (rows and not best):
        return {"how": "last", "split": None, "epoch": rows[-1]["epoch"] if rows else None, "value": None}
    return {
        "how": session.config.optim.selection,
        "split": session.monitor.split("/")[0],
        "metric": "top1",
        "epoch": best.get("epoch"),
        "value": best.get("value"),
    }


def _describe(session: Session) -> dict[str, Any]:
    config = session.config
    return {
        "schema": SCHEMA,
        "id": uuid.uuid4().hex,
        "status": "running",
        "method": config.model.method,
        "backbone": config.model.backbone,
        "pretrained": config.model.pretrained,
        "backbone_weights": config.model.backbone_weights,
        "dataset": session.data.index.name,
        "data_root": config.data.root,
        "seed": config.seed,
        "selection": _selection(session),
        "images": session.images,
        "skipped": [f"{path}: {reason}" for path, reason in session.data.skipped],
        "data": asdict(config.data),
        "environment": environment(),
    }


def _write(session: Session, info: dict[str, Any]) -> None:
    if _is_leader():
        run = session.run
        write_text(run.config, session.config.to_yaml())
        write_json(run.spec, session.spec.to_json())
        write_json(run.info, info)


@contextmanager
def _recorded(session: Session, info: dict[str, Any], checkpoints: Checkpoints) -> Iterator[None]:
    """Keep ``status`` and ``selection`` of run.json true, and turn what can happen into one line."""
    run = session.run
    status = "failed"

    def record() -> None:
        if _is_leader():
            write_json(run.info, {**info, "status": status, "selection": _selection(session, checkpoints)})

    try:
        yield
        status = "finished"
        record()
    except (KeyboardInterrupt, SystemExit) as error:
        # Lightning turns both signals into SystemExit
        status = "stopped"
        done = len(checkpoints.history.rows)
        raise Stopped(
            f"stopped after {done} complete epochs; continue with `crossx fit --resume {run.path}`."
        ) from error
    except torch.OutOfMemoryError as error:
        data = session.config.data
        raise CrossXError(
            f"out of GPU memory at {data.batch_size} images of {data.image_size} pixels: lower --data.batch_size "
            "(and raise --trainer.accumulate_grad_batches by as much) or --data.image_size, or use "
            "--trainer.precision bf16-mixed."
        ) from error
    except MisconfigurationException as error:
        raise UsageError(f"trainer: {' '.join(str(error).split())}") from error
    finally:
        if status != "finished":
            # on a full disk this fails as well, and must not hide the first error
            with suppress(CrossXError):
                record()


def _claim(path: Path) -> None:
    if path.is_dir() and any(path.iterdir()):
        held = "holds a run" if Run(path).config.is_file() else "is not empty"
        more = f"continue it with `crossx fit --resume {path}`, or " if held == "holds a run" else ""
        raise UsageError(f"{path} {held} already: {more}choose another --output.")
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / ".write"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise storage_error(path, error) from error


def _find(path: Path) -> Run:
    for folder in (path, path.parent, path.parent.parent) if path.is_file() else (path,):
        if Run(folder).config.is_file():
            return Run(folder)
    raise UsageError(
        f"{path}: no run to resume (there is no config.yaml). `crossx fit --output {path}` makes one."
    )


def _anchored(config: Config) -> Config:
    """Make paths absolute: a run is also resumed and tested from other working folders."""
    root, weights = config.data.root, config.model.backbone_weights
    return replace(
        config,
        data=replace(config.data, root=str(Path(root).absolute()) if root else None),
        model=replace(config.model, backbone_weights=str(Path(weights).absolute()) if weights else None),
    )


def _remove_leftovers(run: Run) -> None:
    # temporary files of a process that was killed while it wrote
    for folder in (run.path, run.checkpoints):
        for leftover in folder.glob(".*.tmp"):
            leftover.unlink(missing_ok=True)


def _is_leader() -> bool:
    # set by Lightning from the launcher's environment variables, before there is a process group
    return getattr(rank_zero_only, "rank", 0) == 0
