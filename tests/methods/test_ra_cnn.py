import math
import os
from itertools import islice, pairwise
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from crossx.data.catalog import read_dataset
from crossx.data.config import DataConfig
from crossx.data.datamodule import DataModule
from crossx.errors import UsageError
from crossx.layers import zoom
from crossx.methods import create_method
from crossx.methods.ra_cnn import ATTENTION, CLASSIFICATION, AttentionProposal, strongest_region
from crossx.runs import Preprocessing

DATA = Path(os.environ.get("CROSSX_DATA", "../shared/data"))


def build(size: int = 64, backbone: str = "resnet10t", num_classes: int = 3, **options):
    torch.manual_seed(0)
    if backbone == "resnet10t":
        options["backbone_args"] = {"channels": [8, 16, 24, 32]}
    return create_method(
        "ra_cnn",
        backbone=backbone,
        num_classes=num_classes,
        image_size=size,
        **{"attention_units": 16, **options},
    ).eval()


def moved(method):
    """Spread the regions, which start near the centre, over the image."""
    with torch.no_grad():
        for proposal in method.proposals:
            proposal.output.weight.mul_(20)
    return method


def blobs(count: int, seed: int, size: int = 64) -> torch.Tensor:
    """Noise with a bright square somewhere."""
    random = torch.Generator().manual_seed(seed)
    images = 0.3 * torch.randn(count, 3, size, size, generator=random)
    for image, (x, y) in zip(images, torch.randint(0, size - 24, (count, 2), generator=random), strict=True):
        image[:, y : y + 24, x : x + 24] += 3
    return images


def test_the_objective_step_by_step() -> None:
    method = moved(build(num_scales=4, margin=0.3))
    images, targets = torch.randn(3, 3, 64, 64), torch.tensor([2, 0, 1])
    objective = method.objective(images, targets)
    ranking, sides, joined = 0.0, torch.zeros(3, 3), []
    data = dict.fromkeys(["scale_1", "scale_2", "scale_3", "scale_4"], 0.0)
    for number, (image, target) in enumerate(zip(images, targets, strict=True)):
        seen, confidence, features, side = image[None], [], [], 1.0
        for scale, trunk in enumerate([method.backbone, *method.finer], 1):
            maps = trunk(seen)["last"]
            features.append(maps[0].flatten(1).mean(1))
            shares = method.heads[f"scale_{scale}"](features[-1]).softmax(0)
            confidence.append(shares[target])
            data[f"scale_{scale}"] -= shares[target].log() / 3
            if scale < 4:
                proposal = method.proposals[scale - 1]
                flat = maps.flatten()
                hidden = (proposal.hidden.weight @ (flat * 128 / flat.norm()) + proposal.hidden.bias).tanh()
                x, y, z = (proposal.output.weight @ hidden + proposal.output.bias).sigmoid().tolist()
                own = 1 / 3 + 2 / 3 * z
                length = seen.shape[-1]
                box = [(1 - own) * x, (1 - own) * y, (1 - own) * x + own, (1 - own) * y + own]
                seen = zoom(seen, torch.tensor([box]) * length, 32)
                side *= own
                sides[number, scale - 1] = side
        for coarse, fine in pairwise(confidence):
            ranking += max(0, coarse - fine + 0.3) / 3
        joined.append(torch.cat([own / (4 * own.square().mean()).sqrt() for own in features]))
    logits = method.heads["joined"](torch.stack(joined))
    torch.testing.assert_close(objective.logits, logits, rtol=1e-3, atol=1e-4)
    data["joined"] = F.cross_entropy(logits, targets)
    terms = {**{f"data_{name}": value for name, value in data.items()}, "ranking": ranking}
    assert objective.terms.keys() == terms.keys()
    for name, value in terms.items():
        torch.testing.assert_close(objective.terms[name], value, rtol=1e-3, atol=1e-4)
    for scale in (2, 3, 4):
        assert objective.measures[f"side_{scale}"].item() == pytest.approx(
            sides[:, scale - 2].mean().item(), rel=1e-4
        )


