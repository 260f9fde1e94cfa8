import math

import pytest
import torch
from torch.nn import functional as F

from crossx.errors import UsageError
from crossx.layers import BilinearPooling, TaylorSeriesKernel, evaluation_mode, signed_sqrt
from crossx.layers.kernel_pooling import gaussian_composition


@pytest.mark.parametrize("gamma", [0.3, 1.0, 4.0])
def test_the_composition_is_the_taylor_series_of_a_gaussian(gamma: float) -> None:
    x, y = F.normalize(torch.randn(2, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    squares = gaussian_composition(60, gamma).double() ** 2
    series = sum(squares[i] * (x @ y) ** i for i in range(61))
    gaussian = math.exp(-gamma * float((x - y).square().sum()))
    assert float(series) == pytest.approx(gaussian, rel=1e-5)


def test_a_short_series_has_the_ratios_of_the_long_one() -> None:
    short, long = gaussian_composition(4, 2.0), gaussian_composition(60, 2.0)
    torch.testing.assert_close(short / short[0], long[:5] / long[0])
    assert float(short.square().sum()) == pytest.approx(1)


def test_features_are_the_powers_weighed_by_the_composition() -> None:
    kernel = TaylorSeriesKernel(5, 3, 8, gamma=0.7)
    features = torch.randn(2, 4, 5)
    pooled = kernel(features)
    assert pooled.shape == (2, 1 + 5 + 2 * 8)
    alpha = kernel.composition
    sketches = kernel.sketch(features)
    torch.testing.assert_close(pooled[:, 0], alpha[0].expand(2))
    torch.testing.assert_close(pooled[:, 1:6], alpha[1] * sum(features[:, n] for n in range(4)) / 4)
    torch.testing.assert_close(pooled[:, 6:14], alpha[2] * sketches[:, 0])
    torch.testing.assert_close(pooled[:, 14:], alpha[3] * sketches[:, 1])


@pytest.mark.slow
def test_inner_products_are_the_kernel_in_expectation() -> None:
    """With one position per image and unit vectors, a long series is the Gaussian itself."""
    generator = torch.Generator().manual_seed(1)
    features = F.normalize(torch.randn(2, 6, generator=generator, dtype=torch.float64) + 0.8)
    gamma, draws = 0.5, 1500
    exact = math.exp(-gamma * float((features[0] - features[1]).square().sum()))
    estimates = torch.empty(draws, dtype=torch.float64)
    with torch.no_grad():
        for seed in range(draws):
            ours, theirs = TaylorSeriesKernel(6, 6, 64, gamma, seed).double()(features[:, None])
            estimates[seed] = ours @ theirs
    error = float(estimates.std()) / draws**0.5
    assert abs(float(estimates.mean()) - exact) < 5 * error + 1e-3
    assert error < 0.02 * exact


def test_gradients_of_features_and_composition() -> None:
    kernel = TaylorSeriesKernel(3, 3, 5).double()
    features = torch.randn(2, 3, 3, dtype=torch.float64, requires_grad=True)

    def head(features: torch.Tensor, composition: torch.Tensor) -> torch.Tensor:
        pooled = torch.func.functional_call(kernel, {"composition": composition}, (features,))
        return F.normalize(signed_sqrt(pooled))

    composition = kernel.composition.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(head, (features, composition), atol=1e-4)


def test_bilinear_pooling_is_the_mean_outer_product() -> None:
    features = torch.randn(2, 4, 3)
    expected = torch.zeros(2, 3, 3)
    for image in range(2):
        for place in range(4):
            for a in range(3):
                for b in range(3):
                    expected[image, a, b] += features[image, place, a] * features[image, place, b] / 4
    torch.testing.assert_close(BilinearPooling()(features), expected)


def test_signed_sqrt_keeps_signs_and_has_a_slope_at_zero() -> None:
    values = torch.tensor([-4.0, -0.25, 0.0, 9.0], requires_grad=True)
    roots = signed_sqrt(values)
    torch.testing.assert_close(roots, torch.tensor([-2.0, -0.5, 0.0, 3.0]), rtol=1e-5, atol=0)
    roots.sum().backward()
    assert torch.isfinite(values.grad).all()


def test_evaluation_mode_gives_every_module_its_own_mode_back() -> None:
    network = torch.nn.Sequential(torch.nn.BatchNorm2d(2), torch.nn.Dropout())
    network.train()
    network[0].eval()
    with evaluation_mode(network):
        assert not any(module.training for module in network.modules())
    assert [module.training for module in network.modules()] == [True, False, True]


@pytest.mark.parametrize("gamma", [0, -1.0, math.inf, math.nan])
def test_gamma_that_cannot_work(gamma: float) -> None:
    with pytest.raises(UsageError, match="gamma must be above 0"):
        gaussian_composition(4, gamma)
