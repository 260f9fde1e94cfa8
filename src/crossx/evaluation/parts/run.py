"""Measure what the excitations of a trained run look at, with or without annotated parts."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor

from crossx.data.catalog import dataset_title
from crossx.data.index import Record, part_names
from crossx.errors import CrossXError
from crossx.evaluation.intervals import CONFIDENCE
from crossx.evaluation.network import within_memory
from crossx.evaluation.parts import keypoints, prototypes
from crossx.evaluation.parts.measures import RESAMPLES, TOP_SHARE, ZOOM, measure_images
from crossx.evaluation.parts.plots import plot_parts
from crossx.evaluation.parts.regions import KEYPOINT_RADIUS, CropRegions, find_regions
from crossx.evaluation.parts.summary import Fitted, Measured, Places, summarize_stage
from crossx.evaluation.parts.verdict import DIFFERENT, FEW, IN_A_PART, LEVEL, MARGIN, SAME, TELLS, verdict
from crossx.evaluation.parts.views import TILT, VIEWS, measure_positions, measure_views, thumbnails
from crossx.evaluation.progress import track
from crossx.evaluation.subject import Subject, SubjectOptions
from crossx.runs import write_json

log = logging.getLogger(__name__)


def measure_run(path: str | Path, **options: Unpack[SubjectOptions]) -> dict[str, Any]:
    """Measure the activation maps of a run on one split of a dataset, and write the results.

    Without annotated parts, what needs none is measured: diversity, and whether maps move with the image. Writes the
    result to ``OUTPUT/SPLIT_parts.json`` and a figure of it to ``OUTPUT/SPLIT/parts.png``.

    Args:
        path: A run folder (its selected weights) or a checkpoint file in one.
        **options: See ``SubjectOptions``.

    Returns:
        ``n`` (images), ``parts`` (name -> number of images that show it), ``stages`` (name -> result of
        ``summarize_stage``), ``map_name`` (what the method calls a map), ``verdict`` (a sentence), the constants of the
        definitions, and the run's provenance as in ``test_run``.

    Raises:
        UsageError: As ``Subject.open``.
        CrossXError: As ``Subject.open``, or if no part is in the crops or the maps are not finite.
    """
    subject = Subject.open(path, **options)
    split = subject.split
    subject.check_outputs(f"{split}_parts.json", f"{split}/parts.png")
    subject.data.check_images([split])
    records = subject.data.index.split(split)
    places = _locate(records, subject)
    measured = _measure(subject, places)
    fitted = _fit(subject, places)
    results: dict[str, Any] = {
        "n": len(records),
        "parts": dict(zip(places.names, places.parts.visible.sum(0).tolist(), strict=True)),
        "stages": {
            stage: summarize_stage(of_stage, places, fitted.get(stage))
            for stage, of_stage in measured.items()
        },
    }
    results["map_name"] = subject.method.map_name
    results["verdict"] = verdict(results)
    results |= {
        "definitions": {
            "keypoint_radius": KEYPOINT_RADIUS,
            "focus_share": TOP_SHARE,
            "zoom": ZOOM,
            "tilt": TILT,
            "active": keypoints.ACTIVE,
            "region": prototypes.HALF_SIDE,
            "consistent": prototypes.CONSISTENT,
            "noise": [prototypes.NOISE, prototypes.LARGEST_NOISE],
            "verdict": {
                "same": SAME, "different": DIFFERENT, "margin": MARGIN, "few": FEW, "in_a_part": IN_A_PART,
                "nmi": TELLS, "level": LEVEL,
            },
            "confidence": CONFIDENCE,
            "resamples": RESAMPLES,
            "seed": 0,
        },
        **subject.provenance(),
    }  # fmt: skip
    title = f"{subject.spec.method} on {dataset_title(results['dataset'], results['data_root'])}, {split}"
    figure = subject.output / split / "parts.png"
    plot_parts(results["stages"], places.names, figure, title=title, map_name=results["map_name"])
    write_json(subject.output / f"{split}_parts.json", results)
    return results


def _locate(records: tuple[Record, ...], subject: Subject) -> Places:
    annotated = part_names(records)
    side = subject.spec.preprocessing.image_size
    parts, objects = find_regions(records, annotated, subject.spec.preprocessing)
    shown = parts.visible.any(0)
    if annotated and not shown.any():
        raise CrossXError(
            f"dataset {subject.data.index.name!r}: no part is in the crops of its {subject.split} images: check that "
            "the positions belong to these images."
        )
    names = tuple(name for name, seen in zip(annotated, shown.tolist(), strict=True) if seen)
    parts = CropRegions(parts.boxes[:, shown], parts.radii, parts.visible[:, shown])
    return Places(names, parts, objects, tuple(record.label for record in records), side)


@torch.inference_mode()
def _measure(subject: Subject, places: Places) -> dict[str, Measured]:
    """Return stage name -> the measures of all images."""
    method, are_shares = subject.network.method, subject.method.maps_are_shares
    generator = torch.Generator().manual_seed(0)
    measured: dict[str, Measured] = {}
    for here, images in _batches(subject, subject.split, "Measuring"):
        with within_memory(len(images)):
            upright = method.activation_maps(images)
            views = {name: method.activation_maps(view.images(images)) for name, view in VIEWS.items()}
            if places.names:
                views["noise"] = method.activation_maps(prototypes.perturb(images, generator))
        parts, objects = places.parts[here], places.objects[here]
        for stage in upright:
            maps = _finite(stage, upright[stage])
            seen = {name: _finite(stage, of_view[stage]) for name, of_view in views.items()}
            noisy = seen.pop("noise", None)
            measures = measure_images(maps, seen["flip"], seen["zoom"], images.shape[2:], parts, objects)
            measures |= measure_views(maps, seen, images.shape[2:]) | measure_positions(maps)
            measures["thumbnails"] = thumbnails(maps)
            of_stage = measured.setdefault(stage, Measured((maps.shape[2], maps.shape[3])))
            if noisy is not None:
                scores = keypoints.assignments(maps, are_shares=are_shares)
                of_stage.add_scores(scores)
                measures["labels"] = keypoints.label_keypoints(scores, parts.centres, places.side)
                measures["centroids"], measures["active"] = keypoints.find_centroids(
                    maps, places.side, are_shares=are_shares
                )
                measures["peaks"] = prototypes.find_peaks(maps, places.side)
                measures["noisy_peaks"] = prototypes.find_peaks(noisy, places.side)
            of_stage.batches.append(measures)
    return measured


@torch.inference_mode()
def _fit(subject: Subject, places: Places) -> dict[str, Fitted]:
    """Return stage name -> what the regression of keypoints is fitted on: the training images."""
    records = subject.data.index.split("train")
    if not places.names or not any(record.parts and record.box for record in records):
        return {}
    try:
        if subject.split != "train":
            subject.data.check_images(["train"])
    except CrossXError as error:
        log.warning("The regression of keypoints is left out, which needs the training images: %s", error)
        return {}
    records = subject.data.index.split("train")
    parts, objects = find_regions(records, places.names, subject.spec.preprocessing)
    located: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for _, images in _batches(subject, "train", "Fitting keypoints"):
        with within_memory(len(images)):
            stages = subject.network.method.activation_maps(images)
        for stage, of_stage in stages.items():
            maps = _finite(stage, of_stage)
            located.setdefault(stage, []).append(
                keypoints.find_centroids(maps, places.side, are_shares=subject.method.maps_are_shares)
            )
    fitted = {}
    for stage, batches in located.items():
        centroids, active = (torch.cat(column) for column in zip(*batches, strict=True))
        fitted[stage] = Fitted(centroids, active, parts, objects, subject.split == "train")
    return fitted


def _batches(subject: Subject, split: str, title: str) -> Iterator[tuple[slice, Tensor]]:
    """Yield the position of each batch in the split, and its images as the network's input."""
    start = 0
    network = subject.network
    for batch, _ in track(subject.data.eval_loader(split), title):
        here = slice(start, start + len(batch))
        start = here.stop
        with within_memory(len(batch)):
            images = network.inputs(batch)
        yield here, images


def _finite(stage: str, maps: Tensor) -> Tensor:
    maps = maps.float().cpu()
    if not maps.isfinite().all():
        raise CrossXError(
            f"the maps of stage {stage!r} are not finite: the weights are damaged, or training diverged."
        )
    return maps
