import pytest
import torch

from crossx.layers import Navigator


def test_each_score_belongs_to_its_anchor() -> None:
    """A map that is zero except at one position scores high around the centre of its anchors."""
    torch.manual_seed(0)
    navigator = Navigator(3, 32).eval()
    with torch.no_grad():
        for parameter in navigator.parameters():
            parameter.fill_(0.0)
        # the first level passes the map on, its fourth head (the second side, ratio 2:3) reads it
        navigator.levels[0].weight[0, 0, 1, 1] = 1
        navigator.scores[0].weight[3, 0] = 1
        maps = torch.zeros(1, 3, 14, 14)
        maps[0, 0, 5, 9] = 7
        boxes, scores = navigator(maps, (448, 448))
    assert scores.argmax() == 3 * 14 * 14 + 5 * 14 + 9
    assert (scores > 0).sum() == 1
    left, top, right, bottom = boxes[scores.argmax()].tolist()
    assert abs((left + right) / 2 - 9.5 * 32) <= 1
    assert abs((top + bottom) / 2 - 5.5 * 32) <= 1
    assert 1.45 < (bottom - top) / (right - left) < 1.55


def test_shape_and_size_of_the_authors_network() -> None:
    navigator = Navigator(2048, 32)
    boxes, scores = navigator(torch.randn(1, 2048, 14, 14), (448, 448))
    assert (boxes.shape, scores.shape) == ((1614, 4), (1, 1614))
    assert navigator.num_anchors((14, 14)) == 1614


@pytest.mark.parametrize("map_size", [(1, 2), (3, 7), (5, 4)])
def test_number_of_anchors(map_size: tuple[int, int]) -> None:
    navigator = Navigator(4, 32, width=2)
    boxes, _ = navigator(torch.randn(1, 4, *map_size), (64, 64))
    assert navigator.num_anchors(map_size) == len(boxes)


def test_parameters_of_the_authors_network() -> None:
    navigator = Navigator(2048, 32)
    convolutions = 9 * (2048 + 128 + 128) * 128 + 3 * 128
    heads = 128 * (6 + 6 + 9) + 6 + 6 + 9
    assert sum(p.numel() for p in navigator.parameters()) == convolutions + heads


def test_scores_are_float32_under_autocast() -> None:
    navigator = Navigator(8, 32)
    maps = torch.randn(1, 8, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        scores = navigator(maps.bfloat16(), (128, 128))[1]
    assert scores.dtype == torch.float32
    assert torch.equal(scores, navigator(maps.bfloat16().float(), (128, 128))[1])
