"""Training from a configuration to a finished run folder, and on from where a run was stopped."""

from __future__ import annotations

import logging
import signal
import threading
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning.fabric import seed_everything

from crossx.data.catalog import read_configured
from crossx.data.config import Sampling
from crossx.data.datamodule import DataModule
from crossx.data.index import SPLITS, DatasetIndex
from crossx.data.transforms import preprocessing_for
from crossx.distributed import is_leader
from crossx.errors import CrossXError, Stopped, UsageError
from crossx.evaluation.calibration import describe_calibration, write_temperature
from crossx.evaluation.classes import check_classes
from crossx.evaluation.run import evaluate
from crossx.methods.base import Method, create_method
from crossx.methods.weights import build_method, describe, load_weights, save_weights
from crossx.runs import SCHEMA, Run, check_writable, environment, write_json, write_text
from crossx.schema import check_backbone_args, check_model
from crossx.training.checkpoints import read_checkpoint, read_newest
from crossx.training.config import Config
from crossx.training.loop import Loop, quiet_lightning

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
    if is_leader():
        _claim(run.path)
    try:
        return _train(_with_absolute_paths(config), run)
    except BaseException:
        with suppress(OSError):
            # only a folder that is still empty: another try may then take the same --output
            run.path.rmdir()
        raise


def resume(path: str | Path, *, root: str | Path | None = None) -> Run:
    """Continue a run that was stopped, from its newest checkpoint.

    On the CPU the result is, bit for bit, that of a run that was never stopped. A run that was stopped before its
    first checkpoint starts over with the same seed.

    Args:
        path: The run folder, or a checkpoint in it; it may have been moved.
        root: The data, where they no longer lie where the run found them.

    Raises:
        UsageError: If there is no run, it is finished, or another version of crossx began it.
        CrossXError: As ``fit``, or if the images or classes are others than before.
    """
    run = _find(Path(path))
    config = replace(Config.from_yaml(run.config), output=str(run.path))
    if root is not None:
        config = _with_absolute_paths(replace(config, data=replace(config.data, root=str(root))))
    before = run.read_info()
    if before.get("status") == "finished":
        raise UsageError(f"{run.path}: this run is finished; train a new one with another --output.")
    return _train(config, run, before)


def _train(config: Config, run: Run, before: Mapping[str, Any] | None = None) -> Run:
    """Train from the start, or from the newest checkpoint of a run whose ``run.json`` was ``before``."""
    checkpoint = None if before is None else read_newest(run)
    if checkpoint is None:
        check_backbone_args(config.model.backbone_args)
    index = read_configured(config.data)
    seed_everything(config.seed, verbose=False)
    if checkpoint is None:
        method = _create_method(config, index)
        preprocessing = preprocessing_for(config.data, method.backbone.data_config)
        spec = describe(
            method,
            classes=index.classes,
            preprocessing=preprocessing,
            dataset=index.name,
            levels=dict(index.levels),
        )
    else:
        # with random weights, which the checkpoint's replace
        spec = run.read_spec()
        check_classes(spec.classes, index.classes, index.name)
        method, preprocessing = build_method(spec), spec.preprocessing
    check_model(spec.to_json(), "the run could not be loaded afterwards")
    options = replace(config.data, sampling=choose_sampling(config.data.sampling, method))
    data = DataModule(index, preprocessing, options, config.seed)
    data.check_images()
    data.open_caches()
    info = _describe(config, data)
    if before is not None and checkpoint is not None:
        if before.get("images", info["images"]) != info["images"]:
            raise CrossXError(
                f"{run.path}: trained on {before['images']} images, and now there are {info['images']}: a run can "
                "only be resumed on the same data."
            )
        info = {**before, "data_root": info["data_root"], "data": info["data"], "status": "running"}
    monitor = _monitor(config, data)
    with quiet_lightning():
        loop = Loop(method, data, config, run, run_id=info["id"], monitor=monitor, checkpoint=checkpoint)
        info["selection"] = _selection(loop)
        if is_leader():
            _remove_leftovers(run)
            write_text(run.config, config.to_yaml())
            write_json(run.spec, spec.to_json())
            write_json(run.info, info)
        with _recorded(loop, info):
            loop.run()
            if is_leader():
                loop.history.write()
                _warn_of_a_lagging_average(loop)
                load_weights(method, run.best if loop.best else run.last)
                save_weights(method, run.weights)
                info["calibration"] = _calibrate(loop)
    return run


def choose_sampling(asked: Sampling | None, method: Method) -> Sampling:
    """Return how training images are drawn: as asked for, else as the method needs it.

    Raises:
        UsageError: If another way is asked for than the method needs.
    """
    needed = method.sampling
    if asked and needed and asked != needed:
        raise UsageError(
            f"method {method.name!r} needs data.sampling {needed}, not {asked}: leave the option out, or give {needed}."
        )
    return asked or needed or "uniform"


def _create_method(config: Config, index: DatasetIndex) -> Method:
    model = config.model
    method = create_method(
        model.method,
        backbone=model.backbone,
        num_classes=len(index.classes),
        pretrained=model.pretrained,
        backbone_weights=model.backbone_weights,
        backbone_args=model.backbone_args,
        image_size=config.data.image_size,
        **model.options,
    )
    method.check_image_size(config.data.image_size)
    return method


