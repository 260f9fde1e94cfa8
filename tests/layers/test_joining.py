import torch

from crossx.layers import join_normalized


def test_each_has_the_same_length_whatever_it_was() -> None:
    features = [torch.randn(4, 9, dtype=torch.float64) * scale for scale in (0.1, 1.0, 50.0)]
    joined = join_normalized(features)
    expected = torch.cat([own / own.norm(dim=1, keepdim=True) * 3**0.5 for own in features], 1)
    torch.testing.assert_close(joined, expected)
    torch.testing.assert_close(joined.square().sum(1), torch.full((4,), 9.0, dtype=torch.float64))


def test_nothing_seen_stays_nothing_in_its_dtype() -> None:
    joined = join_normalized([torch.zeros(2, 5, dtype=torch.bfloat16)] * 2)
    assert joined.dtype == torch.bfloat16
    assert torch.equal(joined, torch.zeros(2, 10, dtype=torch.bfloat16))
