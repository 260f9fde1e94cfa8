import itertools
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crossx.evaluation.parts import measures as measures_of_parts
from crossx.evaluation.parts.measures import (
    TOP_SHARE,
    ZOOM,
    Bootstrap,
    chance_overlap,
    consistency,
    correlation,
    focus_overlap,
    focus_size,
    found_parts,
    mass,
    measure_images,
    mutual_correlation,
    normalized_mutual_information,
    peaks,
    shares,
    summarize_parts,
    zoom,
    zoom_maps,
)
from crossx.evaluation.parts.regions import CropRegions

QUARTERS = [(0.0, 0.0, 0.5, 0.5), (0.5, 0.0, 1.0, 0.5), (0.0, 0.5, 0.5, 1.0), (0.5, 0.5, 1.0, 1.0)]
WHOLE = (0.0, 0.0, 1.0, 1.0)


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
    monkeypatch.setattr(measures_of_parts, "RESAMPLES", 200)


def regions(boxes, images=1, visible=None):
    shape = (images, len(boxes))
    seen = torch.ones(shape, dtype=torch.bool) if visible is None else torch.tensor(visible)
    return CropRegions(torch.tensor(boxes).expand(*shape, 4), torch.full((images,), 0.1), seen)


def quarter_maps(*chosen, size=8):
    """Return maps (1, P, size, size) that are one in a quarter and zero elsewhere."""
    return regions([QUARTERS[k] for k in chosen]).coverage(size, size)


def random_maps(seed, images=3, excitations=3, height=5, width=7):
    return torch.randn(images, excitations, height, width, generator=torch.Generator().manual_seed(seed))


def random_regions(seed, images=3, parts=4):
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(images, parts, 2, generator=generator) * 0.7
    extent = torch.rand(images, parts, 2, generator=generator) * 0.4
    extent[:, 0] = 0  # a keypoint
    visible = torch.rand(images, parts, generator=generator) > 0.3
    return CropRegions(torch.cat([corner, corner + extent], 2), torch.full((images,), 0.15), visible)


def measured(maps, parts):
    whole = regions([WHOLE], images=len(maps))
    return measure_images(maps, maps.flip(3), maps, (64, 64), parts, whole)


# closed forms


def test_a_map_that_is_one_in_a_part_alone():
    maps, parts = quarter_maps(2), regions(QUARTERS)
    share, chance = shares(mass(maps), parts.coverage(8, 8))
    assert share[0, 0].tolist() == [0, 0, 1, 0]
    assert chance[0].tolist() == [0.25] * 4
    hit, of_positions = shares(peaks(maps), parts.contain(8, 8))
    assert hit[0, 0].tolist() == [0, 0, 1, 0]
    assert of_positions[0].tolist() == [0.25] * 4
    assert found_parts(maps, parts).tolist() == [[2]]


@pytest.mark.parametrize("value", [0.0, 1.0, -3.5, 1e30])
def test_a_constant_map_gives_chance(value):
    maps, parts = torch.full((2, 3, 6, 6), value), random_regions(0, images=2)
    for distribution, cover in ((mass(maps), parts.coverage(6, 6)), (peaks(maps), parts.contain(6, 6))):
        share, chance = shares(distribution, cover)
        torch.testing.assert_close(share, chance[:, None].expand_as(share))
    assert correlation(maps, maps).tolist() == [[0.0] * 3] * 2


def test_equal_excitations_are_not_diverse_and_tell_nothing():
    maps = random_maps(0, images=40, excitations=1).expand(-1, 3, -1, -1)
    torch.testing.assert_close(focus_overlap(maps), torch.ones(40))
    torch.testing.assert_close(mutual_correlation(maps), torch.ones(40))
    found = found_parts(maps, regions(QUARTERS, images=40))
    result = consistency(found, 4, Bootstrap(40))
    assert result["nmi"] == pytest.approx(0, abs=1e-12)
    assert result["chance"] == pytest.approx(0, abs=1e-12)
    assert result["p_value"] == 1
    assert result["n"] == 40


