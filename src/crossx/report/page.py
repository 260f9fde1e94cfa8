"""The HTML page of a tested run.

The page is self-contained: the style sheet is in it, pictures are data URIs, there is no script, and a content security
policy forbids the browser to load anything. Jinja escapes every name and path.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from crossx.commands import quoted
from crossx.data.catalog import dataset_title
from crossx.data.images import printable
from crossx.errors import counted
from crossx.evaluation.metrics import worst_first
from crossx.evaluation.notices import result_notices
from crossx.evaluation.parts.verdict import verdict
from crossx.method_source import curve_titles, is_imported
from crossx.report import charts
from crossx.report.confusion import confused_block, confusion_rows
from crossx.report.examples import SEED, Pictures, ShownImages, SimilarTile, make_examples
from crossx.report.part_tables import part_tables
from crossx.report.results import RunResults
from crossx.report.tables import Table, cell

BLOCK = 20
"""Classes in the confusion matrix; of more, the most confused ones are shown."""
EXTREMES = 10
"""Worst and best classes shown; up to twice as many classes share one table."""
MAX_LISTED_CLASSES = 1000
"""Up to this many classes, the page has a table of all of them."""
MAX_HISTORY_ROWS = 100
MAX_SKIPPED = 20


def render(
    run: RunResults,
    shown: ShownImages,
    pictures: Mapping[int, Pictures],
    notices: Sequence[str] = (),
    similar: Mapping[int, Sequence[SimilarTile]] | None = None,
) -> str:
    """Return the page as HTML.

    Args:
        run: The tested run.
        shown: The images to show.
        pictures: Image number -> its pictures, for the images that have any.
        notices: What the reader should know first, one sentence each.
        similar: Image number of a mistake -> the training images most similar to it.
    """
    rows = run.class_rows
    block = confused_block(run.confusion, BLOCK)
    kept = (run.info.get("selection") or {}).get("epoch")
    template = page_environment().get_template("page.html.j2")
    return template.render(
        run=run,
        results=run.results,
        dataset=dataset_title(run.results["dataset"], run.results.get("data_root")),
        info=run.info,
        notices=[*result_notices(run.results), *notices],
        charts=charts,
        curves=charts.training_curves(run.history, kept, _curve_titles(run.spec.method)),
        history=_history(run),
        bins=charts.reliability_bins(run.confidences, run.correct),
        ranked=worst_first(rows),
        best=sorted(rows, key=lambda row: -(row.accuracy or 0.0))[:EXTREMES],
        extremes=EXTREMES,
        listed=rows if 2 * EXTREMES < len(rows) <= MAX_LISTED_CLASSES else [],
        block=[run.names[label] for label in block],
        confusion=confusion_rows(run.confusion, run.names, block),
        shown=shown,
        similar=similar or {},
        examples=make_examples(run, shown.images, pictures),
        has_pictures=bool(pictures),
        has_boxes=any(picture.has_boxes for picture in pictures.values()),
        many_tiles=any(sum(map(len, picture.overlays.values())) > 3 for picture in pictures.values()),
        seed=SEED,
        part_tables=part_tables(run.parts),
        part_verdict=verdict(run.parts),
        provenance=_provenance(run),
        skipped={"training": run.info.get("skipped") or [], "test": run.results.get("skipped") or []},
        max_skipped=MAX_SKIPPED,
        version=metadata.version("crossx"),
    )


def page_environment(*packages: str) -> Environment:
    """Return the environment for the templates of this package and of ``packages``, which come first."""
    environment = Environment(
        loader=ChoiceLoader([PackageLoader(package) for package in (*packages, "crossx.report")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": lambda share, digits=1: f"{share:.{digits}%}",
        "breakable": _breakable,
        "counted": counted,
        "quoted": lambda path: quoted(Path(path)),
    }
    return environment


def _curve_titles(method: str) -> Mapping[str, str]:
    if is_imported():
        from crossx.methods.registry import method_class, registered

        # also one that is registered elsewhere
        if method in registered():
            return method_class(method).curve_titles
    return curve_titles(method)


def _breakable(name: str) -> Markup:
    """Escape a name or path and allow line breaks after its underscores and slashes."""
    return Markup(re.sub(r"([_/\\-])", r"\1<wbr>", str(escape(printable(name)))))


def _history(run: RunResults) -> Table:
    columns = tuple(dict.fromkeys(name for row in run.history for name in row))
    rows = charts.thinned(run.history, MAX_HISTORY_ROWS)
    return Table(
        columns,
        tuple(tuple(cell(row.get(name)) for name in columns) for row in rows),
        "Every number of the training, one row per epoch",
        len(run.history) - len(rows),
    )


def _provenance(run: RunResults) -> dict[str, str]:
    """Return what is known about the origin of the run and its results, name -> text."""
    results, info = run.results, run.info
    facts = {
        "run": info.get("id"),
        "status": info.get("status"),
        "method": run.spec.method,
        "backbone": results["backbone"],
        "pretrained": results.get("pretrained"),
        "backbone weights": results.get("backbone_weights"),
        "started from": _started_from(info.get("init")),
        "options": info.get("tuned"),
        "training ended by": _in_words(info.get("ended")),
        "trained for longer after epochs": info.get("extended_after"),
        "weights": results["weights"],
        "selection of the weights": _in_words(results.get("selection")),
        "seed": results.get("seed"),
        "data": results.get("data_root"),
        "images": _in_words(info.get("images")),
        "preprocessing": _in_words(results.get("preprocessing")),
    }
    for when, environment in (("trained", info.get("environment")), ("tested", results.get("environment"))):
        if environment:
            versions = _in_words(environment.get("versions")) or "versions unknown"
            facts[f"{when} with"] = f"Python {environment.get('python')}, {versions}"
            facts[f"{when} on"] = environment.get("platform")
            if git := environment.get("git"):
                dirty = ", with uncommitted changes" if git["dirty"] else ""
                facts[f"{when} at commit"] = f"{git['commit']}{dirty}"
    return {name: cell(value) for name, value in facts.items() if value is not None}


def _started_from(init: Mapping[str, Any] | None) -> str | None:
    if not init:
        return None
    text = f"{init['run']} ({init['method']}, {init['num_classes']} classes of {init['dataset']})"
    return f"{text}, {init['weights']}, SHA-256 {init['sha256']}"


def _in_words(values: Mapping[str, Any] | None) -> str | None:
    if not values:
        return None
    return ", ".join(f"{name} {cell(value)}" for name, value in values.items() if value is not None)
