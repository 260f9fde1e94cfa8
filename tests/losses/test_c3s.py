import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from crossx.losses import (
    C3SLoss,
    c3s_loss,
    centre_correlations,
    part_correlations,
    summarize_correlations,
)


def naive_correlations(features: Tensor) -> Tensor:
    """Eq. 3 with all N x N cosines, as the released code reads it."""
    batch, parts, _ = features.shape
    s = torch.zeros(parts, parts, dtype=features.dtype)
    for p in range(parts):
        for q in range(parts):
            for n in range(batch):
                for m in range(batch):
                    s[p, q] += torch.cosine_similarity(features[n, p], features[m, q], dim=0) / batch**2
    return s


def naive_loss(features: Tensor, form: str, weight: float) -> Tensor:
    """Eq. 4, and the released form, entry by entry."""
    s = naive_correlations(features)
    parts = range(len(s))
    if form == "released":
        return sum((1 - s[p, p] for p in parts), torch.zeros(())) + sum(
            s[p, q] for p in parts for q in parts if p < q
        )
    return sum(s[p, q] ** 2 for p in parts for q in parts) / 2 - weight * sum(s[p, p] ** 2 for p in parts)


@settings(max_examples=25)
@given(
    batch=st.integers(1, 5),
    parts=st.integers(1, 4),
    form=st.sampled_from(["paper", "released"]),
    weight=st.sampled_from([1.0, 2.0]),
    seed=st.integers(0, 100),
)
def test_equals_all_pairs(batch: int, parts: int, form: str, weight: float, seed: int) -> None:
    features = torch.randn(batch, parts, 7, generator=torch.Generator().manual_seed(seed))
    expected = naive_loss(features, form, weight)
    torch.testing.assert_close(c3s_loss(features, form, weight), expected, rtol=1e-4, atol=1e-5)  # type: ignore[arg-type]


@pytest.mark.parametrize("form", ["paper", "released"])
def test_known_values(form: str) -> None:
    basis = torch.eye(4)[:2].expand(3, 2, 4)
    assert torch.equal(part_correlations(basis), torch.eye(2))
    # S = I: |S|^2 / 2 - 2 |diag|^2 = 1 - 4; sum (1 - 1) + 0 = 0.
    assert c3s_loss(basis, form).item() == pytest.approx({"paper": -3.0, "released": 0.0}[form])
    equal = torch.ones(3, 2, 4)
    # S = 1 everywhere: 4 / 2 - 2 * 2; 0 + 1.
    assert c3s_loss(equal, form).item() == pytest.approx({"paper": -2.0, "released": 1.0}[form])


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_means_of_s_on_and_off_the_diagonal(parts: int) -> None:
    features = torch.randn(5, parts, 7, generator=torch.Generator().manual_seed(parts), requires_grad=True)
    s = naive_correlations(features.detach()).tolist()
    entries = [(p, q) for p in range(parts) for q in range(parts)]
    expected = {"diagonal": sum(s[p][p] for p in range(parts)) / parts}
    if parts > 1:
        others = [s[p][q] for p, q in entries if p != q]
        expected["off_diagonal"] = sum(others) / len(others)
    measured = summarize_correlations(part_correlations(features))
    assert not any(value.requires_grad for value in measured.values())
    assert {name: value.item() for name, value in measured.items()} == pytest.approx(expected, abs=1e-6)


@settings(max_examples=20)
@given(scale=st.floats(1e-3, 1e3), seed=st.integers(0, 50))
def test_depends_on_directions_alone(scale: float, seed: int) -> None:
    features = torch.randn(4, 2, 5, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(c3s_loss(features * scale), c3s_loss(features), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", ["paper", "released"])
def test_gradient_equals_finite_differences_in_float64(form: str) -> None:
    torch.manual_seed(0)
    features = torch.rand(3, 2, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda f: c3s_loss(f, form), features)  # type: ignore[arg-type]


def test_half_precision_is_summed_in_float32() -> None:
    assert part_correlations(torch.rand(3, 2, 5, dtype=torch.bfloat16)).dtype == torch.float32


@pytest.mark.parametrize("form", ["paper", "released"])
def test_descending_joins_images_and_parts_parts(form: str) -> None:
    torch.manual_seed(0)
    features = torch.randn(6, 2, 8, requires_grad=True)
    optimizer = torch.optim.SGD([features], lr=1.0)
    for _ in range(300):
        optimizer.zero_grad()
        C3SLoss(form)(features).backward()  # type: ignore[arg-type]
        optimizer.step()
    s = part_correlations(features.detach())
    assert s.diagonal().min() > 0.95
    if form == "released":
        assert s[0, 1] < -0.9
    else:
        assert s[0, 1].abs() < 0.1


def test_a_zero_feature_is_no_nan() -> None:
    features = torch.zeros(2, 2, 3, requires_grad=True)
    c3s_loss(features).backward()
    assert torch.isfinite(features.grad).all()  # type: ignore[arg-type]


@pytest.mark.parametrize(("images", "parts"), [(1, 2), (5, 2), (4, 3), (3, 1)])
def test_centred_correlations_are_those_of_features_minus_their_mean(images: int, parts: int) -> None:
    features = torch.randn(images, parts, 4, generator=torch.Generator().manual_seed(0)).double()
    unit = [[f / f.norm() for f in image] for image in features]
    mean = sum(f for image in unit for f in image) / (images * parts)
    expected = torch.zeros(parts, parts, dtype=torch.double)
    for p in range(parts):
        for q in range(parts):
            for n in range(images):
                for m in range(images):
                    expected[p, q] += (unit[n][p] - mean) @ (unit[m][q] - mean) / images**2
    centred = centre_correlations(part_correlations(features))
    torch.testing.assert_close(centred, expected)
    torch.testing.assert_close(centred.sum(0), torch.zeros(parts).double())
    for form in ("paper", "released"):
        loss = C3SLoss(form, centred=True)
        upper = sum(expected[p, q] for p in range(parts) for q in range(p + 1, parts))
        value = parts - expected.trace() + upper
        if form == "paper":
            value = (expected**2).sum() / 2 - 2 * (expected.diagonal() ** 2).sum()
        torch.testing.assert_close(loss(features), value)
        torch.testing.assert_close(loss.of_correlations(part_correlations(features)), value)


def test_centring_removes_what_all_features_have_in_common() -> None:
    s = torch.rand(3, 3, generator=torch.Generator().manual_seed(0)).double()
    torch.testing.assert_close(centre_correlations(s + 0.7), centre_correlations(s))
    # alike features of all parts: 0, where S is 1; opposite ones: 1 and -1; orthogonal ones of two parts: a half
    alike, opposite = torch.ones(4, 2, 3), torch.tensor([[1.0, 2.0], [-1.0, -2.0]]).expand(4, 2, 2)
    torch.testing.assert_close(centre_correlations(part_correlations(alike)), torch.zeros(2, 2))
    torch.testing.assert_close(
        centre_correlations(part_correlations(opposite)), torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    )
    torch.testing.assert_close(centre_correlations(torch.eye(2)), torch.tensor([[0.5, -0.5], [-0.5, 0.5]]))


@pytest.mark.parametrize("form", ["paper", "released"])
def test_gradient_of_the_centred_loss_equals_finite_differences(form: str) -> None:
    torch.manual_seed(0)
    features = torch.rand(3, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda f: c3s_loss(f, form, centred=True), features)  # type: ignore[arg-type]
