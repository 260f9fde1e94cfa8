"""Results of an ablation: means over seeds, paired differences, table and chart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crossx.ablation.earlier import describe_contents, describe_images, pack, unpack
from crossx.ablation.runner import SPLIT, Trial, describe_training
from crossx.ablation.suite import Suite
from crossx.ablation.tuning import build_tuning_table, describe_changes
from crossx.errors import CrossXError, unknown
from crossx.evaluation.comparison import paired_correct
from crossx.evaluation.intervals import (
    CONFIDENCE,
    RESAMPLES,
    Interval,
    difference_interval,
    mean_accuracy_interval,
    student_interval,
)
from crossx.evaluation.predictions import Predictions, predictions_path
from crossx.report.bars import Bar, plot_bars
from crossx.report.tables import Table, percent, points
from crossx.runs import SCHEMA, read_history, read_results, write_json

METRICS = ("top1", "top5", "class_mean", "ece")
INTERVALS = (
    "95%: intervals, over seeds by Student's t, over images by the bootstrap of the mean over seeds; Δ: difference, "
    "paired by seed and image; val: validation accuracy of the tested weights."
)


def summarize_suite(
    suite: Suite,
    trials: Sequence[Trial],
    failed: Mapping[Trial, str],
    reference: str | None = None,
    tuning: Sequence[Mapping[str, Any]] = (),
    earlier: Mapping[Trial, Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """Return the results of an ablation, for JSON.

    Args:
        suite: The variants.
        trials: All trials; those that are not in ``failed`` are done.
        failed: Trial -> reason.
        reference: The variant to compare the others with; by default the first.
        tuning: The rows of ``describe_tuning``; empty if nothing was tuned.
        earlier: Trial -> its results from a file, see ``read_earlier``; the others are read from their run folders.

    Returns:
        ``rows``, one per variant: mean, standard deviation and intervals of top-1 over its seeds, means of the other
        metrics, and ``against``, the paired difference from the reference over their common seeds. ``runs``, one per
        trial: its results, or why it failed; ``training`` are its options, ``correct`` which images it classifies
        correctly, in hexadecimal digits, ordered by path. ``tuning`` as given.

    Raises:
        UsageError: If there is no variant called ``reference``.
        CrossXError: If results are damaged or of different images.
    """
    done = [trial for trial in trials if trial not in failed]
    known = {trial: dict(result) for trial, result in (earlier or {}).items()}
    results = {**known, **_read_runs([trial for trial in done if trial not in known])}
    correct = _load_correct(done, results)
    reference = check_reference(suite, reference)
    rows = [
        _summarize(name, {trial.seed: results[trial] for trial in done if trial.variant == name}, correct)
        | {"against": None if name == reference else _against(name, reference, correct)}
        for name in suite.variants
    ]
    return {
        "schema": SCHEMA,
        "suite": suite.name,
        "title": suite.title,
        "source": suite.source,
        "reference": reference,
        "variants": suite.variants,
        "split": SPLIT,
        "interval": {"confidence": CONFIDENCE, "resamples": RESAMPLES, "seed": 0},
        "rows": rows,
        "runs": [
            {"variant": trial.variant, "alternative": trial.alternative, "seed": trial.seed}
            | ({"failed": failed[trial]} if trial in failed else results[trial])
            for trial in trials
        ],
        "tuning": list(tuning),
        "base": _describe_base(trials[0]),
    }


def check_reference(suite: Suite, reference: str | None) -> str:
    """Return the variant to compare the others with, by default the first.

    Raises:
        UsageError: If there is no such variant.
    """
    if reference is None:
        return next(iter(suite.variants))
    if reference not in suite.variants:
        raise unknown("variant", reference, suite.variants)
    return reference


def build_table(summary: Mapping[str, Any]) -> Table:
    """Return the table of the summary that ``summarize_suite`` returns."""
    heads = list(dict.fromkeys(head for row in summary["rows"] for head in row["heads"]))
    several = any(len(row["seeds"]) > 1 for row in summary["rows"])
    chosen = {row["variant"]: describe_changes(row["changes"]) for row in summary["tuning"] if row["chosen"]}
    columns = [
        "variant",
        *(["chosen"] if chosen else []),
        "seeds",
        "top-1",
        *(["sd", "95% (seeds)"] if several else []),
        "95% (images)",
    ]
    columns += [f"Δ {summary['reference']}", *(["Δ 95% (seeds)"] if several else []), "Δ 95% (images)"]
    columns += ["val", *(f"head {head}" for head in heads), "calibration error"]
    rows = []
    for row in summary["rows"]:
        against = row["against"] or {}
        over = against.get("intervals", {})
        cells = [row["variant"], *([chosen[row["variant"]] or "unchanged"] if chosen else [])]
        cells += [str(len(row["seeds"])), percent(row["top1"])]
        cells += [percent(row["sd"]), _bounds(row["intervals"]["seeds"])] if several else []
        cells += [_bounds(row["intervals"]["images"]), points(against.get("difference"))]
        cells += [_bounds(over.get("seeds"), signed=True)] if several else []
        cells += [_bounds(over.get("images"), signed=True), percent(row["val_top1"])]
        cells += [percent(row["heads"].get(head)) for head in heads] + [percent(row["ece"])]
        rows.append(cells)
    source = f" ({summary['source']})" if summary["source"] else ""
    caption = f"{summary['title']}{source}. Percent. {INTERVALS}"
    return Table(columns, rows, caption)


def write_summary(summary: Mapping[str, Any], output: Path) -> None:
    """Write ``results.json``, ``table.md``, ``.csv``, ``.tex`` and ``chart.png``, and ``tuning.*`` if it tuned.

    Raises:
        CrossXError: If one cannot be written.
    """
    write_json(output / "results.json", summary)
    build_table(summary).write(output / "table")
    if summary["tuning"]:
        build_tuning_table(summary["tuning"]).write(output / "tuning")
    bars = [
        Bar(row["variant"], row["values"], row["intervals"]["images"])
        for row in summary["rows"]
        if row["values"]
    ]
    if bars:
        note = "Dots: seeds. Error bars: 95% interval over the test images."
        plot_bars(bars, output / "chart.png", title=summary["title"], note=note, line=summary["reference"])


def _read(trial: Trial) -> dict[str, Any]:
    path = trial.run.path / f"{SPLIT}.json"
    history = read_history(trial.run.path / "metrics.json")
    # a method that is fitted before the first step may be trained for no epoch
    needed = (
        *METRICS,
        "n",
        "intervals.top1",
        "heads",
        "selection.epoch" if history else "selection",
        "options",
    )
    tested = read_results(path, needed)
    return {
        "training": describe_training(trial.config),
        **{key: tested[key] for key in METRICS},
        "n": tested["n"],
        "interval": tested["intervals"]["top1"],
        "heads": tested["heads"],
        "val_top1": [epoch.get("val/top1") for epoch in history],
        "seconds": history[-1]["seconds"] if history else None,
        "selection": tested["selection"],
        "options": tested["options"],
        "versions": trial.run.read_info()["environment"]["versions"],
    }


def _summarize(
    name: str,
    by_seed: Mapping[int, Mapping[str, Any]],
    correct: Mapping[tuple[str, int], NDArray[np.bool_]],
) -> dict[str, Any]:
    results = list(by_seed.values())
    values = [result["top1"] for result in results]
    images = mean_accuracy_interval(np.stack([correct[name, seed] for seed in by_seed])) if by_seed else None
    heads = list(dict.fromkeys(head for result in results for head in result["heads"]))
    return {
        "variant": name,
        "seeds": list(by_seed),
        "values": values,
        "intervals": _intervals(values, images),
        **{key: _mean([result[key] for result in results]) for key in METRICS},
        "sd": float(np.std(values, ddof=1)) if len(values) > 1 else None,
        "heads": {head: _mean([result["heads"][head] for result in results]) for head in heads},
        "val_top1": _mean([_selected(result) for result in results]),
        "seconds": _mean([result["seconds"] for result in results]),
    }


def _selected(result: Mapping[str, Any]) -> float | None:
    """Return the validation accuracy of the epoch whose weights were tested; None if there was no epoch."""
    epoch = result["selection"]["epoch"]
    value: float | None = result["val_top1"][int(epoch) - 1] if epoch else None
    return value


def _intervals(values: Sequence[float], images: Interval | None) -> dict[str, Any]:
    seeds = student_interval(values)
    return {"seeds": list(seeds) if seeds else None, "images": list(images) if images else None}


def _against(
    name: str, reference: str, correct: Mapping[tuple[str, int], NDArray[np.bool_]]
) -> dict[str, Any] | None:
    """Return the paired difference of a variant from another over their common seeds."""
    seeds = [seed for variant, seed in correct if variant == name and (reference, seed) in correct]
    if not seeds:
        return None
    # (T, N): trainings, images
    a, b = (np.stack([correct[variant, seed] for seed in seeds]) for variant in (name, reference))
    values = (a.mean(axis=1) - b.mean(axis=1)).tolist()
    return {
        "seeds": seeds,
        "values": values,
        "difference": _mean(values),
        "intervals": _intervals(values, difference_interval(a, b)),
    }


def _read_runs(trials: Sequence[Trial]) -> dict[Trial, dict[str, Any]]:
    """Return trial -> its results, read from the run folders."""
    loaded = {
        trial: Predictions.load(predictions_path(trial.run.path, SPLIT), trial.run.path, SPLIT)
        for trial in trials
    }
    results = {}
    for trial, predictions in loaded.items():
        first = trials[0]
        names = (str(first.run.path), str(trial.run.path))
        correct = paired_correct(loaded[first], predictions, names, SPLIT)[1]
        paths = predictions.paths.tolist()
        results[trial] = {
            **_read(trial),
            "images": describe_images(paths, predictions.targets.tolist(), predictions.classes.tolist()),
            "contents": describe_contents(paths, predictions.contents),
            "correct": pack(correct),
        }
    return results


def _load_correct(
    trials: Sequence[Trial], results: Mapping[Trial, Mapping[str, Any]]
) -> dict[tuple[str, int], NDArray[np.bool_]]:
    """Return (variant, seed) -> whether each image is classified correctly, (N,), in a common order.

    Raises:
        CrossXError: If the images are not the same.
    """
    for what, key in (("images, labels and classes", "images"), ("contents of the images", "contents")):
        # results of an earlier version have no contents
        having = [trial for trial in trials if results[trial].get(key) is not None]
        for trial in having:
            if results[trial][key] != results[having[0]][key]:
                raise CrossXError(
                    f"{trial} and {having[0]} were not tested on the same {what}: one of them is from an earlier "
                    "results.json. Leave that out, or use the same data."
                )
    return {
        (trial.variant, trial.seed): unpack(results[trial]["correct"], results[trial]["n"])
        for trial in trials
    }


def _describe_base(trial: Trial) -> dict[str, Any]:
    """Return the first trial's configuration without paths and without the method's options, which vary."""
    values = trial.config.to_dict()
    source, _, path = values["model"]["backbone"].partition(":")
    values["model"] = {key: values["model"][key] for key in ("backbone", "pretrained")}
    if source == "local-dir":
        values["model"]["backbone"] = f"{source}:{Path(path).name}"
    values["data"]["root"] = Path(values["data"]["root"]).name if values["data"]["root"] else None
    return {key: values[key] for key in ("model", "data", "optim", "trainer")}


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _bounds(interval: Sequence[float] | None, *, signed: bool = False) -> str:
    if interval is None:
        return "–"
    # of two seeds that differ, Student's interval is wider than accuracies and differences can be
    least = -1 if signed else 0
    low, high = (f"{100 * min(max(bound, least), 1):{'+' if signed else ''}.2f}" for bound in interval)
    return f"{low} to {high}"
