from itertools import product

import pytest
import torch
from torch import Tensor

from crossx.losses import reinforce_loss

ACTIONS = 4
"""A grid of 2 x 2 positions; a glimpse at one of them, then at another, whose probability depends on the first."""


@pytest.fixture
def policy() -> tuple[Tensor, Tensor]:
    """Logits of the first position, (4,), and of the second one after each first, (4, 4)."""
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(ACTIONS, dtype=torch.float64, generator=generator)
    second = torch.randn(ACTIONS, ACTIONS, dtype=torch.float64, generator=generator)
    return first.requires_grad_(), second.requires_grad_()


REWARDS = torch.rand(ACTIONS, ACTIONS, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("baseline", [[[0.0, 0.0]], [[0.5, -2.0]]])
def test_its_mean_over_all_actions_is_the_gradient_of_the_expected_reward(
    policy: tuple[Tensor, Tensor], baseline: list[list[float]]
) -> None:
    first, second = policy
    expected = (first.softmax(0)[:, None] * second.softmax(1) * REWARDS).sum()
    exact = torch.autograd.grad(-expected, policy)
    estimate = torch.zeros((), dtype=torch.float64)
    for one, two in product(range(ACTIONS), repeat=2):
        log_probs = torch.stack([first.log_softmax(0)[one], second.log_softmax(1)[one, two]])[None]
        surrogate, _ = reinforce_loss(log_probs, REWARDS[one, two].view(1, 1), torch.tensor(baseline))
        estimate = estimate + log_probs.detach().sum().exp() * surrogate
    torch.testing.assert_close(torch.autograd.grad(estimate, policy), exact)


def test_its_mean_over_samples_is_the_gradient_of_the_expected_reward(policy: tuple[Tensor, Tensor]) -> None:
    first, _ = policy
    rewards, samples = REWARDS[0], 200_000
    exact = torch.autograd.grad(-(first.softmax(0) * rewards).sum(), first)[0]
    distribution = torch.distributions.Categorical(logits=first)
    torch.manual_seed(0)
    actions = distribution.sample((samples, 1))
    surrogate, _ = reinforce_loss(distribution.log_prob(actions), rewards[actions], torch.tensor(0.5))
    estimate = torch.autograd.grad(surrogate, first)[0]
    torch.testing.assert_close(estimate, exact, atol=3 / samples**0.5, rtol=0)


def test_baseline_learns_the_mean_reward_and_the_policy_nothing_from_it() -> None:
    log_probs = torch.randn(5, 2, requires_grad=True)
    rewards, baseline = torch.rand(5, 1), torch.randn(1, 2, requires_grad=True)
    surrogate, error = reinforce_loss(log_probs, rewards, baseline)
    assert not torch.autograd.grad(surrogate, baseline, allow_unused=True, retain_graph=True)[0]
    assert not torch.autograd.grad(error, log_probs, allow_unused=True, retain_graph=True)[0]
    gradient = torch.autograd.grad(error, baseline)[0]
    torch.testing.assert_close(gradient, 2 * (baseline - rewards).mean(0, keepdim=True))


def test_actions_that_were_not_taken_do_not_count() -> None:
    log_probs = torch.tensor([[-1.0, -torch.inf], [-0.5, -2.0]], requires_grad=True)
    taken = torch.tensor([[True, False], [True, True]])
    surrogate, error = reinforce_loss(log_probs, torch.tensor([[1.0], [0.0]]), torch.tensor(0.25), taken)
    torch.testing.assert_close(surrogate, torch.tensor((0.75 - 0.25 * 0.5 - 0.25 * 2.0) / 2))
    torch.testing.assert_close(error, torch.tensor((0.75**2 + 2 * 0.25**2) / 2))
    surrogate.backward()
    assert log_probs.grad.tolist() == [[-0.375, 0.0], [0.125, 0.125]]
    half = [tensor.bfloat16() for tensor in (log_probs.detach(), torch.tensor([[1.0], [0.0]]))]
    assert reinforce_loss(*half, torch.tensor(0.25), taken)[0].dtype == torch.float32
