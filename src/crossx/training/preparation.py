"""What a method learns from the training images before the first step."""

from __future__ import annotations

import logging
import sys

from crossx.errors import UsageError
from crossx.methods.base import Method
from crossx.methods.start import Transfer
from crossx.terminal import erase_step
from crossx.training.batches import TrainBatches
from crossx.training.config import Config
from crossx.training.heads import fit_heads

log = logging.getLogger(__name__)


def prepare(
    method: Method, batches: TrainBatches, config: Config, transfer: Transfer | None, *, shows: bool
) -> None:
    """Prepare a method and fit its heads, except for what it has taken from another network.

    Args:
        method: The method, on its device; changed in place.
        batches: The training images.
        config: The options.
        transfer: What the method took, if it starts from another network.
        shows: Whether to say what takes long.

    Raises:
        UsageError: If the heads are all there is to train, and the method has none to fit.
    """
    views = config.optim.fit_heads
    if transfer is not None and transfer.is_complete:
        if views:
            log.warning("optim.fit_heads has no effect: the heads are those of %s.", transfer.start.name)
        return
    if type(method).prepare is not Method.prepare:
        method.prepare(batches.all())
        if transfer is not None:
            transfer.copy(method)
    if views and config.fits_its_head:
        log.warning("optim.fit_heads has no effect: method %r fits its head itself.", method.name)
    elif views:
        _fit_heads(method, batches, views, required=not config.trainer.max_epochs, shows=shows)


def _fit_heads(method: Method, batches: TrainBatches, views: int, *, required: bool, shows: bool) -> None:
    if shows:
        images = len(batches.data.train_records())
        erase_step()
        print(f"fitting the heads on frozen features: {images:,} images x {views}", file=sys.stderr)
    if fit_heads(method, lambda: (batch[:2] for batch in batches.all(epochs=views))):
        return
    if required:
        raise UsageError(
            f"trainer.max_epochs 0: method {method.name!r} has no linear heads to fit, "
            "so nothing would be trained."
        )
    log.warning(
        "optim.fit_heads: method %r has no linear heads to fit; its heads start at random.", method.name
    )
