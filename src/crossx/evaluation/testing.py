# ruff: noqa: PT028  test_run tests a run, it is no test of pytest
"""Testing a trained run: the network's answers on one split, every metric of them, and the files beside."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from crossx.data.catalog import read_configured
from crossx.data.config import DataConfig
from crossx.data.datamodule import DataModule
from crossx.data.index import SPLITS, DatasetIndex
from crossx.errors import CrossXError, first_line, unknown
from crossx.evaluation.classes import check_classes
from crossx.evaluation.device import select_device
from crossx.evaluation.metrics import confusion_matrix
from crossx.evaluation.plots import plot_confusion
from crossx.evaluation.predictions import Predictions, predictions_path
from crossx.evaluation.summary import summarize
from crossx.evaluation.tables import write_class_table, write_confused_pairs, write_confusion
from crossx.methods.base import Method
from crossx.methods.checkpoint import load_method
from crossx.runs import ModelSpec, Run, check_writable, environment, open_run, write_json


@dataclass(frozen=True)
class Outputs:
    """What a network answered, on the CPU in the order of the loader.

    Attributes:
        logits: float32 (N, K), the prediction.
        heads: Head name -> float32 (N, K).
        targets: int64 (N,).
    """

    logits: Tensor
    heads: Mapping[str, Tensor]
    targets: Tensor


@dataclass(frozen=True)
class Subject:
    """A run, and the images of one split to measure it on.

    Attributes:
        run: The run folder.
        weights: The weights in it that are measured.
        method: The network with them, in evaluation mode on the CPU.
        spec: Its description.
        data: Loads the dataset as the network takes it.
        split: What is measured on.
        device: Where to compute.
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

    @property
    def seen_in_training(self) -> bool:
        """Whether the network was trained on these images."""
        # the released checkpoints were trained on all that is not test
        on_all = self.data.config.train_on == "trainval" or self.run.read_info().get("status") == "imported"
        seen = self.split == "train" or (self.split == "val" and on_all)
        return seen and self.data.config.dataset == self.spec.dataset

    def describe(self) -> dict[str, Any]:
        """Return what the results belong to, for JSON; call it when the images have been checked."""
        info = self.run.read_info()
        return {
            **_provenance(self.run, self.weights, self.spec, info, self.data.config, self.split),
            "seen_in_training": self.seen_in_training,
            "calibration": info.get("calibration"),
            "skipped": [f"{image}: {reason}" for image, reason in self.data.skipped],
            "environment": environment(),
        }


@torch.inference_mode()
def evaluate(
    method: Method,
    loader: Iterable[tuple[Tensor, Tensor]],
    device: str | torch.device = "auto",
    *,
    normalize: Callable[[Tensor], Tensor] | None = None,
    channels_last: bool = True,
    progress: str = "",
) -> Outputs:
    """Run a network over a loader, each image once through.

    The method is left on ``device``, in evaluation mode.

    Args:
        method: The network.
        loader: Batches of images (B, 3, H, W) and targets (B,); at least one.
        device: See ``select_device``.
        normalize: What is done with the images on the device, ``DataModule.normalize`` for its loaders' bytes; None
            where they are normalised.
        channels_last: Whether images and weights lie in memory channel by channel last, which convolutions are
            faster on; the logits are the same up to rounding.
        progress: What a progress bar on a terminal is called; empty for none.

    Raises:
        CrossXError: If the logits are not finite or the GPU's memory is too small.
    """
    device = select_device(device)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    method.to(device=device, memory_format=memory_format).eval()  # type: ignore[call-overload]
    heads: dict[str, list[Tensor]] = {}
    targets = []
    console = Console(stderr=True)
    for images, labels in track(
        loader, progress, console=console, transient=True, disable=not (progress and console.is_terminal)
    ):
        try:
            inputs = images.to(device, non_blocking=True)
            if normalize is not None:
                inputs = normalize(inputs)
            answers = method.head_logits(inputs.to(memory_format=memory_format))
        except torch.OutOfMemoryError as error:
            raise CrossXError(
                f"out of GPU memory at {len(images)} images a step: lower --data.batch_size, or use --device cpu."
            ) from error
        for name, logits in answers.items():
            heads.setdefault(name, []).append(logits.float().cpu())
        targets.append(labels)
    joined = {name: torch.cat(parts) for name, parts in heads.items()}
    logits = method.combine_heads(joined)
    broken = int((~logits.isfinite().all(dim=1)).sum())
    if broken:
        raise CrossXError(
            f"the network's output is not finite on {broken} of {len(logits)} images: its weights are damaged, or "
            "training diverged."
        )
    return Outputs(logits, joined, torch.cat(targets))


