"""Schemas of the other files of a run: provenance, results, training history, and the results of an ablation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from crossx.commands import command
from crossx.errors import CrossXError
from crossx.schema.base import (
    Count,
    LongText,
    Number,
    Option,
    Seed,
    Share,
    StrictModel,
    Temperature,
    Text,
    check,
    sequence,
)


class GitFile(StrictModel):
    """Git state of the working folder, in ``run.json`` and results."""

    commit: Text
    dirty: bool


class EnvironmentFile(StrictModel):
    """Software that a run was made with."""

    python: Text | None = None
    platform: Text | None = None
    versions: dict[Text, Text] = Field(default_factory=dict)
    git: GitFile | None = None


class SelectionFile(StrictModel):
    """How the epoch of the weights was selected."""

    how: Text | None = None
    split: Text | None = None
    metric: Text | None = None
    epoch: Annotated[int, Field(ge=1, le=10**9)] | None = None
    value: Number | None = None


class CalibrationFile(StrictModel):
    """``calibration`` of ``run.json``: the images that the run was calibrated on, and the temperature."""

    n: Count | None = None
    split: Text | None = None
    dataset: Text | None = None
    data_root: LongText | None = None
    temperature: Annotated[float, Field(gt=0)] | None = None


class InitFile(StrictModel):
    """``init`` of ``run.json``: the weights that a run started from."""

    run: LongText
    hub: Text | None = None
    id: Text | None = None
    weights: Text
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    method: Text
    backbone: Text
    dataset: Text
    num_classes: Count
    pretrained: LongText | None = None
    taken: Count
    new: list[str] = Field(default_factory=list)


class ImportFile(StrictModel):
    """A file or module that registered the method of a run."""

    module: Annotated[str, Field(max_length=1000, pattern=r"^[\w.]*$")]
    path: LongText
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class ProvenanceFile(StrictModel):
    """What ``run.json`` and results have in common."""

    method: Text | None = None
    backbone: Text | None = None
    pretrained: bool | None = None
    backbone_weights: LongText | None = None
    dataset: Text | None = None
    data_root: LongText | None = None
    seed: Seed | None = None
    selection: SelectionFile | None = None
    skipped: list[str] | None = None
    environment: EnvironmentFile | None = None
    calibration: CalibrationFile | None = None


class EndedFile(StrictModel):
    """What ended a training: an option, and the last epoch."""

    by: Text
    epoch: Count


class RunFile(ProvenanceFile):
    """``run.json``: provenance. Older runs lack some keys."""

    id: Text | None = None
    status: Text | None = None
    init: InitFile | None = None
    imports: Annotated[list[ImportFile], Field(max_length=64)] | None = None
    extended_after: list[Count] | None = None
    ended: EndedFile | None = None
    tuned: LongText | None = None
    images: dict[Text, Count] | None = None
    data: dict[Text, Option] | None = None
    class_names: Text | None = None


class IntervalsFile(StrictModel):
    """Confidence intervals of results."""

    top1: sequence(Number, 2, 2) = None  # type: ignore[valid-type]
    class_mean: sequence(Number, 2, 2) = None  # type: ignore[valid-type]
    confidence: Share = 0.95
    resamples: Count = 0


class PairFile(StrictModel):
    """A confusion."""

    target: Text
    prediction: Text
    n: Count
    fraction: Share


class SizeFile(StrictModel):
    """The part of ``preprocessing`` in results that is read."""

    image_size: Count | None = None


class ResultsFile(ProvenanceFile):
    """``SPLIT.json``, the results of ``crossx test``. Each verb checks the keys that it needs with ``require``."""

    top1: Share | None = None
    top5: Share | None = None
    class_mean: Share | None = None
    ece: Share | None = None
    ece_calibrated: Share | None = None
    n: Annotated[int, Field(ge=1, le=10**12)] | None = None
    num_classes: Count | None = None
    heads: dict[Text, Share] | None = None
    levels: dict[Text, Share] | None = None
    temperature: Temperature | None = None
    confused_pairs: list[PairFile] | None = None
    intervals: IntervalsFile | None = None
    options: dict[str, Any] | None = None
    weights: LongText | None = None
    split: Text | None = None
    run_status: Text | None = None
    seen_in_training: bool | None = None
    seen_images: Count | None = None
    preprocessing: SizeFile | None = None


class HistoryRow(StrictModel):
    """A row of ``metrics.json``: numbers by name, and the name of the phase if the method has phases."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[Text, Number]

    epoch: Number
    phase: Text | None = None


class HistoryFile(StrictModel):
    """``metrics.json``: one row per epoch."""

    epochs: list[HistoryRow]


class AblationRunFile(StrictModel):
    """A tested training in the ``results.json`` of ``crossx ablate``."""

    variant: Text
    training: dict[Text, Any]
    images: Text
    contents: Text | None = None
    correct: Annotated[str, Field(pattern=r"^[0-9a-f]*$")]
    n: Annotated[int, Field(ge=1, le=10**9)]
    top1: Share
    top5: Share
    class_mean: Share
    ece: Share
    interval: sequence(Number, 2, 2)  # type: ignore[valid-type]
    heads: dict[Text, Share]
    val_top1: list[Share | None]
    seconds: Number | None
    selection: dict[Text, Any]

    @model_validator(mode="after")
    def _check_sizes(self) -> AblationRunFile:
        if len(self.correct) != 2 * -(-self.n // 8):
            raise ValueError(f"correct has {len(self.correct)} digits for {self.n} images")
        epoch = self.selection.get("epoch")
        # a training without epochs has none to select
        known = epoch is None if not self.val_top1 else epoch in range(1, len(self.val_top1) + 1)
        if not known or isinstance(epoch, (bool, float)):
            raise ValueError(f"selection.epoch is not one of {len(self.val_top1)} epochs")
        return self


FILES: Mapping[type[BaseModel], str] = {
    AblationRunFile: "a training in the results of `crossx ablate`",
    RunFile: "provenance of a run",
    ResultsFile: "results of `crossx test`",
    HistoryFile: "a training history",
}


def check_file(kind: type[BaseModel], values: Mapping[str, Any], source: Path | str) -> None:
    """Check the contents of another JSON file of a run.

    Raises:
        CrossXError: If a value is of the wrong type or out of bounds, naming it.
    """
    check(kind, values, source, FILES[kind])


def require(values: Mapping[str, Any], keys: Iterable[str], source: Path) -> None:
    """Check that results, ``RUN/SPLIT.json``, have the required keys; ``a.b`` is a key within ``a``.

    Raises:
        CrossXError: If one is missing or null.
    """
    for key in keys:
        value: Any = values
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        if value is None:
            again = command("test", source.parent, "--split", source.stem)
            raise CrossXError(f"{source}: has no {key}: write it again with `{again}`.")
