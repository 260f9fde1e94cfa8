"""Train and test every variant of a suite with every seed, each in its own ``crossx`` process.

::

    OUTPUT/
      VARIANT/seed-N/       the run folder, with the results of `crossx test`
      VARIANT/tune-K/...    the same for the variant's alternative K, if the suite tunes
      VARIANT/seed-N.yaml   its configuration
      VARIANT/seed-N.log    the output of its processes

Separate processes start with free memory and survive each other's crashes. Finished trainings are not run again,
stopped ones are continued.
"""

from __future__ import annotations

import itertools
import logging
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from crossx.ablation.suite import Suite
from crossx.errors import CrossXError, UsageError, counted, sigterm_interrupts
from crossx.recipes import NEUTRAL, SECTIONS
from crossx.runs import Run, lock_holder, stop_holder, write_text
from crossx.schema.model import check_backbone_args
from crossx.training.config import Config
from crossx.yaml import load_yaml

SPLIT = "test"
WATCHED_EVERY = 0.5
"""Seconds between two looks at a training."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Trial:
    """One training of a suite.

    Attributes:
        variant: The variant's name.
        seed: Seed of the training.
        config: Its configuration, ``output`` included.
        alternative: Which of the variant's alternatives, counted from 1; 0 is the unchanged variant.
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
        """The output of its processes."""
        return self.run.path.with_name(f"{self.run.path.name}.log")

    @property
    def config_file(self) -> Path:
        """The configuration that it was started with."""
        return self.run.path.with_name(f"{self.run.path.name}.yaml")

    @property
    def is_trained(self) -> bool:
        """Whether its training is finished."""
        return self.run.read_info().get("status") == "finished"

    @property
    def is_done(self) -> bool:
        """Whether it is trained, and tested with its final weights."""
        results = self.run.path / f"{SPLIT}.json"
        return (
            self.is_trained
            and results.is_file()
            and results.stat().st_mtime >= self.run.weights.stat().st_mtime
        )


