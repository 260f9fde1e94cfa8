"""The training loop: epochs, steps, validation, selection, checkpoints."""

from __future__ import annotations

import gc
import logging
import math
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sized
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any, Literal

import torch
from lightning.fabric import seed_everything
from torch import Tensor, distributed, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from crossx.backbones import EarlyLayers, synchronize_batch_norms
from crossx.data.datamodule import DataModule
from crossx.data.sampler import derive_seed
from crossx.data.views import StoredViews
from crossx.errors import CrossXError, UsageError, counted
from crossx.methods.base import Method, Phase
from crossx.methods.start import Transfer
from crossx.runs import SCHEMA, Run, write_json
from crossx.terminal import erase_step
from crossx.training.checkpoints import FORMAT, write_checkpoint
from crossx.training.config import Config, OptimConfig
from crossx.training.fabric import build_fabric
from crossx.training.generators import generator_states, set_generator_states
from crossx.training.heads import fit_heads
from crossx.training.history import History
from crossx.training.loggers import build_loggers, finalize_all, log_all
from crossx.training.optim import build_optimizer, build_scheduler, rise_fits
from crossx.training.progress import Bar
from crossx.training.stages import (
    BACKWARD,
    COPY,
    FILES,
    FIRST_WAIT,
    FORWARD,
    UPDATE,
    VALIDATION,
    VALIDATION_WAIT,
    WAIT,
    Stages,
)
from crossx.training.stopping import Patience, epochs_in_time
from crossx.training.task import Task
from crossx.training.views import check_early_layers, store_views

log = logging.getLogger(__name__)


