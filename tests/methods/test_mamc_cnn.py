import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from crossx.errors import UsageError
from crossx.losses import mamc_terms
from crossx.methods import MAMC, create_method
from crossx.training.config import OptimConfig
from crossx.training.optim import parameter_groups

BATCH = torch.tensor([0, 0, 3, 3])


def build(backbone: str = "resnet10t", image_size: int = 64, **options: object) -> MAMC:
    torch.manual_seed(0)
    method = create_method(
        "mamc", backbone=backbone, num_classes=5, image_size=image_size, embedding_size=8, **options
    )
    assert isinstance(method, MAMC)
    return method.eval()


def naive_features(method: MAMC, images: Tensor) -> Tensor:
    """f_p = W_p vec(m_p U) + b_p, part by part."""
    trunk = method.backbone.trunk
    u = trunk.forward_features(images)
    gates, z, parts = method.backbone.osme["last"], u.mean((2, 3)), []
    for p in range(method.num_parts):
        hidden = F.relu(F.linear(z, gates.squeeze_weight[p], gates.squeeze_bias[p]))
        m = torch.sigmoid(F.linear(hidden, gates.excite_weight[p], gates.excite_bias[p]))
        parts.append(
            F.linear((m[:, :, None, None] * u).flatten(1), method.embed.weight[p], method.embed.bias[p])
        )
    return torch.stack(parts, 1)


