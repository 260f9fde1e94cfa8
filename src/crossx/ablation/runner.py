"""Training and testing of every variant of a suite with every seed, each as a ``crossx`` process of its own.

::

    OUTPUT/
      VARIANT/seed-N/       the run folder; what `crossx test` writes lies in it
      VARIANT/tune-K/...    the same of the variant's alternative K, where the suite tunes
      VARIANT/seed-N.yaml   its configuration
      VARIANT/seed-N.log    what its processes printed

A process of its own gives each training the memory it frees, and keeps a crash from the others. What is finished is not
run again; what was stopped is continued.
"""

from __future__ import annotations

import itertools
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

from crossx.ablation.suite import Suite
from crossx.errors import CrossXError, UsageError
from crossx.runs import Run, write_text
from crossx.schema import check_backbone_args
from crossx.training.config import Config
from crossx.yaml import load_yaml

SPLIT = "test"

_NEUTRAL = (
    "data.root",
    "data.num_workers",
    "data.cache",
    "data.eval_batch_size",
    "trainer.logger",
    "trainer.checkpoint_every_n_steps",
    "trainer.checkpoint_every_n_minutes",
)
"""Options that may differ between two calls: where things lie, and what changes speed alone."""


@dataclass(frozen=True, eq=False)
class Trial:
    """One training of a suite.

    Attributes:
        variant: The variant's name.
        seed: Seed of the training.
        config: Its configuration, ``output`` included.
        alternative: Which of the variant's alternatives, counted from 1; 0 is the variant as it stands.
    """

    variant: str
    seed: int
    config: Config
    alternative: int = 0

    def __str__(self) -> str:
        number = f", alternative {self.alternative}" if self.alternative else ""
        return f"{self.variant}{number}, seed {self.seed}"

    @property
    def run(self) -> Run:
        """Its run folder."""
        return Run(self.config.run_path())

    @property
    def log(self) -> Path:
        """What its processes print."""
        return self.run.path.parent / f"{self.run.path.name}.log"

    @property
    def asked(self) -> Path:
        """The configuration that it was started with."""
        return self.run.path.parent / f"{self.run.path.name}.yaml"

    @property
    def is_trained(self) -> bool:
        """Whether its training is finished."""
        return self.run.read_info().get("status") == "finished"

    @property
    def is_done(self) -> bool:
        """Whether it is trained, and tested with the weights that it ended with."""
        results = self.run.path / f"{SPLIT}.json"
        return (
            self.is_trained
            and results.is_file()
            and results.stat().st_mtime >= self.run.weights.stat().st_mtime
        )


def plan(
    suite: Suite, base: Config, seeds: Sequence[int], output: Path, chosen: Mapping[str, int] | None = None
) -> list[Trial]:
    """Return the trials of a suite, all variants with the first seed first.

    Args:
        suite: The variants.
        base: What they change.
        seeds: Seeds of the trainings, each once.
        output: The folder that holds all.
        chosen: Variant -> alternative to take; by default each variant as it stands.

    Raises:
        UsageError: If an option of a variant cannot work, a seed is given twice, or ``output`` holds a training of the
            same name with other options.
    """
    if len(set(seeds)) < len(seeds):
        raise UsageError(f"--seeds names a seed twice: {' '.join(map(str, seeds))}.")
    chosen = chosen or {}
    every = _alternatives(suite, base, seeds, output)
    return [trial for trial in every if trial.alternative == chosen.get(trial.variant, 0)]


def plan_tuning(suite: Suite, base: Config, seed: int, output: Path) -> list[Trial]:
    """Return the trials among which validation chooses: every variant and its alternatives, with one seed.

    Raises:
        UsageError: As ``plan``.
    """
    return _alternatives(suite, base, [seed], output) if suite.tune else []


def _alternatives(suite: Suite, base: Config, seeds: Sequence[int], output: Path) -> list[Trial]:
    # a progress bar would fill the log
    base = replace(base, trainer=replace(base.trainer, enable_progress_bar=False))
    trials = []
    for seed, (name, configs) in itertools.product(seeds, suite.configure(base).items()):
        for number, config in enumerate(configs):
            folder = output / name / f"tune-{number}" if number else output / name
            config = replace(config, seed=seed, output=str(folder / f"seed-{seed}"))
            trials.append(Trial(name, seed, config, number))
    for trial in trials:
        _check_same(trial)
    return trials


