"""Biases of int8 graphs, compared with PyTorch's layers on constant maps."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from crossx.export.biases import correct_biases
from crossx.export.onnx_graph import export_onnx

SIDE = 8
LAYERS = ("dense", "depthwise", "grouped", "pointwise", "classifier")


class Layers(nn.Module):
    """Every kind of layer that has int8 weights."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Conv2d(3, 8, 3, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
        self.grouped = nn.Conv2d(8, 12, 3, 2, groups=4)
        self.pointwise = nn.Conv2d(12, 12, 1)
        self.classifier = nn.Linear(12, 4)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        maps = images.float() / 255
        for layer in (self.dense, self.depthwise, self.grouped, self.pointwise):
            maps = layer(maps).relu()
        logits = self.classifier(maps.mean((2, 3)))  # (B, C, H, W) -> (B, C) -> (B, K)
        return logits, logits.softmax(1)


def quantized(network: nn.Module, images: Tensor, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    """Return a network's float graph and its int8 graph with the biases as ONNX Runtime wrote them."""
    for package in ("onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    from crossx.export import quantize

    graph = export_onnx(network.eval(), images)
    with monkeypatch.context() as patch:
        patch.setattr(quantize, "correct_biases", lambda *arguments: None)
        return graph, quantize.quantize_onnx(graph, [images]).graph


def read(graph: Any, layer: str) -> tuple[Tensor, Tensor]:
    """Return a layer's weights and biases, from integers and scales."""
    from onnx import numpy_helper

    stored = {
        entry.name: torch.from_numpy(numpy_helper.to_array(entry).copy()) for entry in graph.graph.initializer
    }
    made_by = {node.output[0]: node for node in graph.graph.node}
    (node,) = (node for node in graph.graph.node if node.name == layer)
    weight, bias = (made_by[name].input for name in node.input[1:])
    scale = stored[weight[1]].double().reshape(-1, *[1] * (stored[weight[0]].ndim - 1))
    weights = stored[weight[0]].double() * scale
    return weights, stored[bias[0]].double() * stored[bias[1]].double()


@pytest.mark.slow
def test_each_layer_keeps_its_mean_output(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    network, images = Layers(), torch.randint(256, (6, 3, SIDE, SIDE), dtype=torch.uint8)
    graph, corrected = quantized(network, images, monkeypatch)
    before = {layer: read(corrected, layer)[1] for layer in LAYERS}
    correct_biases(graph, corrected, [images[:4], images[4:]])

    maps = images.float() / 255
    for name in LAYERS:
        layer = network.get_submodule(name)
        exact: Tensor = layer.weight.detach().double()  # type: ignore[operator, union-attr, assignment]
        weights, bias = read(corrected, name)
        means = maps.mean([0, *range(2, maps.ndim)]).double()
        if isinstance(layer, nn.Conv2d):
            # what the layer makes of constant maps
            constant = means[None, :, None, None].expand(1, -1, 3, 3)
            outputs = [
                F.conv2d(constant, own, groups=layer.groups, padding=own.shape[-1] // 2)[0, :, 1, 1]
                for own in (weights, exact)
            ]
            maps = layer(maps).relu()
        else:
            outputs = [own @ means for own in (weights, exact)]
        if name == "pointwise":
            maps = maps.mean((2, 3))
        shift = outputs[0] - outputs[1]
        assert shift.abs().max() > 1e-5
        torch.testing.assert_close(bias, before[name] - shift, rtol=1e-3, atol=2e-5)


@pytest.mark.slow
def test_logits_are_closer_on_average(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    network, images = Layers(), torch.randint(256, (64, 3, SIDE, SIDE), dtype=torch.uint8)
    graph, rounded = quantized(network, images, monkeypatch)
    before = mean_logits(rounded, images) - mean_logits(graph, images)
    correct_biases(graph, rounded, [images])
    after = mean_logits(rounded, images) - mean_logits(graph, images)
    assert np.abs(after).max() < np.abs(before).max() / 2


@pytest.mark.slow
def test_a_bias_of_two_layers_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    images = torch.randint(256, (4, 3, SIDE, SIDE), dtype=torch.uint8)
    graph, rounded = quantized(Layers(), images, monkeypatch)
    nodes = {node.name: node for node in rounded.graph.node}
    nodes["depthwise"].input[2] = nodes["dense"].input[2]
    before = {layer: read(rounded, layer)[1] for layer in LAYERS}
    correct_biases(graph, rounded, [images])
    changed = {layer for layer in LAYERS if not torch.equal(read(rounded, layer)[1], before[layer])}
    assert changed == {"grouped", "pointwise", "classifier"}


class Unusual(nn.Module):
    """A convolution in one dimension, and one whose weights are computed."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Conv1d(3 * SIDE, 6, 3)
        self.kernel = nn.Parameter(torch.randn(4, 6, 1))
        self.bias = nn.Parameter(torch.randn(4))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        rows = self.rows(
            (images.float() / 255).flatten(1, 2)
        ).relu()  # (B, 3, S, S) -> (B, 3*S, S) -> (B, 6, S-2)
        # depends on the images, so that it is no constant
        kernel = self.kernel * (1 + 0 * rows.sum())
        logits = F.conv1d(rows, kernel, self.bias).mean(2)  # -> (B, K, S-2) -> (B, K)
        return logits, logits.softmax(1)


@pytest.mark.slow
def test_other_convolutions(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    network, images = Unusual(), torch.randint(256, (8, 3, SIDE, SIDE), dtype=torch.uint8)
    graph, rounded = quantized(network, images, monkeypatch)
    before = read(rounded, "rows")[1]
    correct_biases(graph, rounded, [images])
    weights, bias = read(rounded, "rows")
    means = (images.double() / 255).flatten(1, 2).mean((0, 2))
    # (C', C, 3) -> (C', C) x (C,) -> (C',)
    shift = (weights - network.rows.weight.detach().double()).sum(2) @ means
    torch.testing.assert_close(bias, before - shift, rtol=1e-3, atol=2e-5)
    assert np.isfinite(mean_logits(rounded, images)).all()


def mean_logits(graph: Any, images: Tensor) -> np.ndarray[Any, Any]:
    import onnxruntime

    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    mean: np.ndarray[Any, Any] = session.run(["logits"], {"images": images.numpy()})[0].mean(0)
    return mean
