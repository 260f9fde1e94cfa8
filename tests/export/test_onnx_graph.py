"""The ONNX graphs of small networks, run by ONNX Runtime."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from crossx.export.onnx_graph import export_onnx


class Reductions(nn.Module):
    """Means and maxima of maps over all positions, and over something else."""

    def forward(self, maps: Tensor) -> tuple[Tensor, ...]:
        halves = torch.stack([maps, -maps], 1)  # (B, C, H, W) -> (B, 2, C, H, W)
        return (
            maps.mean((2, 3), keepdim=True),
            maps.amax((-1, -2), keepdim=True),
            maps.mean((2, 3)),
            maps.amax(1, keepdim=True),
            maps.mean((1, 2), keepdim=True),
            halves.mean((2, 3), keepdim=True),
            maps.mean() * maps,
        )


def run(graph: Any, maps: Tensor) -> list[np.ndarray[Any, Any]]:
    session = pytest.importorskip("onnxruntime").InferenceSession(
        graph.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    outputs: list[np.ndarray[Any, Any]] = session.run(None, {"images": maps.numpy()})
    return outputs


@pytest.mark.slow
def test_means_and_maxima_over_all_positions_are_pooling() -> None:
    pytest.importorskip("onnxscript")
    network, maps = Reductions().eval(), torch.randn(3, 4, 5, 6)
    graph = export_onnx(network, maps, [f"y{number}" for number in range(7)])
    kinds = [node.op_type for node in graph.graph.node]
    assert kinds.count("GlobalAveragePool") == 2
    assert kinds.count("GlobalMaxPool") == 1
    assert sum(kind.startswith("Reduce") for kind in kinds) == 4
    for exported, expected in zip(run(graph, maps), network(maps), strict=True):
        np.testing.assert_allclose(exported, expected.numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_axes_that_nothing_reads_any_more_leave_the_graph() -> None:
    pytest.importorskip("onnxscript")
    graph = export_onnx(nn.AdaptiveAvgPool2d(1).eval(), torch.randn(2, 3, 4, 4), ["pooled"])
    assert [node.op_type for node in graph.graph.node] == ["GlobalAveragePool"]
    assert not graph.graph.initializer
