"""Save the selected weights as the model, and calibrate their probabilities."""

from __future__ import annotations

import logging
from typing import Any

from crossx.distributed import is_leader
from crossx.errors import CrossXError, counted
from crossx.evaluation.calibration import calibrate_outputs, compute_class_means, evaluate_views
from crossx.evaluation.conformal import weakness
from crossx.evaluation.network import TorchNetwork
from crossx.evaluation.run import evaluate
from crossx.evaluation.unknowns import FEATURE_SCORE, KEEP, SCORE, images_to_keep
from crossx.methods.weights import load_weights, save_weights
from crossx.runs import is_intact, resume_command
from crossx.training.checkpoints import read_checkpoint
from crossx.training.loop import Loop

SUSPICIOUS_GAP = 0.1
"""Training minus validation top-1 from which the averaged weights are compared with the trained ones."""

LAGGING_BY = 0.05
"""How much worse the average's validation top-1 must be for a warning."""

MORE_IMAGES = "A larger --data.val_fraction holds out more images, and `crossx calibrate RUN` takes others"

log = logging.getLogger(__name__)


def finish(loop: Loop, info: dict[str, Any]) -> None:
    """Save the selected weights as the model and calibrate it; the first rank does it."""
    if not is_leader():
        return
    loop.history.write()
    _warn_if_average_lags(loop)
    selected = loop.run_folder.best if loop.selection.best else loop.run_folder.last
    if not is_intact(selected):
        raise CrossXError(
            f"{selected}: damaged. `{resume_command(loop.run_folder)}` takes another copy, if there is one."
        )
    load_weights(loop.method, selected)
    weight = _add_class_means(loop)
    save_weights(loop.method, loop.run_folder.weights)
    info["calibration"] = _calibrate(loop, weight)


def _warn_if_average_lags(loop: Loop) -> None:
    """Warn if the trained weights are clearly better on validation images than their average.

    They are evaluated only if training accuracy is far above the average's validation accuracy.
    """
    data, rows, best = loop.data, loop.history.rows, loop.selection.best
    if loop.average is None or not rows or not data.holds_out:
        return
    row = next((row for row in rows if row["epoch"] == best.get("epoch")), rows[-1])
    if "val/top1" not in row or row["train/top1"] - row["val/top1"] < SUSPICIOUS_GAP:
        return
    weights = read_checkpoint(loop.run_folder.best if best else loop.run_folder.last)["trained"]
    loop.task.load_state_dict(weights)
    outputs = evaluate(
        loop.method, data.eval_loader("val", dealt=False), loop.device, normalize=data.normalize
    )
    top1 = float((outputs.logits.argmax(1) == outputs.targets).float().mean())
    if top1 - row["val/top1"] >= LAGGING_BY:
        log.warning(
            "the model is an average of the weights (optim.ema_decay %g) that lags behind: %.1f%% on validation, "
            "the weights themselves %.1f%%. Train longer, lower optim.ema_decay, or set it to null.",
            loop.config.optim.ema_decay, 100 * row["val/top1"], 100 * top1,
        )  # fmt: skip


def _add_class_means(loop: Loop) -> float | None:
    """Give the model class means if images are to be rejected by them; return their weight."""
    data = loop.data
    if not data.holds_out or len(data.index.split("val")) < images_to_keep(KEEP):
        return None
    found = compute_class_means(
        loop.method, data, loop.device, progress="Computing class means" if _shows_progress(loop) else ""
    )
    if found is None:
        return None
    loop.method.class_means = found.means.to(loop.device)
    return found.weight


def _shows_progress(loop: Loop) -> bool:
    return loop.config.trainer.enable_progress_bar


def _calibrate(loop: Loop, weight: float | None) -> dict[str, Any] | None:
    """Calibrate the model on the validation images; None if there are none."""
    data = loop.data
    if not data.holds_out:
        log.warning(
            "no validation images: the probabilities are not calibrated (temperature 1), and images of unknown classes "
            "are not rejected. %s.", MORE_IMAGES,
        )  # fmt: skip
        return None
    outputs = evaluate_views(
        TorchNetwork(loop.method, data.normalize, loop.device),
        data,
        "val",
        progress="Calibrating" if _shows_progress(loop) else "",
    )
    found = calibrate_outputs(
        outputs,
        score=SCORE if weight is None else FEATURE_SCORE,
        weight=weight,
        dataset=data.index.name,
        data_root=data.config.root,
        split="val",
    )
    if kept := found.described["temperature_kept"]:
        log.warning("the temperature stays 1: %s.", kept)
    if found.rejection is None:
        log.warning(
            "%s: too few for a threshold, which needs %d, so images of unknown classes are not rejected. %s.",
            counted(len(outputs.targets), "validation image"), images_to_keep(KEEP), MORE_IMAGES,
        )  # fmt: skip
    elif warning := weakness(found.rejection.images, KEEP, "rejection was", "keep"):
        log.warning("%s.", warning)
    found.write(loop.run_folder)
    return found.described
