"""Several tested runs in one table, with the paper's published numbers below."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from crossx.data.catalog import dataset_title
from crossx.report.published import PublishedResult
from crossx.report.tables import Table, percent, points

PAPER_CAPTION = "Percent: top-1, in Table 7 the mean over the classes. Ours: mean of the runs."
CAPTION = "Percent. Δ: difference to the first run on the same images, paired; p: McNemar's exact test."


@dataclass(frozen=True)
class Reproduction:
    """A published row and what this package has for it.

    Attributes:
        published: The row.
        recipe: Name of the recipe; empty if there is none.
        runs: Tested runs of that recipe on the paper's test images.
        accuracy: Their mean, a fraction; None without one.
    """

    published: PublishedResult
    recipe: str = ""
    runs: tuple[str, ...] = ()
    accuracy: float | None = None


def tabulate_paper(rows: Sequence[Reproduction]) -> Table:
    """Return a table of published rows, each with its recipe and the accuracy of its runs."""
    cells = [_published_cells(row) for row in rows]
    columns = ("from", "dataset", "method", "backbone", "published", "ours", "runs", "recipe")
    return Table(columns, [[row[name] for name in columns] for row in cells], PAPER_CAPTION)


def tabulate_runs(runs: Sequence[Mapping[str, Any]], published: Sequence[Reproduction] = ()) -> Table:
    """Return a table of runs and, below them, of published results; empty columns are omitted.

    Args:
        runs: For each run, at least one, the results of ``crossx test``, with ``run``, its name, and ``against``: the
            result of ``compare_runs`` for it and the first run, None for the first or for other images.
        published: Rows below the runs.
    """
    rows = [*map(_run_cells, runs, _dataset_titles(runs)), *map(_published_cells, published)]
    columns = [name for name in rows[0] if any(row.get(name, "–") not in ("", "–") for row in rows)]
    return Table(columns, [[row.get(name, "–") for name in columns] for row in rows], CAPTION)


def _dataset_titles(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    roots = [results.get("data_root") and os.path.abspath(results["data_root"]) for results in runs]
    titles = [dataset_title(results["dataset"], root) for results, root in zip(runs, roots, strict=True)]
    folders = [(title, root) for title, root in zip(titles, roots, strict=True) if root]
    # folders of the same name are told apart by their paths
    return [
        f"{results['dataset']} {root}"
        if title != results["dataset"] and any(name == title and other != root for name, other in folders)
        else title
        for results, title, root in zip(runs, titles, roots, strict=True)
    ]


def _run_cells(results: Mapping[str, Any], dataset: str) -> dict[str, str]:
    against = results["against"]
    return {
        "run": results["run"],
        "method": results["method"],
        # of a local folder only the name
        "backbone": str(results["backbone"]).rstrip("/").rsplit("/", 1)[-1],
        "dataset": dataset,
        "px": str(results["preprocessing"]["image_size"]),
        "seed": "–" if results.get("seed") is None else str(results["seed"]),
        "images": str(results["n"]),
        "top-1 (95%)": percent(results["top1"], results["intervals"]["top1"]),
        "Δ first (95%)": points(against["difference"], against["interval"]["difference"]) if against else "–",
        "p": f"{against['p_value']:.2g}" if against else "–",
        # with five classes or fewer it is always 100%
        "top-5": percent(results.get("top5") if results["num_classes"] > 5 else None),
        "class mean": percent(results["class_mean"]),
        "calibration error": percent(results["ece"]),
        "from": "",
        "recipe": "",
        "ours": "",
    }


def _published_cells(row: Reproduction) -> dict[str, str]:
    result = row.published
    metric = "class mean" if result.metric == "class mean" else "top-1 (95%)"
    accuracy = f"{100 * result.accuracy:.1f}"
    return {
        "run": "published",
        "method": result.approach,
        "backbone": result.backbone,
        "dataset": result.dataset,
        metric: accuracy,
        "published": accuracy,
        "from": result.origin + ("" if result.crops == "single" else ", several crops"),
        "recipe": row.recipe or "none",
        "ours": "not measured" if row.accuracy is None else f"{100 * row.accuracy:.1f}",
        "runs": ", ".join(row.runs) or "–",
    }
