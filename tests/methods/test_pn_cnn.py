import pytest
import torch
from torch.nn import functional as F

from crossx.errors import UsageError
from crossx.layers.similarity import Similarity
from crossx.methods import create_method
from crossx.methods.pn_cnn import bilinear_targets, mean_shape

NAMES = ["beak", "crown", "left eye", "back", "tail", "left wing"]


def build(**options):
    torch.manual_seed(0)
    return create_method(
        "pn_cnn",
        backbone="resnet10t",
        num_classes=3,
        image_size=64,
        backbone_args={"channels": [16, 32, 64, 128]},
        **{"part_names": NAMES, **options},
    ).eval()


def shapes(count: int, noise: float = 0.0):
    """Return a shape of ten points, copies of it under random similarities and reflections, and their scales."""
    random = torch.Generator().manual_seed(1)
    shape = torch.randn(10, 2, generator=random, dtype=torch.float64)
    angle = torch.rand(count, generator=random).double() * 6
    scale = 0.1 + torch.rand(count, generator=random).double()
    matrix = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 1).view(-1, 2, 2)
    matrix *= scale[:, None, None]
    matrix[::2, :, 0] *= -1
    moved = Similarity(matrix, torch.randn(count, 2, generator=random).double())(shape.expand(count, 10, 2))
    return shape, moved + noise * torch.randn(moved.shape, generator=random), scale


def test_the_mean_shape_is_that_of_the_copies() -> None:
    shape, copies, scales = shapes(30)
    weights = (torch.rand(30, 10, generator=torch.Generator().manual_seed(2)) < 0.7).double()
    weights[0] = 1
    found, scale = mean_shape(copies, weights, margin=1.5)
    assert found.abs().max() == pytest.approx(1 / 1.5)
    # distances are the same but for one factor
    ratio = torch.pdist(found) / torch.pdist(shape)
    torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio))
    assert scale == pytest.approx(float(scales.mean() / ratio[0]), rel=1e-6)


def test_the_mean_of_noisy_shapes_is_closer_than_the_shapes() -> None:
    shape, copies, _ = shapes(200, noise=0.02)
    found, _ = mean_shape(copies, torch.ones(200, 10).double(), margin=1.0)
    ratio = torch.pdist(found) / torch.pdist(shape)
    assert ratio.std() / ratio.mean() < 0.05


def test_warps_map_the_references_onto_the_keypoints() -> None:
    method = build()
    images = torch.rand(2, 3, 64, 64)
    turn = torch.tensor([[0.0, -14.0], [14.0, 0.0]])
    mirror = torch.tensor([[-15.0, 0.0], [0.0, 15.0]])
    points = torch.stack([method.references[0] @ turn.T + 30, method.references[0] @ mirror.T + 33])
    warps = method.warps(points, torch.ones(2, 6), images)
    assert warps.matrix.shape == (2, 2, 2, 2)
    for region in range(2):
        torch.testing.assert_close(warps.matrix[:, region], torch.stack([turn, mirror]), atol=1e-3, rtol=1e-4)
    members = method.members.bool()
    assert members.tolist() == [
        [True, True, True, False, False, False],
        [False, False, False, True, True, True],
    ]
    mapped = warps(method.references.expand(2, 2, 6, 2))
    for region in range(2):
        torch.testing.assert_close(
            mapped[:, region, members[region]], points[:, members[region]], atol=1e-3, rtol=1e-4
        )


def test_few_keypoints_give_the_usual_region_or_the_whole_image() -> None:
    method = build()
    points = torch.full((1, 6, 2), 20.0)
    visible = torch.tensor([[0, 1.0, 0, 0, 0, 0]])
    warps = method.warps(points, visible, torch.rand(1, 3, 64, 64))
    torch.testing.assert_close(warps.matrix[0, 0], torch.eye(2) * 16)
    torch.testing.assert_close(warps(method.references)[0, 0, 1], torch.tensor([20.0, 20.0]))
    torch.testing.assert_close(warps.matrix[0, 1], torch.eye(2) * 32)
    torch.testing.assert_close(warps.shift[0, 1], torch.tensor([32.0, 32.0]))
    # all in one spot: the usual scale, without a direction
    warps = method.warps(points, torch.ones(1, 6), torch.rand(1, 3, 64, 64))
    torch.testing.assert_close(warps.matrix[0], torch.eye(2).expand(2, 2, 2) * 16)


def test_bilinear_targets_have_the_point_as_their_mean() -> None:
    points = torch.rand(3, 5, 2) * torch.tensor([64.0, 48.0])
    shares = bilinear_targets(points, (48, 64), (6, 8))
    torch.testing.assert_close(shares.sum((2, 3)), torch.ones(3, 5))
    x = (shares.sum(2) * (torch.arange(8) + 0.5) * 8).sum(2)
    y = (shares.sum(3) * (torch.arange(6) + 0.5) * 8).sum(2)
    expected = points.clamp(min=4).minimum(torch.tensor([60.0, 44.0]))
    torch.testing.assert_close(torch.stack([x, y], 2), expected)


