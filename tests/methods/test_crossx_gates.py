"""The gates and terms of Cross-X that are to make excitations parts, against naive loops."""

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from crossx_options import ALL, COMPETING, FOLLOWING, OPTIONS, SPATIAL, TARGETS, WHOLE, build, images
from torch import Tensor
from torch.nn import functional as F

from crossx.layers import AffineView
from crossx.losses import border_loss, c3s_loss
from crossx.methods import CrossX
from crossx.methods.clusters import refined_prototypes, starting_prototypes
from crossx.methods.part_terms import STAGES
from crossx.training.config import OptimConfig
from crossx.training.optim import parameter_groups


def naive_gates(method: CrossX, stage: str, u: Tensor) -> Tensor:
    """The gates of one image's map (C, h, w), score by score, (M, C)."""
    osme = method.backbone.osme[stage]
    z = u.mean((1, 2))
    scores = torch.stack(
        [
            osme.excite_weight[p] @ F.relu(osme.squeeze_weight[p] @ z + osme.squeeze_bias[p])
            + osme.excite_bias[p]
            for p in range(len(osme.excite_bias))
        ]
    )
    if method.options["gates"] != "competing":
        return scores.sigmoid()
    powers = (method.options["gate_sharpness"] * scores).exp()
    return powers / powers.sum(0)


def naive_looks(u: Tensor, gates: Tensor) -> Tensor:
    """Where each gate looks, (M, h, w), channel by channel."""
    return torch.stack([sum(m[c] * u[c].clamp(min=0) for c in range(len(u))) / len(u) for m in gates])


def windows(map_: Tensor) -> list[float]:
    """The mean of each window of 3 x 3 positions, or of the map's size if it is smaller."""
    height, width = map_.shape
    rows, columns = min(3, height), min(3, width)
    return [
        map_[y : y + rows, x : x + columns].mean().item()
        for y in range(height - rows + 1)
        for x in range(width - columns + 1)
    ]


def naive_presence(looks: list[Tensor], everything: list[Tensor], parts: int) -> float:
    most = [max(windows(whole)) for whole in everything]
    best = [
        max(max(windows(look[p])) / strongest for look, strongest in zip(looks, most, strict=True))
        for p in range(parts)
    ]
    return 1 - sum(best) / parts


@pytest.mark.parametrize(
    ("options", "parts"),
    [(ALL, 2), (ALL, 1), (OPTIONS["separation"] | OPTIONS["presence"] | OPTIONS["part"], 3)],
)
def test_terms_follow_their_equations(options: dict[str, object], parts: int) -> None:
    if parts == 1:
        options = options | {"c3s_centred": False}
    method = build(num_parts=parts, **options).eval()
    objective = method.objective(images(), TARGETS)
    stages = method.backbone.ungated(images())
    for stage, weight in (("last", 0.5), ("previous", 0.25)):
        maps = stages[stage]
        gates = [naive_gates(method, stage, u) for u in maps]
        looks = [naive_looks(u, m) for u, m in zip(maps, gates, strict=True)]
        whole = [naive_looks(u, torch.ones(1, len(u)))[0] for u in maps]
        correlations = []
        for look, weights in zip(looks, whole, strict=True):
            numbers = look.flatten(1).detach().double().numpy()
            covariance = np.cov(numbers, aweights=weights.flatten().detach().double().numpy())
            for p in range(len(look)):
                for q in range(p + 1, len(look)):
                    scale = math.sqrt(covariance[p, p] * covariance[q, q])
                    correlations.append(covariance[p, q] / scale)
        assert objective.terms[f"separation_{stage}"].item() == pytest.approx(
            weight * np.mean(correlations), abs=1e-4
        )
        presence = naive_presence(looks, whole, parts)
        assert objective.terms[f"presence_{stage}"].item() == pytest.approx(weight * presence, abs=1e-5)
        attended = method.backbone(images())[stage]
        for n, (u, m) in enumerate(zip(maps, gates, strict=True)):
            for p in range(parts):
                torch.testing.assert_close(attended[n, p], m[p, :, None, None] * u)
    features = method.part_features(images())
    for name, weight in (("last", 0.5), ("previous", 0.25), ("merged", 0.125)):
        losses = []
        for p in range(parts):
            alone = torch.zeros_like(features[name])
            alone[:, p] = features[name][:, p]
            losses.append(F.cross_entropy(method.heads[name](alone.flatten(1)), TARGETS))
        expected = weight * sum(losses) / parts
        torch.testing.assert_close(objective.terms[f"part_{name}"], expected)
        c3s = method.c3s_weights[name] * c3s_loss(features[name], centred=method.options["c3s_centred"])
        torch.testing.assert_close(objective.terms[f"c3s_{name}"], c3s)
    torch.testing.assert_close(objective.loss, sum(objective.terms.values()))