def test_the_rankings_gradient_is_that_of_finite_differences() -> None:
    method = moved(build()).double()
    method.phase = ATTENTION
    images, targets = torch.randn(2, 3, 64, 64, dtype=torch.float64), torch.tensor([2, 0])
    method.objective(images, targets).loss.backward()
    step = 1e-6
    for proposal in method.proposals:
        for output in range(3):
            losses = []
            for sign in (1, -1):
                with torch.no_grad():
                    proposal.output.bias[output] += sign * step
                    losses.append(method.objective(images, targets).terms["ranking"].item())
                    proposal.output.bias[output] -= sign * step
            difference = (losses[0] - losses[1]) / (2 * step)
            assert proposal.output.bias.grad[output].item() == pytest.approx(difference, rel=1e-3, abs=1e-9)
    assert all(proposal.output.bias.grad.abs().min() > 0 for proposal in method.proposals)


@pytest.mark.parametrize(
    ("phase", "trained"),
    [(CLASSIFICATION, {"backbone", "finer", "heads"}), (ATTENTION, {"proposals"})],
)
def test_each_phase_trains_what_is_its_own(phase, trained) -> None:
    method = moved(build())
    images, targets = torch.randn(4, 3, 64, 64), torch.tensor([2, 0, 1, 1])
    usual = method(images)
    for name, parameter in method.named_parameters():
        parameter.requires_grad_(name.startswith(phase.trains))
    method.phase = phase
    objective = method.objective(images, targets)
    assert torch.equal(method(images), usual)
    assert objective.terms["ranking"] > 0
    objective.loss.backward()
    moving = {name for name, own in method.named_parameters() if own.grad is not None and own.grad.any()}
    assert {name.split(".")[0] for name in moving} == trained
    assert {name.split(".")[0] for name, own in method.named_parameters() if own.requires_grad} == trained


def test_a_scale_learns_from_its_own_loss_alone() -> None:
    method = moved(build())
    images, targets = torch.randn(2, 3, 64, 64), torch.tensor([2, 0])
    trunks = {"scale_1": method.backbone, "scale_2": method.finer[0], "scale_3": method.finer[1]}
    for term in [*trunks, "joined"]:
        method.zero_grad()
        method.phase = CLASSIFICATION
        for name, parameter in method.named_parameters():
            parameter.requires_grad_(name.startswith(CLASSIFICATION.trains))
        method.objective(images, targets).terms[f"data_{term}"].backward()
        learns = {
            name for name, trunk in trunks.items() if any(p.grad is not None for p in trunk.parameters())
        }
        assert learns == ({term} & trunks.keys())


def test_phases_alternate_and_end_with_classification() -> None:
    def names(epochs: int, every: int) -> str:
        method.attention_every = every
        return "".join(method.phase_at(epoch, epochs).name[0] for epoch in range(epochs))

    method = build()
    assert names(10, 2) == "cc" + "ac" * 4
    assert names(9, 2) == "c" + "ac" * 4
    assert names(10, 4) == "ccacccaccc"
    assert names(1, 2) == "c"
    assert names(2, 5) == "cc"


@pytest.mark.parametrize("side", [0.5, 0.4])
def test_the_strongest_region_is_that_of_all_windows(side) -> None:
    maps = torch.randn(5, 4, 6, 9, generator=torch.Generator().manual_seed(0))
    found = strongest_region(maps, side)
    rows, columns = round(side * 6), round(side * 9)
    for image, region in zip(maps, found, strict=True):
        means = {
            (top, left): image[:, top : top + rows, left : left + columns].mean()
            for top in range(6 - rows + 1)
            for left in range(9 - columns + 1)
        }
        top, left = max(means, key=means.get)
        x = min(max((left + columns / 2) / 9, side / 2), 1 - side / 2)
        y = min(max((top + rows / 2) / 6, side / 2), 1 - side / 2)
        expected = torch.tensor([x - side / 2, y - side / 2, x + side / 2, y + side / 2])
        torch.testing.assert_close(region, expected)


@pytest.mark.parametrize(("min_side", "start"), [(1 / 3, 0.5), (0.5, 0.55), (0.9, 0.91)])
def test_proposals_start_in_the_middle_and_stay_inside(min_side, start) -> None:
    torch.manual_seed(0)
    proposal = AttentionProposal(4, (3, 3), 16, min_side)
    maps = torch.randn(50, 4, 3, 3)
    with torch.no_grad():
        regions = proposal(maps)
        sides = regions[:, 2:] - regions[:, :2]
        torch.testing.assert_close(sides.mean(), torch.tensor(start), atol=0.03, rtol=0)
        torch.testing.assert_close(regions.mean(1), torch.full((50,), 0.5), atol=0.1, rtol=0)
        proposal.output.weight.mul_(1000)
        regions = proposal(maps)
    sides = regions[:, 2:] - regions[:, :2]
    torch.testing.assert_close(sides[:, 0], sides[:, 1])
    assert regions.min() >= 0
    assert regions.max() <= 1 + 1e-6
    assert sides.min() >= min_side - 1e-6
    assert regions.std(0).min() > 0.01


