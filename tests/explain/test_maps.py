import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from crossx.backbones import Backbone, create_backbone
from crossx.errors import CrossXError, UsageError
from crossx.explain import explain_images
from crossx.explain.gradcam import grad_cam
from crossx.explain.maps import combine, min_max
from crossx.methods import Method, create_method
from crossx.methods.base import Objective
from refusals import refusal


def build(name: str, backbone: str = "resnet10t", **options: object) -> Method:
    torch.manual_seed(0)
    return create_method(name, backbone=backbone, num_classes=4, **options).eval()


def images(number: int = 2) -> Tensor:
    return torch.randn(number, 3, 64, 96, generator=torch.Generator().manual_seed(1))


class TwoLayers(Method):
    """A method with a head of two layers on GAP of both stages: no exact class maps."""

    def __init__(self, backbone: Backbone, parts: int = 0) -> None:
        super().__init__(backbone, 4)
        if parts:
            backbone.attach_osme("last", parts, 4, None)
        width = max(parts, 1) * backbone.channels["last"] + backbone.channels["previous"]
        self.head = nn.Sequential(nn.Linear(width, 8), nn.Tanh(), nn.Linear(8, 4))

    def head_logits(self, images: Tensor) -> dict[str, Tensor]:
        return {"both": self.head(self.embeddings(images))}

    def objective(self, images: Tensor, targets: Tensor) -> Objective:
        raise NotImplementedError

    def activation_maps(self, images: Tensor) -> dict[str, Tensor]:
        maps = self.backbone(images)
        return {stage: (m if m.dim() == 5 else m[:, None]).mean(2) for stage, m in maps.items()}

    def embeddings(self, images: Tensor) -> Tensor:
        maps = self.backbone(images)
        return torch.cat([maps[stage].mean((-2, -1)).flatten(1) for stage in ("previous", "last")], 1)


def two_layers(parts: int = 0) -> TwoLayers:
    torch.manual_seed(0)
    return TwoLayers(create_backbone("resnet10t", pretrained=False), parts).eval()


def test_maps_are_named_in_the_order_of_figure_5() -> None:
    (explanation, _) = explain_images(build("crossx"), images(), maps="both")
    stages = ["previous", "last", "merged"]
    parts = [f"{stage} part {part}" for stage in [*stages, "combined"] for part in (1, 2)]
    assert list(explanation.maps) == [*parts, *(f"CAM {name}" for name in parts[:6])]
    shapes = {name: values.shape for name, values in explanation.maps.items()}
    assert shapes["last part 1"] == shapes["CAM last part 2"] == (2, 3)
    assert shapes["merged part 1"] == (4, 6)
    assert shapes["combined part 2"] == (64, 96)


def test_one_stage_of_one_part_is_named_by_the_stage_alone() -> None:
    assert list(explain_images(build("plain"), images(1), maps="both")[0].maps) == ["last", "CAM last"]
    assert list(explain_images(build("plain"), images(1))[0].maps) == ["last"]
    assert list(explain_images(build("plain"), images(1), maps="class")[0].maps) == ["CAM last"]


def test_activation_maps_and_probabilities_are_the_methods() -> None:
    method, batch = build("crossx", num_parts=3), images(3)
    with torch.no_grad():
        maps, probabilities = method.activation_maps(batch), method(batch).softmax(1)
    for number, explanation in enumerate(explain_images(method.train(), batch)):
        np.testing.assert_allclose(
            explanation.maps["previous part 3"], maps["previous"][number, 2], rtol=1e-5
        )
        np.testing.assert_allclose(explanation.probabilities, probabilities[number], rtol=1e-5)
        assert explanation.target == explanation.prediction == probabilities[number].argmax()
    assert not method.training


def test_combined_is_the_mean_of_the_normalised_maps_resized() -> None:
    batch = images(1)
    (explanation,) = explain_images(build("crossx"), batch)
    expected = []
    for stage in ("previous", "last", "merged"):
        values = explanation.maps[f"{stage} part 2"].astype(np.float64)
        unit = (values - values.min()) / (values.max() - values.min())
        # Pillow's bilinear filter is the same as long as the map grows.
        resized = Image.fromarray(unit.astype(np.float32)).resize((96, 64), Image.Resampling.BILINEAR)
        expected.append(np.asarray(resized))
    np.testing.assert_allclose(explanation.maps["combined part 2"], np.mean(expected, axis=0), atol=1e-5)


def test_stages_of_different_numbers_of_parts_are_not_combined() -> None:
    (explanation,) = explain_images(two_layers(parts=2), images(1))
    assert list(explanation.maps) == ["previous", "last part 1", "last part 2"]