def test_excitations_with_a_part_each():
    maps = quarter_maps(0, 3).expand(30, -1, -1, -1)
    found = found_parts(maps, regions(QUARTERS, images=30))
    result = consistency(found, 4, Bootstrap(30))
    assert result["nmi"] == pytest.approx(1)
    assert result["interval"] == pytest.approx([1, 1])
    assert result["p_value"] == pytest.approx(1 / 201)
    assert result["chance"] < 0.2
    assert focus_overlap(maps)[0] == 0
    # means of 1/4, covariance -1/16, variance 3/16
    assert mutual_correlation(maps)[0] == pytest.approx(-1 / 3)


def test_opposite_maps():
    maps = random_maps(1)
    torch.testing.assert_close(correlation(maps, -maps), -torch.ones(3, 3))
    torch.testing.assert_close(correlation(maps, 5 * maps + 2), torch.ones(3, 3))


# against loops


def test_shares_and_pointing_against_loops():
    maps, parts = random_maps(2), random_regions(3)
    maps[0, 0, 2, 3] = maps[0, 0, 4, 4] = 9.0  # two largest
    coverage, contained = parts.coverage(5, 7), parts.contain(5, 7)
    share, chance = shares(mass(maps), coverage)
    hit, of_positions = shares(peaks(maps), contained)
    for b, p, k in itertools.product(range(3), range(3), range(4)):
        values, covered, inside = maps[b, p].tolist(), coverage[b, k].tolist(), contained[b, k].tolist()
        places = list(itertools.product(range(5), range(7)))
        least = min(values[i][j] for i, j in places)
        total = sum(values[i][j] - least for i, j in places)
        within = sum((values[i][j] - least) * covered[i][j] for i, j in places)
        assert share[b, p, k] == pytest.approx(within / total, abs=1e-5)
        assert chance[b, k] == pytest.approx(sum(covered[i][j] for i, j in places) / 35, abs=1e-5)
        most = max(values[i][j] for i, j in places)
        largest = [(i, j) for i, j in places if values[i][j] == most]
        assert hit[b, p, k] == pytest.approx(sum(inside[i][j] for i, j in largest) / len(largest))
        assert of_positions[b, k] == pytest.approx(sum(inside[i][j] for i, j in places) / 35)


@pytest.mark.parametrize("seed", range(20))
def test_found_parts_against_a_loop(seed):
    maps, parts = random_maps(seed), random_regions(seed)
    expected = []
    for b in range(3):
        for p in range(3):
            i, j = max(itertools.product(range(5), range(7)), key=lambda place: maps[b, p][place].item())
            x, y = (j + 0.5) / 7, (i + 0.5) / 5
            ranked = []
            for k, (left, top, right, bottom) in enumerate(parts.boxes[b].tolist()):
                if parts.visible[b, k]:
                    distance = math.dist((x, y), ((left + right) / 2, (top + bottom) / 2))
                    hit = distance <= 0.15 if k == 0 else left <= x < right and top <= y < bottom
                    ranked.append((not hit, distance, k))
            expected.append(min(ranked)[2] if ranked else -1)
    assert found_parts(maps, parts).flatten().tolist() == expected


def test_images_without_a_visible_part_find_none():
    maps = random_maps(0, images=2)
    found = found_parts(maps, regions(QUARTERS, images=2, visible=[[True] * 4, [False] * 4]))
    assert (found[0] >= 0).all()
    assert (found[1] == -1).all()
    assert consistency(found, 4, Bootstrap(2))["n"] == 1


@pytest.mark.parametrize("seed", range(5))
def test_mutual_information_against_a_loop(seed):
    counts = np.random.default_rng(seed).integers(0, 9, (3, 4))
    n = counts.sum()
    rows, columns = counts.sum(1) / n, counts.sum(0) / n
    information = sum(
        counts[p, k] / n * math.log(counts[p, k] / n / rows[p] / columns[k])
        for p in range(3)
        for k in range(4)
        if counts[p, k]
    )
    entropies = [-sum(x * math.log(x) for x in marginal if x) for marginal in (rows, columns)]
    expected = 2 * information / sum(entropies)
    assert float(normalized_mutual_information(torch.tensor(counts))) == pytest.approx(expected)


