import itertools
import math

import pytest
import torch
from torch.nn import functional as F
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import affine

from crossx.backbones import create_backbone
from crossx.errors import UsageError
from crossx.methods import create_method
from crossx.methods.pdisconet import PDiscoNet
from crossx.training.config import OptimConfig
from crossx.training.optim import parameter_groups

PDISCOFORMER = {
    "num_parts": 3,
    "features": "last",
    "gumbel": True,
    "modulation": "layer_norm",
    "orthogonality_of": "modulated",
    "presence_of": "parts",
    "presence_border": 0,
    "data_weight": 1.0,
    "concentration_weight": 0.0,
    "total_variation_weight": 1.0,
    "entropy_weight": 1.0,
    "background_weight": 2.0,
}


def build(num_classes=3, **options):
    torch.manual_seed(0)
    method = create_method(
        "pdisconet",
        backbone="resnet10t",
        num_classes=num_classes,
        image_size=64,
        backbone_args={"channels": [8, 16, 24, 32]},
        **options,
    ).eval()
    with torch.no_grad():
        method.prototypes.mul_(2)  # parts that differ
        for parameter in [method.modulation] if isinstance(method.modulation, torch.nn.Parameter) else []:
            parameter.uniform_(0.5, 2)
    return method


@pytest.fixture
def images():
    return torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))


TARGETS = torch.tensor([2, 0])


def naive_maps(method, images):
    """Features and shares, one position at a time."""
    stages = method.backbone(images)
    if method.features == "both":
        last = F.interpolate(
            stages["last"], size=stages["previous"].shape[2:], mode="bilinear", align_corners=False
        )
        features = torch.cat([last, stages["previous"]], 1)
    else:
        features = stages[method.features]
    maps = features.new_empty(len(images), len(method.prototypes), *features.shape[2:])
    for b, y, x in itertools.product(*map(range, (len(images), *features.shape[2:]))):
        distances = [(features[b, :, y, x] - p).square().sum() for p in method.prototypes]
        maps[b, :, y, x] = torch.stack([-d for d in distances]).softmax(0)
    return features, maps


