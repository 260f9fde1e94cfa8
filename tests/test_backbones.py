import io
import json
import logging
import socket
import time
from contextlib import nullcontext
from email.message import Message
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch.nn import functional as F

import hub_stub
from crossx.backbones import Backbone, EarlyLayers, can_skip, create_backbone, load_trunk_weights
from crossx.errors import CrossXError, UsageError

RESIDUAL = ["resnet18", "resnet50", "seresnet50", "resnext50_32x4d", "legacy_seresnet50", "res2net50_26w_4s"]
OTHERS = [
    "convnext_tiny",
    "efficientnet_b0",
    "mobilenetv2_035",
    "swin_tiny_patch4_window7_224",
    "vit_tiny_patch16_224",
]
FIXED_SIZE = ("swin", "vit")


def size_for(name: str) -> int:
    return 224 if name.startswith(FIXED_SIZE) else 96


def build(name: str) -> Backbone:
    torch.manual_seed(0)
    backbone = create_backbone(name)
    for module in backbone.modules():
        # timm starts the last norm of a residual block at 0, which would make F(x) vanish.
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1)
    return backbone.eval()


@pytest.mark.parametrize("name", RESIDUAL + OTHERS)
@torch.inference_mode()
@pytest.mark.slow
def test_maps_are_those_of_timm(name: str) -> None:
    backbone = build(name)
    images = torch.randn(1, 3, size_for(name), size_for(name))
    maps = backbone(images)
    for stage in ("previous", "last"):
        side = images.shape[-1] // backbone.strides[stage]
        assert maps[stage].shape == (1, backbone.channels[stage], side, side)
    torch.testing.assert_close(backbone.pool(backbone.features(images)), backbone.trunk(images))
    if not name.startswith("vit"):
        assert backbone.strides["last"] == 2 * backbone.strides["previous"] == 32
        # What the classifier would pool, and no earlier map (the trap of MobileNet's head convolution).
        norm = getattr(getattr(backbone.trunk, "head", None), "norm", torch.nn.Identity())
        pooled = norm(maps["last"].mean((2, 3), keepdim=True)).flatten(1)
        torch.testing.assert_close(pooled, backbone.trunk(images), rtol=1e-3, atol=1e-4)


@torch.inference_mode()
def test_stages_of_one_stride_are_two_depths() -> None:
    backbone = build("vit_tiny_patch16_224")
    tokens: dict[int, torch.Tensor] = {}
    for depth in (8, 11):
        backbone.trunk.blocks[depth].register_forward_hook(
            lambda _m, _i, out, d=depth: tokens.update({d: out})
        )
    maps = backbone(torch.randn(1, 3, 224, 224))
    for stage, depth in (("previous", 8), ("last", 11)):
        expected = backbone.trunk.norm(tokens[depth])[:, 1:].transpose(1, 2).unflatten(2, (14, 14))
        torch.testing.assert_close(maps[stage], expected)


@pytest.mark.parametrize(
    ("name", "block"), [("mobilenetv2_035", "blocks.5.0"), ("efficientnet_b0", "blocks.5.0")]
)
@torch.inference_mode()
def test_previous_of_inverted_residuals_is_the_expanded_map(name: str, block: str) -> None:
    torch.manual_seed(0)
    original = timm.create_model(name, num_classes=0).eval()
    expanded = []
    original.get_submodule(block).bn1.register_forward_hook(lambda _m, _i, out: expanded.append(out))
    backbone = build(name)
    backbone.trunk.load_state_dict(
        dict(zip(backbone.trunk.state_dict(), original.state_dict().values(), strict=True))
    )
    images = torch.randn(1, 3, 96, 96)
    assert torch.equal(backbone.trunk(images), original(images))
    assert torch.equal(backbone(images)["previous"], expanded[0])
    assert backbone.channels["previous"] == expanded[0].shape[1]


