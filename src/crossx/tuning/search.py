"""Search the options of a training with Optuna; each trial is a run of its own ``crossx fit`` process.

::

    OUTPUT/
      tune.json          what is searched; another search in the same folder is refused
      journal.log        Optuna's storage, from which the same command continues
      trial-N/           the run folder of trial N, with trial-N.yaml and trial-N.log
      best.yaml          the best configuration, for `crossx fit --config`
      results.json, table.md, .csv, .tex, search.png, report.html

Suggestions depend only on the seed, the number of the trial and the results so far, so that with one job a search that
was stopped and continued equals one that was not.
"""

from __future__ import annotations

import contextlib
import json
import random
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

from crossx.ablation.runner import Processes, Trial, check_config, describe_training
from crossx.ablation.suite import apply_changes
from crossx.ablation.tuning import read_validation
from crossx.errors import (
    CrossXError,
    Stopped,
    UsageError,
    check_choice,
    check_count,
    check_type,
    counted,
    sigterm_interrupts,
)
from crossx.extras import require
from crossx.runs import SCHEMA, Run, is_lock, locked_folder, read_history, read_json, write_json
from crossx.terminal import step
from crossx.training.config import FROM_RECIPE, Config
from crossx.training.durations import parse_time
from crossx.tuning.outcome import METRIC, TrialResult, Tuned, best_of
from crossx.tuning.results import write_results
from crossx.tuning.space import Choices, Range, Space, changes_of, default_space, read_space, shown

if TYPE_CHECKING:
    import optuna

Pruner = Literal["median", "hyperband", "none"]
STARTUP = 8
"""Trials that are drawn at random before the sampler models the results."""
PRUNED_AFTER = 4
"""Complete trials before the median prunes."""
MEASURABLE = 10
"""Complete trials from which importances are computed."""
POLL = 0.2
DESCRIPTION, JOURNAL = "tune.json", "journal.log"


def tune(
    config: Config,
    output: str | Path,
    *,
    space: str | Path | Space | None = None,
    trials: int = 20,
    max_time: str | None = None,
    pruner: Pruner = "median",
    jobs: int = 1,
    report: Callable[[TrialResult, TrialResult | None], None] = lambda *_: None,
) -> Tuned:
    """Search the options of a training by the accuracy on its validation images; the test images are not looked at.

    The same call continues a search that was stopped, and takes more trials.

    Args:
        config: The training; ``output`` is ignored. Every trial has its seed.
        output: Folder for the trials and results.
        space: What to search: a YAML file (see ``read_space``), a ``Space``, or None for the default of the method.
        trials: Trials in all, those of earlier calls included.
        max_time: No trial begins, and none continues, after this time (``2h``, ``00:30:00``), earlier calls included.
        pruner: What stops trials that are worse than others at the same epoch: ``median``, ``hyperband`` or ``none``.
        jobs: Trials at the same time.
        report: Called after each trial, with it and the best one so far.

    Returns:
        The outcome, which is also written to ``output``.

    Raises:
        UsageError: If an option or the space cannot work, or ``output`` holds another search.
        CrossXError: If Optuna is not installed, the data cannot be read, or no trial is complete.
        Stopped: On Ctrl-C or SIGTERM.
    """
    require("crossx tune", "optuna", extra="tune")
    check_type("crossx.tune", config, Config, FROM_RECIPE)
    check_choice("pruner", pruner, get_args(Pruner))
    check_count("trials", trials)
    check_count("jobs", jobs)
    seconds = parse_time(max_time, "max_time") if max_time is not None else float("inf")
    if seconds <= 0:
        raise UsageError(f"max_time must be above 0, not {max_time!r}.")
    folder, config = Path(output), replace(config, output=None)
    if not isinstance(space, Space):
        space = read_space(Path(space), config) if space is not None else default_space(config)
    classes: dict[str, int] = {}
    with step("Checking the configurations"):
        for checked in (config, *space.check(config)):
            check_config(checked, classes, tested=False, tuned=True)
    config = replace(config, data=config.data.with_absolute_root())
    existed = folder.exists()
    _check_same(folder, config, space, pruner)
    try:
        with (
            locked_folder(folder, "searching in it"),
            step(f"Training, at most {counted(trials, 'trial')}; each has a log in {folder}"),
        ):
            write_json(folder / DESCRIPTION, _describe(config, space, pruner))
            return _Search(config, space, folder, trials, seconds, pruner, jobs, report).run()
    except CrossXError:
        if not existed:
            with contextlib.suppress(OSError):
                folder.rmdir()  # only if it is empty
        raise


