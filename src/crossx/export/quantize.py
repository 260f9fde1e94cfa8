"""Post-training quantisation to int8, calibrated on real images."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from crossx.layers import MergedLogits, SeparateGates

if TYPE_CHECKING:
    import onnx
    import openvino


def quantize_onnx(graph: onnx.ModelProto, batches: Sequence[Tensor]) -> onnx.ModelProto:
    """Quantise a graph to per-channel int8 weights and uint8 activations, in ONNX's QDQ format.

    Weights use 7 bits: processors without VNNI or AMX add two products in 16 bits, which could overflow otherwise
    (``reduce_range``, https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html).

    Args:
        graph: A graph of ``export_onnx``.
        batches: Images to calibrate on, uint8 (B, 3, S, S).
    """
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.inputs: Iterator[Tensor] = iter(batches)

        def get_next(self) -> dict[str, Any] | None:
            images = next(self.inputs, None)
            return None if images is None else {"images": images.contiguous().numpy()}

    with tempfile.TemporaryDirectory() as folder, _quiet():
        whole, path = Path(folder) / "fp32.onnx", Path(folder) / "int8.onnx"
        # from a file, since quantize_static modifies a graph in memory
        onnx.save(graph, whole)
        quantize_static(
            whole,
            path,
            Reader(),
            per_channel=True,
            reduce_range=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            nodes_to_exclude=[node.name for node in graph.graph.node if _stays_in_float(node)],
        )
        return onnx.load(path)


def _stays_in_float(node: onnx.NodeProto) -> bool:
    # quantised probabilities, in steps of 1/255, would not equal softmax(logits / T)
    if node.op_type == "Softmax":
        return True
    modules = next(
        (entry.value for entry in node.metadata_props if entry.key.endswith("class_hierarchy")), ""
    )
    return any(layer.__name__ in modules for layer in (SeparateGates, MergedLogits))


def quantize_openvino(graph: openvino.Model, batches: Sequence[Tensor]) -> openvino.Model:
    """Quantise a graph to int8 weights and activations with NNCF; arguments as in ``quantize_onnx``."""
    import nncf

    images = [image[None].contiguous().numpy() for batch in batches for image in batch]
    nncf.set_log_level(logging.ERROR)
    with _quiet():
        return nncf.quantize(
            graph, nncf.Dataset(images), preset=nncf.QuantizationPreset.MIXED, subset_size=len(images)
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the libraries' progress bars and hints."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stdout(nowhere):
            yield
    finally:
        logging.disable(level)
