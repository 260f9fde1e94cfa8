import itertools

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crossx.losses import RankingLoss, ranking_loss, scale_ranking_loss

rows = st.lists(st.floats(-5, 5), min_size=4, max_size=4)
# few values, so that equals occur
ties = st.lists(st.sampled_from([0.1, 0.5, 0.5, 2.0]), min_size=4, max_size=4)


def naive(scores: list[list[float]], losses: list[list[float]], margin: float) -> float:
    """The printed sum over pairs with Python floats."""
    total = 0.0
    for score, loss in zip(scores, losses, strict=True):
        for i in range(len(score)):
            for s in range(len(score)):
                sure_of_i, sure_of_s = -loss[i], -loss[s]
                if sure_of_i < sure_of_s:
                    total += max(0.0, margin - (score[s] - score[i]))
    return total / len(scores)


@settings(max_examples=50)
@given(pairs=st.lists(st.tuples(rows, ties), min_size=1, max_size=3), margin=st.floats(0, 2))
def test_equals_the_printed_sum(pairs: list[tuple[list[float], list[float]]], margin: float) -> None:
    scores, losses = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    loss = RankingLoss(margin)(torch.tensor(scores).double(), torch.tensor(losses).double())
    expected = torch.tensor(naive(torch.tensor(scores).double().tolist(), losses, margin)).double()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)


def test_the_right_order_with_the_margin_costs_nothing() -> None:
    losses = torch.tensor([[0.1, 0.5, 0.9]])
    assert ranking_loss(torch.tensor([[4.0, 2.0, 1.0]]), losses) == 0
    assert ranking_loss(torch.tensor([[1.0, 2.0, 4.0]]), losses) == 2 + 3 + 4
    assert ranking_loss(torch.randn(2, 3), torch.ones(2, 3)) == 0


def test_gradients_flow_to_the_scores_alone() -> None:
    scores = torch.randn(3, 5, dtype=torch.double, requires_grad=True)
    losses = torch.rand(3, 5, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(lambda scores: ranking_loss(scores, losses), scores)
    ranking_loss(scores, losses).backward()
    assert losses.grad is None
    # a gradient step raises the better and lowers the worse: nothing is added
    torch.testing.assert_close(scores.grad.sum(1), torch.zeros(3, dtype=torch.double))


chances = st.lists(st.floats(0, 1), min_size=3, max_size=3)


@settings(max_examples=50)
@given(rows=st.lists(chances, min_size=1, max_size=3), margin=st.floats(0, 0.5))
def test_scales_are_ranked_by_the_printed_sum(rows: list[list[float]], margin: float) -> None:
    total = 0.0
    for row in rows:
        for coarse, fine in itertools.pairwise(row):
            total += max(0.0, coarse - fine + margin)
    loss = scale_ranking_loss(torch.tensor(rows, dtype=torch.double), margin)
    torch.testing.assert_close(loss, torch.tensor(total / len(rows), dtype=torch.double))


def test_scales_that_grow_more_confident_cost_nothing() -> None:
    growing = torch.tensor([[0.2, 0.3, 0.5]], requires_grad=True)
    loss = scale_ranking_loss(growing)
    loss.backward()
    assert loss == 0
    assert not growing.grad.any()
