"""What ``model.json`` holds: how to rebuild a trained network and how to prepare its input."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from crossx.class_names import display_names
from crossx.errors import CrossXError

SCHEMA = 2
"""Newest version of ``model.json`` that is read; docs/upgrade.md says what it promises. A file without anything that is
new in schema 2, which is ``rejection``, is written as schema 1."""


@dataclass(frozen=True)
class Preprocessing:
    """How a stored image is turned into the network's input in evaluation.

    Attributes:
        image_size: Side of the square crop, in pixels.
        resize_size: Size before the crop: a number resizes to a square of that side, ignoring the aspect ratio as in
            the released code; None resizes the shorter side to image_size / 0.875.
        interpolation: ``bilinear`` or ``bicubic``.
        mean: Per-channel mean, of images scaled to [0, 1].
        std: Per-channel standard deviation of the same.
        crop_bottom: Rows to crop from the bottom first (20 removes FGVC-Aircraft's banner).
        pipeline: ``fast`` or ``strict``, see ``DataConfig``.
    """

    image_size: int
    resize_size: int | None
    interpolation: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    crop_bottom: int = 0
    pipeline: str = "fast"


@dataclass(frozen=True)
class Rejection:
    """When an image is taken to show none of the classes, see ``crossx.evaluation.unknowns``.

    Attributes:
        score: Name of a score that is high for images of the classes.
        keep: Share of the images of the classes that the thresholds were set to keep.
        images: Number of images that they were set on.
        thresholds: Key of ``views.views_key`` -> the least score of an image that is kept.
        weight: That of the similarity to class means in the score ``combined``; None for a network without them.
    """

    score: str
    keep: float
    images: int
    thresholds: Mapping[str, float]
    weight: float | None = None


@dataclass(frozen=True)
class PredictionSets:
    """Which classes are in a prediction set, see ``crossx.evaluation.conformal``.

    Attributes:
        images: Number of calibration images.
        least_probability: Key of ``views.views_key`` -> the least probability of a class in a set, for a coverage of
            50%, 51%, ... as far as so many images allow, at most 99%.
    """

    images: int
    least_probability: Mapping[str, tuple[float, ...]]


class NewerSchemaError(CrossXError):
    """A file that a later version of crossx wrote, which is not damaged."""


@dataclass(frozen=True)
class ModelSpec:
    """How to rebuild a trained network and prepare its input.

    Attributes:
        method: The method's registered name.
        options: The method's own options.
        backbone: The timm model's name.
        backbone_args: Further arguments for timm.
        classes: Class names in label order.
        preprocessing: How images are prepared in evaluation.
        dataset: Name of the dataset of the labels.
        levels: Hierarchy of the classes, see ``DatasetIndex.levels``.
        temperature: T > 0 of temperature scaling: probabilities are softmax(logits / T). 1 if none was fitted.
        rejection: When an image is of none of the classes; None if every image gets one.
        sets: Which classes are in a prediction set; None if that was not calibrated.
        combined_weight: The ``weight`` of ``rejection`` where there is none, for a later calibration.
    """

    method: str
    options: Mapping[str, Any]
    backbone: str
    backbone_args: Mapping[str, Any]
    classes: tuple[str, ...]
    preprocessing: Preprocessing
    dataset: str
    levels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    temperature: float = 1.0
    rejection: Rejection | None = None
    sets: PredictionSets | None = None
    combined_weight: float | None = None

    @property
    def score_weight(self) -> float | None:
        """The weight of the score ``combined``, see ``Rejection``; None for a network without class means."""
        return self.combined_weight if self.rejection is None else self.rejection.weight

    @cached_property
    def display_names(self) -> tuple[str, ...]:
        """The classes as people read them, in label order: for pages, pictures and tables, not for files."""
        return display_names(self.classes)

    def to_json(self) -> dict[str, Any]:
        """Return a plain dictionary for ``from_json``, of the lowest schema that has everything in it."""
        values = asdict(self)
        for name in ("rejection", "sets", "combined_weight"):
            if values[name] is None:
                del values[name]
        if self.rejection and self.rejection.weight is None:
            del values["rejection"]["weight"]
        # an earlier version, which ignores it, would give a class where this one gives none
        return {"schema": 2 if self.rejection else 1, **values}

    @classmethod
    def from_json(cls, values: Mapping[str, Any], source: Path) -> ModelSpec:
        """Rebuild from ``to_json``'s dictionary; ``source`` is named in errors.

        Raises:
            NewerSchemaError: If a later version of crossx wrote it.
            CrossXError: If a value is missing, of the wrong type or out of bounds (see ``crossx.schema``).
        """
        schema = values.get("schema")
        # neither True nor 1.0
        if type(schema) is not int or schema < 1:
            raise CrossXError(
                f"{source}: not a model description of crossx (schema: should be 1 to {SCHEMA}, not "
                f"{reprlib.repr(schema)})."
            )
        if schema > SCHEMA:
            raise NewerSchemaError(
                f"{source}: schema {reprlib.repr(schema)}, this version of crossx reads 1 to {SCHEMA}: upgrade crossx."
            )
        # pydantic is slow to import, and `--help` does not need it
        from crossx.schema.model import check_model

        check_model(values, source)
        prep = dict(values["preprocessing"])
        prep["mean"], prep["std"] = tuple(prep["mean"]), tuple(prep["std"])
        return cls(
            method=values["method"],
            options=values["options"],
            backbone=values["backbone"],
            backbone_args=values["backbone_args"],
            classes=tuple(values["classes"]),
            preprocessing=Preprocessing(**prep),
            dataset=values["dataset"],
            levels={name: tuple(groups) for name, groups in values.get("levels", {}).items()},
            temperature=float(values.get("temperature", 1.0)),
            rejection=None if values.get("rejection") is None else Rejection(**values["rejection"]),
            sets=None if values.get("sets") is None else _sets(values["sets"]),
            combined_weight=values.get("combined_weight"),
        )


def _sets(values: Mapping[str, Any]) -> PredictionSets:
    least = {views: tuple(row) for views, row in values["least_probability"].items()}
    return PredictionSets(values["images"], least)
