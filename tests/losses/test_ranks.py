"""Every loss over two ranks against the same in one process."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from crossx.distributed import batch_mean, gather_over_ranks, sum_over_ranks
from crossx.losses import (
    ClassificationLoss,
    assignment_entropy_loss,
    background_presence_loss,
    c3s_loss,
    centroid_concentration_loss,
    classification_loss,
    concentration_loss,
    cross_layer_loss,
    diversity_loss,
    entropy_loss,
    equivariance_loss,
    mamc_loss,
    orthogonality_loss,
    presence_loss,
    ranking_loss,
    reinforce_loss,
    separation_loss,
    total_variation_loss,
    view_loss,
)
from distributed import run_on_two_ranks


def shares(parts: Sequence[Tensor]) -> Tensor:
    """Return P maps of a row each, (B, P, 1, 3), from P tensors (B, 3)."""
    return torch.stack(tuple(parts), 1)[:, :, None].softmax(3)


WEIGHTS = torch.tensor([0.5, 1.0, 4.0])
LOSSES = {
    "classes": lambda logits, targets: classification_loss(logits, targets.argmax(1)),
    "smoothing": lambda logits, targets: classification_loss(logits, targets.argmax(1), None, 0.1),
    "weights": lambda logits, targets: classification_loss(logits, targets.argmax(1), WEIGHTS),
    "both": lambda logits, targets: classification_loss(logits, targets.argmax(1), WEIGHTS, 0.1),
    "probabilities": lambda logits, targets: classification_loss(logits, targets, None, 0.1),
    "weighted probabilities": lambda logits, targets: classification_loss(logits, targets, WEIGHTS),
    "cross-layer": lambda logits, targets: cross_layer_loss(logits, targets),
    "entropy": lambda logits, targets: entropy_loss(logits),
    "mamc pairs": lambda *parts: mamc_loss(torch.stack(parts, 1), parts[1].argmax(1)),
    "mamc features": lambda *parts: mamc_loss(torch.stack(parts, 1), parts[1].argmax(1), False, "features"),
    "mamc positives": lambda *parts: mamc_loss(
        torch.stack(parts, 1), parts[1].argmax(1), True, "positives", 4.0
    ),
    "ranking": lambda scores, losses: ranking_loss(scores, losses),
    "policy": lambda log_probs, rewards: reinforce_loss(log_probs, rewards, torch.tensor(0.3))[0],
    "baseline": lambda baseline, rewards: reinforce_loss(-rewards, rewards, baseline, rewards > 0.2)[1],
    "concentration": lambda *parts: concentration_loss(torch.stack(parts, 1)[:, :, None].softmax(3)),
    "diversity": lambda *parts: diversity_loss(torch.stack(parts, 1)[:, :, None].softmax(3)),
    "centroid": lambda *parts: centroid_concentration_loss(shares(parts)),
    "orthogonality": lambda *parts: orthogonality_loss(torch.stack(parts, 1)),
    "equivariance": lambda first, second: equivariance_loss(shares([first]), shares([second])),
    "presence": lambda *parts: presence_loss(shares(parts)),
    "background": lambda *parts: background_presence_loss(shares(parts)[:, 0]),
    "variation": lambda *parts: total_variation_loss(shares(parts)),
    "assignment": lambda *parts: assignment_entropy_loss(shares(parts)),
    "c3s paper": lambda *parts: c3s_loss(torch.stack(parts, 1), "paper"),
    "c3s released": lambda *parts: c3s_loss(torch.stack(parts, 1), "released"),
    "view": lambda first, second: view_loss(
        first[:, None, None], second[:, None, None], torch.ones(len(first), 1, 3)
    ),
    "c3s centred": lambda *parts: c3s_loss(torch.stack(parts, 1), centred=True),
    "separation": lambda *parts: separation_loss(
        torch.stack(parts, 1)[:, :, None].softmax(3), torch.ones(len(parts[0]), 1, 3)
    ),
}
SPLITS = {"even": 3, "uneven": 4, "one": 5}
"""How many of six images the first of two ranks has."""


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits, targets = torch.randn(2, 6, 3, generator=generator)
    return logits, targets.softmax(1)


def on_rank(rank: int, folder: Path) -> None:
    results = {}
    for split, first in SPLITS.items():
        own = slice(first) if rank == 0 else slice(first, None)
        for name, loss in LOSSES.items():
            logits, targets = (tensor[own].clone().requires_grad_() for tensor in batch())
            value = loss(logits, targets)
            value.backward()
            results[split, name] = value.detach(), logits.grad, targets.grad
    torch.save(results, folder / f"rank{rank}.pt")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    folder = tmp_path_factory.mktemp("ranks")
    run_on_two_ranks(on_rank, folder)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", LOSSES)
def test_the_average_over_ranks_is_one_process(ranks: list[dict], split: str, name: str) -> None:
    logits, targets = (tensor.requires_grad_() for tensor in batch())
    loss = LOSSES[name](logits, targets)
    loss.backward()
    values, of_logits, of_targets = zip(*(rank[split, name] for rank in ranks), strict=True)
    torch.testing.assert_close(sum(values) / 2, loss.detach())
    if name.startswith(("c3s", "presence")):
        assert values[0] == values[1]
    # DDP divides the sum over ranks by their number.
    torch.testing.assert_close(torch.cat(of_logits) / 2, logits.grad)
    if targets.grad is not None:
        torch.testing.assert_close(torch.cat(of_targets) / 2, targets.grad)


def test_one_process_computes_what_torch_computes_bit_for_bit() -> None:
    logits, targets = batch()
    classes = targets.argmax(1)
    for weights in (None, WEIGHTS):
        for smoothing in (0.0, 0.1):
            ours, theirs = (
                ClassificationLoss(weights, smoothing),
                nn.CrossEntropyLoss(weights, label_smoothing=smoothing),
            )
            assert torch.equal(ours(logits, classes), theirs(logits, classes))
            assert torch.equal(ours(logits, targets), theirs(logits, targets))
            assert not ours.state_dict()
    mean = F.mse_loss(logits, targets)
    assert batch_mean(mean, 6) is mean
    assert sum_over_ranks(logits) is logits
    assert gather_over_ranks(logits) == (logits, 0)
