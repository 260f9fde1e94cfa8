import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

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


@settings(max_examples=60, deadline=None)
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
