"""Audit a dataset and write what was found."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from crossx.audit.alignment import SIDE
from crossx.audit.duplicates import Duplicates, find_duplicates
from crossx.audit.labels import LabelIssue, find_label_issues, large_enough, out_of_fold
from crossx.audit.quality import ISSUES, Outlier, find_outliers, find_quality_issues
from crossx.data.catalog import base_folder, dataset_root, read_dataset
from crossx.data.exclude import write_excluded, written_path
from crossx.data.images import ImageError, inspect_image, read_pixels
from crossx.data.index import SPLITS, DatasetIndex, Record
from crossx.errors import CrossXError, UsageError, counted, unknown
from crossx.extras import require
from crossx.runs import check_writable, write_json, write_text

CHECKS = ("duplicates", "labels", "outliers", "quality")
"""What is searched for, besides unreadable images and unbalanced classes."""
REASONS = ("unreadable", "leak", "duplicate", "label", "outlier", "quality")
"""Why an image can be in ``exclude.csv``."""
EXCLUDED = ("unreadable", "leak", "duplicate", "label")
"""Those that are in it by default; the others are worth a look, but often harmless."""
FEW = 5
"""Training images of a class below which it is named."""

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much is done, and the total."""


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
        excluded: Image's path, reason and detail of each row of ``exclude.csv``.
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
    excluded: tuple[tuple[str, str, str], ...] = ()
    folder: Path | None = field(default=None, compare=False)

    @property
    def leaks(self) -> list[DuplicateGroup]:
        """The groups whose images are in several splits."""
        return [group for group in self.groups if group.leak]

    def class_counts(self) -> list[dict[str, Any]]:
        """Return the number of readable images per class and split, in label order."""
        counts = Counter((record.label, record.split) for record in self.records)
        return [
            {"class": name, **{split: counts[label, split] for split in SPLITS}}
            for label, name in enumerate(self.classes)
        ]

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
            },
            "labels": {
                "accuracy": self.accuracy,
                "not_judged": list(self.not_judged),
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
            "exclude": dict(Counter(reason for _, reason, _ in self.excluded)),
        }

    def summary(self) -> str:
        """Format the main counts for a terminal."""
        copies = sum(len(group.images) - 1 for group in self.groups)
        conflicts = sum(group.conflict for group in self.groups)
        memorised = sum(issue.image in self.trained_on for issue in self.labels)
        smallest = min((row["train"] for row in self.class_counts()), default=0)
        flagged = ", ".join(
            f"{len(self.quality[issue])} {issue.replace('_', ' ')}"
            for issue in ISSUES
            if self.quality.get(issue)
        )
        labels = counted(len(self.labels), "probable label error")
        if memorised:
            labels += f" ({memorised} of images that the run was trained on: not out-of-fold)"
        if self.not_judged:
            labels += f"; {counted(len(self.not_judged), 'class')} too small to judge"
        found = {
            "duplicates": f"{counted(copies, 'copy') if copies == 1 else f'{copies:,} copies'} in "
            f"{counted(len(self.groups), 'group')}, {len(self.leaks):,} of them in several splits (leakage), "
            f"{conflicts:,} under several labels",
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
            f"  classes      {smallest:,} training images in the smallest"
            + (f", {ratio:g} times as many in the largest" if (ratio := self.imbalance()) else ""),
        ]
        return "\n".join(lines)


