"""Linear heads fitted on frozen features: logistic regression by L-BFGS."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import TypeAlias, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from crossx.layers import evaluation_mode
from crossx.methods.base import Method

PENALTY = 3e-5
"""L2 penalty for features of unit mean square norm; ``probe`` chooses among ten values around it."""

MAX_VALUES = 2**29
"""Maximum number of feature values (2 GiB in float32); beyond it, the first images are used."""

MAX_ITERATIONS = 200
"""L-BFGS iterations; 17 to 66 were needed for 400 to 2,400 images of 80 classes."""

Name = TypeVar("Name", bound=Hashable)
Loss: TypeAlias = Callable[[dict[Name, Tensor]], Tensor]
"""Maps head name -> logits (N, ..., K) to a scalar."""

log = logging.getLogger(__name__)


def embed(method: Method, batches: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Return the embeddings (N, D) and targets (N,) of batches; see ``collect``."""
    features, targets = collect(method, batches, lambda images: {"": method.embeddings(images)})
    return features[""], targets


@torch.no_grad()
def collect(
    method: Method,
    batches: Iterable[tuple[Tensor, Tensor]],
    read: Callable[[Tensor], Mapping[str, Tensor]],
) -> tuple[dict[str, Tensor], Tensor]:
    """Return what ``read`` makes of the images of all batches, and the targets (N,), computed in evaluation mode.

    Reading stops at ``MAX_VALUES`` numbers, with a warning.

    Args:
        method: The network.
        batches: Normalised images (B, 3, H, W) and targets int64 (B,).
        read: Maps images to features by name, (B, ..., D).
    """
    seen: list[Mapping[str, Tensor]] = []
    targets: list[Tensor] = []
    with evaluation_mode(method):
        for images, labels in batches:
            seen.append({name: features.float() for name, features in read(images).items()})
            targets.append(labels)
            if len(seen) * sum(features.numel() for features in seen[0].values()) >= MAX_VALUES:
                count = sum(map(len, targets))
                log.warning(
                    "the features of %d training images fill 2 GiB: the head is fitted on those.", count
                )
                break
    return {name: torch.cat([batch[name] for batch in seen]) for name in seen[0]}, torch.cat(targets)


def fit_centred(
    features: Mapping[Name, Tensor], num_classes: int, penalty: float, loss: Loss[Name]
) -> dict[Name, tuple[Tensor, Tensor]]:
    """Fit linear heads on centred features whose heads have unit mean square norm together; see ``fit_linear``.

    Args:
        features: Head name -> float (N, ..., D), at least one. The dimensions between are of vectors that share a head.
        num_classes: K.
        penalty: L2 penalty on the weights for the scaled features, not on the biases.
        loss: The loss of the heads.

    Returns:
        Head name -> weight (K, D) and bias (K,) for the features as given.
    """
    # one mean per feature but one scale per head: the relative scales of the features carry information
    means = {name: x.flatten(0, -2).mean(0) for name, x in features.items()}  # (N, ..., D) -> (D,)
    centred = {name: x - means[name] for name, x in features.items()}
    width = math.sqrt(sum(x.shape[-1] for x in features.values()))
    scales = {name: _root_mean_square(x) * width for name, x in centred.items()}
    fitted = fit_linear({name: x / scales[name] for name, x in centred.items()}, num_classes, penalty, loss)
    unscaled = {}
    for name, (weight, bias) in fitted.items():
        weight = weight / scales[name]
        unscaled[name] = weight, bias - weight @ means[name]
    return unscaled


def fit_linear(
    features: Mapping[Name, Tensor], num_classes: int, penalty: float, loss: Loss[Name]
) -> dict[Name, tuple[Tensor, Tensor]]:
    """Minimise the loss of linear heads plus ``penalty / 2`` times their squared weights, by L-BFGS from zero.

    Args:
        features: Head name -> float (N, ..., D).
        num_classes: K.
        penalty: L2 penalty on the weights, not on the biases.
        loss: The loss of the heads, to which the penalty is added.

    Returns:
        Head name -> weight (K, D) and bias (K,).
    """
    fitted = {
        name: (
            x.new_zeros(num_classes, x.shape[-1]).requires_grad_(),
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


def _root_mean_square(values: Tensor) -> Tensor:
    # constant features, as of a single image, stay 0
    return values.square().mean().sqrt().clamp(min=torch.finfo(values.dtype).tiny)
