"""Temperature scaling: probabilities that match the accuracy.

Guo et al., "On Calibration of Modern Neural Networks", 2017 (https://arxiv.org/abs/1706.04599), section 4.2:
probabilities are softmax(logits / T), with the T > 0 that minimises the negative log-likelihood on held-out images. The
order of the classes, and so every prediction, is unchanged.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack

from torch import Tensor
from torch.nn import functional as F

from crossx.errors import CrossXError, UsageError
from crossx.evaluation.data import DataOptions
from crossx.evaluation.metrics import calibration_error
from crossx.evaluation.run import evaluate
from crossx.evaluation.subject import Subject
from crossx.runs import Run, write_json


def fit_temperature(logits: Tensor, targets: Tensor) -> float:
    """Return the temperature that minimises the mean negative log-likelihood of ``targets``.

    It is convex in b = 1 / T, so its derivative, the mean over images of the expected logit under softmax(b * logits)
    minus the target's logit, increases with b and has at most one root.

    Args:
        logits: (N, K), N > 0.
        targets: int64 (N,).

    Returns:
        T; 1 if no finite T > 0 is best: if every target has its image's largest logit, the likelihood keeps rising as T
        falls; if targets have no larger logits than other classes, as T rises.
    """
    from scipy.optimize import brentq

    above = logits.double() - logits.double().gather(1, targets[:, None])

    def derivative(inverse: float) -> float:
        return float(((inverse * above).softmax(1) * above).sum(1).mean())

    if above.max() <= 0 or derivative(0) >= 0:
        return 1.0
    high = 1.0
    while derivative(high) <= 0:
        high *= 2
    return 1 / float(brentq(derivative, 0, high))


def describe_calibration(logits: Tensor, targets: Tensor, **images: str) -> dict[str, Any]:
    """Fit the temperature and return the entry for ``run.json``.

    Args:
        logits: (N, K).
        targets: int64 (N,).
        **images: The ``dataset`` and ``split`` of the images.

    Returns:
        ``temperature``, ``images``, ``n``, and on these images ``nll`` and ``ece`` (see ``calibration_error``) without,
        ``nll_calibrated`` and ``ece_calibrated`` with the temperature.
    """
    temperature = fit_temperature(logits, targets)
    scaled = logits.double() / temperature
    return {
        "temperature": temperature,
        **images,
        "n": len(targets),
        "nll": F.cross_entropy(logits.double(), targets).item(),
        "nll_calibrated": F.cross_entropy(scaled, targets).item(),
        "ece": calibration_error(logits, targets),
        "ece_calibrated": calibration_error(scaled, targets),
    }


def write_temperature(run: Run, temperature: float) -> None:
    """Store the temperature in the run's ``model.json``."""
    write_json(run.spec, replace(run.read_spec(), temperature=temperature).to_json())


def calibrate_run(
    path: str | Path, *, split: str = "val", device: str = "auto", **options: Unpack[DataOptions]
) -> dict[str, Any]:
    """Fit the temperature of a run and store it in ``model.json``; ``run.json`` records on which images.

    Args:
        path: A run folder; its selected weights are calibrated.
        split: ``val``, the images held out in training, or ``test``.
        device: See ``select_device``.
        **options: See ``DataOptions``.

    Returns:
        See ``describe_calibration``.

    Raises:
        UsageError: If ``path`` is a checkpoint file, or as ``Subject.open``.
        CrossXError: As ``Subject.open``, or if the network was trained on these images.
    """
    if Path(path).is_file():
        raise UsageError(f"{path}: only a run's selected weights have a temperature. Give the run folder.")
    subject = Subject.open(path, split=split, device=device, **options)
    data = subject.data
    if subject.seen_in_training:
        raise CrossXError(
            f"{path}: was trained on its {split} images, on which it is overconfident. Give others with "
            "--data.root and --data.dataset, or --split test."
        )
    data.check_images([split])
    loader = data.eval_loader(split)
    outputs = evaluate(
        subject.method, loader, subject.device, normalize=data.normalize, progress="Calibrating"
    )
    described = describe_calibration(
        outputs.logits, outputs.targets, dataset=data.config.dataset, split=split
    )
    write_temperature(subject.run, described["temperature"])
    write_json(subject.run.info, {**subject.run.read_info(), "calibration": described})
    return described
