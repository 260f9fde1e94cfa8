import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from crossx.errors import UsageError
from crossx.layers import MergedFeatures


def trained(last: int, previous: int, parts: int, interpolation: str = "bilinear") -> MergedFeatures:
    """A layer whose batch norm has statistics of its own."""
    torch.manual_seed(0)
    merge = MergedFeatures(last, previous, parts, interpolation).double()  # type: ignore[arg-type]
    nn.init.normal_(merge.norm.running_mean)
    nn.init.uniform_(merge.norm.running_var, 0.5, 2)
    nn.init.normal_(merge.norm.weight)
    nn.init.normal_(merge.norm.bias)
    return merge.eval()


def naive_merge(merge: MergedFeatures, previous: Tensor, last: Tensor) -> Tensor:
    """Eq. 5 one part at a time, with layers that know nothing of groups."""
    parts, width = merge.num_parts, previous.shape[2]
    maps = []
    for p in range(parts):
        rows = slice(p * width, (p + 1) * width)
        reduced = F.conv2d(last[:, p], merge.reduce.weight[rows])
        resized = nn.Upsample(size=previous.shape[-2:], mode=merge.interpolation)(reduced)
        smooth = F.conv2d(previous[:, p] + resized, merge.smooth.weight[rows], padding=1)
        mean, var = merge.norm.running_mean[rows], merge.norm.running_var[rows]
        weight, bias = merge.norm.weight[rows], merge.norm.bias[rows]
        if merge.training:
            mean, var = smooth.mean((0, 2, 3)), smooth.var((0, 2, 3), unbiased=False)
        shape = (1, -1, 1, 1)
        normed = (smooth - mean.view(shape)) / (var.view(shape) + merge.norm.eps).sqrt()
        maps.append(normed * weight.view(shape) + bias.view(shape))
    return torch.stack(maps, 1)


@pytest.mark.parametrize("interpolation", ["bilinear", "nearest"])
@pytest.mark.parametrize("training", [True, False])
def test_equals_one_part_at_a_time(interpolation: str, training: bool) -> None:
    merge = trained(6, 4, 3, interpolation).train(training)
    previous = torch.randn(2, 3, 4, 8, 6, dtype=torch.double)
    last = torch.randn(2, 3, 6, 4, 3, dtype=torch.double)
    torch.testing.assert_close(merge(previous, last), naive_merge(merge, previous, last))


sizes = st.tuples(st.integers(1, 13), st.integers(1, 13))


@settings(max_examples=60)
@given(
    previous=sizes,
    last=sizes,
    parts=st.integers(1, 3),
    interpolation=st.sampled_from(["bilinear", "nearest"]),
)
def test_pooled_needs_no_maps(
    previous: tuple[int, int], last: tuple[int, int], parts: int, interpolation: str
) -> None:
    merge = trained(3, 2, parts, interpolation)
    previous_features = torch.randn(2, parts, 2, *previous, dtype=torch.double)
    last_features = torch.randn(2, parts, 3, *last, dtype=torch.double)
    expected = merge(previous_features, last_features).mean((3, 4))
    torch.testing.assert_close(
        merge.pooled(previous_features, last_features), expected, rtol=1e-9, atol=1e-12
    )


@settings(max_examples=10)
@given(last=sizes)
def test_interpolation_does_not_matter_in_evaluation_for_maps_of_twice_the_size(
    last: tuple[int, int],
) -> None:
    merge = trained(3, 2, 2)
    previous_features = torch.randn(2, 2, 2, 2 * last[0], 2 * last[1], dtype=torch.double)
    last_features = torch.randn(2, 2, 3, *last, dtype=torch.double)
    pooled = []
    for interpolation in ("bilinear", "nearest"):
        merge.interpolation = interpolation  # type: ignore[assignment]
        pooled.append(merge(previous_features, last_features).mean((3, 4)))
    torch.testing.assert_close(*pooled)


def test_pooled_in_training_follows_the_batch_statistics() -> None:
    merge = trained(3, 2, 2).train()
    previous = torch.randn(4, 2, 2, 5, 5, dtype=torch.double)
    last = torch.randn(4, 2, 3, 3, 3, dtype=torch.double)
    expected = naive_merge(merge, previous, last).mean((3, 4))
    torch.testing.assert_close(merge.pooled(previous, last), expected)


