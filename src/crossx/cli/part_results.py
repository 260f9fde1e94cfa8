"""Print the results of ``crossx test RUN --parts``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from crossx.data.catalog import dataset_title
from crossx.errors import counted
from crossx.evaluation.notices import result_notices
from crossx.report.part_tables import excitations, peak_rows, share_rows, view_rows
from crossx.runs import open_run
from crossx.terminal import columns, fold

WIDTH = 118
"""Columns of a table that goes to a pipe or file, beyond which it continues below."""

OF_PARTS = "part: share of activation over share of area; peak: the position of the largest value;"
OF_VIEWS = (
    "flipped to zoomed: r with the map of the changed image, moved with the image / left in place;\n"
    "rows to other images: r with a fixed map, and with the mean map of the other images"
)


def print_parts(path: str | Path, results: Mapping[str, Any]) -> None:
    """Print what ``measure_run`` returned for the run at ``path``."""
    folder, split = open_run(path)[0].path, results["split"]
    parts = counted(len(results["parts"]), "part") if results["parts"] else "no annotated parts"
    dataset = dataset_title(results["dataset"], results.get("data_root"))
    text = (
        f"{results['method']} ({results['backbone']}) on {dataset}, {split}: "
        f"{counted(results['n'], 'image')}, {parts}, weights {results['weights']}"
    )
    print(fold(text, hanging="  "))
    if results["verdict"]:
        print(fold(results["verdict"], width=columns() or WIDTH))
    if results["parts"]:
        print(fold(OF_PARTS))
    print(fold(OF_VIEWS))
    header = ("", "images", *(f"{stage} {number}" for stage, number, _ in excitations(results["stages"])))
    rows = [*share_rows(results), *peak_rows(results), *view_rows(results)]
    _print_table([header, *rows])
    for stage, measured in results["stages"].items():
        lines = _stage_lines(measured, results["map_name"])
        if lines:
            height, width = measured["size"]
            print(f"{stage}, {height} x {width} positions:")
            for name, text in lines:
                print(fold(f"  {name:<19}  {text}"))
    for notice in result_notices(results):
        print(fold(f"  {notice}"))
    print(f"results: {folder / f'{split}_parts.json'}")
    print(f"picture: {folder / split / 'parts.png'}")


def _print_table(rows: Sequence[Sequence[str]]) -> None:
    """Print a table; columns that do not fit follow below, with the names of the rows."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    # without annotated parts no row counts images
    kept = [1] if any(row[1] for row in rows[1:]) else []
    room = (columns() or WIDTH) - 2 - widths[0] - sum(2 + widths[column] for column in kept)
    at_once = max(1, room // (2 + max(widths[2:])))
    for first in range(2, len(widths), at_once):
        block = range(first, min(first + at_once, len(widths)))
        for row in rows:
            cells = [row[column].rjust(widths[column]) for column in (*kept, *block)]
            print("  " + "  ".join([row[0].ljust(widths[0]), *cells]))


def _stage_lines(measured: Mapping[str, Any], map_name: str) -> list[tuple[str, str]]:
    lines = []
    if (diversity := measured["diversity"]) is not None:
        overlap, follows = diversity["overlap"], diversity["follows"]
        lines += [
            ("correlation", _value(diversity["correlation"])),
            ("overlap of foci", f"{_value(overlap)}, by chance {overlap['chance']:.3f}"),
            (
                "difference follows",
                f"{_value(follows)}; below 0 the frame, above 0 the image (if exactly, {follows['possible']:.3f})",
            ),
        ]
    if (consistency := measured["consistency"]) is not None:
        for name, agreement in (
            (f"part and {map_name}", consistency),
            ("  peaks in parts", consistency["inside"]),
        ):
            lines.append(
                (
                    name,
                    f"NMI {agreement['nmi']:.3f}{_interval(agreement['interval'])}, "
                    f"by chance {agreement['chance']:.3f}, p = {agreement['p_value']:.3g}",
                )
            )
    if (keypoints := measured["keypoints"]) is not None:
        for name in ("nmi", "ari"):
            if (value := keypoints[name]) is not None:
                lines.append((f"keypoint {name.upper()}", f"{_value(value)}, {_levels(value)}"))
        if (error := keypoints["error"]) is not None:
            lines.append(("keypoint error", f"{_value(error)} of the box, {_levels(error)}"))
        elif why := keypoints.get("error_not_measured"):
            lines.append(("keypoint error", f"not measured: {why}"))
    if (prototypes := measured["prototypes"]) is not None:
        for name, value in prototypes.items():
            lines.append((name, f"{_value(value)}, by chance {value['chance']:.3f}"))
    return lines


def _levels(value: Mapping[str, Any]) -> str:
    return f"by chance {value['chance']:.3f}, by the frame {value['frame']:.3f}"


def _value(value: Mapping[str, Any]) -> str:
    return f"{value['value']:.3f}{_interval(value['interval'])}"


def _interval(interval: Sequence[float]) -> str:
    return f" ({interval[0]:.3f} to {interval[1]:.3f})"
