import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from crossx.errors import UsageError
from crossx.explain import explain_images
from crossx.layers import energy_peaks
from crossx.losses import ClassificationLoss
from crossx.methods import DFL, create_method
from crossx.methods import dfl as module
from crossx.methods.clusters import cluster_centers


def build(num_classes: int = 3, **options: object) -> DFL:
    torch.manual_seed(0)
    method = create_method("dfl", backbone="test_resnet", num_classes=num_classes, num_filters=2, **options)
    assert isinstance(method, DFL)
    return method.eval()


class Given(nn.Module):
    """A backbone that takes the images themselves for the map of both stages."""

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {"previous": images, "last": images}


def on_maps(channels: int, num_classes: int, **options: object) -> DFL:
    """Return a method whose maps are the images given to it."""
    method = build(num_classes, **options)
    method.backbone = Given()  # type: ignore[assignment]
    method.backbone.channels = {"previous": channels, "last": channels}  # type: ignore[union-attr]
    method.filters = type(method.filters)(channels, *method.filters.groups)
    return method


@torch.no_grad()
def test_branches_equal_a_loop_over_images_classes_and_filters() -> None:
    method = build()
    images = torch.randn(2, 3, 64, 96)
    maps = method.backbone(images)
    heads = method.head_logits(images)
    weight, bias = method.filters.conv.weight[:, :, 0, 0], method.filters.conv.bias
    assert bias is not None
    for b in range(2):
        whole = maps["last"][b].flatten(1).mean(1)
        pooled = []
        for number in range(6):
            places = maps["previous"][b].flatten(1).T
            pooled.append(max(float(weight[number] @ place + bias[number]) for place in places))
        for k in range(3):
            head = method.heads["whole"]
            assert heads["whole"][b, k] == pytest.approx(
                float(head.weight[k] @ whole + head.bias[k]), abs=1e-4
            )
            head = method.heads["part"]
            part = sum(float(head.weight[k, n]) * pooled[n] for n in range(6)) + float(head.bias[k])
            assert heads["part"][b, k] == pytest.approx(part, abs=1e-4)
            side = 0.1 * (pooled[2 * k] + pooled[2 * k + 1]) / 2
            assert heads["side"][b, k] == pytest.approx(side, abs=1e-4)
    torch.testing.assert_close(method(images), sum(heads.values()))


@torch.no_grad()
def test_each_branch_has_its_own_cross_entropy() -> None:
    method = build(side_weight=0.3)
    method.criterion = ClassificationLoss(torch.tensor([1.0, 2.0, 0.5]), 0.1)
    images, targets = torch.randn(4, 3, 64, 64), torch.tensor([0, 2, 1, 1])
    heads = method.head_logits(images)
    heads["side"] = heads["side"] / 0.3
    losses = {
        name: F.cross_entropy(logits, targets, method.criterion.class_weights, label_smoothing=0.1)
        for name, logits in heads.items()
    }
    objective = method.objective(images, targets)
    torch.testing.assert_close(objective.loss, losses["whole"] + losses["part"] + 0.3 * losses["side"])
    assert list(objective.terms) == ["data_whole", "data_part", "data_side"]


@pytest.mark.parametrize("options", [{"side_weight": 0.0}, {"predict_with_side": False}])
@torch.no_grad()
def test_side_branch_left_out_of_the_prediction(options: dict[str, float]) -> None:
    method = build(**options)
    images, targets = torch.randn(2, 3, 64, 64), torch.tensor([0, 2])
    heads, maps = method.head_logits(images), method.class_activation_maps(images, targets)
    assert list(heads) == list(maps) == ["whole", "part"]
    objective = method.objective(images, targets)
    torch.testing.assert_close(objective.logits, heads["whole"] + heads["part"])
    # without a place in the prediction the branch still guides the filters
    assert ("data_side" in objective.terms) == ("side_weight" not in options)