def audit_dataset(
    name: str,
    root: str | Path | None,
    *,
    output: str | Path | None = None,
    backbone: str | None = None,
    run: str | Path | None = None,
    checks: Sequence[str] = CHECKS,
    exclude: Sequence[str] = EXCLUDED,
    device: str = "auto",
    batch_size: int = 32,
    progress: Progress | None = None,
    **options: Any,
) -> Audit:
    """Search a dataset for near-duplicates, leakage, label errors, outliers, poor images and unbalanced classes.

    The result is the same on every call. Needs ``crossx[audit]``.

    Args:
        name: A name in ``catalog.DATASETS``.
        root: Its folder or table, as for ``read_dataset``.
        output: Folder for ``report.html``, ``audit.json``, ``exclude.csv`` and the embeddings, which the next audit
            takes from there; None writes nothing.
        backbone: Pretrained backbone for the embeddings, see ``create_backbone``; default ``resnet50.tv_in1k``.
        run: A trained run to take embeddings and predictions from instead. Predictions of images that it was trained on
            are not out-of-fold.
        checks: What to search for, of ``CHECKS``.
        exclude: Reasons (``REASONS``) for which images get into ``exclude.csv``.
        device: See ``select_device``.
        batch_size: Images per step.
        progress: Called after every image.
        **options: Options of the dataset's reader.

    Raises:
        UsageError: As ``read_dataset``, or if an option is wrong or a library is missing.
        CrossXError: If the lists, the network or all images cannot be read, or the folder cannot be written to.
    """
    require("crossx datasets audit", "cleanlab", "cleanvision", "sklearn", extra="audit")
    for kind, given, choices in (("check", checks, CHECKS), ("reason", exclude, REASONS)):
        for name_given in given:
            if name_given not in choices:
                raise unknown(kind, name_given, choices)
    if backbone is not None and run is not None:
        raise UsageError("--backbone and --run do not go together: embeddings are those of one of them.")
    index = read_dataset(name, root, **options)
    place = dataset_root(name, root, {key: value for key, value in options.items() if value is not None})
    folder = _check_output(output, place)
    step = progress or (lambda what, done, total: None)

    from crossx.audit.embeddings import BACKBONE, load_backbone
    from crossx.audit.predictions import RunPredictor
    from crossx.predict.embeddings import embed

    base = base_folder(place)
    classifier = RunPredictor.load(run, index, base, device) if run is not None else None
    predictor = classifier.predictor if classifier else load_backbone(backbone or BACKBONE, device)
    images = _read_images(index, base, lambda done, total: step("Reading images", done, total))
    files = [record.path for record in images.records]
    known = embed(
        predictor,
        files,
        images.digests,
        folder / "embeddings.npz" if folder else None,
        batch_size=batch_size,
        progress=lambda done, total: step("Computing embeddings", done, total),
    )
    vectors = np.stack([known[digest] for digest in images.digests]).astype(np.float32)
    duplicates = Duplicates()
    if "duplicates" in checks:
        duplicates = find_duplicates(
            images.digests,
            images.thumbnails,
            vectors,
            progress=lambda done, total: step("Comparing pairs", done, total),
        )
    labels = np.array([record.label for record in images.records], dtype=np.int64)
    grouped = _group_numbers(len(files), duplicates)
    judged = large_enough(labels, grouped)
    network = {"backbone": backbone or BACKBONE, "predictions": "out-of-fold"}
    trained_on = np.zeros(len(files), dtype=bool)
    if classifier is not None:
        network = {"run": str(run), "backbone": predictor.spec.backbone, "predictions": "run"}
        trained_on = classifier.trained_on(files)
    issues, accuracy = [], None
    if "labels" in checks:
        if classifier is None:
            probabilities = out_of_fold(
                vectors,
                labels,
                grouped,
                len(index.classes),
                progress=lambda done, total: step("Fitting classifiers", done, total),
            )
        else:
            probabilities = classifier.predict(
                files, batch_size, lambda done, total: step("Predicting", done, total)
            )
        for part in (judged & ~trained_on, judged & trained_on):
            issues += find_label_issues(labels, probabilities, part)
        reliable = judged & ~trained_on
        if reliable.any():
            accuracy = round(float((probabilities.argmax(1) == labels)[reliable].mean()), 4)
    outliers, distance = find_outliers(vectors) if "outliers" in checks else ([], None)
    quality: dict[str, list[tuple[int, float]]] = {}
    if "quality" in checks:
        quality = find_quality_issues(
            files, progress=lambda done, total: step("Checking the quality", done, total)
        )
    small = sorted({*labels.tolist()} - {*labels[judged].tolist()})
    groups = tuple(_describe_groups(duplicates, images))
    audit = Audit(
        dataset=name,
        root=str(place),
        classes=index.classes,
        records=tuple(images.records),
        paths=tuple(images.paths),
        unreadable=tuple(images.unreadable),
        network={**network, "image_size": predictor.spec.preprocessing.image_size},
        duplicates=duplicates,
        groups=groups,
        labels=tuple(issues),
        trained_on=frozenset(np.flatnonzero(trained_on).tolist()),
        not_judged=tuple(index.classes[label] for label in small),
        accuracy=accuracy,
        outliers=tuple(outliers),
        outlier_distance=distance,
        quality=quality,
        checks=tuple(check for check in CHECKS if check in checks),
        folder=folder,
    )
    audit = replace(audit, excluded=tuple(_exclusions(audit, exclude)))
    if folder is not None:
        _write(audit, folder, step)
    return audit


@dataclass
class _Images:
    records: list[Record]
    paths: list[str]
    digests: list[bytes]
    thumbnails: NDArray[np.uint8]
    pixels: list[int]
    unreadable: list[tuple[str, str]]


