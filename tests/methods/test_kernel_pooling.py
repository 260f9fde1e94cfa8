from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from crossx.errors import UsageError
from crossx.layers import TensorSketch
from crossx.layers.kernel_pooling import gaussian_composition
from crossx.methods import KernelPooling, create_method

POOLINGS = {
    "kernel": {"order": 3, "sketch_size": 32},
    "compact_bilinear": {"sketch_size": 32},
    "bilinear": {"channels": 4},
}
every_pooling = pytest.mark.parametrize("pooling", POOLINGS)


def build(backbone: str = "test_resnet", **options: object) -> KernelPooling:
    torch.manual_seed(0)
    method = create_method("kernel_pooling", backbone=backbone, num_classes=3, **options)
    assert isinstance(method, KernelPooling)
    return method


def naive_embeddings(method: KernelPooling, images: Tensor) -> Tensor:
    """Position by position on the backbone's map; the products come from the method's own layer."""
    maps = method.reduce(method.backbone(images)["last"])
    rows = []
    for image in maps:
        pooled = 0
        for i in range(image.shape[1]):
            for j in range(image.shape[2]):
                x = image[:, i, j]
                if method.normalize_features:
                    x = x / x.norm()
                pooled = pooled + method.pool(x[None, None]).flatten()
        pooled = pooled / (image.shape[1] * image.shape[2])
        root = torch.sign(pooled) * torch.sqrt(pooled.abs())
        rows.append(10 * root / root.norm())
    return torch.stack(rows)


@every_pooling
def test_embeddings_are_pooled_rooted_and_normalised(pooling: str) -> None:
    method = build(pooling=pooling, **POOLINGS[pooling]).eval()
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        embeddings = method.embeddings(images)
        torch.testing.assert_close(embeddings, naive_embeddings(method, images), rtol=1e-3, atol=2e-3)
        torch.testing.assert_close(embeddings.norm(dim=1), torch.full((2,), 10.0))
        torch.testing.assert_close(method(images), method.classifier(embeddings))


def test_full_bilinear_is_b_cnn() -> None:
    method = build(pooling="bilinear", feature_norm=1.0).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        maps = method.backbone(images)["last"].flatten(2)
        gram = torch.einsum("bin,bjn->bij", maps, maps) / maps.shape[2]
        expected = F.normalize(gram.sign().mul(gram.abs().sqrt()).flatten(1))
        torch.testing.assert_close(method.embeddings(images), expected, rtol=1e-3, atol=1e-4)


def test_compact_bilinear_kernel_is_the_bilinear_one_in_expectation() -> None:
    """<sketch(A), sketch(B)> of two images estimates <A, B>, their mean outer products."""
    images, draws = torch.randn(2, 3, 64, 64), 300
    full = build(pooling="bilinear").eval()
    with torch.no_grad():
        features = full._local_features(full.backbone(images)["last"]).double()
        ours, theirs = full.pool(features)
        exact = (ours * theirs).sum()
        estimates = torch.empty(draws, dtype=torch.float64)
        for seed in range(draws):
            first, second = TensorSketch(features.shape[2], 512, 2, seed).double()(features)
            estimates[seed] = (first * second).sum()
    error = estimates.std() / draws**0.5
    assert (estimates.mean() - exact).abs() < 5 * error
    assert error < 0.05 * exact


@every_pooling
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_are_float32_under_autocast(pooling: str, dtype: torch.dtype) -> None:
    method = build(pooling=pooling, **POOLINGS[pooling])
    images, targets = torch.randn(2, 3, 64, 64), torch.tensor([0, 2])
    with torch.autocast("cpu", dtype=dtype):
        half = method.reduce(method.backbone(images)["last"])
        method.backbone.forward = lambda images: {"last": half}  # type: ignore[method-assign]
        method.reduce = nn.Identity()
        embeddings = method.embeddings(images)
        loss = method.objective(images, targets).loss
    loss.backward()
    assert embeddings.dtype == torch.float32
    assert torch.isfinite(loss)
    torch.testing.assert_close(embeddings, method.embeddings(images), rtol=0, atol=0)


def test_gamma_is_one_over_the_mean_inner_product_of_an_images_features() -> None:
    method = build(**POOLINGS["kernel"])
    method.backbone.trunk.bn1.eval()
    batches = [(torch.randn(2, 3, 64, 64), torch.zeros(2)), (torch.randn(1, 3, 64, 64), torch.zeros(1))]
    modes = [module.training for module in method.modules()]
    assert False in modes
    before = {name: value.clone() for name, value in method.state_dict().items()}
    method.prepare(batches)
    assert [module.training for module in method.modules()] == modes
    products = []
    with torch.no_grad():
        for images, _ in batches:
            for image in method.eval().backbone(images)["last"]:
                unit = F.normalize(image.flatten(1), dim=0)
                products.append(torch.stack([x @ y for x in unit.T for y in unit.T]).mean())
    expected = gaussian_composition(3, float(1 / torch.stack(products).mean()))
    torch.testing.assert_close(method.pool.composition.detach(), expected, rtol=1e-4, atol=1e-5)
    changed = {name for name, value in method.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"pool.composition"}


@pytest.mark.parametrize(
    "options", [{"gamma": 2.0, "sketch_size": 8}, {"pooling": "bilinear", "channels": 2}]
)
def test_nothing_is_prepared_where_gamma_is_given_or_not_used(options: dict[str, object]) -> None:
    method = build(**options)
    before = [parameter.clone() for parameter in method.parameters()]
    method.prepare(iter([]))
    assert all(torch.equal(a, b) for a, b in zip(before, method.parameters(), strict=True))


