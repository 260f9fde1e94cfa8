"""What a training run is made of: data, network, loggers, trainer."""

from __future__ import annotations

import inspect
import logging
import os
import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.warnings import PossibleUserWarning
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger

from crossx.data.catalog import read_configured
from crossx.data.config import Sampling
from crossx.data.datamodule import DataModule
from crossx.data.dataset import ImageLoader
from crossx.data.index import SPLITS
from crossx.data.transforms import preprocessing_for
from crossx.errors import UsageError, nearest
from crossx.evaluation.classes import check_classes
from crossx.methods import create_method
from crossx.methods.base import Method
from crossx.methods.checkpoint import build_method, describe
from crossx.runs import ModelSpec, Run
from crossx.schema import check_backbone_args, check_model
from crossx.training.callbacks import EMA, Checkpoints, EpochSeed, LiveProgressBar
from crossx.training.checkpoint_io import AtomicCheckpointIO
from crossx.training.config import Config
from crossx.training.history import History
from crossx.training.synchronized_norms import SynchronizedNorms
from crossx.training.task import Task

log = logging.getLogger(__name__)


class ValidatesOnTest(DataModule):
    """Evaluates the test images after each epoch: for ``best_on_test`` alone."""

    def val_dataloader(self) -> ImageLoader:
        """Return the loader of the test split."""
        return self.eval_loader("test")


@dataclass
class Session:
    """The parts of one run, ready to train.

    Attributes:
        config: The options.
        run: The run folder.
        spec: What is needed to rebuild the network.
        data: The images.
        method: The network and its objective.
        monitor: The column that chooses ``best.ckpt``; None keeps the last epoch.
    """

    config: Config
    run: Run
    spec: ModelSpec
    data: DataModule
    method: Method
    monitor: str | None

    @property
    def images(self) -> dict[str, int]:
        """Number of images in each split."""
        return {split: len(self.data.index.split(split)) for split in SPLITS}


def open_session(config: Config, run: Run, saved: ModelSpec | None = None) -> Session:
    """Read the data, check every image, and build the network.

    Args:
        config: The options.
        run: The run folder; nothing is written to it.
        saved: The run's own description where it is resumed: the network is rebuilt from it with random weights,
            which the checkpoint then replaces.

    Raises:
        CrossXError: If the data or the network cannot be used, or the run could not be loaded afterwards.
    """
    if saved is None:
        check_backbone_args(config.model.backbone_args)
    index = read_configured(config.data)
    seed_everything(config.seed, verbose=False)
    if saved is None:
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
        preprocessing = preprocessing_for(config.data, method.backbone.data_config)
    else:
        check_classes(saved.classes, index.classes, index.name)
        method, preprocessing = build_method(saved), saved.preprocessing
    on_test = config.optim.selection == "best_on_test"
    options = replace(config.data, sampling=choose_sampling(config.data.sampling, method))
    data = (ValidatesOnTest if on_test else DataModule)(index, preprocessing, options, config.seed)
    data.check_images()
    data.open_caches()
    spec = saved or describe(
        method,
        classes=index.classes,
        preprocessing=preprocessing,
        dataset=index.name,
        levels=dict(index.levels),
    )
    check_model(spec.to_json(), "the run could not be loaded afterwards")
    return Session(config, run, spec, data, method, _monitor(config, data))


def build_task(session: Session) -> Task:
    """Return the LightningModule."""
    data = session.data
    counts = Counter(record.label for record in data.train_records())
    optim, notes = session.config.optim.shortened_to(session.config.trainer["max_epochs"])
    for note in notes:
        log.warning(note)
    return Task(
        session.method,
        optim,
        class_counts=[counts[label] for label in range(len(data.index.classes))],
        eval_split="test" if isinstance(data, ValidatesOnTest) else "val",
    )


