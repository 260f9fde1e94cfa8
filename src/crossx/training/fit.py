"""Train a method, or resume a training, and write a run folder."""

from __future__ import annotations

import signal
import threading
import uuid
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
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
from crossx.evaluation.classes import check_classes
from crossx.methods.base import Method, create_method
from crossx.methods.weights import build_method, describe
from crossx.runs import SCHEMA, Run, environment, is_lock, is_utf8, locked_folder, write_json, write_text
from crossx.schema import check_backbone_args, check_model
from crossx.training.checkpoints import read_newest
from crossx.training.config import Config
from crossx.training.finish import choose_monitor, describe_selection, finish
from crossx.training.loggers import check_loggers
from crossx.training.loop import Loop, quiet_lightning


def fit(config: Config) -> Run:
    """Train a network and return its finished run.

    Args:
        config: The options; ``config.run_path()`` is the folder to create.

    Returns:
        The run. ``model.safetensors`` holds the weights of the selected epoch.

    Raises:
        UsageError: If an option cannot work, the folder is not empty, or a path is not UTF-8.
        CrossXError: If data, network, disk or GPU memory fail, the loss is not finite, or another process trains in
            the folder.
        Stopped: On Ctrl-C or SIGTERM.
    """
    run = Run(config.run_path())
    for option, path in (("output", run.path), ("data.root", Path(config.data.root or "").absolute())):
        if not is_utf8(path):
            raise UsageError(
                f"{str(path)!r}: the path is not valid UTF-8. Rename it, give a link as --{option}, or set "
                "LC_ALL=C.UTF-8 if the locale is not UTF-8."
            )
    try:
        with _locked(run.path):
            if is_leader():
                _require_empty(run.path)
            return _train(_with_absolute_paths(config), run)
    except BaseException:
        with suppress(OSError):
            run.path.rmdir()  # only if it is still empty, so that the same --output can be given again
        raise


def resume(path: str | Path, *, root: str | Path | None = None) -> Run:
    """Continue a stopped run from its newest checkpoint.

    On a CPU the result is bit for bit that of an uninterrupted run. A run without a checkpoint starts over with the
    same seed.

    Args:
        path: The run folder, or a checkpoint in it; the folder may have been moved.
        root: The data's folder, if it has moved.

    Raises:
        UsageError: If there is no run, it is finished, or another version of crossx started it.
        CrossXError: As ``fit``, or if the images or classes have changed.
    """
    run = _find_run(Path(path))
    with _locked(run.path):
        config = replace(Config.from_yaml(run.config), output=str(run.path))
        if root is not None:
            config = _with_absolute_paths(replace(config, data=replace(config.data, root=str(root))))
        before = run.read_info()
        if before.get("status") == "finished":
            raise UsageError(f"{run.path}: this run is finished. Train a new one with another --output.")
        return _train(config, run, before)


def _train(config: Config, run: Run, before: Mapping[str, Any] | None = None) -> Run:
    """Train from the first step, or resume the run whose ``run.json`` was ``before``."""
    check_loggers(config.trainer.loggers)
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
        info = _continue_description(run, info, before)
    monitor = choose_monitor(config, data)
    with quiet_lightning():
        loop = Loop(method, data, config, run, run_id=info["id"], monitor=monitor, checkpoint=checkpoint)
        if is_leader():
            _remove_leftovers(run)
            write_text(run.config, config.to_yaml())
            write_json(run.spec, spec.to_json())
        with _recording_status(loop, info):
            loop.run()
            finish(loop, info)
    return run


def choose_sampling(asked: Sampling | None, method: Method) -> Sampling:
    """Return how training images are drawn: as asked for, or as the method needs.

    Raises:
        UsageError: If the method needs another way than the one asked for.
    """
    needed = method.sampling
    if asked and needed and asked != needed:
        raise UsageError(
            f"method {method.name!r} needs data.sampling {needed}, not {asked}. Leave the option out, or give {needed}."
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


def _continue_description(run: Run, info: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    if before.get("images", info["images"]) != info["images"]:
        raise CrossXError(
            f"{run.path}: trained on {before['images']} images, but there are {info['images']} now. Resume a run on "
            "the same data."
        )
    return {**before, "data_root": info["data_root"], "data": info["data"], "status": "running"}


@contextmanager
def _recording_status(loop: Loop, info: dict[str, Any]) -> Iterator[None]:
    """Keep ``status`` and ``selection`` in run.json up to date, and turn interruptions into one-line errors."""

    def record(status: str) -> None:
        if is_leader():
            selection = describe_selection(loop)
            write_json(loop.run_folder.info, {**info, "status": status, "selection": selection})

    record("running")
    ended = "failed"
    try:
        with _sigterm_interrupts():
            yield
        ended = "finished"
        record(ended)
    except (KeyboardInterrupt, SystemExit) as error:
        ended = "stopped"
        done = len(loop.history.rows)
        raise Stopped(
            f"stopped after {done} complete epochs. Continue with `crossx fit --resume {loop.run_folder.path}`."
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
            loop.stop_processes()


@contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """Treat SIGTERM like Ctrl-C; Python handles signals in the main thread only."""

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


def _locked(path: Path) -> AbstractContextManager[None]:
    """Return a context in which no other process can train in the folder; the first rank holds the lock for all."""
    return locked_folder(path, "training in it") if is_leader() else nullcontext()


def _require_empty(path: Path) -> None:
    if Run(path).config.is_file():
        raise UsageError(
            f"{path} already holds a run. Continue it with `crossx fit --resume {path}`, or choose another --output."
        )
    if any(not is_lock(file) for file in path.iterdir()):
        raise UsageError(f"{path} is not empty. Choose another --output.")


def _find_run(path: Path) -> Run:
    for folder in (path, path.parent, path.parent.parent) if path.is_file() else (path,):
        if Run(folder).config.is_file():
            return Run(folder)
    raise UsageError(
        f"{path}: no run to resume (no config.yaml). `crossx fit --output {path}` starts a new one."
    )


def _with_absolute_paths(config: Config) -> Config:
    """Make paths absolute, since a run is also resumed and tested from other working folders."""
    root, weights = config.data.root, config.model.backbone_weights
    return replace(
        config,
        data=replace(config.data, root=str(Path(root).absolute()) if root else None),
        model=replace(config.model, backbone_weights=str(Path(weights).absolute()) if weights else None),
    )


def _remove_leftovers(run: Run) -> None:
    """Remove the temporary files of a process that was killed while writing."""
    for folder in (run.path, run.checkpoints):
        for leftover in folder.glob(".*.tmp"):
            leftover.unlink(missing_ok=True)
