import itertools
import json

import numpy as np
import pytest
import torch
from scipy.ndimage import map_coordinates
from torch.nn import functional as F

from crossx.evaluation.parts.keypoints import assignments, find_centroids, label_keypoints
from crossx.evaluation.parts.measures import measure_images
from crossx.evaluation.parts.prototypes import find_peaks
from crossx.evaluation.parts.regions import CropRegions
from crossx.evaluation.parts.summary import Fitted, Measured, Places, summarize_stage
from crossx.evaluation.parts.verdict import verdict
from crossx.evaluation.parts.views import (
    TILT,
    VIEWS,
    differences,
    likeness,
    measure_positions,
    measure_views,
    thumbnails,
)

IMAGES, SIDE, CELLS = 40, 64, 8


def random_maps(seed, images=3, excitations=2, height=6, width=6):
    return torch.randn(images, excitations, height, width, generator=torch.Generator().manual_seed(seed))


def pearson(a, b):
    return np.corrcoef(np.asarray(a).ravel(), np.asarray(b).ravel())[0, 1]


@pytest.mark.parametrize(
    ("view", "move"),
    [
        ("flip", np.fliplr),
        ("upside_down", np.flipud),
        ("quarter_turn", np.rot90),
        ("zoom", None),
        ("tilt", None),
    ],
)
def test_views_against_numpy(view, move):
    maps, of_view = (random_maps(seed, height=12, width=12) for seed in (0, 1))
    found = measure_views(maps, {view: of_view}, (SIDE, SIDE))
    for image, p in itertools.product(range(3), range(2)):
        here, seen = maps[image, p].numpy(), of_view[image, p].numpy()
        kept = np.ones((12, 12), bool)
        if move is not None:
            moved = move(here)
        elif view == "zoom":
            at = np.clip((np.arange(12) + 0.5) * 7 / 8 - 0.5, 0, 11)
            moved = map_coordinates(here, np.meshgrid(at, at, indexing="ij"), order=1)
        else:
            rows, columns = np.mgrid[:12, :12] - 5.5
            angle = np.deg2rad(TILT)
            at = np.array(
                [
                    np.sin(angle) * columns + np.cos(angle) * rows,
                    np.cos(angle) * columns - np.sin(angle) * rows,
                ]
            )
            kept = (np.abs(at) <= 6).all(0)
            moved = map_coordinates(here, at + 5.5, order=1, mode="nearest")
            assert 100 < kept.sum() < 144
        follows, frame = pearson(moved[kept], seen[kept]), pearson(here[kept], seen[kept])
        assert found[view][image, p] == pytest.approx(follows, abs=1e-5)
        assert found[f"{view}_frame"][image, p] == pytest.approx(frame, abs=1e-5)
        assert found[f"{view}_symmetry"][image, p] == pytest.approx(
            pearson(moved[kept], here[kept]), abs=1e-5
        )
        assert found["follows"][image, p] == pytest.approx(follows - frame, abs=1e-5)


def test_views_turn_images_and_maps_alike():
    pattern = F.interpolate(random_maps(2, 2, 3, 4, 4), (SIDE, SIDE), mode="bicubic")
    for view in VIEWS.values():
        seen, moved = view.images(pattern), view.maps(pattern, (SIDE, SIDE))
        kept = view.kept(SIDE, SIDE)
        # bilinear in both, but from another side at the outermost pixels
        assert (seen - moved)[..., kept].abs().mean() < 0.02


def test_maps_that_are_not_square_and_constant_maps():
    for maps in (random_maps(0, height=5, width=7), torch.full((3, 2, 1, 1), 2.0), torch.zeros(3, 2, 4, 4)):
        found = measure_views(maps, dict.fromkeys(VIEWS, maps), (SIDE, SIDE)) | measure_positions(maps)
        assert all(values.isfinite().all() and (values.abs() <= 2).all() for values in found.values())
        assert likeness(thumbnails(maps)).isfinite().all()
        assert differences(maps).isfinite().all()


def test_likeness_against_a_loop():
    maps = random_maps(3, images=5)
    maps[4, 1] = 2.0  # constant
    found = likeness(maps)
    units = maps - maps.mean((2, 3), keepdim=True)
    units = units / units.flatten(2).norm(dim=2).clamp(min=1e-9)[..., None, None]
    for image, p in itertools.product(range(4), range(2)):
        others = units[[n for n in range(5) if n != image], p].sum(0)
        assert found[image, p] == pytest.approx(pearson(maps[image, p], others), abs=1e-5)
    assert found[4, 1] == 0
    assert likeness(maps[:1]).tolist() == [[0, 0]]


