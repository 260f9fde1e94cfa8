"""Overhead of the training loop per step: ``crossx fit``, Lightning's Trainer and a bare PyTorch loop.

    OMP_NUM_THREADS=1 python benchmarks/loop_overhead.py
    OMP_NUM_THREADS=1 python benchmarks/loop_overhead.py --clock cpu    # if other programs are running

The same step (forward, objective, backward, optimiser, learning rate) on the same batches in memory is run by

- ``bare``: a ``for`` loop in PyTorch that records nothing;
- ``lightning``: Lightning's Trainer with a module of ten lines, without logger, callback or progress bar;
- ``crossx``: the default loop of ``crossx fit``: metrics of every step, checkpoints, TensorBoard;
- ``crossx, terminal``: the same with the progress bar of a terminal.

All must end with bitwise identical weights, which is checked. The default network takes about 5 ms per step on one CPU
core. A GPU uses a larger network, for which the host may need as long per step as the device; steps that wait for the
GPU are counted separately. ``--clock cpu`` measures the processor time of the process instead of elapsed time, because
other programs affect it less.
"""

from __future__ import annotations

import os
import pty
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

import crossx as library
from crossx.data.catalog import read_configured
from crossx.data.config import DataConfig
from crossx.data.datamodule import DataModule
from crossx.data.sampler import EpochSampler
from crossx.data.transforms import preprocessing_for
from crossx.methods.base import Method
from crossx.runs import Run
from crossx.training.config import Config, ModelConfig
from crossx.training.fabric import quiet_lightning
from crossx.training.loop import Loop
from crossx.training.optim import build_optimizer, build_scheduler
from crossx.training.task import Task
from harness import Timing, parser, ratios, synchronize, table, write

EPOCHS = 2
SKIPPED = 20
"""Steps of an epoch that come before its clock starts."""

Batch = tuple[Tensor, Tensor]


class Batches:
    """Repeats one batch, with a clock that starts and stops when a batch is requested.

    Attributes:
        seconds_a_step: Seconds per step of each epoch.
        between: Seconds from the last batch of an epoch to the first of the next.
    """

    def __init__(self, batch: Batch, steps: int, clock: Callable[[], float]) -> None:
        self.batch = batch
        self.steps = steps
        self.clock = clock
        self.sampler = EpochSampler([0], seed=0)
        self.seconds_a_step: list[float] = []
        self.between: list[float] = []
        self._ended: float | None = None

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[Batch]:
        start = 0.0
        for index in range(self.steps):
            if index == 0 and self._ended is not None:
                self.between.append(self.now() - self._ended)
            elif index == SKIPPED:
                start = self.now()
            elif index == self.steps - 1:
                self._ended = self.now()
                self.seconds_a_step.append((self._ended - start) / (index - SKIPPED))
            yield self.batch

    def now(self) -> float:
        synchronize()
        return self.clock()


class Images(DataModule):
    """Batches that are already on the device and normalised."""

    def to_device(self, batch: Batch, device: torch.device) -> Batch:
        images, targets = batch
        return images.to(device, non_blocking=True), targets.to(device, non_blocking=True)


@dataclass
class Session:
    """The training setup that all loops share."""

    config: Config
    run: Run
    data: Images
    method: Method

    @classmethod
    def open(cls, config: Config, run: Run) -> Session:
        torch.manual_seed(config.seed)
        index = read_configured(config.data)
        model = config.model
        method = library.create_method(
            model.method,
            backbone=model.backbone,
            num_classes=len(index.classes),
            backbone_args=model.backbone_args,
        )
        preprocessing = preprocessing_for(config.data, method.backbone.data_config)
        return cls(config, run, Images(index, preprocessing, config.data, config.seed), method)


class Bare(LightningModule):
    """Only the step."""

    def __init__(self, session: Session, steps: int) -> None:
        super().__init__()
        self.steps = steps
        task = Task(session.method, session.config.optim, class_counts=[1] * session.method.num_classes)
        self.method, self.config, self.memory_format = task.method, task.config, task.memory_format

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images, targets = batch
        return self.method.objective(images.to(memory_format=self.memory_format), targets).loss

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer, scheduler = self.optimizer_and_scheduler()
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def optimizer_and_scheduler(self) -> tuple[Optimizer, LRScheduler]:
        optimizer = build_optimizer(self.method, self.config)
        return optimizer, build_scheduler(
            optimizer, self.config, steps_per_epoch=self.steps, total_steps=EPOCHS * self.steps
        )


def bare(session: Session, batches: Batches) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    module = Bare(session, len(batches)).train().to(device)
    optimizer, scheduler = module.optimizer_and_scheduler()
    for _ in range(EPOCHS):
        for batch in batches:
            images, targets = (tensor.to(device, non_blocking=True) for tensor in batch)
            optimizer.zero_grad()
            module.training_step((images, targets), 0).backward()
            optimizer.step()
            scheduler.step()


def lightning(session: Session, batches: Batches) -> None:
    trainer = Trainer(
        max_epochs=EPOCHS,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Bare(session, len(batches)), batches)


def crossx(session: Session, batches: Batches) -> None:
    loop = Loop(
        session.method, session.data, session.config, session.run, run_id="benchmark", monitor="val/top1"
    )
    session.data.train_dataloader = lambda: batches  # type: ignore[assignment, method-assign, return-value]
    loop.run()


