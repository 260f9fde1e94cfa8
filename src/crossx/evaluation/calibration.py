"""Temperature scaling: probabilities that say how often the prediction is right.

Guo et al., "On Calibration of Modern Neural Networks", 2017 (https://arxiv.org/abs/1706.04599), section 4.2:
probabilities are softmax(logits / T), with the T > 0 that minimises the negative log-likelihood on images that the
network was not trained on. The order of the classes, and so every prediction, stays.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack

from scipy.optimize import brentq
from torch import Tensor
from torch.nn import functional as F

from crossx.errors import CrossXError, UsageError
from crossx.evaluation.metrics import calibration_error
from crossx.evaluation.run import evaluate
from crossx.evaluation.subject import DataOptions, Subject
from crossx.runs import Run, write_json


def fit_temperature(logits: Tensor, targets: Tensor) -> float:
    """Return the temperature that minimises the mean negative log-likelihood of ``targets``.

    The likelihood is convex in b = 1 / T, so its derivative, the mean over the images of the expected logit under
    softmax(b * logits) less the target's logit, rises with b, and has one root at most.

    Args:
        logits: (N, K), N > 0.
        targets: int64 (N,).

    Returns:
        T; 1 where no finite T > 0 is best: where every target has its image's largest logit, the likelihood rises
        without end as T falls; where targets have no larger logits than other classes, as T rises.
    """
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
    """Fit the temperature and return what ``run.json`` keeps of it.

    Args:
        logits: (N, K).
        targets: int64 (N,).
        **images: What says which images these are, ``dataset`` and ``split``.

    Returns:
        ``temperature``, ``images``, ``n``, and on these images ``nll`` and ``ece`` (see ``calibration_error``) as the
        network gives them and ``nll_calibrated`` and ``ece_calibrated`` with the temperature.
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
    """Put the temperature into the run's ``model.json``."""
    write_json(run.spec, replace(run.read_spec(), temperature=temperature).to_json())


def calibrate_run(
    path: str | Path, *, split: str = "val", device: str = "auto", **options: Unpack[DataOptions]
) -> dict[str, Any]:
    """Fit the temperature of a run and store it in its ``model.json``; ``run.json`` says on which images.

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
        raise UsageError(f"{path}: the temperature belongs to a run's selected weights: give the run folder.")
    subject = Subject.open(path, split=split, device=device, **options)
    data = subject.data
    if subject.seen_in_training:
        raise CrossXError(
            f"{path}: was trained on its {split} images, on which it is overconfident. Give others with "
            "--data.root and --data.dataset, or --split test."
        )
    data.check_images([split])
    outputs = evaluate(
        subject.method,
        data.eval_loader(split),
        subject.device,
        normalize=data.normalize,
        progress="Calibrating",
    )
    described = describe_calibration(
        outputs.logits, outputs.targets, dataset=data.config.dataset, split=split
    )
    write_temperature(subject.run, described["temperature"])
    write_json(subject.run.info, {**subject.run.read_info(), "calibration": described})
    return described
