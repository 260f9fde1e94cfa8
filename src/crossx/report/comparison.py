"""Several tested runs in one table, beside the numbers that the paper prints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from crossx.report.published import PublishedResult
from crossx.report.tables import Table, percent, points

COLUMNS = (
    "run",
    "method",
    "backbone",
    "dataset",
    "px",
    "seed",
    "images",
    "top-1 (95%)",
    "Δ first (95%)",
    "p",
    "top-5",
    "class mean",
    "calibration error",
    "from",
)


def tabulate_runs(runs: Sequence[Mapping[str, Any]], published: Sequence[PublishedResult] = ()) -> Table:
    """Return a table of runs, and below them of published results.

    Args:
        runs: For each run what ``crossx test`` wrote, with ``run``, its name, and ``against``: what ``compare_runs``
            returned for it and the first run, None for the first or where the two have other images.
        published: Rows to put below.
    """
    rows = [_row(results) for results in runs] + [_published_row(result) for result in published]
    used = [index for index in range(len(COLUMNS)) if any(row[index] not in ("", "–") for row in rows)]
    caption = "Percent. Δ: difference to the first run on the same images, paired; p: McNemar's exact test."
    return Table(
        [COLUMNS[index] for index in used],
        [[row[index] for index in used] for row in rows],
        caption,
    )


def _row(results: Mapping[str, Any]) -> list[str]:
    against = results["against"]
    # of a folder on this machine its name is enough
    backbone = str(results["backbone"]).rstrip("/").rsplit("/", 1)[-1]
    return [
        results["run"],
        results["method"],
        backbone,
        results["dataset"],
        str(results["preprocessing"]["image_size"]),
        "–" if results.get("seed") is None else str(results["seed"]),
        str(results["n"]),
        percent(results["top1"], results["intervals"]["top1"]),
        points(against["difference"], against["interval"]["difference"]) if against else "–",
        f"{against['p_value']:.2g}" if against else "–",
        percent(results.get("top5")),
        percent(results["class_mean"]),
        percent(results["ece"]),
        "",
    ]


def _published_row(result: PublishedResult) -> list[str]:
    value = f"{100 * result.accuracy:.1f}"
    crops = "" if result.crops == "single" else ", several crops"
    # Table 7 prints the mean over classes
    top1, class_mean = ("–", value) if result.metric == "class mean" else (value, "–")
    return [
        "published",
        result.approach,
        result.backbone,
        result.dataset,
        *("–",) * 3,
        top1,
        *("–",) * 3,
        class_mean,
        "–",
        f"{result.origin}{crops}",
    ]