def test_mutual_information_of_nothing_that_varies_is_zero():
    assert float(normalized_mutual_information(torch.tensor([[5, 0]]))) == 0


def test_chance_of_consistency_is_the_mean_over_permutations():
    found = torch.tensor([[0, 1], [0, 1], [2, 1], [0, 0]])
    tables = []
    for swaps in itertools.product([False, True], repeat=4):
        table = torch.zeros(2, 3)
        for (first, second), swap in zip(found.tolist(), swaps, strict=True):
            table[0, second if swap else first] += 1
            table[1, first if swap else second] += 1
        tables.append(float(normalized_mutual_information(table)))
    result = consistency(found, 3, Bootstrap(4))
    assert result["chance"] == pytest.approx(np.mean(tables), abs=0.05)
    as_large = np.mean(np.array(tables) >= result["nmi"] - 1e-9)
    assert result["p_value"] == pytest.approx(as_large, abs=0.1)


def test_overlap_and_correlation_against_loops():
    maps = random_maps(4)
    focus = [
        [set(sorted(range(35), key=lambda place: -maps[b, p].flatten()[place].item())[:7]) for p in range(3)]
        for b in range(3)
    ]
    pairs = list(itertools.combinations(range(3), 2))
    for b in range(3):
        overlaps = [len(focus[b][p] & focus[b][q]) / len(focus[b][p] | focus[b][q]) for p, q in pairs]
        assert focus_overlap(maps)[b] == pytest.approx(np.mean(overlaps))
        table = np.corrcoef(maps[b].flatten(1).numpy())
        assert mutual_correlation(maps)[b] == pytest.approx(
            np.mean([table[p, q] for p, q in pairs]), abs=1e-5
        )


def test_chance_of_overlap_against_all_choices():
    places, size = 9, focus_size(9)
    chosen = [set(choice) for choice in itertools.combinations(range(places), size)]
    expected = np.mean([len(a & b) / len(a | b) for a in chosen for b in chosen])
    assert chance_overlap(places) == pytest.approx(expected)
    assert focus_size(100) == round(100 * TOP_SHARE)
    assert (focus_size(1), chance_overlap(1)) == (1, 1.0)


def test_zoomed_maps_are_at_the_places_of_the_zoomed_image():
    ramp = ((torch.arange(16.0) + 0.5) / 16).expand(1, 1, 16, 16)
    expected = ZOOM * ramp
    # the outermost place has no neighbour to interpolate with
    torch.testing.assert_close(zoom_maps(ramp, (64, 64))[..., 1:], expected[..., 1:])
    torch.testing.assert_close(zoom_maps(ramp.mT, (64, 64))[..., 1:, :], expected.mT[..., 1:, :])
    smooth = torch.nn.functional.interpolate(random_maps(5, 2, 3, 4, 4), (64, 64), mode="bicubic")
    torch.testing.assert_close(zoom(smooth), zoom_maps(smooth, (64, 64)), atol=0.03, rtol=0)


def test_stability_of_a_network_that_follows_its_input():
    images = torch.nn.functional.interpolate(random_maps(6, 2, 2, 4, 4), (64, 64), mode="bicubic")

    def network(images):
        return torch.nn.functional.avg_pool2d(images, 4)

    whole = regions([WHOLE], images=2)
    result = measure_images(
        network(images), network(images.flip(3)), network(zoom(images)), (64, 64), whole, whole
    )
    torch.testing.assert_close(result["flip"], torch.ones(2, 2))
    assert result["zoom"].min() > 0.97
    unrelated = measure_images(
        network(images), network(images), network(images.flip(3)), (64, 64), whole, whole
    )
    assert unrelated["flip"].max() < 0.97
    assert unrelated["zoom"].max() < 0.9


# whatever the maps


