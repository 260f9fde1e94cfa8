import copy

import pytest
import torch
from torch import nn

from crossx.layers import recompute


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(4, 2, 3)
    )


@pytest.mark.parametrize("training", [True, False])
def test_is_the_same_training(training: bool) -> None:
    plain = network().train(training)
    saving = copy.deepcopy(plain)
    images = torch.randn(4, 3, 8, 8)
    for _ in range(2):
        torch.manual_seed(1)
        expected = plain(images)
        torch.manual_seed(1)
        actual = recompute(saving, images, norms_of=saving)
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)
        expected.square().sum().backward()
        actual.square().sum().backward()
    for own, other in zip(saving.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(own.grad, other.grad, rtol=0, atol=0)
    torch.testing.assert_close(saving.state_dict(), plain.state_dict(), rtol=0, atol=0)
    assert saving[1].momentum == plain[1].momentum


def test_keeps_nothing_but_the_inputs() -> None:
    kept = []
    model, images = network(), torch.randn(4, 3, 8, 8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append(tensor.shape) or tensor, lambda x: x
    ):
        recompute(model, images, norms_of=model)
    assert [shape for shape in kept if len(shape) == 4 and shape[0] == 4] in ([], [images.shape])


def test_without_gradients_it_is_a_plain_call() -> None:
    model = network()
    with torch.no_grad():
        assert not recompute(model, torch.randn(4, 3, 8, 8), norms_of=model).requires_grad
