"""Choose the weights that become the model, and calibrate their probabilities."""

from __future__ import annotations

import logging
from typing import Any

from crossx.data.datamodule import DataModule
from crossx.distributed import is_leader
from crossx.errors import CrossXError, UsageError, counted
from crossx.evaluation.calibration import calibrate_outputs, compute_class_means, evaluate_views
from crossx.evaluation.conformal import weakness
from crossx.evaluation.run import evaluate
from crossx.evaluation.unknowns import FEATURE_SCORE, KEEP, SCORE, images_to_keep
from crossx.methods.weights import load_weights, save_weights
from crossx.training.checkpoints import is_intact, read_checkpoint
from crossx.training.config import Config
from crossx.training.loop import Loop

SUSPICIOUS_GAP = 0.1
"""Training minus validation top-1 from which the averaged weights are compared with the trained ones."""

LAGGING_BY = 0.05
"""How much worse the average's validation top-1 must be for a warning."""

log = logging.getLogger(__name__)


def choose_monitor(config: Config, data: DataModule) -> str | None:
    """Return the metric that selects the best epoch, or None to take the last one.

    Raises:
        UsageError: If the selection needs images that the dataset does not have.
    """
    trainer, selection, missing = config.trainer, config.optim.selection, ""
    on_test = selection == "best_on_test"
    if on_test and not data.index.split("test"):
        raise UsageError("optim.selection best_on_test needs test images, and the dataset has none.")
    if not trainer.max_epochs:
        return "test/top1" if on_test else None
    if not data.holds_out and not on_test:
        missing = "There are no validation images"
    elif trainer.limit_val_batches == 0:
        missing = "trainer.limit_val_batches 0 switches validation off"
    elif trainer.check_val_every_n_epoch > trainer.max_epochs:
        missing = f"trainer.check_val_every_n_epoch {trainer.check_val_every_n_epoch} is more than trainer.max_epochs"
    if missing and config.optim.patience:
        raise UsageError(
            f"optim.patience {config.optim.patience} needs validation after epochs. {missing}: change that, or leave "
            "out the option."
        )
    if on_test:
        return "test/top1"
    if missing and selection == "best":
        log.warning("%s: the last epoch's weights become the model.", missing)
    return None if missing or selection == "last" else "val/top1"


def describe_selection(loop: Loop) -> dict[str, Any]:
    """Return how the weights are selected and, once known, the epoch that was."""
    rows, best = loop.history.rows, loop.best
    if loop.monitor is None or (rows and not best):
        return {"how": "last", "split": None, "epoch": rows[-1]["epoch"] if rows else None, "value": None}
    return {
        "how": loop.config.optim.selection,
        "split": loop.monitor.split("/")[0],
        "metric": "top1",
        "epoch": best.get("epoch"),
        "value": best.get("value"),
    }


def finish(loop: Loop, info: dict[str, Any]) -> None:
    """Save the selected weights as the model and calibrate it; the first rank does it."""
    if not is_leader():
        return
    loop.history.write()
    _warn_if_average_lags(loop)
    selected = loop.run_folder.best if loop.best else loop.run_folder.last
    if not is_intact(selected):
        raise CrossXError(
            f"{selected}: damaged. `crossx fit --resume {loop.run_folder.path}` takes another copy, if there is one."
        )
    load_weights(loop.method, selected)
    weight = _add_class_means(loop)
    save_weights(loop.method, loop.run_folder.weights)
    info["calibration"] = _calibrate(loop, weight)


def _warn_if_average_lags(loop: Loop) -> None:
    """Warn if the trained weights are clearly better on validation images than their average.

    They are evaluated only if training accuracy is far above the average's validation accuracy.
    """
    data, rows, best = loop.data, loop.history.rows, loop.best
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
            "are not rejected."
        )
        return None
    outputs = evaluate_views(
        loop.method,
        data,
        "val",
        loop.device,
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
        log.warning("the probabilities are not calibrated (temperature 1): %s.", kept)
    if found.rejection is None:
        log.warning(
            "%s: too few for a threshold, which needs %d, so images of unknown classes are not rejected.",
            counted(len(outputs.targets), "validation image"), images_to_keep(KEEP),
        )  # fmt: skip
    elif warning := weakness(found.rejection.images, KEEP, "rejection was", "keep"):
        log.warning("%s.", warning)
    found.write(loop.run_folder)
    return found.described
