import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crossx.losses import CrossLayerLoss, cross_layer_loss

logits = st.lists(st.lists(st.floats(-20, 20), min_size=4, max_size=4), min_size=1, max_size=4)


def naive_kl(teacher: list[list[float]], student: list[list[float]]) -> float:
    """Eq. 6 with sums and logarithms of Python floats."""
    total = 0.0
    for t, s in zip(teacher, student, strict=True):
        t_sum, s_sum = sum(map(math.exp, t)), sum(map(math.exp, s))
        for a, b in zip(t, s, strict=True):
            p, q = math.exp(a) / t_sum, math.exp(b) / s_sum
            total += p * math.log(p / q)
    return total / len(teacher)


@settings(max_examples=50)
@given(teacher=logits, seed=st.integers(0, 99))
def test_equals_the_printed_sum(teacher: list[list[float]], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(len(teacher), 4, generator=generator, dtype=torch.double)
    loss = cross_layer_loss(torch.tensor(teacher, dtype=torch.double), student)
    expected = torch.tensor(naive_kl(teacher, student.tolist()), dtype=torch.double)
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-9)
    assert loss >= -1e-12


def test_is_zero_for_equal_distributions() -> None:
    teacher = torch.randn(3, 5)
    assert cross_layer_loss(teacher, teacher + 7).abs() < 1e-6


def test_gradient_reaches_the_teacher_unless_detached() -> None:
    for detach in (False, True):
        teacher, student = torch.randn(2, 3, requires_grad=True), torch.randn(2, 3, requires_grad=True)
        CrossLayerLoss(detach)(teacher, student).backward()
        assert (teacher.grad is None) == detach
        assert student.grad is not None


def test_gradients() -> None:
    teacher = torch.randn(3, 4, dtype=torch.double, requires_grad=True)
    student = torch.randn(3, 4, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(cross_layer_loss, (teacher, student))


def test_half_precision_is_the_same_loss_of_rounded_logits() -> None:
    teacher, student = (torch.randn(4, 200, generator=torch.Generator().manual_seed(n)) for n in (0, 1))
    teacher, student = teacher.bfloat16(), student.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        loss = cross_layer_loss(teacher, student)
    torch.testing.assert_close(loss, cross_layer_loss(teacher.float(), student.float()))


def test_extreme_logits_stay_finite() -> None:
    loss = cross_layer_loss(torch.tensor([[1e4, 0.0]]), torch.tensor([[0.0, 1e4]]))
    assert torch.isfinite(loss)