@settings(max_examples=25)
@given(
    seed=st.integers(0, 1000), height=st.integers(1, 8), width=st.integers(2, 8), scale=st.floats(1e-3, 1e4)
)
def test_ranges_and_scale(seed, height, width, scale):
    maps = random_maps(seed, height=height, width=width)
    # of integers, so that scaling changes no order by rounding
    maps = (8 * maps).round()
    parts = random_regions(seed)
    result, scaled = measured(maps, parts), measured(maps * scale, parts)
    for name, values in result.items():
        if name in ("found", "inside"):
            assert torch.equal(values, scaled[name])
            continue
        torch.testing.assert_close(values, scaled[name], atol=1e-4, rtol=1e-4)
        low = -1 if name in ("flip", "zoom", "correlation") else 0
        assert values.min() >= low - 1e-5
        assert values.max() <= 1 + 1e-5
    result = consistency(result["found"], 4, Bootstrap(3))
    assert 0 <= result["nmi"] <= 1
    assert 0 < result["p_value"] <= 1


@settings(max_examples=10)
@given(seed=st.integers(0, 1000))
def test_the_order_of_images_does_not_matter(seed):
    maps, parts = random_maps(seed, images=6), random_regions(seed, images=6)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(seed))
    permuted = CropRegions(parts.boxes[order], parts.radii, parts.visible[order])
    one_by_one = [measured(maps[b : b + 1], parts[b : b + 1]) for b in order.tolist()]
    for name, values in measured(maps[order], permuted).items():
        torch.testing.assert_close(values, torch.cat([single[name] for single in one_by_one]))
    found = found_parts(maps, parts)
    first, second = (consistency(each, 4, Bootstrap(6))["nmi"] for each in (found, found[order]))
    assert first == pytest.approx(second, abs=1e-9)


# summaries


def test_bootstrap_of_a_mean_has_the_normal_interval(monkeypatch):
    monkeypatch.setattr(measures_of_parts, "RESAMPLES", 4000)
    values = np.random.default_rng(0).normal(2, 1, 900)
    low, high = Bootstrap(900).mean(values)["interval"]
    half = 1.96 * values.std() / 30
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=5e-3)


def test_a_ratio_is_that_of_the_means_over_images_that_show_the_part():
    values, chance = np.array([0.6, 0.2, 9.0, 0.1]), np.array([0.2, 0.1, 9.0, 0.3])
    result = Bootstrap(4).with_chance(values, chance, np.array([True, True, False, True]))
    assert result["value"] == pytest.approx(0.3)
    assert result["chance"] == pytest.approx(0.2)
    assert result["over_chance"] == pytest.approx(1.5)
    low, high = result["over_chance_interval"]
    assert 1 / 3 - 1e-9 <= low < 1.5 < high <= 3 + 1e-9


def test_a_chance_of_zero_has_no_ratio():
    result = Bootstrap(2).with_chance(np.zeros(2), np.zeros(2), np.array([True, True]))
    assert (result["over_chance"], result["over_chance_interval"]) == (None, None)


@pytest.mark.parametrize("excitations", [1, 2])
def test_summary_is_json_and_leaves_out_what_one_excitation_has_not(excitations):
    maps = random_maps(0, images=5, excitations=excitations)
    parts = random_regions(1, images=5)
    has_object = torch.tensor([True] * 5)
    summary = summarize_parts(measured(maps, parts), list("abcd"), parts.visible, has_object, positions=35)
    json.dumps(summary, allow_nan=False)
    assert len(summary["excitations"]) == excitations
    assert (summary["consistency"] is None) == (summary["diversity"] is None) == (excitations == 1)
    first = summary["excitations"][0]
    assert sum(first["found"].values()) == pytest.approx(1)
    # the whole crop is the object
    assert first["object"]["value"] == pytest.approx(first["object"]["chance"]) == pytest.approx(1)
    seen = parts.visible[:, 1]
    share = shares(mass(maps), parts.coverage(5, 7))[0][seen, 0, 1].mean()
    assert first["share"]["b"]["value"] == pytest.approx(float(share))
    hits = shares(peaks(maps), parts.contain(5, 7).any(1, keepdim=True))[0][parts.visible.any(1), 0, 0]
    assert first["any_part"]["value"] == pytest.approx(float(hits.mean()))
    assert 0 < first["any_part"]["chance"] < 1
    nothing = summarize_parts(measured(maps, parts), list("abcd"), parts.visible, ~has_object, positions=35)
    assert nothing["excitations"][0]["object"] is None
