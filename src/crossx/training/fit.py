"""Train a method, or resume a training, and write a run folder."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning.fabric import seed_everything

from crossx.data.catalog import base_folder, configured_root, read_configured, require_drawn
from crossx.data.datamodule import DataModule
from crossx.data.exclude import write_excluded, written_path
from crossx.data.index import DatasetIndex
from crossx.distributed import is_leader
from crossx.errors import (
    CrossXError,
    LostWorker,
    Stopped,
    UsageError,
    check_flag,
    check_type,
    lost_worker,
    sigterm_interrupts,
)
from crossx.evaluation.training_images import has_training_images, write_training_images
from crossx.methods.registry import recall_method
from crossx.methods.start import Start
from crossx.runs import (
    ModelSpec,
    Run,
    find_run,
    is_lock,
    is_utf8,
    locked_folder,
    resume_command,
    user_path,
    write_json,
    write_text,
)
from crossx.schema.model import check_backbone_args, check_model
from crossx.terminal import speaking, step
from crossx.training.checkpoints import make_newest, restore_best
from crossx.training.config import FROM_RECIPE, Config
from crossx.training.creation import Created, choose_parts, choose_sampling, create, restore
from crossx.training.fabric import quiet_lightning
from crossx.training.finish import finish
from crossx.training.lengthening import require_other_end, with_length
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
from crossx.training.status import KEPT, continue_description, describe_run, recording_status

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
    check_type("crossx.fit", config, Config, FROM_RECIPE)
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
            if reason:
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
    check_flag("restart", restart)
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
            require_other_end(run, config, former, before)
            before = with_length(run, config.trainer, before, saved)
        if saved is None and not restart and has_progress(run, before):
            raise CrossXError(
                f"{run.path}: has been trained, but no checkpoint is left. `{resume_command(run, restart=True)}` "
                "starts over."
            )
        return _train(config, run, before, saved, chosen)


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
    index = read_configured(config.data)
    for note in index.notes:
        log.warning("%s.", note)
    exclude_file = config.data.exclude
    if exclude_file is not None:
        # the run's own copy, since the file may change or be deleted
        config = replace(config, data=replace(config.data, exclude=str(run.excluded.absolute())))
    seed_everything(config.seed, verbose=False)
    created = create(config, index, start) if checkpoint is None else restore(run, checkpoint, index)
    check_model(created.spec.to_json(), "the run could not be loaded afterwards")
    data = _open_data(config, index, created)
    info = describe_run(config, data, created.transfer, exclude_file)
    if before is not None and checkpoint is not None:
        info = continue_description(run, info, before)
    with quiet_lightning():
        loop = Loop(
            created.method,
            data,
            config,
            run,
            run_id=info["id"],
            monitor=choose_monitor(config, data),
            checkpoint=checkpoint,
            transfer=created.transfer,
            files=_kept_files(run, config, created.spec, info),
        )
        if is_leader():
            _write_start(run, config, created.spec, checkpoint, chosen)
            if checkpoint is None or not has_training_images(run):
                write_training_images(run, config.data, data.index)
            if exclude_file is not None:
                _write_excluded(run, config, index)
        with recording_status(loop, info):
            loop.run()
            with step("Selecting the weights"):
                finish(loop, info)
    return run


def _open_data(config: Config, index: DatasetIndex, created: Created) -> DataModule:
    method, spec = created.method, created.spec
    parts = choose_parts(method.name, method.options, index)
    options = replace(config.data, sampling=choose_sampling(config.data.sampling, method))
    if options.sampling == "balanced" and config.optim.class_weights == "balanced":
        log.warning(
            "data.sampling balanced and optim.class_weights balanced both favour rare classes, which then count twice: "
            "leave out one of them."
        )
    data = DataModule(index, spec.preprocessing, options, config.seed, parts)
    with step("Checking the images"):
        data.check_images()
        data.open_caches()
    return data


def _kept_files(run: Run, config: Config, spec: ModelSpec, info: Mapping[str, Any]) -> dict[str, str]:
    """Return the files of the run that its checkpoints hold, in case they are lost: name -> text."""
    return {
        run.config.name: replace(config, output=None).to_yaml(),
        # a finished run that is trained for longer gets a new temperature
        run.spec.name: json.dumps(replace(spec, temperature=1.0).to_json()),
        run.info.name: json.dumps({name: info[name] for name in KEPT}),
    }


def _write_start(
    run: Run, config: Config, spec: ModelSpec, checkpoint: dict[str, Any] | None, chosen: Path | None
) -> None:
    """Leave in the folder only what the training starts from."""
    remove_leftovers(run)
    if checkpoint is None:
        clear(run)
    else:
        make_newest(run, chosen or run.last)
        restore_best(run, checkpoint)
    write_text(run.config, config.to_yaml())
    write_json(run.spec, spec.to_json())


def _write_excluded(run: Run, config: Config, index: DatasetIndex) -> None:
    data = config.data
    base = base_folder(configured_root(data))
    write_excluded(run.excluded, [(written_path(record.path, base),) for record in index.excluded])


@contextmanager
def _interruptible(run: Run) -> Iterator[None]:
    """Turn signals outside of the steps, SIGTERM included, and the end of a loading process into one line.

    Of several processes, only the leader logs.
    """
    try:
        with sigterm_interrupts(), speaking(is_leader()):
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
