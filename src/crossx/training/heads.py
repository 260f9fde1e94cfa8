"""Fit the heads on frozen features before the network is trained.

Linear probing, then fine-tuning (LP-FT; Kumar et al., ICLR 2022, https://arxiv.org/abs/2202.10054): random heads send
large gradients into the pretrained layers and distort their features; fitted heads do not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import islice

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from crossx.layers import evaluation_mode
from crossx.methods.base import Method
from crossx.methods.linear import PENALTY, embed, fit_centred

Batches = Callable[[], Iterable[tuple[Tensor, Tensor]]]
"""Starts a pass over normalised images (B, 3, H, W) on the device, and targets int64 (B,)."""

STATISTICS_BATCHES = 50
"""Batches from which the running statistics of new batch norms are estimated."""


def fit_heads(method: Method, batches: Batches) -> bool:
    """Fit a method's linear heads on its frozen features, by the terms of its objective that depend on the heads.

    For a plain backbone this is logistic regression. Running statistics of the method's own batch norms are estimated
    first. Nothing else changes.

    Args:
        method: The network, on its device.
        batches: The training images in random order, in one or several augmented views.

    Returns:
        Whether the heads were fitted: False if the method has no linear heads, see ``Method.linear_heads``.
    """
    heads = method.linear_heads()
    if not heads:
        return False
    _set_new_statistics(method, batches)
    features, targets = embed(method, batches())
    widths = [head.in_features for head in heads.values()]
    fitted = fit_centred(
        dict(zip(heads, features.split(widths, 1), strict=True)),
        method.num_classes,
        PENALTY,
        lambda logits: torch.stack(list(method.head_terms(logits, targets).values())).sum(),
    )
    with torch.no_grad():
        for name, head in heads.items():
            weight, bias = fitted[name]
            head.weight.copy_(weight)
            head.bias.copy_(bias)
    return True


@torch.no_grad()
def _set_new_statistics(method: Method, batches: Batches) -> None:
    """Estimate the running statistics of the batch norms that are not pretrained."""
    new = {id(parameter) for parameter in method.new_parameters()}
    norms = [
        module
        for module in method.modules()
        if isinstance(module, _BatchNorm) and any(id(parameter) in new for parameter in module.parameters())
    ]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    with evaluation_mode(method):
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # plain average over the batches
            norm.train()
        for images, _ in islice(batches(), STATISTICS_BATCHES):
            method.embeddings(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
