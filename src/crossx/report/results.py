"""A tested run: what its folder holds, and the network's answers as arrays."""

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
from crossx.runs import ModelSpec, Run, read_history, read_json, read_results

NEEDED = (
    "method",
    "backbone",
    "dataset",
    "weights",
    "split",
    "n",
    "num_classes",
    "top1",
    "top5",
    "class_mean",
    "heads",
    "levels",
    "ece",
    "intervals",
    "options",
)
"""What a page cannot do without."""


@dataclass(frozen=True)
class RunResults:
    """What is known about a tested run.

    Attributes:
        spec: ``model.json``.
        info: ``run.json``, empty where there is none.
        results: ``SPLIT.json``, as ``crossx test`` writes it.
        config: ``config.yaml`` as text, empty where there is none.
        history: A row of numbers for each epoch (``metrics.json``), none for an imported checkpoint.
        parts: Measures of parts (``SPLIT_parts.json``), empty where there are none.
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
        """Read what the run folder holds about ``split``.

        Raises:
            CrossXError: If the run was not tested on it, or a file is damaged.
        """
        answers = Predictions.load(predictions_path(run.path, split), run.path, split)
        spec = run.read_spec()
        if tuple(answers.classes) != spec.classes:
            raise CrossXError(
                f"{run.path}: was tested with other classes than model.json names: test it again with `crossx test`."
            )
        history, parts = run.path / "metrics.json", run.path / f"{split}_parts.json"
        return cls(
            spec=spec,
            info=run.read_info(),
            results=read_results(run.path / f"{split}.json", NEEDED),
            config=run.config.read_text(encoding="utf-8", errors="replace") if run.config.is_file() else "",
            history=read_history(history) if history.is_file() else [],
            parts=read_json(parts) if parts.is_file() else {},
            logits=answers.logits,
            targets=answers.targets,
            paths=answers.paths,
        )

    @property
    def classes(self) -> tuple[str, ...]:
        """The K class names in label order."""
        return self.spec.classes

    @cached_property
    def probabilities(self) -> NDArray[np.float32]:
        """(N, K), softmax of the logits over the temperature that the run had when it was tested."""
        temperature = np.float32(self.results.get("temperature") or 1)
        answer: NDArray[np.float32] = softmax(self.logits / temperature, axis=1)
        return answer

    @cached_property
    def predictions(self) -> NDArray[np.int64]:
        """(N,), the class of the largest logit."""
        answer: NDArray[np.int64] = self.logits.argmax(axis=1)
        return answer

    @cached_property
    def confidences(self) -> NDArray[np.float32]:
        """(N,), the probability of the predicted class."""
        answer: NDArray[np.float32] = self.probabilities.max(axis=1)
        return answer

    @cached_property
    def correct(self) -> NDArray[np.bool_]:
        """(N,), whether the prediction is the target."""
        answer: NDArray[np.bool_] = self.predictions == self.targets
        return answer

    @cached_property
    def class_rows(self) -> list[ClassRow]:
        """A row for each class that has images, in label order."""
        return [row for row in class_table(torch.from_numpy(self.confusion), self.classes) if row.n]

    @cached_property
    def confusion(self) -> NDArray[np.int64]:
        """(K, K), numbers of images: a row for each true class, a column for each predicted one."""
        counts = confusion_matrix(
            torch.from_numpy(self.predictions), torch.from_numpy(self.targets), len(self.classes)
        )
        matrix: NDArray[np.int64] = counts.numpy()
        return matrix
