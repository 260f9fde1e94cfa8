"""``crossx compare RUN...``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from crossx.cli.options import RunPath, Split
from crossx.errors import UsageError
from crossx.report.published import PublishedResult, read_published
from crossx.runs import open_run, write_json

COMPARED = range(3, 8)
"""The paper's tables of methods; Table 2 is an ablation of Cross-X."""
NEEDED = (
    "method", "backbone", "dataset", "preprocessing.image_size", "n", "num_classes", "top1", "intervals.top1",
    "class_mean", "ece",
)  # fmt: skip
"""Results that a row of the table needs."""


def compare(
    runs: Sequence[RunPath],
    *,
    split: Split = "test",
    paper: bool = False,
    output: Annotated[str, "STEM"] | None = None,
) -> None:
    """Put tested runs into one table, next to the published numbers.

    Each run is compared with the first on the same images. `crossx test RUN` tests a run that is not tested yet.

    Args:
        runs: Run folders.
        split: Images that the runs were tested on: train, val or test.
        paper: Add the numbers of the Cross-X paper on the same datasets (Tables 3 to 7).
        output: Also write STEM.md, STEM.csv, STEM.tex and STEM.json.

    Examples:
        crossx compare runs/plain runs/crossx
        crossx compare runs/crossx --paper --output tables/cub
    """
    found = [open_run(path)[0] for path in runs]
    rows = [
        {"run": path, **run.require_results(split, NEEDED)} for path, run in zip(runs, found, strict=True)
    ]
    published = _published({results["dataset"] for results in rows}) if paper else []
    _compare_with_first(rows, [run.path for run in found], split)

    from crossx.report.comparison import tabulate_runs

    table = tabulate_runs(rows, published)
    print(table.to_markdown(), end="")
    notes = _notes(rows) if paper else []
    for note in notes:
        print(f"note: {note}")
    if output:
        stem = Path(output)
        table.write(stem)
        values = {"runs": rows, "published": [vars(result) for result in published], "notes": notes}
        write_json(stem.with_name(f"{stem.name}.json"), values)
        print(f"written: {stem}.md, .csv, .tex, .json")


def _published(datasets: set[str]) -> list[PublishedResult]:
    rows = [row for row in read_published() if row.table in COMPARED]
    found = [row for row in rows if row.dataset in datasets]
    if not found:
        known = ", ".join(sorted({row.dataset for row in rows}))
        raise UsageError(f"--paper: the paper has nothing on {', '.join(sorted(datasets))}, only on {known}.")
    return found


def _compare_with_first(rows: Sequence[dict[str, Any]], folders: Sequence[Path], split: str) -> None:
    from crossx.evaluation.comparison import compare_runs

    first = rows[0]
    for results, folder in zip(rows, folders, strict=True):
        same = results["dataset"] == first["dataset"] and results["n"] == first["n"]
        results["against"] = (
            compare_runs(folder, folders[0], split) if same and results is not first else None
        )


def _notes(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Name the runs whose task differs from the paper's, so that nobody compares the numbers."""
    from crossx.data.catalog import dataset_info

    notes = []
    for results in rows:
        table1 = dataset_info(results["dataset"]).table1
        if table1 and (results["num_classes"], results["n"]) != (table1[0], table1[2]):
            notes.append(
                f"{results['run']} is tested on {results['n']} images of {results['num_classes']} classes, the paper's "
                f"{results['dataset']} has {table1[2]} of {table1[0]}: not the same task."
            )
    return notes
