import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from crossx.errors import UsageError
from crossx.methods import CrossX, create_method
from slow import slow_except

SMALL = "resnet10t"


def build(**options: object) -> CrossX:
    torch.manual_seed(0)
    method = create_method("crossx", backbone=SMALL, num_classes=5, **options)
    assert isinstance(method, CrossX)
    return method


def naive_stage(stage: nn.Sequential, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Run a stage of basic blocks by hand; its last block gates F(x) before the shortcut (Eq. 1 and 2)."""
    slot = None
    parts: list[Tensor] = []
    for block in stage:
        shortcut = x if block.downsample is None else block.downsample(x)
        fx = block.bn2(block.conv2(block.act1(block.bn1(block.conv1(x)))))
        slot = block.se
        if slot is not None:
            z = fx.mean((2, 3))
            for p in range(slot.osme.num_parts):
                hidden = F.relu(F.linear(z, slot.osme.squeeze_weight[p], slot.osme.squeeze_bias[p]))
                m = torch.sigmoid(F.linear(hidden, slot.osme.excite_weight[p], slot.osme.excite_bias[p]))
                parts.append(F.relu(m[:, :, None, None] * fx + shortcut))
        x = F.relu(fx + shortcut)
    return x, parts


def naive_forward(method: CrossX, images: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Section 3 from the equations: part by part, maps and all. Returns head logits and part features."""
    trunk = method.backbone.trunk
    x = trunk.maxpool(trunk.act1(trunk.bn1(trunk.conv1(images))))
    x = trunk.layer2(trunk.layer1(x))
    x, previous = naive_stage(trunk.layer3, x)
    _, last = naive_stage(trunk.layer4, x)
    merge = method.merge
    assert merge is not None
    width, deep = previous[0].shape[1], last[0].shape[1]
    merged = []
    for p, (u_previous, u_last) in enumerate(zip(previous, last, strict=True)):
        rows = slice(p * width, (p + 1) * width)
        reduced = F.conv2d(u_last, merge.reduce.weight[rows].view(width, deep, 1, 1))
        resized = F.interpolate(reduced, u_previous.shape[-2:], mode="bilinear", align_corners=False)
        smooth = F.conv2d(u_previous + resized, merge.smooth.weight[rows], padding=1)
        merged.append(
            F.batch_norm(
                smooth, merge.norm.running_mean[rows], merge.norm.running_var[rows],
                merge.norm.weight[rows], merge.norm.bias[rows],
            )
        )  # fmt: skip
    features = {
        "last": torch.stack([u.mean((2, 3)) for u in last], 1),
        "previous": torch.stack([u.amax((2, 3)) for u in previous], 1),
        "merged": torch.stack([u.mean((2, 3)) for u in merged], 1),
    }
    return {name: method.heads[name](f.flatten(1)) for name, f in features.items()}, features


@pytest.mark.parametrize("num_parts", [1, 2, 3])
def test_forward_follows_the_equations(num_parts: int) -> None:
    method = build(num_parts=num_parts).eval()
    nn.init.normal_(method.merge.norm.running_mean)  # type: ignore[union-attr]
    images = torch.randn(2, 3, 75, 64)
    with torch.no_grad():
        heads, _ = naive_forward(method, images)
        actual = method.head_logits(images)
        for name, logits in heads.items():
            torch.testing.assert_close(actual[name], logits, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(method(images), sum(heads.values()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", ["paper", "released"])
def test_objective_follows_the_equations(form: str) -> None:
    method = build(c3s_form=form, c3s_weights=(0.3, 0.2, 0.1), cross_layer_weights=(0.7, 0.4)).eval()
    images, targets = torch.randn(4, 3, 64, 64), torch.tensor([0, 1, 2, 4])
    heads, features = naive_forward(method, images)
    logits = sum(heads.values())
    expected = {"data": -F.log_softmax(logits, 1)[torch.arange(4), targets].mean()}
    for (name, f), weight in zip(features.items(), (0.3, 0.2, 0.1), strict=True):
        unit = f / f.norm(dim=2, keepdim=True)
        s = torch.einsum("npc,mqc->pq", unit, unit) / 16
        diagonal = s.diagonal()
        value = (1 - diagonal).sum() + s[0, 1]
        if form == "paper":
            value = s.square().sum() / 2 - 2 * diagonal.square().sum()
        expected[f"c3s_{name}"] = weight * value
    teacher = heads["last"].softmax(1)
    for name, weight in (("previous", 0.7), ("merged", 0.4)):
        kl = (teacher * (teacher / heads[name].softmax(1)).log()).sum(1).mean()
        expected[f"cross_layer_{name}"] = weight * kl
    objective = method.objective(images, targets)
    assert objective.terms.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(objective.terms[name], value, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(objective.loss, sum(expected.values()), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(objective.logits, logits, rtol=1e-4, atol=1e-5)


SWITCHES = [
    ({"use_previous": False, "use_merged": False}, {"last"}),
    ({"use_previous": True, "use_merged": False}, {"last", "previous"}),
    ({"use_previous": False, "use_merged": True}, {"last", "merged"}),
    ({}, {"last", "previous", "merged"}),
]


@pytest.mark.parametrize(("options", "heads"), SWITCHES)
@pytest.mark.parametrize("pooling", ["max", "avg"])
def test_every_switch_of_the_ablation(options: dict[str, bool], heads: set[str], pooling: str) -> None:
    method = build(previous_pooling=pooling, **options)
    images, targets = torch.randn(2, 3, 64, 64), torch.tensor([0, 3])
    objective = method.objective(images, targets)
    objective.loss.backward()
    unused = [name for name, parameter in method.named_parameters() if parameter.grad is None]
    assert unused == []
    assert method.head_logits(images).keys() == heads
    assert method.activation_maps(images).keys() == heads
    expected = {"data"} | {f"c3s_{h}" for h in heads} | {f"cross_layer_{h}" for h in heads - {"last"}}
    assert objective.terms.keys() == expected


BACKBONES = {
    "resnet18": 64, "resnet50": 64, "seresnet50": 64, "resnext50_32x4d": 64, "convnext_tiny": 64,
    "efficientnet_b0": 64, "mobilenetv2_035": 67, "swin_tiny_patch4_window7_224": 224, "vit_tiny_patch16_224": 224,
}  # fmt: skip


@pytest.mark.parametrize(
    ("backbone", "size"), slow_except(BACKBONES.items(), ("resnet18", 64), ("mobilenetv2_035", 67))
)
def test_every_backbone_trains_every_weight(backbone: str, size: int) -> None:
    torch.manual_seed(0)
    method = create_method("crossx", backbone=backbone, num_classes=3)
    objective = method.objective(torch.randn(2, 3, size, size), torch.tensor([0, 2]))
    objective.loss.backward()
    assert [name for name, parameter in method.named_parameters() if parameter.grad is None] == []
    assert torch.isfinite(objective.loss)


def test_weight_zero_turns_a_term_off() -> None:
    method = build(c3s_weights=(0, 0, 0), cross_layer_weights=(0, 0))
    objective = method.objective(torch.randn(2, 3, 64, 64), torch.tensor([0, 3]))
    assert objective.terms.keys() == {"data"}
    assert torch.equal(objective.loss, objective.terms["data"])


@pytest.mark.parametrize("weights", [(0.5, 0.25, 0.5), (0, 0, 0)])
def test_measures_follow_s_with_c3s_and_without(weights: tuple[float, ...]) -> None:
    method = build(num_parts=3, c3s_weights=weights).eval()
    images, targets = torch.randn(4, 3, 64, 64), torch.tensor([0, 1, 2, 4])
    measures = method.objective(images, targets).measures
    expected = {}
    for name, f in method.part_features(images).items():
        unit = f / f.norm(dim=2, keepdim=True)
        s = torch.stack(
            [torch.stack([(unit[:, p] @ unit[:, q].T).mean() for q in range(3)]) for p in range(3)]
        )
        expected[f"s_diagonal_{name}"] = s.diag().mean()
        expected[f"s_off_diagonal_{name}"] = s[~torch.eye(3, dtype=torch.bool)].mean()
    assert not any(value.requires_grad for value in measures.values())
    torch.testing.assert_close(dict(measures), expected)


def test_measures_of_one_part_have_no_off_diagonal() -> None:
    measures = build(num_parts=1).objective(torch.randn(2, 3, 64, 64), torch.tensor([0, 3])).measures
    assert measures.keys() == {f"s_diagonal_{head}" for head in ("last", "previous", "merged")}


def test_measures_change_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    images, targets = torch.randn(4, 3, 64, 64), torch.tensor([0, 1, 2, 4])

    def gradients(method: CrossX) -> dict[str, Tensor | None]:
        method.objective(images, targets).loss.backward()
        return {name: parameter.grad for name, parameter in method.named_parameters()}

    for weights in ((0.5, 0.25, 0.5), (0, 0, 0)):
        with_measures = gradients(build(c3s_weights=weights))
        with monkeypatch.context() as patch:
            patch.setattr("crossx.methods.crossx.summarize_correlations", lambda s: {})
            without = gradients(build(c3s_weights=weights))
        torch.testing.assert_close(with_measures, without, rtol=0, atol=0)


@pytest.mark.slow
def test_measures_compile_in_one_graph() -> None:
    method = build(c3s_weights=(0.5, 0, 0.5))
    images, targets = torch.randn(4, 3, 64, 64), torch.tensor([0, 1, 2, 4])
    torch.compiler.reset()
    compiled = torch.compile(method.objective, fullgraph=True, backend="eager")(images, targets)
    expected = build(c3s_weights=(0.5, 0, 0.5)).objective(images, targets)
    torch.testing.assert_close(dict(compiled.measures), dict(expected.measures))
    torch.testing.assert_close(compiled.loss, expected.loss)


def test_soft_targets_are_class_probabilities() -> None:
    method = build().eval()
    images = torch.randn(2, 3, 64, 64)
    hard = method.objective(images, torch.tensor([1, 4])).loss
    soft = method.objective(images, F.one_hot(torch.tensor([1, 4]), 5).float()).loss
    torch.testing.assert_close(hard, soft)


def test_a_batch_of_one() -> None:
    method = build()
    objective = method.objective(torch.randn(1, 3, 64, 64), torch.tensor([2]))
    assert torch.isfinite(objective.loss)


@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param({"merged_statistics": "pooled"}, marks=pytest.mark.slow),
        pytest.param({"osme_placement": "output", "previous_pooling": "avg"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_autocast_keeps_maps_in_half_precision_and_reduces_in_float32(options: dict[str, object]) -> None:
    method = build(**options).train()
    for norm in method.modules():
        if isinstance(norm, nn.BatchNorm2d):
            # else the last block's residual is zero at the start
            nn.init.uniform_(norm.weight, 0.5, 1.5)
    images, targets = torch.randn(4, 3, 32, 32), torch.arange(4) % 3
    exact = method.objective(images, targets)
    with torch.autocast("cpu", torch.bfloat16):
        stages = method.backbone(images)
        assert {stages[name].dtype for name in ("last", "previous")} == {torch.bfloat16}
        assert {pooled.dtype for pooled in method.part_features(images).values()} == {torch.float32}
        rounded = method.objective(images, targets)
        method.eval()
        assert {pooled.dtype for pooled in method.part_features(images).values()} == {torch.float32}
    assert all(term.dtype == torch.float32 for term in rounded.terms.values())
    for name, term in exact.terms.items():
        torch.testing.assert_close(rounded.terms[name], term, rtol=0.05, atol=0.02, msg=name)
    rounded.loss.backward()
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in method.parameters())


def test_maps_are_channel_means_of_the_attention_features() -> None:
    method = build().eval()
    images = torch.randn(2, 3, 64, 96)
    stages = method.backbone(images)
    maps = method.activation_maps(images)
    assert {name: tuple(m.shape) for name, m in maps.items()} == {
        "last": (2, 2, 2, 3), "previous": (2, 2, 4, 6), "merged": (2, 2, 4, 6),
    }  # fmt: skip
    expected = sum(stages["previous"][:, :, c] for c in range(256)) / 256
    torch.testing.assert_close(maps["previous"], expected)
    merged = method.merge(stages["previous"], stages["last"])
    assert (merged < 0).any()
    positive = sum(merged[:, :, c].clamp(min=0) for c in range(256)) / 256
    torch.testing.assert_close(maps["merged"], positive)


def test_embeddings_are_what_the_heads_classify() -> None:
    method = build().eval()
    images = torch.randn(2, 3, 64, 64)
    embeddings = method.embeddings(images)
    assert embeddings.shape == (2, 2 * (512 + 256 + 256))
    weight = torch.cat([head.weight for head in method.heads.values()], 1)
    bias = sum(head.bias for head in method.heads.values())
    torch.testing.assert_close(embeddings @ weight.T + bias, method(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_parts": 0}, "num_parts must be at least 1"),
        ({"reduction": 0}, "reduction must be between"),
        ({"reduction": [16]}, "reduction takes 2 numbers"),
        ({"c3s_weights": [1.0]}, "c3s_weights takes 3 numbers"),
        ({"cross_layer_weights": [1.0, -1.0]}, "cross_layer_weights must not be negative"),
        ({"num_part": 2}, "Did you mean 'num_parts'"),
    ],
)
def test_options_that_cannot_work(options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build(**options)


def test_gates_per_stage() -> None:
    method = build(reduction=[32, 8])
    trunk = method.backbone.trunk
    assert trunk.layer4[-1].se.osme.squeeze_weight.shape == (2, 512 // 32, 512)
    assert trunk.layer3[-1].se.osme.squeeze_weight.shape == (2, 256 // 8, 256)


@pytest.mark.parametrize("pooling", ["max", "avg"])
@pytest.mark.parametrize("num_parts", [1, 3])
def test_class_maps_and_bias_are_the_logits_of_each_head(pooling: str, num_parts: int) -> None:
    method = build(previous_pooling=pooling, num_parts=num_parts).eval()
    images, classes = torch.randn(3, 3, 64, 96), torch.tensor([4, 0, 2])
    maps = method.class_activation_maps(images, classes)
    assert list(maps) == list(method.activation_maps(images)) == ["previous", "last", "merged"]
    for name, logits in method.head_logits(images).items():
        expected = logits.gather(1, classes[:, None])[:, 0]
        bias = method.heads[name].bias[classes]
        torch.testing.assert_close(maps[name].mean((2, 3)).sum(1) + bias, expected, rtol=1e-4, atol=1e-4)
        assert maps[name].shape == method.activation_maps(images)[name].shape


def test_class_maps_of_average_pooled_heads_are_weighted_channels() -> None:
    method = build().eval()
    images = torch.randn(1, 3, 64, 64)
    last, weights = method.backbone(images)["last"], method.heads["last"].weight[3]
    channels = last.shape[2]
    for part in range(2):
        terms = [weights[part * channels + c] * last[0, part, c] for c in range(channels)]
        maps = method.class_activation_maps(images, torch.tensor([3]))["last"]
        torch.testing.assert_close(maps[0, part], sum(terms), rtol=1e-4, atol=1e-4)


INFERENCE_FORMS: dict[str, dict[str, object]] = {
    "defaults": {},
    "more classes than channels": {"num_classes": 300, "interpolation": "nearest", "previous_pooling": "avg"},
    "competing gates": {"gates": "competing", "background": True, "num_parts": 3},
    "spatial gates": {"gates": "spatial"},
    "one head": {"use_previous": False, "use_merged": False, "num_parts": 1},
    "two heads": {"use_previous": False},
}


@pytest.mark.parametrize("options", INFERENCE_FORMS.values(), ids=INFERENCE_FORMS)
def test_inference_form_has_the_same_logits(options: dict[str, object]) -> None:
    torch.manual_seed(0)
    method = create_method("crossx", backbone=SMALL, **{"num_classes": 5, **options}).eval()
    randomise_norms(method)
    images = torch.randn(3, 3, 72, 72)
    with torch.inference_mode():
        expected, features = method(images), method.logits_and_features(images)[1]
        form = method.inference_form(72)
        torch.testing.assert_close(form(images), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            form.logits_and_features(images), (expected, features), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize(
    "backbone",
    slow_except(
        ["mobilenetv2_035", "legacy_seresnet18", "res2net50_26w_4s", "skresnet18", "vit_tiny_patch16_224"],
        "mobilenetv2_035",
    ),
)
def test_inference_form_of_other_trunks(backbone: str) -> None:
    torch.manual_seed(0)
    method = create_method("crossx", backbone=backbone, num_classes=5).eval()
    randomise_norms(method)
    size = 224 if "vit" in backbone else 96
    images = torch.randn(2, 3, size, size)
    with torch.inference_mode():
        expected = method(images)
        torch.testing.assert_close(method.inference_form(size)(images), expected, rtol=1e-4, atol=1e-5)


def test_a_method_derived_from_crossx_has_no_form_of_its_own() -> None:
    class Derived(CrossX):
        pass

    method = build()
    method.__class__ = Derived
    assert method.inference_form(64) is method


def randomise_norms(network: nn.Module) -> None:
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.running_var):
                nn.init.uniform_(tensor, 0.8, 1.2)
            for tensor in (module.bias, module.running_mean):
                nn.init.normal_(tensor, std=0.1)
