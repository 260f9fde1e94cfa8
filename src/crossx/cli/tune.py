"""``crossx tune``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from crossx.cli.options import check_folder, next_command
from crossx.cli.values import File, Folder, Positive
from crossx.commands import command
from crossx.errors import UsageError
from crossx.runs import Run
from crossx.terminal import columns, erase_step, fold, fold_command

if TYPE_CHECKING:
    from crossx.training.config import Config
    from crossx.tuning.outcome import TrialResult, Tuned

NOT_TAKEN = {
    "--resume": "the same command resumes: leave out --resume.",
    "--print_config": "`crossx fit --print_config` prints a configuration, --print_space the space.",
}
"""Options of ``crossx fit`` that a search does not take."""


def tune(
    *fit_options: str,
    output: Folder | None = None,
    space: File | None = None,
    trials: Positive = 20,
    max_time: Annotated[str, "TIME"] | None = None,
    pruner: Literal["median", "hyperband", "none"] = "median",
    jobs: Positive = 1,
    print_space: bool = False,
) -> int:
    """Search learning rates, loss weights and augmentation on the validation images.

    Trains up to --trials configurations, each as a run of its own, and writes a report and the best configuration,
    best.yaml, for `crossx fit --config`. Trials that are worse than others at the same epoch are stopped. The test
    images are not looked at. Give the same command again to continue a search that was stopped, or with more
    --trials to extend it. Other options are those of `crossx fit`, for every trial. Needs Optuna: pip install
    'crossx[tune]'.

    Args:
        output: Folder for the trials and results.
        space: YAML file with the options to search (default: learning rate, weight decay, augmentation and the loss
            weights of the method; docs/tune.md).
        trials: Total number of trials, the first of which is the unchanged configuration.
        max_time: Stop after this time, such as 2h or 00:30:00, earlier calls included.
        pruner: How unpromising trials are stopped early: median, hyperband or none.
        jobs: Trials at the same time.
        print_space: Print the space as YAML, to edit it, and exit.

    Examples:
        crossx tune --config finetune --data.root my_images --output runs/tuned --trials 20
        crossx tune --config finetune --data.root my_images --print_space > space.yaml
        crossx tune --config finetune --data.root my_images --space space.yaml --output runs/tuned --max_time 2h
        crossx fit --config runs/tuned/best.yaml --output runs/best
    """
    for word in fit_options:
        if reason := NOT_TAKEN.get(word.split("=", 1)[0]):
            raise UsageError(reason)
    from crossx.cli.fit_options import parse_fit, require_data

    asked = parse_fit(fit_options)
    base = asked.config
    if print_space:
        _print_space(space, base)
        return 0
    if output is None:
        raise UsageError("the following arguments are required: --output; see `crossx tune --help`.")
    check_folder(output)
    require_data(base)
    for note in asked.notes:
        print(fold(f"note: {note}", hanging="  "))

    from crossx.errors import counted
    from crossx.tuning.search import tune as search

    start = time.monotonic()

    def report(trial: TrialResult, best: TrialResult | None) -> None:
        minutes = (time.monotonic() - start) / 60
        outcome = f"{trial.reason} (log: {trial.run}.log)" if trial.state == "failed" else _accuracy(trial)
        # a proposal that repeats another one has a number too
        of = f" of {trials}" if trial.number <= trials else ""
        after = f" after {counted(trial.epochs, 'epoch')}" if trial.state == "pruned" else ""
        so_far = f" (best: trial {best.number}, {_accuracy(best)})" if best else ""
        line = f"trial {trial.number}{of}, {minutes:.0f} min: {trial.state}{after}, {outcome}{so_far}"
        erase_step()
        print(fold(line, hanging="  "), flush=True)

    tuned = search(
        base,
        output,
        space=space,
        trials=trials,
        max_time=max_time,
        pruner=pruner,
        jobs=jobs,
        report=report,
    )
    _print_outcome(tuned)
    return 0


def _print_space(space: str | None, base: Config) -> None:
    from crossx.tuning.space import default_space, read_space
    from crossx.yaml import dump_yaml

    found = read_space(Path(space), base) if space else default_space(base)
    for name, values in found.describe().items():
        print(fold(f"{name}: {dump_yaml(values, flow=True).strip()}", hanging="  "))


def _accuracy(trial: TrialResult) -> str:
    return "no validation" if trial.val_top1 is None else f"{trial.val_top1:.2%}"


def _print_outcome(tuned: Tuned) -> None:
    from crossx.tuning.results import build_table
    from crossx.tuning.space import short

    print(f"\n{build_table(tuned).to_text(columns())}", end="")
    best = tuned.best
    options = ", ".join(f"{name} {short(value)}" for name, value in best.values.items())
    text = f"\nbest: trial {best.number}, {_accuracy(best)} top-1 on validation: {options}\nchosen: {tuned.sentence()}"
    print(fold(text, hanging="  "))
    print(f"results: {tuned.folder / 'results.json'}, table.md, .csv, .tex")
    print(f"report: {tuned.folder / 'report.html'}; chart: search.png")
    print(f"next: {next_command(Run(best.run))}")
    print(fold_command(f"or: {command('fit', '--config', tuned.folder / 'best.yaml', '--output', 'RUN')}"))
