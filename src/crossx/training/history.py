"""Metrics of a run: collected per step, averaged per epoch, written to files, and checked to be finite."""

from __future__ import annotations

import csv
import io
import math
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from crossx.errors import CrossXError
from crossx.runs import SCHEMA, Run, write_json, write_text
from crossx.terminal import columns


class History:
    """Collects the metrics of a run and stops it if the loss is not finite.

    Values stay on the device until ``collect``, so that no step waits for a GPU.

    Args:
        run: Folder of ``metrics.csv`` and ``metrics.json``.
        mean_over_ranks: Averages values over all processes.

    Attributes:
        rows: One row per epoch: ``epoch`` (from 1), ``step`` (optimiser steps), ``phase`` (its name, for methods with
            phases), ``train/...`` (means over the epoch, in training mode), ``lr`` (the highest at the first step),
            ``seconds`` since the start.
        ended: Why the training is over (``by``), and after which ``epoch``; None before.
        resumed_at: Number of rows before a resume.
    """

    def __init__(self, run: Run, mean_over_ranks: Callable[[Tensor], Tensor] | None = None) -> None:
        self.run = run
        self.rows: list[dict[str, Any]] = []
        self.ended: dict[str, Any] | None = None
        self._mean_over_ranks = mean_over_ranks
        self._live: dict[str, float] = {}
        self._pending: list[Tensor] = []
        self._sizes: list[float] = []
        self._newest: list[float] = []
        self._before = 0.0
        self.resumed_at = 0
        self._started = time.monotonic()
        self._open(0.0)

    def _open(self, lr: float, phase: str | None = None) -> None:
        self._names: list[str] = []
        self._totals = np.zeros(1)
        self._images = 0.0
        self._batches = 0
        self._lr = lr
        self._phase = phase

    def start_clock(self) -> None:
        """Start counting ``seconds``, on top of those before a resume."""
        self._started = time.monotonic()
        self.resumed_at = len(self.rows)

    @property
    def seconds(self) -> float:
        """Training time, including that before a resume."""
        return self._before + time.monotonic() - self._started

    def start_epoch(self, lr: float, phase: str | None = None) -> None:
        """Start a row."""
        self._open(lr, phase)

    def add(self, numbers: Mapping[str, Tensor], size: int) -> None:
        """Add the metrics of a batch of ``size`` images, scalars on the device, without reading them."""
        self._names = list(numbers)
        self._pending.append(torch.stack(tuple(numbers.values())))
        self._sizes.append(size)

    def collect(self, first_batch: int) -> None:
        """Read the added metrics.

        Args:
            first_batch: Batches before this epoch, for the message.

        Raises:
            CrossXError: If a value is not finite.
        """
        if not self._pending:
            return
        numbers, sizes = torch.stack(self._pending), self._sizes
        if self._mean_over_ranks:
            # over all ranks, so that all see the same values and stop together
            own = torch.cat((numbers, numbers.new_tensor(sizes)[:, None]), 1)
            means = self._mean_over_ranks(own)
            numbers, sizes = means[:, :-1], means[:, -1].tolist()
        rows = numbers.tolist()
        for row, size in zip(rows, sizes, strict=True):
            self._batches += 1
            if not all(map(math.isfinite, row)):
                where = f"at step {first_batch + self._batches} (epoch {len(self.rows) + 1}, batch {self._batches})"
                names = (f"train/{name}" for name in self._names)
                values = dict(zip(names, row, strict=True))
                raise self._not_finite(where, values, len(self.rows) + 1)
            self._totals = self._totals + size * np.array(row)
            self._images += size
        self._newest, self._pending, self._sizes = rows[-1], [], []

    def newest(self) -> dict[str, float]:
        """Return the metrics of the last collected batch, for the loggers."""
        return {f"train/{name}_step": value for name, value in zip(self._names, self._newest, strict=True)}

    def shown(self) -> dict[str, str]:
        """Return what the progress bar shows: means over the epoch so far, and the last evaluation."""
        if self._batches:
            self._live.update(self._means())
        # on a GPU the first epoch may be validated before any metric was read
        shown = {"loss": f"{self._live['train/loss']:.3f}"} if "train/loss" in self._live else {}
        top1 = {name: value for name, value in self._live.items() if name.endswith("/top1")}
        return shown | {name.removesuffix("/top1"): f"{value:.1%}" for name, value in top1.items()}

    def evaluated(self, values: Mapping[str, float], epoch: int) -> None:
        """Add loss and top-1 of the evaluated split after an epoch, counted from 1, whose row may be complete.

        Raises:
            CrossXError: If a value is not finite.
        """
        self._live.update(values)
        if not all(map(math.isfinite, values.values())):
            raise self._not_finite(f"after epoch {epoch}", values, epoch)

    def end_epoch(self, step: int, evaluated: Mapping[str, float]) -> dict[str, Any]:
        """Complete the row of this epoch; the checkpoint will contain it."""
        counts: dict[str, Any] = {"epoch": len(self.rows) + 1, "step": step}
        if self._phase is not None:
            counts["phase"] = self._phase
        row = {**counts, **self._means(), "lr": self._lr, **evaluated, "seconds": round(self.seconds, 2)}
        self.rows.append(row)
        return row

    def line(self, epochs: int) -> str:
        """Format the last row as one line, without what does not fit the terminal."""
        row = self.rows[-1]
        top1 = {name.removesuffix("/top1"): value for name, value in row.items() if name.endswith("/top1")}
        # none, if only the last validation was missing
        done = max(1, len(self.rows) - self.resumed_at)
        left = (row["seconds"] - self._before) / done * (epochs - len(self.rows))
        # held-out images first
        parts = [
            f"epoch {row['epoch']:>{len(str(epochs))}}/{epochs}",
            *(f"{name} {100 * top1[name]:5.2f}%" for name in sorted(top1, key=lambda name: name == "train")),
            f"{_duration(left)} left",
            f"loss {row['train/loss']:.4g}",
            *([row["phase"]] if "phase" in row else []),
            f"lr {row['lr']:.2g}",
        ]
        width = columns(sys.stderr)
        while width is not None and len("  ".join(parts)) > width and len(parts) > 2:
            parts.pop()
        return "  ".join(parts)

    def write(self) -> None:
        """Write ``metrics.csv`` and ``metrics.json`` atomically."""
        text = io.StringIO()
        writer = csv.DictWriter(
            text, list(dict.fromkeys(name for row in self.rows for name in row)), lineterminator="\n"
        )
        writer.writeheader()
        writer.writerows(self.rows)
        write_text(self.run.path / "metrics.csv", text.getvalue())
        values = {"schema": SCHEMA, "epochs": self.rows, "ended": self.ended}
        write_json(self.run.path / "metrics.json", values)

    def state_dict(self) -> dict[str, Any]:
        """Return the rows and the current epoch's sums, so that a resumed run loses no value."""
        return {
            "rows": self.rows,
            "seconds": self.seconds,
            "open": {
                "names": self._names,
                "totals": self._totals.tolist(),
                "images": self._images,
                "batches": self._batches,
                "lr": self._lr,
                "phase": self._phase,
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state of ``state_dict``."""
        self.rows, self._before, part = state["rows"], state["seconds"], state["open"]
        self._names, self._totals, self._images = part["names"], np.array(part["totals"]), part["images"]
        self._batches, self._lr, self._phase = part["batches"], part["lr"], part.get("phase")

    def _means(self) -> dict[str, float]:
        means = (self._totals / self._images).tolist()
        return {f"train/{name}": mean for name, mean in zip(self._names, means, strict=True)}

    def _not_finite(self, when: str, values: Mapping[str, float], epoch: int) -> CrossXError:
        numbers = ", ".join(
            f"{name} {value:.4g}" for name, value in values.items() if not name.endswith("top1")
        )
        # the newest checkpoint of an epoch whose row is complete has its weights
        good = self.run.last if epoch > len(self.rows) else self.run.previous
        kept = (
            f"the last good checkpoint is {good} (epoch {epoch - 1})"
            if good.is_file()
            else "there is no checkpoint from before"
        )
        return CrossXError(
            f"the loss is not finite {when}: {numbers}; {kept}. Lower --optim.lr, add --optim.warmup_epochs 1 or "
            "--trainer.gradient_clip_val 1, or use --trainer.precision 32."
        )


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
