"""A run and the images of one split to measure it on."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import torch
from numpy.typing import NDArray

from crossx.data.datamodule import DataModule
from crossx.data.images import printable
from crossx.data.index import SPLITS
from crossx.errors import CrossXError, unknown
from crossx.evaluation.data import DataOptions, read_data
from crossx.evaluation.device import select_device
from crossx.evaluation.network import TorchNetwork
from crossx.evaluation.training_images import count_trained, is_most
from crossx.methods.base import Method
from crossx.methods.weights import load_method
from crossx.runs import ModelSpec, Run, check_output_file, check_writable, environment, open_run


class SubjectOptions(DataOptions, total=False):
    """Options of ``Subject.open``.

    Attributes:
        split: ``test`` (the default), ``val`` (held out in training) or ``train``.
        output: Folder for the results; by default the run folder.
        device: See ``select_device``; by default ``auto``.
    """

    split: str
    output: str | Path | None
    device: str


@dataclass(frozen=True)
class Subject:
    """A run and the images of one split to measure it on.

    Attributes:
        run: The run folder.
        weights: The weights to measure.
        method: The network with these weights, in evaluation mode on the CPU.
        spec: Its description.
        data: Loads the dataset as the network's input.
        split: The split to measure on.
        device: The device to compute on.
        output: The folder for the results.
    """

    run: Run
    weights: Path
    method: Method
    spec: ModelSpec
    data: DataModule
    split: str
    device: torch.device
    output: Path

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        split: str = "test",
        output: str | Path | None = None,
        device: str = "auto",
        **options: Unpack[DataOptions],
    ) -> Subject:
        """Open a run and the images to measure it on, without reading the images yet.

        Args:
            path: A run folder (its selected weights) or a checkpoint file in one.
            split: See ``SubjectOptions``, as for the other options.
            output: Folder for the results.
            device: See ``select_device``.
            **options: See ``DataOptions``.

        Raises:
            UsageError: If the split, dataset or device is unknown.
            CrossXError: If the run, its data or the output folder cannot be used, or the dataset has other classes.
        """
        if split not in SPLITS:
            raise unknown("split", split, SPLITS)
        run, weights = open_run(path)
        folder = run.results_folder(output)
        check_writable(folder, folder / run.info.name)
        chosen = select_device(device)
        method, spec = load_method(path)
        info = run.read_info()
        if str(info.get("class_names", "")).startswith("numbered"):
            raise CrossXError(
                f"{run.path}: its classes are only numbered. Import the checkpoint again with --data.root, which gives "
                "them their names and order."
            )
        data = open_data(run, spec, **options)
        return cls(run, weights, method, spec, data, split, chosen, folder)

    @property
    def network(self) -> TorchNetwork:
        """The network on ``device``; it takes the loaders' bytes."""
        return TorchNetwork(self.method, self.data.normalize, self.device)

    def check_outputs(self, *names: str) -> None:
        """Check that files in the output folder can be written, before the work.

        Raises:
            CrossXError: If one cannot.
        """
        for path in [self.output / name for name in names]:
            if path.is_dir():
                raise CrossXError(f"{path}: a folder where a file is to be written. Move it away.")
            check_output_file(path)

    def count_trained(self, found: NDArray[np.uint64] | None = None) -> int:
        """Return how many of these images the network was trained on, see ``training_images.count_trained``."""
        return count_trained(self.run, self.spec, self.data.config, self.data.index, self.split, found)

    def provenance(self, found: NDArray[np.uint64] | None = None) -> dict[str, Any]:
        """Return the origin of the results, for JSON; call it after the images have been checked.

        Args:
            found: Fingerprints of the images, if they are known already.
        """
        seen = self.count_trained(found)
        run, spec, config, info = self.run, self.spec, self.data.config, self.run.read_info()
        selected = self.weights in (run.weights, run.best)
        return {
            "method": spec.method,
            "options": dict(spec.options),
            "backbone": info.get("backbone") or spec.backbone,
            "pretrained": info.get("pretrained"),
            "backbone_weights": info.get("backbone_weights"),
            "weights": os.path.relpath(self.weights, run.path),
            "selection": info.get("selection") if selected else {"how": "checkpoint given"},
            "dataset": config.dataset,
            "data_root": config.root,
            "split": self.split,
            "run_status": info.get("status"),
            "num_classes": len(spec.classes),
            "preprocessing": asdict(spec.preprocessing),
            "seed": info.get("seed"),
            "seen_in_training": is_most(seen, len(self.data.index.split(self.split))),
            "seen_images": seen,
            "calibration": info.get("calibration"),
            "skipped": [f"{printable(image)}: {reason}" for image, reason in self.data.skipped],
            "environment": environment(),
        }


def open_data(run: Run, spec: ModelSpec, **options: Unpack[DataOptions]) -> DataModule:
    """Read the dataset of a run, or another one with the same classes.

    Args:
        run: The run.
        spec: Its description.
        **options: See ``DataOptions``.

    Raises:
        UsageError: If there is no such dataset.
        CrossXError: If it cannot be read or has other classes.
    """
    config, index = read_data(run, spec, **options)
    return DataModule(index, spec.preprocessing, config, seed=run.read_info().get("seed") or 0)
