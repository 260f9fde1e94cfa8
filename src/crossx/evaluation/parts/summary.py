"""Summarise the measures of all images of one stage, for JSON."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from crossx.errors import counted
from crossx.evaluation.parts import keypoints
from crossx.evaluation.parts.measures import Bootstrap, summarize_parts
from crossx.evaluation.parts.prototypes import summarize_prototypes
from crossx.evaluation.parts.regions import CropRegions
from crossx.evaluation.parts.views import POSITION_MAPS, VIEWS, differences, likeness

LOCATED = ("labels", "centroids", "active", "peaks", "noisy_peaks")
"""Values per image that are compared with the parts of all images."""


class Places(NamedTuple):
    """Where parts and objects are in N crops.

    Attributes:
        names: K parts; none if they are not annotated.
        parts: K regions per image.
        objects: One region per image.
        classes: N class indices.
        side: Side of the crops, in pixels.
    """

    names: tuple[str, ...]
    parts: CropRegions
    objects: CropRegions
    classes: tuple[int, ...]
    side: int


class Fitted(NamedTuple):
    """What the regression of keypoints is fitted on.

    Attributes:
        centroids: (M, P, 2), in pixels.
        active: bool (M, P).
        parts: K regions per image.
        objects: One region per image.
        measured: Whether these are the images that are measured.
    """

    centroids: Tensor
    active: Tensor
    parts: CropRegions
    objects: CropRegions
    measured: bool = False


@dataclass
class Measured:
    """The measures of one stage.

    Attributes:
        size: Height and width of its maps.
        batches: Name -> values per image, of each batch.
        scores: The sum of ``keypoints.assignments`` over the images, (P + 1, h, w); None without parts.
    """

    size: tuple[int, int]
    batches: list[dict[str, Tensor]] = field(default_factory=list)
    scores: Tensor | None = None

    def add_scores(self, scores: Tensor) -> None:
        """Add the scores of a batch, (B, P + 1, h, w)."""
        total = scores.double().sum(0)
        self.scores = total if self.scores is None else self.scores + total


def summarize_stage(measured: Measured, places: Places, fitted: Fitted | None) -> dict[str, Any]:
    """Return the measures of one stage as a dictionary for JSON.

    Args:
        measured: Its measures.
        places: Where the parts are.
        fitted: What the regression of keypoints is fitted on; None without it.

    Returns:
        ``size``, and what ``summarize_parts`` returns. Each excitation also has every view with ``value``,
        ``interval``, ``frame`` and ``symmetry`` (see ``measure_views``), ``follows``, ``flat`` (share of images in
        which its map is constant), and its correlation with each of ``POSITION_MAPS`` and with ``other_images``;
        ``diversity`` has ``follows`` and ``other_images`` of the differences. With parts, ``keypoints`` (``nmi``,
        ``ari`` and ``error``, None or with ``error_not_measured`` where they cannot be measured) and ``prototypes``
        (``consistency`` and ``stability``), else None.
    """
    measures = {name: torch.cat([batch[name] for batch in measured.batches]) for name in measured.batches[0]}
    maps = measures.pop("thumbnails")
    located: dict[str, Tensor] = {name: measures.pop(name) for name in [*measures] if name in LOCATED}
    has_object = places.objects.visible[:, 0]
    height, width = measured.size
    summary = summarize_parts(
        measures, places.names, places.parts.visible, has_object, positions=height * width
    )
    bootstrap = Bootstrap(len(maps))
    _add_views(summary, measures, maps, bootstrap)
    summary["keypoints"] = summary["prototypes"] = None
    if places.names:
        assert measured.scores is not None
        summary["keypoints"] = _summarize_keypoints(located, measured.scores, places, fitted, bootstrap)
        summary["prototypes"] = summarize_prototypes(
            located["peaks"],
            located["noisy_peaks"],
            places.classes,
            places.parts,
            places.objects,
            places.side,
            bootstrap,
        )
    return {"size": measured.size, **summary}


def _add_views(
    summary: dict[str, Any], measures: dict[str, Tensor], maps: Tensor, bootstrap: Bootstrap
) -> None:
    arrays = {name: values.double().numpy() for name, values in measures.items()}
    arrays["other_images"] = likeness(maps).numpy()
    flat = (maps.amax((2, 3)) == maps.amin((2, 3))).double().mean(0).tolist()  # (N, P, h, w) -> (P,)
    for p, excitation in enumerate(summary["excitations"]):
        excitation["flat"] = flat[p]
        for view in VIEWS:
            excitation[view] = {
                **bootstrap.mean(arrays[view][:, p]),
                "frame": float(arrays[f"{view}_frame"][:, p].mean()),
                "symmetry": float(arrays[f"{view}_symmetry"][:, p].mean()),
            }
        for name in ("follows", *POSITION_MAPS, "other_images"):
            excitation[name] = bootstrap.mean(arrays[name][:, p])
    if summary["diversity"] is not None:
        of_differences = likeness(differences(maps)).mean(1).numpy()
        summary["diversity"]["follows"] = bootstrap.mean(arrays["difference_follows"]) | {
            "possible": float(arrays["difference_possible"].mean())
        }
        summary["diversity"]["other_images"] = bootstrap.mean(of_differences)


def _summarize_keypoints(
    located: dict[str, Tensor],
    scores: Tensor,
    places: Places,
    fitted: Fitted | None,
    bootstrap: Bootstrap,
) -> dict[str, Any]:
    images = len(places.classes)
    average = (scores / images).float().expand(images, -1, -1, -1)
    of_frame = keypoints.label_keypoints(average, places.parts.centres, places.side)
    agreement = keypoints.keypoint_agreement(
        located["labels"], of_frame, places.parts.visible, len(scores), bootstrap
    )
    error, why = _error(located, places, fitted, bootstrap) if fitted else (None, None)
    return {**agreement, "error": error, **({"error_not_measured": why} if why else {})}


def _error(
    located: dict[str, Tensor], places: Places, fitted: Fitted, bootstrap: Bootstrap
) -> tuple[dict[str, Any] | None, str | None]:
    """Return the keypoint error, or why it is not measured."""
    if fitted.measured:
        return None, "the images are those of the regression"
    here = places.parts, places.objects, places.side
    there = fitted.parts, fitted.objects, places.side

    def errors(
        centroids: Tensor, active: Tensor, fit_centroids: Tensor, fit_active: Tensor
    ) -> NDArray[np.float64]:
        return keypoints.regression_errors(
            *_in_boxes(centroids, active, *here), _in_boxes(fit_centroids, fit_active, *there)
        )

    def constant(value: float, images: int) -> tuple[Tensor, Tensor]:
        return torch.full((images, 1, 2), value), torch.ones(images, 1, dtype=torch.bool)

    n, m = len(places.classes), len(fitted.centroids)
    measured = errors(located["centroids"], located["active"], fitted.centroids, fitted.active)
    of_frame = errors(*constant(places.side / 2, n), *constant(places.side / 2, m))
    nothing, fit_nothing = constant(0.0, n)[1] & False, constant(0.0, m)[1] & False
    by_chance = errors(constant(0.0, n)[0], nothing, constant(0.0, m)[0], fit_nothing)
    error = keypoints.summarize_errors(measured, by_chance, of_frame, bootstrap)
    most, regressors = int(fitted.parts.visible.sum(0).max()), 2 * fitted.centroids.shape[1]
    few = error is None and keypoints.exact(most, regressors)
    return error, f"{counted(most, 'image')} for {regressors} regressors" if few else None


def _in_boxes(
    centroids: Tensor, active: Tensor, parts: CropRegions, objects: CropRegions, side: int
) -> tuple[NDArray[np.float64], NDArray[np.bool_], NDArray[np.float64], NDArray[np.bool_]]:
    """Return centroids, active, keypoints and visible; positions in units of the object's box, from its corner."""
    box = objects.boxes.double() * side  # (N, 1, 4)
    extent = box[..., 2:] - box[..., :2]
    usable = objects.visible & (extent > 0).all(-1)  # (N, 1)
    extent = torch.where(usable[..., None], extent, 1.0)
    within = [
        (points - box[..., :2]) / extent for points in (centroids.double(), parts.centres.double() * side)
    ]
    return within[0].numpy(), active.numpy(), within[1].numpy(), (parts.visible & usable).numpy()