def test_the_objective_step_by_step() -> None:
    method = build(keypoint_weight=0.5, region_size=48)
    images, targets = torch.randn(2, 3, 64, 64), torch.tensor([2, 0])
    parts = torch.cat(
        [torch.rand(2, 6, 2) * 64, torch.tensor([[1.0, 1, 0, 1, 1, 1], [0, 0, 0, 1, 1, 0]])[..., None]], 2
    )
    parts[..., :2] *= parts[..., 2:]
    objective = method.part_objective(images, targets, parts)
    maps = method.backbone(images)
    scores = method.keypoints(maps["previous"])
    total = 0.0
    for image in range(2):
        for part in range(6):
            if parts[image, part, 2]:
                share = bilinear_targets(parts[..., :2], (64, 64), (4, 4))[image, part]
                total -= (share * scores[image, part].flatten().log_softmax(0).view(4, 4)).sum().item()
    assert objective.terms["keypoints"].item() == pytest.approx(0.5 * total / 12, rel=1e-5)
    unseen = F.binary_cross_entropy(method.visibility(maps["last"].mean((2, 3))).sigmoid(), parts[..., 2])
    torch.testing.assert_close(objective.terms["visibility"], 0.5 * unseen)
    warps = method.warps(parts[..., :2], parts[..., 2], images)
    features = [maps["last"].mean((2, 3))]
    for region in (1, 0):
        theta = Similarity(warps.matrix[:, region], warps.shift[:, region])
        # affine_grid counts both images and regions from -1 to 1
        affine = torch.cat([theta.matrix / 32, theta.shift[..., None] / 32 - 1], 2)
        crop = F.grid_sample(
            images, F.affine_grid(affine, [2, 3, 48, 48], align_corners=False), align_corners=False
        )
        features.insert(0, method.backbone(crop)["previous"].mean((2, 3)))
    logits = method.classifier(torch.cat(features, 1))
    torch.testing.assert_close(objective.logits, logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        objective.terms["data"], F.cross_entropy(logits, targets), rtol=1e-4, atol=1e-4
    )


def test_prediction_and_training_with_predicted_keypoints_agree() -> None:
    method = build(train_with="predicted")
    images, targets = torch.randn(2, 3, 64, 64), torch.tensor([2, 0])
    parts = torch.rand(2, 6, 3)
    torch.testing.assert_close(method.part_objective(images, targets, parts).logits, method(images))
    assert method.boxes(images).shape == (2, 2, 4)


def test_prepare_takes_the_shapes_of_the_training_images() -> None:
    method = build()
    _, copies, _ = shapes(8)
    parts = torch.cat([copies[:, :6] * 6 + 32, torch.ones(8, 6, 1)], 2).float()
    before = method.references.clone()
    method.prepare([(torch.rand(8, 3, 64, 64), torch.zeros(8).long(), parts)])
    assert not torch.equal(method.references, before)
    warps = method.warps(parts[..., :2], parts[..., 2], torch.rand(8, 3, 64, 64))
    mapped = warps(method.references.expand(8, 2, 6, 2))
    scale = warps.scale / (method.usual_scales * 64)
    inside = (scale > 0.51) & (scale < 1.99)
    assert inside.any()
    for region in range(2):
        members = method.members[region].bool()
        difference = (mapped[:, region, members] - parts[:, members, :2])[inside[:, region]]
        assert difference.abs().max() < 0.05


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"part_names": []}, "part_names must be 1 to 64 different names"),
        ({"part_names": ["a", "a"]}, "part_names must be 1 to 64 different names"),
        ({"part_names": [str(n) for n in range(65)]}, "part_names must be 1 to 64 different names"),
        ({"head_parts": ["tial"]}, "head_parts: 'tial' is not one of part_names"),
        ({"region_size": 1}, "region_size must be between 2"),
        ({"margin": 0.5}, "margin must be between 1 and 10"),
        ({"keypoint_weight": 0.0}, "keypoint_weight must be above 0"),
        ({"part_layer": "first"}, "part_layer"),
    ],
)
def test_options_are_checked(options, message) -> None:
    with pytest.raises(UsageError, match=message):
        build(**options)


def test_parts_of_one_kind_are_one_region() -> None:
    assert build(part_names=["door", "wheel"]).boxes(torch.rand(1, 3, 64, 64)).shape == (1, 1, 4)
    assert build(part_names=["beak", "eye"]).boxes(torch.rand(1, 3, 64, 64)).shape == (1, 1, 4)
