"""Predictions of a trained run on the images of an audit."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from crossx.data.index import DatasetIndex, relative_path
from crossx.errors import CrossXError
from crossx.evaluation.classes import check_classes
from crossx.evaluation.data import training_records
from crossx.predict.predictor import Predictor
from crossx.runs import open_run


@dataclass(frozen=True)
class RunPredictor:
    """A run that predicts the images of a dataset with its classes.

    Attributes:
        predictor: Its network.
        seen: Paths of the images that it was trained on, absolute and relative to their folder; None if that is
            unknown.
        index: The audited dataset.
        base: The folder of its images.
    """

    predictor: Predictor
    seen: frozenset[str] | None
    index: DatasetIndex
    base: Path

    @classmethod
    def load(cls, path: str | Path, index: DatasetIndex, base: Path, device: str) -> RunPredictor:
        """Load a run.

        Raises:
            CrossXError: If it cannot be loaded, or the dataset has other classes.
        """
        open_run(path)
        predictor = Predictor.load(path, device, precision="fp32")
        check_classes(predictor.spec.classes, index.classes, index.name)
        return cls(predictor, _training_images(path), index, base)

    def trained_on(self, files: Sequence[Path]) -> NDArray[np.bool_]:
        """Return which images (N,) the run was trained on; if that is unknown, those that are not for testing.

        An image of the same name in another folder counts, too: the dataset may have been copied or moved.
        """
        if self.seen is None:
            tested = {record.path for record in self.index.split("test")}
            return np.array([file not in tested for file in files], dtype=bool)
        names = ((os.path.realpath(file), relative_path(file, self.base)) for file in files)
        return np.array([not self.seen.isdisjoint(pair) for pair in names], dtype=bool)

    def predict(
        self, files: Sequence[Path], batch_size: int, progress: Callable[[int, int], None]
    ) -> NDArray[np.float64]:
        """Return calibrated probabilities (N, K) in the order of the dataset's classes.

        Raises:
            CrossXError: If an image cannot be read.
        """
        classes = self.predictor.classes
        # the same names, perhaps in another form
        rows = torch.zeros(len(files), len(classes), dtype=torch.float64)
        number = {name: label for label, name in enumerate(classes)}
        predictions = self.predictor.iter_images(files, len(classes), batch_size)
        for done, prediction in enumerate(predictions, start=1):
            if prediction.error is not None:
                raise CrossXError(f"{prediction.path}: {prediction.error}")
            for name, probability in prediction.top:
                rows[done - 1, number[name]] = probability
            progress(done, len(files))
        probabilities: NDArray[np.float64] = rows.numpy()
        return probabilities


def _training_images(path: str | Path) -> frozenset[str] | None:
    run, _ = open_run(path)
    try:
        records, base = training_records(run, run.read_spec())
    except CrossXError:
        return None
    trained = [record.path for record in records]
    return frozenset(map(os.path.realpath, trained)) | {relative_path(file, base) for file in trained}
