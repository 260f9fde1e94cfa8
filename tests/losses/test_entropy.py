import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crossx.losses import EntropyLoss, entropy_loss


@settings(max_examples=40)
@given(batch=st.integers(1, 5), classes=st.integers(1, 9), scale=st.floats(0, 30), seed=st.integers(0, 100))
def test_value_and_gradient_in_closed_form(batch: int, classes: int, scale: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(batch, classes, dtype=torch.float64, generator=generator)
    logits.requires_grad_()
    loss = EntropyLoss()(logits)
    loss.backward()
    entropies = torch.distributions.Categorical(logits=logits.detach()).entropy()
    torch.testing.assert_close(loss.detach(), -entropies.mean())
    # d(-H) / dz_k = p_k (log p_k + H)
    p = logits.detach().softmax(1)
    expected = p * (logits.detach().log_softmax(1) + entropies[:, None]) / batch
    torch.testing.assert_close(logits.grad, expected)


def test_gradient_equals_finite_differences_in_float64() -> None:
    torch.manual_seed(0)
    assert torch.autograd.gradcheck(entropy_loss, torch.randn(3, 5, dtype=torch.float64, requires_grad=True))


def test_half_precision_is_the_same_loss_of_rounded_logits() -> None:
    logits = torch.randn(4, 200, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        loss = entropy_loss(logits)
    torch.testing.assert_close(loss, entropy_loss(logits.float()))


def test_ends_of_its_range() -> None:
    assert entropy_loss(torch.zeros(2, 7)).item() == pytest.approx(-math.log(7))
    logits = torch.tensor([[1e4, 0, -1e4]], requires_grad=True)
    loss = entropy_loss(logits)
    loss.backward()
    assert loss.item() == 0
    assert torch.isfinite(logits.grad).all()  # type: ignore[arg-type]