def plan(
    suite: Suite, base: Config, seeds: Sequence[int], output: Path, chosen: Mapping[str, int] | None = None
) -> list[Trial]:
    """Return the trials of a suite, ordered by seed.

    Args:
        suite: The variants.
        base: The configuration that they change.
        seeds: Seeds of the trainings, without duplicates.
        output: The folder of all trials.
        chosen: Variant -> alternative; by default every variant unchanged.

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
    """Return the trials that validation chooses from: every variant and its alternatives, with one seed.

    Raises:
        UsageError: As ``plan``.
    """
    return _alternatives(suite, base, [seed], output) if suite.tune else []


def _alternatives(suite: Suite, base: Config, seeds: Sequence[int], output: Path) -> list[Trial]:
    trials = []
    for seed, (name, configs) in itertools.product(seeds, suite.configure(base).items()):
        for number, config in enumerate(configs):
            folder = output / name / f"tune-{number}" if number else output / name
            config = replace(config, other_methods={}, seed=seed, output=str(folder / f"seed-{seed}"))
            trials.append(Trial(name, seed, config, number))
    for trial in trials:
        _check_same(trial)
    return trials


def check_trials(trials: Sequence[Trial], *, tuned: bool = False) -> None:
    """Check, before hours of training, that the data of every trial can be read and its network built.

    Args:
        trials: All trials.
        tuned: Whether validation images are needed too.

    Raises:
        UsageError: If an option cannot work, naming the variant.
        CrossXError: If the data cannot be read, naming the variant unless all have the same data.
    """
    classes: dict[str, int] = {}
    checked = {(trial.variant, trial.alternative): trial for trial in trials}.values()
    same_data = len(checked) > 1 and len({repr(trial.config.data) for trial in checked}) == 1
    for trial in checked:
        try:
            check_config(trial.config, classes, tested=True, tuned=tuned)
        except CrossXError as error:
            if classes or not same_data:
                error.args = (f"variant {trial.variant}: {error}",)
            raise


def check_config(config: Config, classes: dict[str, int], *, tested: bool, tuned: bool) -> None:
    """Check that the data of a configuration can be read and its network built.

    Args:
        config: The configuration.
        classes: Number of classes by the options of the data, so that these are read once; filled here once nothing
            is wrong with them.
        tested: Whether test images are needed.
        tuned: Whether validation images that choose between configurations are needed.

    Raises:
        UsageError: If an option cannot work.
        CrossXError: If the data cannot be read.
    """
    # imports torch
    import torch

    from crossx.data.catalog import read_configured
    from crossx.methods.registry import create_method
    from crossx.training.creation import choose_sampling
    from crossx.training.task import build_mix

    data, model = config.data, config.model
    if repr(data) not in classes:
        index = read_configured(data).with_validation(data.val_fraction, data.split_seed)
        if tested and not index.split(SPLIT):
            raise CrossXError(f"dataset {index.name!r} has no {SPLIT} images to measure it on.")
        if tuned and data.train_on == "trainval":
            raise UsageError(
                "tuning needs validation images that are not trained on: leave out --data.train_on trainval."
            )
        if tuned and not index.split("val"):
            few = counted(len(index.split("train")), "training image")
            raise UsageError(
                f"tuning needs validation images, and data.val_fraction {data.val_fraction:g} of {few} in "
                f"{counted(len(index.classes), 'class')} holds none out: give a larger --data.val_fraction."
            )
        classes[repr(data)] = len(index.classes)
    if tuned:
        _check_validates(config)
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
    build_mix(method, config.optim)


def _check_validates(config: Config) -> None:
    """Check that the epoch whose weights are kept is validated."""
    trainer = config.trainer
    if config.optim.selection == "best_on_test":
        raise UsageError(
            "tuning chooses on validation images, and optim.selection best_on_test on the test images: take best or "
            "last."
        )
    for option in ("max_steps", "max_time"):
        if getattr(trainer, option) not in (None, -1):
            raise UsageError(
                f"tuning needs validation after the last step, and trainer.{option} may stop within an epoch: give "
                "--trainer.max_epochs."
            )
    epochs = trainer.max_epochs
    if not epochs or trainer.limit_val_batches == 0 or epochs % trainer.check_val_every_n_epoch:
        raise UsageError(
            "tuning needs validation after the last epoch: see --trainer.max_epochs, --trainer.limit_val_batches and "
            "--trainer.check_val_every_n_epoch."
        )


def run_trials(
    trials: Sequence[Trial],
    jobs: int = 1,
    report: Callable[[Trial, str | None], None] = lambda *_: None,
    *,
    test: bool = True,
) -> dict[Trial, str]:
    """Train and test the trials that are not done yet, several at a time.

    Args:
        trials: See ``plan``.
        jobs: How many run at the same time; each takes its share of the CPU cores, and GPUs in turn.
        report: Called in the calling thread after each trial, with the reason if it failed.
        test: Whether to test; tuning needs only validation.

    Returns:
        The failed trials, each with the reason in one line. All others are done.

    Raises:
        KeyboardInterrupt: After Ctrl-C or SIGTERM; running trainings have saved their state.
    """
    failed = {}
    processes = Processes(jobs)
    with sigterm_interrupts(), ThreadPoolExecutor(jobs) as pool:
        waiting = {pool.submit(processes.run, trial, test=test): trial for trial in trials}
        try:
            for future in as_completed(waiting):
                trial, reason = waiting[future], future.result()
                if reason:
                    failed[trial] = reason
                report(trial, reason)
        except BaseException:
            # now, since leaving the block waits for the pool's threads
            pool.shutdown(wait=False, cancel_futures=True)
            processes.stop()
            raise
    return failed


class Processes:
    """The running processes, each with its share of the machine.

    Args:
        jobs: How many run at the same time.
    """

    def __init__(self, jobs: int) -> None:
        self._stopping = False
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen[bytes]] = set()
        self._free: queue.SimpleQueue[Mapping[str, str]] = queue.SimpleQueue()
        for variables in divide_machine(jobs, os.cpu_count() or 1, visible_gpus(), os.environ):
            self._free.put(variables)

    def run(
        self, trial: Trial, *, test: bool = True, watch: Callable[[], bool] = lambda: False
    ) -> str | None:
        """Train a trial, from where it was stopped, and test it.

        Args:
            trial: The trial.
            test: Whether to test it.
            watch: Called twice a second while it is trained; it is stopped as soon as this returns True.

        Returns:
            Why it failed; None if it is done or was stopped by ``watch``.
        """
        variables = self._free.get()
        try:
            # the data may have been moved since the training was started
            root = ["--data.root", trial.config.data.root] if trial.config.data.root else []
            self._train(trial, variables, root, watch)
            if test and not trial.is_done:
                self._call(trial, variables, ["test", str(trial.run.path), *root])
        except (CrossXError, OSError) as error:
            return str(error)
        finally:
            self._free.put(variables)
        return None

    def _train(
        self, trial: Trial, variables: Mapping[str, str], root: Sequence[str], watch: Callable[[], bool]
    ) -> None:
        stopped = self._wait_for_orphan(trial, watch)
        while not (stopped or trial.is_trained):
            if trial.run.config.is_file():
                words = ["fit", "--resume", str(trial.run.path), *root]
            else:
                write_text(trial.config_file, trial.config.to_yaml())
                words = ["fit", "--config", str(trial.config_file)]
            try:
                self._call(trial, variables, words, watch)
                return
            except CrossXError:
                # an orphan that was still starting locked the folder in the meantime
                if self._stopping or not (trial.is_trained or lock_holder(trial.run.path) is not None):
                    raise
            stopped = self._wait_for_orphan(trial, watch)

    def _wait_for_orphan(self, trial: Trial, watch: Callable[[], bool]) -> bool:
        """Wait for a training that continued when this command was killed; its result is used.

        Returns:
            Whether it was stopped by ``watch``.
        """
        told = stopped = False
        while not self._stopping and (holder := lock_holder(trial.run.path)) is not None:
            if not told:
                log.warning(
                    "%s: another process is training in it%s: waiting for it to finish.",
                    trial.run.path,
                    holder,
                )
            told = True
            if not stopped and watch():
                stopped = stop_holder(trial.run.path)
            time.sleep(WATCHED_EVERY)
        return stopped

    def stop(self) -> None:
        """Ask every process to save its state and end."""
        with self._lock:
            self._stopping = True
            for process in self._running:
                process.terminate()

    def _call(
        self,
        trial: Trial,
        variables: Mapping[str, str],
        arguments: Sequence[str],
        watch: Callable[[], bool] = lambda: False,
    ) -> None:
        trial.log.parent.mkdir(parents=True, exist_ok=True)
        with trial.log.open("ab") as log:
            with self._lock:
                if self._stopping:
                    raise CrossXError("stopped before it began.")
                # in a new session, so that Ctrl-C in the terminal reaches only this process, which passes it on
                process = subprocess.Popen(
                    [sys.executable, "-m", "crossx", *arguments],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env={**os.environ, **variables},
                    start_new_session=True,
                )
                self._running.add(process)
            code, stopped = _wait(process, watch)
        with self._lock:
            self._running.discard(process)
        if code != 0 and not stopped:
            raise CrossXError(_reason(trial.log, code))


def _wait(process: subprocess.Popen[bytes], watch: Callable[[], bool]) -> tuple[int, bool]:
    """Return the exit code of a process, and whether it was stopped because of ``watch``."""
    stopped = False
    while True:
        try:
            return process.wait(timeout=WATCHED_EVERY), stopped
        except subprocess.TimeoutExpired:
            if not stopped and watch():
                stopped = True
                process.terminate()


def divide_machine(
    jobs: int, cores: int, gpus: Sequence[str], environment: Mapping[str, str]
) -> list[dict[str, str]]:
    """Return, for each of several processes, the environment variables that give it its share of the machine.

    Args:
        jobs: Number of processes at a time.
        cores: CPU cores to divide.
        gpus: GPUs, assigned in turn; a single one is shared.
        environment: The user's variables, which are not overridden.
    """
    if jobs == 1:
        return [{}]
    shared = {} if "OMP_NUM_THREADS" in environment else {"OMP_NUM_THREADS": str(max(1, cores // jobs))}
    if len(gpus) < 2:
        return [shared] * jobs
    return [{**shared, "CUDA_VISIBLE_DEVICES": gpus[job % len(gpus)]} for job in range(jobs)]


def visible_gpus() -> list[str]:
    """Return the visible GPUs as CUDA_VISIBLE_DEVICES names them."""
    # imports torch
    import torch

    if named := os.environ.get("CUDA_VISIBLE_DEVICES"):
        return named.split(",")
    return [str(number) for number in range(torch.cuda.device_count())]


def _reason(log: Path, code: int) -> str:
    """Return the error of a failed process, which is the last line of its output."""
    if code < 0:
        name = signal.Signals(-code).name
        return f"killed by {name}{', as where memory is short' if -code == signal.SIGKILL else ''}."
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1] if lines else f"exit code {code} without a message."


def _check_same(trial: Trial) -> None:
    """Check that an existing run has the options of the trial."""
    if not trial.run.config.is_file():
        return
    file = trial.config_file if trial.config_file.is_file() else trial.run.config
    old, new = _flatten(Config.from_yaml(file)), _flatten(trial.config)
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key):
            raise UsageError(
                f"{trial.run.path}: trained with {key} {old.get(key)}, and now it is {new.get(key)}: choose another "
                "--output."
            )


def describe_training(config: Config) -> dict[str, Any]:
    """Return every option that the result of a training depends on, by name, and the seed.

    They are the same on every machine: of local paths, only the last component is kept.
    """
    flat = {**_flatten(config), "data.root": config.data.root, "seed": config.seed}
    source, colon, path = config.model.backbone.partition(":")
    if source == "local-dir":
        flat["model.backbone"] = f"{source}{colon}{Path(path).name}"
    for key in ("model.backbone_weights", "init", "data.root"):
        if flat[key]:
            flat[key] = Path(flat[key]).name
    return flat


def _flatten(config: Config) -> dict[str, Any]:
    """Return the options that the result of a training depends on, as YAML gives them back."""
    # imports torch
    from crossx.methods.registry import method_class, method_options

    model = replace(config.model, options={**method_options(config.model.method), **config.model.options})
    # an option that is left out is the same as its default
    sampling = config.data.sampling or method_class(model.method).sampling or "uniform"
    completed = replace(config, model=model, data=replace(config.data, sampling=sampling))
    values = load_yaml(completed.to_yaml(), "the configuration")
    flat = {f"{section}.{key}": value for section in SECTIONS for key, value in values[section].items()}
    # a run's own configuration has the absolute path
    flat["init"] = config.init and str(Path(config.init).absolute())
    return {key: value for key, value in flat.items() if key not in NEUTRAL}