def test_gradients_of_the_pooled_form() -> None:
    merge = trained(3, 2, 2)
    previous = torch.randn(2, 2, 2, 5, 4, dtype=torch.double, requires_grad=True)
    last = torch.randn(2, 2, 3, 3, 2, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(merge.pooled, (previous, last))


def test_kernels_start_as_in_the_released_code() -> None:
    torch.manual_seed(0)
    merge = MergedFeatures(64, 32, 2)
    assert merge.reduce.weight.std().item() == pytest.approx((2 / 32) ** 0.5, rel=0.05)
    assert merge.smooth.weight.std().item() == pytest.approx((2 / (9 * 32)) ** 0.5, rel=0.05)


def batch(parts: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    previous = torch.randn(4, parts, 2, 7, 5, dtype=torch.double, generator=generator)
    return previous, torch.randn(4, parts, 3, 4, 3, dtype=torch.double, generator=generator)


def convolved(merge: MergedFeatures, previous: Tensor, last: Tensor) -> Tensor:
    """What the batch norm sees, (B, P C, H, W)."""
    resized = F.interpolate(merge.reduce(last.flatten(1, 2)), previous.shape[-2:], mode=merge.interpolation)
    return merge.smooth(previous.flatten(1, 2) + resized)


def test_training_leaves_the_statistics_that_the_batch_norm_itself_would() -> None:
    ours, torchs = trained(3, 2, 2).train(), trained(3, 2, 2).train()
    for _ in range(2):
        torch.testing.assert_close(ours.pooled(*batch()), torchs(*batch()).mean((3, 4)))
    torch.testing.assert_close(ours.state_dict(), torchs.state_dict())


def test_gradients_in_training_equal_those_through_the_normalised_maps() -> None:
    gradients = []
    for pooled in (True, False):
        merge = trained(3, 2, 2).train()
        inputs = [tensor.requires_grad_() for tensor in batch()]
        out = merge.pooled(*inputs) if pooled else merge(*inputs).mean((3, 4))
        out.square().sum().backward()
        gradients.append([*(tensor.grad for tensor in inputs), *(p.grad for p in merge.parameters())])
    torch.testing.assert_close(gradients[0], gradients[1])


def test_strided_statistics_have_the_exact_mean_and_the_variance_of_a_quarter_of_the_places() -> None:
    merge = trained(3, 2, 2).train()
    merge.statistics = "strided"
    maps = convolved(merge, *batch())
    means = maps.mean((2, 3))
    quarter = maps[:, :, ::2, ::2]
    within = quarter.var((2, 3), unbiased=False).mean(0)
    variance = within + means.var(0, unbiased=False)
    expected = (means - means.mean(0)) / (variance + merge.norm.eps).sqrt()
    expected = expected * merge.norm.weight + merge.norm.bias
    torch.testing.assert_close(merge.pooled(*batch()).flatten(1), expected)


def test_pooled_statistics_are_those_of_a_batch_norm_over_vectors() -> None:
    merge = trained(3, 2, 2).train()
    merge.statistics = "pooled"
    norm = nn.BatchNorm1d(4).double()
    norm.load_state_dict(merge.norm.state_dict())
    expected = norm(convolved(merge, *batch()).mean((2, 3)))
    torch.testing.assert_close(merge.pooled(*batch()).flatten(1), expected)
    torch.testing.assert_close(merge.norm.state_dict(), norm.state_dict())
    torch.testing.assert_close(merge.eval().pooled(*batch()), merge(*batch()).mean((3, 4)))


def test_pooled_statistics_of_one_image_are_refused() -> None:
    merge = trained(3, 2, 2).train()
    merge.statistics = "pooled"
    with pytest.raises(UsageError, match="at least 2 images"):
        merge.pooled(*(tensor[:1] for tensor in batch()))


@pytest.mark.parametrize("statistics", ["map", "strided", "pooled"])
def test_half_precision_keeps_the_statistics_in_full(statistics: str) -> None:
    merge = trained(3, 2, 2).float().train()
    merge.statistics = statistics  # type: ignore[assignment]
    inputs = [tensor.float() + 30 for tensor in batch()]
    exact = merge.pooled(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = merge.pooled(*inputs)
    assert rounded.dtype == torch.float32
    assert (rounded - exact).abs().max() < 0.2
