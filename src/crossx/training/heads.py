"""Fit the heads on frozen features before the network is trained.

Linear probing, then fine-tuning (LP-FT; Kumar et al., ICLR 2022, https://arxiv.org/abs/2202.10054): random heads send
large gradients into the pretrained layers and distort their features; fitted heads do not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from itertools import islice

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from crossx.layers import evaluation_mode
from crossx.methods.base import Method

Batches = Callable[[], Iterable[tuple[Tensor, Tensor]]]
"""Starts a pass over normalised images (B, 3, H, W) on the device, and targets int64 (B,)."""

PENALTY = 3e-5
"""L2 penalty for features of unit mean square norm; docs/results.md compares others."""

MAX_VALUES = 2**29
"""Maximum number of feature values (2 GiB in float32); beyond it, the first images are used."""

STATISTICS_BATCHES = 50
"""Batches from which the running statistics of new batch norms are estimated."""

MAX_ITERATIONS = 200
"""L-BFGS iterations; 17 to 66 were needed for 400 to 2,400 images of 80 classes."""


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
    features, targets = _embed(method, batches)
    widths = [head.in_features for head in heads.values()]
    # one mean per feature but one scale per head: the relative scales of the features carry information
    means = features.mean(0)
    blocks = (features - means).split(widths, 1)
    scales = [_root_mean_square(block) * math.sqrt(sum(widths)) for block in blocks]
    fitted = fit_linear(
        {name: block / scale for name, block, scale in zip(heads, blocks, scales, strict=True)},
        method.num_classes,
        PENALTY,
        lambda logits: torch.stack(list(method.head_terms(logits, targets).values())).sum(),
    )
    with torch.no_grad():
        for (name, head), scale, mean in zip(heads.items(), scales, means.split(widths), strict=True):
            weight, bias = fitted[name]
            head.weight.copy_(weight / scale)
            head.bias.copy_(bias - head.weight @ mean.to(head.weight))
    return True


def fit_linear(
    features: Mapping[str, Tensor],
    num_classes: int,
    penalty: float,
    loss: Callable[[dict[str, Tensor]], Tensor],
) -> dict[str, tuple[Tensor, Tensor]]:
    """Minimise the loss of linear heads plus ``penalty / 2`` times their squared weights, by L-BFGS from zero.

    Args:
        features: Head name -> float (N, D).
        num_classes: K.
        penalty: L2 penalty on the weights, not on the biases.
        loss: Maps head name -> logits (N, K) to a scalar.

    Returns:
        Head name -> weight (K, D) and bias (K,).
    """
    fitted = {
        name: (
            x.new_zeros(num_classes, x.shape[1]).requires_grad_(),
            x.new_zeros(num_classes).requires_grad_(),
        )
        for name, x in features.items()
    }
    optimizer = torch.optim.LBFGS(
        [parameter for pair in fitted.values() for parameter in pair],
        max_iter=MAX_ITERATIONS,
        tolerance_grad=1e-5,
        tolerance_change=1e-7,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        logits = {name: F.linear(x, *fitted[name]) for name, x in features.items()}
        squares = [weight.square().sum() for weight, _ in fitted.values()]
        total = loss(logits) + penalty / 2 * torch.stack(squares).sum()
        total.backward()
        return total

    optimizer.step(closure)
    return {name: (weight.detach(), bias.detach()) for name, (weight, bias) in fitted.items()}


@torch.no_grad()
def _embed(method: Method, batches: Batches) -> tuple[Tensor, Tensor]:
    """Return embeddings (N, D) and targets (N,)."""
    features: list[Tensor] = []
    targets: list[Tensor] = []
    with evaluation_mode(method):
        for images, labels in batches():
            features.append(method.embeddings(images).float())
            targets.append(labels)
            if len(features) * features[0].numel() >= MAX_VALUES:
                break
    return torch.cat(features), torch.cat(targets)


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


def _root_mean_square(values: Tensor) -> Tensor:
    # constant features, as of a single image, stay 0
    return values.square().mean().sqrt().clamp(min=torch.finfo(values.dtype).tiny)
