"""Parameter groups, optimisers and learning-rate schedules."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR

from crossx.backbones import EarlyLayers
from crossx.errors import UsageError
from crossx.methods.base import Method, Phase
from crossx.training.sections import OptimConfig

ONE_CYCLE_RISE = 0.3
"""Fraction of training in which ``one_cycle`` rises if no warm-up is given: PyTorch's default."""


def freeze(method: Method, config: OptimConfig) -> list[nn.Module]:
    """Switch off gradients according to ``freeze_backbone``, ``freeze_stride`` and ``freeze_batch_norm``.

    Returns:
        The batch norm layers of the pretrained trunks to be kept in evaluation mode.
    """
    if config.freeze_backbone:
        for parameter in pretrained_parameters(method):
            parameter.requires_grad_(False)
    early = _early_modules(method, config)
    frozen = {id(parameter) for module in early for parameter in module.parameters()}
    for parameter in pretrained_parameters(method):
        if id(parameter) in frozen:
            parameter.requires_grad_(False)
    norms = pretrained_norms(method)
    if not (config.freeze_backbone or config.freeze_batch_norm):
        norms = [norm for norm in norms if norm in early]
    for norm in norms:
        norm.requires_grad_(False)
    return norms


def _early_modules(method: Method, config: OptimConfig) -> set[nn.Module]:
    """Return the modules that ``freeze_stride`` keeps."""
    if config.freeze_stride is None:
        return set()
    try:
        layers = [
            layer for trunk in method.trunks() for layer in EarlyLayers(trunk, config.freeze_stride).layers
        ]
    except UsageError as error:
        raise UsageError(
            f"optim.freeze_stride {config.freeze_stride}: {error} Give one of these, or null and optim.cached_views 0."
        ) from error
    return {module for layer in layers for module in layer.modules()}


def pretrained_parameters(method: Method) -> list[nn.Parameter]:
    """Return the trunks' own parameters that do not start from scratch."""
    new = {id(parameter) for parameter in method.new_parameters()}
    own = (parameter for trunk in method.trunks() for parameter in trunk.pretrained_parameters())
    return [parameter for parameter in own if id(parameter) not in new]


def pretrained_norms(method: Method) -> list[nn.Module]:
    """Return the batch norm layers of the pretrained trunks."""
    pretrained = {id(parameter) for parameter in pretrained_parameters(method)}
    return [
        module
        for trunk in method.trunks()
        for module in trunk.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
        and all(id(parameter) in pretrained for parameter in module.parameters())
    ]


def untrained_norms(method: Method, phase: Phase) -> list[nn.Module]:
    """Return the batch norm layers of which a phase trains no parameter."""
    return [
        module
        for name, module in method.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
        and not any(f"{name}.{own}".startswith(phase.trains) for own in ("weight", "bias"))
    ]


def parameter_groups(method: Method, config: OptimConfig) -> list[dict[str, Any]]:
    """Group the trainable parameters by learning rate and weight decay.

    New layers train at ``lr * new_layers_lr_factor``, times the method's own factor (``Method.lr_factors``), the i-th
    of a trunk's n layer groups (from the input) at ``lr * layer_decay ** (n - i)``. Gates, heads and other layers that
    were taken from another network are not new: they train at ``lr``, or at the rate of new layers if that is lower,
    times the same factor of the method.
    Norm scales and biases are not decayed unless ``decay_norm_and_bias``.

    Raises:
        UsageError: If nothing is left to train.
    """
    factors = _lr_factors(method, config)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in method.named_parameters():
        if parameter.requires_grad:
            scale_or_bias = parameter.ndim <= 1 or name.endswith("bias")
            decay = config.weight_decay if config.decay_norm_and_bias or not scale_or_bias else 0.0
            lr = config.lr * factors.get(id(parameter), 1.0)
            groups.setdefault((lr, decay), []).append(parameter)
    if not groups:
        raise UsageError(
            "optim.freeze_backbone leaves nothing to train: this method has no layers of its own."
        )
    return [{"params": params, "lr": lr, "weight_decay": decay} for (lr, decay), params in groups.items()]


def build_optimizer(method: Method, config: OptimConfig) -> torch.optim.Optimizer:
    """Build the optimiser over ``parameter_groups``."""
    groups = parameter_groups(method, config)
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr)
    return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=config.nesterov)


