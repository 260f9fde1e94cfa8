"""The HTML page of an audit, self-contained as that of ``crossx report``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import metadata

from crossx.audit.quality import ISSUES
from crossx.audit.result import Audit, DuplicateGroup
from crossx.data.images import read_pixels
from crossx.data.index import SPLITS
from crossx.report.examples import data_uri
from crossx.report.page import page_environment

SIDE = 128
"""Longer side of a picture, in pixels."""
MAX_GROUPS, MAX_MEMBERS, MAX_LABELS, MAX_OUTLIERS, MAX_QUALITY = 60, 6, 120, 40, 16
"""Groups of duplicates, images of a group, label errors, outliers, and images per quality issue that have pictures."""
MAX_CLASSES = 1000
"""Classes in the table."""

EXPLAINED: Mapping[str, str] = {
    "dark": "even the brightest pixels are dark",
    "light": "even the darkest pixels are light",
    "blurry": "few and weak edges",
    "low_information": "few different grey values",
    "odd_aspect_ratio": "much longer than wide, or wider than long",
    "odd_size": "much larger or smaller than the other images",
    "grayscale": "without colour",
}
"""What cleanvision's issues mean."""


def render(audit: Audit, progress: Callable[[int, int], None]) -> str:
    """Return the page as HTML.

    Args:
        audit: The audit.
        progress: Called with the number of pictures drawn and the total.
    """
    groups = sorted(audit.groups, key=_urgency)[:MAX_GROUPS]
    members = {group.images: _members(audit, group.images, group.kept) for group in groups}
    alike = {numbers: _members(audit, numbers) for numbers in audit.duplicates.alike[:MAX_GROUPS]}
    labels, outliers = audit.labels[:MAX_LABELS], audit.outliers[:MAX_OUTLIERS]
    quality = {issue: audit.quality[issue][:MAX_QUALITY] for issue in ISSUES if audit.quality.get(issue)}
    numbers = {
        *(number for drawn in (*members.values(), *alike.values()) for number in drawn),
        *(issue.image for issue in labels),
        *(outlier.image for outlier in outliers),
        *(number for found in quality.values() for number, _ in found),
    }
    counts = audit.class_counts()
    largest = max((row[split] for row in counts for split in SPLITS), default=1) or 1
    return (
        page_environment("crossx.audit")
        .get_template("audit.html.j2")
        .render(
            audit=audit,
            pictures=_draw(audit, sorted(numbers), progress),
            groups=groups,
            labels=labels,
            outliers=outliers,
            quality=quality,
            explained=EXPLAINED,
            counts=sorted(counts, key=lambda row: (row["train"], row["class"]))[:MAX_CLASSES],
            largest=largest,
            splits=[split for split in SPLITS if any(row[split] for row in counts)],
            members=members,
            alike=alike,
            version=metadata.version("crossx"),
        )
    )


def _urgency(group: DuplicateGroup) -> tuple[bool, bool, float, tuple[int, ...]]:
    return not group.conflict, not group.leak, -group.correlation, group.images


def _members(audit: Audit, numbers: Sequence[int], kept: Sequence[int] = ()) -> list[int]:
    """Choose the images of a group to draw: those kept, then each label and split before a second image of it."""
    labels: set[int] = set()
    both: set[tuple[int, str]] = set()
    ranks = {}
    for number in sorted(numbers, key=lambda number: number not in kept):
        label, split = audit.records[number].label, audit.records[number].split
        ranks[number] = (number not in kept, label in labels, (label, split) in both)
        labels.add(label)
        both.add((label, split))
    return sorted(numbers, key=ranks.__getitem__)[:MAX_MEMBERS]


def _draw(audit: Audit, numbers: Sequence[int], progress: Callable[[int, int], None]) -> dict[int, str]:
    pictures = {}
    for done, number in enumerate(numbers, start=1):
        pictures[number] = data_uri(read_pixels(audit.records[number].path, min_side=SIDE), SIDE)
        progress(done, len(numbers))
    return pictures