@pytest.mark.parametrize("combination", ["join", "sum"])
@pytest.mark.parametrize("num_parts", [1, 3])
def test_network_and_objective_follow_the_paper(combination: str, num_parts: int) -> None:
    method = build(num_parts=num_parts, combination=combination, mamc_weight=0.3, mamc_average="pairs")
    images = torch.randn(4, 3, 64, 64)
    features = naive_features(method, images)
    combined = features.flatten(1) if combination == "join" else features.sum(1)
    logits = F.linear(combined, method.classifier.weight, method.classifier.bias)
    expected = {"data": F.cross_entropy(logits, BATCH)}
    expected |= {f"mamc_{name}": 0.3 * term for name, term in mamc_terms(features, BATCH).items()}
    objective = method.objective(images, BATCH)
    torch.testing.assert_close(dict(objective.terms), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(objective.loss, sum(expected.values()), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(method(images), logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(method.embeddings(images), combined, rtol=1e-4, atol=1e-5)


def test_an_average_start_is_average_pooling_and_a_linear_layer() -> None:
    method = build(embedding_start="average", num_parts=2)
    channels = method.backbone.channels["last"]
    height, width = method.map_size
    weight = method.embed.weight.unflatten(2, (channels, height * width))
    of_channels = weight.sum(3).detach()
    attended = torch.randn(3, 2, channels, height, width)
    features = method.embed(attended.flatten(2)).detach()
    for p in range(2):
        expected = F.linear(attended[:, p].mean((2, 3)), of_channels[p], method.embed.bias[p])
        torch.testing.assert_close(features[:, p], expected, rtol=1e-4, atol=1e-5)
    # as nn.Linear of the pooled channels: uniform within 1 / sqrt(C)
    limit = channels**-0.5
    assert limit * 0.95 < of_channels.abs().max() <= limit * 1.0001
    assert of_channels.std() == pytest.approx(limit / 3**0.5, rel=0.05)


@pytest.mark.parametrize("placement", ["output", "residual"])
@pytest.mark.parametrize("backbone", ["resnet10t", "mobilenetv2_035", "convnext_atto"])
def test_every_weight_learns(backbone: str, placement: str) -> None:
    if placement == "residual" and backbone != "resnet10t":
        with pytest.raises(UsageError, match="no residual blocks"):
            build(backbone, osme_placement=placement)
        return
    method = build(backbone, osme_placement=placement)
    method.objective(torch.randn(4, 3, 64, 64), BATCH).loss.backward()
    assert [name for name, parameter in method.named_parameters() if parameter.grad is None] == []


def test_one_step_of_adam_moves_the_features_by_rate_times_inputs() -> None:
    """With the factor 1 / (h w), the features of all positions move as far as those of the average would."""
    moves = []
    for size, factor in ((64, 1 / 4), (32, 1.0)):  # maps of 2 x 2 and of 1 x 1
        method = build(image_size=size, embedding_start="average", embedding_lr_factor=factor)
        config = OptimConfig(optimizer="adamw", lr=1e-3, weight_decay=0.0)
        optimizer = torch.optim.AdamW(parameter_groups(method, config))
        maps = torch.ones(1, 2, method.backbone.channels["last"] * (size // 32) ** 2)
        before = method.embed(maps).detach()
        method.embed(maps).sum().backward()
        optimizer.step()
        moves.append(method.embed(maps).detach() - before)
    torch.testing.assert_close(*moves, rtol=1e-2, atol=0)


def test_weight_zero_turns_mamc_off() -> None:
    objective = build(mamc_weight=0).objective(torch.randn(4, 3, 64, 64), BATCH)
    assert objective.terms.keys() == {"data"}


def test_a_batch_of_one_and_of_no_pair() -> None:
    for targets in (BATCH[:1], torch.tensor([0, 1, 2])):
        objective = build().objective(torch.randn(len(targets), 3, 64, 64), targets)
        objective.loss.backward()
        assert torch.isfinite(objective.loss)


@pytest.mark.parametrize("size", [(64, 64), (96, 64)])
@pytest.mark.parametrize("combination", ["join", "sum"])
def test_class_maps_are_the_logits_without_the_biases(combination: str, size: tuple[int, int]) -> None:
    method = build(combination=combination)
    images, classes = torch.randn(3, 3, *size), torch.tensor([4, 0, 2])
    maps = method.class_activation_maps(images, classes)["last"]
    assert maps.shape == (3, 2, 2, 2)
    biases = method.embed.bias.flatten() if combination == "join" else method.embed.bias.sum(0)
    constant = F.linear(biases, method.classifier.weight, method.classifier.bias)[classes]
    logits = method(images).gather(1, classes[:, None])[:, 0]
    torch.testing.assert_close(maps.mean((2, 3)).sum(1) + constant, logits, rtol=1e-4, atol=1e-4)


def test_one_place_of_a_class_map_by_hand() -> None:
    method = build()
    images = torch.randn(1, 3, 64, 64)
    u = method.backbone(images)["last"]
    by_place = method.embed.weight.unflatten(2, (512, 2, 2))
    weights = method.classifier.weight[3].view(2, 8)
    expected = sum(
        weights[1, d] * by_place[1, d, c, 0, 1] * u[0, 1, c, 0, 1] for d in range(8) for c in range(512)
    )
    maps = method.class_activation_maps(images, torch.tensor([3]))["last"]
    torch.testing.assert_close(maps[0, 1, 0, 1] / 4, expected, rtol=1e-4, atol=1e-5)


def test_the_linear_layers_are_built_for_the_images() -> None:
    assert build(image_size=96).embed.weight.shape == (2, 8, 512 * 3 * 3)
    # the model's own size where none is given: 176 pixels
    method = create_method("mamc", backbone="resnet10t", num_classes=5, embedding_size=8)
    assert method.embed.weight.shape == (2, 8, 512 * 6 * 6)
    # other images are pooled to it
    small, large = build(), torch.randn(2, 3, 128, 128)
    pooled = F.avg_pool2d(small.backbone.trunk.forward_features(large), 2)
    gates = small.backbone.osme["last"].gates(small.backbone.trunk.forward_features(large))
    features = small.embed((gates[..., None, None] * pooled[:, None]).flatten(2))
    torch.testing.assert_close(small.part_features(large), features, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_parts": 0}, "num_parts must be at least 1"),
        ({"mamc_weight": -1}, "mamc_weight must be at least 0"),
        ({"embedding_lr_factor": 0}, "embedding_lr_factor must be above 0"),
        ({"combination": "joined"}, "Did you mean 'join'"),
        ({"mamc_average": "pair"}, "Did you mean 'pairs'"),
    ],
)
def test_options_that_cannot_work(options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build(**options)


def test_a_width_of_zero_is_refused() -> None:
    with pytest.raises(UsageError, match="embedding_size must be at least 1"):
        create_method("mamc", backbone="resnet10t", num_classes=5, embedding_size=0)


def test_images_that_the_backbone_refuses_are_one_line() -> None:
    with pytest.raises(UsageError, match="image_size 100 does not work"):
        create_method("mamc", backbone="vit_tiny_patch16_224", num_classes=5, image_size=100)
