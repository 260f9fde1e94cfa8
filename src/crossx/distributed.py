"""Sums and means over the ranks of a process group, and float32 where half precision is too coarse.

DDP averages the gradients of the ranks. To make this average the gradient of the whole batch, sum over the batch with
``sum_over_ranks`` and weight a mean over the rank's images with ``batch_mean``: with n_r images on rank r of W,
``1/W sum_r (W n_r / sum n) mean_r`` is the mean over all images. The whole batch is the one of a backward pass, under
gradient accumulation the micro-batch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed

from crossx.terminal import is_first_process


def has_process_group() -> bool:
    """Whether this process belongs to a process group."""
    return distributed.is_available() and distributed.is_initialized()


def world_size() -> int:
    """Return the number of ranks, 1 without a process group."""
    return distributed.get_world_size() if has_process_group() else 1


def rank() -> int:
    """Return this process's rank, 0 without a process group."""
    return distributed.get_rank() if has_process_group() else 0


def is_leader() -> bool:
    """Whether this is the process of a training that writes and prints.

    Before there is a process group, the environment decides, see ``is_first_process``.
    """
    return rank() == 0 if has_process_group() else is_first_process()


def gather(value: Any) -> list[Any]:
    """Return the values of all ranks, on every rank."""
    gathered = [value] * world_size()
    if len(gathered) > 1:
        distributed.all_gather_object(gathered, value)
    return gathered


class _SumOverRanks(torch.autograd.Function):
    """A differentiable all-reduce: the gradient of each rank's tensor is the sum of every rank's gradients."""

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
    """Return the sum of every rank's tensor (a differentiable all-reduce); in one process the tensor itself."""
    summed: Tensor = _SumOverRanks.apply(tensor) if world_size() > 1 else tensor
    return summed


def gather_over_ranks(tensor: Tensor) -> tuple[Tensor, int]:
    """Concatenate every rank's tensor along the first dimension, in the order of the ranks; differentiable.

    The length of that dimension may differ between ranks.

    Returns:
        The concatenated tensor (one all-reduce of its size, one of the lengths), and the index where this rank's part
        begins. In one process the tensor itself and 0.
    """
    if world_size() == 1:
        return tensor, 0
    lengths = torch.zeros(world_size(), dtype=torch.int64, device=tensor.device)
    lengths[rank()] = len(tensor)
    lengths = sum_over_ranks(lengths)
    before = int(lengths[: rank()].sum())
    joined = tensor.new_zeros(int(lengths.sum()), *tensor.shape[1:])
    joined[before : before + len(tensor)] = tensor
    return sum_over_ranks(joined), before


def batch_mean(mean: Tensor, weight: float | Tensor) -> Tensor:
    """Weight the mean over this rank's images so that the average over the ranks is the mean over the whole batch.

    In one process, or with equal weights on all ranks, the mean does not change.

    Args:
        mean: Mean over the rank's images, a scalar.
        weight: The divisor of that mean: the number of images, or the sum of their weights.
    """
    ranks = world_size()
    if ranks == 1:
        return mean
    own = weight.detach() if isinstance(weight, Tensor) else mean.new_full((), weight, dtype=torch.float32)
    return mean * (own * ranks / sum_over_ranks(own))


def reduction_dtype(tensor: Tensor) -> torch.dtype:
    """Return the type to reduce a tensor in: at least float32 under autocast, else the tensor's own.

    Without autocast a network in half precision has parameters in half precision, which take no float32.
    """
    if torch.is_autocast_enabled(tensor.device.type):
        return torch.promote_types(tensor.dtype, torch.float32)
    return tensor.dtype


def at_least_float32(tensor: Tensor) -> Tensor:
    """Return the tensor in float32 if it is in half precision, else unchanged."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
