"""Predictions for every tested image, stored in one file."""

from __future__ import annotations

import os
import zipfile
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crossx.class_names import naming_problem
from crossx.commands import command
from crossx.data.index import DatasetIndex, relative_path
from crossx.errors import CrossXError
from crossx.runs import atomic_path, check_files


def predictions_path(output: Path, split: str) -> Path:
    """Return the file of the predictions on ``split`` in the output folder of ``test_run``."""
    return output / split / "predictions.npz"


class Answers:
    """What follows from a classifier's logits (N, K) and the targets (N,)."""

    logits: NDArray[np.float32]
    targets: NDArray[np.int64]

    @property
    def temperature(self) -> float:
        """What the logits are divided by for probabilities."""
        return 1.0

    @cached_property
    def probabilities(self) -> NDArray[np.float32]:
        """(N, K), softmax of the logits divided by the temperature."""
        scaled = self.logits / np.float32(self.temperature)
        powers = np.exp(scaled - scaled.max(axis=1, keepdims=True))
        shares: NDArray[np.float32] = powers / powers.sum(axis=1, keepdims=True)
        return shares

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
    def confusion(self) -> NDArray[np.int64]:
        """(K, K), numbers of images: true classes in rows, predicted classes in columns."""
        classes = self.logits.shape[1]
        cells = np.bincount(self.targets * classes + self.predictions, minlength=classes**2)
        return cells.reshape(classes, classes)


@dataclass(frozen=True)
class Predictions(Answers):
    """Logits with their images and targets.

    Attributes:
        logits: float32 (N, K).
        targets: int64 (N,).
        paths: (N,) strings, the images' paths below the root of the data.
        classes: (K,) strings, the class names in label order.
        contents: uint64 (N,), ``fingerprints`` of the images; None where their paths identify them, as in a published
            dataset, and in files of earlier versions.
    """

    logits: NDArray[np.float32]
    targets: NDArray[np.int64]
    paths: NDArray[np.str_]
    classes: NDArray[np.str_]
    contents: NDArray[np.uint64] | None = None

    @property
    def labels(self) -> NDArray[np.str_]:
        """(N,) strings, the class name of each target."""
        return self.classes[self.targets]

    def check(self) -> None:
        """Check types, shapes and ranges; raise ``ValueError`` with the first problem."""
        images, classes = len(self.targets), len(self.classes)
        for name, array, kind, shape in (
            ("logits", self.logits, "f", (images, classes)),
            ("targets", self.targets, "i", (images,)),
            ("paths", self.paths, "U", (images,)),
            ("classes", self.classes, "U", (classes,)),
            ("contents", self.contents, "u", (images,)),
        ):
            if array is None:
                continue
            if array.dtype.kind != kind or array.shape != shape:
                raise ValueError(f"{name} are {array.dtype} {array.shape}")
        if images == 0 or not np.isfinite(self.logits).all():
            raise ValueError("logits are not finite numbers")
        if self.targets.min() < 0 or self.targets.max() >= classes:
            raise ValueError("targets are not numbers of classes")
        if (problem := naming_problem(self.classes.tolist())) is not None:
            raise ValueError(f"classes: {problem}")

    def save(self, path: Path) -> None:
        """Write an ``.npz`` file atomically.

        Raises:
            CrossXError: If it cannot be written.
        """
        with atomic_path(path) as temporary, temporary.open("wb") as file:
            arrays: dict[str, Any] = {item.name: getattr(self, item.name) for item in fields(self)}
            np.savez_compressed(file, **{name: array for name, array in arrays.items() if array is not None})

    @classmethod
    def load(cls, path: Path, run: Path, split: str) -> Predictions:
        """Read what ``save`` wrote.

        Args:
            path: The file.
            run: Its run, for errors.
            split: Its split, for errors.

        Raises:
            CrossXError: If the file is missing or damaged.
        """
        again = f"`{command('test', run, '--split', split)}`"
        check_files(path)
        if not path.is_file():
            raise CrossXError(f"{run}: not tested on {split} yet: run {again} first.")
        try:
            # of another file, numpy says how to load it unsafely
            if not zipfile.is_zipfile(path):
                raise ValueError("not an .npz file")
            with np.load(path, allow_pickle=False) as arrays:
                needed = {name: arrays[name] for name in ("logits", "targets", "paths", "classes")}
                predictions = cls(**needed, contents=arrays.get("contents"))
                predictions.check()
                return predictions
        except Exception as error:  # zipfile, zlib and numpy each raise their own
            raise CrossXError(f"{path}: damaged ({error}): write it again with {again}.") from error


def relative_paths(index: DatasetIndex, split: str, root: str | None) -> list[str]:
    """Return paths that identify images wherever the data is: relative to its root."""
    records = index.split(split)
    base = Path(root if root is not None else os.path.commonpath([r.path.parent for r in index.records]))
    base = base.parent if base.is_file() else base
    return [relative_path(record.path, base) for record in records]
