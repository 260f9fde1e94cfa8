"""Parameters and groups of options that several verbs share."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from crossx.cli.values import Coverage, Folder, Help, Name, Natural, Positive
from crossx.commands import command
from crossx.hub import HubModel
from crossx.runs import EXPORTED, Run, open_run, storage_error

RunPath = Annotated[str, "RUN", Help("Run folder or a checkpoint file in one.")]
ModelPath = Annotated[
    str, "RUN", Help("Run folder, a checkpoint file in one, or USER/NAME on the Hugging Face Hub.")
]
PredictorPath = Annotated[
    str,
    "RUN",
    Help(
        "Run folder, a checkpoint file in one, a file of `crossx export`, or USER/NAME on the Hugging Face Hub."
    ),
]
Split = Annotated[str, "NAME", Help("Images of this split: train, val or test.")]
Device = Annotated[str, "NAME", Help("auto (the GPU where there is one), cpu, cuda or cuda:N.")]
BatchSize = Annotated[Positive, "--data.batch_size", Help("Images per step.")]


@dataclass(frozen=True)
class TestedData:
    """Images to evaluate on.

    Attributes:
        root: The dataset (default: as in training).
        dataset: Name of the dataset (default: as in training).
        batch_size: Images per step (default: as in training).
        num_workers: Processes that load images (default: one per CPU core, at most 8).
        image_column: huggingface only: the column of the images (default: as in training).
        label_column: huggingface and webdataset only: the column, or the field of a .json, with the label (default: as
            in training).
    """

    root: Folder | None = None
    dataset: Name | None = None
    batch_size: Positive | None = None
    num_workers: Natural | None = None
    image_column: Name | None = None
    label_column: Name | None = None

    @property
    def is_of_training(self) -> bool:
        """Whether the images are those that the training names."""
        return not (self.root or self.dataset or self.image_column or self.label_column)


@dataclass(frozen=True)
class Inference:
    """How the network runs.

    Attributes:
        precision: fp32, fp16, bf16 or auto (fp16 on a GPU where it is fast, else fp32).
        flip: Average over each image and its mirror image.
        crops: Average over this many crops: 1, the centre, or 5, corners and centre.
        accept: known, to give no class to images of none of the classes, by the run's threshold; or all.
        coverage: Also give the classes that together have the image's class with this probability, such as 0.9.
        trust: Load a .pt2 file, which can run any code on this machine when it is loaded: only for files that you made
            yourself. The other formats need no trust.
    """

    device: Device = "auto"
    precision: Name = "auto"
    flip: bool = False
    crops: Literal[1, 5] = 1
    accept: Literal["known", "all"] = "known"
    coverage: Coverage | None = None
    trust: bool = False


def check_run(path: str) -> None:
    """Check that there is a run, before torch is imported; models on the Hub and exported files are left to others.

    Raises:
        CrossXError: If it is none, see ``open_run``, or its ``model.json`` is damaged.
    """
    exported = Path(path).suffix.lower() in (*EXPORTED, ".safetensors")
    if not exported and (Path(path).exists() or HubModel.parse(path) is None):
        open_run(path)[0].read_spec()


def check_folder(path: str | Path) -> None:
    """Check that a folder can be made or written to, before torch is imported; nothing is made.

    Raises:
        CrossXError: If a file is in the way, or there is no permission.
    """
    existing = next(part for part in (Path(path), *Path(path).parents, Path()) if os.path.lexists(part))
    if not existing.is_dir():
        raise storage_error(Path(path), NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR)))
    if not os.access(existing, os.W_OK | os.X_OK):
        raise storage_error(Path(path), PermissionError(errno.EACCES, os.strerror(errno.EACCES)))


def next_command(run: Run) -> str:
    """Return the command after a training: the test, or predictions if the dataset has no test images."""
    images = run.read_info().get("images") or {}
    return command("predict", run.path, "IMAGES") if images.get("test") == 0 else command("test", run.path)
