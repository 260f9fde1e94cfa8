"""Activation checkpointing that does not change the statistics of batch norms."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def recompute(function: Callable[..., Any], *inputs: Any, norms_of: nn.Module) -> Any:
    """Return ``function(*inputs)``; store only the inputs and recompute the rest in the backward pass.

    Chen et al. 2016, https://arxiv.org/abs/1604.06174. Plain ``torch.utils.checkpoint`` would update the running
    statistics twice per batch; here the batch norms of ``norms_of`` keep theirs in the second pass.
    ``function`` must not change its inputs.
    """
    if not torch.is_grad_enabled():
        return function(*inputs)
    return checkpoint(
        function,
        *inputs,
        use_reentrant=False,
        context_fn=lambda: (nullcontext(), _frozen_statistics(norms_of)),
    )


@contextmanager
def _frozen_statistics(module: nn.Module) -> Iterator[None]:
    norms = [norm for norm in module.modules() if isinstance(norm, nn.modules.batchnorm._BatchNorm)]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, tracked) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, tracked
