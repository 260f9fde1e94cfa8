import numpy as np
import pytest
import torch
from torch.nn import functional as F

from crossx.errors import UsageError
from crossx.layers import TensorSketch

SIZES = [16, 15]


def count_sketch(x: np.ndarray, hashes: np.ndarray, signs: np.ndarray, size: int) -> np.ndarray:
    sketch = np.zeros(size)
    for value, h, s in zip(x, hashes, signs, strict=True):
        sketch[h] += s * value
    return sketch


def convolve(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Circular convolution from its definition."""
    size = len(a)
    return np.array([sum(a[j] * b[(i - j) % size] for j in range(size)) for i in range(size)])


@pytest.mark.parametrize("size", SIZES)
def test_sketches_are_convolutions_of_count_sketches(size: int) -> None:
    sketch = TensorSketch(6, size, 4, seed=3).double()
    features = torch.randn(2, 5, 6, dtype=torch.float64)
    expected = np.zeros((2, 3, size))
    for image in range(2):
        for x in features[image].numpy():
            product = None
            for t in range(4):
                own = count_sketch(x, sketch.hashes[t].numpy(), sketch.signs[t].numpy(), size)
                product = own if product is None else convolve(product, own)
                if t:
                    expected[image, t - 1] += product / 5
    torch.testing.assert_close(sketch(features), torch.from_numpy(expected))


@pytest.mark.slow
def test_inner_products_are_those_of_the_tensor_powers_in_expectation() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = F.normalize(torch.randn(2, 8, generator=generator, dtype=torch.float64) + 0.7)
    draws = 3000
    estimates = torch.empty(draws, 3, dtype=torch.float64)
    for seed in range(draws):
        ours, theirs = TensorSketch(8, 32, 4, seed).double()(torch.stack([x, y])[:, None])
        estimates[seed] = (ours * theirs).sum(1)
    exact = (x @ y) ** torch.tensor([2, 3, 4])
    errors = estimates.std(0) / draws**0.5
    # five standard errors: about one failure in half a million draws of the seeds, which are fixed
    assert ((estimates.mean(0) - exact).abs() < 5 * errors).all()
    # and the test can tell: the errors are small beside what is estimated
    assert (errors < 0.1 * exact).all()


def test_order_two_is_the_sketch_of_the_outer_product() -> None:
    """Entry (a, b) of x x^T goes to h1(a) + h2(b) with the sign s1(a) s2(b): compact bilinear pooling."""
    sketch = TensorSketch(5, 7, 2).double()
    features = torch.randn(3, 4, 5, dtype=torch.float64)
    expected = torch.zeros(3, 7, dtype=torch.float64)
    for image in range(3):
        outer = sum(torch.outer(x, x) for x in features[image]) / 4
        for a in range(5):
            for b in range(5):
                place = (sketch.hashes[0, a] + sketch.hashes[1, b]) % 7
                expected[image, place] += sketch.signs[0, a] * sketch.signs[1, b] * outer[a, b]
    torch.testing.assert_close(sketch(features)[:, 0], expected)


def test_gradients() -> None:
    sketch = TensorSketch(4, 6, 3).double()
    features = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(sketch, (features,))


@pytest.mark.parametrize("size", SIZES)
def test_the_exported_form_has_no_fourier_transform_and_equals_it(size: int) -> None:
    # products of four features cancel: in float32 a few digits are left of some sums
    sketch = TensorSketch(6, size, 4).double()
    features = torch.randn(2, 5, 6, dtype=torch.float64)
    program = torch.export.export(sketch, (features,))
    assert not any("fft" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(features), sketch(features))


def test_the_seed_decides_and_the_state_dict_keeps() -> None:
    first, again, other = (TensorSketch(6, 16, 2, seed) for seed in (0, 0, 1))
    assert torch.equal(first.hashes, again.hashes)
    assert torch.equal(first.signs, again.signs)
    assert not torch.equal(first.hashes, other.hashes)
    other.load_state_dict(first.state_dict())
    features = torch.randn(2, 3, 6)
    assert torch.equal(other(features), first(features))
    assert set(first.signs.unique().tolist()) == {-1.0, 1.0}


def test_options_that_cannot_work() -> None:
    with pytest.raises(UsageError, match="sketch_size must be at least 2, not 0"):
        TensorSketch(4, 0, 2)
    with pytest.raises(UsageError, match="order must be at least 2, not 1"):
        TensorSketch(4, 8, 1)
