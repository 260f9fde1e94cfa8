"""Train a method, or resume a training, and write a run folder."""

from __future__ import annotations

import json
import logging
import math
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import seed_everything

from crossx.commands import quoted
from crossx.data.catalog import base_folder, configured_root, read_configured, require_drawn
from crossx.data.config import Sampling
from crossx.data.datamodule import DataModule
from crossx.data.exclude import write_excluded, written_path
from crossx.data.images import printable
from crossx.data.index import SPLITS, DatasetIndex, part_names
from crossx.data.transforms import preprocessing_for
from crossx.distributed import is_leader
from crossx.errors import (
    CrossXError,
    LostWorker,
    Stopped,
    UsageError,
    counted,
    lost_worker,
    sigterm_interrupts,
)
from crossx.evaluation.classes import check_classes
from crossx.methods.base import Method
from crossx.methods.registry import (
    check_options,
    create_method,
    method_class,
    method_options,
    origin,
    recall_method,
)
from crossx.methods.start import Start, Transfer
from crossx.methods.weights import build_method, describe
from crossx.runs import (
    SCHEMA,
    ModelSpec,
    Run,
    environment,
    find_run,
    is_lock,
    is_utf8,
    locked_folder,
    resume_command,
    user_path,
    write_json,
    write_text,
)
from crossx.schema import check_backbone_args, check_model
from crossx.suggestions import nearest
from crossx.terminal import step
from crossx.training.checkpoints import make_newest, restore_best
from crossx.training.config import Config, TrainerConfig
from crossx.training.fabric import quiet_lightning, stop_processes
from crossx.training.finish import finish
from crossx.training.loggers import check_loggers
from crossx.training.loop import Loop
from crossx.training.precision import resolve_precision
from crossx.training.recovery import (
    clear,
    has_progress,
    is_leftover,
    read_existing_info,
    read_or_restore,
    read_saved,
    read_whole_config,
    remove_leftovers,
    require_files,
    require_unfinished,
)
from crossx.training.selection import choose_monitor

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
SPLITTING = ("dataset", "val_fraction", "test_fraction", "split_seed", "train_on")
"""Options of ``data`` that decide which images are held out."""

log = logging.getLogger(__name__)


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
        with _interruptible(run), _locked(run.path):
            if is_leader():
                _require_empty(run.path)
            trainer, reason = resolve_precision(config.trainer)
            if reason and is_leader():
                log.info("trainer.precision auto is %s: %s.", trainer.precision, reason)
            return _train(_with_absolute_paths(replace(config, trainer=trainer)), run)
    except BaseException:
        with suppress(OSError):
            run.path.rmdir()  # only if it is still empty, so that the same --output can be given again
        raise


def resume(
    path: str | Path,
    *,
    root: str | Path | None = None,
    restart: bool = False,
    max_epochs: int | None = None,
    max_steps: int | None = None,
    max_time: str | dict[str, int] | None = None,
    patience: int | None = None,
) -> Run:
    """Continue a stopped run from its newest intact checkpoint, or train a finished one for longer.

    On a CPU the result is bit for bit that of an uninterrupted run. A run that was stopped before its first checkpoint
    starts over with the same seed. With another length, a schedule that depends on it (``cosine``, ``one_cycle``)
    continues as in a run of that length; with the others the result is still that of an uninterrupted run.

    Args:
        path: The run folder, which may have been moved, or a checkpoint in it to go back to.
        root: The data's folder, if it has moved.
        restart: Delete what the run has learned so far, and start over with the same options.
        max_epochs: See ``TrainerConfig``; by default as before. A finished run needs more than it has trained.
        max_steps: Likewise.
        max_time: Likewise; the time before counts.
        patience: See ``OptimConfig``; by default as before. A run that it has ended needs more, or 0.

    Raises:
        UsageError: If there is no run, nothing is left to train, or another version of crossx started it.
        CrossXError: As ``fit``, if the images or classes have changed, or if no checkpoint is intact.
    """
    run, chosen = find_run(Path(path))
    if restart and chosen:
        raise UsageError(
            f"--restart starts over, without a checkpoint: `{resume_command(run, restart=True)}`."
        )
    asked: dict[str, Any] = {"max_epochs": max_epochs, "max_steps": max_steps, "max_time": max_time}
    limits = {option: value for option, value in asked.items() if value is not None}
    lengthens = bool(limits) or patience is not None
    with _interruptible(run), _locked(run.path):
        require_files(run)
        if not restart and not lengthens:
            require_unfinished(run)
        saved = None if restart else read_saved(run, chosen)
        config = read_or_restore(run.config, lambda: read_whole_config(run), saved)
        config = replace(config, output=str(run.path))
        recall_method(config.model.method, run)
        if config.data.exclude is not None and run.excluded.is_file():
            config = replace(config, data=replace(config.data, exclude=str(run.excluded.absolute())))
        if root is not None:
            require_drawn(config.data.dataset, root)
            config = _with_absolute_paths(replace(config, data=replace(config.data, root=str(root))))
        before: dict[str, Any] = {}
        if not restart:
            before = read_or_restore(run.info, lambda: read_existing_info(run), saved, before)
        former = config
        if lengthens:
            optim = config.optim if patience is None else replace(config.optim, patience=patience)
            config = replace(config, trainer=replace(config.trainer, **limits), optim=optim)
        if lengthens and not restart:
            _require_other_end(run, config, former, before)
            before = _with_length(run, config.trainer, before, saved)
        if saved is None and not restart and has_progress(run, before):
            raise CrossXError(
                f"{run.path}: has been trained, but no checkpoint is left. `{resume_command(run, restart=True)}` "
                "starts over."
            )
        return _train(config, run, before, saved, chosen)