def check_trials(trials: Sequence[Trial], *, tuned: bool = False) -> None:
    """Find out before hours of training what no training of a suite can do without: its data, and a network to build.

    Args:
        trials: All that will be trained.
        tuned: Whether validation images are needed, too.

    Raises:
        UsageError: If an option cannot work, naming the variant.
        CrossXError: If the data cannot be read.
    """
    # imports torch
    import torch

    from crossx.data.catalog import read_configured
    from crossx.methods.base import create_method
    from crossx.training.fit import choose_sampling
    from crossx.training.task import build_mix

    classes: dict[str, int] = {}
    for trial in {(trial.variant, trial.alternative): trial for trial in trials}.values():
        data, model = trial.config.data, trial.config.model
        if repr(data) not in classes:
            index = read_configured(data).with_validation(data.val_fraction, data.split_seed)
            classes[repr(data)] = len(index.classes)
            if not index.split(SPLIT):
                raise CrossXError(
                    f"variant {trial.variant}: dataset {index.name!r} has no {SPLIT} images to measure it on."
                )
            if tuned and (data.train_on == "trainval" or not index.split("val")):
                raise UsageError(
                    f"variant {trial.variant}: tuning needs validation images that are not trained on: see "
                    "--data.val_fraction and --data.train_on."
                )
        if tuned:
            _check_validates(trial)
        try:
            check_backbone_args(model.backbone_args)
            with torch.device("meta"):
                method = create_method(
                    model.method,
                    backbone=model.backbone,
                    num_classes=classes[repr(data)],
                    backbone_args=model.backbone_args,
                    image_size=data.image_size,
                    **model.options,
                )
                method.check_image_size(data.image_size)
            replace(data, sampling=choose_sampling(data.sampling, method))
            build_mix(method, trial.config.optim)
        except UsageError as error:
            raise UsageError(f"variant {trial.variant}: {error}") from error


def _check_validates(trial: Trial) -> None:
    """Check that the epoch whose weights become the model is validated, for tuning to choose by."""
    trainer = trial.config.trainer
    if trial.config.optim.selection == "best_on_test":
        raise UsageError(
            f"variant {trial.variant}: tuning chooses on validation images, and optim.selection best_on_test on the "
            "test images: take best or last."
        )
    for option in ("max_steps", "max_time"):
        if getattr(trainer, option) not in (None, -1):
            raise UsageError(
                f"variant {trial.variant}: tuning needs validation after the last step, and trainer.{option} may stop "
                "within an epoch: give --trainer.max_epochs."
            )
    if trainer.limit_val_batches == 0 or trainer.max_epochs % trainer.check_val_every_n_epoch:
        raise UsageError(
            f"variant {trial.variant}: tuning needs validation after the last epoch: see --trainer.limit_val_batches "
            "and --trainer.check_val_every_n_epoch."
        )


def run_trials(
    trials: Sequence[Trial],
    jobs: int = 1,
    report: Callable[[Trial, str | None], None] = lambda *_: None,
    *,
    test: bool = True,
) -> dict[Trial, str]:
    """Train and test what is not done yet, several at a time.

    Args:
        trials: See ``plan``.
        jobs: How many run at the same time; each takes its share of the CPU cores, and GPUs in turn.
        report: Called after each trial with it and the reason if it failed; in the calling thread.
        test: Whether to test; what only validation looks at need not be.

    Returns:
        The trials that failed, with the reason in one line. The others are done.

    Raises:
        KeyboardInterrupt: After Ctrl-C or SIGTERM; what was running has saved what it had.
    """
    failed = {}
    crew = _Crew(jobs, test)
    with crew.stopped_by_signals(), ThreadPoolExecutor(jobs) as pool:
        waiting = {pool.submit(crew.run, trial): trial for trial in trials}
        try:
            for future in as_completed(waiting):
                trial, reason = waiting[future], future.result()
                if reason:
                    failed[trial] = reason
                report(trial, reason)
        except BaseException:
            # the pool waits for its threads before the error is seen
            crew.stop()
            raise
    return failed


