"""Audit a dataset and write what was found."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from crossx.audit.duplicates import Duplicates, find_duplicates
from crossx.audit.images import Images, read_images
from crossx.audit.labels import LabelIssue, find_label_issues, large_enough, out_of_fold
from crossx.audit.quality import find_outliers, find_quality_issues
from crossx.audit.result import CHECKS, EXCLUDED, REASONS, Audit, DuplicateGroup
from crossx.data.catalog import base_folder, dataset_root, read_existing
from crossx.data.exclude import write_excluded
from crossx.data.index import SPLITS
from crossx.errors import UsageError, unknown
from crossx.extras import require
from crossx.runs import check_writable, write_json, write_text

if TYPE_CHECKING:
    from crossx.predict.predictor import Predictor

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much is done, and the total."""


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
    _check_choices("check", checks, CHECKS)
    _check_choices("reason", exclude, REASONS)
    if backbone is not None and run is not None:
        raise UsageError("--backbone and --run cannot be combined: the embeddings come from one of them.")
    index = read_existing(name, root, **options)
    place = dataset_root(name, root, options)
    folder = _check_output(output, place)
    step = progress or (lambda what, done, total: None)

    from crossx.audit.embeddings import BACKBONE, load_backbone
    from crossx.audit.predictions import RunPredictor

    base = base_folder(place)
    classifier = RunPredictor.load(run, index, base, device) if run is not None else None
    predictor = classifier.predictor if classifier else load_backbone(backbone or BACKBONE, device)
    images = read_images(index, base, partial(step, "Reading images"))
    files = [record.path for record in images.records]
    vectors = _embed(predictor, images, folder, batch_size, step)
    labels = np.array([record.label for record in images.records], dtype=np.int64)
    duplicates = Duplicates()
    if "duplicates" in checks:
        duplicates = find_duplicates(
            images.digests, images.thumbnails, vectors, labels, progress=partial(step, "Comparing pairs")
        )
    grouped = _group_numbers(len(files), duplicates)
    judged = large_enough(labels, grouped)
    network = {"backbone": backbone or BACKBONE, "predictions": "out-of-fold"}
    trained_on = np.zeros(len(files), dtype=bool)
    if classifier is not None:
        network = {"run": str(run), "backbone": predictor.spec.backbone, "predictions": "run"}
        trained_on = classifier.trained_on(files)
    issues: list[LabelIssue] = []
    accuracy = None
    if "labels" in checks:
        probabilities = (
            classifier.predict(files, batch_size, partial(step, "Predicting"))
            if classifier is not None
            else out_of_fold(
                vectors, labels, grouped, len(index.classes), progress=partial(step, "Fitting classifiers")
            )
        )
        issues, accuracy = _judge_labels(labels, probabilities, judged, trained_on)
    outliers, distance = find_outliers(vectors) if "outliers" in checks else ([], None)
    quality: dict[str, list[tuple[int, float]]] = {}
    if "quality" in checks:
        quality = find_quality_issues(files, progress=partial(step, "Checking the quality"))
    small = sorted({*labels.tolist()} - {*labels[judged].tolist()})
    audit = Audit(
        dataset=name,
        root=str(place),
        classes=index.classes,
        records=tuple(images.records),
        paths=tuple(images.paths),
        unreadable=tuple(images.unreadable),
        network={**network, "image_size": predictor.spec.preprocessing.image_size},
        duplicates=duplicates,
        groups=tuple(_describe_groups(duplicates, images)),
        labels=tuple(issues),
        trained_on=frozenset(np.flatnonzero(trained_on).tolist()),
        not_judged=tuple(index.classes[label] for label in small),
        accuracy=accuracy,
        outliers=tuple(outliers),
        outlier_distance=distance,
        quality=quality,
        checks=tuple(check for check in CHECKS if check in checks),
        reasons=tuple(reason for reason in REASONS if reason in exclude),
        folder=folder,
    )
    if folder is not None:
        _write(audit, folder, step)
    return audit


def _check_choices(kind: str, given: Sequence[str], choices: Sequence[str]) -> None:
    for name in given:
        if name not in choices:
            raise unknown(kind, name, choices)


def _embed(
    predictor: Predictor, images: Images, folder: Path | None, batch_size: int, step: Progress
) -> NDArray[np.float32]:
    """Return the embeddings of the images, (N, C)."""
    from crossx.predict.embeddings import embed

    known = embed(
        predictor,
        [record.path for record in images.records],
        images.digests,
        folder / "embeddings.npz" if folder else None,
        batch_size=batch_size,
        progress=partial(step, "Computing embeddings"),
    )
    return np.stack([known[digest] for digest in images.digests]).astype(np.float32)


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


def _judge_labels(
    labels: NDArray[np.int64],
    probabilities: NDArray[np.float64],
    judged: NDArray[np.bool_],
    trained_on: NDArray[np.bool_],
) -> tuple[list[LabelIssue], float | None]:
    """Return the probable label errors, and the accuracy of the predictions that are out-of-fold or held-out."""
    held_out = judged & ~trained_on
    issues = [
        issue
        for part in (held_out, judged & trained_on)
        for issue in find_label_issues(labels, probabilities, part)
    ]
    if not held_out.any():
        return issues, None
    return issues, round(float((probabilities.argmax(1) == labels)[held_out].mean()), 4)


def _describe_groups(duplicates: Duplicates, images: Images) -> Iterator[DuplicateGroup]:
    first = {number: group[0] for group in duplicates.groups for number in group}
    scores: dict[int, list[float]] = defaultdict(list)
    for pair in duplicates.pairs:
        scores[first[pair.first]].append(pair.correlation)
    for group in duplicates.groups:
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
            correlation=min(scores[group[0]]),
            leak=len({record.split for record in records}) > 1,
            conflict=conflict,
        )


def _write(audit: Audit, folder: Path, step: Progress) -> None:
    from crossx.audit.page import render

    write_excluded(folder / "exclude.csv", audit.excluded, ("path", "reason", "detail"))
    write_json(folder / "audit.json", audit.to_json())
    write_text(folder / "report.html", render(audit, partial(step, "Drawing the page")))
