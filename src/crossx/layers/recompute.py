"""Activation checkpointing that leaves batch norms as they would be without it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def recompute(function: Callable[..., Any], *inputs: Any, norms_of: nn.Module) -> Any:
    """Return ``function(*inputs)``, keeping only its inputs and computing the rest again in the backward pass.

    Chen et al. 2016, https://arxiv.org/abs/1604.06174. The second pass leaves the running statistics of the batch
    norms alone, so that training is the same as without, only slower; plain ``torch.utils.checkpoint`` would
    count every batch twice.

    Args:
        function: Must not change its inputs.
        inputs: What it is called with.
        norms_of: The module whose batch norms the function runs.
    """
    if not torch.is_grad_enabled():
        return function(*inputs)

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _statistics_kept(norms_of)

    return checkpoint(function, *inputs, use_reentrant=False, context_fn=contexts)


@contextmanager
def _statistics_kept(module: nn.Module) -> Iterator[None]:
    norms = [norm for norm in module.modules() if isinstance(norm, nn.modules.batchnorm._BatchNorm)]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, tracked) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, tracked
