import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from crossx.layers import winograd
from crossx.layers.winograd import convolve3x3, winograd3x3

lengths = st.integers(1, 11)


def inputs(
    batch: int = 2, channels: int = 3, outputs: int = 4, height: int = 7, width: int = 10
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(batch, channels, height, width, dtype=torch.double, generator=generator)
    return maps, torch.randn(outputs, channels, 3, 3, dtype=torch.double, generator=generator)


@settings(max_examples=60)
@given(st.integers(1, 3), lengths, lengths, lengths, lengths)
def test_equals_torchs_convolution(batch: int, channels: int, outputs: int, height: int, width: int) -> None:
    maps, kernel = inputs(batch, channels, outputs, height, width)
    expected = F.conv2d(maps, kernel, padding=1)
    torch.testing.assert_close(winograd3x3(maps, kernel), expected, rtol=1e-10, atol=1e-11)


@pytest.mark.slow
def test_gradients() -> None:
    assert torch.autograd.gradcheck(winograd3x3, [tensor.requires_grad_() for tensor in inputs()])


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_gradients_equal_those_of_torchs_convolution_in_float32(layout: torch.memory_format) -> None:
    gradients = []
    for convolve in (winograd3x3, lambda maps, kernel: F.conv2d(maps, kernel, padding=1)):
        maps, kernel = (
            t.float().contiguous(memory_format=layout).requires_grad_() for t in inputs(3, 64, 48)
        )
        convolve(maps, kernel).square().mean().backward()
        gradients.append((maps.grad, kernel.grad))
    for ours, torchs in zip(*gradients, strict=True):
        assert ours is not None
        assert torchs is not None
        assert (ours - torchs).abs().max() < 1e-5 * torchs.abs().max()


def test_is_taken_for_many_channels_and_places_in_float32_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    monkeypatch.setattr(winograd, "winograd3x3", lambda maps, kernel: taken.append(maps.shape) or maps)
    wide, narrow = torch.zeros(256, 256, 3, 3), torch.zeros(4, 256, 3, 3)
    many, few = torch.zeros(6, 256, 16, 16), torch.zeros(5, 256, 16, 16)
    convolve3x3(many, wide)
    assert taken == [many.shape]
    convolve3x3(many, narrow)
    convolve3x3(few, wide)
    convolve3x3(many, wide, stride=2)
    convolve3x3(few.double(), wide.double())
    with torch.autocast("cpu", torch.bfloat16):
        convolve3x3(many, wide)
    assert taken == [many.shape]