@pytest.mark.parametrize("name", RESIDUAL)
@torch.inference_mode()
@pytest.mark.slow
def test_osme_inside_the_block_leaves_the_trunk_as_it_was(name: str) -> None:
    plain, backbone = build(name), build(name)
    for stage in ("previous", "last"):
        backbone.attach_osme(stage, 3, 16, None)
    backbone.eval()
    seen = []
    backbone.trunk.layer4[0].register_forward_pre_hook(lambda _m, args: seen.append(args[0].clone()))
    images = torch.randn(2, 3, 96, 96)
    expected = plain(images)
    features = backbone(images)
    assert torch.equal(seen[0], expected["previous"])
    assert features["previous"].shape == (2, 3, backbone.channels["previous"], 6, 6)
    # A gate of exactly one gives the map of a block without attention, a gate of zero the shortcut alone.
    slot = backbone.trunk.layer4[-1].se_module if name.startswith("legacy") else backbone.trunk.layer4[-1].se
    slot.osme.excite_weight.zero_()
    slot.osme.excite_bias.copy_(torch.tensor([40.0, -200.0, 0.0])[:, None].expand_as(slot.osme.excite_bias))
    full, none, half = backbone(images)["last"].unbind(1)
    if name.startswith(("resnet", "resnext", "res2net")):
        torch.testing.assert_close(full, expected["last"])
    assert (none >= 0).all()
    assert not torch.equal(none, full)
    # ReLU(F / 2 + s) lies between ReLU(s) and ReLU(F + s) everywhere.
    low, high = torch.minimum(none, full), torch.maximum(none, full)
    assert ((half >= low - 1e-5) & (half <= high + 1e-5)).all()


@pytest.mark.parametrize("name", ["convnext_tiny", "mobilenetv2_035", "resnet18"])
@torch.inference_mode()
def test_osme_on_the_output_gates_the_map(name: str) -> None:
    plain, backbone = build(name), build(name)
    backbone.attach_osme("last", 2, 16, "output")
    backbone.eval()
    images = torch.randn(2, 3, 96, 96)
    maps = plain(images)["last"]
    torch.testing.assert_close(backbone(images)["last"], backbone.osme["last"](maps))


def test_residual_placement_needs_residual_blocks() -> None:
    with pytest.raises(UsageError, match="no residual blocks"):
        build("convnext_tiny").attach_osme("last", 2, 16, "residual")


def test_stochastic_depth_drops_images_not_parts() -> None:
    torch.manual_seed(0)
    backbone = create_backbone("resnet18", args={"drop_path_rate": 0.9})
    backbone.attach_osme("last", 2, 16, None)
    backbone.train()
    features = backbone(torch.randn(8, 3, 64, 64))["last"]
    assert features.shape == (8, 2, 512, 2, 2)
    dropped = [torch.equal(image[0], image[1]) for image in features]
    assert any(dropped)