def naive_shares(method: CrossX, last: Tensor, previous: Tensor) -> Tensor:
    """The shares of the parts and the background in each position of one image, (P + 1, H, W)."""
    larger = F.interpolate(last[None], size=previous.shape[1:], mode="bilinear")[0]
    features = torch.cat([larger, previous])
    prototypes = method.backbone.assignment.prototypes
    shares = torch.empty(len(prototypes), *previous.shape[1:])
    for y in range(shares.shape[1]):
        for x in range(shares.shape[2]):
            distances = ((features[:, y, x] - prototypes) ** 2).sum(1)
            powers = (distances.min() - distances).exp()
            shares[:, y, x] = powers / powers.sum()
    return shares


@pytest.mark.parametrize("parts", [2, 3])
def test_spatial_gates_follow_their_equations(parts: int) -> None:
    method = build(num_parts=parts, **SPATIAL).eval()
    with torch.no_grad():
        method.backbone.assignment.prototypes.mul_(0.2)  # shares far from 0 and 1
    stages = method.backbone.ungated(images())
    shares = torch.stack(
        [naive_shares(method, *both) for both in zip(stages["last"], stages["previous"], strict=True)]
    ).detach()
    torch.testing.assert_close(method.backbone.assign(stages), shares, atol=1e-4, rtol=1e-3)
    height, width = shares.shape[2:]
    terms = method.objective(images(), TARGETS).terms
    spread, outside = [], []
    for a in shares.numpy():
        for map_ in a[:-1]:
            total = map_.sum()
            y = sum(map_[i, j] * i / height for i in range(height) for j in range(width)) / total
            x = sum(map_[i, j] * j / width for i in range(height) for j in range(width)) / total
            spread += [
                map_[i, j] * ((i / height - y) ** 2 + (j / width - x) ** 2)
                for i in range(height)
                for j in range(width)
            ]
        outside += [
            a[:-1, i, j].sum()
            for i in range(height)
            for j in range(width)
            if i in (0, height - 1) or j in (0, width - 1)
        ]
    assert terms["concentration"].item() == pytest.approx(10 * np.mean(spread), rel=1e-3)
    assert terms["border"].item() == pytest.approx(2 * np.mean(outside), rel=1e-3)
    attended = method.backbone(images())
    for stage, weight in (("last", 0.5), ("previous", 0.25)):
        presences, correlations = [], []
        for n, u in enumerate(stages[stage]):
            larger = F.interpolate(u[None], size=(height, width), mode="bilinear")[0]
            gates = naive_gates(method, stage, u)
            for p in range(parts):
                expected = shares[n, p] * gates[p, :, None, None] * larger
                torch.testing.assert_close(attended[stage][n, p], expected, rtol=1e-3, atol=1e-4)
            whole = F.interpolate(u.clamp(min=0).mean(0)[None, None], size=(height, width), mode="bilinear")[
                0, 0
            ]
            inner = (slice(1, height - 1), slice(1, width - 1))
            presences += [((a * whole)[inner].max() / whole[inner].max()).item() for a in shares[n, :-1]]
            weights = (whole * (1 - shares[n, -1])).flatten().detach().double().numpy()
            r = np.cov(shares[n, :-1].flatten(1).double().numpy(), aweights=weights)
            correlations += [
                r[p, q] / math.sqrt(r[p, p] * r[q, q]) for p in range(parts) for q in range(p + 1, parts)
            ]
        assert terms[f"presence_{stage}"].item() == pytest.approx(weight * (1 - np.mean(presences)), abs=1e-4)
        assert terms[f"separation_{stage}"].item() == pytest.approx(weight * np.mean(correlations), abs=1e-3)


