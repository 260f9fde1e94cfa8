"""``crossx compare RUN...``."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from crossx.cli.options import RunPath, Split
from crossx.data.catalog import OWN_DATA
from crossx.errors import CrossXError, UsageError, first_few
from crossx.report.published import (
    PublishedResult,
    find_recipe,
    is_network_of,
    mean_accuracy,
    read_published,
)
from crossx.runs import Run, open_run, write_json
from crossx.terminal import columns, fold

if TYPE_CHECKING:
    from crossx.report.comparison import Reproduction

log = logging.getLogger(__name__)

COMPARED = range(3, 8)
"""The paper's tables of methods; Table 2 is an ablation of Cross-X."""
TRAINING: Mapping[str, tuple[str, ...]] = {
    "model": ("pretrained",),
    "data": (),
    "optim": (),
    "trainer": (
        "max_epochs", "max_steps", "max_time", "limit_train_batches", "overfit_batches", "accumulate_grad_batches",
        "gradient_clip_val",
    ),
}  # fmt: skip
"""Section -> options that decide how a network is trained; none listed means all."""
NO_TRAINING = (
    "root",
    "num_workers",
    "cache",
    "eval_batch_size",
    "bad_images",
    "channels_last",
    "recompute_activations",
)
"""Options that the result does not depend on."""
MAX_DIFFERENCES = 4
NEEDED = (
    "method", "backbone", "dataset", "preprocessing.image_size", "n", "num_classes", "top1", "intervals.top1",
    "class_mean", "ece",
)  # fmt: skip
"""Results that a row of the table needs."""


def compare(
    runs: Sequence[RunPath] = (),
    *,
    split: Split = "test",
    paper: bool = False,
    output: Annotated[str, "STEM"] | None = None,
) -> None:
    """Put tested runs into one table, next to the published numbers.

    Each run is compared with the first on the same images; a note names those that were tested on others. `crossx test
    RUN` tests a run that is not tested yet.

    With --paper, and no run or a folder of runs, list all rows of the Cross-X paper's Tables 3 to 7: the published
    number, the packaged recipe, and the accuracy of its tested runs.

    Args:
        runs: Run folders; with --paper also folders of runs.
        split: Images that the runs were tested on: train, val or test.
        paper: Add the numbers of the Cross-X paper on the same datasets (Tables 3 to 7).
        output: Also write STEM.md, STEM.csv, STEM.tex and STEM.json.

    Examples:
        crossx compare runs/plain runs/crossx
        crossx compare runs/crossx --paper --output tables/cub
        crossx compare --paper    # all rows of Tables 3 to 7 with their recipes
        crossx compare runs --paper    # and the results of the runs in a folder
    """
    if not runs and not paper:
        raise UsageError("the following arguments are required: RUN. `crossx compare --paper` takes none.")
    from crossx.report.comparison import tabulate_paper, tabulate_runs

    groups = [_runs_in(path) if paper else None for path in runs]
    if paper and all(group is not None for group in groups):
        tested = [_read_quietly(path, split) for group in groups for path in group or ()]
        rows = [results for results in tested if results is not None]
        published, notes = _reproduce(_paper_rows(), rows)
        table = tabulate_paper(published)
    else:
        folders = [open_run(path)[0].path for path in runs]
        rows = [
            {"run": path, **Run(folder).require_results(split, NEEDED)}
            for path, folder in zip(runs, folders, strict=True)
        ]
        known = _published({results["dataset"] for results in rows}) if paper else []
        other_images = _compare_with_first(rows, folders, split)
        published, notes = _reproduce(known, [{**r, "folder": f} for r, f in zip(rows, folders, strict=True)])
        notes = [*other_images, *(_notes(rows) if paper else []), *notes]
        table = tabulate_runs(rows, published)
    print(table.to_text(columns()), end="")
    for note in notes:
        print(fold(f"note: {note}", hanging="  "))
    if output:
        stem = Path(output)
        table.write(stem)
        values = {
            "runs": [{key: value for key, value in row.items() if key != "folder"} for row in rows],
            "published": [
                {**vars(row.published), "recipe": row.recipe, "our_runs": row.runs, "ours": row.accuracy}
                for row in published
            ],
            "notes": notes,
        }
        write_json(stem.with_name(f"{stem.name}.json"), values)
        print(f"written: {stem}.md, .csv, .tex, .json")


def _runs_in(path: str) -> list[Path] | None:
    """Return the run folders in a folder, sorted; None if it is none, or is a run itself."""
    folder = Path(path)
    if not folder.is_dir() or Run(folder).spec.is_file():
        return None
    found = sorted(spec.parent for spec in folder.glob("*/model.json"))
    return found or None


