"""``crossx ablate``."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from crossx.ablation.suite import list_suites, load_suite
from crossx.cli.options import VerbParser, natural, positive
from crossx.errors import Stopped, UsageError
from crossx.runs import locked_folder

NOT_TAKEN = {
    "--seed": "--seeds gives the seeds.",
    "--resume": "the same command resumes: leave out --resume.",
}
"""Options of ``crossx fit`` that an ablation sets itself."""


def run(arguments: Sequence[str]) -> int:
    """Train and test every variant of a suite with every seed, and write table and chart."""
    suites = ", ".join(list_suites())
    parser = VerbParser(
        "ablate",
        "Compare variants of one recipe: train and test each with several seeds, and write a table with intervals and\n"
        "paired differences (Markdown, CSV, LaTeX), a bar chart and JSON. What is finished is not run again: the same\n"
        "command goes on where it was stopped, and takes more seeds. Further options are those of `crossx fit`; they\n"
        "hold for every variant.",
        [
            "crossx ablate --suite fig3 --config crossx_cub_senet50 --data.root CUB_200_2011 --seeds 0 1 --output out",
            "crossx ablate --suite mine.yaml --config finetune --data.root my_images --output runs/mine --jobs 4",
        ],
    )
    parser.add_argument(
        "--suite", required=True, metavar="NAME", help=f"{suites}, or a YAML file (docs/ablation.md)"
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="folder for the runs and results")
    parser.add_argument(
        "--seeds",
        type=natural,
        nargs="+",
        default=[0],
        metavar="N",
        help="seeds of the trainings (default: 0)",
    )
    parser.add_argument(
        "--jobs", type=positive, default=1, metavar="N", help="trainings at the same time (default: 1)"
    )
    parser.add_argument(
        "--against", metavar="VARIANT", help="what the others are held against (default: the suite's first)"
    )
    options, rest = parser.parse_known_args(arguments)
    for word in rest:
        if reason := NOT_TAKEN.get(word.split("=", 1)[0]):
            raise UsageError(reason)
    suite = load_suite(options.suite)

    from crossx.ablation.runner import Trial, check_trials, plan, plan_tuning, run_trials
    from crossx.ablation.summary import build_table, check_reference, summarize_suite, write_summary
    from crossx.ablation.tuning import build_tuning_table, choose_alternatives, describe_tuning
    from crossx.cli.fit_options import parse_fit

    check_reference(suite, options.against)
    base = parse_fit(rest).config
    output = Path(options.output)
    search = plan_tuning(suite, base, options.seeds[0], output)
    trials = plan(suite, base, options.seeds, output)
    check_trials(search or trials, tuned=bool(search))
    finished, total = 0, len(search) + len(trials)
    start = time.monotonic()

    def report(trial: Trial, reason: str | None) -> None:
        nonlocal finished
        finished += 1
        text = f"failed: {reason}" if reason else "done"
        minutes = (time.monotonic() - start) / 60
        print(f"[{finished}/{total}, {minutes:.0f} min] {trial}: {text}", flush=True)

    with locked_folder(output, "running trainings in it"):
        try:
            untrained = run_trials(search, options.jobs, report, test=False)
            chosen = choose_alternatives(search, untrained)
            tuning = describe_tuning(suite, search, untrained, chosen)
            trials = plan(suite, base, options.seeds, output, chosen)
            failed = run_trials(trials, options.jobs, report)
        except KeyboardInterrupt as interrupt:
            raise Stopped(
                f"stopped after {finished} of {total}; the same command goes on from there."
            ) from interrupt
        summary = summarize_suite(suite, trials, failed, options.against, tuning)
        write_summary(summary, output)
    if tuning:
        print(f"\n{build_tuning_table(tuning).to_markdown()}")
    print(f"\n{build_table(summary).to_markdown()}")
    print(
        f"results: {output / 'results.json'}; table: {output / 'table.md'}, .csv, .tex; chart: {output / 'chart.png'}"
    )
    for trial, reason in {**untrained, **failed}.items():
        print(f"failed: {trial}: {reason} (log: {trial.log})")
    return 1 if untrained or failed else 0