def test_differences_are_between_standardised_maps():
    maps = random_maps(4)
    scaled = maps * torch.tensor([1.0, 9.0])[:, None, None] + 5
    torch.testing.assert_close(differences(maps), differences(scaled), atol=1e-4, rtol=1e-4)
    standard = (maps - maps.mean((2, 3), keepdim=True)) / maps.std((2, 3), keepdim=True, correction=0)
    torch.testing.assert_close(
        differences(maps)[:, 0], (standard[:, 0] - standard[:, 1]) / 2, atol=1e-5, rtol=1e-5
    )
    assert differences(maps[:, :1].expand(-1, 3, -1, -1)).eq(0).all()


# controls


def birds(seed):
    """Return a bird per image: three boxes of parts in it, whose arrangement is turned at random."""
    generator = torch.Generator().manual_seed(seed)
    centre = 0.35 + 0.3 * torch.rand(IMAGES, 1, 2, generator=generator)
    turn = 2 * torch.pi * (torch.rand(IMAGES, 1, generator=generator) + torch.arange(3) / 3)
    offset = 0.22 * torch.stack([turn.cos(), turn.sin()], -1)
    boxes = torch.cat([centre + offset - 0.11, centre + offset + 0.11], -1)
    radii = torch.full((IMAGES,), 0.1)
    whole = torch.cat([centre - 0.33, centre + 0.33], -1)
    return (
        CropRegions(boxes, radii, torch.ones(IMAGES, 3, dtype=torch.bool)),
        CropRegions(whole, radii, torch.ones(IMAGES, 1, dtype=torch.bool)),
    )


def summarized(draw, names=("head", "wing", "tail")):
    """Return the summary of maps; ``draw`` makes them from the coverage of the parts, in the image or a view of it."""

    def measured(parts, objects):
        seen = torch.cat([parts.coverage(CELLS, CELLS), objects.coverage(CELLS, CELLS)], 1)
        maps = draw(seen)
        views = {name: draw(view.maps(seen, (SIDE, SIDE))) for name, view in VIEWS.items()}
        shown = parts if names else CropRegions(parts.boxes[:, :0], parts.radii, parts.visible[:, :0])
        measures = measure_images(maps, views["flip"], views["zoom"], (SIDE, SIDE), shown, objects)
        measures |= measure_views(maps, views, (SIDE, SIDE)) | measure_positions(maps)
        measures["thumbnails"] = thumbnails(maps)
        of_stage = Measured((CELLS, CELLS))
        scores = assignments(maps, are_shares=False)
        of_stage.add_scores(scores)
        if names:
            measures["labels"] = label_keypoints(scores, parts.centres, SIDE)
            measures["centroids"], measures["active"] = find_centroids(maps, SIDE, are_shares=False)
            measures["peaks"] = measures["noisy_peaks"] = find_peaks(maps, SIDE)
        of_stage.batches.append(measures)
        return of_stage, measures, shown, objects

    of_stage, _, parts, objects = measured(*birds(0))
    fitted = None
    if names:
        _, fit, *regions = measured(*birds(1))
        fitted = Fitted(fit["centroids"], fit["active"], *regions)
    places = Places(tuple(names), parts, objects, (0,) * IMAGES, SIDE)
    summary = summarize_stage(of_stage, places, fitted)
    json.dumps(summary, allow_nan=False)
    return summary


def oracle(seen):
    return seen[:, :3]


def rows(seen):
    """Return the object's activation in the upper half of the frame, and in the lower."""
    upper = (torch.arange(CELLS) < CELLS / 2).float()[:, None]
    body = seen[:, 3:] + 0.2
    return torch.cat([body * upper, body * (1 - upper)], 1)


def ring(seen):
    """Return maps of the frame's centre and of its border, with a little of the object."""
    y, x = torch.meshgrid(*[(torch.arange(CELLS) + 0.5) / CELLS - 0.5] * 2, indexing="ij")
    inner = torch.hypot(x, y).expand(len(seen), 1, -1, -1)
    return torch.cat([1 - inner + 0.05 * seen[:, 3:], inner + 0.05 * seen[:, 3:]], 1)


def random_gates(seen):
    """Return means over channels that respond to parts, with random gates that are almost open."""
    gates = 0.98 + 0.02 * torch.rand(2, 4, generator=torch.Generator().manual_seed(0))
    return torch.einsum("pc,bchw->bphw", gates, seen)


def figure_and_ground(seen):
    return torch.cat([seen[:, 3:], 1 - seen[:, 3:]], 1)


