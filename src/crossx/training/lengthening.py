"""Train a run for another length."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from crossx.commands import quoted
from crossx.errors import UsageError, counted
from crossx.runs import Run
from crossx.training.config import Config
from crossx.training.sections import TrainerConfig


def with_length(
    run: Run,
    trainer: TrainerConfig,
    before: dict[str, Any],
    checkpoint: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Check that a run can be trained for another length; return its ``run.json`` with the length so far.

    Raises:
        UsageError: If it cannot, naming the option that leaves nothing to train.
    """
    finished = before.get("status") == "finished"
    if checkpoint is None:
        if finished:
            raise UsageError(
                f"{run.path}: its checkpoints are gone, so it cannot be trained for longer. Start a new run from it "
                f"with --init {quoted(run.path)}."
            )
        return before
    epochs, step = checkpoint["epoch"], checkpoint["step"]
    seconds = checkpoint["history"]["seconds"]
    begun = epochs + (checkpoint["batch"] > 0)
    for option, so_far, limit in (
        ("max_epochs", begun, trainer.max_epochs),
        ("max_steps", step, trainer.max_steps if trainer.max_steps >= 0 else math.inf),
        ("max_time", seconds, trainer.seconds),
    ):
        # an unfinished run may be given the length that it has, for which the same command may be repeated
        if limit < so_far or (finished and limit == so_far):
            shown, unit = (f"{so_far:.0f}", " seconds") if option == "max_time" else (f"{so_far}", "")
            raise UsageError(
                f"{run.path}: has trained {counted(epochs, 'epoch')} ({counted(step, 'step')}), and trainer.{option} "
                f"{getattr(trainer, option)} leaves nothing to train: give more than {shown}{unit}."
            )
    if not finished:
        return before
    return {**before, "extended_after": [*(before.get("extended_after") or []), epochs]}


def require_other_end(run: Run, config: Config, former: Config, before: Mapping[str, Any]) -> None:
    """Check that what ended a run early would not end it at once again, given the former options."""
    ended = before.get("ended") or {}
    if before.get("status") != "finished":
        return
    start = f"{run.path}: was ended after {counted(ended.get('epoch') or 0, 'epoch')} by"
    waited = former.optim.patience
    if ended.get("by") == "patience" and 0 < config.optim.patience <= waited:
        raise UsageError(
            f"{start} optim.patience {waited}: to train it for longer, give --optim.patience too: more, or 0, "
            "which switches it off."
        )
    if ended.get("by") == "max_time" and config.trainer.seconds <= former.trainer.seconds:
        raise UsageError(
            f"{start} trainer.max_time {config.trainer.max_time}, which leaves nothing to train: give more."
        )