class _Crew:
    """The processes at work: starts them, each with its share of the machine, and stops them."""

    def __init__(self, jobs: int, test: bool) -> None:
        self.stopping = False
        self._test = test
        self._lock = threading.Lock()
        self._processes: set[subprocess.Popen[bytes]] = set()
        self._places: queue.SimpleQueue[Mapping[str, str]] = queue.SimpleQueue()
        for place in places(jobs, os.cpu_count() or 1, visible_gpus(), os.environ):
            self._places.put(place)

    def run(self, trial: Trial) -> str | None:
        """Bring a trial to its end; return why it failed."""
        place = self._places.get()
        try:
            if not trial.is_trained:
                self._call(trial, place, _training(trial))
            if self._test and not trial.is_done:
                self._call(trial, place, ["test", str(trial.run.path), *_root(trial)])
        except (CrossXError, OSError) as error:
            return str(error)
        finally:
            self._places.put(place)
        return None

    def stop(self) -> None:
        """Ask every process to save what it has and end."""
        with self._lock:
            self.stopping = True
            for process in self._processes:
                process.terminate()

    @contextmanager
    def stopped_by_signals(self) -> Iterator[None]:
        """Take SIGTERM as Ctrl-C is taken."""

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

    def _call(self, trial: Trial, place: Mapping[str, str], arguments: Sequence[str]) -> None:
        trial.log.parent.mkdir(parents=True, exist_ok=True)
        with trial.log.open("ab") as log:
            with self._lock:
                if self.stopping:
                    raise CrossXError("stopped before it began.")
                # a session of its own: the terminal's Ctrl-C reaches this process alone, which passes it on once
                process = subprocess.Popen(
                    [sys.executable, "-m", "crossx", *arguments],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env={**os.environ, **place},
                    start_new_session=True,
                )
                self._processes.add(process)
            code = process.wait()
        with self._lock:
            self._processes.discard(process)
        if code != 0:
            raise CrossXError(_reason(trial.log, code))


def _training(trial: Trial) -> list[str]:
    """Return the command that trains, or goes on where it was stopped."""
    if trial.run.config.is_file():
        return ["fit", "--resume", str(trial.run.path), *_root(trial)]
    write_text(trial.asked, trial.config.to_yaml())
    return ["fit", "--config", str(trial.asked)]


def _root(trial: Trial) -> list[str]:
    """Return the option that says where the data lie now."""
    root = trial.config.data.root
    return ["--data.root", root] if root else []


def places(
    jobs: int, cores: int, gpus: Sequence[str], environment: Mapping[str, str]
) -> list[dict[str, str]]:
    """Return the environment variables that give each of several processes its share of the machine.

    Args:
        jobs: Number of processes at a time.
        cores: CPU cores that they share.
        gpus: GPUs that they take in turn; one alone is shared.
        environment: What the user set stays.
    """
    shared: dict[str, str] = {}
    if jobs > 1 and "OMP_NUM_THREADS" not in environment:
        shared["OMP_NUM_THREADS"] = str(max(1, cores // jobs))
    return [
        {**shared, **({"CUDA_VISIBLE_DEVICES": gpus[job % len(gpus)]} if len(gpus) > 1 and jobs > 1 else {})}
        for job in range(jobs)
    ]


def visible_gpus() -> list[str]:
    """Return the names by which CUDA_VISIBLE_DEVICES calls the GPUs that this process sees."""
    # imports torch
    import torch

    if named := os.environ.get("CUDA_VISIBLE_DEVICES"):
        return named.split(",")
    return [str(number) for number in range(torch.cuda.device_count())]


def _reason(log: Path, code: int) -> str:
    """Return the last line that a failed process printed, which is its error."""
    if code < 0:
        return f"killed by {signal.Signals(-code).name}; see {log}."
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1] if lines else f"exit code {code}; see {log}."


def _check_same(trial: Trial) -> None:
    """Check that a run which is there already is the one that would be trained."""
    if not trial.run.config.is_file():
        return
    asked_before = trial.asked if trial.asked.is_file() else trial.run.config
    there, now = _identity(Config.from_yaml(asked_before)), _identity(trial.config)
    differing = sorted(key for key in there.keys() | now.keys() if there.get(key) != now.get(key))
    if differing:
        key = differing[0]
        raise UsageError(
            f"{trial.run.path}: trained with {key} {there.get(key)}, and now it is {now.get(key)}: choose another "
            "--output."
        )


def _identity(config: Config) -> dict[str, Any]:
    """Return what a training depends on, flat: all but the folders' places and what only changes its speed."""
    # imports torch
    from crossx.methods.base import method_class, method_options

    model = replace(config.model, options={**method_options(config.model.method), **config.model.options})
    # left out and given are the same training
    sampling = config.data.sampling or method_class(model.method).sampling or "uniform"
    completed = replace(config, model=model, data=replace(config.data, sampling=sampling))
    # as YAML gives it back: tuples are lists
    values = load_yaml(completed.to_yaml(), "the configuration")
    flat = {
        f"{section}.{key}": value
        for section in ("model", "data", "optim", "trainer")
        for key, value in values[section].items()
    }
    return {key: value for key, value in flat.items() if key not in _NEUTRAL}
