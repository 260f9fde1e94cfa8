"""The training loop: epochs, steps, phases, checkpoints."""

from __future__ import annotations

import gc
import logging
import math
import sys
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from lightning.fabric import seed_everything
from torch import Tensor, distributed, nn

from crossx.backbones import synchronize_batch_norms
from crossx.data.datamodule import DataModule
from crossx.data.sampler import derive_seed
from crossx.distributed import gather
from crossx.errors import CrossXError
from crossx.methods.base import Method, Phase
from crossx.methods.start import Transfer
from crossx.runs import SCHEMA, Run, write_json
from crossx.terminal import erase_step
from crossx.training.average import Average
from crossx.training.batches import TrainBatches, limited
from crossx.training.checkpoints import FORMAT, write_checkpoint
from crossx.training.config import Config
from crossx.training.fabric import build_fabric
from crossx.training.generators import generator_states, set_generator_states
from crossx.training.history import History
from crossx.training.loggers import build_loggers, finalize_all, log_all
from crossx.training.optim import build_optimizer, scaled_rates
from crossx.training.plan import Plan
from crossx.training.preparation import prepare
from crossx.training.progress import Bar
from crossx.training.selection import BestEpoch
from crossx.training.stages import (
    BACKWARD,
    COPY,
    FILES,
    FIRST_WAIT,
    FORWARD,
    UPDATE,
    VALIDATION,
    WAIT,
    Stages,
)
from crossx.training.stopping import Patience, announce_end
from crossx.training.task import Task
from crossx.training.validation import Validation
from crossx.training.views import check_early_layers

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
        phase: Name of the phase that was started last; None before the first.
        plan: The epochs of the whole training, and its schedule.
        selection: The best epoch so far.

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
        self.run_folder, self.selection = run, BestEpoch(monitor)
        self.options = config.trainer
        self.checkpoint = checkpoint
        self.transfer = transfer
        self.epoch = self.batch = self.step = 0
        self.phase: str | None = None
        self.fabric = build_fabric(self.options)
        data.processes = getattr(self.fabric.strategy, "num_processes", 1)
        counts = Counter(record.label for record in data.train_records())
        classes = range(len(data.index.classes))
        self.plan = Plan(config, checkpoint.get("plan") if checkpoint else None)
        self.task = Task(method, self.plan.optim, class_counts=[counts[label] for label in classes])
        if self.task.early is not None:
            check_early_layers(self.task.early, method, data.preprocessing.image_size)
        self.has_phases = type(method).phase_at is not Method.phase_at
        if self.has_phases:
            self.task.check_phases(self.options.max_epochs)
        self.average: Average | None = None
        self.history = History(run, self._mean_over_ranks if self.fabric.world_size > 1 else None)
        self.loggers = build_loggers(
            self.options.loggers, run, run_id, checkpoint["step"] if checkpoint else 0
        )
        self.bar = Bar(self._shows, self.history.shown)
        self.saved_at = time.monotonic()
        self.stages = Stages()

    def run(self) -> None:
        """Train to the end.

        Raises:
            CrossXError: If loss or weights are not finite, or data or disk fail.
        """
        self._set_up()
        options = self.options
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
        fabric, task, run, saved = self.fabric, self.task, self.run_folder, self.checkpoint
        fabric.launch()
        self.device = fabric.device
        if self.options.profile and self.device.type == "cuda":
            # otherwise the time of a kernel counts to the stage that happens to wait for it
            self.stages = Stages(torch.cuda.synchronize)
        fabric.to_device(task)
        if saved is not None:
            # before anything is computed with them
            task.load_state_dict(saved["trained"] or saved["state_dict"])
        self.train_batches = TrainBatches(self.data, self.device)
        if task.early is not None:
            # on a resume too: the maps are not part of the checkpoints
            self.train_batches.store(task, self.plan.optim.cached_views, run.path, shows=self._shows)
        if saved is None:
            with task.skipping():
                self._prepare()
        if self.config.optim.ema_decay is not None:
            self.average = Average(task, self.config.optim.ema_decay)
        if self.options.sync_batchnorm:
            synchronize_batch_norms(task)
        # not fabric.setup_module: its wrapper casts the images in mixed precision, and costs 0.1 ms per step
        self.module: nn.Module = fabric.strategy.setup_module(task)
        self.wrapped = Phase().trains
        if self.config.optim.compile:
            task.compile_objective()
        self.train_loader: Any = self.train_batches.loader()
        limit = self.options.overfit_batches or self.options.limit_train_batches
        self.batches = limited("train", limit, self.train_loader)
        self.validation = Validation(self.data, self.config, fabric)
        self._set_up_optimizer()
        self.history.start_clock()
        if self.transfer is not None:
            # from now on the run can be resumed without the other one
            self.transfer = None
            self._save()

    def _set_up_optimizer(self) -> None:
        saved, accumulated = self.checkpoint, self.options.accumulate_grad_batches
        steps = -(-self.batches // accumulated)
        position = 0
        if saved is not None:
            # an epoch that max_steps or max_time cut short counts as a whole one
            position = saved["epoch"] * steps + -(-saved["batch"] // accumulated)
        optimizer = build_optimizer(self.method, self.plan.optim)
        self.plan.start(optimizer, steps, skipped=position - (saved["step"] if saved else 0))
        if saved is not None:
            self._load(saved, optimizer)
        if position:
            self.plan.continue_at(position)
        self.optimizer: Any = self.fabric.strategy.setup_optimizer(optimizer)

    def _prepare(self) -> None:
        prepare(self.method, self.train_batches, self.config, self.transfer, shows=self._shows)

    def _train_epoch(self) -> None:
        """Train to the end of the epoch or of the training."""
        history, stages = self.history, self.stages
        phase = self._start_phase()
        self.train_loader.sampler.set_epoch(0 if self.options.overfit_batches else self.epoch, self.batch)
        within = f" {phase.name}" if self.has_phases else ""
        self.bar.start(f"epoch {self.epoch + 1}/{self.plan.epochs}{within}", self.batches, self.batch)
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
            updated = self._train_batch(batch)
            if self._out_of_steps() or self._out_of_time():
                break
            if updated and self.batch < self.batches and self._is_checkpoint_due():
                history.collect(self.epoch * self.batches)
                with stages(FILES):
                    self._save()

    def _train_batch(self, batch: tuple[Tensor, ...]) -> bool:
        """Take a batch through the network and back; return whether it was the last one of a step."""
        options, history, stages = self.options, self.history, self.stages
        with stages(COPY):
            tensors = self.train_batches.to_device(batch)
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
        return not accumulates

    def _start_phase(self) -> Phase:
        """Set the phase of the epoch; if it is another one than before, let the method start it."""
        method = self.method
        phase = method.phase_at(self.epoch, self.plan.epochs)
        self.task.start_epoch(self.epoch, phase)
        if phase.name != self.phase and type(method).start_phase is not Method.start_phase:
            seed_everything(derive_seed(self.config.seed, "phase", self.epoch) % 2**32, verbose=False)
            copying = self.average.copying_changes(self.task) if self.average else nullcontext()
            with copying, self.task.skipping():
                method.start_phase(phase, self.train_batches.all())
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
        with scaled_rates(self.optimizer, self.method.phase.lr_factor):
            self.fabric.strategy.optimizer_step(self.optimizer)
        self.optimizer.zero_grad()
        self.plan.step()
        self.step += 1
        if self.average is not None:
            self.average.update(self.task, self.step)

    def _out_of_steps(self) -> bool:
        return 0 <= self.options.max_steps <= self.step

    def _out_of_time(self) -> bool:
        limit = self.plan.time_limit
        return limit < math.inf and self._on_any_rank(self.history.seconds >= limit)

    def _end_reason(self) -> str | None:
        """Return the option that ends the training after the present epoch, and say so if it ends early."""
        by = None
        if self.epoch >= self.plan.epochs:
            by = "max_epochs" if self.plan.epochs == self.options.max_epochs else "max_time"
        elif self.step and self._out_of_steps():
            by = "max_steps"
        elif self.patience.is_exhausted(self.history.rows, self.watched):
            by = "patience"
        # an epoch that is resumed ends first
        elif self.step and not self.batch and self._out_of_time():
            by = "max_time"
        if by is not None and self.epoch < self.options.max_epochs:
            announce_end(by, self.options, self.epoch, self.patience, self.history.rows, self.watched)
        return by

    @property
    def watched(self) -> str:
        """The metric that ``optim.patience`` looks at."""
        return self.selection.monitor or "val/top1"

    @property
    def patience(self) -> Patience:
        """The count of ``optim.patience``."""
        epochs = self.plan.epochs
        phases = [self.method.phase_at(epoch, epochs).name for epoch in range(epochs)]
        return Patience(self.plan.optim, phases, self.plan.steps_per_epoch)

    def _is_validated(self) -> bool:
        """Return whether the present epoch is one that is validated."""
        within = self.batch < self.batches and self._out_of_steps()
        return self.validation.is_due(self.epoch + 1) and not within

    def _validate(self) -> dict[str, float]:
        """Return loss and top-1 of the network after the newest epoch."""
        validation, bar = self.validation, self.bar
        bar.start("validating", validation.batches)
        found = validation.evaluate(self._evaluated(), self.stages, bar.update)
        # its row may be complete
        self.history.evaluated(found, self.epoch + 1 if self.batch else self.epoch)
        bar.update(validation.batches, draw=True)
        return found

    def _validate_last(self) -> None:
        """Validate the epoch after which the time was over, if ``check_val_every_n_epoch`` passed it over."""
        row = self.history.rows[-1]
        if not self.validation.batches or f"{self.validation.split}/top1" in row:
            return
        with self.stages(VALIDATION):
            found = self._validate()
        row |= found | {"seconds": round(self.history.seconds, 2)}
        log_all(self.loggers, found, self.step)
        best = self.selection.update(row)
        self._show_epoch()
        with self.stages(FILES):
            self._save(best=best)

    def _end_epoch(self, evaluated: Mapping[str, float]) -> None:
        """Complete the epoch's row, update the best epoch, and write the checkpoint, then the metrics."""
        history = self.history
        history.collect(self.epoch * self.batches)
        row = history.end_epoch(self.step, evaluated)
        self._require_finite()
        self.epoch, self.batch = self.epoch + 1, 0
        best = self.selection.update(row)
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
        uncached = self.data.config.cache == "none" and self.train_batches.stored is None
        waited = self.stages.waited()
        if is_first and counts and uncached and waited is not None:
            log.warning(
                "the steps of this epoch waited for images for %.0f%% of their time: --data.cache ram or disk "
                "decodes and resizes them only once.",
                100 * waited,
            )

    def _plan_epochs(self) -> None:
        """Plan the number of epochs from the time that they take."""
        if self.plan.time_limit == math.inf:
            return
        ends = torch.tensor([row["seconds"] for row in self.history.rows], dtype=torch.float64)
        if self.fabric.world_size > 1:
            # each rank has its own clock, and all have to agree
            distributed.broadcast(ends := ends.to(self.device, torch.float32), 0)
        if self.plan.fit_into_time(ends.tolist()):
            self.task.config = self.plan.optim

    @property
    def _shows(self) -> bool:
        return self.options.enable_progress_bar and self.fabric.is_global_zero

    def _show_epoch(self) -> None:
        if self._shows:
            erase_step()
            print(self.history.line(self.plan.epochs), file=sys.stderr)

    def _require_finite(self) -> None:
        weights = self._evaluated().state_dict().values()
        tensors = [tensor for tensor in weights if tensor.is_floating_point()]
        if not torch.stack([tensor.isfinite().all() for tensor in tensors]).all():
            last = self.run_folder.last
            kept = f"the last good checkpoint is {last}" if last.exists() else "none was written yet"
            raise CrossXError(
                f"weights are not finite at the end of epoch {self.epoch + 1}; {kept}. Lower --optim.lr, or add "
                "--trainer.gradient_clip_val 1."
            )

    def _evaluated(self) -> Task:
        """Return the network that is validated and becomes the model: the average, if one is kept."""
        return self.average.task if self.average else self.task

    def _is_checkpoint_due(self) -> bool:
        steps, minutes = self.options.checkpoint_every_n_steps, self.options.checkpoint_every_n_minutes
        if steps is not None and self.step % steps == 0:
            return True
        return minutes is not None and self._on_any_rank(time.monotonic() - self.saved_at >= 60 * minutes)

    def _save(self, *, best: bool = False) -> None:
        # between epochs no states are needed: the generators are seeded at the first step
        generators = gather(generator_states(self.device)) if self.batch else []
        self.saved_at = time.monotonic()
        if not self.fabric.is_global_zero:
            return
        state = {
            "format": FORMAT,
            "epoch": self.epoch,
            "batch": self.batch,
            "step": self.step,
            "phase": self.phase,
            "state_dict": self._evaluated().state_dict(),
            "trained": self.task.state_dict() if self.average else None,
            "averaged": self.average.updates if self.average else 0,
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.plan.schedule_state(),
            "scaler": self.fabric.strategy.precision.state_dict(),
            "history": self.history.state_dict(),
            "best": self.selection.best,
            "plan": self.plan.state_dict(),
            "profile": self.stages.state_dict() if self.options.profile else None,
            "taken": None if self.method.taken is None else sorted(self.method.taken),
            "generators": generators,
            "files": self.files,
        }
        write_checkpoint(self.run_folder, state, best=best)

    def _load(self, saved: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> None:
        self.epoch, self.batch, self.step = (saved[key] for key in ("epoch", "batch", "step"))
        self.selection.best = saved["best"]
        # checkpoints of versions without phases have none
        self.phase = saved.get("phase", Phase().name)
        if self.average is not None:
            self.average.load(saved["state_dict"], saved["averaged"])
        optimizer.load_state_dict(saved["optimizer"])
        self.fabric.strategy.precision.load_state_dict(saved["scaler"])
        self.history.load_state_dict(saved["history"])
        # nor those of versions without profiles of resumed runs
        self.stages.load_state_dict(saved.get("profile") or {})

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
