"""Set the thresholds of a quantised file again, on the images that the run was calibrated on.

The thresholds of rejection and of prediction sets are order statistics of scores and probabilities. int8 shifts both,
so that thresholds of the float32 network keep another share of the images. The temperature stays: it is in the graph.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from crossx.data.datamodule import DataModule
from crossx.errors import CrossXError, counted
from crossx.evaluation.calibration import evaluate_views, set_thresholds
from crossx.evaluation.network import Network
from crossx.evaluation.open_set import KEY
from crossx.evaluation.subject import open_data
from crossx.evaluation.training_images import count_trained, is_most
from crossx.evaluation.unknowns import FEATURE_SCORES, SCORE, images_to_keep
from crossx.runs import ModelSpec, Run


@dataclass(frozen=True)
class Recalibration:
    """Thresholds that were set again for a quantised file.

    Attributes:
        dataset: Name of the dataset of the images.
        split: Their split.
        images: Number of images.
        before: Views -> threshold of rejection in float32, see ``Rejection``; None if no image is rejected.
        spec: ``model.json`` with the thresholds of the file.
    """

    dataset: str
    split: str
    images: int
    before: Mapping[str, float] | None
    spec: ModelSpec

    @property
    def thresholds(self) -> tuple[float, float] | None:
        """The threshold of single views before and after; None if no image is rejected."""
        if self.before is None or self.spec.rejection is None:
            return None
        before, after = (found.get(KEY) for found in (self.before, self.spec.rejection.thresholds))
        return None if before is None or after is None else (before, after)

    def to_json(self) -> dict[str, Any]:
        """Return what changes in the description of the file: the thresholds, and how they were set."""
        values = self.spec.to_json()
        found: dict[str, Any] = {"dataset": self.dataset, "split": self.split, "images": self.images}
        if self.before is not None:
            found["float32_thresholds"] = dict(self.before)
        return {key: values[key] for key in ("rejection", "sets") if key in values} | {"recalibrated": found}


def recalibrate(network: Network, run: Run, spec: ModelSpec, read: Callable[[], DataModule]) -> Recalibration:
    """Set the thresholds of a calibrated run for another network, such as a quantised one.

    Args:
        network: The network; its probabilities must have the temperature of the run.
        run: The run.
        spec: Its description, with thresholds.
        read: Reads the run's dataset.

    Raises:
        CrossXError: If the images that the run was calibrated on cannot be read or were trained on, or there are too
            few of them.
    """
    data, split = _calibration_data(run, spec, read)
    rejection = spec.rejection
    if rejection is not None and rejection.score in FEATURE_SCORES and not network.has_similarities:
        # without class means, as in a checkpoint, no image is rejected
        rejection = None
    # without processes, which must not be forked next to the threads of a runtime
    outputs = evaluate_views(network, data, split, workers=0, progress="Setting the thresholds again")
    found, sets = set_thresholds(
        outputs,
        spec.temperature,
        score=rejection.score if rejection else SCORE,
        keep=rejection.keep if rejection else 1,
        weight=spec.score_weight,
    )
    if rejection is not None and found is None:
        raise CrossXError(
            f"{counted(sets.images, f'{split} image')} of {data.index.name} are too few: to keep {rejection.keep:g} "
            f"needs {images_to_keep(rejection.keep)}."
        )
    return Recalibration(
        dataset=data.index.name,
        split=split,
        images=sets.images,
        before=None if rejection is None else rejection.thresholds,
        spec=replace(spec, rejection=found or spec.rejection, sets=sets if spec.sets else None),
    )


def _calibration_data(run: Run, spec: ModelSpec, read: Callable[[], DataModule]) -> tuple[DataModule, str]:
    """Return the data and the split that a run was calibrated on, with images that can be read.

    Raises:
        CrossXError: If they cannot be read, or the network was trained on them.
    """
    info = run.read_info()
    found = info.get("calibration") or {}
    split, root, dataset = found.get("split") or "val", found.get("data_root"), found.get("dataset")
    own_root = root is None or os.path.abspath(root) == os.path.abspath(info.get("data_root") or "")
    if own_root and dataset in (None, spec.dataset):
        data = read()
    else:
        data = open_data(run, spec, root=root, dataset=dataset)
        data.check_images([split])
    if is_most(count_trained(run, spec, data.config, data.index, split), len(data.index.split(split))):
        raise CrossXError(f"the network was trained on the {split} images of {data.index.name}.")
    return data, split