def _read_quietly(folder: Path, split: str) -> dict[str, Any] | None:
    """Return the results of a run in a folder of runs; None if it is not tested, or was trained on since then."""
    try:
        return {"run": str(folder), "folder": folder, **Run(folder).require_results(split, NEEDED)}
    except CrossXError as error:
        log.warning("left out: %s", error)
        return None


def _paper_rows() -> list[PublishedResult]:
    return [row for row in read_published() if row.table in COMPARED]


def _published(datasets: set[str]) -> list[PublishedResult]:
    rows = _paper_rows()
    found = [row for row in rows if row.dataset in datasets]
    if not found:
        known = ", ".join(sorted({row.dataset for row in rows}))
        raise UsageError(f"--paper: the paper has nothing on {', '.join(sorted(datasets))}, only on {known}.")
    return found


def _reproduce(
    published: Sequence[PublishedResult], tested: Sequence[Mapping[str, Any]]
) -> tuple[list[Reproduction], list[str]]:
    """Find the recipe of each row and the runs of its network; note where their training differs from the recipe.

    Args:
        published: The rows.
        tested: Results with ``run``, its name, and ``folder``.
    """
    from crossx.report.comparison import Reproduction

    rows, notes = [], []
    for row in published:
        recipe = find_recipe(row)
        own = [
            results
            for results in tested
            if recipe is not None
            and is_network_of(recipe, results, _architecture(results))
            and _is_paper_task(results)
        ]
        accuracy = mean_accuracy(row, own) if own else None
        runs = tuple(str(results["run"]) for results in own)
        rows.append(Reproduction(row, recipe.name if recipe else "", runs, accuracy))
        for results in own:
            differences = _training_differences(rows[-1].recipe, Run(results["folder"]))
            if differences:
                listed = first_few(differences, MAX_DIFFERENCES)
                notes.append(f"{results['run']} is not trained as {rows[-1].recipe}: {listed}.")
    return rows, notes


def _training_differences(recipe: str, run: Run) -> list[str]:
    """Return how a run's ``config.yaml`` deviates from a recipe: ``optim.lr 0.001 instead of 0.01``."""
    from crossx.training.config import Config

    if not (own := run.read_config()):  # a shared model has none
        return ["its configuration is not known"]
    expected = Config.from_recipe(recipe).to_dict()
    differences = []
    for section, options in TRAINING.items():
        found = own.get(section)
        for option in options or expected[section]:
            # a run of an earlier version lacks newer options
            if option in NO_TRAINING or not isinstance(found, Mapping) or option not in found:
                continue
            if found[option] != expected[section][option]:
                differences.append(
                    f"{section}.{option} {found[option]} instead of {expected[section][option]}"
                )
    return differences


def _architecture(results: Mapping[str, Any]) -> str:
    """Return timm's name of a tested backbone, which may be from a local folder."""
    try:
        return Run(results["folder"]).read_spec().backbone
    except CrossXError:
        return str(results["backbone"])


def _compare_with_first(rows: Sequence[dict[str, Any]], folders: Sequence[Path], split: str) -> list[str]:
    """Compare the runs with the first on the same images; note those that were tested on others."""
    from crossx.evaluation.comparison import OtherImagesError, compare_runs

    first, others = rows[0], []
    first["against"] = None
    for results, folder in zip(rows[1:], folders[1:], strict=True):
        results["against"] = None
        datasets = {results["dataset"], first["dataset"]}
        # the same images may be a folder here and a table there
        if results["n"] != first["n"] or not (len(datasets) == 1 or datasets <= {*OWN_DATA}):
            others.append(results["run"])
            continue
        try:
            results["against"] = compare_runs(folder, folders[0], split)
        except OtherImagesError:
            others.append(results["run"])
    if not others:
        return []
    were = f"{others[0]} was" if len(others) == 1 else f"{first_few(others, MAX_DIFFERENCES)} were"
    return [f"{were} not tested on the images and labels of {first['run']}: do not compare their accuracies."]


def _is_paper_task(results: Mapping[str, Any]) -> bool:
    from crossx.data.catalog import dataset_info

    table1 = dataset_info(results["dataset"]).table1
    return table1 is not None and (results["num_classes"], results["n"]) == (table1[0], table1[2])


def _notes(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Name the runs whose task differs from the paper's, so that nobody compares the numbers."""
    from crossx.data.catalog import dataset_info

    notes = []
    for results in rows:
        table1 = dataset_info(results["dataset"]).table1
        if table1 and not _is_paper_task(results):
            notes.append(
                f"{results['run']} is tested on {results['n']} images of {results['num_classes']} classes, the paper's "
                f"{results['dataset']} has {table1[2]} of {table1[0]}: not the same task."
            )
    return notes
