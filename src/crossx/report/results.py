"""A tested run: the contents of its folder, and its predictions as arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import softmax

from crossx.errors import CrossXError
from crossx.evaluation.metrics import ClassRow, class_table, confusion_matrix
from crossx.evaluation.predictions import Predictions, predictions_path
from crossx.runs import ModelSpec, Run, read_history, read_json

NEEDED = (
    *("method", "backbone", "dataset", "weights", "split", "n", "num_classes", "options"),
    *("top1", "top5", "class_mean", "heads", "levels", "ece", "intervals"),
)
"""Keys of ``SPLIT.json`` that a page needs."""


@dataclass(frozen=True)
class RunResults:
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

    @classmethod
    def read(cls, run: Run, split: str) -> RunResults:
        """Read the results of a run on ``split``.

        Raises:
            CrossXError: If the run was not tested on it, or a file is damaged.
        """
        predicted = Predictions.load(predictions_path(run.path, split), run.path, split)
        spec = run.read_spec()
        if tuple(predicted.classes) != spec.classes:
            raise CrossXError(
                f"{run.path}: was tested with other classes than those of model.json: test it again with `crossx test`."
            )
        results = run.require_results(split, NEEDED)
        history, parts = run.path / "metrics.json", run.path / f"{split}_parts.json"
        return cls(
            spec=spec,
            info=run.read_info(),
            results=results,
            config=run.config.read_text(encoding="utf-8", errors="replace") if run.config.is_file() else "",
            history=read_history(history) if history.is_file() else [],
            parts=read_json(parts) if parts.is_file() else {},
            logits=predicted.logits,
            targets=predicted.targets,
            paths=predicted.paths,
        )

    @property
    def classes(self) -> tuple[str, ...]:
        """The K class names in label order."""
        return self.spec.classes

    @cached_property
    def probabilities(self) -> NDArray[np.float32]:
        """(N, K), softmax of the logits divided by the temperature that the run had when it was tested."""
        temperature = np.float32(self.results.get("temperature") or 1)
        scaled: NDArray[np.float32] = softmax(self.logits / temperature, axis=1)
        return scaled

    @cached_property
    def predictions(self) -> NDArray[np.int64]:
        """(N,), the class of the largest logit."""
        largest: NDArray[np.int64] = self.logits.argmax(axis=1)
        return largest

    @cached_property
    def confidences(self) -> NDArray[np.float32]:
        """(N,), the probability of the predicted class."""
        largest: NDArray[np.float32] = self.probabilities.max(axis=1)
        return largest

    @cached_property
    def correct(self) -> NDArray[np.bool_]:
        """(N,), whether the prediction is the target."""
        correct: NDArray[np.bool_] = self.predictions == self.targets
        return correct

    @cached_property
    def class_rows(self) -> list[ClassRow]:
        """One row per class that has images, in label order."""
        return [row for row in class_table(torch.from_numpy(self.confusion), self.classes) if row.n]

    @cached_property
    def confusion(self) -> NDArray[np.int64]:
        """(K, K), numbers of images: true classes in rows, predicted classes in columns."""
        predictions, targets = torch.from_numpy(self.predictions), torch.from_numpy(self.targets)
        counts: NDArray[np.int64] = confusion_matrix(predictions, targets, len(self.classes)).numpy()
        return counts