def test_an_oracle_finds_parts():
    summary = summarized(oracle)
    assert summary["consistency"]["nmi"] == pytest.approx(1)
    assert summary["consistency"]["inside"]["nmi"] == pytest.approx(1)
    assert summary["keypoints"]["nmi"]["value"] > 0.95 > 0.5 > summary["keypoints"]["nmi"]["frame"]
    assert summary["keypoints"]["nmi"]["chance"] < 0.2
    error = summary["keypoints"]["error"]
    assert error["value"] < 0.05 < error["frame"] < 2 * error["chance"]
    assert summary["prototypes"]["consistency"]["value"] == 1 > summary["prototypes"]["consistency"]["chance"]
    assert summary["diversity"]["follows"]["interval"][0] > 0.3
    # it moves exactly with the image, but for what bilinear views change
    assert summary["diversity"]["follows"]["possible"] == pytest.approx(
        summary["diversity"]["follows"]["value"], rel=0.1
    )
    for excitation in summary["excitations"]:
        assert excitation["upside_down"]["value"] == pytest.approx(1, abs=1e-5)
        assert excitation["upside_down"]["frame"] == pytest.approx(
            excitation["upside_down"]["symmetry"], abs=1e-5
        )
        assert abs(excitation["rows"]["value"]) < 0.3
    text = verdict({"stages": {"last": summary}})
    assert text.startswith("The three excitations look at different positions")
    assert "find parts of their own (NMI 1.00)" in text


@pytest.mark.parametrize(
    ("draw", "words"),
    [
        (rows, "follows the frame, not the image"),
        (ring, "follows the frame, not the image"),
        (random_gates, "The two excitations look at the same positions (correlation 1.00)."),
        (figure_and_ground, "excitation 2 looks at a part in only"),
    ],
)
def test_what_is_no_part_is_unmasked(draw, words):
    summary = summarized(draw)
    assert words in verdict({"stages": {"last": summary}})
    assert (summary["diversity"]["follows"]["interval"][1] < 0) == ("frame" in words)
    if draw is rows:
        first = summary["excitations"][0]
        assert first["upside_down"]["frame"] > 0.5 > first["upside_down"]["value"]
        assert summary["diversity"]["other_images"]["value"] > 0.6


@pytest.mark.parametrize(
    ("draw", "words"), [(rows, "follows the frame, not the image"), (oracle, "moves with the image")]
)
def test_without_parts_the_frame_is_unmasked_too(draw, words):
    summary = summarized(draw, names=())
    assert summary["keypoints"] is summary["prototypes"] is summary["consistency"] is None
    assert words in verdict({"stages": {"last": summary}})


def test_one_map_and_constant_maps():
    one = summarized(lambda seen: seen[:, :1])
    assert verdict({"stages": {"last": one}}) == "There is one map, so nothing to compare."
    assert one["diversity"] is one["consistency"] is None
    assert one["keypoints"]["nmi"]["value"] > one["keypoints"]["nmi"]["frame"]
    constant = summarized(lambda seen: torch.ones_like(seen[:, :2]))
    assert constant["keypoints"]["nmi"]["value"] == 0
    assert (
        verdict({"stages": {"last": constant}})
        == "The two excitations cannot be compared: excitation 1 is flat in 100% of the images."
    )
    dead = summarized(lambda seen: torch.stack([seen[:, 0], torch.zeros_like(seen[:, 0])], 1))
    assert "excitation 2 is flat in 100%" in str(verdict({"stages": {"last": dead}}))
    assert constant["prototypes"]["consistency"]["value"] == constant["prototypes"]["consistency"]["chance"]


def test_a_small_effect_or_few_images_do_not_decide_what_maps_follow():
    stage = summarized(rows)
    assert "follows the frame" in str(verdict({"stages": {"last": stage}}))
    assert "follows the frame" not in str(verdict({"n": 19, "stages": {"last": stage}}))
    stage["diversity"]["follows"] = {"value": -0.004, "interval": [-0.007, -0.001]}
    assert "follows the frame" not in str(verdict({"stages": {"last": stage}}))


def test_stages_with_the_same_verdict_share_a_clause():
    same = summarized(random_gates)
    own = verdict({"stages": {"last": same}, "map_name": "part map"})
    assert own == "The two part maps look at the same positions (correlation 1.00)."
    text = verdict({"stages": {"last": same, "previous": same, "merged": summarized(rows)}})
    assert text.startswith(
        "At last and previous, the two excitations look at the same positions (correlation 1.00); at merged"
    )


@pytest.mark.parametrize(
    "measures", [{}, {"stages": {}}, {"stages": 3}, {"stages": {"last": {"excitations": [1, 2]}}}]
)
def test_an_unknown_form_has_no_verdict(measures):
    assert verdict(measures) is None