def test_the_whole_is_one_more_excitation_of_every_position() -> None:
    method = build(num_parts=2, **WHOLE, equivariance_weights=[0.5, 0.25]).eval()
    stages, attended, maps = (
        of(images()) for of in (method.backbone.ungated, method.backbone, method.activation_maps)
    )
    for stage in ("last", "previous"):
        for n, u in enumerate(stages[stage]):
            gate = naive_gates(method, stage, u)[2]
            larger = F.interpolate(u[None], size=attended[stage].shape[3:], mode="bilinear")[0]
            torch.testing.assert_close(attended[stage][n, 2], gate[:, None, None] * larger)
        # the maps, and what is compared with them, are those of the parts
        torch.testing.assert_close(maps[stage], attended[stage][:, :2].clamp(min=0).mean(2))
    terms = method.objective(images(), TARGETS).terms
    for name, features in method.part_features(images()).items():
        assert features.shape[1] == 3
        losses = []
        for p in range(3):
            alone = torch.zeros_like(features)
            alone[:, p] = features[:, p]
            losses.append(F.cross_entropy(method.heads[name](alone.flatten(1)), TARGETS))
        expected = method.part_terms.part[name] * sum(losses) / 3
        torch.testing.assert_close(terms[f"part_{name}"], expected)
        c3s = method.c3s_weights[name] * c3s_loss(features[:, :2])
        torch.testing.assert_close(terms[f"c3s_{name}"], c3s)
    # of the terms on maps, none sees the whole
    with torch.no_grad():
        for osme in method.backbone.osme.values():
            osme.excite_bias[2] += 1
    changed = method.objective(images(), TARGETS).terms
    for name in ("concentration", "border", "separation_last", "presence_last", "equivariance_last"):
        assert torch.equal(changed[name], terms[name])
    assert not torch.equal(changed["part_last"], terms["part_last"])


def test_spatial_gates_divide_a_single_stage_too() -> None:
    method = build(use_previous=False, use_merged=False, **SPATIAL).eval()
    stages = method.backbone.ungated(images())
    shares = method.backbone.assign(stages)
    assert shares.shape == (3, 3, *stages["last"].shape[2:])
    torch.testing.assert_close(shares.sum(1), torch.ones_like(shares[:, 0]))
    assert {name for name in method.objective(images(), TARGETS).terms if "previous" in name} == set()


