import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from crossx.losses import MAMCLoss, mamc_loss, mamc_terms


def naive_terms(
    features: Tensor, targets: list[int], normalize: bool, average: str, scale: float
) -> dict[str, Tensor]:
    """The four sets of every anchor, feature by feature."""
    batch, parts, _ = features.shape
    names = [(i, p) for i in range(batch) for p in range(parts)]
    f = {
        (i, p): scale * features[i, p] / features[i, p].norm() if normalize else features[i, p]
        for i, p in names
    }
    totals = {name: torch.zeros((), dtype=features.dtype) for name in ("sasc", "sadc", "dasc")}
    for i, p in names:
        sets: dict[str, list[Tensor]] = {"sasc": [], "sadc": [], "dasc": [], "dadc": []}
        for j, q in names:
            if (i, p) != (j, q):
                attention = "s" if p == q else "d"
                category = "s" if targets[i] == targets[j] else "d"
                sets[f"{attention}a{category}c"].append(f[j, q])
        rest = sets["sadc"] + sets["dasc"] + sets["dadc"]
        for name, negatives in (("sasc", rest), ("sadc", sets["dadc"]), ("dasc", sets["dadc"])):
            for positive in sets[name]:
                inner = sum(torch.exp(f[i, p] @ negative - f[i, p] @ positive) for negative in negatives)
                share = len(sets[name]) if average == "positives" else 1
                totals[name] = totals[name] + torch.log1p(torch.as_tensor(inner)) / share
    divisor = batch / 2 if average == "pairs" else batch * parts
    return {name: total / divisor for name, total in totals.items()}


@settings(max_examples=40)
@given(
    targets=st.lists(st.integers(0, 3), min_size=1, max_size=6),
    parts=st.integers(1, 3),
    normalize=st.booleans(),
    average=st.sampled_from(["pairs", "features", "positives"]),
    scale=st.sampled_from([1.0, 4.0]),
    seed=st.integers(0, 100),
)
def test_equals_the_four_sets(
    targets: list[int], parts: int, normalize: bool, average: str, scale: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(len(targets), parts, 5, dtype=torch.float64, generator=generator)
    expected = naive_terms(features, targets, normalize, average, scale)
    actual = mamc_terms(features, torch.tensor(targets), normalize, average, scale)  # type: ignore[arg-type]
    torch.testing.assert_close(actual, expected)
    total = mamc_loss(features, torch.tensor(targets), normalize, average, scale)  # type: ignore[arg-type]
    torch.testing.assert_close(total, sum(expected.values()))


def test_known_values() -> None:
    # two classes, one pair of each, two parts; every feature the same: all products are equal
    terms = mamc_terms(torch.ones(4, 2, 3), torch.tensor([0, 0, 1, 1]))
    # 8 anchors over 2 pairs; SASC 1 against 6; SADC 2 and DASC 2 against DADC 2
    expected = {"sasc": 4 * math.log(7), "sadc": 8 * math.log(3), "dasc": 8 * math.log(3)}
    assert {name: term.item() for name, term in terms.items()} == pytest.approx(expected)


@pytest.mark.parametrize("targets", [[0, 0, 1, 1], [0, 1, 2, 3], [0, 0, 0, 0]])
@pytest.mark.parametrize("normalize", [False, True])
def test_gradient_equals_finite_differences_in_float64(targets: list[int], normalize: bool) -> None:
    torch.manual_seed(0)
    features = torch.randn(4, 2, 3, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor(targets)
    assert torch.autograd.gradcheck(lambda f: mamc_loss(f, labels, normalize), features)


@pytest.mark.parametrize(
    ("average", "scale", "collapses"),
    [("features", 1.0, True), ("pairs", 1.0, True), ("features", 4.0, False), ("positives", 1.0, False)],
)
def test_whether_the_minimum_is_one_direction_for_all_classes(
    average: str, scale: float, collapses: bool
) -> None:
    torch.manual_seed(0)
    features = torch.randn(10, 2, 16, requires_grad=True)
    targets = torch.arange(5).repeat_interleave(2)  # (5,) -> (10,)
    optimizer = torch.optim.SGD([features], lr=0.5, momentum=0.9)
    for _ in range(100):
        optimizer.zero_grad()
        mamc_loss(features, targets, average=average, scale=scale).backward()  # type: ignore[arg-type]
        optimizer.step()
    directions = torch.nn.functional.normalize(features.detach()[:, 0], dim=1)
    cosine = (directions @ directions.T)[targets[:, None] != targets].mean().item()
    assert cosine > 0.99 if collapses else cosine < 0.6


def test_large_products_neither_overflow_nor_vanish() -> None:
    features = (100 * torch.randn(4, 2, 50)).requires_grad_()
    loss = mamc_loss(features, torch.tensor([0, 0, 1, 1]), normalize=False)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(features.grad).all()  # type: ignore[arg-type]
    assert features.grad.abs().max() > 1  # type: ignore[union-attr]


def test_zero_features_are_no_nan() -> None:
    features = torch.zeros(2, 2, 3, requires_grad=True)
    mamc_loss(features, torch.tensor([0, 0])).backward()
    assert torch.isfinite(features.grad).all()  # type: ignore[arg-type]


def test_half_precision_is_compared_in_float32() -> None:
    features, targets = torch.randn(4, 2, 64).bfloat16(), torch.tensor([0, 0, 1, 1])
    with torch.autocast("cpu", torch.bfloat16):
        loss = mamc_loss(features, targets)
    torch.testing.assert_close(loss, mamc_loss(features.float(), targets), rtol=0, atol=0)


def test_descending_joins_what_belongs_together() -> None:
    torch.manual_seed(0)
    features, targets = torch.randn(8, 2, 16, requires_grad=True), torch.arange(4).repeat_interleave(2)
    optimizer = torch.optim.SGD([features], lr=1.0)
    for _ in range(100):
        optimizer.zero_grad()
        MAMCLoss(average="features")(features, targets).backward()
        optimizer.step()
    unit = torch.nn.functional.normalize(features.detach(), dim=2)
    products = torch.einsum("ipd,jqd->ipjq", unit, unit)
    same = (targets[:, None] == targets)[:, None, :, None]
    part = torch.eye(2, dtype=torch.bool)[None, :, None]
    itself = torch.eye(8, dtype=torch.bool)[:, None, :, None] & part
    means = {
        "sasc": products[same & part & ~itself].mean(),
        "sadc": products[~same & part].mean(),
        "dasc": products[same & ~part].mean(),
        "dadc": products[~same & ~part].mean(),
    }
    assert means["sasc"] > 0.9
    assert (
        means["dadc"] < min(means["sadc"], means["dasc"]) < max(means["sadc"], means["dasc"]) < means["sasc"]
    )