@pytest.mark.parametrize(
    "options",
    [{}, PDISCOFORMER, {"modulation": "none", "features": "previous", "num_parts": 1, "feature_stride": 8}],
)
def test_the_objective_step_by_step(images, options) -> None:
    method = build(**options)
    features, maps = naive_maps(method, images)
    count, height, width = len(method.prototypes), *maps.shape[2:]
    vectors = torch.stack([(maps[:, [k]] * features).mean((2, 3)) for k in range(count)], 1)
    modulated = vectors.clone()
    if isinstance(method.modulation, torch.nn.LayerNorm):
        flat = vectors.flatten(1)
        scaled = (flat - flat.mean(1, keepdim=True)) / (
            flat.var(1, unbiased=False, keepdim=True) + 1e-5
        ).sqrt()
        modulated = scaled.view_as(vectors) * method.modulation.weight + method.modulation.bias
    elif method.modulation is not None:
        modulated[:, :-1] *= method.modulation
    logits = torch.stack([modulated[:, k] @ method.classifier.weight.T for k in range(count - 1)]).mean(0)
    terms = {"data": options.get("data_weight", 2) * F.cross_entropy(logits, TARGETS)}
    if options.get("concentration_weight", 1000):
        y, x = torch.arange(height)[:, None] / height, torch.arange(width) / width
        spreads = []
        for own in maps[:, :-1].flatten(0, 1):
            cy, cx = (own * y).sum() / own.sum(), (own * x).sum() / own.sum()
            spreads.append((own * ((y - cy) ** 2 + (x - cx) ** 2)).mean())
        terms["concentration"] = 1000 * torch.stack(spreads).mean()
    compared = modulated if options is PDISCOFORMER else vectors
    cosines = F.cosine_similarity(compared[:, :, None], compared[:, None], dim=3)
    terms["orthogonality"] = (cosines.square() * (1 - torch.eye(count))).mean()
    # in evaluation the view is a turn by half of the largest angle
    _, turned = naive_maps(method, affine(images, 45, [0, 0], 1, [0.0], InterpolationMode.BILINEAR))
    back = affine(turned, -45, [0, 0], 1, [0.0], InterpolationMode.BILINEAR)
    similar = F.cosine_similarity(maps[:, :-1].flatten(2), back[:, :-1].flatten(2), dim=2)
    terms["equivariance"] = 1 - similar.mean()
    border = options.get("presence_border", 2)
    tall, wide = min(3, height), min(3, width)
    top, left = min(border, (height - tall) // 2), min(border, (width - wide) // 2)
    present = maps[:, :-1] if options is PDISCOFORMER else maps
    windows = [
        present[:, :, y : y + tall, x : x + wide].mean((2, 3))
        for y in range(top, height - top - tall + 1)
        for x in range(left, width - left - wide + 1)
    ]
    terms["presence"] = 1 - torch.stack(windows).amax((0, 1)).mean()
    if options is PDISCOFORMER:
        terms["total_variation"] = sum(
            (maps - maps.roll(1, dim)).narrow(dim, 1, maps.shape[dim] - 1).abs().sum() for dim in (2, 3)
        ) / (2 * height * width)
        terms["entropy"] = -(maps * maps.log()).sum(1).mean()
        # of a map of 2 x 3 positions there is a single window
        terms["background"] = -2 * maps[:, -1].mean((1, 2)).log().mean()
    objective = method.objective(images, TARGETS)
    torch.testing.assert_close(objective.logits, logits)
    torch.testing.assert_close(dict(objective.terms), terms, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(method.activation_maps(images), {"parts": maps[:, :-1]})
    torch.testing.assert_close(objective.measures["background_share"], maps[:, -1].mean().detach())
    active = [(own.max() > 0.5).float() for own in maps[:, :-1].flatten(0, 1)]
    torch.testing.assert_close(objective.measures["active_parts"], torch.stack(active).mean())


@pytest.mark.parametrize("modulation", ["weights", "none"])
def test_class_maps_add_up_to_the_logit_part_by_part(images, modulation) -> None:
    method = build(num_parts=3, modulation=modulation)
    maps = method.class_activation_maps(images, torch.tensor([1, 2]))["parts"]
    features, shares = naive_maps(method, images)
    for k in range(3):
        vector = (shares[:, [k]] * features).mean((2, 3))
        own = (
            vector * (method.modulation[k] if modulation == "weights" else 1) @ method.classifier.weight.T / 3
        )
        torch.testing.assert_close(maps[:, k].mean((1, 2)), own[[0, 1], [1, 2]])
    assert build(modulation="layer_norm").class_activation_maps(images, TARGETS) is None


def test_dropout_leaves_out_whole_parts(images) -> None:
    method = build(num_parts=2, part_dropout=0.5, equivariance_weight=0.0)
    features, maps = naive_maps(method, images)
    vectors = [(maps[:, [k]] * features).mean((2, 3)) * method.modulation[k] for k in range(2)]
    # kept parts count twice
    expected = {
        kept: sum(2 * on * vectors[k] for k, on in enumerate(kept)) / 2 @ method.classifier.weight.T
        for kept in itertools.product((0, 1), repeat=2)
    }
    method.dropout.train()
    seen = set()
    for _ in range(12):
        for logits, *choices in zip(
            method.objective(images, TARGETS).logits, *expected.values(), strict=True
        ):
            close = [torch.allclose(logits, choice, atol=1e-5) for choice in choices]
            assert sum(close) == 1
            seen.add(close.index(True))
    assert seen == {0, 1, 2, 3}
    torch.testing.assert_close(method(images), (vectors[0] + vectors[1]) / 2 @ method.classifier.weight.T)


def test_views_are_drawn_in_training_alone_and_seeded(images) -> None:
    method = build(part_dropout=0.0)

    def equivariance(seed):
        torch.manual_seed(seed)
        return method.objective(images, TARGETS).terms["equivariance"].item()

    assert equivariance(0) == equivariance(1)
    alone = [method.objective(images[[i]], TARGETS[[i]]).terms["equivariance"] for i in range(2)]
    assert sum(alone).item() / 2 == pytest.approx(equivariance(0), abs=1e-6)
    method.train()
    method.backbone.eval()
    assert equivariance(0) == equivariance(0) != equivariance(1)
    still = build(part_dropout=0.0, view_rotation=0.0, view_scales=[1.0, 1.0], view_shift=0.0)
    still.training = True
    assert still.objective(images, TARGETS).terms["equivariance"].item() == pytest.approx(0, abs=1e-5)


def test_gumbel_noise_samples_the_parts_by_their_shares(images) -> None:
    method = build(num_parts=2, gumbel=True, features="last")
    method.prototypes.data.div_(4)
    shares = method._assign(images[:1]).maps[0]
    last = method.backbone(images[:1])["last"].expand(1000, -1, -1, -1)
    method.backbone.forward = lambda images: {"last": last}
    method.training = True
    chosen = method._assign(images).maps.argmax(1)
    frequencies = F.one_hot(chosen, 3).float().mean(0).permute(2, 0, 1)  # (1000, h, w, 3) -> (3, h, w)
    # four standard errors
    assert ((frequencies - shares).abs() <= 4 * (shares * (1 - shares) / 1000).sqrt() + 1e-3).all()
    assert (shares.amax(0) < 0.9).any()


@pytest.mark.parametrize("features", ["both", "previous", "last"])
def test_every_trained_weight_has_a_gradient(images, features) -> None:
    method = build(features=features)
    method.objective(images, TARGETS).loss.backward()
    missing = [name for name, p in method.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing
    assert all(
        p.grad.abs().max() > 0 for p in (method.prototypes, method.modulation, method.classifier.weight)
    )


def test_prototypes_and_modulation_learn_at_their_own_rate() -> None:
    method = build()
    groups = parameter_groups(method, OptimConfig(lr=1e-4, new_layers_lr_factor=10.0))
    rate = {id(p): group["lr"] for group in groups for p in group["params"]}
    # those of the authors' code
    assert rate[id(method.prototypes)] == pytest.approx(1e-4)
    assert rate[id(method.modulation)] == pytest.approx(1e-2)
    assert rate[id(method.classifier.weight)] == pytest.approx(1e-3)
    assert {rate[id(p)] for p in method.backbone.parameters()} == {1e-4}


def test_soft_targets_and_any_number_of_images_and_classes(images) -> None:
    method = build(num_classes=2)
    hard = method.objective(images, TARGETS.clamp(max=1)).loss
    soft = F.one_hot(TARGETS.clamp(max=1), 2).float()
    torch.testing.assert_close(method.objective(images, soft).loss, hard)
    assert method.objective(images, torch.tensor([[0.3, 0.7], [1.0, 0.0]])).loss.isfinite()
    torch.testing.assert_close(method(images[:1]), method(images)[:1])
    torch.testing.assert_close(method.classifier(method.embeddings(images)), method(images))


@pytest.mark.parametrize(
    ("backbone", "size", "options", "shape"),
    [
        ("vit_tiny_patch16_224", 224, {"backbone_args": {"depth": 4}}, (14, 14)),
        ("mobilenetv2_035", 72, {}, (5, 5)),
        ("mobilenetv2_035", 64, {"feature_stride": 8}, (8, 8)),
        ("test_convnext", 160, {"features": "last"}, None),
        pytest.param("vgg11", 64, {}, (4, 4), marks=pytest.mark.slow),
    ],
)
def test_backbones(backbone, size, options, shape) -> None:
    method = create_method("pdisconet", backbone=backbone, num_classes=2, image_size=size, **options).eval()
    method.check_image_size(size)
    with torch.inference_mode():
        maps = method.activation_maps(torch.randn(1, 3, size, size))["parts"]
        assert shape is None or maps.shape == (1, 8, *shape)
        assert 0 <= maps.min() <= maps.sum(1).max() <= 1 + 1e-5
        assert method.objective(torch.randn(1, 3, size, size), torch.tensor([1])).loss.isfinite()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_parts": 0}, "num_parts must be between 1 and 64, not 0"),
        ({"num_parts": 65}, "num_parts must be between 1 and 64"),
        ({"features": "first"}, "features 'first'"),
        ({"features": "last", "feature_stride": 8}, "feature_stride is that of the previous map"),
        ({"feature_stride": 7}, "has no map of stride 7"),
        ({"modulation": "mlp"}, "modulation 'mlp'"),
        ({"gumbel": "yes"}, "gumbel is of the wrong type"),
        ({"part_dropout": 1.0}, "part_dropout must be at least 0 and below 1"),
        ({"part_dropout": math.nan}, "part_dropout must be at least 0 and below 1"),
        ({"data_weight": 0.0}, "data_weight must be above 0"),
        *(
            ({f"{name}_weight": value}, f"{name}_weight must be at least 0 and finite")
            for name, value in (
                ("concentration", -1.0),
                ("orthogonality", math.inf),
                ("equivariance", math.nan),
                ("presence", -0.1),
                ("total_variation", -1.0),
                ("entropy", math.nan),
                ("background", math.inf),
            )
        ),
        ({"orthogonality_of": "maps"}, "orthogonality_of 'maps'"),
        ({"presence_of": "background"}, "presence_of 'background'"),
        ({"presence_border": -1}, "presence_border must be at least 0"),
        ({"view_rotation": 181.0}, "view_rotation must be between 0 and 180 degrees"),
        ({"view_rotation": -1.0}, "view_rotation must be between 0 and 180 degrees"),
        ({"view_scales": [1.2, 0.9]}, "view_scales takes the smallest and largest scale"),
        ({"view_scales": [0.0, 1.0]}, "view_scales takes the smallest and largest scale"),
        ({"view_scales": [1.0]}, "view_scales takes the smallest and largest scale"),
        ({"view_shift": 1.0}, "view_shift must be at least 0 and below 1"),
        ({"prototype_lr_factor": 0.0}, "prototype_lr_factor must be above 0"),
        ({"modulation_lr_factor": math.inf}, "modulation_lr_factor must be above 0"),
    ],
)
def test_options_are_checked(options, message) -> None:
    with pytest.raises(UsageError, match=message) as raised:
        build(**options)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("option", ["features", "modulation", "orthogonality_of", "presence_of"])
def test_an_unknown_choice_is_refused_by_the_class_itself(option: str) -> None:
    backbone = create_backbone("test_resnet", pretrained=False)
    with pytest.raises(UsageError, match=f"{option} 'x'"):
        PDiscoNet(backbone, 3, **{option: "x"})
