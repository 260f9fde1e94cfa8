"""The batch as the ranks of a process group hold it together, and where half precision is too coarse.

DDP averages the gradients of the ranks. So that this average is the gradient of one process on the whole batch, a
batch sum goes through ``sum_over_ranks``, and a batch mean is weighed by the rank's share (``batch_mean``): with n_r
images on rank r of W, ``1/W sum_r (W n_r / sum n) mean_r`` is the mean over all images. The whole batch is that of one
backward pass: under gradient accumulation the micro-batch.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, distributed


def world_size() -> int:
    """Return the number of ranks, 1 without a process group."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_world_size()
    return 1


def is_leader() -> bool:
    """Say whether this is the one process of a training that writes and speaks.

    Before there is a process group, the launcher's environment variables tell (those that Lightning reads).
    """
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank() == 0
    launchers = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")
    return next((os.environ[name] for name in launchers if name in os.environ), "0") == "0"


class _SumOverRanks(torch.autograd.Function):
    """All-reduce through which gradients flow: each rank's share of the sum gets every rank's gradient."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        total = tensor.clone()
        distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone()
        distributed.all_reduce(total)
        return total


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Return the sum of every rank's tensor (one all-reduce, differentiable); in one process the tensor itself."""
    summed: Tensor = _SumOverRanks.apply(tensor) if world_size() > 1 else tensor
    return summed


def gather_over_ranks(tensor: Tensor) -> tuple[Tensor, int]:
    """Join every rank's tensor along the first dimension, in the order of the ranks; differentiable.

    Ranks may differ in the length of that dimension.

    Returns:
        The joined tensor (one all-reduce of its size, one of the lengths), and where in it this rank's begins. In one
        process the tensor itself and 0.
    """
    if world_size() == 1:
        return tensor, 0
    lengths = torch.zeros(world_size(), dtype=torch.int64, device=tensor.device)
    lengths[distributed.get_rank()] = len(tensor)
    lengths = sum_over_ranks(lengths)
    before = int(lengths[: distributed.get_rank()].sum())
    joined = tensor.new_zeros(int(lengths.sum()), *tensor.shape[1:])
    joined[before : before + len(tensor)] = tensor
    return sum_over_ranks(joined), before


def batch_mean(mean: Tensor, weight: float | Tensor) -> Tensor:
    """Turn the mean over this rank's images into its part of the mean over all ranks' images.

    The average of the parts over the ranks is the mean over the whole batch. In one process the mean stays as it is,
    and so it does where the ranks' weights are equal.

    Args:
        mean: Mean over the rank's images, a scalar.
        weight: What that mean was divided by: the number of images, or the sum of their weights.
    """
    ranks = world_size()
    if ranks == 1:
        return mean
    own = weight.detach() if isinstance(weight, Tensor) else mean.new_full((), weight, dtype=torch.float32)
    return mean * (own * ranks / sum_over_ranks(own))


def at_least_float32(tensor: Tensor) -> Tensor:
    """Return the tensor in float32 where it is in half precision, as it is in float32 and float64."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
