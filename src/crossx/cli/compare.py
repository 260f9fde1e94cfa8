"""``crossx compare RUN...``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from crossx.cli.options import VerbParser
from crossx.errors import CrossXError, UsageError
from crossx.report.published import PublishedResult, read_published
from crossx.runs import open_run, read_results, write_json

COMPARED = range(3, 8)
"""The paper's tables of methods; Table 2 is an ablation of Cross-X."""
NEEDED = (
    "method",
    "backbone",
    "dataset",
    "preprocessing.image_size",
    "n",
    "num_classes",
    "top1",
    "intervals.top1",
    "class_mean",
    "ece",
)
"""What a row cannot do without."""


def run(arguments: Sequence[str]) -> int:
    """Print one table of many tested runs, and write it."""
    parser = VerbParser(
        "compare",
        "Put tested runs into one table, each held against the first on the same images. Where a run is not tested\n"
        "yet, `crossx test RUN` does it.",
        [
            "crossx compare runs/plain runs/crossx",
            "crossx compare runs/crossx --paper --output tables/cub",
        ],
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", help="run folders")
    parser.add_argument("--split", default="test", metavar="NAME", help="train, val or test (default: test)")
    parser.add_argument(
        "--paper",
        action="store_true",
        help="the numbers of the Cross-X paper on the same datasets too (Tables 3 to 7)",
    )
    parser.add_argument(
        "--output",
        metavar="STEM",
        help="write STEM.md, STEM.csv, STEM.tex and STEM.json beside what is printed",
    )
    options = parser.parse(arguments)
    folders = [open_run(path)[0].path for path in options.runs]
    runs = [
        {"run": given, **_read(folder, options.split)}
        for given, folder in zip(options.runs, folders, strict=True)
    ]
    published = _published({results["dataset"] for results in runs}) if options.paper else []
    _compare_with_first(runs, folders, options.split)

    from crossx.report.comparison import tabulate_runs

    table = tabulate_runs(runs, published)
    print(table.to_markdown(), end="")
    notes = _notes(runs) if options.paper else []
    for note in notes:
        print(f"note: {note}")
    if options.output:
        stem = Path(options.output)
        table.write(stem)
        values = {"runs": runs, "published": [vars(result) for result in published], "notes": notes}
        write_json(stem.with_name(f"{stem.name}.json"), values)
        print(f"written: {stem}.md, .csv, .tex, .json")
    return 0


def _read(folder: Path, split: str) -> dict[str, Any]:
    results = folder / f"{split}.json"
    if not results.is_file():
        raise CrossXError(
            f"{folder}: not tested on {split} yet: run `crossx test {folder} --split {split}` first."
        )
    return read_results(results, NEEDED)


def _published(datasets: set[str]) -> list[PublishedResult]:
    rows = [row for row in read_published() if row.table in COMPARED]
    found = [row for row in rows if row.dataset in datasets]
    if not found:
        known = ", ".join(sorted({row.dataset for row in rows}))
        raise UsageError(f"--paper: the paper has nothing on {', '.join(sorted(datasets))}, only on {known}.")
    return found


def _compare_with_first(runs: Sequence[dict[str, Any]], folders: Sequence[Path], split: str) -> None:
    from crossx.evaluation.comparison import compare_runs

    first = runs[0]
    for results, folder in zip(runs, folders, strict=True):
        same = results["dataset"] == first["dataset"] and results["n"] == first["n"]
        results["against"] = (
            compare_runs(folder, folders[0], split) if same and results is not first else None
        )


def _notes(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Say where a run's task is not the paper's, so that nobody compares the numbers."""
    from crossx.data.catalog import dataset_info

    notes = []
    for results in runs:
        table1 = dataset_info(results["dataset"]).table1
        if table1 and (results["num_classes"], results["n"]) != (table1[0], table1[2]):
            notes.append(
                f"{results['run']} is tested on {results['n']} images of {results['num_classes']} classes, the paper's "
                f"{results['dataset']} has {table1[2]} of {table1[0]}: not the same task."
            )
    return notes
