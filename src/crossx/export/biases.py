"""Biases of an int8 ONNX graph, corrected for the rounding of the weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from crossx.predict.exported import open_session

if TYPE_CHECKING:
    import onnx


def correct_biases(graph: onnx.ModelProto, quantized: onnx.ModelProto, batches: Sequence[Tensor]) -> None:
    """Shift the biases of convolutions and classifiers so that their outputs have the mean of the float graph.

    Rounding the weights W by e changes the mean output of a layer by e E[x]. A kernel of few weights, such as a
    depthwise one, has few errors to average, and its inputs after a ReLU are not zero on average. E[x] is the mean of
    each channel over positions and images; the padding is not considered. Nagel et al., 2019, "Data-Free Quantization
    Through Weight Equalization and Bias Correction", section 4.2, https://arxiv.org/abs/1906.04721. Layers without a
    bias of their own stay as they are.

    Args:
        graph: The float graph.
        quantized: The graph made of it, in the format QDQ with nodes of the same names; changed in place.
        batches: Images, uint8 (B, 3, S, S).
    """
    from onnx import numpy_helper

    floats = {tensor.name: tensor for tensor in graph.graph.initializer}
    before = {node.name: node for node in graph.graph.node}
    stored = {tensor.name: tensor for tensor in quantized.graph.initializer}
    dequantized = {
        node.output[0]: node for node in quantized.graph.node if node.op_type == "DequantizeLinear"
    }
    readers = Counter(name for node in quantized.graph.node for name in node.input)
    layers = [
        node
        for node in quantized.graph.node
        if node.op_type in ("Conv", "Gemm") and len(node.input) == 3
        # weights that the network computes are none of the file's
        if node.name in before and before[node.name].input[1] in floats
        if all(name in dequantized and dequantized[name].input[0] in stored for name in node.input[1:])
        # two layers may have equal biases, stored once
        if readers[node.input[2]] == readers[dequantized[node.input[2]].input[0]] == 1
    ]
    if not layers:
        return
    means = _input_means(graph, [before[node.name] for node in layers], batches)
    for node in layers:
        weight, bias = (dequantized[name] for name in node.input[1:])
        exact = numpy_helper.to_array(floats[before[node.name].input[1]]).astype(np.float64)
        rounded = _dequantize(weight, stored)
        shift = _mean_outputs(node, rounded - exact, means[before[node.name].input[0]])
        tensor, scale = stored[bias.input[0]], numpy_helper.to_array(stored[bias.input[1]])
        levels = numpy_helper.to_array(tensor) - np.round(shift / scale)
        limits = np.iinfo(np.int32)
        corrected = levels.clip(limits.min, limits.max).astype(np.int32)
        tensor.CopyFrom(numpy_helper.from_array(corrected, tensor.name))


def _input_means(
    graph: onnx.ModelProto, nodes: Sequence[onnx.NodeProto], batches: Sequence[Tensor]
) -> dict[str, NDArray[np.float64]]:
    """Return the name of each input -> the mean of its channels over images and positions, (C,)."""
    import onnx

    inputs = {node.input[0]: node.op_type for node in nodes}
    pooled = {name: f"mean of {name}" if kind == "Conv" else name for name, kind in inputs.items()}
    measured = onnx.ModelProto()
    measured.CopyFrom(graph)
    # in the graph, since all maps of a batch can be gigabytes
    measured.graph.node.extend(
        onnx.helper.make_node("GlobalAveragePool", [name], [pooled[name]])
        for name, kind in inputs.items()
        if kind == "Conv"
    )
    del measured.graph.output[:]
    measured.graph.output.extend(onnx.ValueInfoProto(name=name) for name in pooled.values())
    session = open_session(measured.SerializeToString())
    sums: dict[str, Any] = dict.fromkeys(inputs, 0.0)
    for batch in batches:
        outputs = session.run(None, {"images": batch.contiguous().numpy()})
        for name, found in zip(inputs, outputs, strict=True):
            # (B, C[, 1, 1]) -> (C,)
            sums[name] = sums[name] + found.reshape(len(batch), -1).sum(0, dtype=np.float64)
    images = sum(map(len, batches))
    return {name: total / images for name, total in sums.items()}


def _dequantize(node: onnx.NodeProto, stored: Mapping[str, onnx.TensorProto]) -> NDArray[np.float64]:
    """Return the weights that a node makes of integers."""
    from onnx import numpy_helper

    levels, scale, zero = (numpy_helper.to_array(stored[name]).astype(np.float64) for name in node.input)
    axis = _attribute(node, "axis", 1)
    shape = [-1 if place == axis else 1 for place in range(levels.ndim)] if scale.ndim else []
    weights: NDArray[np.float64] = (levels - zero.reshape(shape)) * scale.reshape(shape)
    return weights


def _mean_outputs(
    node: onnx.NodeProto, weights: NDArray[np.float64], means: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return the mean output (C',) of a layer with these weights for inputs with means (C,)."""
    if node.op_type == "Gemm":
        outputs: NDArray[np.float64] = (weights if _attribute(node, "transB", 0) else weights.T) @ means
        return outputs
    groups = _attribute(node, "group", 1)
    # (C', C/G, h, w) -> (G, C'/G, C/G) x (G, C/G) -> (G, C'/G) -> (C',)
    kernels = weights.sum(tuple(range(2, weights.ndim))).reshape(groups, -1, weights.shape[1])
    by_group: NDArray[np.float64] = np.einsum("goi,gi->go", kernels, means.reshape(groups, -1))
    return by_group.ravel()


def _attribute(node: onnx.NodeProto, name: str, default: int) -> int:
    return next((entry.i for entry in node.attribute if entry.name == name), default)
