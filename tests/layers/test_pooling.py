from typing import Literal

import pytest
import torch

from crossx.layers import global_pool
from crossx.layers.pooling import pooled_shares


def test_pooling_equals_a_loop() -> None:
    features = torch.randn(2, 3, 4, 5, 6)
    for b in range(2):
        for p in range(3):
            for c in range(4):
                values = features[b, p, c]
                assert global_pool(features, "max")[b, p, c] == values.max()
                assert global_pool(features, "avg")[b, p, c] == pytest.approx(values.mean().item(), abs=1e-6)


def test_gradient_of_max_is_shared_by_equal_places_as_that_of_amax() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randint(3, (2, 3, 4, 5, 2), generator=generator).double()
    gradients = []
    for pool in (lambda maps: global_pool(maps, "max"), lambda maps: maps.amax((3, 4))):
        leaf = features.clone().requires_grad_()
        pool(leaf).pow(3).sum().backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients)
    several = (features == features.amax((3, 4), keepdim=True)).sum((3, 4)) > 1
    assert several.any()


def test_gradient_of_max() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, 2, 3, 4, 3, dtype=torch.double, generator=generator, requires_grad=True)
    assert torch.autograd.gradcheck(lambda maps: global_pool(maps, "max"), (features,))


def test_shares_average_to_the_pooled_features() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randint(-3, 4, (2, 3, 4, 5, 6), generator=generator).double()
    for pooling in ("max", "avg"):
        shares = pooled_shares(features, pooling)
        torch.testing.assert_close(shares.mean((3, 4)), global_pool(features, pooling))
    largest = features == features.amax((3, 4), keepdim=True)
    assert pooled_shares(features, "max")[~largest].eq(0).all()


@pytest.mark.parametrize("pooling", ["avg", "max"])
def test_pooling_is_in_float32_under_autocast(pooling: Literal["avg", "max"]) -> None:
    # of 784 equal values, more than bfloat16 can count, as after a ReLU
    features = torch.cat((torch.zeros(1, 2, 1, 28, 28), torch.rand(1, 2, 3, 28, 28)), 2).bfloat16()
    results = []
    for pool in (
        lambda x: global_pool(x, pooling),
        lambda x: x.mean((3, 4)) if pooling == "avg" else x.amax((3, 4)),
    ):
        half = features.dtype if not results else torch.float64
        inputs = features.detach().to(half).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            pooled = pool(inputs)
        assert pooled.dtype == (torch.float32 if not results else torch.float64)
        (pooled * torch.arange(1.0, 5)).sum().backward()
        assert inputs.grad is not None
        results.append((pooled.double(), inputs.grad.double()))
    (pooled, gradient), (exact, exact_gradient) = results
    torch.testing.assert_close(pooled, exact, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradient, exact_gradient, rtol=0.005, atol=1e-6)


def test_pooling_keeps_half_precision_without_autocast() -> None:
    # the parameters of such a network are in half precision as well
    features = torch.rand(1, 2, 3, 4, 4).half()
    assert {global_pool(features, "avg").dtype, global_pool(features, "max").dtype} == {torch.float16}