class Loop:
    """Trains a method, from the first step or from a checkpoint.

    The constructor makes all checks, before ``run`` starts further processes and takes the first step.

    Args:
        method: The network and its objective; trained in place.
        data: The images.
        config: The options.
        run: The run folder.
        run_id: Id of the run, by which loggers continue a resumed run.
        monitor: The metric to maximise (ties: the later epoch); None keeps no ``best.ckpt``.
        checkpoint: The result of ``read_newest`` to resume from.
        files: Text of files of the run by name, kept in its checkpoints.
        transfer: What the method took from another network, if it starts from one.

    Attributes:
        epoch: Completed epochs.
        batch: Batches done in the current epoch.
        step: Optimiser steps.
        best: ``epoch`` (counted from 1) and ``value`` of the best epoch; empty before there is one.
        phase: Name of the phase that was started last; None before the first.
        epochs: Epochs of the whole training: ``max_epochs``, or fewer if ``max_time`` leaves no time for all of them.

    Raises:
        UsageError: If the method or the machine does not support an option.
    """

    def __init__(
        self,
        method: Method,
        data: DataModule,
        config: Config,
        run: Run,
        *,
        run_id: str,
        monitor: str | None,
        checkpoint: Mapping[str, Any] | None = None,
        files: Mapping[str, str] | None = None,
        transfer: Transfer | None = None,
    ) -> None:
        self.files = dict(files or {})
        self.method, self.data, self.config = method, data, config
        self.run_folder, self.monitor = run, monitor
        self.options = config.trainer
        self.time_limit = config.trainer.seconds
        self.checkpoint = checkpoint
        self.transfer = transfer
        self.epoch = self.batch = self.step = 0
        self.best: dict[str, float] = {}
        self.phase: str | None = None
        self.epochs = self.options.max_epochs
        if checkpoint is not None and checkpoint.get("plan", {}).get("limits") == self._limits():
            self.epochs = checkpoint["plan"]["epochs"]
        self.fabric = build_fabric(self.options)
        data.processes = getattr(self.fabric.strategy, "num_processes", 1)
        counts = Counter(record.label for record in data.train_records())
        classes = range(len(data.index.classes))
        for note in config.optim.shortened_to(self.options.max_epochs)[1]:
            log.warning(note)
        self.optim = self._options_for(self.epochs)
        self.task = Task(method, self.optim, class_counts=[counts[label] for label in classes])
        if self.task.early is not None:
            check_early_layers(self.task.early, method, data.preprocessing.image_size)
        self.has_phases = type(method).phase_at is not Method.phase_at
        if self.has_phases:
            self.task.check_phases(self.options.max_epochs)
        self.average: AveragedModel | None = None
        self.stored: StoredViews | None = None
        self.history = History(run, self._mean_over_ranks if self.fabric.world_size > 1 else None)
        self.loggers = build_loggers(
            self.options.loggers, run, run_id, checkpoint["step"] if checkpoint else 0
        )
        self.bar = Bar(self.options.enable_progress_bar and self.fabric.is_global_zero, self.history.shown)
        self.saved_at = time.monotonic()
        self.stages = Stages()

    def run(self) -> None:
        """Train to the end.

        Raises:
            CrossXError: If loss or weights are not finite, or data or disk fail.
        """
        self._set_up()
        options = self.options
        if options.profile and self.device.type == "cuda":
            # otherwise the time of a kernel counts to the stage that happens to wait for it
            self.stages = Stages(torch.cuda.synchronize)
        self.stages.restart()
        try:
            with self.bar, torch.autograd.set_detect_anomaly(options.detect_anomaly):
                while (reason := self._end_reason()) is None:
                    self._train_epoch()
                    with self.stages(VALIDATION):
                        evaluated = self._validate() if self._is_validated() else {}
                    self._end_epoch(evaluated)
                if reason == "max_time":
                    self._validate_last()
                self.history.ended = {"by": reason, "epoch": self.epoch}
                if not options.max_epochs:
                    self._require_finite()
                    self._save()
        except BaseException:
            finalize_all(self.loggers, "failed")
            raise
        if options.profile and self.fabric.is_global_zero:
            profile = {"workers": self.data.num_workers, **self.stages.to_json()}
            write_json(self.run_folder.profile, {"schema": SCHEMA, **profile})
        finalize_all(self.loggers, "success")

    def _set_up(self) -> None:
        """Start the processes, move everything to its device, and load the checkpoint."""
        fabric, task, optim, saved = self.fabric, self.task, self.optim, self.checkpoint
        fabric.launch()
        self.device = fabric.device
        fabric.to_device(task)
        if saved is not None:
            # before anything is computed with them
            task.load_state_dict(saved["trained"] or saved["state_dict"])
        if self.task.early is not None:
            self._store_views(self.task.early)
        if saved is None:
            with task.skipping():
                self._prepare()
        if optim.ema_decay is not None:
            self.average = AveragedModel(task, multi_avg_fn=self._update_average, use_buffers=True)
            # read at every step; on a GPU that would synchronise
            self.average.n_averaged = self.average.n_averaged.cpu()
        if self.options.sync_batchnorm:
            synchronize_batch_norms(task)
        # not fabric.setup_module: its wrapper casts the images in mixed precision, and costs 0.1 ms per step
        self.module: nn.Module = fabric.strategy.setup_module(task)
        self.wrapped = Phase().trains
        if optim.compile:
            task.compile_objective()
        self.train_loader: Any = self._train_loader()
        self.eval_split: Literal["val", "test"] = "val"
        self.eval_loader: Any = self.data.val_dataloader()
        if optim.selection == "best_on_test":
            self.eval_split, self.eval_loader = "test", self.data.test_dataloader()
        options = self.options
        self.batches = _limit(
            "train", options.overfit_batches or options.limit_train_batches, self.train_loader
        )
        self.eval_batches = _limit(
            "val", options.overfit_batches or options.limit_val_batches, self.eval_loader
        )
        steps = -(-self.batches // options.accumulate_grad_batches)
        position = 0
        if saved is not None:
            # an epoch that max_steps or max_time cut short counts as a whole one
            position = saved["epoch"] * steps + -(-saved["batch"] // options.accumulate_grad_batches)
        self.steps_per_epoch, self.skipped = steps, position - (saved["step"] if saved else 0)
        optimizer = build_optimizer(self.method, optim)
        self.peaks = [group["lr"] for group in optimizer.param_groups]
        self._build_scheduler(optimizer)
        if saved is not None:
            self._load(saved, optimizer, position)
        self.optimizer: Any = fabric.strategy.setup_optimizer(optimizer)
        self.history.start_clock()
        if self.transfer is not None:
            # from now on the run can be resumed without the other one
            self.transfer = None
            self._save()

    def _limits(self) -> list[float]:
        """Return the options on which the number of epochs depends."""
        return [self.options.max_epochs, self.time_limit]

    def _options_for(self, epochs: int) -> OptimConfig:
        """Return the options of a training of so many epochs; fewer than ``max_epochs`` only for lack of time."""
        optim, most = self.config.optim, self.options.max_epochs
        optim = optim.in_proportion(epochs, most) if epochs < most else optim
        return optim.shortened_to(epochs)[0]

    def _build_scheduler(self, optimizer: Any) -> None:
        total, most = self.steps_per_epoch * self.epochs, self.options.max_steps
        # without an epoch no step follows, but one_cycle needs one
        total = max(1, min(total, most + self.skipped) if most >= 0 else total)
        for group, peak in zip(optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak
        if self.epochs < self.options.max_epochs and not rise_fits(self.optim, self.steps_per_epoch, total):
            # too late for an error
            self.optim = replace(self.optim, warmup_epochs=0.0, warmup_steps=0)
        self.scheduler = build_scheduler(
            optimizer, self.optim, steps_per_epoch=self.steps_per_epoch, total_steps=total
        )

    def _plan_epochs(self) -> None:
        """Plan the number of epochs from the time that they take, and fit schedule and phases to it."""
        if self.time_limit == math.inf:
            return
        ends = torch.tensor([row["seconds"] for row in self.history.rows], dtype=torch.float64)
        if self.fabric.world_size > 1:
            # each rank has its own clock, and all have to agree
            distributed.broadcast(ends := ends.to(self.device, torch.float32), 0)
        most = self.options.max_epochs
        epochs = epochs_in_time(self.epochs, most, ends.tolist(), self.time_limit)
        if epochs == self.epochs:
            return
        self.epochs = epochs
        if epochs <= self.epoch:
            return
        if self.fabric.is_global_zero:
            log.info(
                "trainer.max_time %s has time for %d of %s, and schedule and phases become those of %d.",
                self.options.max_time, epochs, counted(most, "epoch"), epochs,
            )  # fmt: skip
        self.optim = self._options_for(epochs)
        self._build_scheduler(self.optimizer)
        self.task.config = self.optim
        self._continue_schedule(self.optimizer, self.epoch * self.steps_per_epoch, warns=False)

    def _prepare(self) -> None:
        # each rank reads all images, so nothing has to be gathered
        method, views, transfer = self.method, self.optim.fit_heads, self.transfer
        if transfer is not None and transfer.is_complete:
            if views:
                log.warning("optim.fit_heads has no effect: the heads are those of %s.", transfer.start.name)
            return
        if type(method).prepare is not Method.prepare:
            method.prepare(self._all_batches())
            if transfer is not None:
                transfer.copy(method)
        if views and self.config.fits_its_head:
            log.warning("optim.fit_heads has no effect: method %r fits its head itself.", method.name)
            return
        if views and self.options.enable_progress_bar and self.fabric.is_global_zero:
            images = len(self.data.train_records())
            erase_step()
            print(f"fitting the heads on frozen features: {images:,} images x {views}", file=sys.stderr)
        if views and not fit_heads(method, lambda: (batch[:2] for batch in self._all_batches(epochs=views))):
            if not self.options.max_epochs:
                raise UsageError(
                    f"trainer.max_epochs 0: method {method.name!r} has no linear heads to fit, "
                    "so nothing would be trained."
                )
            log.warning(
                "optim.fit_heads: method %r has no linear heads to fit; its heads start at random.",
                method.name,
            )

    def _store_views(self, early: EarlyLayers) -> None:
        """Run the frozen layers once per view, also on a resume: the maps are not part of the checkpoints."""
        views = self.optim.cached_views
        if self.options.enable_progress_bar and self.fabric.is_global_zero:
            images = len(self.data.train_records())
            print(f"running the frozen layers once: {images:,} images x {views}", file=sys.stderr)
        self.stored = store_views(
            early, self.method, self.data, views, self.run_folder.path,
            lambda batch: self._to_device(batch)[0].to(memory_format=self.task.memory_format),
        )  # fmt: skip
        self.task.takes_maps = True

    def _train_loader(self, *, dealt: bool = True) -> Any:
        if self.stored is not None:
            return self.data.stored_loader(self.stored, dealt=dealt)
        return self.data.train_dataloader() if dealt else self.data.whole_train_loader()

    def _to_device(self, batch: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Move a training batch to the device: normalised images, or maps in float32, and targets."""
        if self.stored is None:
            return self.data.to_device(batch, self.device)
        maps, targets = (tensor.to(self.device, non_blocking=True) for tensor in batch)
        return maps.float(), targets

    def _all_batches(self, *, epochs: int = 1) -> Iterator[Any]:
        # a generator, so that no worker starts if the method prepares nothing
        loader = self._train_loader(dealt=False)
        for epoch in range(epochs):
            loader.sampler.set_epoch(epoch)
            for batch in loader:
                yield self._to_device(batch)

    def _train_epoch(self) -> None:
        """Train to the end of the epoch or of the training."""
        options, history, stages = self.options, self.history, self.stages
        phase = self._start_phase()
        self.train_loader.sampler.set_epoch(0 if options.overfit_batches else self.epoch, self.batch)
        within = f" {phase.name}" if self.has_phases else ""
        self.bar.start(f"epoch {self.epoch + 1}/{self.epochs}{within}", self.batches, self.batch)
        if self.batch == 0:
            highest = max(group["lr"] for group in self.optimizer.param_groups)
            history.start_epoch(highest * phase.lr_factor, phase.name if self.has_phases else None)
        loader, first = iter(self.train_loader), True
        while self.batch < self.batches:
            with stages(FIRST_WAIT if first else WAIT):
                batch = next(loader)
            if first:
                # after the first batch, whatever random numbers the loader drew before
                self._seed()
                first = False
            with stages(COPY):
                tensors = self._to_device(batch)
            self.batch += 1
            accumulates = self.batch % options.accumulate_grad_batches != 0 and self.batch < self.batches
            with self._synchronized(not accumulates):
                with stages(FORWARD), self.fabric.autocast():
                    loss, numbers = self.module(*tensors)
                with stages(BACKWARD):
                    self.fabric.backward(loss / options.accumulate_grad_batches)
            if not accumulates:
                with stages(UPDATE):
                    self._step()
            history.add(numbers, len(tensors[0]))
            logs = options.log_every_n_steps > 0 and self.batch % options.log_every_n_steps == 0
            if logs or self.device.type == "cpu":
                history.collect(self.epoch * self.batches)
            if logs:
                log_all(self.loggers, history.newest(), self.step)
            self.bar.update(self.batch, draw=self.batch == self.batches)
            if self._is_over():
                break
            if not accumulates and self.batch < self.batches and self._is_checkpoint_due():
                history.collect(self.epoch * self.batches)
                with stages(FILES):
                    self._save()

    def _start_phase(self) -> Phase:
        """Set the phase of the epoch; if it is another one than before, let the method start it."""
        method = self.method
        phase = method.phase_at(self.epoch, self.epochs)
        self.task.start_epoch(self.epoch, phase)
        if phase.name != self.phase and type(method).start_phase is not Method.start_phase:
            seed_everything(derive_seed(self.config.seed, "phase", self.epoch) % 2**32, verbose=False)
            before = (
                {key: value.clone() for key, value in self.task.state_dict().items()} if self.average else {}
            )
            with self.task.skipping():
                method.start_phase(phase, self._all_batches())
            if self.average is not None:
                # an average of what it was with what it is would be neither
                averages = self.average.module.state_dict()
                for key, value in self.task.state_dict().items():
                    if not torch.equal(value, before[key]):
                        averages[key].copy_(value)
        self.phase = phase.name
        if phase.trains != self.wrapped and self.fabric.world_size > 1:
            # DDP waits for the gradients of all parameters that it was built with; its hooks go with the old one
            del self.module
            gc.collect()
            self.module = self.fabric.strategy.setup_module(self.task)
            self.wrapped = phase.trains
        return phase

    def _step(self) -> None:
        options = self.options
        self.task.drop_frozen_gradients()
        if options.gradient_clip_val is not None:
            limit = "max_norm" if options.gradient_clip_algorithm == "norm" else "clip_val"
            self.fabric.clip_gradients(
                self.module, self.optimizer, **{limit: options.gradient_clip_val}, error_if_nonfinite=False
            )
        with _scaled_rates(self.optimizer, self.method.phase.lr_factor):
            self.fabric.strategy.optimizer_step(self.optimizer)
        self.optimizer.zero_grad()
        self.scheduler.step()
        self.step += 1
        if self.average is not None:
            self.average.update_parameters(self.task)

    def _update_average(self, averages: Any, values: Any, count: Tensor | int) -> None:
        if averages[0].is_floating_point():
            decay = warmed_up_decay(self.optim.ema_decay or 0.0, self.step - 1)
            get_ema_multi_avg_fn(decay)(averages, values, count)
        else:
            # integers: PyTorch's average of an integer with itself may round down
            torch._foreach_copy_(averages, values)

    def _is_over(self) -> bool:
        """Return whether ``max_steps`` or ``max_time`` is reached."""
        return self._out_of_steps() or self._out_of_time()

    def _out_of_time(self) -> bool:
        timed = self.time_limit < math.inf
        return timed and self._on_any_rank(self.history.seconds >= self.time_limit)

    def _end_reason(self) -> str | None:
        """Return the option that ends the training after the present epoch, and say so if it ends early."""
        most, by = self.options.max_epochs, None
        if self.epoch >= self.epochs:
            by = "max_epochs" if self.epochs == most else "max_time"
        elif self.step and self._out_of_steps():
            by = "max_steps"
        elif self.patience.is_exhausted(self.history.rows, self.watched):
            by = "patience"
        # an epoch that is resumed ends first
        elif self.step and not self.batch and self._out_of_time():
            by = "max_time"
        if self.epoch < most and self.fabric.is_global_zero:
            if by == "patience":
                waited = self.patience.waited(self.history.rows, self.watched)
                log.info(
                    "optim.patience %d: no better %s in %s, so the training ends after epoch %d of %d.",
                    self.optim.patience, self.watched, counted(waited, "validation"), self.epoch, most,
                )  # fmt: skip
            elif by == "max_time":
                log.info(
                    "trainer.max_time %s: the training ends after epoch %d of %d.",
                    self.options.max_time, self.epoch, most,
                )  # fmt: skip
        return by

    @property
    def watched(self) -> str:
        """The metric that ``optim.patience`` looks at."""
        return self.monitor or "val/top1"

    @property
    def patience(self) -> Patience:
        """The count of ``optim.patience``."""
        phases = [self.method.phase_at(epoch, self.epochs).name for epoch in range(self.epochs)]
        return Patience(self.optim, phases, self.steps_per_epoch)

    def _out_of_steps(self) -> bool:
        return 0 <= self.options.max_steps <= self.step

    def _is_validated(self) -> bool:
        """Return whether the present epoch is one that is validated."""
        within = self.batch < self.batches and self._out_of_steps()
        due = (self.epoch + 1) % self.options.check_val_every_n_epoch == 0
        return due and not within and self.eval_batches > 0

    def _validate_last(self) -> None:
        """Validate the epoch after which the time was over, if ``check_val_every_n_epoch`` passed it over."""
        row = self.history.rows[-1]
        if not self.eval_batches or f"{self.eval_split}/top1" in row:
            return
        with self.stages(VALIDATION):
            found = self._validate()
        row |= found | {"seconds": round(self.history.seconds, 2)}
        log_all(self.loggers, found, self.step)
        best = self._update_best(row)
        self._show_epoch()
        with self.stages(FILES):
            self._save(best=best)

    @torch.inference_mode()
    def _validate(self) -> dict[str, float]:
        """Return loss and top-1 on the evaluated split.

        The loss is plain cross-entropy, comparable between methods and options.
        """
        evaluated: Any = self.average.module if self.average else self.task
        evaluated.eval()
        if self.fabric.world_size > 1:
            # batch norm statistics differ between ranks; the checkpoint has those of the first
            for buffer in evaluated.buffers():
                distributed.broadcast(buffer, 0)
        loss = MeanMetric().to(self.device)
        top1 = MulticlassAccuracy(self.method.num_classes, average="micro", validate_args=False).to(
            self.device
        )
        self.bar.start("validating", self.eval_batches)
        loader = iter(self.eval_loader)
        for done in range(1, self.eval_batches + 1):
            with self.stages(VALIDATION_WAIT):
                batch = next(loader)
            images, targets = self.data.to_device(batch, self.device)
            with self.fabric.autocast():
                logits = evaluated.logits(images)
                loss.update(F.cross_entropy(logits, targets), weight=len(targets))
                top1.update(logits, targets)
            self.bar.update(done)
        values = {"loss": float(loss.compute()), "top1": float(top1.compute())}
        found = {f"{self.eval_split}/{name}": value for name, value in values.items()}
        self.history.evaluated(found)
        self.bar.update(self.eval_batches, draw=True)
        return found

    def _end_epoch(self, evaluated: Mapping[str, float]) -> None:
        """Complete the epoch's row, update the best epoch, and write the checkpoint, then the metrics."""
        history = self.history
        history.collect(self.epoch * self.batches)
        row = history.end_epoch(self.step, evaluated)
        self._require_finite()
        self.epoch, self.batch = self.epoch + 1, 0
        best = self._update_best(row)
        unlogged = ("step", "phase")
        log_all(self.loggers, {name: value for name, value in row.items() if name not in unlogged}, self.step)
        self._show_epoch()
        self._hint_at_waiting()
        self._plan_epochs()
        with self.stages(FILES):
            self._save(best=best)
            if self.fabric.is_global_zero:
                history.write()

    def _hint_at_waiting(self) -> None:
        """After the first epoch, warn if it waited for images that a cache would keep."""
        is_first = len(self.history.rows) - self.history.resumed_at == 1
        # on a GPU the loop is ahead of the device, so that its waiting costs nothing, unless stages wait for the device
        counts = self.device.type == "cpu" or self.options.profile
        uncached = self.data.config.cache == "none" and self.stored is None
        waited = self.stages.waited()
        if is_first and counts and uncached and waited is not None and self.fabric.is_global_zero:
            log.warning(
                "the steps of this epoch waited for images for %.0f%% of their time: --data.cache ram or disk "
                "decodes and resizes them only once.",
                100 * waited,
            )

    def _update_best(self, row: Mapping[str, Any]) -> bool:
        """Return whether an epoch is the best so far; if so, keep it as that."""
        value = row.get(self.monitor) if self.monitor else None
        if value is None or (self.best and value < self.best["value"]):
            return False
        self.best = {"epoch": row["epoch"], "value": value}
        return True

    def _show_epoch(self) -> None:
        if self.options.enable_progress_bar and self.fabric.is_global_zero:
            erase_step()
            print(self.history.line(self.epochs), file=sys.stderr)

    def _require_finite(self) -> None:
        tensors = [tensor for tensor in self._weights().values() if tensor.is_floating_point()]
        if not torch.stack([tensor.isfinite().all() for tensor in tensors]).all():
            last = self.run_folder.last
            kept = f"the last good checkpoint is {last}" if last.exists() else "none was written yet"
            raise CrossXError(
                f"weights are not finite at the end of epoch {self.epoch + 1}; {kept}. Lower --optim.lr, or add "
                "--trainer.gradient_clip_val 1."
            )

    def _weights(self) -> dict[str, Tensor]:
        """Return the weights that are validated and become the model: the average, if one is kept."""
        evaluated = self.average.module if self.average else self.task
        weights: dict[str, Tensor] = evaluated.state_dict()
        return weights

    def _is_checkpoint_due(self) -> bool:
        steps, minutes = self.options.checkpoint_every_n_steps, self.options.checkpoint_every_n_minutes
        if steps is not None and self.step % steps == 0:
            return True
        return minutes is not None and self._on_any_rank(time.monotonic() - self.saved_at >= 60 * minutes)

    def _save(self, *, best: bool = False) -> None:
        # between epochs no states are needed: the generators are seeded at the first step
        generators = self._gather(generator_states(self.device)) if self.batch else []
        self.saved_at = time.monotonic()
        if not self.fabric.is_global_zero:
            return
        state = {
            "format": FORMAT,
            "epoch": self.epoch,
            "batch": self.batch,
            "step": self.step,
            "phase": self.phase,
            "state_dict": self._weights(),
            "trained": self.task.state_dict() if self.average else None,
            "averaged": int(self.average.n_averaged) if self.average else 0,
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.fabric.strategy.precision.state_dict(),
            "history": self.history.state_dict(),
            "best": self.best,
            "plan": {"epochs": self.epochs, "limits": self._limits()},
            "taken": None if self.method.taken is None else sorted(self.method.taken),
            "generators": generators,
            "files": self.files,
        }
        write_checkpoint(self.run_folder, state, best=best)

    def _load(self, saved: Mapping[str, Any], optimizer: torch.optim.Optimizer, position: int) -> None:
        self.epoch, self.batch, self.step, self.best = (
            saved[key] for key in ("epoch", "batch", "step", "best")
        )
        # checkpoints of versions without phases have none
        self.phase = saved.get("phase", Phase().name)
        if self.average is not None:
            self.average.module.load_state_dict(saved["state_dict"])
            self.average.n_averaged.fill_(saved["averaged"])
        optimizer.load_state_dict(saved["optimizer"])
        if position:
            self._continue_schedule(optimizer, position)
        self.fabric.strategy.precision.load_state_dict(saved["scaler"])
        self.history.load_state_dict(saved["history"])

    def _continue_schedule(
        self, optimizer: torch.optim.Optimizer, position: int, *, warns: bool = True
    ) -> None:
        """Set the learning rates of a step. They differ from the present ones if the length has changed."""
        before = max(group["lr"] for group in optimizer.param_groups)
        # from the schedule of the present length, not from the checkpoint's: both are functions of the step
        state = self.scheduler.state_dict() | {"last_epoch": position - 1, "_step_count": position}
        self.scheduler.load_state_dict(state)
        with warnings.catch_warnings():
            # after one step, torch misses the step that was before the checkpoint
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
            self.scheduler.step()
        now = max(group["lr"] for group in optimizer.param_groups)
        if warns and now != before and self.fabric.is_global_zero:
            log.warning(
                "optim.schedule %s is now that of %d epochs: the learning rate, which was at %.2g, continues at %.2g.",
                self.optim.schedule, self.epochs, before, now,
            )  # fmt: skip

    def _seed(self) -> None:
        """Seed every generator at the first step of an epoch from (seed, epoch, rank).

        A resumed run then draws the same random numbers (dropout, Mixup, ...) as an uninterrupted one.
        """
        rank = self.fabric.global_rank
        if self.batch == 0:
            seed_everything(derive_seed(self.config.seed, "step", self.epoch, rank) % 2**32, verbose=False)
        elif self.checkpoint is not None and self.checkpoint["generators"]:
            set_generator_states(self.checkpoint["generators"][rank], self.device)
        self.checkpoint = None

    def _synchronized(self, enabled: bool) -> AbstractContextManager[Any]:
        """Return a context in which the ranks average their gradients, or accumulate them locally."""
        return nullcontext() if enabled or self.fabric.world_size == 1 else self.module.no_sync()  # type: ignore

    def _on_any_rank(self, decision: bool) -> bool:
        return self.fabric.strategy.reduce_boolean_decision(decision, all=False)

    def _mean_over_ranks(self, numbers: Tensor) -> Tensor:
        return self.fabric.strategy.all_reduce(numbers, reduce_op="mean")

    def _gather(self, value: Any) -> list[Any]:
        """Return the values of all ranks, on every rank."""
        gathered = [value] * self.fabric.world_size
        if self.fabric.world_size > 1:
            distributed.all_gather_object(gathered, value)
        return gathered

    def stop_processes(self) -> None:
        """Stop the processes started by this one, which would wait for it forever."""
        started = getattr(getattr(self.fabric.strategy, "launcher", None), "procs", [])
        processes = list(started)
        # otherwise Lightning's observer takes their end for a failure, and kills this process
        started.clear()
        for process in processes:
            process.kill()


@contextmanager
def _scaled_rates(optimizer: Any, factor: float) -> Iterator[None]:
    """Multiply the learning rates, and restore on exit those that the schedule has set."""
    groups = optimizer.param_groups if factor != 1 else ()
    rates = [group["lr"] for group in groups]
    for group in groups:
        group["lr"] *= factor
    yield
    for group, rate in zip(groups, rates, strict=True):
        group["lr"] = rate


def _limit(split: str, limit: int | float, loader: Sized) -> int:
    """Return the number of batches to take: a whole number of them, or a fraction."""
    count = int(len(loader) * limit) if isinstance(limit, float) else min(len(loader), limit)
    if len(loader) and limit and not count:
        raise UsageError(f"trainer.limit_{split}_batches {limit} leaves none of {len(loader)} batches.")
    return count


def warmed_up_decay(decay: float, updates: int) -> float:
    """Return the decay of a moving average after ``updates`` updates, warmed up.

    From https://www.tensorflow.org/api_docs/python/tf/train/ExponentialMovingAverage. With a constant decay of 0.999,
    the initial weights would still have a weight of 82% after 200 steps.
    """
    return min(decay, (1 + updates) / (10 + updates))