def _read_images(index: DatasetIndex, base: Path, progress: Callable[[int, int], None]) -> _Images:
    """Decode every image once: checksum, small grey image and number of pixels."""
    # a table may list an image twice
    records = list({record.path: record for record in index.records}.values())
    images = _Images([], [], [], np.zeros((0, SIDE, SIDE), np.uint8), [], [])
    thumbnails = []
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        read = pool.map(_read_image, (record.path for record in records))
        for done, (record, found) in enumerate(zip(records, read, strict=True), start=1):
            path = written_path(record.path, base)
            if isinstance(found, str):
                images.unreadable.append((path, found))
            else:
                digest, thumbnail, size = found
                images.records.append(record)
                images.paths.append(path)
                images.digests.append(digest)
                images.pixels.append(size)
                thumbnails.append(thumbnail)
            progress(done, len(records))
    if not images.records:
        path, reason = images.unreadable[0] if images.unreadable else ("", "")
        example = f" ({path}: {reason})" if path else ""
        raise CrossXError(
            f"dataset {index.name!r}: none of {counted(len(records), 'image')} can be read{example}."
        )
    images.thumbnails = np.stack(thumbnails)
    return images


def _read_image(path: Path) -> tuple[bytes, NDArray[np.uint8], int] | str:
    # also what decoding for viewing tolerates
    problem, _ = inspect_image(path)
    if problem is not None:
        return problem
    try:
        pixels = read_pixels(path)
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").digest()
    except ImageError as error:
        return error.reason
    except OSError as error:
        return str(error.strerror or error)
    grey = Image.fromarray(pixels).convert("L").resize((SIDE, SIDE), Image.Resampling.BILINEAR)
    return digest, np.asarray(grey), pixels.shape[0] * pixels.shape[1]


def _check_output(output: str | Path | None, root: Path) -> Path | None:
    if output is None:
        return None
    folder = Path(output)
    if root.is_dir() and folder.resolve().is_relative_to(root.resolve()):
        raise UsageError(
            f"--output {folder}: is in the dataset's folder {root}, where it could be read as a class: choose another."
        )
    check_writable(folder)
    return folder


def _group_numbers(count: int, duplicates: Duplicates) -> NDArray[np.int64]:
    numbers = np.arange(count)
    for group in duplicates.groups:
        numbers[list(group)] = group[0]
    return numbers


def _describe_groups(duplicates: Duplicates, images: _Images) -> Iterator[DuplicateGroup]:
    for group in duplicates.groups:
        members = set(group)
        scores = [
            pair.correlation for pair in duplicates.pairs if pair.first in members or pair.second in members
        ]
        records = [images.records[number] for number in group]
        conflict = len({record.label for record in records}) > 1
        best = min(
            group,
            key=lambda number: (
                -SPLITS.index(images.records[number].split),
                -images.pixels[number],
                images.paths[number],
            ),
        )
        yield DuplicateGroup(
            images=group,
            kept=() if conflict else (best,),
            identical=len({images.digests[number] for number in group}) == 1,
            correlation=min(scores),
            leak=len({record.split for record in records}) > 1,
            conflict=conflict,
        )


def _exclusions(audit: Audit, reasons: Sequence[str]) -> Iterator[tuple[str, str, str]]:
    """Yield path, reason and detail of the images to leave out, each image and reason once."""
    for path, reason in audit.unreadable:
        if "unreadable" in reasons:
            yield path, "unreadable", reason
    for group in audit.groups:
        for number in group.images:
            if number in group.kept:
                continue
            other = next(iter(group.kept), next(one for one in group.images if one != number))
            record, kept = audit.records[number], audit.records[other]
            reason = "leak" if record.split != kept.split else "duplicate"
            detail = f"same picture as {audit.paths[other]} ({kept.split})"
            if group.conflict:
                detail += f", which is labelled {audit.classes[kept.label]}"
            if reason in reasons:
                yield audit.paths[number], reason, detail
    for issue in audit.labels:
        if "label" in reasons:
            record = audit.records[issue.image]
            yield (
                audit.paths[issue.image],
                "label",
                f"labelled {audit.classes[record.label]} ({issue.given:.2%}), rather {audit.classes[issue.suggested]} "
                f"({issue.probability:.1%})",
            )
    for outlier in audit.outliers:
        if "outlier" in reasons:
            yield audit.paths[outlier.image], "outlier", f"distance {outlier.distance:.3f}"
    for kind, found in audit.quality.items():
        for number, score in found:
            if "quality" in reasons:
                yield audit.paths[number], "quality", f"{kind.replace('_', ' ')} (score {score:.2f})"


def _write(audit: Audit, folder: Path, step: Progress) -> None:
    from crossx.audit.page import render

    write_excluded(folder / "exclude.csv", audit.excluded, ("path", "reason", "detail"))
    write_json(folder / "audit.json", audit.to_json())
    write_text(
        folder / "report.html", render(audit, lambda done, total: step("Drawing the page", done, total))
    )