def test_run(
    path: str | Path,
    *,
    root: str | Path | None = None,
    dataset: str | None = None,
    split: str = "test",
    batch_size: int | None = None,
    num_workers: int | None = None,
    device: str = "auto",
    output: str | Path | None = None,
) -> dict[str, Any]:
    """Test a run on one split of a dataset and write the results.

    ``OUTPUT/SPLIT.json`` holds what is returned; the folder ``OUTPUT/SPLIT/`` holds ``per_class.csv``,
    ``confusion.csv``, ``confusion.png``, ``confused_pairs.csv`` and ``predictions.npz`` (see ``Predictions``),
    which ``compare_runs`` reads.

    Args:
        path: A run folder (its selected weights) or a checkpoint file in one.
        root: The data; by default where the run was trained.
        dataset: The dataset's name; by default the one that the run was trained on.
        split: ``test``, ``val`` (the images held out in training) or ``train``.
        batch_size: Images a step; by default as in training.
        num_workers: Processes that load images; by default as in training.
        device: See ``select_device``.
        output: Folder for the results; by default the run folder.

    Returns:
        The metrics of ``summarize``, the most confused pairs, and what they belong to: method, backbone, weights,
        dataset, split, seed of the training and how the checkpoint was selected.

    Raises:
        UsageError: If the split, dataset or device is unknown.
        CrossXError: If the run, its data or the output folder cannot be used, or the dataset's classes are not
            the run's.
    """
    subject = prepare_test(
        path,
        root=root,
        dataset=dataset,
        split=split,
        batch_size=batch_size,
        num_workers=num_workers,
        device=device,
        output=output,
    )
    data, spec = subject.data, subject.spec
    data.check_images([split])
    outputs = evaluate(
        subject.method, data.eval_loader(split), subject.device, normalize=data.normalize, progress="Testing"
    )
    results = {
        **summarize(
            outputs.logits,
            outputs.heads,
            outputs.targets,
            spec.classes,
            data.index.levels,
            temperature=spec.temperature,
        ),
        **subject.describe(),
    }
    paths = relative_paths(data.index, split, data.config.root)
    _write_files(subject.output, split, outputs, spec, results, paths)
    return results


# pytest would take it for a test wherever it is imported.
test_run.__test__ = False  # type: ignore[attr-defined]


def prepare_test(
    path: str | Path,
    *,
    root: str | Path | None,
    dataset: str | None,
    split: str,
    batch_size: int | None,
    num_workers: int | None,
    device: str,
    output: str | Path | None,
) -> Subject:
    """Open a run and the images to measure it on; arguments and errors are those of ``test_run``.

    The images themselves are not looked at yet.
    """
    if split not in SPLITS:
        raise unknown("split", split, SPLITS)
    run, weights = open_run(path)
    folder = run.results_folder(output)
    check_writable(folder)
    target_device = select_device(device)
    method, spec = load_method(path)
    info = run.read_info()
    if str(info.get("class_names", "")).startswith("numbered"):
        raise CrossXError(
            f"{run.path}: its classes are only numbered. Import the checkpoint again with --data.root, which gives "
            "them their names and order."
        )
    data = open_data(info, spec, root, dataset, batch_size, num_workers)
    return Subject(run, weights, method, spec, data, split, target_device, folder)


