"""REINFORCE: the policy gradient of sampled actions, with a learnt baseline."""

from __future__ import annotations

import torch
from torch import Tensor

from crossx.distributed import at_least_float32, batch_mean


def reinforce_loss(
    log_probs: Tensor, rewards: Tensor, baseline: Tensor, taken: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return a scalar whose gradient raises the expected reward, and the squared error of the baseline.

    REINFORCE (Williams 1992, https://doi.org/10.1007/BF00992696): the first is ``-sum_t log_prob_t * (reward_t -
    baseline_t)``, averaged over images. Its value means nothing; its gradient with respect to the policy is an unbiased
    estimate of that of the negative expected reward, with any baseline that does not depend on the action. The second
    is ``sum_t (baseline_t - reward_t)^2``, averaged over images. In a process group both are the rank's parts of the
    mean over the whole batch (``crossx.distributed``).

    Args:
        log_probs: Log-probabilities of the sampled actions, (B, T). Only they receive gradients from the first.
        rewards: (B, T), or (B, 1) for one reward of all actions.
        baseline: The expected reward as learnt, of a shape that broadcasts to (B, T). Only it receives gradients from
            the second.
        taken: bool (B, T), False for actions that do not count; default: all count.
    """
    log_probs, rewards, baseline = (at_least_float32(tensor) for tensor in (log_probs, rewards, baseline))
    advantages = (rewards - baseline).detach()
    surrogates = -log_probs * advantages
    errors = (baseline - rewards.detach()).square().expand_as(surrogates)
    if taken is not None:
        # not a product: the log-probability of an action that was not taken may be infinite
        surrogates, errors = (torch.where(taken, values, 0.0) for values in (surrogates, errors))
    # (B, T) -> (B,) -> scalar
    surrogate, error = (batch_mean(values.sum(1).mean(), len(log_probs)) for values in (surrogates, errors))
    return surrogate, error