@pytest.mark.parametrize(
    ("channels", "size", "grid"),
    [(512, 28, (14, 14)), (512, 14, (14, 14)), (2048, 14, (7, 7)), (2208, 15, (5, 5)), (200_000, 3, (1, 1))],
)
def test_large_maps_are_pooled(channels, size, grid) -> None:
    with torch.device("meta"):
        proposal = AttentionProposal(channels, (size, size), 1024, 1 / 3)
    assert proposal.grid == grid


def test_pooling_is_max_pooling() -> None:
    proposal = AttentionProposal(4, (3, 3), 16, 1 / 3)
    maps = torch.rand(2, 4, 6, 6)
    torch.testing.assert_close(proposal(maps), proposal(F.max_pool2d(maps, 2)))


def test_boxes_are_what_the_finer_scales_see() -> None:
    """Of an image of its own coordinates, a region shows those of its box."""
    method = moved(build())
    x = (torch.arange(80) + 0.5).expand(96, 80)
    y = (torch.arange(96) + 0.5)[:, None].expand(96, 80)
    images = torch.stack([x, y, torch.ones(96, 80)])[None] / 40
    seen = []
    handles = [
        trunk.register_forward_pre_hook(lambda _, args: seen.append(args[0])) for trunk in method.finer
    ]
    boxes = method.boxes(images)[0]
    for handle in handles:
        handle.remove()
    # not the outermost pixels, at which the soft mask ends
    for box, region in zip(boxes, seen, strict=True):
        middle = region[0, :2, 4:-4, 4:-4] * 40
        steps = torch.arange(40)[4:-4] / 39
        for axis, shown in enumerate([middle[0].mean(0), middle[1].mean(1)]):
            expected = box[axis] + 0.5 + steps * (box[axis + 2] - box[axis] - 1)
            torch.testing.assert_close(shown, expected, atol=0.6, rtol=0)
    assert (boxes[1, :2] >= boxes[0, :2]).all()
    assert (boxes[1, 2:] <= boxes[0, 2:]).all()


