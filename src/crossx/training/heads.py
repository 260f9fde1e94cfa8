"""Fit the heads on frozen features before the network is trained.

Linear probing, then fine-tuning (LP-FT; Kumar et al., ICLR 2022, https://arxiv.org/abs/2202.10054): random heads send
large gradients into the pretrained layers and distort their features; fitted heads do not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import islice

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from crossx.layers import PartLinear, evaluation_mode
from crossx.methods.base import Method
from crossx.methods.linear import PENALTY, collect, fit_centred

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
    features, targets = collect(method, batches(), method.head_features)
    # each layer of a PartLinear is fitted as a head of its own
    columns: dict[tuple[str, int], Tensor] = {}
    for name, head in heads.items():
        if isinstance(head, PartLinear):
            # (N, P, D) -> P x (N, D)
            columns |= {(name, part): own for part, own in enumerate(features[name].unbind(1))}
        else:
            columns[name, 0] = features[name]

    def loss(logits: Mapping[tuple[str, int], Tensor]) -> Tensor:
        terms = method.head_terms(_of_heads(heads, logits), targets)
        return torch.stack(list(terms.values())).sum()

    fitted = fit_centred(columns, method.num_classes, PENALTY, loss)
    weights = _of_heads(heads, {key: weight for key, (weight, _) in fitted.items()}, 0)
    biases = _of_heads(heads, {key: bias for key, (_, bias) in fitted.items()}, 0)
    with torch.no_grad():
        for name, head in heads.items():
            head.weight.copy_(weights[name])
            head.bias.copy_(biases[name])
    method.start_from_fitted()
    return True


def _of_heads(
    heads: Mapping[str, nn.Module], values: Mapping[tuple[str, int], Tensor], dim: int = 1
) -> dict[str, Tensor]:
    """Return head name -> its value, or those of the layers of a ``PartLinear``, stacked along a dimension."""
    return {
        name: torch.stack([value for (of, _), value in values.items() if of == name], dim)
        if isinstance(head, PartLinear)
        else values[name, 0]
        for name, head in heads.items()
    }


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
