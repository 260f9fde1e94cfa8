"""What happens around the steps: checkpoints, randomness, the average of the weights, the progress bar."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Callback, Checkpoint, RichProgressBar, WeightAveraging
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, TextColumn, TimeRemainingColumn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from crossx.data.sampler import derive_seed
from crossx.errors import CrossXError
from crossx.runs import Run, atomic_path
from crossx.training.history import History

DRAWN_PER_SECOND = 4
"""How often the progress bar is drawn."""


class EpochSeed(Callback):
    """Seeds every generator at the first step of an epoch from (seed, epoch, rank).

    The randomness of an epoch (dropout, Mixup, ...) then needs no state in the checkpoint: a resumed run draws
    what the uninterrupted one drew, on every rank and device.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Seed once the first batch is there, whatever the loader drew before."""
        if batch_idx == 0:
            seed = derive_seed(self.seed, "step", trainer.current_epoch, trainer.global_rank)
            seed_everything(seed % 2**32, verbose=False)


class Checkpoints(Checkpoint):
    """Writes ``last.ckpt`` after each epoch and ``best.ckpt`` after the best ones.

    Lightning's ModelCheckpoint saves while an epoch is still open (a resumed run then repeats part of it) and
    forgets its best value when the run folder is moved.

    Args:
        run: The run folder.
        history: Its rows hold the monitored value.
        monitor: The column of which the highest value is best, of equal ones the later; None keeps no
            ``best.ckpt``.

    Attributes:
        best: ``epoch`` (epochs trained) and ``value`` of the best; empty before there is one.
    """

    def __init__(self, run: Run, history: History, monitor: str | None) -> None:
        self.run = run
        self.history = history
        self.monitor = monitor
        self.best: dict[str, float] = {}

    def state_dict(self) -> dict[str, Any]:
        """Return the best so far."""
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the best so far."""
        self.best = state_dict["best"]

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the checkpoints, then the metrics, so that these never run ahead.

        Raises:
            CrossXError: If a weight is not finite or the disk full; the files written before stay as they are.
        """
        self._require_finite(pl_module)
        row = self.history.rows[-1]
        value = row.get(self.monitor) if self.monitor else None
        if value is not None and (not self.best or value >= self.best["value"]):
            self.best = {"epoch": row["epoch"], "value": value}
            # best first: a kill in between leaves an older last, from which this epoch is repeated exactly
            trainer.save_checkpoint(self.run.best)
            if trainer.is_global_zero:
                _link(self.run.best, self.run.last)
        else:
            trainer.save_checkpoint(self.run.last)
        if trainer.is_global_zero:
            self.history.write()

    def _require_finite(self, pl_module: LightningModule) -> None:
        tensors = [tensor for tensor in pl_module.state_dict().values() if tensor.is_floating_point()]
        if not torch.stack([tensor.isfinite().all() for tensor in tensors]).all():
            kept = (
                f"the last good checkpoint is {self.run.last}"
                if self.run.last.exists()
                else "none was written yet"
            )
            raise CrossXError(
                f"weights are not finite at the end of epoch {self.history.rows[-1]['epoch']}; {kept}. Lower "
                "--optim.lr, or add --trainer.gradient_clip_val 1."
            )


class EMA(WeightAveraging):
    """Exponential moving average of weights and statistics; validation and checkpoints use the average.

    The decay warms up: update n keeps ``min(decay, (1 + n) / (10 + n))`` of the average
    (https://www.tensorflow.org/api_docs/python/tf/train/ExponentialMovingAverage). With a constant decay of 0.999 the
    initial weights would still count 82% after 200 steps.

    Args:
        decay: Share of the average that one step keeps, once it is warmed up.
    """

    def __init__(self, decay: float) -> None:
        def update(averages: Any, values: Any, count: Any) -> None:
            if averages[0].is_floating_point():
                get_ema_multi_avg_fn(warmed_up_decay(decay, int(count)))(averages, values, count)
            else:
                # counters and hashes: PyTorch's average of a whole number with itself may round to the one below
                torch._foreach_copy_(averages, values)

        super().__init__(multi_avg_fn=update)


def warmed_up_decay(decay: float, updates: int) -> float:
    """Return the share of the average that an update keeps, after ``updates`` others."""
    return min(decay, (1 + updates) / (10 + updates))


class LiveProgressBar(RichProgressBar):
    """Lightning's progress bar with time left, fed from ``History``: no number is fetched from the GPU for it.

    Lightning draws up to a hundred times a second, which takes longer than a short step.
    """

    def __init__(self, history: History) -> None:
        super().__init__(refresh_rate=DRAWN_PER_SECOND, console_kwargs={"stderr": True})
        self.history = history
        self._drawn = 0.0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take the step's numbers where it is time to draw, and after the last step."""
        now = time.monotonic()
        if now - self._drawn >= 1 / DRAWN_PER_SECOND or batch_idx + 1 == trainer.num_training_batches:
            self._drawn = now
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """Return the newest loss and top-1."""
        live = self.history.live
        # elsewhere than on a CPU the first epoch may be validated before a number of its steps was fetched
        shown = {"loss": f"{live['train/loss']:.3f}"} if "train/loss" in live else {}
        top1 = {name: value for name, value in live.items() if name.endswith("/top1")}
        return shown | {name.removesuffix("/top1"): f"{value:.1%}" for name, value in top1.items()}

    def configure_columns(self, trainer: Trainer) -> list[ProgressColumn]:
        """Return columns that leave room for the numbers on 80 characters."""
        words = TextColumn("{task.description}"), TextColumn("left")
        return [words[0], BarColumn(10), MofNCompleteColumn(), TimeRemainingColumn(compact=True), words[1]]

    def _get_train_description(self, current_epoch: int) -> str:
        return f"epoch {current_epoch + 1}/{self.trainer.max_epochs}"


def _link(source: Path, target: Path) -> None:
    """Make ``target`` the same file as ``source``: no second copy is written where the file system can link."""
    temporary = target.with_name(f".{target.name}.link")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:
        with atomic_path(target) as copy:
            shutil.copyfile(source, copy)
    else:
        temporary.replace(target)