def _monitor(config: Config, data: DataModule) -> str | None:
    """Return the column that chooses the best epoch; None where the last one is taken."""
    if config.optim.selection == "best_on_test":
        if not data.index.split("test"):
            raise UsageError("optim.selection best_on_test needs test images, and the dataset has none.")
        return "test/top1"
    if config.optim.selection == "last":
        return None
    trainer, missing = config.trainer, ""
    if not data.holds_out:
        missing = "There are no validation images"
    elif trainer.limit_val_batches == 0:
        missing = "trainer.limit_val_batches 0 switches validation off"
    elif trainer.check_val_every_n_epoch > trainer.max_epochs:
        missing = f"trainer.check_val_every_n_epoch {trainer.check_val_every_n_epoch} is more than trainer.max_epochs"
    if missing:
        log.warning("%s: the last epoch's weights become the model.", missing)
    return None if missing else "val/top1"


def _describe(config: Config, data: DataModule) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "id": uuid.uuid4().hex,
        "status": "running",
        "method": config.model.method,
        "backbone": config.model.backbone,
        "pretrained": config.model.pretrained,
        "backbone_weights": config.model.backbone_weights,
        "dataset": data.index.name,
        "data_root": config.data.root,
        "seed": config.seed,
        "selection": None,
        "images": {split: len(data.index.split(split)) for split in SPLITS},
        "skipped": [f"{path}: {reason}" for path, reason in data.skipped],
        "data": asdict(config.data),
        "environment": environment(),
    }


def _selection(loop: Loop) -> dict[str, Any]:
    """Say how the weights of the run are chosen, and, once there is one, which epoch it is."""
    rows, best = loop.history.rows, loop.best
    if loop.monitor is None or (rows and not best):
        return {"how": "last", "split": None, "epoch": rows[-1]["epoch"] if rows else None, "value": None}
    return {
        "how": loop.config.optim.selection,
        "split": loop.monitor.split("/")[0],
        "metric": "top1",
        "epoch": best.get("epoch"),
        "value": best.get("value"),
    }


def _warn_of_a_lagging_average(loop: Loop) -> None:
    """Warn where the weights themselves are clearly better on validation images than their average.

    They are only looked at where the training accuracy is far above that of the average.
    """
    data, rows, best = loop.data, loop.history.rows, loop.best
    if loop.average is None or not rows or not data.holds_out:
        return
    row = next((row for row in rows if row["epoch"] == best.get("epoch")), rows[-1])
    if "val/top1" not in row or row["train/top1"] - row["val/top1"] < SUSPICIOUS_GAP:
        return
    weights = read_checkpoint(loop.run_folder.best if best else loop.run_folder.last)["trained"]
    loop.task.load_state_dict(weights)
    outputs = evaluate(
        loop.method, data.eval_loader("val", dealt=False), loop.device, normalize=data.normalize
    )
    top1 = float((outputs.logits.argmax(1) == outputs.targets).float().mean())
    if top1 - row["val/top1"] >= LAGGING_BY:
        log.warning(
            "the model is an average of the weights (optim.ema_decay %g) that lags behind: %.1f%% on validation, "
            "the weights themselves %.1f%%. Train longer, lower optim.ema_decay, or set it to null.",
            loop.config.optim.ema_decay, 100 * row["val/top1"], 100 * top1,
        )  # fmt: skip


def _calibrate(loop: Loop) -> dict[str, Any] | None:
    """Fit the temperature of the selected weights where images are held out for validation."""
    data = loop.data
    if not data.holds_out:
        return None
    outputs = evaluate(
        loop.method,
        # the other ranks have left
        data.eval_loader("val", dealt=False),
        loop.device,
        normalize=data.normalize,
        progress="Calibrating" if loop.config.trainer.enable_progress_bar else "",
    )
    described = describe_calibration(outputs.logits, outputs.targets, dataset=data.index.name, split="val")
    write_temperature(loop.run_folder, described["temperature"])
    return described


@contextmanager
def _recorded(loop: Loop, info: dict[str, Any]) -> Iterator[None]:
    """Keep ``status`` and ``selection`` of run.json true, and turn what can happen into one line."""
    status = "failed"

    def record() -> None:
        if is_leader():
            write_json(loop.run_folder.info, {**info, "status": status, "selection": _selection(loop)})

    try:
        with _sigterm_interrupts():
            yield
        status = "finished"
        record()
    except (KeyboardInterrupt, SystemExit) as error:
        status = "stopped"
        done = len(loop.history.rows)
        raise Stopped(
            f"stopped after {done} complete epochs; continue with `crossx fit --resume {loop.run_folder.path}`."
        ) from error
    except torch.OutOfMemoryError as error:
        data = loop.config.data
        raise CrossXError(
            f"out of GPU memory at {data.batch_size} images of {data.image_size} pixels: lower --data.batch_size "
            "(and raise --trainer.accumulate_grad_batches by as much) or --data.image_size, or use "
            "--trainer.precision bf16-mixed."
        ) from error
    finally:
        if status != "finished":
            # on a full disk this fails as well, and must not hide the first error
            with suppress(CrossXError):
                record()
            loop.stop_processes()


@contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """Take SIGTERM as Ctrl-C is taken; a signal can only be caught in the main thread."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _claim(path: Path) -> None:
    if path.is_dir() and any(path.iterdir()):
        held = "holds a run" if Run(path).config.is_file() else "is not empty"
        more = f"continue it with `crossx fit --resume {path}`, or " if held == "holds a run" else ""
        raise UsageError(f"{path} {held} already: {more}choose another --output.")
    check_writable(path)


def _find(path: Path) -> Run:
    for folder in (path, path.parent, path.parent.parent) if path.is_file() else (path,):
        if Run(folder).config.is_file():
            return Run(folder)
    raise UsageError(
        f"{path}: no run to resume (there is no config.yaml). `crossx fit --output {path}` makes one."
    )


def _with_absolute_paths(config: Config) -> Config:
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