def test_constant_maps_are_zero() -> None:
    assert min_max(torch.full((1, 2, 3, 3), 7.0)).eq(0).all()
    assert combine({"a": torch.ones(1, 2, 3, 3)}, (6, 6)).eq(0).all()


def test_each_image_has_a_class_of_its_own() -> None:
    method, batch = build("plain"), images(3)
    given = [
        explanation.maps["CAM last"]
        for explanation in explain_images(method, batch, maps="class", classes=[0, 3, 1])
    ]
    for number, label in enumerate((0, 3, 1)):
        alone = explain_images(method, batch[number : number + 1], maps="class", classes=label)[0]
        assert alone.target == label
        np.testing.assert_allclose(given[number], alone.maps["CAM last"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("parts", [0, 2])
def test_grad_cam_is_its_equations(parts: int) -> None:
    method, batch, classes = two_layers(parts), images(), torch.tensor([1, 3])
    maps = grad_cam(method, batch, classes)
    assert list(maps) == ["previous", "last"]
    stages = method.backbone(batch)
    pooled = [stages[stage].mean((-2, -1)).flatten(1) for stage in ("previous", "last")]
    logits = method.head(torch.cat(pooled, 1)).gather(1, classes[:, None]).sum()
    for stage in ("previous", "last"):
        values = stages[stage]
        (gradient,) = torch.autograd.grad(logits, values, retain_graph=True)
        if values.dim() == 4:
            values, gradient = values[:, None], gradient[:, None]
        for image in range(2):
            for part in range(values.shape[1]):
                weights = [gradient[image, part, c].mean() for c in range(values.shape[2])]
                expected = sum(w * m for w, m in zip(weights, values[image, part], strict=True)).relu()
                torch.testing.assert_close(maps[stage][image, part], expected)
    assert maps["last"].shape[1] == max(parts, 1)


def test_grad_cam_equals_cam_where_both_are_defined() -> None:
    """For a linear head on GAP the two differ by the number of places (Selvaraju et al., section 3.1)."""
    method, batch, classes = build("plain"), images(), torch.tensor([1, 3])
    cam = method.class_activation_maps(batch, classes)
    assert cam is not None
    places = cam["last"].shape[-2] * cam["last"].shape[-1]
    torch.testing.assert_close(grad_cam(method, batch, classes)["last"] * places, cam["last"].relu())


def test_grad_cam_leaves_nothing_behind() -> None:
    method = two_layers()
    for parameter in method.parameters():
        parameter.requires_grad_(False)
    before = method(images())
    grad_cam(method, images(), torch.tensor([0, 1]))
    assert not any(place._forward_hooks for place in method.backbone.stage_maps.values())
    assert torch.equal(method(images()), before)
    assert all(parameter.grad is None for parameter in method.parameters())


def test_networks_that_classify_no_plain_average_get_grad_cam() -> None:
    method = build("plain", "convnext_atto", backbone_args={"dims": (8, 8, 16, 16), "depths": (1, 1, 1, 1)})
    assert method.class_activation_maps(images(), torch.tensor([0, 1])) is None
    (explanation,) = explain_images(method, images(1), maps="both")
    assert list(explanation.maps) == ["last", "Grad-CAM last"]
    assert explanation.maps["Grad-CAM last"].min() >= 0


def test_a_classified_token_has_no_class_maps() -> None:
    args = {"img_size": 64, "embed_dim": 16, "num_heads": 2, "depth": 4}
    method = build("plain", "vit_tiny_patch16_224", backbone_args=args)
    batch = images(1)[..., :64]
    assert list(explain_images(method, batch)[0].maps) == ["last"]
    message = refusal(explain_images, method, batch, maps="class")
    assert "method 'plain' on backbone 'vit_tiny_patch16_224' has no class maps" in message
    assert not method.backbone.stage_maps["last"]._forward_hooks


def test_missing_captum_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "captum.attr", None)
    assert "pip install 'crossx[explain]'" in refusal(explain_images, two_layers(), images(), maps="class")
    explain_images(build("crossx"), images(), maps="both")


def test_what_cannot_work_is_refused() -> None:
    method = build("plain")
    assert "unknown maps 'activations'. Did you mean 'activation'?" in refusal(
        explain_images, method, images(), maps="activations"
    )
    for classes in (4, -1, [0], [0, 1, 2]):
        with pytest.raises(UsageError, match="one class or 2, each from 0 to 3"):
            explain_images(method, images(), maps="class", classes=classes)
    with torch.no_grad():
        method.classifier.weight.fill_(torch.nan)
    with pytest.raises(CrossXError, match="the map 'CAM last' is not finite"):
        explain_images(method, images(), maps="class")
