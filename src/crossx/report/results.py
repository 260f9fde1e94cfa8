"""A tested run: the contents of its folder, and its predictions as arrays."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from crossx.commands import command
from crossx.errors import CrossXError
from crossx.evaluation.metrics import ClassRow, class_table
from crossx.evaluation.predictions import Answers, Predictions, predictions_path
from crossx.runs import ModelSpec, Run, read_history, read_json
from crossx.runs.files import MAX_TEXT
from crossx.text import read_bytes

T = TypeVar("T")

NEEDED = (
    *("method", "backbone", "dataset", "weights", "split", "n", "num_classes", "options"),
    *("top1", "top5", "class_mean", "heads", "levels", "ece", "intervals"),
)
"""Keys of ``SPLIT.json`` that a page needs."""


def read_records(run: Run, split: str) -> dict[str, Any]:
    """Return ``spec``, ``info``, ``config``, ``history`` and ``parts`` of ``RunResults``, which no test writes.

    Raises:
        CrossXError: If a file is damaged, with what to do about it.
    """
    history, parts = run.path / "metrics.json", run.path / f"{split}_parts.json"
    again = command("test", run.path, "--parts", "--split", split)
    return {
        "spec": run.read_spec(),
        "info": run.read_info(),
        "config": read_bytes(run.config, MAX_TEXT).decode("utf-8", "replace") if run.config.is_file() else "",
        "history": _read_or_advise(
            history, read_history, "Move it away for a page without the curves of the training."
        )
        or [],
        "parts": _read_or_advise(parts, read_json, f"`{again}` writes it again.") or {},
    }


def _read_or_advise(path: Path, read: Callable[[Path], T], remedy: str) -> T | None:
    if not path.is_file():
        return None
    try:
        return read(path)
    except CrossXError as error:
        raise CrossXError(f"{error} {remedy}") from error


@dataclass(frozen=True)
class RunResults(Answers):
    """A tested run.

    Attributes:
        spec: ``model.json``.
        info: ``run.json``, empty if there is none.
        results: ``SPLIT.json``, as ``crossx test`` writes it.
        config: ``config.yaml`` as text, empty if there is none.
        history: One row of numbers per epoch (``metrics.json``), empty for an imported checkpoint.
        parts: Part measures (``SPLIT_parts.json``), empty if there are none.
        logits: float32 (N, K).
        targets: int64 (N,).
        paths: (N,) strings, the images' paths below the root of the data.
        contents: uint64 (N,), see ``Predictions``; None where they are not known.
    """

    spec: ModelSpec
    info: Mapping[str, Any]
    results: Mapping[str, Any]
    config: str
    history: Sequence[Mapping[str, float]]
    parts: Mapping[str, Any]
    logits: NDArray[np.float32]
    targets: NDArray[np.int64]
    paths: NDArray[np.str_]
    contents: NDArray[np.uint64] | None = None

    @classmethod
    def read(cls, run: Run, split: str) -> RunResults:
        """Read the results of a run on ``split``.

        Raises:
            CrossXError: If the run was not tested on it, or a file is damaged.
        """
        predicted = Predictions.load(predictions_path(run.path, split), run.path, split)
        spec = run.read_spec()
        if tuple(predicted.classes) != spec.classes:
            again = command("test", run.path, "--split", split)
            raise CrossXError(
                f"{run.path}: was tested with other classes than those of model.json: test it again with `{again}`."
            )
        return cls(
            results=run.require_results(split, NEEDED),
            **read_records(run, split),
            logits=predicted.logits,
            targets=predicted.targets,
            paths=predicted.paths,
            contents=predicted.contents,
        )

    @property
    def classes(self) -> tuple[str, ...]:
        """The K class names in label order."""
        return self.spec.classes

    @property
    def names(self) -> tuple[str, ...]:
        """The K classes as people read them, in label order."""
        return self.spec.display_names

    @property
    def temperature(self) -> float:
        """The temperature that the run had when it was tested."""
        return float(self.results.get("temperature") or 1)

    @cached_property
    def class_rows(self) -> list[ClassRow]:
        """One row per class that has images, in label order, with names as people read them."""
        return [row for row in class_table(self.confusion, self.names) if row.n]