@pytest.mark.parametrize(
    ("backbone", "size"), [("mobilenetv2_035", 64), ("test_vit", 160), ("test_convnext", 64)]
)
def test_every_backbone_trains_every_weight(backbone: str, size: int) -> None:
    method = build(backbone, **POOLINGS["kernel"])
    loss = method.objective(torch.randn(2, 3, size, size), torch.tensor([0, 2])).loss
    loss.backward()
    assert [name for name, parameter in method.named_parameters() if parameter.grad is None] == []
    assert torch.isfinite(loss)


def test_each_pooling_cites_its_own_paper() -> None:
    papers = {"kernel": "cui2017", "compact_bilinear": "gao2016", "bilinear": "lin2015"}
    for pooling, paper in papers.items():
        assert paper in build(pooling=pooling, **POOLINGS[pooling]).citation


def test_sizes_are_those_of_the_papers() -> None:
    assert build().classifier.in_features == 1 + build().backbone.channels["last"] + 3 * 4096
    assert build(pooling="compact_bilinear").classifier.in_features == 8192
    assert build(pooling="bilinear", channels=7).classifier.in_features == 49


def test_reduction_keeps_lengths_of_what_it_keeps() -> None:
    weight = build(pooling="bilinear", channels=7).reduce.weight.detach().flatten(1)
    torch.testing.assert_close(weight @ weight.T, torch.eye(7), rtol=0, atol=1e-5)


def test_activation_maps_are_channel_means() -> None:
    method = build(**POOLINGS["kernel"]).eval()
    images = torch.randn(2, 3, 64, 96)
    assert method.class_activation_maps(images, torch.tensor([0, 1])) is None
    maps = method.activation_maps(images)["last"]
    torch.testing.assert_close(
        maps[:, 0], sum(method.backbone(images)["last"].unbind(1)) / method.backbone.channels["last"]
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pooling": "kernels"}, "unknown pooling 'kernels'. Did you mean 'kernel'"),
        (
            {"pooling": "bilinear", "sketch_size": 64},
            "sketch_size belongs to pooling kernel and compact_bilinear",
        ),
        (
            {"pooling": "compact_bilinear", "order": 3},
            "order belongs to pooling kernel, not compact_bilinear",
        ),
        ({"pooling": "bilinear", "gamma": 1.0}, "gamma belongs to pooling kernel, not bilinear"),
        ({"order": 1}, "order must be at least 2"),
        ({"sketch_size": 0}, "sketch_size must be at least 2"),
        ({"gamma": 0.0}, "gamma must be above 0"),
        ({"channels": 0}, "channels must be between 1 and the last map's"),
        ({"channels": 100_000}, "channels must be between 1 and the last map's"),
        ({"feature_norm": 0.0}, "feature_norm must be above 0"),
    ],
)
def test_options_that_cannot_work(options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build(**options)


@pytest.mark.slow
@every_pooling
def test_onnx_takes_any_number_of_images(pooling: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="the exporter needs onnxscript")
    runtime = pytest.importorskip("onnxruntime", reason="nothing to run the export with")
    method = build(pooling=pooling, **POOLINGS[pooling]).eval()
    path = tmp_path / "method.onnx"
    torch.onnx.export(
        method, (torch.randn(2, 3, 64, 64),), path, dynamo=True, verbose=False, input_names=["images"],
        dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
    )  # fmt: skip
    session = runtime.InferenceSession(path)
    for count in (1, 3):
        images = torch.randn(count, 3, 64, 64)
        (logits,) = session.run(None, {"images": images.numpy()})
        np.testing.assert_allclose(logits, method(images).detach().numpy(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("backbone", "stride", "shape"),
    [pytest.param("vgg11", 16, (512, 6), marks=pytest.mark.slow), ("resnet10t", 8, (128, 12))],
)
def test_another_stride_pools_the_map_before_the_last_one(
    backbone: str, stride: int, shape: tuple[int, int]
) -> None:
    args = {"mlp_ratio": 0.01} if backbone == "vgg11" else {}
    method = build(backbone, pooling="bilinear", channels=4, stride=stride, backbone_args=args).eval()
    images = torch.randn(1, 3, 96, 96)
    trunk = method.backbone.trunk
    if backbone == "vgg11":  # conv5_2 after its ReLU, the last convolution, as conv5_3 is on VGG-16
        expected = trunk.features[:-1](images)
        assert isinstance(trunk.features[-1], nn.MaxPool2d)
    else:
        stem = trunk.maxpool(trunk.act1(trunk.bn1(trunk.conv1(images))))
        expected = trunk.layer2(trunk.layer1(stem))
    assert expected.shape[1:3] == shape
    maps = method.activation_maps(images)["previous"]
    torch.testing.assert_close(maps, expected.mean(1, keepdim=True))
    local = method.reduce(expected).flatten(2)[0].T.double()
    products = sum(torch.outer(x, x) for x in local) / len(local)
    root = (products.sign() * products.abs().sqrt()).flatten()
    torch.testing.assert_close(
        method.embeddings(images)[0].double(), 10 * root / root.norm(), rtol=1e-2, atol=1e-2
    )
    method.objective(images, torch.tensor([0])).loss.backward()
    assert all((value.grad is not None) == value.requires_grad for value in method.parameters())
    assert any(not value.requires_grad for value in method.parameters()) == (backbone == "resnet10t")


def test_the_stride_of_the_last_map_is_the_default() -> None:
    given, default = build(stride=32, sketch_size=32), build(sketch_size=32)
    assert given.state_dict().keys() == default.state_dict().keys()
    with pytest.raises(UsageError, match="has no map of stride 64 before its last one"):
        build(stride=64)
