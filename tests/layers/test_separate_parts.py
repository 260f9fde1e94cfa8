import pytest
import torch

from crossx.layers import OSME, Gating, MergedFeatures, MergedLogits, ResidualOSME, SeparateOSME
from crossx.layers.feature_pyramid import Interpolation, tap_means
from crossx.layers.separate_parts import TapMaps


@pytest.mark.parametrize("gating", [Gating(), Gating("competing", background=True)])
def test_gates_each_part_like_osme(gating: Gating) -> None:
    torch.manual_seed(0)
    osme = OSME(12, 3, reduction=4, gating=gating).double()
    maps = torch.randn(2, 12, 5, 4, dtype=torch.double)
    separate = SeparateOSME(osme)
    found = separate.excite(maps, separate.gates(maps))
    torch.testing.assert_close(torch.stack(found, 1), osme(maps))


@pytest.mark.parametrize("own", [None, torch.nn.Hardtanh(-0.5, 0.5)])
@pytest.mark.parametrize("keep_trunk", [True, False])
def test_the_rest_of_a_block_treats_the_parts_as_one_map(
    own: torch.nn.Module | None, keep_trunk: bool
) -> None:
    torch.manual_seed(0)
    slot = ResidualOSME(OSME(8, 3, 2), own, None, keep_trunk)
    separate = SeparateOSME(slot)
    residual, shortcut = torch.randn(2, 2, 8, 4, 4)
    expected_trunk, expected = slot.split(torch.relu(slot(residual) + shortcut))
    out = separate(residual)
    out += shortcut
    trunk, parts = separate.split(torch.nn.ReLU(inplace=True)(out))
    torch.testing.assert_close(torch.stack(parts, 1), expected)
    if keep_trunk:
        torch.testing.assert_close(trunk, expected_trunk)


@pytest.mark.parametrize("interpolation", ["bilinear", "nearest"])
@pytest.mark.parametrize(
    ("source", "target", "pools"),
    [
        ((7, 5), (7, 5), True),
        ((7, 5), (14, 10), True),
        ((2, 3), (8, 9), True),
        ((8, 7), (13, 11), False),
        ((1, 1), (2, 2), False),
        ((1, 4), (1, 4), False),
    ],
)
def test_means_of_the_taps(
    interpolation: Interpolation, source: tuple[int, int], target: tuple[int, int], pools: bool
) -> None:
    torch.manual_seed(0)
    maps = torch.randn(2, 3, *source)
    taps = TapMaps(source, target, interpolation)
    assert taps.pools == pools
    # (B, C, h, w) -> (B, 1, C, h, w); (1, B, 9, C) -> (B, C, 9)
    expected = tap_means(maps[:, None], torch.Size(target), interpolation)[0].mT
    torch.testing.assert_close(taps(maps).flatten(2), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("classes", [3, 9], ids=["head in the kernel", "head of its own"])
def test_logits_of_the_merged_maps(classes: int) -> None:
    torch.manual_seed(0)
    merge = MergedFeatures(6, 4, 2).double().eval()
    for name in ("weight", "bias", "running_mean", "running_var"):
        torch.nn.init.uniform_(getattr(merge.norm, name), 0.5, 2)
    head = torch.nn.Linear(2 * 4, classes).double()
    previous, last = torch.randn(3, 2, 4, 6, 6).double(), torch.randn(3, 2, 6, 3, 3).double()
    expected = head(merge(previous, last).mean((3, 4)).flatten(1))
    logits = MergedLogits(merge, head, (6, 6), (3, 3))
    assert len(logits.classify) == 1 + (classes > 4)
    # its windows are float32
    torch.testing.assert_close(
        logits(previous.unbind(1), last.unbind(1)).flatten(1), expected, rtol=1e-6, atol=1e-6
    )
