"""Tables of the measures of ``crossx test RUN --parts``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from crossx.report.tables import Table, cell

SHARES = "Share of the activation within a part over the part's share of the area, by stage and network part"
MOVES = (
    "Correlation with the map of the changed image, moved with the image / left in place, and with fixed maps, by "
    "stage and network part"
)
AGREEMENT = "Whether each part of the network finds a part of its own, with 95% intervals"
AGREEMENT_COLUMNS = (
    *("stage", "same part in all images (NMI)", "by chance", "p"),
    *("overlap", "by chance", "correlation"),
)
FIELD = (
    "Measures of part discovery and of part prototypes, with 95% intervals (by chance; by the frame alone)"
)
VIEWS = {
    "flip": "flipped",
    "upside_down": "upside down",
    "quarter_turn": "quarter turn",
    "tilt": "tilted",
    "zoom": "zoomed",
}
FIXED = {"rows": "rows", "columns": "columns", "ring": "ring", "other_images": "other images"}


def part_tables(measures: Mapping[str, Any]) -> list[Table]:
    """Return the tables of ``SPLIT_parts.json``, also of earlier versions; none if its format is unknown."""
    try:
        stages = measures["stages"]
        names = tuple(f"{stage} · {number}" for stage, number, _ in excitations(stages))
        tables = []
        if shares := share_rows(measures):
            tables.append(Table(("part", "images", *names), (*shares, *peak_rows(measures)), SHARES))
        views = [(row[0], *row[2:]) for row in view_rows(measures)]
        tables.append(Table(("map", *names), views, MOVES))
        if agreement := _agreement(stages):
            tables.append(Table(AGREEMENT_COLUMNS, agreement, AGREEMENT))
        if field := _field(stages):
            tables.append(Table(("measure", *stages), field, FIELD))
        return tables
    except (AttributeError, LookupError, TypeError, ValueError):
        return []


def excitations(stages: Mapping[str, Any]) -> list[tuple[str, int, Mapping[str, Any]]]:
    """Return the stage, the number (from 1) and the measures of every excitation."""
    return [
        (stage, number, excitation)
        for stage, measured in stages.items()
        for number, excitation in enumerate(measured["excitations"], start=1)
    ]


def share_rows(measures: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return the rows of a table with one column per excitation of ``SPLIT_parts.json``.

    For each part, and for the whole object if its box is known: name, number of images, and the share of activation
    over the share of area.
    """
    columns = [excitation for *_, excitation in excitations(measures["stages"])]
    shares: list[tuple[str, ...]] = [
        (part, cell(images), *(_ratio(excitation["share"][part]) for excitation in columns))
        for part, images in measures["parts"].items()
    ]
    if any(excitation["object"] for excitation in columns):
        shares.append(("whole object", "", *(_ratio(excitation["object"]) for excitation in columns)))
    return shares


def peak_rows(measures: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return rows as ``share_rows``: how often the peak is in a part, and by chance; none without parts."""
    columns = [excitation for *_, excitation in excitations(measures["stages"])]
    if not all(excitation.get("any_part") for excitation in columns):
        return []
    return [
        (name, "", *(f"{excitation['any_part'][key]:.2f}" for excitation in columns))
        for key, name in (("value", "peak in a part"), ("chance", "  by chance"))
    ]


def view_rows(measures: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return rows as ``share_rows``: correlations with the maps of changed images and with fixed maps.

    Views that an earlier version did not measure have no row.
    """
    columns = [excitation for *_, excitation in excitations(measures["stages"])]
    return [
        (name, "", *(_moved(excitation[key]) for excitation in columns))
        for key, name in {**VIEWS, **FIXED}.items()
        if all(key in excitation for excitation in columns)
    ]


def _moved(number: Mapping[str, Any]) -> str:
    moved = f"{number['value']:.2f}"
    return f"{moved} / {number['frame']:.2f}" if "frame" in number else moved


def _field(stages: Mapping[str, Any]) -> list[Sequence[str]]:
    """Return the rows of the measures of part discovery and part prototypes, one column per stage."""
    if not all(measured.get("keypoints") and measured.get("prototypes") for measured in stages.values()):
        return []
    rows = (
        ("keypoint NMI", "keypoints", "nmi"),
        ("keypoint ARI", "keypoints", "ari"),
        ("keypoint error, in the object's box", "keypoints", "error"),
        ("consistency", "prototypes", "consistency"),
        ("stability under noise", "prototypes", "stability"),
    )
    return [
        (name, *(_with_levels(measured[group][key]) for measured in stages.values()))
        for name, group, key in rows
    ]


def _with_levels(number: Mapping[str, Any] | None) -> str:
    if number is None:
        return "—"
    levels = [f"{number[level]:.3f}" for level in ("chance", "frame") if level in number]
    return f"{_with_interval(number['value'], number['interval'])} ({'; '.join(levels)})"


def _agreement(stages: Mapping[str, Any]) -> list[Sequence[str]]:
    rows: list[Sequence[str]] = []
    for stage, measured in stages.items():
        consistency, diversity = measured["consistency"], measured["diversity"]
        if consistency is not None:
            overlap, correlation = diversity["overlap"], diversity["correlation"]
            rows.append(
                (
                    stage,
                    _with_interval(consistency["nmi"], consistency["interval"]),
                    f"{consistency['chance']:.3f}",
                    f"{consistency['p_value']:.3g}",
                    _with_interval(overlap["value"], overlap["interval"]),
                    f"{overlap['chance']:.3f}",
                    _with_interval(correlation["value"], correlation["interval"]),
                )
            )
    return rows


def _ratio(number: Mapping[str, Any] | None) -> str:
    return "—" if number is None or number["over_chance"] is None else f"{number['over_chance']:.2f}"


def _with_interval(value: float, interval: tuple[float, float]) -> str:
    return f"{value:.3f} ({interval[0]:.3f} to {interval[1]:.3f})"
