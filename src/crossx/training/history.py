"""The numbers of a run: what each step and epoch gave, where they go, and the stop when they are no numbers."""

from __future__ import annotations

import csv
import io
import math
import sys
import time
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from crossx.errors import CrossXError
from crossx.runs import SCHEMA, Run, write_json, write_text


class History(Callback):
    """Gathers every number of a run and stops it where the loss is not finite.

    Numbers stay on the device until they are looked at: every step on the CPU, every ``log_every_n_steps`` steps
    elsewhere, so that no step waits for the GPU.

    Args:
        run: Where ``metrics.csv`` and ``metrics.json`` are written.
        quiet: Whether to print no line for each epoch.

    Attributes:
        rows: One row an epoch. ``epoch`` counts the epochs trained, ``step`` the optimiser steps; ``train/...``
            are means over the epoch while it was trained, ``lr`` is the highest learning rate at its first step,
            ``seconds`` the time since the start.
    """

    def __init__(self, run: Run, *, quiet: bool = False) -> None:
        self.run = run
        self.quiet = quiet
        self.rows: list[dict[str, float]] = []
        self._live: dict[str, float] = {}
        self._evaluated: dict[str, float] = {}
        self._names: tuple[str, ...] = ()
        self._pending: list[Tensor] = []
        self._sizes: list[float] = []
        self._newest: list[float] = []
        self._totals = np.zeros(1)
        self._images = 0.0
        self._batches = 0
        self._lr = 0.0
        self._before = 0.0
        self._resumed_at = 0
        self._started = time.monotonic()

    def state_dict(self) -> dict[str, Any]:
        """Return the rows, so that a resumed run neither repeats nor loses one."""
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the rows of the run that is resumed."""
        self.rows = state_dict["rows"]
        self._before = self.rows[-1]["seconds"]
        self._resumed_at = len(self.rows)

    @property
    def live(self) -> dict[str, float]:
        """For the progress bar: means over the epoch so far, and the newest evaluation."""
        if self._batches:
            self._live.update(self._means())
        return self._live

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._started = time.monotonic()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin a row."""
        self._pending, self._sizes, self._evaluated = [], [], {}
        self._totals, self._images, self._batches = np.zeros(1), 0.0, 0
        self._lr = max(group["lr"] for group in trainer.optimizers[0].param_groups)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take the numbers of one step.

        Raises:
            CrossXError: If one of them is not finite, at the latest ``log_every_n_steps`` steps later.
        """
        self._names = tuple(outputs["numbers"])
        self._pending.append(torch.stack(tuple(outputs["numbers"].values())))
        self._sizes.append(len(batch[1]))
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        logs = every > 0 and (batch_idx + 1) % every == 0
        if logs or pl_module.device.type == "cpu":
            self._collect(trainer)
        if logs:
            values = {
                f"train/{name}_step": value for name, value in zip(self._names, self._newest, strict=True)
            }
            for logger in trainer.loggers:
                logger.log_metrics(values, trainer.global_step)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take loss and top-1 of the evaluated split.

        Raises:
            CrossXError: If they are not finite.
        """
        if trainer.sanity_checking:
            return
        split: Any = pl_module.eval_split
        names = (f"{split}/loss", f"{split}/top1")
        self._evaluated = {name: float(trainer.callback_metrics[name]) for name in names}
        self._live.update(self._evaluated)
        if not all(map(math.isfinite, self._evaluated.values())):
            raise self._not_finite(f"after epoch {trainer.current_epoch + 1}", self._evaluated)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Complete the row of this epoch, before the checkpoint is written that holds it."""
        self._collect(trainer)
        trained = {**self._means(), "lr": self._lr}
        pl_module.log_dict(trained)
        counts = {"epoch": trainer.current_epoch + 1, "step": trainer.global_step}
        seconds = self._before + time.monotonic() - self._started
        self.rows.append({**counts, **trained, **self._evaluated, "seconds": round(seconds, 2)})
        if not self.quiet and trainer.is_global_zero:
            print(self._line(trainer), file=sys.stderr)

    def write(self) -> None:
        """Write ``metrics.csv`` and ``metrics.json``, whole and atomically."""
        text = io.StringIO()
        writer = csv.DictWriter(
            text, list(dict.fromkeys(name for row in self.rows for name in row)), lineterminator="\n"
        )
        writer.writeheader()
        writer.writerows(self.rows)
        write_text(self.run.path / "metrics.csv", text.getvalue())
        write_json(self.run.path / "metrics.json", {"schema": SCHEMA, "epochs": self.rows})

    def _collect(self, trainer: Trainer) -> None:
        if not self._pending:
            return
        numbers, sizes = torch.stack(self._pending), self._sizes
        if trainer.world_size > 1:
            # over all ranks, so that each sees the same numbers and all stop together
            own = torch.cat((numbers, numbers.new_tensor(sizes)[:, None]), 1)
            means = trainer.strategy.reduce(own, reduce_op="mean")
            numbers, sizes = means[:, :-1], means[:, -1].tolist()
        rows = numbers.tolist()
        for row, size in zip(rows, sizes, strict=True):
            self._batches += 1
            if not all(map(math.isfinite, row)):
                loop = trainer.fit_loop
                step = loop.total_batch_idx - loop.batch_idx + self._batches
                when = f"at step {step} (epoch {trainer.current_epoch + 1}, batch {self._batches})"
                names = (f"train/{name}" for name in self._names)
                raise self._not_finite(when, dict(zip(names, row, strict=True)))
            self._totals = self._totals + size * np.array(row)
            self._images += size
        self._newest, self._pending, self._sizes = rows[-1], [], []

    def _means(self) -> dict[str, float]:
        means = (self._totals / self._images).tolist()
        return {f"train/{name}": mean for name, mean in zip(self._names, means, strict=True)}

    def _not_finite(self, when: str, values: dict[str, float]) -> CrossXError:
        numbers = ", ".join(
            f"{name} {value:.4g}" for name, value in values.items() if not name.endswith("top1")
        )
        kept = (
            f"the last good checkpoint is {self.run.last} (epoch {len(self.rows)})"
            if self.rows
            else "no checkpoint was written yet"
        )
        return CrossXError(
            f"the loss is not finite {when}: {numbers}; {kept}. Lower --optim.lr, add --optim.warmup_epochs 1 or "
            "--trainer.gradient_clip_val 1, or use --trainer.precision 32."
        )

    def _line(self, trainer: Trainer) -> str:
        row, epochs = self.rows[-1], trainer.max_epochs or 0
        parts = [f"epoch {row['epoch']}/{epochs}", f"loss {row['train/loss']:.4f}"]
        parts += [
            f"{name.removesuffix('/top1')} {value:.2%}" for name, value in row.items() if "/top1" in name
        ]
        parts.append(f"lr {row['lr']:.2g}")
        done = len(self.rows) - self._resumed_at
        left = (row["seconds"] - self._before) / done * (epochs - len(self.rows))
        parts.append(f"{_duration(row['seconds'])}, {_duration(left)} left")
        return "  ".join(parts)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
