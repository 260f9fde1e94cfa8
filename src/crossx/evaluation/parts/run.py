"""Measure what the excitations of a trained run look at, on images with annotated parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor

from crossx.data.index import Record, part_names
from crossx.errors import CrossXError
from crossx.evaluation.intervals import CONFIDENCE
from crossx.evaluation.network import within_memory
from crossx.evaluation.parts.measures import RESAMPLES, TOP_SHARE, ZOOM, measure_images, summarize_parts, zoom
from crossx.evaluation.parts.plots import plot_parts
from crossx.evaluation.parts.regions import KEYPOINT_RADIUS, CropRegions, find_regions
from crossx.evaluation.progress import track
from crossx.evaluation.subject import Subject, SubjectOptions
from crossx.runs import write_json


def measure_run(path: str | Path, **options: Unpack[SubjectOptions]) -> dict[str, Any]:
    """Measure the activation maps of a run on one split of a dataset with annotated parts, and write the results.

    Writes the result to ``OUTPUT/SPLIT_parts.json`` and a figure of it to ``OUTPUT/SPLIT/parts.png``.

    Args:
        path: A run folder (its selected weights) or a checkpoint file in one.
        **options: See ``SubjectOptions``.

    Returns:
        ``n`` (images), ``parts`` (name -> number of images that show it), ``stages`` (name -> result of
        ``summarize_parts``), the constants of the definitions, and the run's provenance as in ``test_run``.

    Raises:
        UsageError: As ``Subject.open``.
        CrossXError: As ``Subject.open``, or if the dataset has no parts or the maps are not finite.
    """
    subject = Subject.open(path, **options)
    split = subject.split
    present = subject.data.index.split(split)
    if present and not part_names(present):
        raise CrossXError(
            f"dataset {subject.data.index.name!r} has no parts on its {split} images. --parts needs a dataset with "
            "them: cub or nabirds with the archive's parts/part_locs.txt, or synthetic."
        )
    subject.data.check_images([split])
    records = subject.data.index.split(split)
    names, parts, objects = _visible_parts(records, subject)
    stages = _measure(subject, parts, objects)
    results = {
        "n": len(records),
        "parts": dict(zip(names, parts.visible.sum(0).tolist(), strict=True)),
        "stages": {
            stage: {
                "size": size,
                **summarize_parts(
                    measures, names, parts.visible, objects.visible[:, 0], positions=size[0] * size[1]
                ),
            }
            for stage, (size, measures) in stages.items()
        },
        "definitions": {
            "keypoint_radius": KEYPOINT_RADIUS,
            "focus_share": TOP_SHARE,
            "zoom": ZOOM,
            "confidence": CONFIDENCE,
            "resamples": RESAMPLES,
            "seed": 0,
        },
        **subject.provenance(),
    }
    title = f"{subject.spec.method} on {results['dataset']}, {split}: activation within each part"
    plot_parts(results["stages"], names, subject.output / split / "parts.png", title=title)
    write_json(subject.output / f"{split}_parts.json", results)
    return results


def _visible_parts(
    records: tuple[Record, ...], subject: Subject
) -> tuple[tuple[str, ...], CropRegions, CropRegions]:
    names = part_names(records)
    parts, objects = find_regions(records, names, subject.spec.preprocessing)
    shown = parts.visible.any(0)
    if not shown.any():
        raise CrossXError(
            f"dataset {subject.data.index.name!r}: no part is in the crops of its {subject.split} images: check that "
            "the positions belong to these images."
        )
    names = tuple(name for name, seen in zip(names, shown.tolist(), strict=True) if seen)
    return names, CropRegions(parts.boxes[:, shown], parts.radii, parts.visible[:, shown]), objects


@torch.inference_mode()
def _measure(
    subject: Subject, parts: CropRegions, objects: CropRegions
) -> dict[str, tuple[tuple[int, int], dict[str, Tensor]]]:
    """Return stage name -> size of its maps and the measures of all images."""
    network = subject.network
    measured: dict[str, list[dict[str, Tensor]]] = {}
    sizes: dict[str, tuple[int, int]] = {}
    start = 0
    for batch, _ in track(subject.data.eval_loader(subject.split), "Measuring"):
        with within_memory(len(batch)):
            images = network.inputs(batch)
            views = [network.method.activation_maps(view) for view in (images, images.flip(3), zoom(images))]
        here = slice(start, start + len(batch))
        start = here.stop
        for stage in views[0]:
            maps, flipped, zoomed = (view[stage].float().cpu() for view in views)
            if not all(each.isfinite().all() for each in (maps, flipped, zoomed)):
                raise CrossXError(
                    f"the maps of stage {stage!r} are not finite: the weights are damaged, or training diverged."
                )
            sizes[stage] = (maps.shape[2], maps.shape[3])
            measured.setdefault(stage, []).append(
                measure_images(maps, flipped, zoomed, images.shape[2:], parts[here], objects[here])
            )
    return {
        stage: (sizes[stage], {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]})
        for stage, batches in measured.items()
    }
