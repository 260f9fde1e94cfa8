"""Calibrate a network on held-out images: its probabilities, when it rejects an image, and its prediction sets.

Temperature scaling (Guo et al., "On Calibration of Modern Neural Networks", 2017, https://arxiv.org/abs/1706.04599,
section 4.2): probabilities are softmax(logits / T), with the T > 0 that minimises the negative log-likelihood. The
order of the classes is unchanged. Few images say little about T, and a wrong one is worse than none, so that T is 1
unless a likelihood-ratio test rejects that (``choose_temperature``).

The threshold of rejection (``unknowns``) and those of prediction sets (``conformal``) depend on the views that a
prediction averages over, so there is one for each of them.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, Unpack

import torch
from torch import Tensor
from torch.nn import functional as F

from crossx.data.datamodule import DataModule
from crossx.errors import CrossXError, UsageError, check_choice, counted, first_line
from crossx.evaluation.conformal import least_probabilities
from crossx.evaluation.data import DataOptions
from crossx.evaluation.metrics import calibration_error
from crossx.evaluation.network import Network, TorchNetwork, check_finite
from crossx.evaluation.progress import track
from crossx.evaluation.subject import Subject, open_data
from crossx.evaluation.training_images import is_most
from crossx.evaluation.unknowns import (
    FEATURE_SCORE,
    FEATURE_SCORES,
    KEEP,
    SCORE,
    SCORES,
    ClassMeans,
    ClassMeansSum,
    ViewScores,
    keeping_threshold,
)
from crossx.evaluation.views import CROPS, Views, has_crops, mean_probabilities, views_key
from crossx.methods.base import Method
from crossx.methods.weights import save_weights
from crossx.runs import PredictionSets, Rejection, Run, write_json
from crossx.terminal import step

MAX_VALUES = 50_000_000
"""Logits of views to keep in memory; beyond, the thresholds are set on a part of the images, evenly spread."""
LEVEL = 0.05
"""How often a temperature is used although 1 is right."""

log = logging.getLogger(__name__)


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


class ChosenTemperature(NamedTuple):
    """The temperature to use.

    Attributes:
        value: T; 1 if no other is better beyond doubt.
        kept: Why it is 1, in words; None if it is that of ``fit_temperature``.
    """

    value: float
    kept: str | None = None


def choose_temperature(logits: Tensor, targets: Tensor) -> ChosenTemperature:
    """Return the temperature of ``fit_temperature`` if the images reject T = 1, else 1.

    The test is that of the likelihood ratio, at a level of ``LEVEL``: twice the log-likelihood gained over T = 1 has
    approximately a chi-squared distribution with one degree of freedom if T = 1 is right (Wilks, "The Large-Sample
    Distribution of the Likelihood Ratio for Testing Composite Hypotheses", 1938,
    https://doi.org/10.1214/aoms/1177732360). Equivalently, the confidence interval of T must not contain 1.

    Args:
        logits: (N, K), N > 0.
        targets: int64 (N,).
    """
    from scipy.stats import chi2

    images = counted(len(targets), "image")
    fitted = fit_temperature(logits, targets)
    if fitted == 1:
        how = "correctly" if bool((logits.argmax(1) == targets).all()) else "no better than by chance"
        return ChosenTemperature(1.0, f"no temperature is best for {images} classified {how}")
    before, after = (F.cross_entropy(logits.double() / t, targets, reduction="sum") for t in (1, fitted))
    p_value = float(chi2.sf(2 * float(before - after), 1))
    if p_value >= LEVEL:
        return ChosenTemperature(
            1.0, f"{images} cannot tell {fitted:.3g}, the best for them, from 1 (p = {p_value:.2g})"
        )
    return ChosenTemperature(fitted)


class ViewOutputs(NamedTuple):
    """Logits of a network on the views of images, on the CPU.

    Attributes:
        logits: float32 (N, K), of the centre of each image.
        targets: int64 (N,).
        views: float32 (V, n, K), of all views, of images that ``chosen`` has.
        similarities: float32 (V, n), of the same to the nearest class mean; None if the network has no class means.
        chosen: bool (N,), all of them unless they are very many.
        keys: Key of ``views_key`` -> which of the V views it averages over.
    """

    logits: Tensor
    targets: Tensor
    views: Tensor
    chosen: Tensor
    keys: Mapping[str, Sequence[int]]
    similarities: Tensor | None = None


class Calibration(NamedTuple):
    """What ``calibrate_outputs`` finds, as in ``ModelSpec``, and its description for ``run.json``."""

    temperature: float
    rejection: Rejection | None
    sets: PredictionSets | None
    described: dict[str, Any]
    combined_weight: float | None = None

    def write(self, run: Run) -> None:
        """Store it in the run's ``model.json``."""
        spec = replace(
            run.read_spec(),
            temperature=self.temperature,
            rejection=self.rejection,
            sets=self.sets,
            combined_weight=self.combined_weight,
        )
        write_json(run.spec, spec.to_json())


def evaluate_views(
    network: Network, data: DataModule, split: str, *, workers: int | None = None, progress: str = ""
) -> ViewOutputs:
    """Run a network over all views of the images of a split; the calling rank does it.

    Args:
        network: The network.
        data: The images, of the network's classes.
        split: Name of the split.
        workers: See ``DataModule.eval_loader``.
        progress: Title of the progress bar; empty for none.

    Raises:
        CrossXError: If the logits are not finite or GPU memory runs out.
    """
    crops = CROPS[-1] if has_crops(data.preprocessing) else 1
    views = Views(data.preprocessing, flip=True, crops=crops)
    # five_crop ends with the centre, and each mirror image follows its crop
    last = 2 * crops - 2
    keys = {views_key(flip=False, crops=1): [last], views_key(flip=True, crops=1): [last, last + 1]}
    if crops > 1:
        keys[views_key(flip=False, crops=crops)] = [*range(0, 2 * crops, 2)]
        keys[views_key(flip=True, crops=crops)] = [*range(2 * crops)]
    stride = -(-len(data.index.split(split)) * len(data.index.classes) * 2 * crops // MAX_VALUES)
    centres, targets, chosen, others, cosines, start = [], [], [], [], [], 0
    loader = data.eval_loader(split, dealt=False, transform=views.transform, workers=workers)
    for images, labels in track(loader, progress):
        mask = torch.arange(start, start + len(images)) % stride == 0
        start += len(images)
        # the centre of all images, the other views of those chosen
        centre = _scores(network, views.centres(images))
        if mask.any():
            rows = [
                tuple(part[mask] for part in centre) if number == last else _scores(network, view)
                for number, view in enumerate(views.split(images[mask]))
            ]
            logits, *similarities = (torch.stack(part) for part in zip(*rows, strict=True))
            others.append(logits)  # V of (b, K) -> (V, b, K)
            cosines += similarities  # V of (b,) -> (V, b)
        centres.append(centre[0])
        targets.append(labels)
        chosen.append(mask)
    logits, all_views = torch.cat(centres), torch.cat(others, 1)
    check_finite(logits)
    all_cosines = torch.cat(cosines, 1) if cosines else None
    # (V, n, K) -> (V*n, K), (V, n) -> (V*n,)
    check_finite(all_views.flatten(0, 1), None if all_cosines is None else all_cosines.flatten())
    return ViewOutputs(logits, torch.cat(targets), all_views, torch.cat(chosen), keys, all_cosines)


def _scores(network: Network, images: Tensor) -> tuple[Tensor, ...]:
    """Return logits and, if there are class means, similarities, on the CPU."""
    if not network.has_similarities:
        return (network.logits(images).cpu(),)
    return tuple(part.cpu() for part in network.logits_and_similarities(images))


def compute_class_means(
    method: Method, data: DataModule, device: str | torch.device, *, progress: str = ""
) -> ClassMeans | None:
    """Compute the class means of a network, in one pass over its training images; the calling rank does it.

    Args:
        method: The network; it stays on ``device``, in evaluation mode.
        data: The images.
        device: See ``select_device``.
        progress: Title of the progress bar; empty for none.

    Returns:
        The class means; None if the method has no linear heads, or if its ``heads_and_features`` lacks other heads.

    Raises:
        CrossXError: If the logits are not finite or GPU memory runs out.
    """
    if not method.linear_heads():
        return None
    network = TorchNetwork(method, data.normalize, device)
    total = ClassMeansSum(method.num_classes, len(data.index.split("train")))
    for number, (images, labels) in enumerate(track(data.eval_loader("train", dealt=False), progress)):
        if not number and not _gives_features(network, images):
            return None
        logits, features = network.logits_and_features(images)
        check_finite(logits)
        total.add(logits.cpu(), features.cpu(), labels)
    return total.finish()


def _gives_features(network: TorchNetwork, images: Tensor) -> bool:
    """Whether ``Method.heads_and_features`` gives the logits of all heads, and one vector per image."""
    method, expected = network.method, network.head_logits(images)
    for logits in expected.values():
        check_finite(logits)
    try:
        heads, features = network.heads_and_features(images)
    except CrossXError:
        raise
    except Exception as error:  # of a user's method, whose training must not be lost for it
        log.warning(
            "no class means: the linear heads of method %r cannot be applied to its features (%s). "
            "`crossx.testing.check_method` says more.", method.name, first_line(error),
        )  # fmt: skip
        return False
    same = heads.keys() == expected.keys() and all(
        logits.shape == expected[name].shape and torch.allclose(logits, expected[name], rtol=1e-3, atol=1e-3)
        for name, logits in heads.items()
    )
    if same and features.shape[1:] == (method.width_of_class_means,):
        return True
    log.warning(
        "no class means, so that only the logits decide which images are rejected: heads_and_features of method %r "
        "does not give what head_logits does, or not one vector per image: see docs/own-method.md.", method.name,
    )  # fmt: skip
    return False


def calibrate_outputs(
    outputs: ViewOutputs,
    *,
    score: str = SCORE,
    keep: float = KEEP,
    weight: float | None = None,
    **images: str | None,
) -> Calibration:
    """Fit the temperature, and set the thresholds of rejection and of prediction sets.

    Args:
        outputs: Logits on images that the network was not trained on.
        score: Name of the score of rejection, see ``crossx.evaluation.unknowns``.
        keep: Share of the images to keep, above 0; 1 for no rejection.
        weight: See ``ClassMeans``, kept for any score, and without rejection; None for a network without class means.
        **images: The ``dataset``, ``data_root`` and ``split`` of the images, for the description.

    Returns:
        The calibration. There is no rejection if there are too few images, see ``keeping_threshold``. Its description
        has ``temperature``, ``temperature_kept`` (see ``ChosenTemperature``), ``images``, ``n``, and on these images
        ``nll`` and ``ece`` (see ``calibration_error``) without, ``nll_calibrated`` and ``ece_calibrated`` with the
        temperature, and ``keep``, ``score`` and ``threshold`` of the rejection of single views, or None.
    """
    described = describe_temperature(outputs.logits, outputs.targets, **images)
    temperature = described["temperature"]
    rejection, sets = set_thresholds(outputs, temperature, score=score, keep=keep, weight=weight)
    least = rejection.thresholds.get(views_key(flip=False, crops=1)) if rejection else None
    described |= {"score": score, "keep": keep, "threshold": least}
    unused = weight if rejection is None else None
    return Calibration(temperature, rejection, sets, described, unused)


def set_thresholds(
    outputs: ViewOutputs, temperature: float, *, score: str, keep: float, weight: float | None
) -> tuple[Rejection | None, PredictionSets]:
    """Set the thresholds of rejection and of prediction sets; arguments as in ``calibrate_outputs``.

    Returns:
        The rejection; None if there are too few images, see ``keeping_threshold``, or all are to be kept. The sets.
    """
    targets = outputs.targets[outputs.chosen]
    thresholds: dict[str, float] = {}
    least: dict[str, tuple[float, ...]] = {}
    for key, numbers in outputs.keys.items():
        views = list(outputs.views[list(numbers)].double())
        if keep < 1:
            cosines = (
                None if outputs.similarities is None else list(outputs.similarities[list(numbers)].double())
            )
            threshold = keeping_threshold(ViewScores(views, cosines).score(score, weight).numpy(), keep)
            if threshold is not None:
                thresholds[key] = threshold
        probabilities = mean_probabilities(views, temperature)
        own = probabilities.gather(1, targets[:, None])[:, 0]  # (n, K) -> (n,)
        least[key] = least_probabilities(own.numpy())
    count = len(targets)
    rejection = Rejection(score, keep, count, thresholds, weight) if thresholds else None
    return rejection, PredictionSets(count, least)


def describe_temperature(logits: Tensor, targets: Tensor, **images: str | None) -> dict[str, Any]:
    """Choose the temperature for logits (N, K) and targets (N,) and describe it, see ``calibrate_outputs``."""
    temperature, kept = choose_temperature(logits, targets)
    scaled = logits.double() / temperature
    return {
        "temperature": temperature,
        "temperature_kept": kept,
        **images,
        "n": len(targets),
        "nll": F.cross_entropy(logits.double(), targets).item(),
        "nll_calibrated": F.cross_entropy(scaled, targets).item(),
        "ece": calibration_error(logits, targets),
        "ece_calibrated": calibration_error(scaled, targets),
    }


def calibrate_run(
    path: str | Path,
    *,
    split: str = "val",
    device: str = "auto",
    score: str | None = None,
    keep: float = KEEP,
    **options: Unpack[DataOptions],
) -> Calibration:
    """Calibrate a run and store the result in ``model.json``; ``run.json`` records on which images.

    Args:
        path: A run folder; its selected weights are calibrated.
        split: ``val``, the images held out in training, or ``test``.
        device: See ``select_device``.
        score: See ``calibrate_outputs``; by default ``combined`` if the run has class means, else ``max_logit``. A run
            without class means gets them if the score needs them.
        keep: See ``calibrate_outputs``.
        **options: See ``DataOptions``.

    Raises:
        UsageError: If ``path`` is a checkpoint file, for an unknown score or an impossible ``keep``, for a score that
            needs class means of a method without linear heads, or as ``Subject.open``.
        CrossXError: As ``Subject.open``, if the network was trained on these images, or if the score needs class means
            and the training images cannot be read.
    """
    if Path(path).is_file():
        raise UsageError(f"{path}: only a run's selected weights have a temperature. Give the run folder.")
    if score is not None:
        check_choice("score", score, (*SCORES, *FEATURE_SCORES))
    if not 0 < keep <= 1:
        raise UsageError(f"keep must be above 0 and at most 1, not {keep}.")
    with step("Loading the network"):
        subject = Subject.open(path, split=split, device=device, **options)
    data = subject.data
    seen, images = subject.count_trained(), len(data.index.split(split))
    if is_most(seen, images):
        which = f"its {split} images" if seen == images else f"{seen} of these {images} {split} images"
        raise CrossXError(
            f"{path}: was trained on {which}, on which it is overconfident. Give others with --data.root "
            f"and --data.dataset{'' if split == 'test' else ', or --split test'}."
        )
    if seen:
        log.warning(
            "%d of the %s were trained on: the run is overconfident on these.", seen, counted(images, "image")
        )
    with step("Checking the images"):
        data.check_images([split])
    if score is None:
        score = SCORE if subject.method.class_means is None else FEATURE_SCORE
    weight = _stored_weight(subject)
    if weight is None and score in FEATURE_SCORES and keep < 1:
        weight = _add_class_means(subject, score)
    outputs = evaluate_views(subject.network, data, split, progress="Calibrating")
    found = calibrate_outputs(
        outputs,
        score=score,
        keep=keep,
        weight=weight,
        dataset=data.config.dataset,
        # export reads them again, also from other working folders
        data_root=data.config.with_absolute_root().root,
        split=split,
    )
    found.write(subject.run)
    write_json(subject.run.info, {**subject.run.read_info(), "calibration": found.described})
    return found


def _stored_weight(subject: Subject) -> float | None:
    """Return the weight of a run's class means; None if it has no class means, or not their weight."""
    return None if subject.method.class_means is None else subject.spec.score_weight


def _add_class_means(subject: Subject, score: str) -> float:
    """Compute the class means of a run, store them, and return their weight."""
    run, method = subject.run, subject.method
    try:
        data = open_data(run, subject.spec)
        data.check_images(["train"])
    except CrossXError as error:
        raise CrossXError(
            f"{error} Score {score} needs class means of the training images; --score {SCORE} does not."
        ) from error
    found = compute_class_means(method, data, subject.device, progress="Computing class means")
    if found is None:
        raise UsageError(
            f"{run.path}: method {method.name!r} has no class means: they need linear heads, and heads_and_features if "
            f"there are others. Choose --score from: {', '.join(SCORES)}."
        )
    method.class_means = found.means.to(subject.device)
    before = run.weights.stat()
    save_weights(method, run.weights)
    # results of these weights remain valid
    os.utime(run.weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    return found.weight
