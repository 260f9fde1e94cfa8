import pytest
import torch

from crossx.layers import (
    ChannelGrouping,
    attention_maps,
    attention_pool,
    channel_peaks,
    object_box,
    peak_boxes,
)


def test_weights_are_those_of_two_layers_per_part() -> None:
    torch.manual_seed(0)
    grouping, pooled = ChannelGrouping(5, 3), torch.randn(2, 5)
    found = grouping(pooled)
    for part in range(3):
        hidden = torch.tanh(pooled @ grouping.hidden.weight[part].T + grouping.hidden.bias[part])
        expected = torch.sigmoid(hidden @ grouping.weights.weight[part].T + grouping.weights.bias[part])
        torch.testing.assert_close(found[:, part], expected)


def test_the_start_is_the_indicator_of_the_groups_for_every_image() -> None:
    torch.manual_seed(0)
    grouping = ChannelGrouping(6, 3)
    grouping.start_from(torch.tensor([2, 0, 0, 1, 2, 0]))
    indicator = torch.tensor([[0.0, 1, 1, 0, 0, 1], [0, 0, 0, 1, 0, 0], [1, 0, 0, 0, 1, 0]])
    assert (grouping(3 * torch.randn(20, 6)) - indicator).abs().max() < 0.06


def test_maps_and_pooled_features_are_sums_over_channels_and_positions() -> None:
    torch.manual_seed(0)
    features, weights = torch.randn(2, 4, 3, 5), torch.rand(2, 3, 4)
    maps = attention_maps(features, weights)
    pooled = attention_pool(features, maps)
    for image in range(2):
        for part in range(3):
            total = sum(weights[image, part, c] * features[image, c].clamp(min=0) for c in range(4))
            torch.testing.assert_close(maps[image, part], total / total.sum(), rtol=1e-4, atol=1e-5)
            expected = sum(
                maps[image, part, y, x] * features[image, :, y, x] for y in range(3) for x in range(5)
            )
            torch.testing.assert_close(pooled[image, part], expected)


def test_without_a_response_the_map_is_uniform() -> None:
    features = -torch.rand(1, 4, 2, 5, requires_grad=True)
    weights = torch.rand(1, 2, 4, requires_grad=True)
    maps = attention_maps(features, weights)
    torch.testing.assert_close(maps, torch.full((1, 2, 2, 5), 0.1))
    maps.square().sum().backward()
    assert weights.grad is not None
    assert weights.grad.isfinite().all()


def test_channels_without_a_peak_have_the_mean_of_the_others() -> None:
    maps = torch.zeros(2, 3, 4, 6)
    maps[0, 0, 1, 5] = 1
    maps[0, 2, 3, 2] = 2
    assert channel_peaks(maps).tolist() == [[[1, 5], [2, 3.5], [3, 2]], [[1.5, 2.5]] * 3]


def test_boxes_are_around_the_peaks_within_the_image() -> None:
    maps = torch.zeros(1, 4, 4, 8)
    for part, (y, x) in enumerate([(0, 0), (3, 7), (1, 3), (2, 7)]):
        maps[0, part, y, x] = 1
    # positions of 8 pixels: the centre of row 1 and column 3 is (12, 28)
    boxes = peak_boxes(maps, (32, 64), 10)
    assert boxes.tolist() == [[[0, 0, 10, 10], [54, 22, 64, 32], [23, 7, 33, 17], [54, 15, 64, 25]]]


@pytest.mark.parametrize(
    ("spots", "expected"),
    [
        ([(1, 2), (2, 5)], [16, 0, 48, 32]),  # 4 columns and 2 rows of 8 pixels: enlarged to 32
        ([(0, 7)], [56, 0, 64, 8]),
        ([(0, 0), (3, 1)], [0, 0, 32, 32]),  # 2 columns: moved into the image
        ([(0, 0), (3, 7)], [0, 0, 64, 32]),  # as wide as the image: cut
        ([], [0, 0, 64, 32]),
    ],
)
def test_the_object_is_a_square_around_the_strong_positions(
    spots: list[tuple[int, int]], expected: list[int]
) -> None:
    features = torch.zeros(1, 2, 4, 8)
    for y, x in spots:
        features[0, :, y, x] = torch.tensor([0.3, -5.0])
    if spots:
        features[0, 1, 3, 4] = 0.02  # below a tenth
    assert object_box(features, (32, 64), 0.1).tolist() == [[expected]]
