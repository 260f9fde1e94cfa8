import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import nms

from crossx.evaluation.run import evaluate
from crossx.explain import explain_images
from crossx.layers import crop_boxes
from crossx.losses import ClassificationLoss
from crossx.methods import NTSNet, create_method
from crossx.training.config import OptimConfig
from crossx.training.optim import parameter_groups
from refusals import refusal

TARGETS = torch.tensor([0, 2])


def build(backbone: str = "test_resnet", **options: object) -> NTSNet:
    torch.manual_seed(0)
    method = create_method("nts", backbone=backbone, num_classes=3, **options)
    assert isinstance(method, NTSNet)
    return method.eval()


def images(number: int = 2, size: int = 96) -> Tensor:
    return torch.randn(number, 3, size, size, generator=torch.Generator().manual_seed(1))


def step_by_step(method: NTSNet, image: Tensor, count: int, times: int = 1) -> dict[str, Tensor]:
    """The network on one image (3, S, S), as its paper and its authors' code describe it.

    With ``times``, the image is that many times as large as what the trunk sees of it.
    """
    size, large = image.shape[1] // times, image
    image = F.interpolate(large[None], (size, size), mode="bilinear", antialias=True)[0]
    last = method.backbone(image[None])["last"]
    navigator = method.navigator
    first = F.relu(navigator.levels[0](last))
    second = F.relu(navigator.levels[1](first))
    third = F.relu(navigator.levels[2](second))
    maps = [head(level) for head, level in zip(navigator.scores, (first, second, third), strict=True)]
    scores = torch.cat([map_.reshape(-1) for map_ in maps])
    anchors = navigator(last, (size, size))[0]
    best = nms(anchors, scores, 0.25)[:count]
    padded = F.pad(large, (size * times,) * 4)
    parts = []
    for left, top, right, bottom in ((anchors[best].int() + size) * times).tolist():
        crop = F.interpolate(
            padded[None, :, top:bottom, left:right],
            (size // 2, size // 2),
            mode="bilinear",
            align_corners=True,
        )
        parts.append(F.adaptive_avg_pool2d(method.backbone(crop)["last"], 1).flatten())
    feature = F.adaptive_avg_pool2d(last, 1).flatten()
    return {
        "scores": scores[best],
        "boxes": anchors[best] * times,
        "raw": method.raw(feature),
        "parts": torch.stack([method.teacher(part) for part in parts]),
        "joined": method.scrutinizer(torch.cat([*parts[: method.num_crops], feature])),
    }


@pytest.mark.parametrize("times", [1, 2])
def test_prediction_is_that_of_the_paper_step_by_step(times: int) -> None:
    method, batch = build(view_size=96 if times > 1 else None), images(size=96 * times)
    heads, boxes = method.head_logits(batch), method.boxes(batch)
    assert method.activation_maps(batch)["last"].shape[2:] == method.backbone.map_size(96)
    for number, image in enumerate(batch):
        expected = step_by_step(method, image, 4, times)
        torch.testing.assert_close(boxes[number], expected["boxes"])
        torch.testing.assert_close(heads["raw"][number], expected["raw"], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(heads["parts"][number], expected["parts"].mean(0), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(heads["joined"][number], expected["joined"], rtol=1e-4, atol=1e-5)
    assert torch.equal(method(batch), heads["joined"])


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_objective_is_that_of_the_paper_step_by_step(reduction: str) -> None:
    method, batch = build(parts_reduction=reduction), images()
    raw, joined, parts, ranking = [], [], [], 0.0
    for image, target in zip(batch, TARGETS, strict=True):
        expected = step_by_step(method, image, 6)
        raw.append(F.cross_entropy(expected["raw"], target))
        joined.append(F.cross_entropy(expected["joined"], target))
        of_parts = [F.cross_entropy(logits, target) for logits in expected["parts"]]
        parts.append(sum(of_parts) / (6 if reduction == "mean" else 1))
        for i in range(6):
            for s in range(6):
                if of_parts[i] > of_parts[s]:
                    ranking += F.relu(1 - expected["scores"][s] + expected["scores"][i]) / len(batch)
    objective = method.objective(batch, TARGETS)
    assert list(objective.terms) == ["raw", "joined", "parts", "ranking"]
    for name, values in (("raw", raw), ("joined", joined), ("parts", parts)):
        torch.testing.assert_close(objective.terms[name], sum(values) / len(values), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(objective.terms["ranking"], ranking, rtol=1e-4, atol=1e-5)


def test_the_navigator_learns_from_the_ranking_alone_and_the_rest_not_from_it() -> None:
    method = build()
    terms = method.objective(images(), TARGETS).terms
    navigator = {f"navigator.{name}" for name, _ in method.navigator.named_parameters()}
    for name, term in terms.items():
        method.zero_grad(set_to_none=True)
        term.backward(retain_graph=True)
        reached = {key for key, p in method.named_parameters() if p.grad is not None and p.grad.any()}
        if name == "ranking":
            assert reached <= navigator
            assert {f"navigator.scores.{level}.bias" for level in range(3)} & reached
        else:
            assert reached
            assert not reached & navigator


def test_the_best_regions_do_not_hang_on_their_number() -> None:
    batch = images()
    six, two = build(num_crops=6).boxes(batch), build(num_crops=2).boxes(batch)
    assert torch.equal(six[:, :2], two)


def test_own_statistics_of_crops_are_those_of_a_trunk_that_sees_crops_only() -> None:
    method, batch = build(crop_statistics="own", dropout=0.0), images()
    crops_only = copy.deepcopy(method.backbone).train()

    def crops() -> Tensor:
        # (B, n, 3, s, s) -> (B*n, 3, s, s)
        return crop_boxes(batch, method.boxes(batch), 48).flatten(0, 1)

    method.train()
    crops_only(crops())
    statistics = {name: value.clone() for name, value in method.backbone.named_buffers()}
    method.embeddings(batch)
    own = method.crop_statistics
    assert own is not None
    for name, value in crops_only.named_buffers():
        torch.testing.assert_close(own.get_buffer(name.replace(".", "__")), value, msg=name)
        assert not torch.equal(method.backbone.get_buffer(name), statistics[name])
    method.eval()
    features = crops_only.eval()(crops())["last"].mean((2, 3)).view(2, -1)  # (B*n, C, h, w) -> (B, n*C)
    torch.testing.assert_close(method.embeddings(batch)[:, : features.shape[1]], features)
    shared = build()
    assert shared.crop_statistics is None
    assert shared.state_dict().keys() == method.state_dict().keys() - {
        f"crop_statistics.{name}" for name in own.state_dict()
    }


def test_dropout_is_off_in_evaluation() -> None:
    method, batch = build(), images()
    assert torch.equal(method(batch), method(batch))
    method.train()
    assert not torch.equal(method(batch), method(batch))


def test_the_navigator_has_a_learning_rate_of_its_own() -> None:
    method = build(navigator_lr_factor=10.0)
    config = OptimConfig(lr=0.01, new_layers_lr_factor=0.1)
    rates = {
        id(parameter): group["lr"]
        for group in parameter_groups(method, config)
        for parameter in group["params"]
    }
    assert {rates[id(parameter)] for parameter in method.navigator.parameters()} == {0.01}
    heads = (method.raw, method.teacher, method.scrutinizer)
    assert {rates[id(parameter)] for head in heads for parameter in head.parameters()} == {0.001}


def test_label_smoothing_leaves_the_teachers_order() -> None:
    method, batch = build(), images()
    plain = method.objective(batch, TARGETS).terms
    method.criterion = ClassificationLoss(torch.tensor([9.0, 1.0, 1.0]), 0.2)
    changed = method.objective(batch, TARGETS).terms
    assert torch.equal(plain["ranking"], changed["ranking"])
    assert not torch.isclose(plain["parts"], changed["parts"])


def test_mixed_targets_of_one_class_each_are_that_class() -> None:
    method, batch = build(), images()
    mixed = F.one_hot(TARGETS, 3).float()
    torch.testing.assert_close(
        dict(method.objective(batch, mixed).terms), dict(method.objective(batch, TARGETS).terms)
    )


def test_crops_and_anchors_follow_the_image_unless_they_are_given() -> None:
    assert build(crop_size=64)(images()).shape == (2, 3)
    small, large = build(), build(anchor_sizes=(96, 192, 384))
    assert not torch.equal(small.boxes(images()), large.boxes(images()))
    assert small(torch.randn(1, 3, 64, 96)).shape == (1, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_crops": 7}, "num_crops must be between 1 and num_proposals, 6, not 7"),
        ({"num_crops": 0}, "num_crops must be between 1"),
        ({"crop_size": 1}, "crop_size must be between 2 and 4096, not 1"),
        ({"anchor_sizes": (48, 96)}, "anchor_sizes must be 3 numbers above 0"),
        ({"iou_threshold": 0}, "iou_threshold must be above 0"),
        ({"margin": -1}, "margin must be at least 0"),
        ({"view_size": 1}, "view_size must be between 2 and 4096, not 1"),
        ({"dropout": 1}, "dropout must be at least 0 and below 1"),
        ({"navigator_lr_factor": 0}, "navigator_lr_factor must be above 0 and finite, not 0"),
        ({"navigator_lr_factor": math.nan}, "navigator_lr_factor must be above 0 and finite"),
        ({"parts_reduction": "means"}, "Did you mean 'mean'"),
    ],
)
def test_options_that_cannot_work_are_refused(options: dict[str, object], message: str) -> None:
    assert message in refusal(build, **options)


def test_a_backbone_that_does_not_take_the_crops_is_refused() -> None:
    args = {"img_size": 64, "embed_dim": 16, "num_heads": 2, "depth": 4}
    method = build("vit_tiny_patch16_224", backbone_args=args)
    message = refusal(method.check_image_size, 64)
    assert "uses crops of 32 pixels, which backbone 'vit_tiny_patch16_224' does not accept" in message
    assert "--model.crop_size 64" in message
    assert build("vit_tiny_patch16_224", backbone_args=args, crop_size=64).check_image_size(64) is None
    dynamic = build("vit_tiny_patch16_224", backbone_args={**args, "dynamic_img_size": True})
    assert dynamic.check_image_size(64) is None
    assert dynamic(images(1, 64)).shape == (1, 3)


def test_a_view_is_no_larger_than_the_image() -> None:
    method = build(view_size=96)
    assert method.backbone.image_size == 96
    assert method.check_image_size(200) is None
    assert "view_size 96 is larger than the images, which have 64 pixels" in refusal(
        method.check_image_size, 64
    )


def test_too_few_anchors_for_the_proposals_are_refused() -> None:
    method = build(num_proposals=40)
    assert "num_proposals 40 is too large: images of 64 pixels have 39 anchors" in refusal(
        method.check_image_size, 64
    )
    assert build(num_proposals=39).check_image_size(64) is None


def test_evaluation_takes_the_joined_head_as_the_prediction() -> None:
    method, batch = build(), images(3)
    outputs = evaluate(method, [(batch, torch.tensor([0, 1, 2]))], "cpu", channels_last=False)
    assert list(outputs.heads) == ["raw", "parts", "joined"]
    torch.testing.assert_close(outputs.logits, outputs.heads["joined"])


def test_explanations_hold_the_boxes() -> None:
    method, batch = build(), images()
    for own, explanation in zip(method.boxes(batch), explain_images(method, batch), strict=True):
        assert explanation.boxes is not None
        np.testing.assert_array_equal(explanation.boxes, own)
        assert list(explanation.maps) == ["last"]


def test_grad_cam_is_of_the_pass_of_the_images() -> None:
    pytest.importorskip("captum")
    method, batch = build(num_crops=1, num_proposals=1), images()
    seen: list[Tensor] = []
    hook = method.backbone.stage_maps["last"].register_forward_hook(lambda *call: seen.append(call[2]))
    logits = method(batch)[:, 1].sum()
    hook.remove()
    (gradient,) = torch.autograd.grad(logits, seen[0])
    expected = (gradient.mean((2, 3), keepdim=True) * seen[0]).sum(1).relu()
    for number, explanation in enumerate(explain_images(method, batch, maps="class", classes=1)):
        np.testing.assert_allclose(
            explanation.maps["Grad-CAM last"], expected[number].detach(), rtol=1e-4, atol=1e-6
        )


@pytest.mark.slow
def test_openvino_makes_the_same_view(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="torch.onnx needs onnxscript")
    openvino = pytest.importorskip("openvino")
    method, path, given = build(view_size=64), tmp_path / "nts.onnx", images()
    with torch.no_grad():
        torch.onnx.export(method, (given,), dynamo=True, verbose=False).save(path)
        expected = method(given)
    compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    np.testing.assert_allclose(compiled(given.numpy())[0], expected, rtol=1e-3, atol=1e-4)