@pytest.mark.slow
def test_prototypes_start_from_clusters_of_the_training_images() -> None:
    torch.manual_seed(0)
    random, clustered = (build(**SPATIAL | {"assignment_start": start}) for start in ("random", "clusters"))
    clustered.load_state_dict(random.state_dict())
    seen: list[int] = []

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for number in range(4):
            seen.append(number)
            yield images() + number, TARGETS

    state = {name: value.clone() for name, value in clustered.state_dict().items()}
    random.prepare(batches())
    assert not seen
    clustered.train().prepare(batches())
    assert seen == [0, 1, 2, 3]
    changed = [name for name, value in clustered.state_dict().items() if not torch.equal(value, state[name])]
    assert changed == ["backbone.assignment.prototypes"]
    with torch.no_grad():
        maps = [clustered.eval().backbone.ungated(images() + number) for number in range(4)]
    # position by position, from the definition
    features, outermost = [], []
    for stages in maps:
        last = F.interpolate(stages["last"], size=stages["previous"].shape[2:], mode="bilinear")
        for n, of_image in enumerate(torch.cat([last, stages["previous"]], 1)):
            _, height, width = of_image.shape
            assert n < len(TARGETS)
            for y in range(height):
                for x in range(width):
                    features.append(of_image[:, y, x])
                    outermost.append(y in (0, height - 1) or x in (0, width - 1))
    expected = starting_prototypes(torch.stack(features), torch.tensor(outermost), 2)
    torch.testing.assert_close(clustered.backbone.assignment.prototypes.detach(), expected)
    refined = build(**SPATIAL | {"assignment_start": "refined"})
    refined.load_state_dict(state)
    refined.train().prepare(batches())
    joined = [
        torch.cat([F.interpolate(last, size=previous.shape[2:], mode="bilinear"), previous], 1)
        for last, previous in ((stages["last"], stages["previous"]) for stages in maps)
    ]
    active = torch.cat([stages["previous"].clamp(min=0).mean(1) for stages in maps])
    torch.testing.assert_close(
        refined.backbone.assignment.prototypes.detach(),
        refined_prototypes(expected, torch.cat(joined), active),
        rtol=1e-3,
        atol=1e-3,
    )


def test_maps_without_an_inside_leave_the_prototypes_random(caplog: pytest.LogCaptureFixture) -> None:
    method = build(use_previous=False, use_merged=False, **SPATIAL | {"assignment_start": "clusters"})
    before = method.backbone.assignment.prototypes.clone()
    small = images()[:, :, :32, :32]
    assert min(method.backbone.ungated(small)["last"].shape[2:]) < 3
    method.prepare([(small, TARGETS)])
    assert torch.equal(method.backbone.assignment.prototypes, before)
    assert "at the border" in caplog.text


def test_following_prototypes_are_trained_by_the_terms_on_position_alone() -> None:
    method, same = build(**FOLLOWING), build(**FOLLOWING)
    method.objective(images(), TARGETS).loss.backward()
    assert method.backbone.assignment is not None
    assert same.backbone.assignment is not None
    maps = same.backbone.ungated(images())
    shares = same.backbone.assign(maps)
    assert shares is not None
    sum(same.part_terms.of_shares(maps, shares, STAGES).values()).backward()
    torch.testing.assert_close(
        method.backbone.assignment.prototypes.grad, same.backbone.assignment.prototypes.grad
    )
    # nor do the terms train anything else
    assert [name for name, p in same.named_parameters() if p.grad is not None] == [
        "backbone.assignment.prototypes"
    ]


@pytest.mark.parametrize(("options", "factor"), [(SPATIAL, 1.0), (FOLLOWING, 10.0)])
@pytest.mark.parametrize("taken", [False, True])
def test_prototypes_have_a_learning_rate_of_their_own(
    options: dict[str, object], factor: float, taken: bool
) -> None:
    method = build(**options)
    if taken:
        # from another network
        method.taken = frozenset(name for name, _ in method.named_parameters())
    config = OptimConfig(lr=0.02, new_layers_lr_factor=0.1, weight_decay=0.0)
    rates = {
        name: group["lr"]
        for group in parameter_groups(method, config)
        for name, parameter in method.named_parameters()
        if any(parameter is own for own in group["params"])
    }
    assert rates.pop("backbone.assignment.prototypes") == pytest.approx(0.002 * factor)
    assert rates["heads.last.weight"] == rates["backbone.osme.last.squeeze_weight"] == pytest.approx(0.002)


