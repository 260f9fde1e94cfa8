"""Evaluate a network; test a run on one split with every metric and its files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import torch
from torch import Tensor

from crossx.data.catalog import VARYING, dataset_title
from crossx.data.fingerprints import fingerprints
from crossx.data.image_files import require_images
from crossx.errors import CrossXError
from crossx.evaluation.conformal import least_probability
from crossx.evaluation.examples import choose_examples, compute_maps, maps_path
from crossx.evaluation.metrics import summarize
from crossx.evaluation.network import TorchNetwork, check_finite
from crossx.evaluation.open_set import (
    KEY,
    describe_rejection,
    describe_sets,
    describe_unknown,
    unknown_data,
)
from crossx.evaluation.plots import plot_confusion
from crossx.evaluation.predictions import Predictions, predictions_path, relative_paths
from crossx.evaluation.progress import track
from crossx.evaluation.subject import Subject, SubjectOptions
from crossx.evaluation.tables import write_class_table, write_confused_pairs, write_confusion
from crossx.evaluation.unknowns import ViewScores
from crossx.methods.base import Method
from crossx.runs import ModelSpec, write_json
from crossx.terminal import step

WRITTEN = (
    "predictions.npz",
    "examples.npz",
    "per_class.csv",
    "confused_pairs.csv",
    "confusion.csv",
    "confusion.png",
)
"""Files that ``test_run`` writes into the folder of the split."""


@dataclass(frozen=True)
class Outputs:
    """Logits of a network, on the CPU in the order of the loader.

    Attributes:
        logits: float32 (N, K).
        heads: Head name -> float32 (N, K).
        targets: int64 (N,).
        similarities: float32 (N,), see ``Network``; None if the network has no class means.
    """

    logits: Tensor
    heads: Mapping[str, Tensor]
    targets: Tensor
    similarities: Tensor | None = None

    @property
    def scores(self) -> ViewScores:
        """The outputs that scores of rejection are computed from."""
        return ViewScores([self.logits], None if self.similarities is None else [self.similarities])


def evaluate(
    method: Method,
    loader: Iterable[tuple[Tensor, Tensor]],
    device: str | torch.device = "auto",
    *,
    normalize: Callable[[Tensor], Tensor] | None = None,
    channels_last: bool = True,
    progress: str = "",
) -> Outputs:
    """Run a network over a loader. The method stays on ``device``, in evaluation mode.

    Args:
        method: The network.
        loader: Batches of images (B, 3, H, W) and targets (B,); at least one.
        device: See ``select_device``.
        normalize: See ``TorchNetwork``; ``DataModule.normalize`` for its own loaders.
        channels_last: See ``TorchNetwork``.
        progress: Title of the progress bar; empty for none.

    Raises:
        CrossXError: If the logits are not finite or GPU memory runs out.
    """
    network = TorchNetwork(method, normalize, device, channels_last=channels_last)
    heads: dict[str, list[Tensor]] = {}
    targets, cosines = [], []
    for images, labels in track(loader, progress):
        found, similarities = network.heads_and_similarities(images)
        for name, logits in found.items():
            heads.setdefault(name, []).append(logits.float().cpu())
        if similarities is not None:
            cosines.append(similarities.cpu())
        targets.append(labels)
    joined = {name: torch.cat(batches) for name, batches in heads.items()}
    with torch.inference_mode():
        logits = method.combine_heads(joined)
    similarities = torch.cat(cosines) if cosines else None
    check_finite(logits, similarities)
    return Outputs(logits, joined, torch.cat(targets), similarities)


def test_run(
    path: str | Path,
    *,
    coverage: float | None = None,  # noqa: PT028  # not a pytest test
    unknown: str | Path | None = None,  # noqa: PT028
    **options: Unpack[SubjectOptions],
) -> dict[str, Any]:
    """Test a run on one split of a dataset and write the results.

    Writes the result to ``OUTPUT/SPLIT.json``, and into ``OUTPUT/SPLIT/`` ``per_class.csv``, ``confusion.csv``,
    ``confusion.png``, ``confused_pairs.csv``, ``predictions.npz`` (see ``Predictions``), for ``compare_runs``, and
    ``examples.npz`` (see ``ExampleMaps``), for ``report_run``.

    Args:
        path: A run folder (its selected weights) or a checkpoint file in one.
        coverage: Coverage of prediction sets to measure.
        unknown: A folder of images of none of the classes, to measure how well they are told apart.
        **options: See ``SubjectOptions``.

    Returns:
        The metrics of ``summarize`` and their provenance: method, backbone, weights, dataset, split, training seed and
        how the checkpoint was selected. ``rejection``, ``sets`` and ``unknown``, where there is something to measure:
        see ``open_set``.

    Raises:
        UsageError: As ``Subject.open``, or if the run has no prediction sets of that coverage.
        CrossXError: As ``Subject.open``, or if images cannot be read or the logits are not finite.
    """
    if unknown is not None:
        require_images(Path(unknown))
    with step("Loading the network"):
        subject = Subject.open(path, **options)
    subject.check_outputs(f"{subject.split}.json", *(f"{subject.split}/{name}" for name in WRITTEN))
    data, spec, split = subject.data, subject.spec, subject.split
    if coverage is not None:
        least_probability(spec.sets, KEY, coverage, subject.run.path)
    with step("Checking the images"):
        others = None if unknown is None else unknown_data(subject, unknown)
        data.check_images([split])
    outputs = evaluate(
        subject.method, data.eval_loader(split), subject.device, normalize=data.normalize, progress="Testing"
    )
    contents = fingerprints([record.path for record in data.index.split(split)])
    results = {
        **summarize(
            outputs.logits,
            outputs.heads,
            outputs.targets,
            spec.classes,
            data.index.levels,
            temperature=spec.temperature,
        ),
        **subject.provenance(contents),
    }
    logits, targets = outputs.logits, outputs.targets
    if (rejection := describe_rejection(spec, outputs.scores, targets)) is not None:
        results["rejection"] = rejection
    if coverage is not None:
        results["sets"] = describe_sets(spec, logits, targets, coverage, subject.run.path)
    if others is not None:
        found = evaluate(
            subject.method, others.eval_loader("test"), subject.device, normalize=data.normalize,
            progress="Testing unknown images",
        )  # fmt: skip
        results["unknown"] = {
            "folder": str(unknown),
            "skipped": len(others.skipped),
            **describe_unknown(spec, outputs.scores, targets, found.scores),
        }
    paths = relative_paths(data.index, split, data.config.root)
    predicted = Predictions(
        outputs.logits.numpy(),
        outputs.targets.numpy(),
        np.array(paths),
        np.array(spec.classes),
        contents if data.config.dataset in VARYING else None,
    )
    with step("Writing the results"):
        _write_example_maps(subject, predicted)
        _write_files(subject.output, split, predicted, spec, results)
    return results


# not a pytest test
test_run.__test__ = False  # type: ignore[attr-defined]


def _write_example_maps(subject: Subject, predicted: Predictions) -> None:
    """Keep what a report shows, so that it need not load the network."""
    calibrated = replace(predicted, logits=predicted.logits / np.float32(subject.spec.temperature))
    numbers = choose_examples(calibrated).images
    records = subject.data.index.split(subject.split)
    path = maps_path(subject.output, subject.split)
    try:
        maps = compute_maps(subject.network, subject.spec, [records[number].path for number in numbers])
    except CrossXError:
        # the report tries again, and says why there are none
        path.unlink(missing_ok=True)
    else:
        maps.save(path, numbers, predicted)


def _write_files(
    folder: Path,
    split: str,
    predicted: Predictions,
    spec: ModelSpec,
    results: Mapping[str, Any],
) -> None:
    confusion = predicted.confusion
    tables = folder / split
    write_class_table(confusion, spec.classes, tables / "per_class.csv")
    write_confused_pairs(confusion, spec.classes, tables / "confused_pairs.csv")
    write_confusion(confusion, spec.classes, tables / "confusion.csv")
    dataset = dataset_title(results["dataset"], results["data_root"])
    title = f"{spec.method} on {dataset}, {split}: top-1 {results['top1']:.1%}"
    plot_confusion(confusion, spec.display_names, tables / "confusion.png", title=title)
    predicted.save(predictions_path(folder, split))
    # last: results exist only with all their files
    write_json(folder / f"{split}.json", results)