def test_head_layers_go_where_a_method_has_its_own() -> None:
    backbone = build("mobilenetv3_small_050")
    before = backbone(torch.zeros(1, 3, 64, 64))["last"]
    count = len(list(backbone.parameters()))
    backbone.drop_head()
    assert isinstance(backbone.trunk.conv_head, torch.nn.Identity)
    assert len(list(backbone.parameters())) == count - 2
    torch.testing.assert_close(backbone(torch.zeros(1, 3, 64, 64))["last"], before)


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("resnet_50", {}, "unknown backbone 'resnet_50'. Did you mean 'resnet"),
        ("resnet50.tv_in2k", {}, "unknown weights.*Did you mean 'resnet50.tv"),
        ("resnet18", {"dept": 3}, "does not take backbone_args"),
        ("local-dir:/nowhere", {}, "there is no /nowhere/config.json"),
        ("resnet50/x", {}, "unknown backbone"),
    ],
)
def test_names_that_cannot_work(name: str, args: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        create_backbone(name, args=args)


@pytest.mark.parametrize("name", [None, 18, Path("resnet18")])
def test_a_name_is_text(name: Any) -> None:
    with pytest.raises(UsageError, match="a backbone is the name of a timm model, not"):
        create_backbone(name)


@pytest.mark.parametrize("name", ["resnet18.tv_in1k", "legacy_seresnet18.in1k", "hf-hub:me/birds"])
def test_without_a_network_the_error_comes_at_once(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def sleep(seconds: float) -> None:
        raise AssertionError(f"waited {seconds} seconds")

    def unreachable(address: tuple[str, int], timeout: float) -> None:
        assert timeout <= 300
        raise OSError("Name or service not known")

    hub_stub.use(monkeypatch, "http://no-such-host.invalid", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(time, "sleep", sleep)
    monkeypatch.setattr(socket, "create_connection", unreachable)
    caplog.set_level(logging.INFO, "crossx")
    with pytest.raises(
        CrossXError, match=r"loaded.*\(Name or service not known\)\. Check .* network"
    ) as raised:
        create_backbone(name, pretrained=True)
    assert "\n" not in str(raised.value)
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith("downloading ")


def test_no_network_for_pretrained_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    # the connection is there, the download fails
    monkeypatch.setattr(socket, "create_connection", lambda *_: nullcontext())
    create = timm.create_model

    def offline(name: str, pretrained: bool = False, **kwargs: object) -> torch.nn.Module:
        if pretrained:
            raise OSError("Name or service not known\nlong story")
        return create(name, **kwargs)

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(
        CrossXError, match=r"weights cannot be loaded .Name or service not known.*local-dir:FOLDER"
    ) as e:
        create_backbone("resnet18.tv_in1k", pretrained=True)
    assert "\n" not in str(e.value)


def test_own_data_config_and_weights_of_a_folder(tmp_path: Path) -> None:
    source = timm.create_model("mobilenetv2_035", num_classes=0, bn_eps=1e-3)
    cfg = {
        "num_classes": 0,
        "mean": [0.5] * 3,
        "std": [0.25] * 3,
        "interpolation": "bilinear",
        "classifier": "classifier",
    }
    config = {
        "architecture": "mobilenetv2_035",
        "num_classes": 0,
        "model_args": {"bn_eps": 1e-3},
        "pretrained_cfg": cfg,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(source.state_dict(), tmp_path / "model.safetensors")
    backbone = create_backbone(f"local-dir:{tmp_path}", pretrained=True)
    assert tuple(backbone.data_config["std"]) == (0.25, 0.25, 0.25)
    assert backbone.data_config["interpolation"] == "bilinear"
    assert backbone.args == {"bn_eps": 1e-3}
    assert backbone.trunk.bn1.eps == 1e-3
    for own, theirs in zip(backbone.trunk.state_dict().values(), source.state_dict().values(), strict=True):
        assert torch.equal(own, theirs)


def test_weights_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = timm.create_model("resnet10t")
    state = {f"module.{key}": value for key, value in source.state_dict().items()}
    del state["module.conv1.0.weight"]
    state["module.layer1.0.conv1.weight"] = torch.zeros(3)
    torch.save({"state_dict": state}, tmp_path / "w.pth")
    backbone = create_backbone("resnet10t", weights=str(tmp_path / "w.pth"))
    assert torch.equal(backbone.trunk.layer2[0].conv1.weight, source.layer2[0].conv1.weight)
    for line in ("missing: conv1.0.weight", "shape (3,)", "unknown: fc.weight"):
        assert line in caplog.text


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", None])
def test_weights_files_that_are_none(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "w.pth"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CrossXError, match=r"weights file|plain state dict") as error:
        load_trunk_weights(torch.nn.Linear(1, 1), path)
    assert "\n" not in str(error.value)


def test_weights_of_another_architecture(tmp_path: Path) -> None:
    torch.save({"encoder.weight": torch.zeros(1)}, tmp_path / "w.pth")
    with pytest.raises(CrossXError, match="none of its 1 keys"):
        create_backbone("resnet10t", weights=str(tmp_path / "w.pth"))


def test_files_with_python_objects_are_not_loaded(tmp_path: Path) -> None:
    torch.save({"weight": Path("x")}, tmp_path / "w.pth")
    with pytest.raises(CrossXError, match="plain state dict"):
        create_backbone("resnet10t", weights=str(tmp_path / "w.pth"))


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        (
            "resnet18",
            32,
            "too small for backbone 'resnet18': its last map is 1 x 1. Use --data.image_size 64",
        ),
        ("vit_tiny_patch16_224", 160, "does not work.*--data.image_size 224"),
    ],
)
def test_image_sizes_that_cannot_work(name: str, size: int, message: str) -> None:
    backbone = create_backbone(name)
    with pytest.raises(UsageError, match=message):
        backbone.check_image_size(size)
    assert backbone.training


def test_the_head_is_dropped_whatever_size_the_model_was_given() -> None:
    args = {"img_size": 64, "embed_dim": 16, "num_heads": 2, "depth": 4}
    backbone = create_backbone("vit_tiny_patch16_224", args=args)
    backbone.drop_head()
    with pytest.raises(UsageError, match=r"Its own size is 64: --data.image_size 64"):
        backbone.check_image_size(96)


@pytest.mark.parametrize("name", ["resnet10t", "convnext_atto"])
def test_every_stage_map_passes_its_place_for_hooks(name: str) -> None:
    backbone, seen = create_backbone(name, pretrained=False).eval(), {}
    for place in backbone.stage_maps.values():
        place.register_forward_hook(lambda place, _, output: seen.update({place: output}))
    images = torch.randn(1, 3, 64, 64)
    for stage, map_ in backbone(images).items():
        assert seen[backbone.stage_maps[stage]] is map_
    assert backbone.features(images) is seen[backbone.stage_maps["last"]]


@pytest.mark.parametrize(
    "name", [pytest.param("vgg11", marks=pytest.mark.slow), "resnet10t", "efficientnet_b0", "convnext_tiny"]
)
@torch.inference_mode()
def test_previous_is_taken_at_another_stride(name: str) -> None:
    images = torch.randn(1, 3, 64, 64)
    backbone, before = build(name), build(name)
    backbone.take_previous(8)
    maps, expected = backbone(images), before(images)
    assert maps["previous"].shape == (1, backbone.channels["previous"], 8, 8)
    assert backbone.strides == {**before.strides, "previous": 8}
    torch.testing.assert_close(maps["last"], expected["last"])
    stages = [stage["reduction"] for stage in before.trunk.feature_info]
    if name != "efficientnet_b0":  # whose map of a stride is the next stage's expanded one
        index = max(i for i, stride in enumerate(stages) if stride == 8)
        (of_timm,) = before.trunk.forward_intermediates(images, indices=[index], intermediates_only=True)
        torch.testing.assert_close(maps["previous"], of_timm)


@pytest.mark.parametrize(
    ("name", "expected"), [pytest.param("vgg11", "previous", marks=pytest.mark.slow), ("resnet10t", "last")]
)
@torch.inference_mode()
def test_the_unpooled_stage_is_the_deepest_before_pooling(name: str, expected: str) -> None:
    backbone = build(name)
    assert backbone.unpooled_stage == expected
    maps = backbone(torch.randn(1, 3, 64, 64))
    if expected == "previous":
        torch.testing.assert_close(torch.nn.functional.max_pool2d(maps["previous"], 2), maps["last"])
        backbone.take_previous(8)
        assert backbone.unpooled_stage == "last"


def test_a_stride_without_a_map_is_refused() -> None:
    with pytest.raises(UsageError, match="has no map of stride 2 before its last one; it has: 4, 8, 16"):
        create_backbone("resnet10t").take_previous(2)


def test_alexnet_is_torchvisions_with_its_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real download code, up to the request; the file has the convolutions alone, of 244 MB the smallest part."""
    with torch.device("meta"):
        torchvision_names = set(torchvision.models.alexnet().state_dict())
    convolutions = {
        f"features.{index}.{name}": torch.randn(shape) / 10
        for index, weight in (
            (0, (64, 3, 11, 11)), (3, (192, 64, 5, 5)), (6, (384, 192, 3, 3)), (8, (256, 384, 3, 3)),
            (10, (256, 256, 3, 3)),
        )
        for name, shape in (("weight", weight), ("bias", weight[:1]))
    }  # fmt: skip
    classifier = {"classifier.6.weight": torch.zeros(1000, 4096), "classifier.6.bias": torch.zeros(1000)}
    stored = io.BytesIO()
    torch.save(convolutions | classifier, stored)
    requested = []

    def urlopen(request: Any, *_: object, **__: object) -> Any:
        requested.append(request.full_url)
        answer = io.BytesIO(stored.getvalue())
        answer.info = lambda: Message()  # type: ignore[attr-defined]
        return answer

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(socket, "create_connection", lambda *_: nullcontext())
    monkeypatch.setattr(torch.hub, "urlopen", urlopen)
    backbone = create_backbone("alexnet", pretrained=True).eval()
    assert requested == ["https://download.pytorch.org/models/alexnet-owt-7be5be79.pth"]
    own = backbone.trunk.state_dict()
    assert own.keys() == {name for name in torchvision_names if not name.startswith("classifier.6.")}
    assert all(torch.equal(own[name], value) for name, value in convolutions.items())
    assert sum(map(len, backbone.layer_groups())) == len(own)

    images = torch.randn(1, 3, 224, 224)
    with torch.inference_mode():
        maps, features = backbone(images), backbone.features(images)
        x = images
        for index, (stride, padding) in {0: (4, 2), 3: (1, 2), 6: (1, 1), 8: (1, 1), 10: (1, 1)}.items():
            weight, bias = convolutions[f"features.{index}.weight"], convolutions[f"features.{index}.bias"]
            x = F.relu(F.conv2d(x, weight, bias, stride, padding))
            if index == 10:
                torch.testing.assert_close(maps["previous"], x)
            if index in (0, 3, 10):
                x = F.max_pool2d(x, 3, 2)
        torch.testing.assert_close(maps["last"], x)
        fc6 = F.relu(F.linear(x.flatten(1), own["classifier.1.weight"], own["classifier.1.bias"]))
        fc7 = F.relu(F.linear(fc6, own["classifier.4.weight"], own["classifier.4.bias"]))
        torch.testing.assert_close(backbone.pool(features, "fc6"), fc6)
        torch.testing.assert_close(backbone.pool(features), fc7)
    assert maps["previous"].shape == (1, 256, 13, 13)
    assert x.shape == (1, backbone.channels["last"], 6, 6)
    assert backbone.layer_channels("fc6") == backbone.pooled_channels == 4096
    backbone.drop_head()
    assert {name.split(".")[0] for name in backbone.trunk.state_dict()} == {"features"}


@pytest.mark.parametrize(
    ("name", "stride"),
    [
        ("test_resnet", 8),
        ("mobilenetv2_035", 8),
        pytest.param("mobilenetv2_035", 16, marks=pytest.mark.slow),
        pytest.param("resnet18", 4, marks=pytest.mark.slow),
        pytest.param("densenet121", 8, marks=pytest.mark.slow),
        pytest.param("convnext_atto", 8, marks=pytest.mark.slow),
        pytest.param("vgg11", 8, marks=pytest.mark.slow),
    ],
)
@torch.inference_mode()
def test_early_layers_end_at_the_map_of_their_stride(name: str, stride: int) -> None:
    backbone = build(name)
    images = torch.randn(2, 3, 64, 64)
    early = EarlyLayers(backbone, stride)
    maps = early(images)
    assert maps.shape[-1] == 64 // stride
    # timm's own map; that of `previous` has the expansion of the next stage at its end
    own = timm.create_model(backbone.architecture, num_classes=0)
    own.load_state_dict(
        {backbone.timm_names()[key]: value for key, value in backbone.trunk.state_dict().items()}
    )
    _, expected = own.eval().forward_intermediates(images)
    if stride != backbone.strides["previous"]:
        assert any(map_.shape == maps.shape and torch.allclose(map_, maps, atol=1e-4) for map_ in expected)
    whole = backbone(images)
    with early.skipped():
        skipped = backbone(maps)
    for stage, value in whole.items():
        torch.testing.assert_close(skipped[stage], value)
    # afterwards nothing is skipped
    torch.testing.assert_close(backbone(images)["last"], whole["last"])


class _Features(torch.nn.Module):
    def __init__(self, backbone: Backbone, shift: float = 0.0) -> None:
        super().__init__()
        self.backbone, self.shift = backbone, shift

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.backbone.pool(self.backbone.features(images)) + self.shift * images.mean()


def test_early_layers_need_a_map_of_their_stride() -> None:
    with pytest.raises(UsageError, match=r"no map of stride 8 before its last one; it has: 16\."):
        EarlyLayers(build("test_vit"), 8)


@torch.inference_mode()
def test_a_network_that_uses_the_images_itself_cannot_skip_layers() -> None:
    backbone = build("test_resnet")
    early, images = EarlyLayers(backbone, 8), torch.randn(2, 3, 64, 64) + 1
    network, other = _Features(backbone), _Features(backbone, shift=1.0)
    assert can_skip(early, network, images, lambda images: [network(images)])
    assert not can_skip(early, other, images, lambda images: [other(images)])
    assert not can_skip(early, network, images, lambda images: [network(images), network(images.flip(3))])
