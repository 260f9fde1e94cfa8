import pytest
import torch
from torch.nn import functional as F

from crossx.errors import UsageError
from crossx.layers import OSME, Gating, ResidualOSME, gate_maps
from crossx.layers.osme import gate


def naive_features(osme: OSME, maps: torch.Tensor) -> torch.Tensor:
    """Eq. 1 and 2 as printed: a loop over images and parts."""
    images = []
    for u in maps:
        parts = []
        for p in range(osme.num_parts):
            z = torch.stack([channel.sum() / channel.numel() for channel in u])
            hidden = F.relu(osme.squeeze_weight[p] @ z + osme.squeeze_bias[p])
            m = torch.sigmoid(osme.excite_weight[p] @ hidden + osme.excite_bias[p])
            parts.append(torch.stack([m[c] * u[c] for c in range(len(u))]))
        images.append(torch.stack(parts))
    return torch.stack(images)


@pytest.mark.parametrize("num_parts", [1, 2, 5])
@pytest.mark.parametrize("size", [(1, 1), (7, 5)])
def test_equals_a_loop_over_parts(num_parts: int, size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    osme = OSME(32, num_parts, reduction=8).double()
    maps = torch.randn(3, 32, *size, dtype=torch.double)
    features = osme(maps)
    assert features.shape == (3, num_parts, 32, *size)
    torch.testing.assert_close(features, naive_features(osme, maps))


def test_gradients() -> None:
    torch.manual_seed(0)
    osme = OSME(6, 2, reduction=3).double()
    maps = torch.randn(2, 6, 3, 2, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(osme, (maps,))


def test_starts_like_linear_layers() -> None:
    torch.manual_seed(0)
    osme = OSME(1024, 4, reduction=16)
    linear = torch.nn.Linear(1024, 64)
    assert osme.squeeze_weight.abs().max() <= 1024**-0.5
    assert osme.squeeze_weight.std().item() == pytest.approx(linear.weight.std().item(), rel=0.02)
    assert osme.excite_weight.abs().max() <= 64**-0.5


@pytest.mark.parametrize(("num_parts", "reduction"), [(0, 16), (-1, 16), (2, 0), (2, 65)])
def test_refuses_what_cannot_work(num_parts: int, reduction: int) -> None:
    with pytest.raises(UsageError, match="num_parts" if num_parts < 1 else "reduction"):
        OSME(64, num_parts, reduction)


@pytest.mark.parametrize("own", [None, torch.nn.Hardtanh(-0.5, 0.5)])
@pytest.mark.parametrize("keep_trunk", [True, False])
def test_slot_gives_trunk_and_parts(own: torch.nn.Module | None, keep_trunk: bool) -> None:
    torch.manual_seed(0)
    slot = ResidualOSME(OSME(8, 3, 2), own, None, keep_trunk)
    residual = torch.randn(2, 8, 4, 4)
    out = slot(residual)
    parts = out[1:] if keep_trunk else out
    torch.testing.assert_close(parts.transpose(0, 1), slot.osme(residual))
    if keep_trunk:
        assert torch.equal(out[0], residual if own is None else own(residual))


def test_slot_drops_whole_images_not_parts() -> None:
    class HalfPath(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * torch.tensor([1.0, 0.0])[:, None, None, None]

    slot = ResidualOSME(OSME(8, 3, 2), None, HalfPath(), keep_trunk=True)
    out = slot(torch.ones(2, 8, 4, 4))
    assert (out[:, 0] > 0).all()
    assert (out[:, 1] == 0).all()


@pytest.mark.parametrize("gates_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("maps_dtype", [torch.float32, torch.bfloat16])
def test_gating_has_the_gradients_of_a_plain_product(
    maps_dtype: torch.dtype, gates_dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(2, 5, 4, 3, generator=generator).to(maps_dtype)
    gates = torch.rand(3, 2, 5, generator=generator).to(gates_dtype)
    gradients = []
    for product in (gate, lambda maps, gates: gates[..., None, None] * maps):
        inputs = maps.clone().requires_grad_(), gates.clone().requires_grad_()
        out = product(*inputs)
        (out.square() + out).sum().backward()
        gradients.append((out.detach(), *(tensor.grad for tensor in inputs)))
    exact = maps_dtype == gates_dtype == torch.float32
    tolerance = {} if exact else {"rtol": 0.05, "atol": 0.05}
    torch.testing.assert_close(*gradients, **tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("own", [None, torch.nn.Identity()])
def test_attention_features_keep_the_maps_type_under_autocast(
    own: torch.nn.Module | None, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    osme = OSME(8, 3, 2)
    maps = torch.randn(2, 8, 4, 4)
    exact = osme(maps)
    with torch.autocast("cpu", dtype):
        assert osme.gates(maps.to(dtype)).dtype == torch.float32
        rounded = osme(maps.to(dtype))
        slot = ResidualOSME(osme, own, None, keep_trunk=True)(maps.to(dtype))
    assert rounded.dtype == slot.dtype == dtype
    torch.testing.assert_close(rounded.float(), exact, rtol=0.03, atol=0.03)
    assert torch.equal(slot[1:].transpose(0, 1), rounded)
    assert torch.equal(slot[0], maps.to(dtype))


@pytest.mark.parametrize(("num_parts", "background"), [(1, True), (2, False), (3, True)])
def test_competing_gates_equal_a_softmax_per_channel(num_parts: int, background: bool) -> None:
    torch.manual_seed(0)
    gating = Gating("competing", sharpness=3.0, background=background)
    osme = OSME(6, num_parts, 2, gating).double()
    maps = torch.randn(2, 6, 4, 3, dtype=torch.double)
    count = num_parts + background
    assert len(osme.gates(maps)[0]) == count
    expected = torch.empty(2, count, 6, dtype=torch.double)
    for n, u in enumerate(maps):
        z = u.mean((1, 2))
        scores = [
            osme.excite_weight[p] @ F.relu(osme.squeeze_weight[p] @ z + osme.squeeze_bias[p])
            + osme.excite_bias[p]
            for p in range(count)
        ]
        for c in range(6):
            powers = [(3.0 * score[c]).exp() for score in scores]
            for p in range(count):
                expected[n, p, c] = powers[p] / sum(powers)
    gates = osme.gates(maps)
    torch.testing.assert_close(gates, expected)
    features = osme(maps)
    assert features.shape == (2, num_parts, 6, 4, 3)
    # what no part takes is the background's
    rest = gates[:, num_parts:].sum(1)[..., None, None] * maps
    torch.testing.assert_close(features.sum(1) + rest, maps)


def test_gradients_of_competing_gates() -> None:
    torch.manual_seed(0)
    osme = OSME(3, 1, 1, Gating("competing", background=True)).double()
    maps = torch.randn(1, 3, 2, 1, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(lambda u: (osme(u), osme.gates(u)), (maps,))


def test_competing_gates_stay_finite_and_in_the_precision_of_the_maps() -> None:
    osme = OSME(8, 2, 2, Gating("competing", sharpness=1e4)).bfloat16()
    gates = osme.gates(torch.full((1, 8, 2, 2), 100.0).bfloat16())
    assert gates.dtype == torch.bfloat16
    torch.testing.assert_close(gates.sum(1), torch.ones(1, 8).bfloat16())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gates": "softmax"}, "unknown gates 'softmax'"),
        ({"gates": "competing", "sharpness": 0.0}, "gate_sharpness must be above 0"),
        ({"sharpness": float("nan")}, "gate_sharpness must be above 0"),
        ({"sharpness": float("inf")}, "gate_sharpness must be above 0"),
        ({"background": True}, "background needs competing gates"),
        ({"gates": "competing"}, "need num_parts 2 or more, or a background"),
    ],
)
def test_refuses_gates_that_cannot_work(options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        OSME(8, 1, 2, Gating(**options))  # type: ignore[arg-type]


def test_gate_maps_are_weighted_means_of_positive_activations() -> None:
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(2, 5, 3, 4, generator=generator, dtype=torch.double)
    gates = torch.rand(2, 3, 5, generator=generator, dtype=torch.double)
    looks = gate_maps(maps, gates)
    for n in range(2):
        for p in range(3):
            expected = sum(gates[n, p, c] * maps[n, c].clamp(min=0) for c in range(5)) / 5
            torch.testing.assert_close(looks[n, p], expected)
    # without a background, the channel means of the attention features of maps that are not negative
    torch.testing.assert_close(
        gate_maps(maps.abs(), gates), (gates[..., None, None] * maps.abs()[:, None]).mean(2)
    )
    assert gate_maps(maps.bfloat16(), gates.bfloat16()).dtype == torch.float32
    assert torch.autograd.gradcheck(gate_maps, (maps.requires_grad_(), gates.requires_grad_()))