def test_parts_at_the_border_are_the_only_ones_that_its_term_sees() -> None:
    background = torch.ones(2, 5, 4)
    background[:, 1:-1, 1:-1] = 0
    assert border_loss(background).item() == 0
    assert border_loss(1 - background).item() == 1
    assert border_loss(torch.full((1, 2, 3), 0.25)).item() == pytest.approx(0.75)


@pytest.mark.parametrize("options", [OPTIONS["equivariance"], OPTIONS["equivariance"] | COMPETING])
def test_equivariance_compares_the_maps_of_a_view(options: dict[str, object]) -> None:
    method = build(**options).eval()
    count = len(images())
    view = AffineView(torch.full((count,), math.pi / 4), torch.ones(count), torch.zeros(count, 2))
    here, there = method.activation_maps(images()), method.activation_maps(view.apply(images()))
    terms = method.objective(images(), TARGETS).terms
    for stage, weight in (("last", 0.5), ("previous", 0.25)):
        shown = view.undo(torch.ones(count, 1, *here[stage].shape[2:]))[:, 0]
        back = view.undo(there[stage])
        losses = []
        for n in range(count):
            weights = shown[n].flatten().double().numpy()
            for p in range(2):
                a, b = here[stage][n, p], back[n, p] / shown[n].clamp(min=1e-3)
                both = torch.stack([a.flatten(), b.flatten()]).detach().double().numpy()
                covariance = np.cov(both, aweights=weights)
                losses.append(1 - covariance[0, 1] / math.sqrt(covariance[0, 0] * covariance[1, 1]))
        assert terms[f"equivariance_{stage}"].item() == pytest.approx(weight * np.mean(losses), abs=1e-4)


def test_views_are_random_in_training_and_leave_running_statistics_alone() -> None:
    plain, terms = build(), []
    plain.objective(images(), TARGETS)
    for seed in (3, 3, 4):
        method = build(**OPTIONS["equivariance"])
        torch.manual_seed(seed)
        terms.append(method.objective(images(), TARGETS).terms["equivariance_previous"])
        torch.testing.assert_close(dict(method.named_buffers()), dict(plain.named_buffers()), rtol=0, atol=0)
    assert terms[0] == terms[1] != terms[2]


@pytest.mark.parametrize("term", ["separation", "presence"])
def test_terms_on_the_gates_train_no_channels_but_through_the_gates(term: str) -> None:
    method = build(**COMPETING, **OPTIONS[term])
    maps = {
        stage: map_.detach().requires_grad_() for stage, map_ in method.backbone.ungated(images()).items()
    }
    # gates that do not depend on the maps
    gates = {stage: gates.detach().requires_grad_() for stage, gates in method.backbone.gates(maps).items()}
    sum(method.part_terms.of_gates(maps, gates).values()).backward()
    assert all(map_.grad is None for map_ in maps.values())
    assert all(gates[stage].grad.any() for stage in ("last", "previous"))


@pytest.mark.parametrize(
    ("options", "stages"),
    [
        ({}, set()),
        ({"part_weights": [1, 1, 1], "c3s_centred": True, "equivariance_weights": [1, 1]}, set()),
        ({"gates": "competing"}, {"last", "previous"}),
        ({"separation_weights": [1, 0]}, {"last", "previous"}),
        ({"presence_weights": [0, 1]}, {"last", "previous"}),
        ({"gates": "competing", "use_previous": False, "use_merged": False}, {"last"}),
        ({"gates": "spatial"}, {"last", "previous"}),
    ],
)
def test_gates_are_on_the_map_where_the_shortcut_would_bypass_them(
    options: dict[str, object], stages: set[str]
) -> None:
    assert set(build(**options).backbone.osme) == stages


def test_stages_without_gates_have_no_terms() -> None:
    method = build(use_previous=False, use_merged=False, **ALL)
    terms = method.objective(images(), TARGETS).terms
    assert set(terms) == {
        "data",
        *(f"{term}_last" for term in ("c3s", "separation", "presence", "equivariance", "part")),
    }