def test_gradients_of_the_objective() -> None:
    method = on_maps(4, 3, side_weight=0.5)
    method.heads["whole"] = nn.Linear(4, 3)
    method.double()
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(2, 4, 2, 3, dtype=torch.double, generator=generator, requires_grad=True)
    filters = method.filters.conv.weight
    targets = torch.tensor([0, 2])

    def loss(maps: Tensor, *_: Tensor) -> Tensor:
        return method.objective(maps, targets).loss

    assert torch.autograd.gradcheck(loss, (maps, filters, *method.heads.parameters()))


@pytest.mark.parametrize("options", [{}, {"filter_norm": "batch"}, {"filter_stride": 8}])
@torch.no_grad()
def test_class_maps_are_the_heads_logits_but_for_the_bias(options: dict[str, object]) -> None:
    method = build(**options)
    images, classes = torch.randn(3, 3, 64, 96), torch.tensor([1, 0, 2])
    maps, heads = method.class_activation_maps(images, classes), method.head_logits(images)
    for name, logits in heads.items():
        own = logits[range(3), classes]
        bias = method.heads[name].bias[classes] if name in method.heads else 0
        torch.testing.assert_close(maps[name].mean((1, 2, 3)) + bias, own, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_activation_map_is_that_of_the_predicted_class() -> None:
    method = build()
    images = torch.randn(4, 3, 64, 64)
    predicted = method(images).argmax(1)
    responses = method.filters(method.backbone(images)["previous"])
    maps = method.activation_maps(images)
    for image, label in enumerate(predicted):
        torch.testing.assert_close(maps["previous"][image, 0], responses[image, label].mean(0))
    assert {name: each.shape[1] for name, each in maps.items()} == {"previous": 1, "last": 1}
    assert list(explain_images(method, images)[0].maps) == ["previous", "last", "combined"]


def patches(directions: Tensor, images: int, generator: torch.Generator) -> Tensor:
    """Draw maps (n, C, 9, 9) of weak noise with a patch of each direction (k, C) on a place of its own."""
    count, channels = directions.shape
    maps = 0.05 * torch.rand(images, channels, 9, 9, generator=generator)
    cells = torch.tensor([(i, j) for i in (1, 4, 7) for j in (1, 4, 7)])
    for image in maps:
        chosen = cells[torch.randperm(len(cells), generator=generator)[:count]]
        for (i, j), direction in zip(chosen.tolist(), directions, strict=True):
            length = 4 + torch.rand((), generator=generator)
            image[:, i, j] += length * direction + 0.05 * torch.rand(channels, generator=generator)
    return maps


def test_prepare_finds_the_patches_of_each_class(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    monkeypatch.setattr(module, "PEAKS_PER_IMAGE", 2)
    method = on_maps(8, 3)
    directions = torch.eye(8)[:6].view(3, 2, 8)
    maps = torch.cat([patches(directions[label], 12, generator) for label in range(3)])
    targets = torch.arange(3).repeat_interleave(12)
    order = torch.randperm(36, generator=generator)
    method.prepare(zip(maps[order].split(5), targets[order].split(5), strict=True))
    filters = method.filters.conv.weight[:, :, 0, 0].view(3, 2, 8)
    for label in range(3):
        found = F.normalize(filters[label], dim=1) @ directions[label].T
        assert found.max(0).values.min() > 0.99
        assert sorted(found.argmax(1).tolist()) == [0, 1]
    # one length, and a patch of average energy answers 1 to its own filter
    torch.testing.assert_close(filters.norm(dim=2), filters[0, 0].norm().expand(3, 2))
    pooled = method.filters(maps).amax((3, 4))
    own = torch.stack([pooled[image, label] for image, label in enumerate(targets)])
    assert own.mean().item() == pytest.approx(1, abs=0.05)
    assert method.filters.conv.bias.eq(0).all()
    # the side branch alone then tells the classes
    assert torch.equal(pooled.mean(2).argmax(1), targets)


def test_prepare_does_not_depend_on_the_batches_and_draws_nothing() -> None:
    maps, targets = torch.rand(12, 8, 5, 5), torch.arange(12) % 3
    state, weights = torch.get_rng_state(), []
    for size in (1, 5):
        method = on_maps(8, 3)
        torch.set_rng_state(state)
        method.prepare(zip(maps.split(size), targets.split(size), strict=True))
        assert torch.equal(torch.get_rng_state(), state)
        weights.append(method.filters.conv.weight.detach())
    assert torch.equal(*weights)


def test_prepare_stops_when_every_class_has_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "IMAGES_PER_CLASS", 2)
    method, read = on_maps(4, 2), []

    def batches() -> object:
        for number, label in enumerate([0, 0, 0, 1, 1, 0, 1]):
            read.append(number)
            yield torch.rand(1, 4, 3, 3), torch.tensor([label])

    method.prepare(batches())
    assert read == [0, 1, 2, 3, 4]


def test_a_class_without_peaks_keeps_its_random_filters(caplog: pytest.LogCaptureFixture) -> None:
    method = on_maps(4, 3)
    before = method.filters.conv.weight.detach().clone()
    maps = torch.rand(2, 4, 3, 3)
    maps[1] = 0
    method.prepare([(maps, torch.tensor([2, 1]))])
    after = method.filters.conv.weight.detach()
    assert torch.equal(after[:4], before[:4])
    assert not torch.equal(after[4:], before[4:])
    assert "2 classes have no peaks" in caplog.text


def test_random_start_reads_no_image() -> None:
    method = build(filter_init="random")
    before = method.filters.conv.weight.detach().clone()
    method.prepare(iter([None]))  # type: ignore[arg-type]
    assert torch.equal(method.filters.conv.weight, before)


@torch.no_grad()
def test_prepared_filters_are_means_of_the_backbones_places() -> None:
    method = build()
    image = torch.randn(1, 3, 64, 64)
    statistics = [buffer.clone() for buffer in method.buffers()]
    method.train().prepare([(image, torch.tensor([1]))])
    assert all(module.training for module in method.modules())
    assert all(map(torch.equal, method.eval().buffers(), statistics))
    maps = method.backbone(image)["previous"]
    (peaks,) = energy_peaks(maps, module.PEAKS_PER_IMAGE)
    expected = F.normalize(cluster_centers(peaks, 2, seed=1), dim=1) / peaks.norm(dim=1).mean()
    torch.testing.assert_close(method.filters.conv.weight[2:4, :, 0, 0], expected)


def test_centres_of_too_few_features_come_again() -> None:
    features = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 0.0]])
    centers = cluster_centers(features, 5, seed=0)
    assert sorted(map(tuple, centers.tolist())) == [(0, 1), (0, 1), (0, 1), (1, 0), (1, 0)]
    assert cluster_centers(features[:1], 2, seed=0).tolist() == [[1, 0], [1, 0]]


def test_centres_are_means_of_their_own_features() -> None:
    features = torch.randn(60, 5, generator=torch.Generator().manual_seed(0))
    centers = cluster_centers(features, 4, seed=0)
    nearest = torch.cdist(features, centers).argmin(1)
    for number in range(4):
        torch.testing.assert_close(centers[number], features[nearest == number].mean(0))
    assert torch.equal(centers, cluster_centers(features.flip(0), 4, seed=0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_filters": 0}, "num_filters must be at least 1, not 0"),
        ({"side_weight": -1.0}, "side_weight must be at least 0"),
        ({"filter_norm": "layer"}, "filter_norm"),
        ({"filter_init": "k-means"}, "Did you mean 'kmeans'"),
        ({"filter_stride": 3}, "no map of stride 3 before its last one; it has: 4, 8, 16"),
    ],
)
def test_options_that_cannot_work(options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        create_method("dfl", backbone="resnet10t", num_classes=3, **options)
