"""What an audit found."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crossx.data.index import SPLITS, Record
from crossx.errors import counted, first_few

if TYPE_CHECKING:
    from crossx.audit.duplicates import Duplicates
    from crossx.audit.labels import LabelIssue
    from crossx.audit.quality import Outlier

CHECKS = ("duplicates", "labels", "outliers", "quality")
"""What is searched for, besides unreadable images and unbalanced classes."""
REASONS = ("unreadable", "leak", "duplicate", "label", "alike", "outlier", "quality")
"""Why an image can be in ``exclude.csv``."""
EXCLUDED = ("unreadable", "leak", "duplicate", "label")
"""Those that are in it by default; the others are worth a look, but often harmless."""


@dataclass(frozen=True)
class DuplicateGroup:
    """Images that show the same picture.

    Attributes:
        images: Their numbers.
        kept: Those that ``exclude.csv`` keeps: the one to test on, else the largest; none if their labels differ.
        identical: Whether all files are identical.
        correlation: The lowest of its pairs.
        leak: Whether they are in several splits.
        conflict: Whether they have several labels.
    """

    images: tuple[int, ...]
    kept: tuple[int, ...]
    identical: bool
    correlation: float
    leak: bool
    conflict: bool


@dataclass(frozen=True)
class Audit:
    """What ``audit_dataset`` found. Images are numbered in the order of ``records``.

    Attributes:
        dataset: The dataset's name.
        root: Its folder or table.
        classes: The K class names.
        records: The images that can be read, each once.
        paths: Their paths relative to the root.
        unreadable: Path and reason of each other image.
        network: How the embeddings were computed.
        duplicates: Pairs and threshold of the search for near-duplicates.
        groups: Images that show the same picture.
        labels: Probable label errors, least probable label first.
        trained_on: Images whose predictions are not out-of-fold, since the run was trained on them.
        not_judged: Classes with too few images to judge their labels.
        accuracy: Of the out-of-fold (or held-out) predictions; None if there are none.
        outliers: Images unlike all others.
        outlier_distance: From which an image is one; None if there are too few images.
        quality: Issue -> images and scores, see ``find_quality_issues``.
        checks: What was searched for.
        reasons: Why images are in ``exclude.csv``, of ``REASONS``.
        folder: Where the files were written; None if they were not.
    """

    dataset: str
    root: str
    classes: tuple[str, ...]
    records: tuple[Record, ...]
    paths: tuple[str, ...]
    unreadable: tuple[tuple[str, str], ...]
    network: dict[str, Any]
    duplicates: Duplicates
    groups: tuple[DuplicateGroup, ...]
    labels: tuple[LabelIssue, ...]
    trained_on: frozenset[int]
    not_judged: tuple[str, ...]
    accuracy: float | None
    outliers: tuple[Outlier, ...]
    outlier_distance: float | None
    quality: dict[str, list[tuple[int, float]]]
    checks: tuple[str, ...] = CHECKS
    reasons: tuple[str, ...] = EXCLUDED
    folder: Path | None = field(default=None, compare=False)

    @property
    def leaks(self) -> list[DuplicateGroup]:
        """The groups whose images are in several splits."""
        return [group for group in self.groups if group.leak]

    @property
    def copies(self) -> int:
        """The number of images that show the same picture as another one, without one per group."""
        return sum(len(group.images) - 1 for group in self.groups)

    @property
    def conflicts(self) -> int:
        """The number of groups whose images have several labels."""
        return sum(group.conflict for group in self.groups)

    @property
    def alike(self) -> int:
        """The number of images that look like others but are not copies of them."""
        return sum(map(len, self.duplicates.alike))

    @property
    def alike_across_splits(self) -> int:
        """The number of groups of images that look alike and are in several splits."""
        splits = ({self.records[number].split for number in group} for group in self.duplicates.alike)
        return sum(len(found) > 1 for found in splits)

    @property
    def memorised(self) -> int:
        """The number of images whose labels were judged by predictions that are not out-of-fold."""
        return len(self.trained_on) if "labels" in self.checks else 0

    @cached_property
    def excluded(self) -> tuple[tuple[str, str, str], ...]:
        """Path, reason and detail of each row of ``exclude.csv``."""
        return tuple(row for row in self._exclusions() if row[1] in self.reasons)

    def exclude_counts(self) -> dict[str, int]:
        """Return the number of rows of ``exclude.csv`` per reason."""
        return dict(Counter(reason for _, reason, _ in self.excluded))

    def class_counts(self) -> list[dict[str, Any]]:
        """Return the number of readable images per class and split, in label order."""
        counts = Counter((record.label, record.split) for record in self.records)
        return [
            {"class": name, **{split: counts[label, split] for split in SPLITS}}
            for label, name in enumerate(self.classes)
        ]

    @property
    def untrained(self) -> tuple[str, ...]:
        """The classes without a readable training image."""
        trained = {record.label for record in self.records if record.split == "train"}
        return tuple(name for label, name in enumerate(self.classes) if label not in trained)

    def imbalance(self) -> float | None:
        """Return the most training images of a class per those of the smallest; None if one has none."""
        counts = [row["train"] for row in self.class_counts()]
        return round(max(counts) / min(counts), 2) if min(counts) else None

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain values."""

        def image(number: int) -> dict[str, Any]:
            record = self.records[number]
            return {
                "path": self.paths[number],
                "split": record.split,
                "label": self.classes[record.label],
            }

        return {
            "schema": 1,
            "dataset": self.dataset,
            "root": self.root,
            "images": len(self.records),
            "splits": dict(Counter(record.split for record in self.records)),
            "network": self.network,
            "checks": list(self.checks),
            "unreadable": [{"path": path, "reason": reason} for path, reason in self.unreadable],
            "duplicates": {
                "threshold": self.duplicates.threshold,
                "usual": self.duplicates.usual,
                "compared": self.duplicates.candidates,
                "pairs": [
                    {
                        "paths": [self.paths[pair.first], self.paths[pair.second]],
                        "correlation": pair.correlation,
                    }
                    for pair in self.duplicates.pairs
                ],
                "groups": [
                    {
                        "images": [image(number) for number in group.images],
                        "kept": [self.paths[number] for number in group.kept],
                        "identical": group.identical,
                        "correlation": group.correlation,
                        "leak": group.leak,
                        "conflict": group.conflict,
                    }
                    for group in self.groups
                ],
                "alike": [[image(number) for number in group] for group in self.duplicates.alike],
            },
            "labels": {
                "accuracy": self.accuracy,
                "not_judged": list(self.not_judged),
                "trained_on": self.memorised,
                "issues": [
                    {
                        **image(issue.image),
                        "suggested": self.classes[issue.suggested],
                        "probability": issue.probability,
                        "given_probability": issue.given,
                        "out_of_fold": issue.image not in self.trained_on,
                    }
                    for issue in self.labels
                ],
            },
            "outliers": {
                "distance": self.outlier_distance,
                "images": [
                    {
                        **image(outlier.image),
                        "distance": outlier.distance,
                        "nearest": self.paths[outlier.nearest],
                    }
                    for outlier in self.outliers
                ],
            },
            "quality": {
                issue: [{**image(number), "score": score} for number, score in found]
                for issue, found in self.quality.items()
            },
            "classes": self.class_counts(),
            "imbalance": self.imbalance(),
            "exclude": self.exclude_counts(),
        }

    def summary(self) -> str:
        """Format the main counts for a terminal."""
        flagged = ", ".join(
            f"{len(images)} {issue.replace('_', ' ')}" for issue, images in self.quality.items() if images
        )
        labels = counted(len(self.labels), "probable label error")
        if self.not_judged:
            labels += f"; {counted(len(self.not_judged), 'class')} too small to judge"
        if self.memorised:
            labels += (
                f"; most errors are missed among the {counted(self.memorised, 'image')} that the run was trained on, "
                "whose predictions are not out-of-fold: audit without --run"
            )
        alike = ""
        if self.alike:
            alike = (
                f"; {self.alike:,} images look alike, but are probably different photographs, as of products in one "
                "pose: they are not taken for copies"
            )
        found = {
            "duplicates": f"{counted(self.copies, 'copy') if self.copies == 1 else f'{self.copies:,} copies'} in "
            f"{counted(len(self.groups), 'group')}, {len(self.leaks):,} of them in several splits (leakage), "
            f"{self.conflicts:,} under several labels{alike}",
            "labels": labels,
            "outliers": counted(len(self.outliers), "image"),
            "quality": flagged or "nothing found",
        }
        lines = [
            f"{self.dataset} in {self.root}: {counted(len(self.records), 'image')}, "
            f"{counted(len(self.classes), 'class')}",
            f"  unreadable   {counted(len(self.unreadable), 'image')}",
            *(
                f"  {check:<11}  {found[check] if check in self.checks else 'not checked'}"
                for check in CHECKS
            ),
            f"  classes      {self._class_sizes()}",
        ]
        return "\n".join(lines)

    def _class_sizes(self) -> str:
        if self.untrained:
            names = first_few([repr(name) for name in self.untrained], 5)
            return f"{counted(len(self.untrained), 'class')} without training images: {names}"
        counts = [row["train"] for row in self.class_counts()]
        least, most = (counted(size, "training image") for size in (min(counts), max(counts)))
        return f"{least} in {'each' if least == most else f'the smallest, {most} in the largest'}"

    def _exclusions(self) -> Iterator[tuple[str, str, str]]:
        """Yield path, reason and detail of the images that could be left out."""
        for path, problem in self.unreadable:
            yield path, "unreadable", problem
        for group in self.groups:
            for number in group.images:
                if number in group.kept:
                    continue
                record = self.records[number]
                # without one to keep, the labels differ: an image with another label is the reason
                others = group.kept or (
                    one for one in group.images if self.records[one].label != record.label
                )
                other = next(iter(others))
                kept = self.records[other]
                detail = f"same picture as {self.paths[other]} ({kept.split})"
                if group.conflict:
                    detail += f", which is labelled {self.classes[kept.label]}"
                yield self.paths[number], "leak" if record.split != kept.split else "duplicate", detail
        for issue in self.labels:
            given, suggested = self.classes[self.records[issue.image].label], self.classes[issue.suggested]
            detail = f"labelled {given} ({issue.given:.2%}), rather {suggested} ({issue.probability:.1%})"
            yield self.paths[issue.image], "label", detail
        for numbers in self.duplicates.alike:
            firsts: dict[int, int] = {}
            for number in numbers:
                first = firsts.setdefault(self.records[number].label, number)
                if first != number:
                    yield self.paths[number], "alike", f"looks like {self.paths[first]}"
        for outlier in self.outliers:
            yield self.paths[outlier.image], "outlier", f"distance {outlier.distance:.3f}"
        for kind, found in self.quality.items():
            for number, score in found:
                yield self.paths[number], "quality", f"{kind.replace('_', ' ')} (score {score:.2f})"
