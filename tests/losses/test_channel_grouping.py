import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crossx.losses import concentration_loss, diversity_loss

shapes = st.tuples(st.integers(1, 3), st.integers(2, 4), st.integers(1, 4), st.integers(1, 5))


def maps_of(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    maps = torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return maps / maps.sum((2, 3), keepdim=True)


def naive(maps: torch.Tensor, margin: float) -> tuple[float, float]:
    """The printed sums with Python floats."""
    concentration = diversity = 0.0
    for image in maps.tolist():
        for index, own in enumerate(image):
            spots = [(y, x) for y in range(len(own)) for x in range(len(own[0]))]
            peak = max(spots, key=lambda spot: own[spot[0]][spot[1]])
            for y, x in spots:
                concentration += own[y][x] * ((x - peak[1]) ** 2 + (y - peak[0]) ** 2)
                strongest = max(other[y][x] - margin for k, other in enumerate(image) if k != index)
                diversity += own[y][x] * strongest
    return concentration / len(maps), diversity / len(maps)


@settings(max_examples=40, deadline=None)
@given(shape=shapes, seed=st.integers(0, 1000), margin=st.floats(0, 0.5))
def test_both_equal_the_printed_sums(shape: tuple[int, ...], seed: int, margin: float) -> None:
    maps = maps_of(shape, seed)
    expected = torch.tensor(naive(maps, margin), dtype=torch.float64)
    found = torch.stack([concentration_loss(maps), diversity_loss(maps, margin)])
    torch.testing.assert_close(found, expected)


def test_the_gradients_are_those_of_finite_differences() -> None:
    maps = maps_of((2, 3, 3, 4), 0).requires_grad_()
    assert torch.autograd.gradcheck(concentration_loss, maps)
    assert torch.autograd.gradcheck(diversity_loss, maps)


def test_single_spots_have_no_spread_and_overlap_only_where_they_meet() -> None:
    maps = torch.zeros(1, 3, 4, 4)
    maps[0, 0, 1, 2] = maps[0, 1, 3, 0] = maps[0, 2, 0, 0] = 1
    assert concentration_loss(maps) == 0
    assert diversity_loss(maps, 0.0) == 0
    maps[0, 2] = maps[0, 1]
    assert diversity_loss(maps, 0.0) == 2
    # the margin takes itself away once per map of sum 1
    torch.testing.assert_close(diversity_loss(maps, 0.1), torch.tensor(2 - 3 * 0.1))


def test_half_precision_is_summed_in_float32() -> None:
    maps = maps_of((1, 2, 30, 30), 0)
    maps[:, :, 7, 20] = 0.5  # the peak, rounded or not
    loss = concentration_loss(maps.to(torch.float16))
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), concentration_loss(maps), rtol=1e-2, atol=0)
