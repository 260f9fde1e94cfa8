import itertools

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from crossx.errors import UsageError
from crossx.layers import channel_peaks
from crossx.methods import create_method
from crossx.methods.ma_cnn import CLASSIFICATION, GROUPING, cluster


def build(**options):
    torch.manual_seed(0)
    return create_method(
        "ma_cnn",
        backbone="resnet10t",
        num_classes=3,
        image_size=64,
        backbone_args={"channels": [8, 16, 24, 32]},
        **options,
    ).eval()


@pytest.fixture
def images():
    return torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))


TARGETS = torch.tensor([2, 0])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"shared_trunk": True, "crop_size": 48, "part_side": 0.5, "num_parts": 3, "object_crop": True},
        {"part_crops": False, "num_parts": 2, "dis_weight": 0.5, "div_weight": 3.0},
    ],
)
def test_the_objective_step_by_step(images, options) -> None:
    method = build(**options)
    parts, crops = options.get("num_parts", 4), options.get("part_crops", True)
    side, size = round(64 * options.get("part_side", 2 / 7)), options.get("crop_size", 32)
    for trunk in method.crop_trunks:  # otherwise clones are alike
        torch.nn.init.normal_(trunk.trunk.conv1[0].weight, std=0.1)
    features = method.backbone(images)["last"]
    pooled = features.mean((2, 3))
    weights = method.grouping(pooled)
    expected = {"image": method.heads["image"](pooled), "parts": [], "crops": []}
    joined, spread, overlap, boxes = [pooled], 0.0, 0.0, []
    maps = []
    for part in range(parts):
        sums = torch.stack(
            [torch.einsum("chw,c->hw", f, w[part]) for f, w in zip(features, weights, strict=True)]
        )
        maps.append(sums / sums.sum((1, 2), keepdim=True))
        seen = (features * maps[-1][:, None]).sum((2, 3))
        head = method.heads["parts"]
        expected["parts"].append(seen @ head.weight[part].T + head.bias[part])
        if not crops:
            joined.append(seen)
        rows = []
        for own in maps[-1]:
            peak = divmod(int(own.argmax()), 3)
            y, x = ((place + 0.5) * 32 - side / 2 for place in peak)
            rows.append([min(max(int(x // 1), 0), 96 - side), min(max(int(y // 1), 0), 64 - side)])
            for y, x in itertools.product(range(2), range(3)):
                spread += own[y, x] * ((y - peak[0]) ** 2 + (x - peak[1]) ** 2) / 2
        boxes.append(torch.tensor([[left, top, left + side, top + side] for left, top in rows]))
    for part, (image, y, x) in itertools.product(
        range(parts), itertools.product(range(2), range(2), range(3))
    ):
        strongest = max(maps[k][image, y, x] for k in range(parts) if k != part)
        overlap += maps[part][image, y, x] * (strongest - 0.02) / 2
    if crops:
        found = method.boxes(images)
        torch.testing.assert_close(found[:, :parts], torch.stack(boxes, 1).float())
        for region, of_images in enumerate(found.int().unbind(1)):
            resized = torch.cat(
                [
                    F.interpolate(
                        image[None, :, top:bottom, left:right],
                        (size, size),
                        mode="bilinear",
                        align_corners=True,
                    )
                    for image, (left, top, right, bottom) in zip(images, of_images.tolist(), strict=True)
                ]
            )
            trunk = method.crop_trunks[0 if options.get("shared_trunk") else region]
            joined.append(trunk(resized)["last"].mean((2, 3)))
            head = method.heads["crops"]
            expected["crops"].append(joined[-1] @ head.weight[region].T + head.bias[region])
    # each to a mean square of one over their number
    scaled = [own / (len(joined) * own.square().mean(1, keepdim=True)).sqrt() for own in joined]
    expected["joined"] = method.heads["joined"](torch.cat(scaled, 1))
    objective = method.objective(images, TARGETS)
    terms = {"data_image": F.cross_entropy(expected["image"], TARGETS)}
    for name in ("parts", "crops") if crops else ("parts",):
        losses = [F.cross_entropy(own, TARGETS) for own in expected[name]]
        terms[f"data_{name}"] = sum(losses) / len(losses)
        heads = method.head_logits(images)
        torch.testing.assert_close(heads[name], sum(expected[name]) / len(losses), rtol=1e-4, atol=1e-4)
    terms["data_joined"] = F.cross_entropy(expected["joined"], TARGETS)
    terms["dis"] = options.get("dis_weight", 1.0) * spread
    terms["div"] = options.get("div_weight", 2.0) * overlap
    assert list(objective.terms) == list(terms)
    for name, term in terms.items():
        torch.testing.assert_close(objective.terms[name], term, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(objective.logits, expected["joined"], rtol=1e-4, atol=1e-4)
    assert (method.boxes(images) is None) == (not crops)
    torch.testing.assert_close(
        method.activation_maps(images)["last"], torch.stack(maps, 1), rtol=1e-4, atol=1e-5
    )


def test_each_loss_trains_its_own_layers(images) -> None:
    method = build()

    def trained(*names: str) -> set[str]:
        method.zero_grad()
        terms = method.objective(images, TARGETS).terms
        sum(terms[name] for name in names).backward()
        return {key.split(".")[0] for key, value in method.named_parameters() if value.grad is not None}

    assert trained("dis", "div") == {"grouping"}
    assert trained("data_image", "data_parts") == {"backbone", "heads"}
    assert trained("data_crops") == {"crop_trunks", "heads"}
    assert trained("data_joined") == {"heads"}
    for phase in (CLASSIFICATION, GROUPING):
        method.phase = phase
        method.zero_grad()
        method.objective(images, TARGETS).loss.backward()
        for key, parameter in method.named_parameters():
            assert (parameter.grad is not None) == key.startswith(phase.trains), key


@pytest.mark.parametrize(
    ("every", "expected"), [(2, "gcgcgc"), (3, "gccgcc"), (0, "------"), (7, "cccccc"), (6, "gccccc")]
)
def test_phases_take_turns_and_end_with_classification(every: int, expected: str) -> None:
    method = build(grouping_every=every)
    names = {"g": "grouping", "c": "classification", "-": "all"}
    assert [method.phase_at(epoch, 6).name for epoch in range(6)] == [names[letter] for letter in expected]
    if every:
        assert method.phase_at(0, 1) == CLASSIFICATION


def test_clusters_are_the_best_of_all_partitions() -> None:
    points = np.random.default_rng(3).normal(size=(8, 4))

    def spread(labels) -> float:
        own = [points[np.array(labels) == label] for label in set(labels)]
        return sum(((rows - rows.mean(0)) ** 2).sum() for rows in own)

    best = min(itertools.product(range(2), repeat=8), key=spread)
    found = cluster(torch.from_numpy(points), 2)
    assert spread(found.tolist()) == pytest.approx(spread(best))
    assert torch.equal(found, cluster(torch.from_numpy(points), 2))


def test_fewer_places_than_clusters() -> None:
    points = torch.tensor([[1.0, 2.0], [0.0, 1.0], [1.0, 2.0], [0.0, 1.0]])
    assert cluster(points, 3).tolist() == [1, 0, 1, 0]
    assert cluster(torch.zeros(5, 3), 4).tolist() == [0] * 5


def test_prepare_groups_the_channels_that_peak_together(images, monkeypatch) -> None:
    method = build(num_parts=3)
    random = torch.Generator().manual_seed(0)
    groups = torch.arange(32) % 3
    maps = torch.zeros(6, 32, 8, 8)
    for image, channel in itertools.product(range(6), range(32)):
        if channel != 31:  # which never responds
            spot = (5 * groups[channel] + image * torch.tensor([7, 3, 11])[groups[channel]]) % 64
            near = (int(spot) + int(torch.randint(0, 2, (1,), generator=random))) % 64
            maps[image, channel, near // 8, near % 8] = 1
    monkeypatch.setattr(method.backbone, "forward", lambda batch: {"last": maps[batch[:, 0, 0, 0].long()]})
    batches = [(torch.arange(6.0)[rows].view(-1, 1, 1, 1), TARGETS) for rows in (slice(4), slice(4, 6))]
    method.prepare(iter(batches))
    weights = method.grouping(torch.randn(2, 32)) > 0.5
    assert torch.equal(weights.sum(1), torch.ones_like(weights.sum(1)))
    found = weights[0].int().argmax(0)[:31]
    assert len(set(zip(found.tolist(), groups[:31].tolist(), strict=True))) == 3
    assert channel_peaks(maps)[0, 31].tolist() == channel_peaks(maps)[0, :31].mean(0).tolist()


def test_without_images_the_grouping_starts_at_random() -> None:
    method = build()
    before = {key: value.clone() for key, value in method.state_dict().items()}
    method.prepare(iter([]))
    torch.testing.assert_close(method.state_dict(), before, rtol=0, atol=0)


def test_the_grouping_finds_channels_of_single_peaks(monkeypatch) -> None:
    # channels 0 and 1 peak in one spot each, the others respond everywhere
    maps = 0.2 * torch.rand(4, 32, 6, 6, generator=torch.Generator().manual_seed(0))
    maps[:, :2] = 0
    for image in range(4):
        maps[image, 0, image, 0] = maps[image, 1, 5 - image, 4] = 20
    method = build(num_parts=2, part_crops=False)
    monkeypatch.setattr(method.backbone, "forward", lambda images: {"last": maps})
    images, targets = torch.zeros(4, 3, 8, 8), torch.zeros(4).long()
    optimizer = torch.optim.Adam(method.grouping.parameters(), lr=0.02)
    history = []
    method.grouping.start_from(torch.tensor([0, 1] * 16))
    for _ in range(60):
        terms = method.objective(images, targets).terms
        history.append((terms["dis"].item(), terms["div"].item()))
        optimizer.zero_grad()
        (terms["dis"] + terms["div"]).backward()
        optimizer.step()
    (first_dis, _), (last_dis, _) = history[0], history[-1]
    assert last_dis < first_dis / 3
    peaks = method.activation_maps(images)["last"].flatten(2).argmax(2)
    assert peaks.tolist() == [[6 * image, 6 * (5 - image) + 4] for image in range(4)]


@pytest.mark.parametrize("options", [{"num_parts": 2}, {"part_crops": False}, {"object_crop": True}])
def test_a_single_image_of_two_classes_is_as_in_a_batch(images, options) -> None:
    method = build(**options)
    torch.testing.assert_close(method(images[:1]), method(images)[:1], rtol=1e-4, atol=1e-5)
    soft = torch.tensor([[0.2, 0.5, 0.3], [1.0, 0.0, 0.0]])
    hard = method.objective(images, TARGETS).loss
    torch.testing.assert_close(method.objective(images, F.one_hot(TARGETS, 3).float()).loss, hard)
    assert method.objective(images, soft).loss.isfinite()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_parts": 1}, "num_parts must be between 2 and 32, not 1"),
        ({"num_parts": 33}, "num_parts must be between 2 and 32"),
        ({"part_crops": False, "object_crop": True}, "object_crop needs part_crops"),
        ({"part_crops": False, "shared_trunk": True}, "shared_trunk needs part_crops"),
        ({"part_side": 0.0}, "part_side must be above 0"),
        ({"part_side": 1.1}, "part_side must be above 0"),
        ({"part_side": float("nan")}, "part_side must be above 0"),
        ({"crop_size": 1}, "crop_size must be between 2"),
        ({"grouping_every": 1}, "grouping_every must be 0, or 2 or more, not 1"),
        ({"grouping_every": -2}, "grouping_every must be 0, or 2 or more"),
        ({"dis_weight": -1.0}, "dis_weight must be at least 0"),
        ({"div_weight": float("inf")}, "div_weight must be at least 0"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1"),
        ({"part_crops": "yes"}, "part_crops"),
    ],
)
def test_options_are_checked(options, message) -> None:
    with pytest.raises(UsageError, match=message):
        build(**options)


def test_sizes_are_checked() -> None:
    with pytest.raises(UsageError, match=r"part_side 0.02 is too small: parts of images of 64 pixels have 1"):
        build(part_side=0.02).check_image_size(64)
    vit = create_method("ma_cnn", backbone="vit_tiny_patch16_224", num_classes=2, backbone_args={"depth": 2})
    with pytest.raises(UsageError, match=r"uses crops of 112 pixels, which backbone .* does not accept"):
        vit.check_image_size(224)
    vit = create_method(
        "ma_cnn",
        backbone="vit_tiny_patch16_224",
        num_classes=2,
        backbone_args={"depth": 2, "dynamic_img_size": True},
    ).eval()
    vit.check_image_size(224)
    with torch.inference_mode():
        assert vit(torch.randn(1, 3, 224, 224)).shape == (1, 2)


@pytest.mark.slow
def test_vgg_is_seen_before_its_last_pooling() -> None:
    method = create_method("ma_cnn", backbone="vgg11", num_classes=2, image_size=64, shared_trunk=True).eval()
    images = torch.randn(1, 3, 64, 64)
    assert method.activation_maps(images)["previous"].shape == (1, 4, 4, 4)
    assert method(images).shape == (1, 2)