def crossx_in_terminal(session: Session, batches: Batches) -> None:
    with _terminal():
        crossx(session, batches)


CANDIDATES: dict[str, Callable[[Session, Batches], None]] = {
    "bare": bare,
    "lightning": lightning,
    "crossx": crossx,
    "crossx, terminal": crossx_in_terminal,
}


def main() -> None:
    options = parser(__doc__, "loop_overhead", runs=7)
    options.add_argument("--steps", type=int, default=220, help="steps per epoch (default: %(default)s)")
    options.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="default: %(default)s")
    options.add_argument("--method", default="plain", help="method (default: %(default)s)")
    asked = options.parse_args()
    clock = time.process_time if asked.clock == "cpu" else time.perf_counter
    gpu = torch.cuda.is_available()
    images = 64 if gpu else 2
    size = 224 if gpu else 64
    model = {
        "method": asked.method,
        "backbone": "resnet18" if gpu else "resnet10t",
        "backbone_args": {} if gpu else {"channels": [4, 8, 16, 32]},
        "pretrained": False,
    }
    generator = torch.Generator().manual_seed(0)
    batch = torch.randn(images, 3, size, size, generator=generator), torch.arange(images) % 3
    if gpu:
        batch = batch[0].pin_memory(), batch[1].pin_memory()
    seconds: dict[str, list[float]] = {name: [] for name in CANDIDATES}
    between: dict[str, list[float]] = {name: [] for name in CANDIDATES}
    waits: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as folder, quiet_lightning(), _quiet():
        data = DataConfig(
            dataset="synthetic", root=f"{folder}/images", num_classes=3, images_per_class=6, image_size=size
        )
        for done in range(-1, asked.runs):
            weights: dict[str, dict[str, Tensor]] = {}
            for name, train in CANDIDATES.items():
                run = Run(Path(folder) / f"{name}{done}")
                run.path.mkdir()
                config = Config(
                    model=ModelConfig.from_dict(model),
                    data=data,
                    trainer={"max_epochs": EPOCHS, "accelerator": "auto"},
                    output=str(run.path),
                )
                session, batches = Session.open(config, run), Batches(batch, asked.steps, clock)
                if done < 0:
                    waits[name] = _count_waits(lambda: train(session, batches))  # noqa: B023
                else:
                    train(session, batches)
                    seconds[name] += batches.seconds_a_step
                    between[name] += batches.between
                weights[name] = {key: value.cpu() for key, value in session.method.state_dict().items()}
            _check_equal(weights)
    timings = {name: Timing(tuple(values)) for name, values in seconds.items()}
    found = ratios(timings, "bare")
    base = timings["bare"].median
    rows = [
        [
            name,
            f"{1000 * timing.median:.3f}",
            str(found[name]),
            f"{1e6 * (found[name].median - 1) * base:.0f}",
            f"{1000 * Timing(tuple(between[name])).median:.1f}",
            *([waits[name]] if gpu else []),
        ]
        for name, timing in timings.items()
    ]
    headers = ["loop", "ms per step", "over bare", "us more", "ms between epochs"]
    print(table([*headers, *(["waits"] if gpu else [])], rows))
    write(
        asked.output,
        {
            "question": "What does the training loop add to a step?",
            "network": {**model, "image_size": size, "batch_size": images},
            "clock": asked.clock,
            "steps": {"an_epoch": asked.steps, "not_timed": SKIPPED, "epochs": EPOCHS * asked.runs},
            "loops": {
                name: {
                    "seconds_a_step": timing.to_json(),
                    "ratio": {"median": found[name].median, "min": found[name].min, "max": found[name].max},
                    "more_seconds_a_step": (found[name].median - 1) * base,
                    "seconds_between_epochs": Timing(tuple(between[name])).to_json(),
                    "waits_for_gpu": waits[name] if gpu else None,
                }
                for name, timing in timings.items()
            },
        },
    )


def _check_equal(weights: dict[str, dict[str, Tensor]]) -> None:
    reference = weights["bare"]
    for name, state in weights.items():
        if not all(torch.equal(value, reference[key]) for key, value in state.items()):
            raise SystemExit(f"{name}: the final weights differ from those of the bare loop.")


def _count_waits(train: Callable[[], None]) -> int:
    """Count the operations of the steps that wait for the GPU."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.filterwarnings("always", "called a synchronizing CUDA operation")
        if torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode("warn")
        train()
        if torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(warning.message) for warning in caught)


@contextmanager
def _quiet() -> Iterator[None]:
    before = sys.stderr
    with open(os.devnull, "w") as nowhere:
        sys.stderr = nowhere
        try:
            yield
        finally:
            sys.stderr = before


@contextmanager
def _terminal() -> Iterator[None]:
    """Make stderr a terminal that another process reads."""
    before, (ours, theirs) = sys.stderr, pty.openpty()
    with (
        subprocess.Popen(["cat"], stdin=ours, stdout=subprocess.DEVNULL) as reader,
        open(theirs, "w") as screen,
    ):
        os.close(ours)
        sys.stderr = screen
        try:
            yield
        finally:
            sys.stderr = before
            reader.terminate()


if __name__ == "__main__":
    main()
