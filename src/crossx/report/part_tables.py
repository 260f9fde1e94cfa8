"""Tables of the measures of ``crossx test RUN --parts``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from crossx.report.tables import Table, cell

VIEWS = {"flip": "correlation with the map of the flipped image", "zoom": "the same, zoomed"}
SHARES = "Share of the activation within a part over the part's share of the area, by stage and network part"
AGREEMENT = "Whether each part of the network finds a part of its own, with 95% intervals"
AGREEMENT_COLUMNS = (
    *("stage", "same part in all images (NMI)", "by chance", "p"),
    *("overlap", "by chance", "correlation"),
)


def part_tables(measures: Mapping[str, Any]) -> list[Table]:
    """Return the tables of ``SPLIT_parts.json``; none if its format is unknown."""
    try:
        names = [f"{stage} · {number}" for stage, number, _ in excitations(measures["stages"])]
        shares, views = share_rows(measures, VIEWS)
        tables = [Table(("part", "images", *names), (*shares, *views), SHARES)]
        if agreement := _agreement(measures["stages"]):
            tables.append(Table(AGREEMENT_COLUMNS, agreement, AGREEMENT))
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


def share_rows(
    measures: Mapping[str, Any], views: Mapping[str, str]
) -> tuple[list[tuple[str, ...]], list[tuple[str, ...]]]:
    """Return the rows of a table with one column per excitation.

    Args:
        measures: ``SPLIT_parts.json``.
        views: View, ``flip`` or ``zoom``, -> name of its row.

    Returns:
        For each part, and for the whole object if its box is known: name, number of images, and the share of
        activation over the share of area. For each view: name, nothing, and the correlations.
    """
    columns = [excitation for *_, excitation in excitations(measures["stages"])]
    shares: list[tuple[str, ...]] = [
        (part, cell(images), *(_ratio(excitation["share"][part]) for excitation in columns))
        for part, images in measures["parts"].items()
    ]
    if any(excitation["object"] for excitation in columns):
        shares.append(("whole object", "", *(_ratio(excitation["object"]) for excitation in columns)))
    return shares, [
        (name, "", *(f"{excitation[view]['value']:.2f}" for excitation in columns))
        for view, name in views.items()
    ]


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
