import pytest
import torch

from crossx.layers import FilterBank, energy_peaks
from crossx.layers.filter_bank import WINDOW


def peaks_by_loop(maps: torch.Tensor, count: int) -> list[list[tuple[float, int, int]]]:
    """Visit every position and its neighbours; return (energy, row, column), strongest first."""
    found = []
    for image in maps:
        energy = image.square().sum(0).sqrt()
        height, width = energy.shape
        peaks = []
        for i in range(height):
            for j in range(width):
                earlier, later = [], []
                for di in range(-(WINDOW // 2), WINDOW // 2 + 1):
                    for dj in range(-(WINDOW // 2), WINDOW // 2 + 1):
                        inside = 0 <= i + di < height and 0 <= j + dj < width
                        if inside and (di, dj) != (0, 0):
                            side = earlier if (di, dj) < (0, 0) else later
                            side.append(energy[i + di, j + dj])
                own = energy[i, j]
                if own > 0 and all(own > other for other in earlier) and all(own >= x for x in later):
                    peaks.append((own.item(), i, j))
        found.append(sorted(peaks, key=lambda peak: -peak[0])[:count])
    return found


@pytest.mark.parametrize("size", [(7, 9), (1, 6), (2, 2)])
def test_peaks_are_those_of_a_loop(size: tuple[int, int]) -> None:
    maps = torch.randn(3, 4, *size, generator=torch.Generator().manual_seed(0))
    for image, ours, theirs in zip(maps, energy_peaks(maps, 5), peaks_by_loop(maps, 5), strict=True):
        assert torch.equal(ours, torch.stack([image[:, i, j] for _, i, j in theirs]))


def test_equal_places_give_one_peak_and_dead_ones_none() -> None:
    flat = torch.ones(1, 2, 5, 5)
    assert energy_peaks(flat, 9)[0].tolist() == [[1.0, 1.0]]
    assert energy_peaks(torch.zeros(1, 2, 5, 5), 9)[0].shape == (0, 2)
    generator = torch.Generator().manual_seed(1)
    # few values, so that many neighbours are equal
    maps = torch.randint(0, 2, (20, 2, 4, 6), generator=generator).float()
    for image, ours, theirs in zip(maps, energy_peaks(maps, 24), peaks_by_loop(maps, 24), strict=True):
        features = torch.stack([image[:, i, j] for _, i, j in theirs])
        assert sorted(ours.tolist()) == sorted(features.tolist())


@pytest.mark.parametrize("batch_norm", [False, True])
@torch.inference_mode()
def test_responses_are_products_with_each_class_filters(batch_norm: bool) -> None:
    torch.manual_seed(0)
    bank = FilterBank(4, num_classes=3, num_filters=2, batch_norm=batch_norm).eval()
    filters = torch.randn(2, 4)
    others = bank.conv.weight.clone()
    bank.set_filters(1, filters)
    maps = torch.randn(2, 4, 5, 6)
    responses = bank(maps)
    assert responses.shape == (2, 3, 2, 5, 6)
    scale = (1 + 1e-5) ** -0.5 if batch_norm else 1.0
    for image in range(2):
        for number in range(2):
            for i in range(5):
                for j in range(6):
                    expected = scale * sum(filters[number, c] * maps[image, c, i, j] for c in range(4))
                    assert responses[image, 1, number, i, j] == pytest.approx(float(expected), abs=1e-5)
    assert torch.equal(bank.conv.weight[[0, 1, 4, 5]], others[[0, 1, 4, 5]])


def test_gradients_of_the_bank() -> None:
    bank = FilterBank(3, num_classes=2, num_filters=2).double()
    maps = torch.randn(2, 3, 2, 3, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(bank, (maps,))