def build_trainer(
    session: Session, history: History, checkpoints: Checkpoints, *, run_id: str, steps_before: int
) -> Trainer:
    """Return Lightning's Trainer.

    Args:
        session: The parts of the run.
        history: Its callback for the numbers.
        checkpoints: Its callback for the checkpoints.
        run_id: Name of the run for loggers that join the parts of a resumed run.
        steps_before: Optimiser steps of the checkpoint that is resumed.

    Raises:
        UsageError: For an unknown argument, or one that Lightning refuses.
    """
    config = session.config
    arguments = {"num_sanity_val_steps": 0, "enable_model_summary": False, **config.trainer}
    known = inspect.signature(Trainer.__init__).parameters
    for name in arguments:
        if name not in known:
            raise UsageError(f"unknown option trainer.{name}.{nearest(name, known)} See `crossx fit --help`.")
    _check_devices(arguments)
    callbacks = [EpochSeed(config.seed), history, checkpoints]
    if config.optim.ema_decay is not None:
        callbacks.append(EMA(config.optim.ema_decay))
    bar = arguments.get("enable_progress_bar", True) is not False and sys.stderr.isatty()
    if bar:
        callbacks.append(LiveProgressBar(history))
    own = {
        "enable_progress_bar": bar,
        "logger": _loggers(config, session.run, run_id, steps_before),
        "callbacks": callbacks,
        "plugins": [
            AtomicCheckpointIO(),
            *([SynchronizedNorms()] if arguments.get("sync_batchnorm") else []),
        ],
        "default_root_dir": session.run.path,
        "use_distributed_sampler": False,
    }
    try:
        return Trainer(**{**arguments, **own})
    except (MisconfigurationException, ModuleNotFoundError, ValueError, TypeError) as error:
        raise UsageError(f"trainer: {' '.join(str(error).split())}") from error


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Silence Lightning's notices and its advice on things that are meant here."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PossibleUserWarning)
            warnings.filterwarnings("ignore", "Total length of `list` across ranks is zero")
            warnings.filterwarnings("ignore", ".isinstance.treespec, LeafSpec")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


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


def _monitor(config: Config, data: DataModule) -> str | None:
    if config.optim.selection == "best_on_test":
        if not data.index.split("test"):
            raise UsageError("optim.selection best_on_test needs test images, and the dataset has none.")
        return "test/top1"
    if config.optim.selection == "last":
        return None
    missing = _no_validation(config, data)
    if missing:
        log.warning("%s: the last epoch's weights become the model.", missing)
        return None
    return "val/top1"


def _no_validation(config: Config, data: DataModule) -> str:
    """Say why no epoch is validated, empty where one is."""
    if not data.val_dataloader():
        return "There are no validation images"
    if config.trainer.get("limit_val_batches", 1.0) == 0:
        return "trainer.limit_val_batches 0 switches validation off"
    every = config.trainer.get("check_val_every_n_epoch") or 1
    if every > config.trainer["max_epochs"]:
        return f"trainer.check_val_every_n_epoch {every} is more than trainer.max_epochs"
    return ""


def _check_devices(arguments: Mapping[str, Any]) -> None:
    """Refuse more processes than the CPU has cores; of GPUs Lightning knows the number itself."""
    devices = arguments.get("devices", "auto")
    on_cpu = arguments.get("accelerator", "auto") == "cpu" or not torch.cuda.is_available()
    cores = os.cpu_count() or 1
    if on_cpu and str(devices).isdecimal() and int(devices) > cores:
        raise UsageError(f"trainer.devices {devices}: there is no GPU, and the CPU has {cores} cores.")


def _loggers(config: Config, run: Run, run_id: str, steps_before: int) -> list[Logger]:
    loggers: list[Logger] = []
    try:
        for name in config.loggers:
            if name == "tensorboard":
                # events after the checkpoint come again from the resumed run
                purge: dict[str, Any] = {"purge_step": steps_before + 1} if steps_before else {}
                loggers.append(
                    TensorBoardLogger(run.path, "tensorboard", "", default_hp_metric=False, **purge)
                )
            elif name == "wandb":
                loggers.append(
                    WandbLogger(
                        project="crossx", name=run.path.name, save_dir=run.path, id=run_id, resume="allow"
                    )
                )
            elif name == "mlflow":
                loggers.append(
                    MLFlowLogger(
                        experiment_name="crossx", run_name=run.path.name, save_dir=str(run.path / "mlruns")
                    )
                )
    except ModuleNotFoundError as error:
        raise UsageError(f"logger {name!r} is not installed: `pip install 'crossx[{name}]'`.") from error
    return loggers
