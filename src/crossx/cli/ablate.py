"""``crossx ablate``."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from crossx.ablation.suite import load_suite
from crossx.cli.options import check_folder
from crossx.cli.values import Folder, Name, Natural, Positive
from crossx.errors import Stopped, UsageError, counted
from crossx.runs import locked_folder
from crossx.terminal import columns, erase_step, fold, step

if TYPE_CHECKING:
    from crossx.ablation.runner import Trial

NOT_TAKEN = {
    "--seed": "--seeds gives the seeds.",
    "--resume": "the same command resumes: leave out --resume.",
    "--print_config": "`crossx fit --print_config` prints a configuration.",
}
"""Options of ``crossx fit`` that an ablation sets itself."""


def ablate(
    *fit_options: str,
    suite: Name,
    output: Folder,
    seeds: Sequence[Natural] = (0,),
    jobs: Positive = 1,
    against: Annotated[str, "VARIANT"] | None = None,
    earlier: Sequence[Annotated[str, "FILE"]] = (),
) -> int:
    """Train variants of a recipe with several seeds, and tabulate their effects.

    Trains and tests each variant with each seed, and writes a table with intervals and paired differences
    (Markdown, CSV, LaTeX), a bar chart and JSON. Finished trainings are not run again: the same command continues where
    it was stopped, and takes more seeds. Other options are those of `crossx fit`, for every variant.

    Args:
        suite: fig3, fig4, heads, losses, methods, methods_sgd, parts, parts_options, table2, tuned, or a YAML
            file (docs/ablation.md).
        output: Folder for the runs and results.
        seeds: Seeds of the trainings.
        jobs: Trainings at the same time.
        against: Variant to compare the others with (default: the suite's first).
        earlier: Files results.json of earlier ablations, as from other machines: what is in them is not trained again.

    Examples:
        crossx ablate --suite fig3 --config crossx_cub_senet50 --data.root CUB_200_2011 --seeds 0 1 --output out
        crossx ablate --suite mine.yaml --config finetune --data.root my_images --output runs/mine --jobs 4
    """
    for word in fit_options:
        if reason := NOT_TAKEN.get(word.split("=", 1)[0]):
            raise UsageError(reason)
    variants = load_suite(suite)

    from crossx.ablation.earlier import check_data, read_earlier
    from crossx.ablation.runner import check_trials, plan, plan_tuning
    from crossx.ablation.summary import build_table, check_reference, summarize_suite, write_summary
    from crossx.ablation.tuning import build_tuning_table, choose_alternatives, describe_tuning
    from crossx.cli.fit_options import parse_fit, require_data

    check_reference(variants, against)
    asked = parse_fit(fit_options)
    base = asked.config
    require_data(base)
    folder, files = Path(output), [Path(file) for file in earlier]
    check_folder(folder)
    for note in asked.notes:
        print(fold(f"note: {note}", hanging="  "))
    with step("Checking the variants"):
        search = plan_tuning(variants, base, seeds[0], folder)
        trials = plan(variants, base, seeds, folder)
        # damaged files are refused before the data is read or drawn, and other data before anything is trained
        known = read_earlier(files, trials)
        check_trials(search or trials, tuned=bool(search))
        check_data(known)
    with locked_folder(folder, "running trainings in it"):
        untrained = _run(search, (), jobs, folder, test=False)
        chosen = choose_alternatives(search, untrained)
        tuning = describe_tuning(variants, search, untrained, chosen)
        trials = plan(variants, base, seeds, folder, chosen)
        known = read_earlier(files, trials)
        failed = _run(trials, known, jobs, folder)
        summary = summarize_suite(variants, trials, failed, against, tuning, known)
        write_summary(summary, folder)
    if tuning:
        print(f"\n{build_tuning_table(tuning).to_text(columns())}")
    print(f"\n{build_table(summary).to_text(columns())}")
    print(f"results  {folder / 'results.json'}")
    print(f"table    {folder / 'table.md'}, .csv, .tex")
    print(f"chart    {folder / 'chart.png'}")
    for trial, reason in {**untrained, **failed}.items():
        print(fold(f"failed: {trial}: {reason} (log: {trial.log})", hanging="  "))
    return 1 if untrained or failed else 0


def _run(
    trials: Sequence[Trial], known: Collection[Trial], jobs: int, folder: Path, *, test: bool = True
) -> dict[Trial, str]:
    """Train, and test, the trials that are neither known nor done; return the failed ones with the reasons."""
    from crossx.ablation.runner import run_trials

    done = [trial for trial in trials if (trial.is_done if test else trial.is_trained)]
    left = [trial for trial in trials if trial not in known and trial not in done]
    finished, start = 0, time.monotonic()

    def report(trial: Trial, reason: str | None) -> None:
        nonlocal finished
        finished += 1
        erase_step()
        text = f"failed: {reason}" if reason else "done"
        minutes = (time.monotonic() - start) / 60
        print(fold(f"[{finished}/{len(left)}, {minutes:.0f} min] {trial}: {text}", hanging="  "), flush=True)

    trained = sum(trial.is_trained for trial in left)
    others = {"known from --earlier": len(known), "already done": len(done), "only to test": trained}
    counts = ", ".join(f"{count} {what}" for what, count in others.items() if count)
    networks = f"{len(left) - trained} of {counted(len(trials), 'network')}{counts and f' ({counts})'}"
    try:
        with step(f"Training {networks}; each has a log in {folder}"):
            return run_trials(left, jobs, report, test=test)
    except KeyboardInterrupt as interrupt:
        raise Stopped(
            f"stopped after {finished} of {len(left)}; the same command continues from there."
        ) from interrupt