def _with_length(
    run: Run,
    trainer: TrainerConfig,
    before: dict[str, Any],
    checkpoint: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Check that a run can be trained for another length; return its ``run.json`` with the length so far.

    Raises:
        UsageError: If it cannot, naming the option that leaves nothing to train.
    """
    finished = before.get("status") == "finished"
    if checkpoint is None:
        if finished:
            raise UsageError(
                f"{run.path}: its checkpoints are gone, so it cannot be trained for longer. Start a new run from it "
                f"with --init {quoted(run.path)}."
            )
        return before
    epochs, step = checkpoint["epoch"], checkpoint["step"]
    seconds = checkpoint["history"]["seconds"]
    begun = epochs + (checkpoint["batch"] > 0)
    for option, so_far, limit in (
        ("max_epochs", begun, trainer.max_epochs),
        ("max_steps", step, trainer.max_steps if trainer.max_steps >= 0 else math.inf),
        ("max_time", seconds, trainer.seconds),
    ):
        # an unfinished run may be given the length that it has, for which the same command may be repeated
        if limit < so_far or (finished and limit == so_far):
            shown, unit = (f"{so_far:.0f}", " seconds") if option == "max_time" else (f"{so_far}", "")
            raise UsageError(
                f"{run.path}: has trained {counted(epochs, 'epoch')} ({counted(step, 'step')}), and trainer.{option} "
                f"{getattr(trainer, option)} leaves nothing to train: give more than {shown}{unit}."
            )
    if not finished:
        return before
    return {**before, "extended_after": [*(before.get("extended_after") or []), epochs]}


def _require_other_end(run: Run, config: Config, former: Config, before: Mapping[str, Any]) -> None:
    """Check that what ended a run early would not end it at once again, given the former options."""
    ended = before.get("ended") or {}
    if before.get("status") != "finished":
        return
    start = f"{run.path}: was ended after {counted(ended.get('epoch') or 0, 'epoch')} by"
    waited = former.optim.patience
    if ended.get("by") == "patience" and 0 < config.optim.patience <= waited:
        raise UsageError(
            f"{start} optim.patience {waited}: to train it for longer, give --optim.patience too: more, or 0, "
            "which switches it off."
        )
    if ended.get("by") == "max_time" and config.trainer.seconds <= former.trainer.seconds:
        raise UsageError(
            f"{start} trainer.max_time {config.trainer.max_time}, which leaves nothing to train: give more."
        )


def _train(
    config: Config,
    run: Run,
    before: Mapping[str, Any] | None = None,
    checkpoint: dict[str, Any] | None = None,
    chosen: Path | None = None,
) -> Run:
    """Train from the first step, or from a checkpoint.

    Args:
        config: The options.
        run: The run folder.
        before: ``run.json`` of a resumed run.
        checkpoint: The checkpoint to continue from.
        chosen: Its file, if the user named one.
    """
    check_loggers(config.trainer.loggers)
    if checkpoint is None:
        check_backbone_args(config.model.backbone_args)
    start = Start.read(config.init) if config.init is not None and checkpoint is None else None
    transfer = None
    index = read_configured(config.data)
    for note in index.notes if is_leader() else ():
        log.warning("%s.", note)
    exclude_file = config.data.exclude
    if exclude_file is not None:
        # the run's own copy, since the file may change or be deleted
        config = replace(config, data=replace(config.data, exclude=str(run.excluded.absolute())))
    seed_everything(config.seed, verbose=False)
    if checkpoint is None:
        method = _create_method(config, index)
        if start is not None:
            # what the weights were trained with
            method.backbone.data_config |= {
                name: getattr(start.spec.preprocessing, name) for name in ("mean", "std", "interpolation")
            }
        preprocessing = preprocessing_for(config.data, method.backbone.data_config)
        spec = describe(
            method,
            classes=index.classes,
            preprocessing=preprocessing,
            dataset=index.name,
            levels=dict(index.levels),
        )
        if start is not None:
            transfer = _take(start, method, spec, config)
    else:
        spec = read_or_restore(run.spec, run.read_spec, checkpoint)
        check_classes(spec.classes, index.classes, index.name)
        method, preprocessing = build_method(spec), spec.preprocessing
        if (taken := checkpoint.get("taken")) is not None:
            method.taken = frozenset(taken)
    check_model(spec.to_json(), "the run could not be loaded afterwards")
    parts = choose_parts(method.name, method.options, index)
    options = replace(config.data, sampling=choose_sampling(config.data.sampling, method))
    if options.sampling == "balanced" and config.optim.class_weights == "balanced" and is_leader():
        log.warning(
            "data.sampling balanced and optim.class_weights balanced both favour rare classes, which then count twice: "
            "leave out one of them."
        )
    data = DataModule(index, preprocessing, options, config.seed, parts)
    with step("Checking the images"):
        data.check_images()
        data.open_caches()
    info = _describe(config, data, transfer, exclude_file)
    if before is not None and checkpoint is not None:
        info = _continue_description(run, info, before)
    monitor = choose_monitor(config, data)
    with quiet_lightning():
        files = {
            run.config.name: replace(config, output=None).to_yaml(),
            # a finished run that is trained for longer gets a new temperature
            run.spec.name: json.dumps(replace(spec, temperature=1.0).to_json()),
            run.info.name: json.dumps({name: info[name] for name in KEPT}),
        }
        loop = Loop(
            method,
            data,
            config,
            run,
            run_id=info["id"],
            monitor=monitor,
            checkpoint=checkpoint,
            transfer=transfer,
            files=files,
        )
        if is_leader():
            remove_leftovers(run)
            if checkpoint is None:
                clear(run)
            else:
                make_newest(run, chosen or run.last)
                restore_best(run, checkpoint)
            write_text(run.config, config.to_yaml())
            write_json(run.spec, spec.to_json())
            if exclude_file is not None:
                _write_excluded(run, config, index)
        with _recording_status(loop, info):
            loop.run()
            with step("Selecting the weights"):
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


def choose_parts(method: str, options: Mapping[str, Any], index: DatasetIndex) -> tuple[str, ...]:
    """Return the names of the parts in training batches; none for a method that does not use parts.

    Raises:
        CrossXError: If the method needs parts and the dataset has none.
        UsageError: If the dataset does not have a part of the option ``part_names``.
    """
    if not method_class(method).uses_parts:
        return ()
    known = part_names(index.split("train"))
    if not known:
        raise CrossXError(
            f"method {method!r} needs parts, and the training images of dataset {index.name!r} have none. Use cub or "
            "nabirds with the archive's parts/part_locs.txt, or synthetic."
        )
    # also those that no training image shows, such as the other side of a part
    known = part_names(index.records)
    asked = options.get("part_names")
    for name in asked or ():
        if name not in known:
            raise UsageError(
                f"part_names: dataset {index.name!r} has no part {name!r}.{nearest(name, known)} "
                f"It has: {', '.join(known)}."
            )
    return tuple(asked or known)


def _create_method(config: Config, index: DatasetIndex) -> Method:
    model = config.model
    options = dict(model.options)
    check_options(model.method, options)
    parts = choose_parts(model.method, options, index)
    if parts and "part_names" in method_options(model.method):
        options["part_names"] = list(parts)
    method = create_method(
        model.method,
        backbone=model.backbone,
        num_classes=len(index.classes),
        pretrained=model.pretrained and config.init is None,
        backbone_weights=model.backbone_weights,
        backbone_args=model.backbone_args,
        image_size=config.data.image_size,
        **options,
    )
    method.check_image_size(config.data.image_size)
    return method


def _take(start: Start, method: Method, spec: ModelSpec, config: Config) -> Transfer:
    """Copy what fits from another network, and say what does not."""
    transfer = Transfer(start, method, spec)
    transfer.copy(method)
    method.taken = transfer.taken
    if is_leader():
        log.info("init %s", transfer.describe())
    before = start.info.get("data") or {}
    same = config.data.root and start.info.get("data_root") == config.data.root
    now = asdict(config.data)
    if (
        is_leader()
        and same
        and any(before.get(option) != now[option] for option in SPLITTING if option in before)
    ):
        log.warning(
            "init %s: was trained on images of %s split in another way: it may have seen images that are held out now.",
            start.name, config.data.root,
        )  # fmt: skip
    return transfer


def _write_excluded(run: Run, config: Config, index: DatasetIndex) -> None:
    data = config.data
    base = base_folder(configured_root(data))
    write_excluded(run.excluded, [(written_path(record.path, base),) for record in index.excluded])


def _describe(
    config: Config, data: DataModule, transfer: Transfer | None, exclude_file: str | None
) -> dict[str, Any]:
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


def _continue_description(run: Run, info: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    if before.get("images", info["images"]) != info["images"]:
        raise CrossXError(
            f"{run.path}: trained on {before['images']} images, but there are {info['images']} now. Resume a run on "
            "the same data."
        )
    now = {key: info[key] for key in ("data_root", "data", "imports")}
    return {**info, **before, **now, "status": "running"}


@contextmanager
def _recording_status(loop: Loop, info: dict[str, Any]) -> Iterator[None]:
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


@contextmanager
def _interruptible(run: Run) -> Iterator[None]:
    """Turn signals outside of the steps, SIGTERM included, and the end of a loading process into one line."""
    try:
        with sigterm_interrupts():
            yield
    except KeyboardInterrupt as error:
        raise Stopped(f"stopped during set-up. {_how_to_continue(run)}") from error
    except (RuntimeError, LostWorker) as error:
        # here, since torch raises it at any moment, and once for each process
        if (lost := lost_worker(error)) is None:
            raise
        raise CrossXError(f"{lost} {_how_to_continue(run)}") from error


def _how_to_continue(run: Run) -> str:
    return f"Continue with `{resume_command(run)}`." if run.config.is_file() else "Run it again."


def _locked(path: Path) -> AbstractContextManager[None]:
    """Return a context in which no other process can train in the folder; the first rank holds the lock for all."""
    return locked_folder(path, "training in it") if is_leader() else nullcontext()


def _require_empty(path: Path) -> None:
    if Run(path).config.is_file():
        raise UsageError(
            f"{path} already holds a run. Continue it with `{resume_command(Run(path))}`, or choose another --output."
        )
    if any(not (is_lock(file) or is_leftover(file)) for file in path.iterdir()):
        raise UsageError(f"{path} is not empty. Choose another --output.")


def _with_absolute_paths(config: Config) -> Config:
    """Make paths absolute, since a run is also resumed and tested from other working folders."""
    exclude, cache = config.data.exclude, config.data.cache_folder
    weights, init = config.model.backbone_weights, config.init
    return replace(
        config,
        # what does not exist may be a name on the Hub
        init=str(Path(init).absolute()) if init and Path(init).exists() else init,
        data=replace(
            config.data.with_absolute_root(),
            exclude=str(user_path(exclude).absolute()) if exclude is not None else None,
            cache_folder=str(user_path(cache).absolute()) if cache is not None else None,
        ),
        model=replace(config.model, backbone_weights=str(Path(weights).absolute()) if weights else None),
    )