@dataclass
class _Search:
    base: Config
    space: Space
    folder: Path
    trials: int
    seconds: float
    pruner: Pruner
    jobs: int
    report: Callable[[TrialResult, TrialResult | None], None]

    def run(self) -> Tuned:
        self.study = _open_study(self.folder / JOURNAL, self._build_pruner(), {*self.space.options})
        self.started = monotonic()
        self.before = float(self.study.user_attrs.get("seconds", 0.0))
        processes = Processes(self.jobs)
        unfinished = iter(self._unfinished())
        running: dict[Future[str | None], optuna.trial.Trial] = {}
        with sigterm_interrupts(), ThreadPoolExecutor(self.jobs) as pool:
            try:
                while True:
                    while len(running) < self.jobs and self._elapsed() < self.seconds:
                        trial = next(unfinished, None) or self._ask()
                        if trial is None:
                            break
                        running[pool.submit(self._train, processes, trial)] = trial
                    if not running:
                        break
                    done = wait(running, timeout=POLL, return_when=FIRST_COMPLETED)[0]
                    for future in done:
                        self._tell(running.pop(future), future.result())
                    if self._elapsed() >= self.seconds:
                        processes.stop()
                        break
            except KeyboardInterrupt as interrupt:
                processes.stop()
                self._keep_time()
                if self._counted(("COMPLETE",)):
                    write_results(self._outcome())
                ended = len(self._counted(("COMPLETE", "PRUNED", "FAIL")))
                raise Stopped(
                    f"stopped after {ended} of {counted(self.trials, 'trial')}; the same command continues from there."
                ) from interrupt
            except BaseException:
                processes.stop()
                raise
            finally:
                self._keep_time()
        tuned = self._outcome()
        write_results(tuned)
        return tuned

    def _elapsed(self) -> float:
        return self.before + monotonic() - self.started

    def _keep_time(self) -> None:
        self.study.set_user_attr("seconds", self._elapsed())

    def _build_pruner(self) -> optuna.pruners.BasePruner:
        import optuna

        epochs = self.base.trainer.max_epochs
        if self.pruner == "median":
            return optuna.pruners.MedianPruner(PRUNED_AFTER, n_warmup_steps=max(1, epochs // 4))
        if self.pruner == "hyperband":
            return optuna.pruners.HyperbandPruner(min_resource=1, max_resource=epochs)
        return optuna.pruners.NopPruner()

    def _counted(self, states: Sequence[str]) -> list[optuna.trial.FrozenTrial]:
        return [
            trial
            for trial in self.study.get_trials(deepcopy=False)
            if trial.state.name in states and "repeats" not in trial.user_attrs
        ]

    def _unfinished(self) -> Iterator[optuna.trial.Trial]:
        """Yield the trials that an earlier call has begun and not ended."""
        import optuna

        known = self._counted(("COMPLETE", "PRUNED", "FAIL", "RUNNING"))
        for place, frozen in enumerate(known):
            if frozen.state.name != "RUNNING":
                continue
            trial = optuna.trial.Trial(self.study, frozen._trial_id)
            # a kill before a repetition was noted
            if not self._is_repetition(trial, [self._values(other) for other in known[:place]]):
                yield trial

    def _ask(self) -> optuna.trial.Trial | None:
        """Return the next trial; None if there are enough, or nothing is left to try."""
        import optuna

        known = self._counted(("COMPLETE", "PRUNED", "FAIL", "RUNNING"))
        if len(known) >= self.trials:
            return None
        tried = [self._values(frozen) for frozen in known]
        unchanged = self.space.values_of(self.base)
        if not known and unchanged is not None and not self._counted(("WAITING",)):
            self.study.enqueue_trial(self._encoded(unchanged))
        last = self.study.get_trials(deepcopy=False)[-1:]
        # the rest of a call that was killed
        if last and "repeats" in last[0].user_attrs and not self._enqueue_other(last[0].number, tried):
            return None
        while True:
            number = len(self.study.get_trials(deepcopy=False))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                # a sampler of its own, so that a continued search draws what an uninterrupted one does
                self.study.sampler = optuna.samplers.TPESampler(
                    seed=self.base.seed + number, n_startup_trials=STARTUP, constant_liar=self.jobs > 1
                )
            trial = self.study.ask(self._distributions())
            if not self._is_repetition(trial, tried):
                return trial
            if not self._enqueue_other(number, tried):
                return None

    def _enqueue_other(self, number: int, tried: list[dict[str, Any]]) -> bool:
        """Propose a combination that was not tried in place of a repeated trial; return False if there is none."""
        combinations = self.space.combinations()
        if combinations is None:
            return True
        left = [values for values in combinations if values not in tried]
        if left:
            self.study.enqueue_trial(self._encoded(random.Random(number).choice(left)))
        return bool(left)

    def _is_repetition(self, trial: optuna.trial.Trial, tried: list[dict[str, Any]]) -> bool:
        """Say whether a trial has the options of an earlier one, and end it if it has."""
        import optuna

        values = self._values(trial)
        if values not in tried:
            return False
        trial.set_user_attr("repeats", tried.index(values))
        self.study.tell(trial, state=optuna.trial.TrialState.FAIL)
        return True

    def _distributions(self) -> dict[str, optuna.distributions.BaseDistribution]:
        import optuna

        found: dict[str, optuna.distributions.BaseDistribution] = {}
        for name, values in self.space.options.items():
            if isinstance(values, Choices):
                found[name] = optuna.distributions.CategoricalDistribution([*map(shown, values.values)])
            elif values.whole:
                low, high, step = int(values.low), int(values.high), int(values.step or 1)
                found[name] = optuna.distributions.IntDistribution(low, high, log=values.log, step=step)
            else:
                found[name] = optuna.distributions.FloatDistribution(
                    values.low, values.high, log=values.log, step=values.step
                )
        return found

    def _encoded(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return values as Optuna stores them: choices as text."""
        options = self.space.options
        return {
            name: shown(value) if isinstance(options[name], Choices) else value
            for name, value in values.items()
        }

    def _values(self, trial: optuna.trial.Trial | optuna.trial.FrozenTrial) -> dict[str, Any]:
        values = {}
        unchanged = self.space.values_of(self.base) or {}
        for name, searched in self.space.options.items():
            value = trial.params[name]
            if isinstance(searched, Range):
                # the configuration's own value may have more digits
                values[name] = value if value == unchanged.get(name) else searched.rounded(value)
            else:
                values[name] = next(choice for choice in searched.values if shown(choice) == value)
        return values

    def _training(self, trial: optuna.trial.Trial | optuna.trial.FrozenTrial) -> Trial:
        name = f"trial-{trial.number + 1}"
        config = apply_changes(self.base, changes_of(self._values(trial)))
        return Trial(name, self.base.seed, replace(config, output=str(self.folder / name)))

    def _train(self, processes: Processes, trial: optuna.trial.Trial) -> str | None:
        """Train a trial until it ends or is pruned; return why it failed."""
        training = self._training(trial)
        reported = {*self.study.get_trials(deepcopy=False)[trial.number].intermediate_values}

        def is_hopeless() -> bool:
            hopeless = False
            for row in _rows(training):
                if METRIC in row and row["epoch"] not in reported:
                    reported.add(row["epoch"])
                    trial.report(row[METRIC], int(row["epoch"]))
                    hopeless = hopeless or trial.should_prune()
            return hopeless

        reason = processes.run(training, test=False, watch=is_hopeless)
        is_hopeless()
        return reason

    def _tell(self, trial: optuna.trial.Trial, reason: str | None) -> None:
        import optuna

        training = self._training(trial)
        if reason is None and training.is_trained:
            self.study.tell(trial, read_validation(training))
        elif reason is None:
            self.study.tell(trial, state=optuna.trial.TrialState.PRUNED)
        elif not self._counted(("COMPLETE", "PRUNED", "FAIL")):
            # nothing says that another trial would work, and the same command tries this one again
            raise CrossXError(f"the first trial failed: {reason} (log: {training.log})")
        else:
            trial.set_user_attr("reason", reason)
            self.study.tell(trial, state=optuna.trial.TrialState.FAIL)
        self._keep_time()
        results = self._results()
        self.report(next(result for result in results if result.number == trial.number + 1), best_of(results))

    def _results(self) -> list[TrialResult]:
        states = {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed", "RUNNING": "stopped"}
        results = []
        for frozen in self._counted([*states]):
            training = self._training(frozen)
            rows = _rows(training)
            top1 = [row[METRIC] for row in rows if METRIC in row]
            results.append(
                TrialResult(
                    frozen.number + 1,
                    states[frozen.state.name],
                    self._values(frozen),
                    frozen.value if frozen.state.name == "COMPLETE" else max(top1, default=None),
                    len(rows),
                    rows[-1]["seconds"] if rows else 0.0,
                    training.run.path,
                    frozen.user_attrs.get("reason", ""),
                )
            )
        return results

    def _outcome(self) -> Tuned:
        results = self._results()
        best = best_of(results)
        if best is None:
            raise CrossXError(
                f"{self.folder}: none of {counted(len(results), 'trial')} is complete yet: give more --max_time; what "
                "was trained is kept."
            )
        config = apply_changes(self.base, changes_of(best.values))
        images = (Run(best.run).read_info().get("images") or {}).get("val")
        tuned = Tuned(
            best,
            config,
            results,
            self.space,
            self.folder,
            images,
            self.space.values_of(self.base),
            self.study.user_attrs["seconds"],
            self._importances(),
        )
        return replace(tuned, config=replace(config, tuned=tuned.sentence()))

    def _importances(self) -> dict[str, float]:
        from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

        complete = self._counted(("COMPLETE",))
        if len(complete) < MEASURABLE:
            return {}
        with warnings.catch_warnings():
            # experimental; or the accuracies are too similar, see below
            warnings.simplefilter("ignore")
            # Optuna advises at least five trials among the best
            evaluator = PedAnovaImportanceEvaluator(target_quantile=max(0.1, 5 / len(complete)))
            found = get_param_importances(
                self.study, evaluator=evaluator, params=[*self.space.options], normalize=False
            )
        # all 0 if the best trials cannot be told apart, of which Optuna would make equal shares
        total = sum(found.values())
        return {name: value / total for name, value in found.items()} if total > 0 else {}


def _rows(training: Trial) -> list[dict[str, Any]]:
    path = training.run.path / "metrics.json"
    return read_history(path) if path.is_file() else []


def _open_study(path: Path, pruner: optuna.pruners.BasePruner, options: set[str]) -> optuna.Study:
    import optuna
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.WARNING)

    class Unlocked:
        """No lock: that of the folder keeps other processes out, and ends with the process."""

        def acquire(self) -> bool:
            return True

        def release(self) -> None:
            pass

    if path.is_file():
        content = path.read_bytes()
        whole = _whole_trials(content, options)
        if whole != content:
            path.write_bytes(whole)
    try:
        storage = optuna.storages.JournalStorage(JournalFileBackend(str(path), cast(Any, Unlocked())))
        return optuna.create_study(
            storage=storage, study_name="crossx", load_if_exists=True, direction="maximize", pruner=pruner
        )
    except OSError:
        raise
    except Exception as error:  # a damaged journal fails in whatever reads it
        raise CrossXError(
            f"{path}: damaged, so the search cannot be continued. Choose another --output."
        ) from error


def _whole_trials(journal: bytes, options: set[str]) -> bytes:
    """Leave out of Optuna's journal what a kill cut short: a part of a line, and a trial without all its options.

    The next line would be appended to that part. The trial is drawn again, as the same one.
    """
    lines = journal[: journal.rfind(b"\n") + 1].splitlines(keepends=True)
    try:
        entries = [json.loads(line) for line in lines]
        # Optuna's numbers of operations: 4 creates the next trial, 5 gives it an option
        created = [place for place, entry in enumerate(entries) if entry["op_code"] == 4]
        if created:
            first, number = created[-1], len(created) - 1
            own = {place for place in range(first, len(lines)) if entries[place].get("trial_id") == number}
            drawn = {entries[place]["param_name"] for place in own if entries[place]["op_code"] == 5}
            if not options <= drawn:
                # state 4 waits with given options
                left_out = own if entries[first].get("state") == 4 else {*own, first}
                lines = [line for place, line in enumerate(lines) if place not in left_out]
    except (ValueError, LookupError, TypeError, AttributeError):
        pass  # damaged, which Optuna finds
    return b"".join(lines)


def _describe(config: Config, space: Space, pruner: str) -> dict[str, Any]:
    """Return what makes a search the same."""
    training = describe_training(config)
    return {"schema": SCHEMA, "training": training, "space": space.describe(), "pruner": pruner}


def _check_same(folder: Path, config: Config, space: Space, pruner: str) -> None:
    """Check that a folder is empty, or has the same search."""
    path = folder / DESCRIPTION
    if not path.is_file():
        if folder.is_dir() and any(not is_lock(file) for file in folder.iterdir()):
            raise UsageError(f"{folder} is not empty. Choose another --output.")
        return
    # as JSON gives it back
    old, new = read_json(path), json.loads(json.dumps(_describe(config, space, pruner)))
    for part in ("training", "space"):
        before, now = old.get(part) or {}, new[part]
        for key in sorted(before.keys() | now.keys()):
            if before.get(key) != now.get(key):
                what = "searches" if part == "space" else "has"
                raise UsageError(
                    f"{folder}: this search {what} {key} {shown(before.get(key))}, and now it is "
                    f"{shown(now.get(key))}: choose another --output."
                )
    if old.get("pruner") != pruner:
        raise UsageError(
            f"{folder}: this search has the pruner {old.get('pruner')}: choose another --output."
        )
