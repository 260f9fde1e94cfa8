"""The ONNX graph of a network: export, the names of its nodes, and pooling that ONNX Runtime is fast at."""

from __future__ import annotations

from ast import literal_eval
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from crossx.predict.inference import OUTPUTS

if TYPE_CHECKING:
    import onnx

_GLOBAL_POOLS = {"ReduceMean": "GlobalAveragePool", "ReduceMax": "GlobalMaxPool"}


def export_onnx(network: nn.Module, images: Tensor, outputs: Sequence[str] = OUTPUTS) -> onnx.ModelProto:
    """Export a network to ONNX for any batch size, with the input name ``images``.

    Args:
        network: A module of one tensor, in evaluation mode.
        images: An example input, (B, C, H, W).
        outputs: Names of the outputs.
    """
    program = torch.onnx.export(
        network,
        (several_images(images),),
        input_names=["images"],
        output_names=list(outputs),
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        dynamo=True,
        verbose=False,
    )
    assert program is not None
    graph: onnx.ModelProto = program.model_proto
    _pool_globally(graph)
    _name_nodes(graph)
    return graph


def several_images(images: Tensor) -> Tensor:
    """Return two images, (2, C, H, W), since torch.export specialises a batch of one."""
    return images[:1].repeat(2, 1, 1, 1)


def _pool_globally(graph: onnx.ModelProto) -> None:
    """Write means and maxima over all positions of maps as pooling.

    ONNX Runtime computes int8 networks in the order (B, H, W, C). It pulls reductions into that order, where they take
    ten times as long as pooling in (B, C, H, W), and on one thread.
    """
    import onnx

    # where the exporter wrote x.mean((2, 3)), the axes are a constant
    axes = {tensor.name: tensor for tensor in graph.graph.initializer if tensor.dims == [2]}
    values = (*graph.graph.input, *graph.graph.value_info)
    ranks = {value.name: len(value.type.tensor_type.shape.dim) for value in values}
    nodes = []
    for node in graph.graph.node:
        nodes.append(node)
        # a reduction of everything has no axes
        found = axes.get(node.input[1]) if node.op_type in _GLOBAL_POOLS and len(node.input) > 1 else None
        if found is None or ranks.get(node.input[0]) != 4:
            continue
        if sorted(int(axis) % 4 for axis in onnx.numpy_helper.to_array(found)) != [2, 3]:
            continue
        if any(entry.name == "keepdims" and entry.i == 0 for entry in node.attribute):
            # (B, C, 1, 1) -> (B, C)
            (pooled,), (_, over) = node.output, node.input
            node.output[0] = f"{pooled}_pooled"
            squeeze = onnx.helper.make_node("Squeeze", [node.output[0], over], [pooled])
            squeeze.metadata_props.extend(node.metadata_props)
            nodes.append(squeeze)
        node.op_type = _GLOBAL_POOLS[node.op_type]
        del node.input[1:], node.attribute[:]
    del graph.graph.node[:]
    graph.graph.node.extend(nodes)
    read = {name for node in nodes for name in node.input}
    for tensor in axes.values():
        if tensor.name not in read:
            graph.graph.initializer.remove(tensor)


def _name_nodes(graph: onnx.ModelProto) -> None:
    """Name nodes after the method's modules: ``backbone.trunk.conv1``, ``backbone.trunk.act1/Relu``."""
    weights = {tensor.name for tensor in graph.graph.initializer}
    seen: Counter[str] = Counter()
    for node in graph.graph.node:
        # a batch norm is fused into the convolution, whose weight still has its name
        weight = next((name for name in node.input[1:2] if name in weights and name.endswith(".weight")), "")
        scopes = next(
            (entry.value for entry in node.metadata_props if entry.key.endswith("name_scopes")), "[]"
        )
        # the last one is the operator
        module = next((name for name in reversed(literal_eval(scopes)[:-1]) if name), "")
        name = weight.removesuffix(".weight") or "/".join(filter(None, (module, node.op_type)))
        name = name.removeprefix("method.")
        seen[name] += 1
        node.name = name if seen[name] == 1 else f"{name}_{seen[name]}"