def held_out_error(method, images: torch.Tensor) -> list[tuple[float, float]]:
    """Return the mean distance of the proposed centres from the strongest regions, and that of the best constant."""
    errors = []
    with torch.no_grad():
        for trunk, proposal in zip([method.backbone, *method.finer], method.proposals, strict=False):
            maps = trunk(images)[method.stage]
            region, wanted = proposal(maps), strongest_region(maps, proposal.start_side)
            found, right = ((own[:, :2] + own[:, 2:]) / 2 for own in (region, wanted))
            constant = right.median(0).values
            errors.append(((found - right).abs().mean().item(), (constant - right).abs().mean().item()))
            images = zoom(images, region * images.shape[-1], method.crop_size or images.shape[-1] // 2)
    return errors


@pytest.mark.slow
def test_pretraining_finds_the_strongest_regions_of_other_images(caplog) -> None:
    method = build(num_scales=2)
    before = {key: value.clone() for key, value in method.state_dict().items()}
    caplog.set_level("INFO")
    method.prepare((blobs(16, seed), torch.zeros(16).long()) for seed in range(20))
    ((found, constant),) = held_out_error(method, blobs(64, 1000))
    assert found < 0.5 * constant
    changed = {key for key, value in method.state_dict().items() if not torch.equal(value, before[key])}
    assert {key.split(".")[0] for key in changed} == {"proposals"}
    assert all(parameter.grad is None for parameter in method.parameters())
    assert [record.message[:21] for record in caplog.records] == ["attention of scale 1:"]


@pytest.mark.slow
@pytest.mark.skipif(not (DATA / "cub80").is_dir(), reason=f"needs {DATA}/cub80 (the folder of CROSSX_DATA)")
def test_pretraining_finds_the_strongest_regions_of_other_birds() -> None:
    """At both scales, after one pass over the training images, on images of the test split."""
    options = DataConfig(dataset="cub", root=str(DATA / "cub80"), image_size=160, num_workers=0)
    index = read_dataset(options.dataset, options.root)
    data = DataModule(index, Preprocessing(160, 182, "bilinear", (0.5,) * 3, (0.5,) * 3), options, seed=0)
    method = build(160, f"local-dir:{DATA}/weights/mobilenetv2_035", pretrained=True, attention_units=128)
    device = torch.device("cpu")
    method.prepare(data.to_device(batch, device) for batch in data.whole_train_loader())
    images = torch.cat([data.to_device(batch, device)[0] for batch in islice(data.test_dataloader(), 12)])
    for found, constant in held_out_error(method, images):
        assert found < 0.8 * constant


def test_no_pretraining_reads_no_batches() -> None:
    method, batches = build(pretraining_batches=0), iter([(torch.rand(2, 3, 64, 64), torch.zeros(2).long())])
    method.prepare(batches)
    assert len(list(batches)) == 1


def test_regions_are_cut_from_images_larger_than_the_view() -> None:
    method, whole = (moved(build(128, view_size=64)), moved(build(64)))
    whole.load_state_dict(method.state_dict())
    fine = torch.randn(2, 3, 128, 128)
    view = method.view(fine)
    assert method.crop_size is None
    torch.testing.assert_close(method.boxes(fine)[:, 0], 2 * whole.boxes(view)[:, 0])
    seen = []
    method.finer[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    method(fine)
    expected = zoom(fine, method.boxes(fine)[:, 0], 32)
    torch.testing.assert_close(seen[0], expected)
    assert method.check_image_size(128) is None
    with pytest.raises(UsageError, match="view_size 64 is larger"):
        method.check_image_size(48)


@pytest.mark.parametrize("targets", [torch.tensor([1]), torch.tensor([[0.3, 0.7]])])
def test_two_classes_one_image_and_other_shapes(targets) -> None:
    method = build(num_classes=2, num_scales=2)
    for shape in ((64, 64), (64, 96), (97, 70)):
        images = torch.randn(1, 3, *shape)
        assert method(images).shape == (1, 2)
        boxes = method.boxes(images)
        assert (boxes >= 0).all()
        assert (boxes[..., 2:] <= torch.tensor([shape[1], shape[0]]) + 1e-4).all()
    objective = method.objective(images, targets)
    share = method.head_logits(images)["scale_2"].softmax(1)
    soft = targets.float() if targets.ndim == 2 else F.one_hot(targets, 2)
    assert objective.measures["confidence_2"].item() == pytest.approx((share * soft).sum().item())


def test_vgg_is_seen_before_its_last_pooling() -> None:
    with torch.device("meta"):
        method = build(backbone="vgg11")
        assert method.stage == "previous"
        assert method.proposals[0].grid == (4, 4)
        assert method.activation_maps(torch.zeros(1, 3, 64, 64))["previous"].shape == (1, 1, 4, 4)
    # the classifier's hidden layers are gone
    assert {name.split(".")[0] for name, _ in method.backbone.trunk.named_parameters()} == {"features"}
    assert build().stage == "last"


def test_a_vit_needs_regions_of_its_own_size() -> None:
    args = {"embed_dim": 24, "depth": 2, "num_heads": 2, "img_size": 64}
    with pytest.raises(UsageError, match=r"uses crops of 32 pixels, .*--model.crop_size 64") as caught:
        build(backbone="vit_tiny_patch16_224", backbone_args=args)
    assert "\n" not in str(caught.value)
    method = build(backbone="vit_tiny_patch16_224", backbone_args=args, crop_size=64)
    assert method.boxes(torch.randn(1, 3, 64, 64)).shape == (1, 2, 4)
    assert build(backbone="vit_tiny_patch16_224", backbone_args={**args, "dynamic_img_size": True})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_scales": 1}, "num_scales must be between 2 and 5"),
        ({"num_scales": 6}, "num_scales must be between 2 and 5"),
        ({"crop_size": 1}, "crop_size must be between 2"),
        ({"margin": -0.1}, "margin must be between 0 and 1"),
        ({"margin": math.nan}, "margin must be between 0 and 1"),
        ({"min_side": 0.0}, r"min_side must be between 0\.1 and 0\.9"),
        ({"min_side": 1.0}, r"min_side must be between 0\.1 and 0\.9"),
        ({"attention_units": 0}, "attention_units must be between 1"),
        ({"attention_units": 10**9}, "attention_units must be between 1"),
        ({"attention_every": 1}, "attention_every must be at least 2"),
        ({"pretraining_batches": -1}, "pretraining_batches must be at least 0"),
        ({"view_size": 1}, "view_size must be between 2"),
        ({"crop_size": 64.5}, "crop_size"),
    ],
)
def test_options_are_checked(options, message) -> None:
    with pytest.raises(UsageError, match=message):
        build(**options)