def open_data(
    info: Mapping[str, Any],
    spec: ModelSpec,
    root: str | Path | None,
    dataset: str | None,
    batch_size: int | None = None,
    num_workers: int | None = None,
) -> DataModule:
    """Read the dataset of a run, or another with the same classes; arguments are those of ``test_run``.

    Args:
        info: The run's ``run.json``.
        spec: Its description.

    Raises:
        UsageError: If there is no such dataset.
        CrossXError: If it cannot be read, or its classes are not the run's.
    """
    config = data_config(info, spec, root, dataset, batch_size, num_workers)
    index = read_configured(config)
    check_classes(spec.classes, index.classes, index.name)
    return DataModule(index, spec.preprocessing, config, seed=info.get("seed") or 0)


def data_config(
    info: Mapping[str, Any],
    spec: ModelSpec,
    root: str | Path | None,
    dataset: str | None,
    batch_size: int | None,
    num_workers: int | None,
) -> DataConfig:
    """Return the data options of the training with what was asked for in their place."""
    known = {item.name for item in fields(DataConfig)}
    trained = {key: value for key, value in (info.get("data") or {}).items() if key in known}
    # The folder as it was then named from the working folder may not be there from today's.
    trained["root"] = info.get("data_root") or trained.get("root")
    # each image is read once: a cache would never be read from
    try:
        config = DataConfig(**{"dataset": spec.dataset, **trained, "cache": "none"})
    except TypeError as error:
        raise CrossXError(f"run.json: data: an option is of the wrong type ({first_line(error)}).") from error
    if dataset is not None and dataset != config.dataset:
        # Root and the options of a reader belong to the dataset of the training.
        config = replace(
            config, dataset=dataset, root=None, level=None, num_classes=None, images_per_class=None
        )
    if root is not None:
        config = replace(config, root=str(root))
    if batch_size is not None:
        config = replace(config, eval_batch_size=batch_size)
    if num_workers is not None:
        config = replace(config, num_workers=num_workers)
    return config


def _provenance(
    run: Run, weights: Path, spec: ModelSpec, info: Mapping[str, Any], config: DataConfig, split: str
) -> dict[str, Any]:
    selected = weights in (run.weights, run.best)
    return {
        "method": spec.method,
        "options": dict(spec.options),
        "backbone": info.get("backbone") or spec.backbone,
        "pretrained": info.get("pretrained"),
        "backbone_weights": info.get("backbone_weights"),
        "weights": os.path.relpath(weights, run.path),
        "selection": info.get("selection") if selected else {"how": "checkpoint given"},
        "dataset": config.dataset,
        "data_root": config.root,
        "split": split,
        "run_status": info.get("status"),
        "num_classes": len(spec.classes),
        "preprocessing": asdict(spec.preprocessing),
        "seed": info.get("seed"),
    }


def relative_paths(index: DatasetIndex, split: str, root: str | None) -> list[str]:
    """Return the paths by which images are recognised wherever the data lies."""
    records = index.split(split)
    base = (
        Path(root) if root is not None else Path(os.path.commonpath([r.path.parent for r in index.records]))
    )
    base = base.parent if base.is_file() else base
    return [
        (record.path.relative_to(base) if record.path.is_relative_to(base) else record.path).as_posix()
        for record in records
    ]


def _write_files(
    folder: Path,
    split: str,
    outputs: Outputs,
    spec: ModelSpec,
    results: Mapping[str, Any],
    paths: Sequence[str],
) -> None:
    confusion = confusion_matrix(outputs.logits.argmax(dim=1), outputs.targets, len(spec.classes))
    tables = folder / split
    write_class_table(confusion, spec.classes, tables / "per_class.csv")
    write_confused_pairs(confusion, spec.classes, tables / "confused_pairs.csv")
    write_confusion(confusion, spec.classes, tables / "confusion.csv")
    title = f"{spec.method} on {results['dataset']}, {split}: top-1 {results['top1']:.1%}"
    plot_confusion(confusion.numpy(), spec.classes, tables / "confusion.png", title=title)
    Predictions(
        outputs.logits.numpy(), outputs.targets.numpy(), np.array(paths), np.array(spec.classes)
    ).save(predictions_path(folder, split))
    # Last, so that the results are there only with all that belongs to them.
    write_json(folder / f"{split}.json", results)
