import math

import pytest
import torch
from scipy.optimize import brentq
from torch.nn import functional as F

from crossx.errors import UsageError
from crossx.losses import entropy_loss
from crossx.methods import MaxEnt, create_method


def build(**options: object) -> MaxEnt:
    torch.manual_seed(0)
    method = create_method("maxent", backbone="test_resnet", num_classes=5, **options)
    assert isinstance(method, MaxEnt)
    return method.eval()


@pytest.mark.parametrize("gamma", [0.0, 0.3, 2])
@pytest.mark.parametrize("soft", [False, True])
def test_objective_is_cross_entropy_less_entropy(gamma: float, soft: bool) -> None:
    method = build(gamma=gamma)
    images, targets = torch.randn(3, 3, 64, 64), torch.tensor([1, 4, 0])
    objective = method.objective(images, F.one_hot(targets, 5).float() if soft else targets)
    log_p = method(images).log_softmax(1)
    entropy = -(log_p.exp() * log_p).sum(1).mean()
    expected = {"data": -log_p[range(3), targets].mean(), "max_entropy": -gamma * entropy}
    torch.testing.assert_close(dict(objective.terms), expected)
    torch.testing.assert_close(objective.loss, sum(expected.values()))
    torch.testing.assert_close(objective.measures["entropy"], entropy)
    assert not objective.measures["entropy"].requires_grad


def test_the_network_is_the_plain_one() -> None:
    torch.manual_seed(0)
    plain, images = (
        create_method("plain", backbone="test_resnet", num_classes=5).eval(),
        torch.randn(2, 3, 64, 64),
    )
    assert build().state_dict().keys() == plain.state_dict().keys()
    assert torch.equal(build()(images), plain(images))
    classes = torch.tensor([1, 4])
    ours, theirs = (method.class_activation_maps(images, classes) for method in (build(), plain))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(("gamma", "classes"), [(0.1, 200), (1.0, 3), (1.0, 200)])
def test_confidence_that_is_left(gamma: float, classes: int) -> None:
    """The optimum of free logits: 1 / p = gamma log(p (K - 1) / (1 - p))."""
    left = brentq(lambda p: 1 / p - gamma * math.log(p * (classes - 1) / (1 - p)), 1 / classes, 1 - 1e-12)
    logits = torch.zeros(1, classes, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([logits], max_iter=200, line_search_fn="strong_wolfe", tolerance_grad=1e-9)

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(logits, torch.tensor([0])) + gamma * entropy_loss(logits)
        value.backward()
        return value

    optimizer.step(loss)
    assert logits.softmax(1)[0, 0].item() == pytest.approx(left, abs=1e-5)


@pytest.mark.parametrize("gamma", [-0.1, math.nan, math.inf])
def test_gamma_that_cannot_work(gamma: float) -> None:
    with pytest.raises(UsageError, match="gamma must be a finite number of at least 0"):
        build(gamma=gamma)