def build_scheduler(
    optimizer: torch.optim.Optimizer, config: OptimConfig, *, steps_per_epoch: int, total_steps: int
) -> LRScheduler:
    """Build the learning-rate schedule, to be stepped after every optimiser step.

    Args:
        optimizer: Has the peak learning rates in its groups.
        config: The options.
        steps_per_epoch: Optimiser steps in one epoch.
        total_steps: Optimiser steps in the whole run.

    Raises:
        UsageError: If the rising part of ``one_cycle`` does not fit.
    """
    if config.schedule == "one_cycle":
        warmup = warmup_steps(config, steps_per_epoch)
        if not rise_fits(config, steps_per_epoch, total_steps):
            option = "warmup_epochs" if config.warmup_epochs else "warmup_steps"
            raise UsageError(
                f"optim.{option} {getattr(config, option):g} is {warmup:g} of {total_steps} steps; with one_cycle "
                "it must be more than one and fewer than all."
            )
        return OneCycleLR(
            optimizer,
            max_lr=[group["lr"] for group in optimizer.param_groups],
            total_steps=total_steps,
            pct_start=warmup / total_steps or ONE_CYCLE_RISE,
            cycle_momentum=config.optimizer == "adamw" or config.momentum > 0,
        )
    return LambdaLR(
        optimizer,
        lambda step: lr_factor(step, config, steps_per_epoch=steps_per_epoch, total_steps=total_steps),
    )


def warmup_steps(config: OptimConfig, steps_per_epoch: int) -> float:
    """Return the number of warm-up steps, which may be fractional."""
    return config.warmup_epochs * steps_per_epoch or config.warmup_steps


def rise_fits(config: OptimConfig, steps_per_epoch: int, total_steps: int) -> bool:
    """Whether the rising part that is given for ``one_cycle``, if any, fits into the training."""
    warmup = warmup_steps(config, steps_per_epoch)
    return config.schedule != "one_cycle" or not warmup or 1 < warmup < total_steps


def lr_factor(step: int, config: OptimConfig, *, steps_per_epoch: int, total_steps: int) -> float:
    """Return the learning rate after ``step`` optimiser steps as a fraction of the peak (not for ``one_cycle``).

    PyTorch's schedulers chain the warm-up as another scheduler, and have one final learning rate for all parameter
    groups; here each group has its own peak.
    """
    warmup = warmup_steps(config, steps_per_epoch)
    warm = min(1.0, (step + 1) / warmup) if warmup else 1.0
    epoch = step // steps_per_epoch
    if config.schedule == "step":
        return warm * config.gamma ** (epoch // config.step_size)
    if config.schedule == "multistep":
        return warm * config.gamma ** sum(epoch >= milestone for milestone in config.milestones)
    if config.schedule == "cosine":
        # with a longer warm-up, the decay still takes half of the training
        start = min(warmup, total_steps / 2)
        progress = min(1.0, max(0.0, step - start) / max(1.0, total_steps - start))
        share = 0.5 * (1 + math.cos(math.pi * progress))
        return warm * (config.min_lr_factor + (1 - config.min_lr_factor) * share)
    return warm


def _lr_factors(method: Method, config: OptimConfig) -> dict[int, float]:
    factors = {
        id(parameter): config.layer_decay ** (len(layers) - depth)
        for layers in (trunk.layer_groups() for trunk in method.trunks())
        for depth, group in enumerate(layers)
        for parameter in group
    }
    new = {id(parameter) for parameter in method.new_parameters()}
    own = method.lr_factors()
    for name, parameter in method.named_parameters():
        factor = next((own[prefix] for prefix in own if name.startswith(prefix)), 1.0)
        if id(parameter) in new:
            factors[id(parameter)] = config.new_layers_lr_factor * factor
        elif method.taken is not None and id(parameter) not in factors:
            factors[id(parameter)] = min(1.0, config.new_layers_lr_factor) * factor
    return factors


@contextmanager
def scaled_rates(optimizer: Any, factor: float) -> Iterator[None]:
    """Multiply the learning rates, and restore on exit those that the schedule has set."""
    groups = optimizer.param_groups if factor != 1 else ()
    rates = [group["lr"] for group in groups]
    for group in groups:
        group["lr"] *= factor
    yield
    for group, rate in zip(groups, rates, strict=True):
        group["lr"] = rate
