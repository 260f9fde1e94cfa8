"""Several tested runs in one table, with the paper's published numbers below."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from crossx.report.published import PublishedResult
from crossx.report.tables import Table, percent, points

CAPTION = "Percent. Δ: difference to the first run on the same images, paired; p: McNemar's exact test."


def tabulate_runs(runs: Sequence[Mapping[str, Any]], published: Sequence[PublishedResult] = ()) -> Table:
    """Return a table of runs and, below them, of published results; empty columns are omitted.

    Args:
        runs: For each run, at least one, the results of ``crossx test``, with ``run``, its name, and ``against``: the
            result of ``compare_runs`` for it and the first run, None for the first or for other images.
        published: Rows below the runs.
    """
    rows = [*map(_run_cells, runs), *map(_published_cells, published)]
    columns = [name for name in rows[0] if any(row.get(name, "–") not in ("", "–") for row in rows)]
    return Table(columns, [[row.get(name, "–") for name in columns] for row in rows], CAPTION)


def _run_cells(results: Mapping[str, Any]) -> dict[str, str]:
    against = results["against"]
    return {
        "run": results["run"],
        "method": results["method"],
        # of a local folder only the name
        "backbone": str(results["backbone"]).rstrip("/").rsplit("/", 1)[-1],
        "dataset": results["dataset"],
        "px": str(results["preprocessing"]["image_size"]),
        "seed": "–" if results.get("seed") is None else str(results["seed"]),
        "images": str(results["n"]),
        "top-1 (95%)": percent(results["top1"], results["intervals"]["top1"]),
        "Δ first (95%)": points(against["difference"], against["interval"]["difference"]) if against else "–",
        "p": f"{against['p_value']:.2g}" if against else "–",
        "top-5": percent(results.get("top5")),
        "class mean": percent(results["class_mean"]),
        "calibration error": percent(results["ece"]),
        "from": "",
    }


def _published_cells(result: PublishedResult) -> dict[str, str]:
    metric = "class mean" if result.metric == "class mean" else "top-1 (95%)"
    return {
        "run": "published",
        "method": result.approach,
        "backbone": result.backbone,
        "dataset": result.dataset,
        metric: f"{100 * result.accuracy:.1f}",
        "from": result.origin + ("" if result.crops == "single" else ", several crops"),
    }
