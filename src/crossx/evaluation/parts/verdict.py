"""What the part measures say, in one sentence."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

SAME = 0.9
"""Correlation of two maps from which on they look at the same positions."""

DIFFERENT = 0.3
"""Correlation below which they look at different positions."""

IN_A_PART = 0.8
"""Share of images in which the peak of each excitation must be in a part."""

TELLS = 0.1
"""Normalised mutual information of excitation and part from which on excitations tell parts apart."""

MARGIN = 0.02
"""``follows`` of the differences, to either side, from which on what distinguishes the maps follows image or frame.

Small, because a ring around the centre changes little under all views: it has -0.024 in the tests.
"""

FEW = 20
"""Images below which its interval, a bootstrap over images, is too narrow to say so."""

LEVEL = 0.05
"""Level of significance of that NMI."""

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


def verdict(measures: Mapping[str, Any]) -> str | None:
    """Say in a sentence whether the maps, such as excitations, differ and find parts.

    Args:
        measures: The result of ``measure_run`` (``SPLIT_parts.json``). Without ``map_name``, as of an earlier version,
            the maps are called excitations.

    Returns:
        The sentence; None if the measures are of an earlier version and lack what it needs, or in another form.
    """
    try:
        stages: Mapping[str, Any] = measures["stages"]
        several = {name: stage for name, stage in stages.items() if len(stage["excitations"]) > 1}
        if not several:
            where = " per stage" if len(stages) > 1 else ""
            return f"There is one map{where}, so nothing to compare." if stages else None
        enough, noun = measures.get("n", FEW) >= FEW, measures.get("map_name", "excitation")
        clauses = [
            (_of_stage(stage, noun, enough), f"{_count(stage)} {noun}s", name)
            for name, stage in several.items()
        ]
        return _join(clauses, of_all=len(stages) > 1)
    except (AttributeError, LookupError, TypeError, ValueError):
        return None


def _join(clauses: Sequence[tuple[str, str, str]], *, of_all: bool) -> str:
    texts: dict[tuple[str, str], list[str]] = {}
    for text, maps, stage in clauses:
        texts.setdefault((text, maps), []).append(stage)
    if not of_all:
        ((text, maps),) = texts
        return f"The {maps} {text}."
    said = [f"at {' and '.join(stages)}, the {maps} {text}" for (text, maps), stages in texts.items()]
    sentence = "; ".join(said)
    return f"{sentence[0].upper()}{sentence[1:]}."


def _count(stage: Mapping[str, Any]) -> str:
    number = len(stage["excitations"])
    return NUMBERS[number] if number < len(NUMBERS) else str(number)


def _of_stage(stage: Mapping[str, Any], noun: str, enough: bool) -> str:
    flat, which = max((excitation["flat"], -p) for p, excitation in enumerate(stage["excitations"], start=1))
    if flat > 1 - IN_A_PART:
        return f"cannot be compared: {noun} {-which} is flat in {_percent(flat)} of the images"
    r = stage["diversity"]["correlation"]["value"]
    if r >= SAME:
        return f"look at the same positions (correlation {r:.2f})"
    where = "different positions" if r < DIFFERENT else "partly the same positions"
    text = f"look at {where} (correlation {r:.2f})"
    follows = stage["diversity"]["follows"]
    if enough and follows["value"] <= -MARGIN and follows["interval"][1] < 0:
        return f"{text}, but what distinguishes them follows the frame, not the image"
    if stage["consistency"] is None:
        moves = enough and follows["value"] >= MARGIN and follows["interval"][0] > 0
        return f"{text}, and what distinguishes them {'moves with' if moves else 'does not clearly follow'} the image"
    outside = [
        (excitation["any_part"]["value"], number)
        for number, excitation in enumerate(stage["excitations"], start=1)
        if excitation["any_part"]["value"] < IN_A_PART
    ]
    if outside:
        share, number = min(outside)
        return f"{text}, but {noun} {number} looks at a part in only {_percent(share)} of the images"
    inside = stage["consistency"]["inside"]
    if inside["nmi"] < TELLS or inside["p_value"] >= LEVEL:
        return f"{text}, but do not find parts of their own (NMI {inside['nmi']:.2f})"
    return f"{text}, and find parts of their own (NMI {inside['nmi']:.2f})"


def _percent(share: float) -> str:
    """Return a share in whole percent, rounded down: 79.9% is not yet 80%."""
    return f"{math.floor(100 * share)}%"
